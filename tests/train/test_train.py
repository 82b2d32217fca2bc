"""The training loop, held against NumPy's own gradient descent and against itself after a crash."""

import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.train import (
    CheckpointMismatch,
    Checkpoints,
    MetricsWriter,
    NonFiniteLoss,
    OnDevice,
    create_population,
    create_state,
    fit,
    make_optimizer,
    make_schedule,
    make_train_step,
    member,
    member_keys,
    read_metrics,
    scan_steps,
    update_program,
    vmap_step,
    write_whole,
)

KEY = jax.random.key(0)
INPUTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
TARGETS = INPUTS @ np.float32([1.0, -2.0, 0.5])


def least_squares(params, extra, batch, key):
    """Mean squared error with a little input noise, so that the keys matter."""
    inputs, targets = batch
    inputs = inputs + 0.1 * jax.random.normal(key, inputs.shape)
    loss = jnp.mean((inputs @ params["w"] - targets) ** 2)
    return loss, (extra, {"norm": jnp.linalg.norm(params["w"])})


class HostBatches:
    """Eight rows a step; raises at `crash_at` as a process that dies there."""

    def __init__(self, crash_at=None):
        self.crash_at = crash_at

    def __getitem__(self, step):
        if step == self.crash_at:
            raise RuntimeError("crash")
        rows = (np.arange(8) + 8 * step) % 64
        return INPUTS[rows], TARGETS[rows]


def device_batch(step):
    rows = (jnp.arange(8) + 8 * step) % 64
    return jnp.asarray(INPUTS)[rows], jnp.asarray(TARGETS)[rows]


def new_state(optimizer):
    return create_state({"w": jnp.zeros(3)}, optimizer)


def train(num_steps, batches, **options):
    optimizer = optax.adam(1e-2)
    step = make_train_step(least_squares, optimizer)
    return fit(new_state(optimizer), step, batches, num_steps, key=KEY, **options)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_sgd_equals_numpy():
    def plain(params, extra, batch, key):
        loss = jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)
        return loss, (extra, {})

    optimizer = optax.sgd(0.1)
    fitted = fit(new_state(optimizer), make_train_step(plain, optimizer), HostBatches(), 20, key=KEY)
    weights = np.zeros(3)
    for step in range(20):
        inputs, targets = HostBatches()[step]
        weights -= 0.1 * 2 * inputs.T @ (inputs @ weights - targets) / 8
    np.testing.assert_allclose(fitted.state.params["w"], weights, rtol=1e-5)  # float32 against float64
    assert int(fitted.state.step) == 20
    assert fitted.best is None


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_an_update_in_parts_is_that_of_the_whole_batch(microbatches):
    def squares(params, extra, batch, key):
        rows = len(batch[0])
        loss = jnp.mean((batch[0] @ params["w"] - batch[1]) ** 2)
        return loss, (extra + rows, {"rows": jnp.float32(rows), "draw": jax.random.uniform(key)})

    optimizer = optax.adam(1e-2)
    state = create_state({"w": jnp.ones(3)}, optimizer, extra=jnp.zeros(()))
    whole, expected = jax.jit(make_train_step(squares, optimizer))(state, HostBatches()[0], KEY)
    step = jax.jit(make_train_step(squares, optimizer, microbatches=microbatches))
    parts, metrics = step(state, HostBatches()[0], KEY)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)  # float32, sums in another order
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    assert metrics["rows"] == 8 // microbatches  # so many at a time
    assert parts.extra == whole.extra == 8  # went through all of them
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(KEY, 0), jnp.arange(microbatches))
    np.testing.assert_allclose(metrics["draw"], jax.vmap(jax.random.uniform)(keys).mean(), rtol=1e-6)


def test_microbatches_that_do_not_fit_are_refused():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        make_train_step(least_squares, optimizer, microbatches=0)
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of 8"):
        make_train_step(least_squares, optimizer, microbatches=3)(new_state(optimizer), HostBatches()[0], KEY)


def test_host_batches_and_device_batches_agree():
    host = train(30, HostBatches(), steps_per_call=5)
    device = train(30, OnDevice(device_batch), steps_per_call=5)
    # One program a step against one scanned program: XLA may order the sums differently.
    np.testing.assert_allclose(host.state.params["w"], device.state.params["w"], rtol=1e-5)


DATA = {"inputs": INPUTS, "targets": TARGETS}


def data_batch(step, data):
    rows = (jnp.arange(8) + 8 * step) % 64
    return data["inputs"][rows], data["targets"][rows]


@pytest.mark.parametrize("steps_per_call", [1, 5])
def test_batches_from_data_are_those_of_a_closure(steps_per_call):
    data, closure = (
        train(10, batches, steps_per_call=steps_per_call)
        for batches in (OnDevice(data_batch, DATA), OnDevice(device_batch))
    )
    np.testing.assert_allclose(data.state.params["w"], closure.state.params["w"], rtol=1e-6)  # another fusion
    assert np.abs(data.state.params["w"]).min() > 0.05


def test_other_data_take_the_same_program_and_stay_the_callers():
    optimizer = optax.adam(1e-2)
    program = update_program(make_train_step(least_squares, optimizer), OnDevice(data_batch, DATA), 5)
    given = DATA, DATA | {"targets": 3 * TARGETS}
    losses = [float(program(new_state(optimizer), KEY, data)[1]["loss"]) for data in given]
    assert program._cache_size() == 1
    assert losses[1] > 5 * losses[0]  # the errors of the first weights, 0, are thrice as large
    (_, _, data), _ = program.lower(new_state(optimizer), KEY, DATA).args_info
    assert not any(leaf.donated for leaf in jax.tree.leaves(data))
    with pytest.raises(TypeError, match="data"):
        program(new_state(optimizer), KEY)


def test_checkpoints_hold_no_data_and_a_resumed_run_takes_those_it_is_given(tmp_path):
    rng = np.random.default_rng(1)
    before, after = ({"inputs": rng.normal(size=(2**16, 3)), "targets": rng.normal(size=2**16)} for _ in range(2))

    def run(num_steps, data):
        with closing(Checkpoints(tmp_path)) as checkpoints:
            return train(num_steps, OnDevice(data_batch, data), steps_per_call=5, checkpoints=checkpoints).state

    assert bits(run(10, before)) == bits(run(10, after))  # done already
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < before["targets"].nbytes / 4
    optimizer = optax.adam(1e-2)
    state = train(10, OnDevice(data_batch, before), steps_per_call=5).state
    step = make_train_step(least_squares, optimizer)
    expected = fit(state, step, OnDevice(data_batch, after), 20, key=KEY, steps_per_call=5).state
    assert bits(run(20, after)) == bits(expected)


def test_scanned_metrics_are_means():
    optimizer = optax.sgd(0.0)
    step = make_train_step(least_squares, optimizer)
    _, scanned = jax.jit(scan_steps(step, device_batch, 4))(new_state(optimizer), KEY)
    state, losses = new_state(optimizer), []
    for index in range(4):
        state, metrics = step(state, device_batch(index), KEY)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(scanned["loss"], np.mean(losses), rtol=1e-6)


@pytest.mark.parametrize("crash_at", [1, 17, 39])
def test_a_crashed_run_resumes_bit_for_bit(tmp_path, crash_at):
    def run(folder, batches):
        with (
            closing(Checkpoints(folder / "checkpoints")) as checkpoints,
            closing(MetricsWriter(folder, "main", checkpoints.latest_step() or 0)) as metrics,
        ):
            return train(
                40,
                batches,
                steps_per_call=2,
                log_every=4,
                evaluate=lambda state: {"distance": jnp.sum((state.params["w"] - 1) ** 2)},
                evaluate_every=8,
                minimize="distance",
                checkpoint_every=10,
                checkpoints=checkpoints,
                metrics=metrics,
            )

    (tmp_path / "whole").mkdir()
    (tmp_path / "crashed").mkdir()
    whole = run(tmp_path / "whole", HostBatches())
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "crashed", HostBatches(crash_at))
    resumed = run(tmp_path / "crashed", HostBatches())
    assert bits(whole) == bits(resumed)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "crashed")
    again = run(tmp_path / "crashed", HostBatches(0))  # finished: no step is taken any more
    assert bits(again) == bits(whole)


def test_population_equals_single_runs():
    optimizer = optax.adam(1e-2)
    step = make_train_step(least_squares, optimizer)
    keys = jax.random.split(KEY, 3)

    def init(key):
        return {"w": jax.random.normal(key, (3,))}

    state = create_population(init, optimizer, keys)
    population = fit(
        state, vmap_step(step, shared_batch=True), OnDevice(device_batch), 20, key=keys, steps_per_call=10
    ).state
    for index in range(3):
        single = create_state(init(keys[index]), optimizer)
        single = fit(single, step, OnDevice(device_batch), 20, key=keys[index], steps_per_call=10).state
        expected = member(population.params, index)["w"]
        np.testing.assert_allclose(single.params["w"], expected, rtol=1e-5)  # batched and plain dots differ in order


def test_models_get_keys_of_their_own():
    keys = jax.random.split(KEY, 3)[jnp.array([0, 1, 2, 0])]
    found = member_keys(keys, 2)
    assert found.shape == (2, 4)
    for index, key in enumerate(keys):
        np.testing.assert_array_equal(jax.random.key_data(found[:, index]), jax.random.key_data(jax.random.split(key)))
    assert len(np.unique(jax.random.key_data(found).reshape(8, -1), axis=0)) == 6  # first and last model share theirs


def test_best_is_kept_for_each_model_and_nan_is_worst():
    optimizer = optax.sgd(1.0)

    def count_down(params, extra, batch, key):
        return params["w"], (extra, {})  # w falls by 1 a step

    table = jnp.array([[3.0, jnp.nan], [1.0, jnp.nan], [2.0, 5.0]])
    state = create_population(lambda key: {"w": jnp.zeros(())}, optimizer, jax.random.split(KEY, 2))
    fitted = fit(
        state,
        vmap_step(make_train_step(count_down, optimizer), shared_batch=True),
        OnDevice(lambda step: None),
        3,
        key=jax.random.split(KEY, 2),
        evaluate=lambda state: {"score": table[state.step - 1]},
        evaluate_every=1,
        minimize="score",
    )
    np.testing.assert_array_equal(fitted.best.score, [1.0, 5.0])
    np.testing.assert_array_equal(fitted.best.step, [2, 3])
    np.testing.assert_array_equal(fitted.best.params["w"], [-2.0, -3.0])


def test_patience_ends_a_training_that_has_stopped_improving(tmp_path):
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: 0.0}

    def run(folder, num_steps=60, **options):
        with closing(Checkpoints(folder)) as checkpoints:
            fitted = train(
                num_steps,
                HostBatches(),
                checkpoints=checkpoints,
                evaluate=lambda state: {"score": scores[int(state.step)]},
                evaluate_every=10,
                minimize="score",
                **options,
            )
        return int(fitted.state.step), int(fitted.best.step), bits(fitted)

    assert run(tmp_path / "patient", 50, patience=30)[:2] == (50, 50)
    ended = run(tmp_path / "a", patience=20)  # 40 is no better than 20
    assert ended[:2] == (40, 20)
    assert run(tmp_path / "a", patience=20) == ended  # what has ended is not taken up again
    with pytest.raises(ValueError, match="patience=0 must be at least 1"):
        run(tmp_path / "b", patience=0)
    with pytest.raises(ValueError, match="needs a metric to minimise"):
        train(2, HostBatches(), patience=1)


def test_extra_is_carried_and_rows_are_checked():
    optimizer = optax.sgd(0.0)

    def counting(params, extra, batch, key):
        return jnp.sum(params["w"] ** 2), (extra + 1, {"count": extra})

    state = create_state({"w": jnp.ones(2)}, optimizer, extra=jnp.zeros((), jnp.int32))
    fitted = fit(state, make_train_step(counting, optimizer), OnDevice(lambda step: None), 7, key=KEY)
    assert int(fitted.state.extra) == 7
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(2, ...\)"):
        create_population(lambda key: {"w": jnp.ones(2)}, optimizer, jax.random.split(KEY, 2), jnp.zeros(3))


def diverging(params, extra, batch, key):
    return params["w"] * jnp.where(batch, jnp.nan, 1.0), (extra, {})


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    optimizer = optax.sgd(0.1)
    state = create_state({"w": jnp.ones(())}, optimizer)
    step = make_train_step(diverging, optimizer)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(NonFiniteLoss, match="loss is nan at step 8"):
            fit(
                state,
                step,
                OnDevice(lambda step: step >= 7),
                20,
                key=KEY,
                log_every=100,
                checkpoints=checkpoints,
                checkpoint_every=2,
            )
        step_number, (restored, _) = checkpoints.restore((state, None))
    assert step_number == 6
    assert np.isfinite(restored.params["w"])


def test_a_non_finite_gradient_of_a_finite_loss_is_caught_before_it_is_saved(tmp_path):
    optimizer = optax.sgd(0.1)
    state = create_state({"w": jnp.zeros(())}, optimizer)
    step = make_train_step(lambda params, extra, batch, key: (jnp.sqrt(params["w"]), (extra, {})), optimizer)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(NonFiniteLoss, match="grad_norm is inf at step 1"):
            fit(state, step, OnDevice(lambda step: None), 1, key=KEY, checkpoints=checkpoints)
        assert checkpoints.latest_step() is None


def test_one_diverged_model_does_not_stop_the_others():
    optimizer = optax.sgd(0.1)
    keys = jax.random.split(KEY, 2)
    state = create_population(lambda key: {"w": jnp.ones(())}, optimizer, keys)
    step = vmap_step(make_train_step(diverging, optimizer))
    fitted = fit(state, step, OnDevice(lambda step: jnp.array([False, True])), 5, key=keys, log_every=1)
    assert np.isfinite(fitted.state.params["w"][0])
    assert np.isnan(fitted.state.params["w"][1])


def test_bad_intervals_and_missing_metrics_are_refused():
    with pytest.raises(ValueError, match="log_every=3 must be a multiple of steps_per_call=2"):
        train(10, HostBatches(), steps_per_call=2, log_every=3)
    with pytest.raises(ValueError, match="minimize='loss' needs"):
        train(10, HostBatches(), minimize="loss")
    with pytest.raises(ValueError, match=r"returned \['a'\], not 'b'"):
        train(2, HostBatches(), evaluate=lambda state: {"a": 0.0}, minimize="b")


def test_progress_is_silent_without_a_terminal(capsys):
    train(3, HostBatches())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_checkpoints_keep_the_newest_and_refuse_another_tree(tmp_path):
    with closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full(3, float(step))})
        step, tree = checkpoints.restore({"w": jnp.zeros(3)})
        assert step == 3
        np.testing.assert_array_equal(tree["w"], 3.0)
        for other in ({"w": jnp.zeros(4)}, {"v": jnp.zeros(3)}):
            with pytest.raises(CheckpointMismatch, match="checkpoint 3 in"):
                checkpoints.restore(other)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_metrics_survive_a_cut_line_and_non_finite_numbers(tmp_path):
    with closing(MetricsWriter(tmp_path, "a")) as metrics:
        metrics.write(1, {"loss": jnp.array([1.0, jnp.nan])})
        metrics.write(2, {"loss": jnp.array([2.0, jnp.inf])})
    with closing(MetricsWriter(tmp_path, "b")) as metrics:
        metrics.write(2, {"count": 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "b", "st')
    with closing(MetricsWriter(tmp_path, "a", resume_step=1)) as metrics:
        metrics.write(2, {"loss": 0.5})
    assert read_metrics(tmp_path) == [
        {"stage": "a", "step": 1, "loss": [1.0, "nan"]},
        {"stage": "b", "step": 2, "count": 3},
        {"stage": "a", "step": 2, "loss": 0.5},
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert any((tmp_path / "tensorboard" / "a").iterdir())


def test_files_are_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_whole(path, "first")

    def half(file):
        file.write(b"sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "options", "expected"),  # rates from 1 to 0.01 at the steps 0, 49, 50, 99, 100 of 100
    [
        ("constant_schedule", {}, [1, 1, 1, 1, 1]),
        ("linear_schedule", {}, [1, 1 - 0.99 * 0.49, 0.505, 1 - 0.99 * 0.99, 0.01]),
        ("cosine_decay_schedule", {}, [0.01 + 0.495 * (1 + np.cos(np.pi * t)) for t in (0, 0.49, 0.5, 0.99, 1)]),
        ("exponential_decay", {}, [1, 0.01**0.49, 0.1, 0.01**0.99, 0.01]),
        ("exponential_decay", {"steps_per_change": 50}, [1, 1, 0.1, 0.1, 0.01]),
        ("linear_schedule", {"warmup_steps": 50}, [0, 0.98, 1, 1 - 0.99 * 0.98, 0.01]),
    ],
)
def test_schedules_by_name(name, options, expected):
    schedule = make_schedule(name, 1.0, 0.01, 100, **options)
    rates = [float(schedule(jnp.int32(step))) for step in (0, 49, 50, 99, 100)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine_decay", 1.0, 0.1, 10), "unknown schedule 'cosine_decay'; did you mean 'cosine_decay_schedule'"),
        (("exponential_decay", 1.0, 0.0, 10), "exponential_decay cannot go from a rate of 1.0 to one of 0.0"),
        (("linear_schedule", float("nan"), 0.1, 10), "cannot go from a rate of nan"),
        (("linear_schedule", 1.0, 0.1, 0), "warmup_steps=0 of num_steps=0"),
    ],
)
def test_schedules_refuse_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


def test_optimizers_by_name():
    updates, _ = make_optimizer("sgd", 0.5).update(jnp.ones(2), make_optimizer("sgd", 0.5).init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.5)
    with pytest.raises(ValueError, match="unknown optimizer 'radm'; did you mean 'radam'"):
        make_optimizer("radm", 0.1)
    with pytest.raises(ValueError, match="'adam': got an unexpected keyword argument 'beta'"):
        make_optimizer("adam", 0.1, beta=0.9)
