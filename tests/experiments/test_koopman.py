"""Koopman's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, launch
from experiments.catalogue import UsageError
from experiments.harness import check_claims
from experiments.sequence import _koopman_control as control
from experiments.sequence import _koopman_forecast as forecasts
from experiments.sequence import _koopman_training as training
from experiments.sequence import koopman as experiment
from experiments.sequence._koopman_theory import analyse_information, analyse_water
from jaxpapers.train import make_mesh

# The measured column of the card's table of claims, and the paper's own figures where it has none.
MEASURED = {
    "lorenz/kae/effective_dimension": [2.9, 2.9],
    "lorenz/entropy/effective_dimension": [15.5, 15.4],
    "lorenz/dim": 16,
    "water/weights": [0.0, 0.2],
    "water/allocations": [[0.60417, 0.39583, 0, 0, 0], [0.49382, 0.34550, 0.11974, 0.02978, 0.01116]],
    "water/totals": [1.0, 1.0],
    "water/residuals": [0.0, 1e-12],
    "water/dimensions": [1.957, 3.08],
    "information/steps": [1, 4],
    **{f"information/n{n}/{name}": [1.5, 0.7] for n in (1, 4) for name in ("closed", "joint", "sampled")},
    "waves/kae/error/50": [0.233, 0.233, 0.233],
    "waves/full/error/50": [0.138, 0.138, 0.138],
    "waves_least_squares/kae/error/50": [0.233, 0.233, 0.233],
    "waves_least_squares/full/error/50": [0.138, 0.138, 0.138],
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["anti_collapse"] == "gamma = 0: 2.9, 2.9; gamma > 0: 15.5, 15.4 of 16 (2 seeds)"
    assert texts["coherence"].startswith("full loss 0.1380 (0.1380, 0.1380, 0.1380); KAE 0.2330")


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("anti_collapse", {"lorenz/kae/effective_dimension": [2.9, 5.2]}),
        ("anti_collapse", {"lorenz/entropy/effective_dimension": [15.5, 12.7]}),
        ("water_filling", {"water/allocations": [[0.604, 0.395, 1e-9, 1e-9, 1e-9], [0.5, 0.3, 0.1, 0.05, 0.05]]}),
        ("water_filling", {"water/allocations": [[0.604, 0.395, 0, 0, 0], [0.5, 0.3, 0.1, 0.1, 0.0]]}),
        ("water_filling", {"water/residuals": [2e-6, 0.0]}),
        ("water_filling", {"water/residuals": [0.0, 2e-6]}),
        ("water_filling", {"water/totals": [1.0, 1.1]}),
        ("water_filling", {"water/dimensions": [3.0, 2.9]}),
        ("mi_closed_form", {"information/n4/joint": [1.5, 0.7 + 1e-9]}),
        ("mi_closed_form", {"information/n1/sampled": [1.54, 0.7]}),
        ("coherence", {"waves/full/error/50": [0.24, 0.25, 0.25]}),
        ("coherence", {"waves/full/error/50": [0.1, 0.1, "nan"]}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


def test_the_theory_alone_satisfies_its_claims():
    config = experiment.get_config("small")
    config.information.samples, config.information.draws = 50_000, 1
    config.water.weights = (0.0, 0.2)
    metrics = analyse_water(config) | analyse_information(config)
    statuses = {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, metrics)}
    assert (statuses["water_filling"], statuses["mi_closed_form"]) == ("holds", "holds")
    np.testing.assert_allclose(metrics["water/allocations"], MEASURED["water/allocations"], atol=5e-6)  # as printed


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_smoke_run(everything, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    if not everything:
        config = experiment.get_config("smoke")
        del config.stages.waves_least_squares
        config.vae.systems = ()
        monkeypatch.setattr(experiment, "get_config", lambda preset: config)
    assert cli.main(["run", "koopman:smoke", f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    theory = {"water_filling", "covariance", "eigenvalues"}
    assert drawn == {*theory, "forecasts", "fields", "control", "phase_portrait"}
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert statuses["water_filling"] == "holds"
    assert statuses["coherence"] == "not run: no waves/full/error/50"
    metrics = results["metrics"]
    for name, stage in results["config"]["stages"].items():
        for variant in stage["variants"]:
            assert metrics[f"{name}/{variant}/effective_dimension"][0] >= 1
            assert np.isfinite(metrics[f"{name}/{variant}/error/5"]).all()
    for method in ("lorenz/dmd", "lorenz/kkr", *(("lorenz/vae",) if everything else ()), "waves/dmd"):
        assert np.isfinite(metrics[f"{method}/error/5"]).all()
    for variant in ("full", "kae"):
        assert 0 <= metrics[f"control/pendulum/{variant}/noiseless"][0] <= 100
        assert 0 <= metrics[f"control/pendulum/{variant}/angle"][0] <= 1


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


def test_an_update_moves_a_learned_operator_and_variants_share_their_start(smoke):
    smoke = smoke.copy_and_resolve_references()
    smoke.stages.waves.start = "random"
    trajectories = np.asarray(jax.random.normal(jax.random.key(0), training.train_shape("waves", smoke)))
    setup = training.set_up_population("waves", trajectories, smoke)
    K = np.asarray(setup.state.params["K"])
    np.testing.assert_array_equal(K[0], K[1])  # KAE and full loss, one seed
    assert np.abs(np.linalg.eigvals(K[0])).max() < 1  # small and random
    assert not np.allclose(K[0], np.diag(np.diag(K[0])), atol=0.1)
    with launch._quick_compilation(True):
        state, metrics = jax.jit(setup.train_step)(setup.state, setup.batches.batch_at(0, trajectories), setup.keys)
    moved = np.abs(np.asarray(state.params["K"]) - K).max(axis=(1, 2))
    assert (moved > 1e-4).all()
    assert not np.isclose(*metrics["grad_norm"], rtol=1e-3)  # their losses differ
    # One batch for both: what no weight touches is equal before the first update.
    np.testing.assert_allclose(*metrics["reconstruction"], rtol=1e-5)


def test_a_least_squares_operator_is_no_parameter(smoke):
    params = jax.eval_shape(training.initialiser("waves_least_squares", smoke), jax.random.key(0))
    assert set(params) == {"encoder", "decoder"}
    # Linear latents z' = K z: the operator of their windows is K, pooled or window by window.
    K = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    z = np.stack([[np.linalg.matrix_power(K, n) @ start for n in range(8)] for start in np.eye(3)])
    stage = smoke.stages.waves_least_squares.copy_and_resolve_references()
    for per_window in (False, True):
        stage.update({"ridge": 1e-6, "per_window": per_window})
        np.testing.assert_allclose(training.least_squares(jnp.asarray(z), stage), K, atol=1e-4)  # float32, ridge


def test_windows_are_pieces_of_one_trajectory():
    trajectories = np.arange(3)[:, None] * 100.0 + np.arange(20)
    windows = np.asarray(training.draw_windows(jax.random.key(0), trajectories[..., None], 200, 5))[..., 0]
    assert windows.shape == (200, 5)
    assert (np.diff(windows, axis=1) == 1).all()
    starts = set(windows[:, 0])
    assert starts <= {100 * row + start for row in range(3) for start in range(16)}
    assert len(starts) > 40  # of 48: all of them can be drawn
    config = experiment.get_config("smoke").waves
    config.update({"window": 5, "batch_size": 16, "trajectories": 3, "frames": 20})
    epoch = training.epoch_length(config)
    assert epoch == 3
    batches = training.shuffled_windows(trajectories[..., None], config, 0, None)
    seen = np.concatenate([batches[step] for step in range(epoch)])[..., 0]
    assert len({tuple(row) for row in seen}) == 48  # every window once
    assert training.whole_windows(trajectories[..., None], 6).shape == (9, 6, 1)


def test_errors_and_fields_by_hand():
    true = np.zeros((2, 3, 4))
    true[1] = 1.0
    errors = forecasts.normalised_errors(true, true + np.array([0.0, 1.0, 2.0])[:, None], np.array([1.0, 4.0]))
    np.testing.assert_allclose(errors, [0, (1 + 1 / 4) / 2, (2 + 2 / 4) / 2], rtol=1e-6)  # float32


def test_the_lqr_holds_a_goal_that_is_not_at_rest():
    # z drifts away from the goal by K goal - goal at every step, and only the constant in the gain knows it.
    K, B, goal = np.diag([1.05, 0.9]), np.eye(2), np.array([1.0, -2.0])
    recipe = experiment.get_config("smoke").control.systems.pendulum.copy_and_resolve_references()
    recipe.update({"state_cost": 100.0, "control_cost": 1e-3, "plan": 20})
    gain = np.asarray(control.tracking_gain(*map(jnp.asarray, (K, B, goal)), recipe))
    z = np.array([3.0, 3.0])
    for _ in range(30):
        z = K @ z - B @ gain @ np.append(z - goal, 1.0)
    np.testing.assert_allclose(z, goal, atol=1e-3)  # what the cost of control leaves
    left = K @ goal - B @ gain[:, :2] @ (z - goal)
    assert np.abs(left - goal).max() > 0.04  # without the constant it would not stay
    config = experiment.get_config("smoke")
    config.waves.update({"encoder": "conv", "size": 16, "channels": 2, "trajectories": 2})
    with launch._quick_compilation(True):
        data = training.load_data("waves", config)
    assert data.train.shape == (2, 20, 16, 16, 2)
    np.testing.assert_allclose(data.train.mean(axis=(0, 1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(data.train.std(axis=(0, 1, 2, 3)), 1, atol=1e-3)
    assert data.test.shape == data.transient.shape == (2, 21, 16, 16, 2)
    assert data.long.shape == (2, 21, 16, 16, 2)


def test_paper_is_the_authors_setting():
    config = experiment.get_config("paper")
    waves = config.waves
    assert (waves.latent_dim, waves.window, waves.batch_size, waves.clip_norm) == (512, 16, 16, 1.0)
    assert (config.stages.waves.operator, config.stages.waves.per_window) == ("least_squares", True)
    epoch = training.epoch_length(waves)
    assert waves.updates == 300 * epoch
    rates = training.make_schedule(
        waves.schedule, waves.rate, waves.last_rate, waves.updates, steps_per_change=waves.updates_per_change
    )
    np.testing.assert_allclose([rates(0), rates(20 * epoch - 1), rates(20 * epoch)], [1e-3, 1e-3, 8e-4], rtol=1e-5)
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_convolutional_stages_plan_and_divide_their_batches(smoke):
    config = smoke.copy_and_resolve_references()
    config.waves.update({"encoder": "conv", "channels": 2, "batch_size": 8, "size": 16})
    config.stages = {"waves": config.stages.waves_least_squares}
    config.vae.systems = ("lorenz",)
    (name, (update, arguments)), *_ = experiment.programs(config, make_mesh(data=8)).items()
    assert name == "waves/update"
    state, metrics = jax.eval_shape(update, *arguments)
    assert metrics["information"].shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(arguments[0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("horizons", (0, 5), r"config.horizons=\(0, 5\) must be some numbers of steps"),
        ("water.gains", (1.0, 0.0), "config.water.gains=.* must be above 0 each"),
        ("information.steps", (), "config.information.steps=.* must be some numbers of steps"),
        ("lorenz.neighbours", 4, "config.lorenz.window=8 must be at least 9"),
        ("lorenz.test_rows", 20, "config.lorenz.test_rows=20 must be at least 21"),
        ("waves.encoder", "cnn", "config.waves.encoder=cnn must be one of"),
        ("waves.test_frames", 30, "config.waves.test_frames=30 must be at least 31"),
        ("waves.rate", 0.0, "config.waves.rate=0.0 must be above 0"),
        ("stages.waves.gamma", -0.02, "config.stages.waves.gamma=-0.02 must be at least 0"),
        ("stages.waves.operator", "dense", "config.stages.waves.operator=dense must be one of"),
        ("stages.waves.variants", ("vae",), "config.stages.waves.variants=.* must be some of"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    config = experiment.get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)
