"""Dense layers that multiply two plain matrices, whatever axes stand before the last.

`Dense` and `DenseGeneral` are flax's, with the same parameters and functions. XLA on a CPU has no product of kernels'
gradients over several axes, say (batch, time): it writes the cotangents once more, transposed, together with all that
led to them, element by element against the order of memory, and a training step of a Transformer takes a quarter
longer. With these axes as one it multiplies them as they lie. For a TPU it makes the same program of both, on one
device and where batch and time are split over several.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from jax import lax
from jaxtyping import Array

Axes = Sequence[int]


def matrix_product(
    x: Array,
    kernel: Array,
    dimension_numbers: tuple[tuple[Axes, Axes], tuple[Axes, Axes]],
    precision: Any = None,
) -> Array:
    """`lax.dot_general` for the attribute `dot_general` of flax's layers.

    The last axes of x with the first of the kernel are one product of two matrices; any other contraction is
    `lax.dot_general`'s own.

    Args:
        x: (*batch, *inputs).
        kernel: (*inputs, *features).
        dimension_numbers: as `lax.dot_general` has them.
        precision: likewise.
    """
    product = partial(lax.dot_general, precision=precision)
    (axes, kernel_axes), (batch_axes, _) = dimension_numbers
    batch, inputs = x.shape[: x.ndim - len(axes)], x.shape[x.ndim - len(axes) :]
    plain = tuple(axes) == tuple(range(len(batch), x.ndim)) and tuple(kernel_axes) == tuple(range(len(inputs)))
    if not plain or batch_axes:
        return product(x, kernel, dimension_numbers)
    rows, columns, features = math.prod(batch), math.prod(inputs), kernel.shape[len(inputs) :]
    matrices = x.reshape(rows, columns), kernel.reshape(columns, math.prod(features))
    return product(*matrices, (((1,), (0,)), ((), ()))).reshape(*batch, *features)


Dense: Callable[..., nn.Dense] = partial(nn.Dense, dot_general=matrix_product)
DenseGeneral: Callable[..., nn.DenseGeneral] = partial(nn.DenseGeneral, dot_general=matrix_product)
