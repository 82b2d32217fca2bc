"""Losses of classes and pairs against numpy and optax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from jaxpapers.nn.losses import cross_entropy, info_nce
from jaxpapers.train import jit_once

LABELS = np.array([[1, 4, 0], [4, 2, 3]], np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_of_the_smoothed_targets(smoothing):
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    ours = jit_once(partial(cross_entropy, label_smoothing=smoothing))(logits, LABELS)
    np.testing.assert_allclose(ours, optax.softmax_cross_entropy(logits, jnp.asarray(targets)), rtol=1e-5)
    assert cross_entropy(logits.astype(jnp.bfloat16), LABELS).dtype == jnp.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce_by_numpy(normalize):
    u, v = np.random.default_rng(1).normal(size=(2, 7, 16))
    a, b = (part / np.linalg.norm(part, axis=1)[:, None] if normalize else part for part in (u, v))
    scores = a @ b.T / 0.2
    rows, columns = (logsumexp(scores, axis=axis) - np.diag(scores) for axis in (1, 0))
    with jax.enable_x64(True):
        loss = jit_once(partial(info_nce, normalize=normalize))
        np.testing.assert_allclose(loss(u, v, 0.2), (rows.mean() + columns.mean()) / 2, rtol=1e-12)
        np.testing.assert_allclose(loss(v, u, 0.2), loss(u, v, 0.2), rtol=1e-12)


def test_info_nce_at_its_ends():
    same = np.ones((6, 4), np.float32)
    np.testing.assert_allclose(info_nce(same, same, 0.07), np.log(6), rtol=1e-6)  # pairs cannot be told apart
    apart = np.eye(6, dtype=np.float32)
    np.testing.assert_allclose(info_nce(apart, apart, 0.01), 0, atol=1e-6)
    gradient = jax.grad(lambda scale: info_nce(apart, apart, jnp.exp(-scale)))(jnp.float32(1.0))  # a learned scale
    assert gradient < 0


def test_bad_input_is_refused():
    logits = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match=r"labels must be in 0..3, got 4"):
        cross_entropy(logits, LABELS)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        cross_entropy(logits, LABELS % 4, 1.5)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        info_nce(logits[0], logits[0], 0.0)
