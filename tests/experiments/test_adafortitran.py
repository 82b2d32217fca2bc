"""AdaFortiTran's experiment: the smoke run through the command line, the claims, the data and the closed forms."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, launch
from experiments.catalogue import UsageError
from experiments.harness import check_claims
from experiments.perception import _adafortitran_scores as scores
from experiments.perception import _adafortitran_training as training
from experiments.perception import adafortitran as experiment
from jaxpapers.data import tdl
from jaxpapers.perception.adafortitran import complex_mse
from jaxpapers.train import abstractly, make_mesh

ROWS = experiment.ROWS
NETWORKS = [*dict.fromkeys((*experiment.get_config("smoke").layers, *experiment.RIVALS))]
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
    "fixed/matched/mean": [-18.9],
    **{f"fresh/{name}/mean": [-13.0, -13.1] for name in ("adafortitran", *ROWS)},
    "fresh/matched/db": [CLOSED["grid"]["bound"]],
    **{
        f"fresh/{name}/db": [[value + 1.8 for value in CLOSED["grid"]["bound"]]] * 2 for name in ("adafortitran", *ROWS)
    },
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
    assert texts["adaptive"].endswith("smallest distance to the matched LMMSE at a fresh point +1.80")
    assert texts["linear_limits"].endswith("simulations off by at most 0.10 dB")
    assert "worst -22.60, spread 4.60" in texts["doppler"]
    assert texts["depth"].endswith("287,234 and 244,514 parameters; bound -14.88")


def test_rivals_need_not_be_trained_on_fresh_channels_closed_forms_must_be_there():
    known = {key: value for key, value in MEASURED.items() if not key.startswith("fresh/cevit")}
    claims = {claim["id"]: claim for claim in check_claims(experiment.CLAIMS, known)}
    fixed, fresh = claims["adaptive"]["ours"].split("; fresh")
    assert claims["adaptive"]["status"] == "holds"
    assert ("CE-ViT" in fixed, "CE-ViT" in fresh) == (True, False)
    for needed in ("pooled", "adafortitran"):
        without = {key: value for key, value in MEASURED.items() if not key.startswith(f"fresh/{needed}")}
        assert check_claims(experiment.CLAIMS, without)[0]["status"] == f"not run: no fresh/{needed}/mean"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("adaptive", {"fixed/fortitran/mean": [-26.7, -26.7]}),
        ("adaptive", {"fixed/pooled/mean": [-26.2, -26.2]}),
        ("adaptive", {"fixed/cevit/mean": [-27.2, -27.2]}),
        ("adaptive", {"fixed/sample/mean": [-28.0]}),
        ("adaptive", {"fresh/sisrafnet/mean": [-14.9, -14.9]}),
        ("adaptive", {"fresh/cevit/db": [[-30.0, *CLOSED["grid"]["bound"][1:]]]}),
        ("adaptive", {"fixed/adafortitran/mean": [np.nan, -27.0]}),
        ("adaptive", {"fixed/linear/mean": [-14.0, np.nan]}),
        ("adaptive", {"fresh/linear/mean": [np.nan, -13.0]}),
        ("adaptive", {"fresh/linear/db": [[*CLOSED["grid"]["pooled"][:-1], np.nan]]}),
        ("linear_limits", changed("closed/grid/pooled/simulated", 1, np.nan)),
        ("linear_limits", changed("closed/pilot/bilinear/db", 5, np.nan)),
        ("doppler", {"fixed/pooled/db": [with_mean(np.nan, (-20, -18, -12, np.nan, -4))]}),
        ("depth", {"fixed/adafortitran_s/mean": [np.nan, -26.0]}),
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


@pytest.fixture(autouse=True)
def quick_compilation():
    with launch._quick_compilation(True):
        yield


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


@pytest.mark.parametrize("fixed", ["linear", pytest.param(",".join(NETWORKS), marks=pytest.mark.slow, id="all")])
def test_the_smoke_run(fixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    command = ["run", "adafortitran:smoke", f"--workdir={tmp_path / 'run'}", f"--config.stages.fixed={fixed}"]
    assert cli.main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    shown = {"slot_fixed"} if "adafortitran" in fixed else set()  # a slot by the paper's model
    assert drawn == {"closed_forms", "sweeps", "curves", "density"} | shown
    metrics = results["metrics"]
    for stage, names in results["config"]["stages"].items():
        for name in (*names, "bilinear", "pooled", "sample", "matched"):
            assert np.shape(metrics[f"{stage}/{name}/db"]) == (1, 17)
            assert np.isfinite(metrics[f"{stage}/{name}/db"]).all()
        assert "bound" in (tmp_path / "run" / f"{stage}.txt").read_text()
    for name in ("linear", "pooled", "matched", "bound"):
        assert np.isfinite(metrics[f"mismatch/TDL-B/{name}/mean"]).all()
    assert metrics["mismatch/TDL-B/bound/mean"] != metrics["bound/mean"]
    assert metrics["density/6/bound/db"] > metrics["bound/db"][1] == metrics["density/3/bound/db"]  # half the pilots
    for name in ("mismatch_TDL-B", "density"):
        assert "bound" in (tmp_path / "run" / f"{name}.txt").read_text()
    assert np.isfinite(metrics["density/6/linear/db"]).all()
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    missing = "fixed" if fixed == "linear" else "fresh"
    assert statuses["adaptive"].startswith(f"not run: no {missing}/adafortitran")
    for claim in ("linear_limits",) if fixed == "linear" else ("linear_limits", "doppler", "depth"):
        assert statuses[claim] in ("holds", "fails")


@pytest.mark.slow  # the claim holds the means of the same numbers, in every run
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
    config.training.slots = 19
    draw = jax.jit(lambda step: training.draw_slots(key, step, "fixed", bank, config).ls)
    rows = [np.asarray(row).tobytes() for step in range(12) for row in draw(step)]
    epochs = [rows[start : start + 16] for start in range(0, 96, 16)]  # two batches of 8 each
    assert [len(set(epoch)) for epoch in epochs] == [16] * 6
    assert len(set(rows)) == 19  # all but once in 2,000,000 draws
    assert epochs[0] != epochs[1]


def test_an_update_lowers_the_loss_of_every_seed(smoke):
    config = smoke.copy_and_resolve_references()
    config.num_seeds.fixed = 2
    bank = training.bank_of(config)
    setup = training.set_up("fixed", "linear", None, bank, config)
    batch = jax.jit(setup.batches.batch_at)(0, bank)
    assert batch.ls.shape == (8, 2, 4, 2)
    assert not np.array_equal(batch.ls[:, 0], batch.ls[:, 1])

    def errors(params):
        one = lambda p, b: complex_mse(b.h, setup.model.apply({"params": p}, b.ls))  # noqa: E731
        return jax.vmap(one, (0, 1))(params, batch)

    before = np.asarray(errors(setup.state.params))
    state, metrics = jax.jit(setup.train_step)(setup.state, batch, setup.keys)
    np.testing.assert_allclose(2 * metrics["loss"], before, rtol=1e-5)
    assert (np.asarray(errors(state.params)) < before).all()


def test_paper_is_the_authors_setting():
    config = experiment.get_config("paper")
    experiment.check_config(config)
    recipe = config.training
    assert (config.grid.subcarriers, config.grid.spacing, recipe.batch_size, recipe.slots) == (120, 3, 512, 100_000)
    epoch = training.epoch_length(config)
    assert (epoch, recipe.updates.fixed, recipe.patience) == (195, 195_000, 15)
    rates = training.make_schedule(
        recipe.schedule, recipe.rate, recipe.last_rate, recipe.updates.fixed, steps_per_change=epoch
    )
    np.testing.assert_allclose([rates(0), rates(epoch - 1), rates(epoch)], [1e-3, 1e-3, 0.995e-3], rtol=1e-5)
    setup = training.set_up("fixed", "adafortitran", 0, training.empty_bank(config), config, abstractly)
    assert sum(leaf.size for leaf in jax.tree.leaves(setup.state.params)) == 287_234
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_the_programs_of_the_paper_are_traced_without_numbers():
    config = experiment.get_config("paper")
    config.stages = {"fixed": ("adafortitran",), "fresh": ("linear",)}
    config.density.update({"spacings": (8,), "models": ("linear",)})
    programs = experiment.programs(config, make_mesh(data=8))
    titles = ("fixed", "fixed/adafortitran"), ("fresh", "fresh/linear"), ("density_8", "density_8/linear")
    assert set(programs) == {
        name for stage, model in titles for name in (f"{stage}/tests", *(f"{model}/{kind}" for kind in KINDS))
    }
    for name, (function, arguments) in programs.items():
        shapes = jax.eval_shape(function, *arguments)
        if name.endswith("/updates"):
            state, metrics = shapes
            assert metrics["loss"].shape == ()
            assert jax.tree.structure(state) == jax.tree.structure(arguments[0])
        elif name.endswith("/tests"):
            assert shapes.h.shape == (17, 10, 200, 120, 14)
        else:
            assert shapes.shape == (() if name.endswith("/validation") else (17,))
    with pytest.raises(UsageError, match=r"config.training.batch_size=512 must be a multiple of mesh.data=3"):
        experiment.programs(config, make_mesh(data=3, devices=jax.devices()[:3]))
    config.training.update({"batch_size": 510})
    with pytest.raises(UsageError, match=r"config.training.validation_chunk=400 must be a multiple of mesh.data=3"):
        experiment.check_mesh(config, make_mesh(data=3, devices=jax.devices()[:3]))


KINDS = ("updates", "validation", "errors")


def test_programs_of_a_population_score_one_model(smoke):
    config = smoke.copy_and_resolve_references()
    config.stages = {"fixed": ("linear",)}
    config.density.spacings = ()
    programs = experiment.programs(config, make_mesh(data=8))
    assert set(programs) == {"fixed/tests", "fixed/linear/updates", "fixed/linear/errors"}
    function, arguments = programs["fixed/linear/errors"]
    assert jax.eval_shape(function, *arguments).shape == (17,)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_an_update_and_errors(smoke, name):
    bank = training.empty_bank(smoke)
    setup = training.set_up("fixed", name, 0, bank, smoke, abstractly)
    batch = jax.eval_shape(setup.batches.batch_at, 0, bank)
    state, metrics = jax.eval_shape(setup.train_step, setup.state, batch, setup.keys)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, setup.state)
    tests = jax.eval_shape(scores.slots_program("fixed", bank, smoke.test_slots, smoke), scores.POINTS)
    chunk = jax.eval_shape(lambda tests: scores.chunk_of(tests, 0), tests)
    assert jax.eval_shape(scores.errors_program(setup.model), setup.state.params, chunk).shape == (17,)


def test_closed_forms_of_another_profile(smoke):
    linear = experiment.linear_of(smoke)
    found = scores.on_profile(linear, "TDL-C", smoke)
    grid, pilots = training.grid_of(smoke), training.pilots_of(smoke)
    cells = (pilots.rows[:, None] * 14 + pilots.columns).reshape(-1)
    for point, (snr, spread, shift) in enumerate(scores.POINTS.astype(float).tolist()):
        with jax.enable_x64(True):
            R = np.kron(*map(np.asarray, tdl.channel_covariance("TDL-C", 1e-9 * spread, shift, grid)))
        noisy = R[np.ix_(cells, cells)] + 10 ** (-snr / 10) * 8 / 168 * np.eye(8)
        estimators = {"bilinear": linear.bilinear, "pooled": linear.pooled, "bound": R[:, cells] @ np.linalg.inv(noisy)}
        np.testing.assert_allclose(found.matched[point], estimators["bound"], atol=1e-7)
        for name, G in estimators.items():
            error = R - 2 * (G @ R[cells]).real + G @ noisy @ G.conj().T
            np.testing.assert_allclose(found.errors[name][point], np.mean(np.diagonal(error).real), rtol=1e-7)


class Constant(nn.Module):
    """An estimator whose errors a loop can count: one number for every cell, plus the first pilot."""

    size: tuple

    @nn.compact
    def __call__(self, ls, conditions, *, deterministic=True):
        level = self.param("level", nn.initializers.ones, ())
        return jnp.broadcast_to((level + ls[:, :1, :1]), (len(ls), *self.size))


def sample_matrix(stage, bank, config):
    """R_hp (R_pp + s2 I)^-1 of the stage's slots, one by one in float64."""
    keys = jax.random.split(jax.random.key(config.seed), config.sample_slots)
    slots = jax.jit(lambda keys: training.slots_of(keys, stage, bank, config))(keys)
    cross, pilots = 0, 0
    for ls, h in zip(*(np.asarray(part, complex).reshape(len(keys), -1) for part in (slots.ls, slots.h)), strict=True):
        cross, pilots = cross + np.outer(h, ls.conj()) / len(keys), pilots + np.outer(ls, ls.conj()) / len(keys)
    return cross @ np.linalg.inv(pilots + np.mean(slots.noise_var) * np.eye(len(pilots)))


def test_scores_are_those_of_a_loop(smoke):
    config = smoke.copy_and_resolve_references()
    config.update({"test_slots": 6, "test_chunk": 3, "sample_slots": 21})
    bank = training.bank_of(config)
    tests = scores.draw_tests("fixed", bank, config.test_slots, config)
    again = scores.draw_tests("fixed", bank, config.test_slots, config)
    jax.tree.map(np.testing.assert_array_equal, tests, again)  # all estimators see the same slots
    assert tests.h.shape == (17, 2, 3, 12, 14)
    np.testing.assert_array_equal(tests.conditions, np.broadcast_to(scores.POINTS[:, None, None], (17, 2, 3, 3)))
    levels = np.float32([0, 1])
    found = scores.score_model(Constant((12, 14)), {"level": levels}, tests)
    linear = experiment.linear_of(config)
    sample = scores.fit_sample("fixed", bank, config)
    rows = scores.score_linear(linear, sample, tests)
    assert {name: row.shape for name, row in rows.items()} == dict.fromkeys(
        ("bilinear", "pooled", "sample", "matched"), (1, 17)
    )
    oracle = sample_matrix("fixed", bank, config)
    np.testing.assert_allclose(sample, oracle, atol=1e-3)  # float32, of a matrix with a condition of about 100
    ls, h = (np.asarray(part).reshape(17, 6, *part.shape[3:]) for part in (tests.ls, tests.h))
    for point in range(17):
        estimators = {
            **{level: lambda x, level=level: np.full((12, 14), level + x[0, 0]) for level in levels.tolist()},
            "bilinear": lambda x: (linear.bilinear @ x.reshape(-1)).reshape(12, 14),
            "pooled": lambda x: (linear.pooled @ x.reshape(-1)).reshape(12, 14),
            "sample": lambda x: (oracle @ x.reshape(-1)).reshape(12, 14),
            "matched": lambda x, point=point: (linear.matched[point] @ x.reshape(-1)).reshape(12, 14),
        }
        for name, estimate in estimators.items():
            errors = [np.abs(h[point, slot] - estimate(ls[point, slot])) ** 2 for slot in range(6)]
            ours = found[int(name), point] if isinstance(name, float) else rows[name][0, point]
            np.testing.assert_allclose(ours, 10 * np.log10(np.mean(errors)), atol=1e-3)  # dB of the mean; float32


def test_validation_is_that_of_a_loop(smoke):
    config = smoke.copy_and_resolve_references()
    config.training.update({"validation_slots": 6, "validation_chunk": 3})
    bank = training.bank_of(config)
    model = training.network("linear", config)
    generator = np.random.default_rng(0)
    kernel, bias = (generator.normal(size=size).astype(np.float32) for size in ((8, 168), (168,)))
    params = {"linear": {"kernel": kernel, "bias": bias}}
    found = training.validation_program("fixed", model, bank, config, None)(params)
    key = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds.fixed)  # not of the training's keys
    draw = jax.jit(lambda keys: training.slots_of(keys, "fixed", bank, config))
    errors = []
    for keys in jax.random.split(key, (2, 3)):
        slots = draw(keys)
        for ls, h in zip(np.asarray(slots.ls), np.asarray(slots.h), strict=True):
            parts = [part.reshape(-1) @ kernel + bias for part in (ls.real, ls.imag)]
            errors.append(np.abs(h - (parts[0] + 1j * parts[1]).reshape(12, 14)) ** 2)
    np.testing.assert_allclose(found, np.mean(errors), rtol=1e-5)


def test_models_see_the_same_slots_in_the_same_order(smoke):
    bank = training.bank_of(smoke)
    draws = []
    for name in ("linear", "adafortitran"):
        setup = training.set_up("fixed", name, None, bank, smoke, abstractly)
        draw = jax.jit(setup.batches.batch_at)
        draws.append([draw(step, bank) for step in range(3)])
    jax.tree.map(np.testing.assert_array_equal, *draws)


def test_a_run_of_the_papers_grid_stands_beside_what_was_published():
    config = experiment.get_config("paper")
    config.stages = {"fixed": ("adafortitran",)}
    text = experiment.comparison(MEASURED, config)
    assert "-21.93 -25.89 -28.68 -30.28 -31.00 -31.27" in text
    assert "-22.40 -26.10" in text
    assert "AdaFortiTran -13.05 lies between the bound -14.88 and the pooled LMMSE -13.05" in text
    above = {**MEASURED, "fresh/adafortitran/mean": [-12.0]}
    assert "does not lie between" in experiment.comparison(above, config)
    labels = experiment.draw_sweeps(MEASURED, config).legends[0].get_texts()
    assert sum("AdaFortiTran, " in label.get_text() for label in labels) == 2
    assert "SNR sweep" not in experiment.comparison(MEASURED, experiment.get_config("small"))


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 1), ({"grid.offset": 1}, 1), ({"grid.offset": 0}, 0), ({"closed_forms.subcarriers": 60}, 0)],
)
def test_published_dots_are_drawn_beside_the_papers_pilots_alone(changes, count):
    config = experiment.get_config("small")
    config.update_from_flattened_dict(changes)
    labels = experiment.draw_closed_forms(MEASURED, config).legends[0].get_texts()
    assert sum("as published" in label.get_text() for label in labels) == count


def test_another_first_row_is_not_the_papers():
    config = experiment.get_config("paper")
    config.stages = {"fixed": ("adafortitran",)}
    config.grid.offset = 0
    assert "SNR sweep" not in experiment.comparison(MEASURED, config)
    labels = experiment.draw_sweeps(MEASURED, config).legends[0].get_texts()
    assert not any("AdaFortiTran, " in label.get_text() for label in labels)


def test_encoders_compute_in_the_configs_precision(smoke):
    config = smoke.copy_and_resolve_references()
    config.model.dtype = "bfloat16"
    for name in ("adafortitran", "fortitran", "cevit"):
        assert training.network(name, smoke).dtype == jnp.float32
        assert training.network(name, config).dtype == jnp.bfloat16


def test_conditions_are_standardised_by_the_trainings(smoke):
    config = smoke.copy_and_resolve_references()
    for name in ("adafortitran", "cevit"):
        config.model.standardise = True
        means, deviations = training.network(name, config).condition_scale
        np.testing.assert_allclose(means, (12.5, 162.5, 525))
        np.testing.assert_allclose(deviations, [np.std(row) for row in training.conditions_of(config)])
        config.model.standardise = False
        assert training.network(name, config).condition_scale is None


def test_the_first_pilot_row_and_the_banks_phases_are_the_configs(smoke):
    config = smoke.copy_and_resolve_references()
    assert training.pilots_of(config).rows.tolist() == [1, 4, 7, 10]
    config.grid.offset = 2
    assert training.pilots_of(config).rows.tolist() == [2, 5, 8, 11]
    config.conditions.update({"delay_spreads_ns": (100, 100), "dopplers_hz": (50,)})
    apart = training.bank_of(config).h
    config.shared_phases = True
    same = training.bank_of(config).h
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.allclose(apart[0], apart[1])


def test_models_one_by_one_stop_early_and_divide_their_batches(smoke, tmp_path):
    from rich.console import Console

    from experiments.harness import Run

    config = smoke.copy_and_resolve_references()
    config.together, config.num_seeds.fixed = False, 2
    config.training.update({"slots": 16, "batch_size": 8, "updates_per_call": 2, "log_every": 2})
    config.training.updates.fixed = 40
    config.training.update({"rate": 1.0, "last_rate": 1.0, "patience": 2})  # so large a rate finds nothing better
    config.training.update({"validation_slots": 16, "validation_chunk": 8})
    experiment.check_config(config)
    run = Run(tmp_path, Console(quiet=True), make_mesh(data=8))
    _, params = training.train("fixed", "linear", training.bank_of(config), config, run)
    assert params["linear"]["kernel"].shape[0] == 2
    lines = training_lines(tmp_path)
    assert max(line["step"] for line in lines) < 40
    assert any("eval/mse" in line for line in lines)


def training_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


ONE_BY_ONE = {
    "together": False,
    "training.validation_slots": 8,
    "training.validation_chunk": 8,
    "training.patience": 1,
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_seeds.fresh", 0, "config.num_seeds.fresh=0 must be at least 1"),
        ("test_slots", 7, "config.test_slots=7 must be a multiple of test_chunk=4"),
        ("sample_slots", 22, "config.sample_slots=22 must be a multiple of test_chunk=4"),
        ("snr_reference", "cell", "must be one of"),
        ("conditions.dopplers_hz", (50, 200), "which the tests need"),
        ("conditions.delay_spreads_ns", (-25, 50), "must be some numbers"),
        ("conditions.dopplers_hz", (200, 6_000), "must be below 5144"),
        ("stages.fixed", ("vit",), "some of"),
        ("layers.fortitran", 0, "config.layers.fortitran=0 must be at least 1"),
        ("model.patch", (5, 2), r"config.model.patch=\(5, 2\) must be a divisor"),
        ("model.cevit_patch", (6, 5), "config.model.cevit_patch"),
        ("model.width", 9, "a multiple of num_heads=2"),
        ("model.cevit_width", 6, "config.model.cevit_width=6 must be a multiple of num_heads=4"),
        ("model.sisrafnet_width", 0, "config.model.sisrafnet_width=0 must be at least 1"),
        ("model.dtype", "float16", "config.model.dtype=float16 must be float32 or bfloat16"),
        ("model.dropout", 1.0, r"in \[0, 1\)"),
        ("grid.subcarriers", 13, "config.model.patch"),
        ("grid.spacing", 5, "a multiple of spacing=5"),
        ("grid.columns", (2, 14), "two ascending symbols"),
        ("grid.sinusoids", 0, "config.grid.sinusoids=0 must be at least 1"),
        ("training.rate", 0.0, "config.training.rate=0.0 must be above 0"),
        ("training.last_rate", -1e-5, "config.training.last_rate=-1e-05 must be above 0"),
        ("training.log_every", 0, "config.training.log_every=0 must be at least 1"),
        ("training.log_every", 3, "config.training.log_every=3 must be a multiple of updates_per_call=2"),
        ("training.batch_size", 0, "config.training.batch_size=0 must be at least 1"),
        ("training.updates.fresh", 0, "config.training.updates.fresh=0 must be at least 1"),
        ("training.slots", 7, "or at least training.batch_size"),
        ("grid.offset", 3, "config.grid.offset=3 must be -1"),
        ("closed_forms.slots", 9, "a multiple of chunk=8"),
        ("closed_forms.subcarriers", 5, "config.closed_forms.subcarriers=5 must be two rows of pilots: 6"),
        ("together", False, "config.training.validation_slots=0"),
        ("mismatch.profiles", ("TDL-D",), "config.mismatch.profiles"),
        ("mismatch.slots", 6, "config.mismatch.slots=6 must be a multiple of test_chunk=4"),
        ("density.spacings", (5,), "divisors of subcarriers=12"),
        ("density.models", ("vit",), "config.density.models"),
    ],
)
def test_bad_fields_are_named(smoke, field, value, message):
    config = smoke.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.schedule": "exponential_decay", "training.last_rate": 0.0}, "config.training.last_rate=0.0"),
        ({"grid.subcarriers": 48, "model.patch": (1, 1)}, "at most 512 tokens, not 672"),
        ({**ONE_BY_ONE, "training.slots": 0}, r"training.slots=0 must be such that its epochs \(1 updates\)"),
        ({**ONE_BY_ONE, "training.slots": 24}, r"\(3 updates\) are a multiple of updates_per_call=2"),
    ],
)
def test_bad_fields_are_named_beside_others(smoke, changes, message):
    config = smoke.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)


def test_intervals_that_fit_takes_are_not_refused(smoke):
    config = smoke.copy_and_resolve_references()
    config.training.update({"last_rate": 0.0, "log_every": 5})  # no update is the fifth
    config.update_from_flattened_dict({**ONE_BY_ONE, "training.slots": 16})
    experiment.check_config(config)


def test_a_model_without_its_depth_is_named(smoke):
    config = smoke.copy_and_resolve_references()
    config.stages.fixed = ("fortitran",)
    del config.layers.fortitran
    with pytest.raises(UsageError, match=r"config\.stages\.fixed=\('fortitran',\) must be some of"):
        experiment.check_config(config)
