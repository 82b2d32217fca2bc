"""AdaFortiTran's experiment: the smoke run through the command line, the claims, the data and the closed forms."""

import json

import jax
import numpy as np
import pytest

from experiments import cli, launch
from experiments.catalogue import UsageError
from experiments.harness import check_claims
from experiments.perception import _adafortitran_scores as scores
from experiments.perception import _adafortitran_training as training
from experiments.perception import adafortitran as experiment
from jaxpapers.perception.adafortitran import complex_mse
from jaxpapers.train import make_mesh

ROWS = experiment.ROWS
# The card's table of the bound and of the closed forms, "grid" and "pilot".
SNR = {
    ("grid", "bound"): (-15.79, -16.27, -16.46, -16.53, -16.56, -16.57),
    ("grid", "pooled"): (-14.56, -14.99, -15.14, -15.18, -15.20, -15.20),
    ("grid", "bilinear"): (-11.22, -12.66, -13.23, -13.43, -13.50, -13.52),
    ("pilot", "bound"): (-11.00, -13.54, -15.19, -16.01, -16.36, -16.50),
}
DOPPLER = {
    ("grid", "bound"): (-30.72, -20.58, -13.02, -7.64, -4.79),
    ("pilot", "bound"): (-22.19, -18.43, -12.54, -7.50, -4.73),
    ("grid", "pooled"): (-21.41, -18.62, -12.09, -7.48, -4.37),
    ("grid", "bilinear"): (-23.53, -16.48, -10.55, -6.52, -3.79),
}


def with_mean(mean, doppler):
    """17 values with a mean, the last five given."""
    rest = (17 * mean - sum(doppler)) / 12
    return [rest] * 12 + list(doppler)


CLOSED = {
    "grid": {
        name: with_mean(mean, DOPPLER["grid", name])
        for name, mean in (("bilinear", -11.87), ("pooled", -13.34), ("bound", -14.88))
    },
    "pilot": {
        "bilinear": with_mean(-8.47, (-10, -9, -8, -6, -3)),
        "pooled": with_mean(-12.21, (-18, -16, -12, -7, -4)),
        "bound": with_mean(-13.44, DOPPLER["pilot", "bound"]),
    },
}
ADAPTIVE = (-26.4, -25.1, -27.1, -27.2, -22.6)
MEASURED = {
    "bound/mean": -14.88,
    "bound/db": CLOSED["grid"]["bound"],
    "closed/checked": scores.POINTS[list(scores.CHECKED)].tolist(),
    **{f"closed/{ref}/{name}/db": row for ref, rows in CLOSED.items() for name, row in rows.items()},
    **{
        f"closed/{ref}/{name}/simulated": [row[index] + 0.1 for index in scores.CHECKED]
        for ref, rows in CLOSED.items()
        for name, row in rows.items()
    },
    **{f"fixed/{name}/mean": [-14.0, -15.0] for name in ROWS},
    "fixed/adafortitran/mean": [-27.0, -27.2],
    "fixed/adafortitran_s/mean": [-26.0, -26.4],
    **{f"fresh/{name}/mean": [-13.0, -13.1] for name in ("adafortitran", *ROWS)},
    "fixed/adafortitran/db": [with_mean(-27, ADAPTIVE)] * 2,
    "fixed/fortitran/db": [with_mean(-20, (-22, -20, -18, -15, -10))] * 2,
    "fixed/pooled/db": [CLOSED["grid"]["pooled"]],
    "parameters/adafortitran": 287_234,
    "parameters/adafortitran_s": 244_514,
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def changed(name, place, value):
    row = list(MEASURED[name])
    row[place] = value
    return {name: row}


def test_claims_hold_on_the_papers_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["adaptive"].startswith("fixed (bound -14.88): AdaFortiTran -27.10 (-27.00, -27.20), FortiTran -14.50")
    assert texts["linear_limits"].endswith("simulations off by at most 0.10 dB")
    assert "worst -22.60, spread 4.60" in texts["doppler"]
    assert texts["depth"].endswith("287,234 and 244,514 parameters; bound -14.88")


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("adaptive", {"fixed/fortitran/mean": [-26.7, -26.7]}),
        ("adaptive", {"fixed/pooled/mean": [-26.2, -26.2]}),
        ("adaptive", {"fixed/cevit/mean": [-27.2, -27.2]}),
        ("adaptive", {"fixed/sample/mean": [-28.0]}),
        ("adaptive", {"fresh/sisrafnet/mean": [-14.9, -14.9]}),
        ("linear_limits", changed("closed/grid/pooled/simulated", 0, -10.0)),
        ("linear_limits", changed("closed/pilot/pooled/db", 3, -14.0)),
        ("linear_limits", changed("closed/grid/bilinear/db", 12, -23.3)),
        ("linear_limits", changed("closed/grid/bilinear/db", 13, -18.7)),
        ("linear_limits", {"closed/pilot/bilinear/db": [value - 0.06 for value in CLOSED["pilot"]["bilinear"]]}),
        ("linear_limits", {"closed/grid/bound/db": [value + 0.06 for value in CLOSED["grid"]["bound"]]}),
        ("doppler", {"fixed/adafortitran/db": [with_mean(-27, (-10.5,) * 5)]}),
        ("doppler", {"fixed/adafortitran/db": [with_mean(-27, (-40, -25, -25, -25, -22.6))]}),
        ("depth", {"fixed/adafortitran_s/mean": [-27.3, -27.3]}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


def test_the_smoke_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    assert cli.main(["run", "adafortitran:smoke", f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == {"closed_forms", "sweeps", "curves", "slot_fixed", "slot_fresh"}
    metrics = results["metrics"]
    for stage, names in results["config"]["stages"].items():
        for name in (*names, "bilinear", "pooled", "sample", "matched"):
            assert np.shape(metrics[f"{stage}/{name}/db"]) == (1, 17)
            assert np.isfinite(metrics[f"{stage}/{name}/db"]).all()
        assert "bound" in (tmp_path / "run" / f"{stage}.txt").read_text()
    for name in ("adafortitran", "linear", "pooled", "matched"):
        assert np.isfinite(metrics[f"mismatch/TDL-B/{name}/mean"]).all()
    assert metrics["density/6/bound/db"] > metrics["bound/db"][1]  # half as many pilots
    assert np.isfinite(metrics["density/6/adafortitran/db"]).all()
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert statuses["adaptive"].startswith("not run: no fresh/fortitran")
    assert statuses["depth"] in ("holds", "fails")


def test_closed_forms_are_the_cards():
    config = experiment.get_config("small")
    config.closed_forms.update({"slots": 200, "chunk": 200})
    metrics = scores.analyse_closed_forms(config)
    for sweep, table in (("snr", SNR), ("doppler", DOPPLER)):
        for (reference, name), row in table.items():
            found = metrics[f"closed/{reference}/{name}/db"][scores.rows_of(sweep)]
            np.testing.assert_allclose(found, row, atol=0.0051)  # as printed
    statuses = {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, metrics)}
    assert statuses["linear_limits"] in ("holds", "fails")  # of 200 slots: 0.3 dB is two standard errors
    simulated = {**metrics}
    for reference in ("grid", "pilot"):
        for name in scores.CLOSED:
            row = metrics[f"closed/{reference}/{name}/db"][list(scores.CHECKED)]
            np.testing.assert_allclose(metrics[f"closed/{reference}/{name}/simulated"], row, atol=0.8)
            simulated[f"closed/{reference}/{name}/simulated"] = row
    statuses = {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, simulated)}
    assert statuses["linear_limits"] == "holds"


def test_the_sweeps_are_the_papers():
    assert scores.POINTS.shape == (17, 3)
    np.testing.assert_array_equal(scores.POINTS[scores.rows_of("doppler")][:, 2], [200, 400, 600, 800, 1000])
    np.testing.assert_array_equal(scores.POINTS[scores.rows_of("snr")][:, 0], [0, 5, 10, 15, 20, 25])
    np.testing.assert_array_equal(scores.POINTS[list(scores.CHECKED)], [[10, 200, 500], [10, 100, 200]])


def test_batches_follow_the_step_and_sets_are_finite(smoke):
    config = smoke.copy_and_resolve_references()
    bank = training.bank_of(config)
    key = jax.random.key(0)
    draw = jax.jit(lambda step: training.draw_slots(key, step, "fixed", bank, config))
    first, again, other = (draw(step) for step in (3, 3, 4))
    np.testing.assert_array_equal(first.ls, again.ls)
    assert not np.array_equal(first.ls, other.ls)
    spreads, shifts = (list(map(float, values)) for values in (bank.delay_spreads_ns, bank.dopplers_hz))
    for h, condition in zip(first.h, np.asarray(first.conditions).tolist(), strict=True):
        np.testing.assert_array_equal(h, bank.h[spreads.index(condition[1]), shifts.index(condition[2])])
    config.training.slots = 3
    draw = jax.jit(lambda step: training.draw_slots(key, step, "fixed", bank, config).ls)
    seen = {np.asarray(row).tobytes() for step in range(8) for row in draw(step)}
    assert len(seen) == 3


def test_an_update_lowers_the_loss_of_every_seed(smoke):
    config = smoke.copy_and_resolve_references()
    config.num_seeds = 2
    bank = training.bank_of(config)
    setup = training.set_up("fixed", "linear", None, bank, config)
    batch = setup.batches.batch_at(0)
    assert batch.ls.shape == (2, 4, 4, 2)
    assert not np.array_equal(batch.ls[0], batch.ls[1])

    def errors(params):
        return jax.vmap(lambda p, b: complex_mse(b.h, setup.model.apply({"params": p}, b.ls)))(params, batch)

    before = np.asarray(errors(setup.state.params))
    with launch._quick_compilation(True):
        state, metrics = jax.jit(setup.train_step)(setup.state, batch, setup.keys)
    np.testing.assert_allclose(2 * metrics["loss"], before, rtol=1e-5)
    assert (np.asarray(errors(state.params)) < before).all()


def test_paper_is_the_authors_setting():
    config = experiment.get_config("paper")
    experiment.check_config(config)
    recipe = config.training
    assert (config.grid.subcarriers, config.grid.spacing, recipe.batch_size, recipe.slots) == (120, 3, 512, 100_000)
    epoch = training.epoch_length(config)
    assert (epoch, recipe.updates, recipe.patience) == (195, 195_000, 15)
    rates = training.make_schedule(
        recipe.schedule, recipe.rate, recipe.last_rate, recipe.updates, steps_per_change=epoch
    )
    np.testing.assert_allclose([rates(0), rates(epoch - 1), rates(epoch)], [1e-3, 1e-3, 0.995e-3], rtol=1e-5)
    setup = training.set_up("fixed", "adafortitran", 0, training.empty_bank(config), config, training.abstractly)
    assert sum(leaf.size for leaf in jax.tree.leaves(setup.state.params)) == 287_234
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_the_programs_of_the_paper_are_traced_without_numbers():
    config = experiment.get_config("paper")
    config.stages = {"fixed": ("adafortitran",), "fresh": ("adafortitran",)}
    programs = experiment.programs(config, make_mesh(data=8))
    assert set(programs) == {"fixed/adafortitran/updates", "fresh/adafortitran/updates"}
    for updates, arguments in programs.values():
        state, metrics = jax.eval_shape(updates, *arguments)
        assert metrics["loss"].shape == ()
        assert jax.tree.structure(state) == jax.tree.structure(arguments[0])


def test_models_one_by_one_stop_early_and_divide_their_batches(smoke, tmp_path):
    from rich.console import Console

    from experiments.harness import Run

    config = smoke.copy_and_resolve_references()
    config.together, config.num_seeds = False, 2
    config.training.update({"slots": 16, "batch_size": 8, "updates": 40, "updates_per_call": 2, "log_every": 2})
    config.training.update({"rate": 1.0, "last_rate": 1.0, "patience": 2})  # so large a rate finds nothing better
    config.training.update({"validation_slots": 16, "validation_chunk": 8})
    experiment.check_config(config)
    run = Run(tmp_path, Console(quiet=True), make_mesh(data=8))
    with launch._quick_compilation(True):
        _, params = training.train("fixed", "linear", training.bank_of(config), config, run)
    assert params["linear"]["kernel"].shape[0] == 2
    lines = training_lines(tmp_path)
    assert max(line["step"] for line in lines) < 40
    assert any("eval/mse" in line for line in lines)


def training_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_seeds", 0, "config.num_seeds=0 must be at least 1"),
        ("test_slots", 7, "config.test_slots=7 must be a multiple of 4"),
        ("snr_reference", "cell", "must be one of"),
        ("conditions.dopplers_hz", (50, 200), "which the tests need"),
        ("conditions.delay_spreads_ns", (-25, 50), "must be some numbers"),
        ("stages.fixed", ("vit",), "some of"),
        ("layers.fortitran", 0, "config.layers.fortitran=0 must be at least 1"),
        ("model.patch", (5, 2), r"config.model.patch=\(5, 2\) must be a divisor"),
        ("model.cevit_patch", (6, 5), "config.model.cevit_patch"),
        ("model.width", 9, "a multiple of num_heads=2"),
        ("model.dropout", 1.0, r"in \[0, 1\)"),
        ("grid.subcarriers", 13, "config.model.patch"),
        ("grid.spacing", 5, "a multiple of spacing=5"),
        ("grid.columns", (2, 14), "two ascending symbols"),
        ("training.rate", 0.0, "config.training.rate=0.0 must be above 0"),
        ("training.batch_size", 0, "config.training.batch_size=0 must be at least 1"),
        ("closed_forms.slots", 9, "a multiple of chunk=8"),
        ("together", False, "config.training.validation_slots=0"),
        ("mismatch", ("TDL-D",), "config.mismatch"),
        ("density.spacings", (5,), "divisors of subcarriers=12"),
        ("density.models", ("vit",), "config.density.models"),
    ],
)
def test_bad_fields_are_named(smoke, field, value, message):
    config = smoke.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)
