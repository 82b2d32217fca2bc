"""Dropout's masks against the binomial distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.nn.dropout import Dropout, keep_mask

SHAPE = (64, 3, 1001)
COUNT = 64 * 3 * 1001


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_masks_keep_their_share_and_have_no_pattern(rate):
    kept = np.asarray(jax.jit(lambda key: keep_mask(key, rate, SHAPE))(jax.random.key(0)), float)
    error = max((rate * (1 - rate) / COUNT) ** 0.5, 1e-9)
    assert abs(kept.mean() - (1 - rate)) < 5 * error
    if rate:
        centred = kept - (1 - rate)
        for shift, axis in ((1, -1), (2, -1), (1, 1), (1, 0)):  # two halves of a word are neighbours
            correlation = np.mean(centred * np.roll(centred, shift, axis)) / (rate * (1 - rate))
            assert abs(correlation) < 5 / COUNT**0.5
        per_column = centred.mean(axis=(0, 1))
        np.testing.assert_array_less(np.abs(per_column), 6 * (rate * (1 - rate) / 192) ** 0.5)


@given(st.lists(st.integers(0, 3), max_size=3).map(tuple))
def test_masks_have_any_shape(shape):
    assert keep_mask(jax.random.key(1), 0.3, shape).shape == shape


def test_kept_entries_grow_and_the_mean_stays():
    x = jnp.full(SHAPE, 2.0)
    dropped = Dropout(0.25, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_allclose(np.unique(dropped), [0, 2 / 0.75], rtol=1e-6)
    assert abs(float(dropped.mean()) - 2) < 5 * 2 * (0.25 / 0.75 / COUNT) ** 0.5
    other = Dropout(0.25, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(3)})
    assert not np.array_equal(dropped, other)
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.0, deterministic=False).apply({}, x), x)


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match=r"the rate of dropout must be in \[0, 1\), got 1.0"):
        keep_mask(jax.random.key(0), 1.0, (2,))
