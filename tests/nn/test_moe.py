"""Routing and grouped products against numpy; whole blocks of experts are in tests/components/test_polycom.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxpapers.nn.moe import apply_experts, grouped_dot, route
from jaxpapers.train import jit_once


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("top_k", [1, 4])
def test_routing(top_k):
    logits = draw(6, 3, 5, 4)
    with jax.enable_x64(True):
        mask = np.ones((3, 5), bool)
        mask[1, 3:] = False
        routing = jit_once(partial(route, top_k=top_k))(logits, mask=mask)
        p = scipy.special.softmax(logits, axis=-1)
        np.testing.assert_allclose(routing.weights, -np.sort(-p, axis=-1)[..., :top_k], rtol=1e-12)
        counts = np.bincount(np.argsort(-p, axis=-1)[mask][:, :top_k].ravel(), minlength=4)
        np.testing.assert_allclose(routing.load, counts / (13 * top_k), rtol=1e-12)
        expected = 4 * np.sum(counts / counts.sum() * p[mask].mean(0))
        np.testing.assert_allclose(routing.load_balance, expected, rtol=1e-12)
        z = scipy.special.logsumexp(logits[mask], axis=-1)
        np.testing.assert_allclose(routing.z_loss, np.mean(z**2), rtol=1e-12)
        uniform = jit_once(lambda logits: route(logits, 4).load_balance)(np.zeros((7, 4)))
        np.testing.assert_allclose(uniform, 1, rtol=1e-12)


@pytest.mark.parametrize("block", [1, 3])
def test_grouped_products_row_by_row(block):
    sizes = np.array([3, 0, 6, 3])
    rows, matrices = jnp.asarray(draw(0, 15, 4), jnp.float32), jnp.asarray(draw(1, 4, 4, 5), jnp.float32)
    ours = jit_once(partial(grouped_dot, block=block))(rows, matrices, sizes)
    owner = np.repeat(np.arange(4), sizes)
    expected = np.einsum("ri,rio->ro", rows[:12], matrices[owner])
    np.testing.assert_allclose(ours[:12], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[12:], 0)  # padding


@pytest.mark.parametrize("block", [1, 4])
def test_outputs_come_back_to_their_tokens(block):
    x, weights = (jnp.asarray(draw(seed, 7, 3), jnp.float32) for seed in (0, 1))
    weights = weights[:, :2]
    experts = np.random.default_rng(2).permuted(np.tile(np.arange(5), (7, 1)), axis=1)[:, :2]
    mask = np.arange(7) != 4
    factors = jnp.asarray(draw(3, 5, 3, 3), jnp.float32)

    def run(rows, sizes):
        return 1 + grouped_dot(rows, factors, sizes, block)  # the 1 would leak from padding

    ours = jit_once(lambda x: apply_experts(x, experts, weights, 5, run, mask, block))(x)
    each = 1 + np.einsum("tw,tkwo->tko", x, np.asarray(factors)[experts])
    expected = np.einsum("tko,tk->to", each, weights) * mask[:, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(np.ones((2, 4)), 5), "top_k must be between 1 and the 4 experts, got 5"),
        (lambda: route(np.ones((2, 4)), 0), "top_k must be between 1 and the 4 experts, got 0"),
        (lambda: grouped_dot(np.ones((5, 2)), np.ones((1, 2, 2)), np.array([4]), 2), "5 rows are no whole number"),
        (
            lambda: apply_experts(np.ones((2, 3)), np.zeros((2, 1), int), np.ones((2, 1)), 1, lambda x, _: x, block=0),
            "block must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
