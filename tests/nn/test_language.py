"""The loss of the next token: numpy's figures, and the loss by chunks against the loss of all logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.nn.language import chunked_language_loss, language_loss
from jaxpapers.train import jit_once, make_mesh

VOCAB, WIDTH = 11, 6


def drawn(*shape):
    """Hidden states, targets, weights (some are 0) and a matrix to logits."""
    rng = np.random.default_rng(0)
    weights = rng.integers(3, size=shape).astype(float)
    return (
        rng.normal(size=(*shape, WIDTH)),
        rng.integers(VOCAB, size=shape),
        weights,
        rng.normal(size=(WIDTH, VOCAB)),
    )


def test_language_loss_is_cross_entropy_and_z_loss():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, VOCAB)), rng.integers(VOCAB, size=(2, 5))
    weights = rng.integers(2, size=(2, 5)).astype(float)
    z = np.exp(logits).sum(-1)
    losses = np.log(z) - np.take_along_axis(logits, targets[..., None], -1)[..., 0] + 0.01 * np.log(z) ** 2
    with jax.enable_x64(True):
        loss, terms = language_loss(logits, targets, weights, z_loss=0.01)
        np.testing.assert_allclose(loss, (weights * losses).sum() / weights.sum(), rtol=1e-12)
        np.testing.assert_allclose(terms.cross_entropy + 0.01 * terms.z_loss, loss, rtol=1e-12)
        right = (logits.argmax(-1) == targets)[weights > 0].mean()
        np.testing.assert_allclose(terms.accuracy, right, rtol=1e-12)
        np.testing.assert_allclose(language_loss(logits, targets, z_loss=0.01)[0], losses.mean(), rtol=1e-12)
        assert language_loss(logits, targets, np.zeros((2, 5)))[0] == 0


def whole(hidden, matrix, targets, weights):
    return language_loss(hidden @ matrix, targets, weights, z_loss=0.01)


def by_chunks(hidden, matrix, targets, weights, chunk):
    return chunked_language_loss(lambda states: states @ matrix, hidden, targets, weights, 0.01, chunk=chunk)


def with_gradients(function):
    """The loss, its parts, and its gradients by hidden states and head."""
    return jit_once(jax.value_and_grad(function, (0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("shape", "chunk", "weighted"), [((2, 7), 3, True), ((2, 7), 7, False), ((2, 7), 100, True), ((5,), 1, False)]
)
def test_loss_by_chunks_is_the_loss(shape, chunk, weighted):
    hidden, targets, weights, matrix = drawn(*shape)
    weights = weights if weighted else None
    with jax.enable_x64(True):
        expected = with_gradients(whole)(hidden, matrix, targets, weights)
        ours = with_gradients(partial(by_chunks, chunk=chunk))(hidden, matrix, targets, weights)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-13)  # float64, sums in another order


def test_loss_by_chunks_of_weights_that_are_all_zero():
    hidden, targets, weights, matrix = drawn(2, 7)
    (loss, _), grads = with_gradients(partial(by_chunks, chunk=3))(hidden, matrix, targets, 0 * weights)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_loss_by_chunks_never_holds_all_logits():
    hidden, targets, _, matrix = drawn(2, 64)
    with jax.enable_x64(True):
        loss = partial(by_chunks, targets=targets, weights=None, chunk=8)
        kept = jax.eval_shape(lambda hidden, matrix: jax.vjp(loss, hidden, matrix, has_aux=True)[1], hidden, matrix)
        assert max(leaf.size for leaf in jax.tree.leaves(kept)) == hidden.size  # the states alone, not 2 * 64 * 11
        text = str(jax.make_jaxpr(jax.grad(lambda h: by_chunks(h, matrix, targets, None, 8)[0]))(hidden))
    assert f"f64[2,8,{VOCAB}]" in text
    assert f"[2,64,{VOCAB}]" not in text
    assert f"[8,2,8,{VOCAB}]" not in text


def test_loss_by_chunks_of_a_sequence_that_devices_share():
    """Nothing is gathered but the head: every device has its part of every chunk."""
    mesh = make_mesh(data=2, seq=4)
    hidden, targets, weights, matrix = (np.asarray(part, np.float32) for part in drawn(2, 16))
    targets = targets.astype(np.int32)
    place = {"data": NamedSharding(mesh, P("data", "seq")), "whole": NamedSharding(mesh, P())}
    inputs = [
        jax.device_put(part, place[where])
        for part, where in ((hidden, "data"), (matrix, "whole"), (targets, "data"), (weights, "data"))
    ]
    run = with_gradients(partial(by_chunks, chunk=8)).lower(*inputs).compile()
    assert "all-gather" not in run.as_text()
    expected = with_gradients(whole)(hidden, matrix, targets, weights)
    for mine, other in zip(jax.tree.leaves(run(*inputs)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)  # float32


def test_loss_by_chunks_refuses_no_steps():
    hidden, targets, _, matrix = drawn(2, 7)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        by_chunks(jnp.asarray(hidden), matrix, targets, None, 0)
