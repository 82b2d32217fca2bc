"""Similarity of representations and ranks: other routes to the same numbers, invariances, the ends of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops.similarity import effective_rank, linear_cka, unit
from jaxpapers.train import jit_once


def test_unit_vectors_and_their_gradient_at_zero():
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(unit(z), z / np.linalg.norm(z, axis=1, keepdims=True), rtol=1e-6)
    value, grad = jax.value_and_grad(lambda z: jnp.sum(unit(z)))(jnp.zeros((1, 3)))
    assert value == 0
    assert np.isfinite(grad).all()
    assert unit(z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear_cka():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(20, 5)) + 3, rng.normal(size=(20, 8))
    cka = jax.jit(linear_cka)
    centred = [x - x.mean(axis=0) for x in (a, b)]
    K, L = (x @ x.T for x in centred)
    expected = np.sum(K * L) / np.sqrt(np.sum(K * K) * np.sum(L * L))  # through the Gram matrices
    with jax.enable_x64(True):
        np.testing.assert_allclose(cka(a, b), expected, rtol=1e-12)
        rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
        np.testing.assert_allclose(cka(a, 7 * a @ rotation + 1), 1, rtol=1e-12)
    np.testing.assert_allclose(cka(np.float32(1e8 * a), np.float32(1e-8 * b)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="got 20 and 19"):
        linear_cka(a, b[:19])


def test_effective_rank():
    singular = np.array([4.0, 2.0, 1.0, 1.0])
    rotations = [np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0] for seed in (0, 1)]
    p = singular / 8
    with jax.enable_x64(True):
        run = jit_once(effective_rank)
        ours = run(rotations[0] @ np.diag(singular) @ rotations[1])
        np.testing.assert_allclose(ours, np.exp(-np.sum(p * np.log(p))), rtol=1e-12)
        np.testing.assert_allclose(run(np.eye(4)), 4, rtol=1e-12)
        np.testing.assert_allclose(run(np.outer(np.ones(4), np.arange(1.0, 5.0))), 1, atol=1e-12)
        codes = np.random.default_rng(2).normal(size=(9, 4))
        squares = np.linalg.svd(codes, compute_uv=False) ** 2
        p = squares / squares.sum()
        np.testing.assert_allclose(run(codes.T @ codes), np.exp(-np.sum(p * np.log(p))), rtol=1e-12)
