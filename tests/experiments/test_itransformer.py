"""iTransformer's experiment: the smoke run through the command line, its parts by hand, forecasts of a csv."""

import csv
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console

from experiments import cli, launch
from experiments.catalogue import UsageError
from experiments.harness import Run, check_claims
from experiments.sequence import _itransformer_analysis as analysis
from experiments.sequence import _itransformer_figures as figures
from experiments.sequence import _itransformer_forecast as user_csv
from experiments.sequence import _itransformer_linear as linear
from experiments.sequence import _itransformer_tables as tables
from experiments.sequence import _itransformer_training as training
from experiments.sequence import itransformer as experiment
from experiments.sequence._itransformer_stages import HORIZONS, table_row
from jaxpapers.data.download import CorruptData
from jaxpapers.data.forecasting import read_csv
from jaxpapers.data.oscillators import draw_mixture, oscillators
from jaxpapers.train import abstractly, make_mesh

# The measured column of the card's table of claims, and the paper's own figures, or their like, where it has none.
MEASURED = {
    "etth1_inverted/mse": [0.404, 0.402],
    "etth1_vanilla/mse": [0.895, 0.895],
    "etth1_vanilla_norm/mse": [0.5, 0.5],
    "etth1_inverted/updates": 44,
    "etth1_inverted/epochs": 4,
    "etth1_inverted/repeated_mse": 1.3,
    "etth1_inverted/climatology_mse": 1.2,
    "exchange_inverted/updates": 26,
    "exchange_inverted/epochs": 4,
    "exchange_inverted/repeated_mse": 0.08,
    "exchange_inverted/climatology_mse": 5.1,
    "etth1_inverted/best_epoch": [4, 3],
    "etth1_vanilla/best_epoch": [2, 1],
    "exchange_inverted/best_epoch": [4, 4],
    "exchange_vanilla/best_epoch": [1, 2],
    "exchange_inverted/mse": [0.178, 0.178],
    "exchange_vanilla/mse": [0.277, 0.277],
    "exchange_vanilla_norm/mse": [0.2, 0.2],
    "etth1_96/mse": [0.385, 0.385, 0.386],
    "etth1_96/mae": [0.402, 0.401, 0.402],
    "etth1_dlinear/mse": [0.390],
    "etth1_dlinear/mae": [0.405],
    "etth1_96/epochs": 4,
    "etth1_96/updates": 1056,
    "etth1_dlinear/updates": 2640,
    "etth1_96/best_epoch": [4, 3, 3],
    "etth1_dlinear/epochs": 10,
    "etth1_dlinear/best_epoch": [7],
    "synthetic/linear_own": 0.4,
    "synthetic/linear_alike": 0.3,
    "synthetic/linear_all": 0.2,
    "synthetic/climatology": 1.1,
    "synthetic_inverted/mse": [0.30, 0.30],
    "synthetic_none_ffn/mse": [0.45, 0.45],
    "synthetic_dlinear/mse": [0.5, 0.5],
    "etth1_none_ffn/mse": [0.399, 0.399],
    "synthetic_unseen/mse_seen": [0.32, 0.32],
    "synthetic_unseen/mse_unseen": [0.36, 0.36],
    "synthetic_unseen_none_ffn/mse_unseen": [0.45, 0.45],
    "synthetic_unseen_ci/mse_unseen": [0.5, 0.5],
    "synthetic_subset/mse": [0.31, 0.31],
    "synthetic_subset/update_ms": 30.0,
    "synthetic_inverted/update_ms": 90.0,
    **{f"join_look_back_{T}/mse": [mse, mse] for T, mse in ((48, 0.40), (96, 0.39), (192, 0.38), (336, 0.39))},
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["inversion"].startswith(
        "etth1, 44 updates: inverted 0.403 (0.404, 0.402), vanilla 0.895 (0.895, 0.895), ratio 0.45; vanilla with "
        "instance norm 0.500 (0.500, 0.500), ratio 0.81; repeating the last value 1.300, climatology 1.200; best of 4 "
        "epochs 4, 3 and 2, 1; exchange, 26 updates: "
    )
    assert texts["table_row"].startswith("iTransformer 0.3853 (0.3850, 0.3850, 0.3860) / 0.4017")
    assert "1,056 updates, best of 4 epochs 4, 3, 3; DLinear" in texts["table_row"]
    assert texts["table_row"].endswith("DLinear 0.3900 / 0.4050, 2,640 updates, best of 10 epochs 7")
    assert (
        "CI Transformer, unseen 0.500 (0.500, 0.500); iTransformer without attention, unseen 0.450"
        in texts["unseen_variates"]
    )
    assert "ratio 1.03; time of an update 0.33 times" in texts["subset_training"]
    assert "ETTh1: with 0.403 (0.404, 0.402), without 0.399" in texts["variates_matter"]
    for claim in ("variates_matter", "unseen_variates", "subset_training"):
        assert texts[claim].endswith(
            "best linear forecasts, expected: own past 0.400, own past and the mean of all 0.300, all pasts 0.200; "
            "climatology 1.100"
        )


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("inversion", {"etth1_inverted/mse": [0.68, 0.68]}),
        ("inversion", {"exchange_vanilla/mse": [0.23, 0.23]}),
        ("table_row", {"etth1_96/mse": [0.404, 0.402, 0.403]}),
        ("table_row", {"etth1_96/mse": [0.37, 0.37, 0.37]}),
        ("table_row", {"etth1_96/mae": [0.412, 0.412, 0.412]}),
        ("variates_matter", {"synthetic_inverted/mse": [0.37, 0.37]}),
        ("variates_matter", {"synthetic_inverted/mse": ["nan", 0.1]}),
        ("unseen_variates", {"synthetic_unseen/mse_unseen": [0.41, 0.41]}),
        ("unseen_variates", {"synthetic_unseen_ci/mse_unseen": [0.35, 0.35]}),
        ("unseen_variates", {"synthetic_unseen_none_ffn/mse_unseen": [0.35, 0.35]}),
        ("subset_training", {"synthetic_subset/mse": [0.34, 0.34]}),
        ("look_back", {"join_look_back_192/mse": [0.41, 0.41], "join_look_back_336/mse": [0.41, 0.41]}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


SOME = ("synthetic_inverted", "synthetic_unseen")


@pytest.mark.parametrize("only", [SOME, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_smoke_run(only, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    options = [f"--config.only={','.join(only)}"] if only else []
    assert cli.main(["run", "itransformer:smoke", f"--workdir={tmp_path / 'run'}", *options]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == {"variates", "forecasts", "attention"} | (set() if only else {"promotion", "cka"})
    metrics, stages = results["metrics"], results["config"]["stages"]
    for name in only or stages:
        stage = stages[name]
        for measure in ("mse", "mae"):
            assert np.shape(metrics[f"{name}/{measure}"]) == (stage["num_seeds"],)
            assert np.isfinite(metrics[f"{name}/{measure}"]).all()
        assert 1 <= metrics[f"{name}/best_epoch"][0] <= stage["epochs"]
        windows = -(-(210 - 36 + 1) // stage["train_stride"])  # 70 % of 300 rows
        assert metrics[f"{name}/updates"] == stage["epochs"] * (windows // stage["batch_size"])
    assert 0 <= metrics["synthetic_inverted/cka"][0] <= 1
    assert "synthetic_informer/cka" not in metrics  # distilling leaves fewer tokens in the last block
    assert 0 < metrics["synthetic/linear_all"] < metrics["synthetic/linear_own"] < 1.01
    assert np.shape(metrics["synthetic_inverted/attention/first_past"]) == (2,)
    seen, unseen = (metrics[f"synthetic_unseen/mse_{part}"][0] for part in ("seen", "unseen"))
    np.testing.assert_allclose((3 * seen + 5 * unseen) / 8, metrics["synthetic_unseen/mse"][0], rtol=1e-6)
    for name in ("inverted",) if only else ("inverted", "subset"):
        assert metrics[f"synthetic_{name}/update_bytes"] > 0
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert statuses["table_row"] == "not run: no etth1_96/mse"
    missing = "synthetic_none_ffn" if only else "synthetic_dlinear"
    assert statuses["variates_matter"] == f"not run: no {missing}/mse"
    for claim, first in (("subset_training", "subset/mse"), ("unseen_variates", "unseen_ci/mse_unseen")):
        assert statuses[claim] in ((f"not run: no synthetic_{first}",) if only else ("holds", "fails"))


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


@pytest.fixture(scope="module")
def table(smoke):
    return training.load("synthetic", smoke)


def test_epochs_visit_every_window_once_and_leave_incomplete_batches_out():
    order = training.epoch_order(21, 4, 3, seed=5)
    assert order.shape == (15, 4)
    epochs = order.reshape(3, -1)
    assert all(len(set(row)) == 20 and set(row) <= set(range(21)) for row in epochs.tolist())
    assert len({tuple(row) for row in epochs.tolist()}) == 3
    np.testing.assert_array_equal(
        training.epoch_order(21, 4, 2, seed=5), order[:10]
    )  # more epochs change no earlier one
    assert (training.epoch_order(21, 4, 3, seed=6) != order).any()


def test_the_rate_is_halved_from_the_third_epoch_on():
    schedule = training.halving(1e-4, 10)
    rates = [float(schedule(step)) for step in (0, 9, 10, 19, 20, 29, 30, 99)]
    np.testing.assert_allclose(rates, np.array([1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 4, 2.0**-8]) * 1e-4, rtol=1e-6)


def test_a_model_that_has_given_up_stays_so():
    scores = [[3.0, 3.0], [2.0, 4.0], [2.5, 5.0], [2.6, 1.0], [1.9, 0.5]]
    given_up = [training.given_up(np.array(scores[:count]), 2).tolist() for count in range(1, 6)]
    # The second had two worse epochs behind its best before the fourth; the first before the fifth.
    assert given_up == [[False, False]] * 3 + [[False, True], [True, True]]
    assert training.given_up([np.array([np.nan]), np.array([2.0]), np.array([3.0])], 2).tolist() == [False]


def test_calls_are_whole_parts_of_an_epoch():
    assert [training.calls_of(264, most) for most in (1000, 264, 100, 7, 1)] == [264, 264, 88, 8, 1]
    assert [training.calls_of(epoch, 100) for epoch in (263, 2 * 569, 5 * 151)] == [263, 569, 151]  # primes


def test_naive_errors_are_those_of_the_windows(smoke, table):
    task = training.task_of(table, smoke.stages.synthetic_inverted)
    for part in ("validation", "test"):
        x, y, _ = task.windows.gather(np.asarray(task.parts[part]))
        found = training.naive_errors(task, part)
        np.testing.assert_allclose(found.repeated, np.mean(np.square(y - x[:, -1:])), rtol=1e-5)  # float32
        np.testing.assert_allclose(found.climatology, np.mean(np.square(y)), rtol=1e-5)


def test_errors_are_means_over_all_windows(smoke, table):
    stage = smoke.stages.synthetic_inverted
    task = training.task_of(table, stage)
    setup = training.set_up(task, stage, smoke)
    with launch._quick_compilation(True):
        found = training.errors_of(setup.model, setup.state.params, task, "test", 16)
    apply, variables = jax.jit(setup.model.apply), jax.tree.map(lambda leaf: leaf[1], setup.state.params)
    wrong = []
    for start in task.parts["test"]:  # one by one, from the table
        rows = (table.values[start : start + 36] - task.mean) / task.std
        x, y = np.float32(rows[None, :24]), rows[24:]
        wrong.append(apply(variables, x)[0] - y)
    expected = np.square(wrong).mean(axis=(0, 1)), np.abs(wrong).mean(axis=(0, 1))
    np.testing.assert_allclose(found[1], expected, rtol=1e-4)  # float32
    assert task.parts["test"].start == 300 - 60 - 24  # 20 % of the rows, and the look-back before them
    assert len(task.parts["test"]) == -(-(60 + 24 - 36 + 1) // 10)  # every tenth window


@pytest.mark.slow
def test_a_subset_of_all_variates_is_ordinary_training(smoke, table):
    losses = {}
    for subset in (0, 8):
        stage = smoke.stages.synthetic_inverted.copy_and_resolve_references()
        stage.update({"subset": subset, "dropout": 0.0})
        setup = training.set_up(training.task_of(table, stage), stage, smoke)
        with launch._quick_compilation(True):
            step = jax.jit(setup.train_step)
            state, metrics = step(setup.state, setup.batches.batch_at(0, setup.batches.data), setup.keys)
            _, later = step(state, setup.batches.batch_at(1, setup.batches.data), setup.keys)
        losses[subset] = metrics["loss"], metrics["grad_norm"], later["loss"]
    np.testing.assert_allclose(losses[0], losses[8], rtol=1e-4)  # sums in another order, and Adam after them


def test_rivals_see_the_same_windows_in_the_same_order(smoke, table):
    batches = []
    for name in ("synthetic_inverted", "synthetic_vanilla"):
        stage = smoke.stages[name]
        setup = training.set_up(training.task_of(table, stage), stage, smoke, abstractly)
        batches.append(np.stack([setup.batches.batch_at(step, setup.batches.data).x[:, 0] for step in range(5)]))
    np.testing.assert_array_equal(*batches)


@pytest.mark.slow
def test_batch_statistics_come_with_the_best_parameters(smoke, table):
    stage = smoke.stages.synthetic_patchtst
    setup = training.set_up(training.task_of(table, stage), stage, smoke)
    with launch._quick_compilation(True):
        state, _ = jax.jit(setup.train_step)(setup.state, setup.batches.batch_at(0, setup.batches.data), setup.keys)
    before, after = (jax.tree.leaves(each.params["batch_stats"]) for each in (setup.state, state))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(before, after, strict=True))
    for a, b in zip(after, jax.tree.leaves(state.extra), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_series_is_an_argument_of_the_training_program(smoke, table):
    stage = smoke.stages.synthetic_inverted
    setup = training.set_up(training.task_of(table, stage), stage, smoke, abstractly)

    def update(state, keys, data):
        return setup.train_step(state, setup.batches.batch_at(state.step, data), keys)

    program = jax.make_jaxpr(update)(setup.state, setup.keys, setup.batches.data)
    assert max((np.size(constant) for constant in program.consts), default=0) < table.values.size
    state, _ = jax.eval_shape(update, setup.state, setup.keys, setup.batches.data)
    assert jax.tree.structure(state) == jax.tree.structure(setup.state)
    assert table.values.shape not in [leaf.shape for leaf in jax.tree.leaves(state)]  # nor in a checkpoint


def test_every_other_window_is_trained_on(smoke, table):
    stage = smoke.stages.synthetic_none_ffn
    task = training.task_of(table, stage)
    setup = training.set_up(task, stage, smoke, abstractly)
    assert (setup.epoch, stage.train_stride) == (88 // 8, 2)  # 175 windows
    order, _ = setup.batches.data
    numbers = order[: setup.epoch, :, 0]
    assert set(numbers.ravel().tolist()) == set(range(0, 175, 2))
    batch = setup.batches.batch_at(2, setup.batches.data)
    np.testing.assert_array_equal(batch.x[:, 0], task.windows.gather(order[2, :, 0]).x)


def at_step(step, leaf):
    """The optimizer's counters at that step; its moments are 0 still."""
    return jnp.full_like(leaf, step) if leaf.dtype == jnp.int32 else leaf


def test_a_rate_is_halved_or_constant(smoke, table):
    moved = {}
    for halving in (True, False):
        stage = smoke.stages.synthetic_none_ffn.copy_and_resolve_references()
        stage.update({"model": "dlinear", "halving": halving, "epochs": 4})
        setup = training.set_up(training.task_of(table, stage), stage, smoke)
        state = setup.state.replace(step=jnp.asarray(3 * setup.epoch, jnp.int32))
        counted = jax.tree.map(partial(at_step, 3 * setup.epoch), state.opt_state)
        batch = setup.batches.batch_at(0, setup.batches.data)
        after, _ = jax.jit(setup.train_step)(state.replace(opt_state=counted), batch, setup.keys)
        change = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
        moved[halving] = max(jax.tree.leaves(change))
    np.testing.assert_allclose(moved[False] / moved[True], 4, rtol=1e-3)  # the fourth epoch has a quarter


def test_best_linear_forecasts_against_the_whole_covariance():
    T, S, noise = 6, 4, 0.3
    weights, delays = (np.float64(part) for part in draw_mixture(jax.random.key(2), 4, 2, max_delay=3))
    delays = delays.astype(int)
    latents = oscillators(2, 0.9, (8.0, 12.0))
    lags = linear.autocovariance(latents, 20)
    std = np.sqrt(np.sum(weights**2, axis=1) + noise**2)
    n, t = (each.ravel() for each in np.meshgrid(np.arange(4), np.arange(T + S), indexing="ij"))

    def covariance(a, b):
        total = 0.0
        for j in range(2):
            lag = (t[a] - delays[n[a], j])[:, None] - (t[b] - delays[n[b], j])
            total = total + np.outer(weights[n[a], j], weights[n[b], j]) * lags[j][np.abs(lag)]
        total = total + noise**2 * (n[a][:, None] == n[b]) * (t[a][:, None] == t[b])
        return total / np.outer(std[n[a]], std[n[b]])

    def error(past, future):
        known, cross = covariance(past, past), covariance(future, past)
        return np.diag(covariance(future, future)) - np.sum(cross * np.linalg.solve(known, cross.T).T, axis=1)

    found = linear.linear_bounds(weights, delays, latents, noise, T, S)
    past, future = np.flatnonzero(t < T), np.flatnonzero(t >= T)
    np.testing.assert_allclose(found.all, error(past, future).mean(), rtol=1e-9)
    own = [error(past[n[past] == m], future[n[future] == m]).mean() for m in range(4)]
    np.testing.assert_allclose(found.own, np.mean(own), rtol=1e-9)
    # Normal equations of the two shared maps, of all variates together.
    blocks = [covariance(past[n[past] == m], past[n[past] == k]) for m in range(4) for k in range(4)]
    ahead = [covariance(future[n[future] == m], past[n[past] == k]) for m in range(4) for k in range(4)]
    means, means_ahead = np.mean(blocks, axis=0), np.mean(ahead, axis=0)
    alone, alone_ahead = (np.mean([each[5 * m] for m in range(4)], axis=0) for each in (blocks, ahead))
    known = np.block([[alone, means], [means, means]])
    cross = np.concatenate([alone_ahead, means_ahead], axis=1)
    alike = 1 - np.sum(cross * np.linalg.solve(known, cross.T).T, axis=1)
    np.testing.assert_allclose(found.alike, alike.mean(), rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, (0.459, 0.362, 0.113)),
        ({"radius": 0.9995, "spread": 0.3}, (0.499, 0.449, 0.150)),
        ({"radius": 0.9995, "periods": (12.0, 48.0)}, (0.347, 0.303, 0.147)),
    ],
    ids=["taken", "spread", "periods"],
)
def test_rows_of_the_table_of_recipes(changes, row):
    config = experiment.get_config("small")
    config.synthetic.update(changes)
    found = training.synthetic_bounds(config.stages.synthetic_inverted, config)
    np.testing.assert_allclose(found, row, atol=6e-4)  # three digits


def test_tables_stand_beside_the_papers():
    metrics = {f"weather_{horizon}/{what}": [0.25 + horizon / 7200] for horizon in HORIZONS for what in ("mse", "mae")}
    assert tables.main_table(metrics).splitlines()[2:] == [
        "| weather | 0.297 (0.258) | 0.297 (0.278) | - (0.265) | - (0.259) | - |"
    ]
    promoted = {
        f"traffic_{horizon}_flow_{kind}/mse": [mse]
        for horizon in HORIZONS
        for kind, mse in (("vanilla", 0.7), ("inverted", 0.5))
    }
    assert tables.promotion_table(promoted).splitlines()[2:] == ["| traffic | flow | 0.700 -> 0.500 | 0.750 -> 0.524 |"]
    promoted.pop("traffic_96_flow_vanilla/mse")
    assert tables.main_table({}) == tables.promotion_table(promoted) == ""


def test_figures_and_tables_of_hand_made_numbers(tmp_path, capsys):
    config = experiment.get_config("paper")
    errors = {"weather_{}": 0.25, "traffic_{}": 0.4, "traffic_{}_flow_vanilla": 0.7, "traffic_{}_flow_inverted": 0.5}
    metrics = {name.format(S) + "/mse": [mse, mse + 0.02] for name, mse in errors.items() for S in HORIZONS}
    metrics |= {f"weather_{S}/mae": [0.3] for S in HORIZONS}
    metrics |= {f"traffic_look_back_{T}/mse": [0.5 - T / 1e3] for T in (48, 336)}
    metrics |= {f"traffic_96_flow_{kind}/cka": [cka] for kind, cka in (("vanilla", 0.2), ("inverted", 0.8))}
    run = Run(tmp_path, Console(stderr=True, width=200))
    experiment.report(metrics, config, run)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"promotion", "look_back", "cka"}
    written = (tmp_path / "tables.md").read_text()
    assert "| weather | 0.260 (0.258) | 0.300 (0.278) | - (0.265) |" in written
    assert "| traffic | flow | 0.710 -> 0.510 | 0.750 -> 0.524 |" in written
    assert "| traffic | flow |" in capsys.readouterr().err
    ((vanilla, inverted),) = (group.values() for group in figures.promotions(metrics).values())
    np.testing.assert_allclose((vanilla, inverted), [[0.7, 0.72], [0.5, 0.52]])
    (ax,) = figures.draw_promotion(metrics).axes
    assert [bar.get_height() for bar in ax.patches[:2]] == pytest.approx([0.71, 0.51])
    (ax,) = figures.draw_look_back(metrics).axes  # that of 96 is the row of Table 1
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[48, 0.452], [96, 0.41], [336, 0.164]])
    (ax,) = figures.draw_cka(figures.cka_panels(metrics, config)).axes
    points = {line.get_label(): line.get_xydata()[0].tolist() for line in ax.lines}
    assert points["inverted"] == pytest.approx([0.8, 0.51])
    assert points["tokens of time steps"] == pytest.approx([0.2, 0.71])


def test_lagged_correlations_by_hand():
    t = np.arange(60)
    leader = np.sin(2 * np.pi * t / 15)
    follower = np.roll(leader, 3)
    other = np.cos(2 * np.pi * t / 4)
    x = np.stack([leader, follower, other], axis=-1)[None]
    found = analysis.lagged_correlations(x, 3)
    assert found[1, 0] == pytest.approx(1, abs=1e-6)  # the follower is the leader's past
    assert found[0, 1] < 0.95  # the reverse takes a lag of 12, or of 4.5 with the other sign
    assert found[0, 2] < 0.2
    np.testing.assert_allclose(np.diag(found), 1)


def test_paper_is_the_authors_setting():
    config = experiment.get_config("paper")
    experiment.check_config(config)
    assert len([name for name in config.stages if config.stages[name].data.startswith("PEMS")]) == 16 * 4
    for data, width, heads, dropout in (("ETTm2", 16, 4, 0.3), ("weather", 128, 16, 0.2)):
        stage = config.stages[f"{data.lower()}_192_patchtst"]
        assert (stage.width, stage.num_heads, stage.dropout, stage.horizon) == (width, heads, dropout, 192)
    assert {f"traffic_{horizon}_lsh_vanilla" for horizon in HORIZONS} < set(config.stages)
    assert config.stages.traffic_vanilla_look_back_336.look_back == 336
    assert config.stages.traffic_unseen_ci.subset == 0
    assert not config.stages.traffic_unseen_ci.use_norm
    for name, batch_size, epochs in (  # of Table 2
        ("electricity_96_full_inverted", 32, 10),
        ("traffic_720_lsh_vanilla", 32, 3),
        ("weather_96_flow_vanilla", 128, 3),
        ("weather_192_full_inverted", 128, 10),
    ):
        stage = config.stages[name]
        assert (stage.batch_size, stage.epochs) == (batch_size, epochs)
        assert (stage.width, stage.hidden, stage.num_layers, stage.rate) == (512, 2048, 2, 1e-4)
    for name, expected in (  # of Fig. 5
        ("traffic_unseen", (172, 512, 2048, 2, 8, 32, 1e-4, True)),
        ("electricity_unseen_ci", (64, 32, 64, 2, 8, 8, 1e-4, True)),
        ("solar_unseen_ci", (27, 32, 64, 2, 8, 8, 5e-4, False)),
    ):
        fields = ("train_variates", "width", "hidden", "num_layers", "num_heads", "batch_size", "rate", "marks")
        assert tuple(config.stages[name][field] for field in fields) == expected
    for data, horizon, expected in (
        ("ETTh1", 192, (256, 2, 1e-4, 32, True, True)),
        ("ETTh1", 336, (512, 2, 1e-4, 32, True, True)),
        ("traffic", 720, (512, 4, 1e-3, 16, True, True)),
        ("solar", 96, (512, 2, 5e-4, 32, True, False)),
        ("PEMS03", 12, (512, 4, 1e-3, 32, True, False)),
        ("PEMS04", 96, (1024, 4, 5e-4, 32, False, False)),
        ("PEMS07", 12, (512, 2, 1e-3, 32, False, False)),
        ("PEMS07", 48, (512, 4, 1e-3, 16, False, False)),
        ("PEMS08", 24, (512, 2, 1e-4, 32, True, False)),
        ("PEMS08", 96, (512, 4, 1e-3, 16, False, False)),
    ):
        row = table_row(data, horizon)
        assert row["hidden"] == row["width"]
        assert expected == tuple(
            row.get(field, True) for field in ("width", "num_layers", "rate", "batch_size", "use_norm", "marks")
        )
        stage = config.stages[f"{data.lower()}_{horizon}"]
        assert (stage.epochs, stage.patience, stage.look_back, stage.dropout) == (10, 3, 96, 0.1)
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_a_row_of_the_paper_is_planned_for_a_mesh_without_its_file():
    config = experiment.get_config("paper")
    config.only = ("weather_96",)
    found = experiment.programs(config, make_mesh(data=4, model=2))
    assert set(found) == {"weather_96/updates", "weather_96/errors"}
    update, arguments = found["weather_96/updates"]
    state, _ = jax.eval_shape(update, *arguments)
    kernel = arguments[0].params["params"]["encoder"]["layers_2"]["tokens"]["query"]["kernel"]
    assert (kernel.shape, kernel.sharding.spec) == ((1, 512, 512), PartitionSpec(None, None, "model"))
    assert jax.tree.structure(state) == jax.tree.structure(arguments[0])
    errors, arguments = found["weather_96/errors"]
    assert jax.eval_shape(errors, *arguments).shape == (1, 2, 21)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("only", ("etth1",), r"config.only=\('etth1',\) must be some of"),
        ("synthetic.radius", 1.0, "config.synthetic.radius=1.0 must be between 0 and 1"),
        ("synthetic.noise", 0.0, "config.synthetic.noise=0.0 must be above 0"),
        ("stages.synthetic_inverted.data", "etth1", "config.stages.synthetic_inverted.data=etth1 must be one of"),
        ("stages.synthetic_inverted.attention", "linear", "attention=linear must be one of"),
        ("stages.synthetic_inverted.components", ("ffn",), "components=.* must be two of"),
        ("stages.synthetic_inverted.num_heads", 3, "width=16 must be a multiple of 3 heads"),
        ("stages.synthetic_inverted.distil", True, "distil=True must be False where the model is not vanilla"),
        ("stages.synthetic_inverted.look_back", 211, "config.stages.synthetic_inverted: look_back=211 is longer than"),
        ("stages.synthetic_inverted.horizon", 40, "30 rows .*no window|no window of look_back=24 and horizon=40"),
        ("stages.synthetic_inverted.batch_size", 500, "batch_size=500 must be at most the 175 windows"),
        ("stages.synthetic_unseen.train_variates", 9, "train_variates=9 must be at most the 8 variates"),
        ("stages.synthetic_unseen_ci.subset", 4, "subset=4 must be at most the 3 that are trained on"),
        (
            "stages.synthetic_vanilla.subset",
            4,
            "subset=4 must be 0 for a vanilla model that is not channel_independent",
        ),
        ("stages.synthetic_vanilla.train_variates", 4, "train_variates=4 must be 0 for a vanilla model"),
        ("stages.synthetic_patchtst.look_back", 7, "look_back=7 must be at least 8, for one patch of PatchTST"),
        ("stages.synthetic_none_ffn.train_stride", 30, "batch_size=8 must be at most the 6 windows"),
        ("stages.synthetic_unseen.components", ("ffn", "ffn"), "components=.* must be made for any variates"),
        ("stages.synthetic_informer.attention", "lsh", "distil=True must be False where attention is lsh"),
        ("analysis.costs", ("synthetic_invert",), r"config.analysis.costs=.* \['synthetic_invert'\] are none"),
        ("analysis.forecasts", ("etth1_96",), r"config.analysis.forecasts=.* \['etth1_96'\] are none"),
        ("analysis.attention", ("synthetic_vanilla",), "full or flash attention .*, which synthetic_vanilla is not"),
        ("analysis.attention", ("synthetic_subset",), "full or flash attention .*, which synthetic_subset is not"),
        ("analysis.attention", ("synthetic_none_ffn",), "full or flash attention .*, which synthetic_none_ffn is not"),
        ("stages.synthetic_vanilla.look_back", 20, "config.analysis.forecasts=.* same data, look_back and horizon"),
    ],
)
def test_bad_fields_are_named(smoke, field, value, message):
    config = smoke.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)


@pytest.mark.parametrize("data", ["solar", "PEMS08"])
def test_calendar_features_need_timestamps(smoke, data):
    config = smoke.copy_and_resolve_references()
    config.stages.synthetic_inverted.update({"data": data, "marks": True})
    with pytest.raises(UsageError, match=f"marks=True must be False: {data} has no timestamps"):
        experiment.check_config(config)


def test_a_mesh_that_does_not_divide_a_batch_is_refused(smoke):
    config = smoke.copy_and_resolve_references()
    config.stages.synthetic_subset.batch_size = 12
    with pytest.raises(UsageError, match=r"synthetic_subset\.batch_size=12 must be a multiple of mesh\.data=8"):
        experiment.programs(config, make_mesh(data=8))


def test_a_missing_data_set_is_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    (tmp_path / "run").mkdir()
    config = experiment.get_config("paper")
    config.only = config.analysis.costs = ("solar_96",)
    found = experiment.run(config, Run(tmp_path / "run", Console(stderr=True)))
    assert "Solar/solar_AL.txt is not in" in found["solar/left_out"]
    assert "solar is left out" in capsys.readouterr().err


def write_csv(path, rows=260, dates=True):
    t = np.arange(rows)
    columns = {"a": np.sin(2 * np.pi * t / 12), "OT": 5 + 3 * np.sin(2 * np.pi * (t - 3) / 12), "b": 0.01 * t}
    days = (np.datetime64("2020-02-01") + t).astype(str)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(["date"] if dates else []), *columns])
        for row in range(rows):
            writer.writerow([*([days[row]] if dates else []), *(values[row] for values in columns.values())])
    return path


QUICK = ["--look-back=24", "--width=16", "--num-layers=1", "--epochs=3", "--rate=0.01", "--batch-size=16"]


def test_a_csv_is_forecast(tmp_path, capsys):
    source = write_csv(tmp_path / "data.csv")
    out = tmp_path / "new" / "forecast.csv"
    with launch._quick_compilation(True):
        code = user_csv.main(["forecast", str(source), "--horizon=12", f"--out={out}", *QUICK, "--seed=1"])
    assert code == 0
    said = capsys.readouterr().out
    assert "12 steps of 3 columns" in said
    assert "which chose the epoch and trained nothing" in said
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["date", "a", "b", "OT"]
    assert [row["date"] for row in rows][::11] == ["2020-10-18 00:00:00", "2020-10-29 00:00:00"]
    t = np.arange(260, 272)
    found = np.array([[float(row[name]) for name in ("a", "OT")] for row in rows])
    expected = np.stack([np.sin(2 * np.pi * t / 12), 5 + 3 * np.sin(2 * np.pi * (t - 3) / 12)], axis=1)
    assert np.sqrt(np.mean(np.square(found - expected) / [0.5, 4.5])) < 0.5  # of a standard deviation
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # no temporary file


class Enough(Exception):
    pass


def test_a_short_csv_is_passed_over_until_an_epoch_is_100_updates(tmp_path, monkeypatch):
    seen = {}

    def fit(state, train_step, batches, num_steps, **options):
        seen.update(options, state=state, step=train_step, batches=batches, num_steps=num_steps)
        raise Enough

    monkeypatch.setattr(user_csv, "fit", fit)
    sizes = {"look_back": 24, "width": 16, "num_layers": 1, "epochs": 3, "batch_size": 16}
    with pytest.raises(Enough):
        user_csv.forecast_csv(write_csv(tmp_path / "data.csv"), 12, **sizes)
    assert (seen["num_steps"], seen["evaluate_every"], seen["patience"]) == (300, 100, 300)
    # Ten passes over the 173 windows of 208 rows, each with 13 left out.
    order, windows = seen["batches"].data
    counts = np.bincount(np.ravel(order[:100]))
    assert len(counts) == 173
    assert counts.sum() == 1600
    assert counts.max() == 10
    # The series is an argument of the program.
    program = jax.make_jaxpr(seen["batches"].batch_at)(0, (order, windows))
    assert max((np.size(constant) for constant in program.consts), default=0) < 260
    assert windows.series.shape == (260, 3)
    assert seen["state"].extra is None


def test_a_forecast_that_is_worse_than_none_is_warned_of(tmp_path, monkeypatch, capsys):
    source = write_csv(tmp_path / "data.csv", dates=False)
    for mse, warned in ((1.0, True), (0.5, False), (np.nan, True)):
        found = user_csv.CsvForecast(read_csv(source), np.zeros((12, 3)), None, mse, 1.0, 1)
        monkeypatch.setattr(user_csv, "forecast_csv", lambda *_, found=found, **__: found)
        assert user_csv.main(["forecast", str(source), "--horizon=12", f"--out={tmp_path / 'out.csv'}"]) == 0
        said = capsys.readouterr()
        assert ("warning: this forecast is no better than repeating the last row" in said.err) == warned
        assert f"MSE {mse:.3f}" in said.out


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        (["2020-01-01T00", "2020-01-01T01", "2020-01-01T02"], ["2020-01-01T03", "2020-01-01T04"]),
        (["2020-11-30", "2020-12-01", "2020-12-04", "2020-12-05"], ["2020-12-06", "2020-12-07"]),
        (["2020-10-15", "2020-11-15", "2020-12-15"], ["2021-01-15", "2021-02-15"]),
        (["2018-01-01", "2019-01-01", "2020-01-01"], ["2021-01-01", "2022-01-01"]),
    ],
)
def test_dates_go_on(stamps, expected):
    found = user_csv.continued(np.array(stamps, "datetime64[s]"), 2)
    np.testing.assert_array_equal(found, np.array(expected, "datetime64[s]"))


def test_calendar_features_follow_the_step():
    steps = {"t": 900, "h": 3600, "d": 86_400}
    for freq, seconds in steps.items():
        stamps = np.datetime64("2020-01-01T00:00:00") + np.arange(5) * np.timedelta64(seconds, "s")
        assert user_csv.frequency(stamps) == freq


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizon=0"], "horizon must be at least 1, got 0"),
        (["--horizon=96"], "has 260 rows; look_back=96 and horizon=96 need 476"),
        (["--horizon=12", "--width=20"], "width must be a multiple of the 8 heads, got 20"),
        (["--horizon=12", "--rate=0"], "rate must be above 0, got 0.0"),
        (["--horizon=12", "--epochs=0"], "epochs must be at least 1, got 0"),
    ],
)
def test_a_forecast_that_cannot_be_made_says_why(tmp_path, capsys, arguments, message):
    source = write_csv(tmp_path / "data.csv")
    assert user_csv.main(["forecast", str(source), f"--out={tmp_path / 'out.csv'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out.csv").exists()


def test_a_csv_that_cannot_be_read_or_written_says_why(tmp_path, capsys):
    source = write_csv(tmp_path / "data.csv")
    before = source.read_bytes()
    for arguments, message in (
        ([str(tmp_path / "absent.csv"), f"--out={tmp_path / 'out.csv'}"], "absent.csv"),
        ([str(source), f"--out={source}"], "is the csv that is read"),
        ([str(source), f"--out={tmp_path}"], "is a folder"),
        ([str(source), f"--out={tmp_path / 'out.png'}"], "cannot be both the csv and the plot"),
    ):
        assert user_csv.main(["forecast", *arguments, "--horizon=12"]) == 2
        assert message in capsys.readouterr().err
    assert source.read_bytes() == before
    (tmp_path / "bad.csv").write_text("date,a\n2020-01-02,1\n2020-01-01,nan\n")
    with pytest.raises(CorruptData, match="not finite"):
        user_csv.forecast_csv(tmp_path / "bad.csv", 1, look_back=1)
    falling = write_csv(tmp_path / "falling.csv")
    lines = falling.read_text().splitlines()
    falling.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    with pytest.raises(ValueError, match="timestamps must rise"):
        user_csv.forecast_csv(falling, 12, look_back=24)


def test_all_models_of_the_stages_forecast(smoke, table):
    stage = smoke.stages.synthetic_inverted.copy_and_resolve_references()
    x = jnp.asarray(np.float32(table.values[:24])[None])
    for changes in (
        {"model": "dlinear"},
        {"model": "rlinear"},
        {"attention": "probsparse"},
        {"model": "vanilla", "attention": "probsparse", "distil": True},
        {"model": "vanilla", "attention": "lsh"},
    ):
        changed = stage.copy_and_resolve_references()
        changed.update(changes)
        model = training.model_of(changed)
        shape = jax.eval_shape(lambda key, model=model: model.init_with_output(key, x)[0], jax.random.key(0)).shape
        assert shape == (1, 12, 8)
