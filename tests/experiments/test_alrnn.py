"""AL-RNN's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.catalogue import UsageError
from experiments.harness import Run, check_claims
from experiments.sequence import alrnn as experiment
from experiments.sequence._alrnn_study import p_sweep, study
from jaxpapers.data.download import ENVIRONMENT_VARIABLE, DataNotFound
from jaxpapers.train import Best, Fitted, make_mesh, read_metrics

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
        ("chaos", {"lorenz63/P2/d_stsp": [0.97, 1.66, 5.0], "lorenz63/minimal/exponent": [0.0101, 0.0196, 0.03]}),
        ("chaos", {"rossler/minimal/exponent": ["nan", "nan", "nan"]}),
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
    programs = experiment.programs(config, make_mesh(data=8))
    kinds = ["exponents", "free_runs", "measures", "prediction_errors", "updates"]
    systems = [f"{system}/{kind}" for system in ("ecg", "lorenz63") for kind in kinds]
    assert sorted(programs) == systems + [f"lorenz63_slopes/{kind}" for kind in kinds[1:]]
    leaves = jax.tree.leaves([arguments for _, arguments in programs.values()])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    shapes = {name: jax.eval_shape(function, *arguments) for name, (function, arguments) in programs.items()}
    assert shapes["lorenz63/free_runs"].shape == (8, 300, 20)  # three models, padded to the devices
    assert shapes["lorenz63/exponents"].shape == (1,)
    assert shapes["lorenz63_slopes/measures"]["d_stsp"].shape == (8,)
    state, metrics = shapes["ecg/updates"]
    assert state.params.W.shape == (8, 25, 25)
    assert metrics["loss"].shape == (8,)


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


class Silent(Run):
    """A run that keeps what it is told and draws nothing to disk."""

    def __init__(self, workdir):
        self.workdir, self.said, self.figures = workdir, [], []

    def say(self, text):
        self.said.append(text)

    def figure(self, name, figure):
        self.figures.append(name)

    def file(self, name, content):
        json.loads(content)


def test_a_system_whose_file_is_missing_is_left_out_with_a_word(tmp_path, monkeypatch):
    def missing(name, config):
        raise DataNotFound("alrnn/ECG.npy is not here")

    monkeypatch.setattr(experiment, "load_series", missing)
    config = experiment.get_config("smoke")
    config.systems = ("ecg",)
    run = Silent(tmp_path)
    metrics = experiment.run(config, run)
    assert metrics == {"ecg/left_out": "alrnn/ECG.npy is not here"}
    assert run.said == ["ecg is left out: alrnn/ECG.npy is not here"]
    assert run.figures == []
    assert all(row["status"].startswith("not run: no ") for row in check_claims(experiment.CLAIMS, metrics))


class NeverScores(Silent):
    """A run in which no model ever reaches a finite D_stsp: the best parameters are those at the start."""

    mesh = None

    def fit(self, stage, state, *arguments, key, **options):
        return Fitted(state, Best(np.full(key.shape, np.inf, np.float32), np.zeros(key.shape, int), state.params))


def random_series(system, rows=300):
    dim = {"ecg": 5, "fmri": 20, "eeg": 64}.get(system, 3)
    return np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)


def test_nothing_of_a_failed_model_is_a_result(tmp_path, monkeypatch):
    config = experiment.get_config("smoke")
    config.systems = ("rossler",)
    monkeypatch.setattr(experiment, "load_series", lambda name, config: random_series(name))
    run = NeverScores(tmp_path)
    metrics = experiment.run(config, run)
    assert run.figures == ["d_stsp_vs_p"]
    assert run.said[-1] == "rossler: every model with P = 1 diverged; there is nothing to draw"
    for p in config.rossler.num_pwl:
        assert np.isnan(metrics[f"rossler/P{p}/d_stsp"]).all()
        assert np.isnan(metrics[f"rossler/P{p}/pe_20"]).all()
        assert (metrics[f"rossler/P{p}/d_h"] == 1).all()
    minimal = {name.removeprefix("rossler/minimal/"): value for name, value in metrics.items() if "minimal" in name}
    assert minimal["regions"] == [0]
    assert [len(points) for points in minimal["fixed_points"]] == [0]
    assert np.isnan([minimal["exponent"][0], *minimal["word_entropy"], *minimal["graph_entropy"]]).all()
    assert {row["status"].split(":")[0] for row in check_claims(experiment.CLAIMS, metrics)} <= {"fails", "not run"}


@pytest.mark.parametrize("system", ["fmri", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ecg", "eeg"))])
def test_recorded_systems_run_through(system, tmp_path, monkeypatch):
    config = experiment.get_config("smoke")
    config.systems = (system,)
    config[system].num_pwl = (2,)
    config[system].updates = 10
    config.evaluate_every = 10
    monkeypatch.setattr(experiment, "load_series", lambda name, config: random_series(name))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", Console(quiet=True))
    metrics = experiment.run(config, run)
    assert np.isfinite(metrics[f"{system}/P2/d_stsp"]).all()
    drawn = {"d_stsp_vs_p"} if system == "eeg" else {"d_stsp_vs_p", "transition_graphs", "spectra", system}
    assert {path.stem for path in (run.workdir / "figures").iterdir()} == drawn


def test_unknown_systems_are_named():
    config = experiment.get_config("smoke")
    config.systems = ("lorentz",)
    with pytest.raises(UsageError, match="unknown system 'lorentz'; did you mean 'lorenz"):
        experiment.check_config(config)


def test_a_population_trains_on_eight_devices_as_on_one(tmp_path):
    """Three models, padded to eight: the rows of different devices do not touch each other."""
    config = experiment.get_config("smoke")
    config.lorenz63.updates = 10
    config.evaluate_every = 10
    series = random_series("lorenz63", 400)
    studies = []
    for folder, mesh in (("one", None), ("eight", make_mesh(data=8))):
        (tmp_path / folder).mkdir()
        run = Run(tmp_path / folder, Console(quiet=True), mesh)
        population = p_sweep(config.lorenz63, config.num_seeds)
        studies.append(study("lorenz63", "lorenz63", series, population, config, run))
    one, eight = studies
    assert eight.params.W.shape == one.params.W.shape == (3, 20, 20)
    # The same arithmetic a model; XLA may fuse a population of eight otherwise than one of three.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight.last_params, one.last_params
    )


def test_a_population_restores_onto_other_numbers_of_devices(tmp_path):
    config = experiment.get_config("smoke")
    config.pad_models = 8
    config.lorenz63.updates = 10
    config.evaluate_every = 10
    series, population = random_series("lorenz63", 400), p_sweep(config.lorenz63, config.num_seeds)
    found = []
    for mesh in (make_mesh(data=8), None, make_mesh(devices=jax.devices()[:2])):  # the last two restore, nothing else
        run = Run(tmp_path, Console(quiet=True), mesh)
        found.append(study("lorenz63", "lorenz63", series, population, config, run).last_params)
    jax.tree.map(np.testing.assert_array_equal, found[1], found[0])
    jax.tree.map(np.testing.assert_array_equal, found[2], found[0])
