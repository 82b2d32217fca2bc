"""Patches against slices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.nn.patches import patchify, unpatchify

COUNTS = st.integers(1, 4)
SIDES = st.integers(1, 3)


@given(COUNTS, COUNTS, SIDES, SIDES, SIDES, st.lists(SIDES, max_size=2).map(tuple))
def test_patches_are_blocks_in_row_major_order(down, across, height, width, channels, batch):
    size, patch = (down * height, across * width), (height, width)
    x = np.random.default_rng(0).normal(size=(*batch, *size, channels)).astype(np.float32)
    tokens = np.asarray(patchify(x, patch))
    for i in range(down):
        for j in range(across):
            block = x[..., height * i : height * (i + 1), width * j : width * (j + 1), :]
            np.testing.assert_array_equal(tokens[..., i * across + j, :], block.reshape(*batch, -1))
    np.testing.assert_array_equal(unpatchify(tokens, size, patch), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(np.zeros((12, 14, 1)), (5, 2)), r"patches of \(5, 2\) do not fill a grid of \(12, 14\)"),
        (lambda: patchify(np.zeros((12, 14, 1)), (3, 0)), "do not fill"),
        (lambda: unpatchify(np.zeros((28, 6)), (13, 14), (3, 2)), "do not fill"),
        (lambda: unpatchify(np.zeros((27, 6)), (12, 14), (3, 2)), "27 tokens of 6 entries"),
        (lambda: unpatchify(np.zeros((28, 7)), (12, 14), (3, 2)), "28 tokens of 7 entries"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
