"""AL-RNN's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.harness import check_claims
from experiments.sequence import alrnn as experiment
from jaxpapers.data.download import ENVIRONMENT_VARIABLE
from jaxpapers.train import read_metrics

REPOSITORY = Path(__file__).parents[2]
# The measured column of the card's table of claims, which a faithful run should resemble.
MEASURED = {
    "lorenz63/P0/d_stsp": [12.3, 12.9, 14.6],
    "lorenz63/P1/d_stsp": [13.5, 10.7, 11.1],
    "lorenz63/P2/d_stsp": [0.97, 1.66, 1.00],
    "rossler/P0/d_stsp": [14.76, 14.76, 14.76],
    "rossler/P1/d_stsp": [1.01, "nan", 1.09],
    "rossler/P2/d_stsp": [0.58, 1.18, 0.71],
    "rossler/minimal/regions": [2, 0, 2],
    "lorenz63/minimal/fixed_points": [
        [[1.17, 1.02, 0.64], [-1.10, -0.97, 0.57], [-0.03, -0.01, -2.78]],
        [[1.16, 1.00, 0.68], [-1.07, -0.92, 0.63], [0.03, 0.03, -2.29]],
        [[1.12, 0.98, 0.49], [-1.09, -0.96, 0.55], [0.03, 0.03, -2.41]],
    ],
    "rossler/minimal/fixed_points": [[[-0.01, 0.14, -0.23]], [], [[-0.04, 0.15, -0.23]]],
    "rossler/minimal/radii": [[1.0067], [], [1.0059]],
    "lorenz63/minimal/exponent": [0.0101, 0.0196, 0.0197],
    "rossler/minimal/exponent": [0.0067, "nan", 0.0065],
    "newton/tau/T256/iterations": [9, 11, 13],
    "newton/tau/T1024/iterations": [22, 27, 32],
    "newton/gtf/T256/iterations": [4, 4, 4],
    "newton/gtf/T1024/iterations": [5, 5, 5],
    **{f"newton/{forcing}/T{length}/converged": [True] * 3 for forcing in ("tau", "gtf") for length in (256, 1024)},
    **{f"newton/{forcing}/T{length}/error": 1e-14 for forcing in ("tau", "gtf") for length in (256, 1024)},
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["rossler_p1"].startswith("P=0: 14.76, 14.76, 14.76; P=1: 1.01, failed, 1.09")
    assert texts["newton_exact"].startswith("tau=16: 13 at T=256, 32 at T=1024")


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("lorenz_p2", {"lorenz63/P2/d_stsp": [0.9, 4.1, 5.0]}),
        ("lorenz_p2", {"lorenz63/P2/d_stsp": [0.9, "nan", "nan"]}),
        ("lorenz_p2", {"lorenz63/P1/d_stsp": [7.9, 7.0, 12.0]}),
        ("rossler_p1", {"rossler/P1/d_stsp": [3.1, "nan", 3.5]}),
        ("rossler_p1", {"rossler/minimal/regions": [1, 0, 2]}),
        ("rossler_p1", {"rossler/P0/d_stsp": [9.9, 14.7, 14.7]}),
        ("fixed_points", {"lorenz63/minimal/fixed_points": [[[1.07, 0.94, 0.40], [0.0, 0.0, -2.7]]] * 3}),
        ("fixed_points", {"lorenz63/P2/d_stsp": [2.1, 3.0, 3.0]}),
        ("fixed_points", {"rossler/minimal/radii": [[0.999], [], [1.0059]]}),
        ("fixed_points", {"rossler/minimal/fixed_points": [[], [], [[-0.04, 0.15, -0.23]]]}),
        ("chaos", {"lorenz63/minimal/exponent": [0.0101, -0.001, 0.0197]}),
        ("chaos", {"rossler/minimal/exponent": [0.0067, "nan", 0.0145]}),
        ("newton_exact", {"newton/tau/T256/iterations": [9, 11, 32]}),
        ("newton_exact", {"newton/tau/T1024/error": 2e-10}),
        ("newton_exact", {"newton/gtf/T1024/iterations": [5, 9, 5]}),
        ("newton_exact", {"newton/tau/T256/converged": [True, False, True]}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    statuses = status(changes)
    assert statuses[claim] == "fails"


def test_presets_keep_the_papers_recipe_where_they_say_so():
    paper = experiment.get_config("paper")
    assert (paper.lorenz63.tau, paper.lorenz63.window, paper.lorenz63.updates) == (16, 200, 100_000)
    assert (paper.rossler.tau, paper.rossler.window, paper.rossler.updates) == (8, 300, 150_000)
    assert (paper.ecg.latent_dim, paper.ecg.noise, paper.ecg.bins) == (100, 0.01, 8)
    assert (paper.eeg.latent_dim, paper.eeg.num_pwl, paper.eeg.penalty) == (133, (60,), 0.1)
    small = experiment.get_config("small")
    assert (small.rossler.tau, small.rossler.window, small.rossler.updates) == (8, 64, 40_000)
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_programs_trace_with_their_abstract_arguments():
    config = experiment.get_config("smoke")
    config.systems = ("lorenz63", "ecg")
    programs = experiment.programs(config)
    assert sorted(programs) == ["ecg/free_runs", "ecg/updates", "lorenz63/free_runs", "lorenz63/updates"]
    function, arguments = programs["lorenz63/free_runs"]
    assert jax.eval_shape(function, *arguments).shape == (3, 300, 20)
    state, metrics = jax.eval_shape(programs["ecg/updates"][0], *programs["ecg/updates"][1])
    assert state.params.W.shape == (3, 25, 25)
    assert metrics["loss"].shape == (3,)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke run as a user types it, in ml_collections' form; a data folder without files, no network needed."""
    workdir = tmp_path_factory.mktemp("alrnn") / "run"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        ENVIRONMENT_VARIABLE: str(workdir / "no-data"),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-m", "experiments.run", "--config=experiments/sequence/alrnn.py:smoke"]
    done = subprocess.run(
        [*command, f"--workdir={workdir}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_smoke_leaves_results_figures_and_metrics(smoke):
    workdir, done = smoke
    results = json.loads((workdir / "results.json").read_text(), parse_constant=pytest.fail)
    assert {claim["id"] for claim in results["claims"]} == {claim.id for claim in experiment.CLAIMS}
    figures = {"attractors", "d_stsp_vs_p", "slopes", "spectra", "transition_graphs"}
    assert figures == {path.stem for path in (workdir / "figures").iterdir()}
    for stage in ("lorenz63", "rossler", "lorenz63_slopes"):
        lines = read_metrics(workdir, stage)
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert np.isfinite(losses).all()
        assert any("eval/d_stsp" in line for line in lines)
        assert (workdir / "checkpoints" / stage / "40").is_dir()
    metrics = results["metrics"]
    assert metrics["newton/tau/T64/error"] < 1e-10
    assert np.all(metrics["newton/tau/T64/converged"])
    assert "claims hold" in done.stdout


def test_smoke_writes_the_minimal_model_as_affine_maps(smoke):
    model = json.loads((smoke[0] / "minimal_lorenz63.json").read_text())
    assert [region["region"] for region in model["regions"]] == ["00", "01", "10", "11"]
    for region in model["regions"]:
        matrix, point = np.array(region["matrix"]), np.array(region["fixed_point"])
        np.testing.assert_allclose(matrix @ point + model["offset"], point, atol=1e-4)  # float32 parameters
        moduli = np.abs([complex(*value) for value in region["eigenvalues"]])
        np.testing.assert_allclose(moduli.max(), np.abs(np.linalg.eigvals(matrix)).max(), rtol=1e-5)
    assert sum(region["occupation"] for region in model["regions"]) == pytest.approx(1)


def test_a_system_whose_file_is_missing_is_left_out_with_a_word(tmp_path, monkeypatch):
    from jaxpapers.data.download import DataNotFound

    def missing(name, config):
        raise DataNotFound("alrnn/ECG.npy is not here")

    said = []

    class Silent:
        workdir = tmp_path

        def say(self, text):
            said.append(text)

        def figure(self, name, figure):
            raise AssertionError("nothing to draw")

    monkeypatch.setattr(experiment, "load_series", missing)
    config = experiment.get_config("smoke")
    config.systems = ("ecg",)
    metrics = experiment.run(config, Silent())
    assert metrics == {"ecg/left_out": "alrnn/ECG.npy is not here"}
    assert said == ["ecg is left out: alrnn/ECG.npy is not here"]
    assert all(row["status"].startswith("not run: no ") for row in check_claims(experiment.CLAIMS, metrics))


def test_unknown_systems_are_named():
    config = experiment.get_config("smoke")
    with pytest.raises(ValueError, match="unknown system 'lorentz'; known: lorenz63"):
        experiment.load_series("lorentz", config)
