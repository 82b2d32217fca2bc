"""Options of the optimizer and the model that scale a run, each with the effect that it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.train import averaged_params, create_state, make_optimizer, make_train_step
from tests.train.tiny import Tokens, init_params, make_loss

KEY = jax.random.key(0)


def quadratic(params, extra, batch, key):
    """Mean over the batch of half the squared distances: the gradient is the mean difference."""
    return 0.5 * jnp.mean(jnp.sum((params["w"] - batch) ** 2, -1)), (extra, {})


def steps(optimizer, params, batches, loss_fn=quadratic):
    step = jax.jit(make_train_step(loss_fn, optimizer))
    state = create_state(params, optimizer)
    history = []
    for batch in batches:
        state, metrics = step(state, batch, KEY)
        history.append((state, metrics))
    return history


def random_batches(count, rows=4):
    return list(np.random.default_rng(0).normal(size=(count, rows, 3)).astype(np.float32))


def test_accumulated_gradients_are_those_of_one_large_batch():
    params, batches = {"w": jnp.zeros(3)}, random_batches(4)
    small = steps(make_optimizer("adam", 0.1, accumulate=2), params, batches)
    large = steps(make_optimizer("adam", 0.1), params, [np.concatenate(batches[:2]), np.concatenate(batches[2:])])
    np.testing.assert_array_equal(small[0][0].params["w"], params["w"])  # nothing moves on the first half
    for half, whole in zip(small[1::2], large, strict=True):
        np.testing.assert_allclose(half[0].params["w"], whole[0].params["w"], rtol=1e-5)


def test_the_schedule_counts_updates_not_batches():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.0})
    history = steps(make_optimizer("sgd", schedule, accumulate=2), {"w": jnp.zeros(3)}, random_batches(4))
    assert np.abs(history[1][0].params["w"]).max() > 0
    np.testing.assert_array_equal(history[3][0].params["w"], history[1][0].params["w"])


def test_clipping_bounds_the_norm_of_the_update():
    far = [np.full((1, 3), 100.0, np.float32)]
    state, metrics = steps(make_optimizer("sgd", 1.0, clip_norm=0.5), {"w": jnp.zeros(3)}, far)[0]
    np.testing.assert_allclose(np.linalg.norm(state.params["w"]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], 100 * np.sqrt(3), rtol=1e-6)  # reported as it was
    near = [np.full((1, 3), 0.1, np.float32)]
    state, _ = steps(make_optimizer("sgd", 1.0, clip_norm=0.5), {"w": jnp.zeros(3)}, near)[0]
    np.testing.assert_allclose(state.params["w"], 0.1, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_of_the_parameters_is_the_textbooks(accumulate):
    optimizer = make_optimizer("sgd", 0.3, ema_decay=0.9, accumulate=accumulate)
    history = steps(optimizer, {"w": jnp.ones(3)}, random_batches(6))
    average = np.ones(3)
    for index, (state, _) in enumerate(history):
        if (index + 1) % accumulate == 0:
            average = 0.9 * average + 0.1 * np.asarray(state.params["w"])
        np.testing.assert_allclose(averaged_params(state.opt_state)["w"], average, rtol=1e-6)
    with pytest.raises(ValueError, match="keeps no average"):
        averaged_params(optax.adam(0.1).init({"w": jnp.ones(3)}))


def test_frozen_parameters_stay_and_cost_no_memory():
    params = init_params()
    optimizer = make_optimizer("adamw", 1e-2, weight_decay=0.1, frozen=("^embed", "attention"), ema_decay=0.5)
    state = steps(optimizer, params, [Tokens()[0], Tokens()[1]], make_loss())[-1][0]
    for path, before in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        after = dict(jax.tree.leaves_with_path(state.params))[path]
        same = bool(jnp.all(before == after))
        assert same == ("embed" in name or "attention" in name), name
    moments = [leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state) if "mu" in jax.tree_util.keystr(path)]
    names = ("embed", "attention")
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    trained = [leaf for name, leaf in leaves if not any(frozen in name for frozen in names)]
    assert sum(leaf.size for leaf in moments) == sum(leaf.size for leaf in trained)
    jax.tree.map(np.testing.assert_array_equal, averaged_params(state.opt_state)["embed"], params["embed"])


def test_patterns_that_freeze_nothing_are_refused():
    optimizer = make_optimizer("sgd", 0.1, frozen=("encoder",))
    with pytest.raises(ValueError, match=r"nothing to freeze for \['encoder'\]; the parameters are w"):
        optimizer.init({"w": jnp.ones(3)})


@pytest.mark.parametrize("options", [{"clip_norm": 0.0}, {"accumulate": 0}, {"ema_decay": 1.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected clip_norm > 0, accumulate >= 1, 0 <= ema_decay < 1"):
        make_optimizer("sgd", 0.1, **options)


def test_half_precision_computes_in_bfloat16_and_keeps_float32_parameters():
    params, batches = init_params(), [Tokens()[step] for step in range(30)]
    optimizer = optax.adam(1e-2)
    exact = steps(optimizer, params, batches, make_loss())
    mixed = steps(optimizer, params, batches, make_loss(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed[-1][0].params)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(lambda p: make_loss(dtype=jnp.bfloat16)(p, None, batches[0], KEY)[0])(params))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(":bf16[" in line for line in products)
    losses = [[float(metrics["loss"]) for _, metrics in history] for history in (exact, mixed)]
    # bfloat16 has 8 bits: each loss is off by up to 1%, and the runs drift apart; both learn.
    np.testing.assert_allclose(losses[1][:5], losses[0][:5], rtol=2e-2)
    assert losses[1][-1] < 0.8 * losses[1][0]


@pytest.mark.parametrize(("remat", "scan"), [(True, False), (False, True), (True, True)])
def test_remat_and_scan_change_no_loss(remat, scan):
    from jaxpapers.nn.stack import stack_layers

    params = init_params()
    expected = steps(optax.adam(1e-2), params, [Tokens()[0], Tokens()[1]], make_loss())
    if scan:
        params = {**params, "blocks": stack_layers(params["blocks"])}
    losses = steps(optax.adam(1e-2), params, [Tokens()[0], Tokens()[1]], make_loss(remat=remat, scan=scan))
    for (_, mine), (_, theirs) in zip(losses, expected, strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-5)
