"""Stacks of 3x3 convolutions of one to a few dozen channels, which is where all models here spend their time on a CPU.

The CPU has a route of its own, `by_shifts`: inside a `lax.scan` over updates, and under `vmap` over models with kernels
of their own, XLA leaves its fast convolutions there, and AdaFortiTran's CNNs take about ten times as long as by shifts
(32 grids of 24 x 14, forward and backward, two cores). Accelerators keep `by_convolutions`, with
products of whole float32 numbers: by default they would multiply fewer digits, which below -25 dB would be the error.
"""

from collections.abc import Sequence
from functools import reduce

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxpapers.nn.initializers import torch_default_bias_init, torch_default_kernel_init
from jaxpapers.typing import AnyArray

Layer = tuple[Float[AnyArray, "3 3 _ _"], Float[AnyArray, "_"]]  # kernel (3, 3, inputs, outputs) and bias (outputs,)


def by_convolutions(x: Float[AnyArray, "batch K T"], layers: Sequence[Layer]) -> Float[Array, "batch K T outputs"]:
    """Convolutions of grids with a border of zeros, ReLU between them; the first layer has one input."""
    y = jnp.asarray(x)[..., None]
    for index, layer in enumerate(layers):
        kernel, bias = map(jnp.asarray, layer)
        y = nn.relu(y) if index else y
        axes = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=axes, precision="highest") + bias
    return y


def by_shifts(x: Float[AnyArray, "batch K T"], layers: Sequence[Layer]) -> Float[Array, "batch K T outputs"]:
    """The same by matrix products, channels first.

    All grids lie one behind the other in one row, each with zeros above and at its left (the next ones' are those below
    and at the right): a neighbour is a fixed number of places away, and a shift is one contiguous copy. Where a layer
    has more outputs than inputs the inputs are shifted and then multiplied, elsewhere the products are: the fewer
    channels are copied nine times.
    """
    batch, K, T = x.shape
    border = ((0, 0), (1, 0), (1, 0))
    inside = np.pad(np.ones((batch, K, T), np.float32), border).reshape(-1)
    shifts = [(row - 1) * (T + 1) + column - 1 for row in range(3) for column in range(3)]
    margin, places = T + 2, inside.size

    def shifted(y: Array, shift: int) -> Array:
        return lax.slice_in_dim(y, margin + shift, margin + shift + places, axis=-1)

    y = jnp.pad(jnp.asarray(x), border).reshape(1, -1)
    for index, layer in enumerate(layers):
        kernel, bias = map(jnp.asarray, layer)
        y = nn.relu(y) * inside if index else y
        inputs, outputs = kernel.shape[2:]
        if inputs <= outputs:
            padded = jnp.pad(y, ((0, 0), (margin, margin)))
            y = kernel.reshape(-1, outputs).T @ jnp.concatenate([shifted(padded, shift) for shift in shifts])
        else:
            products = (jnp.swapaxes(kernel, 2, 3).reshape(-1, inputs) @ y).reshape(9, outputs, places)
            padded = jnp.pad(products, ((0, 0), (0, 0), (margin, margin)))
            y = reduce(jnp.add, [shifted(padded[place], shift) for place, shift in enumerate(shifts)])
        y = y + bias[:, None]
    return jnp.moveaxis(y.reshape(-1, batch, K + 1, T + 1)[..., 1:, 1:], 0, -1)


class Convolutions(nn.Module):
    """3x3 convolutions of a grid of numbers, ReLU between them, with PyTorch's initialisation.

    Attributes:
        features: outputs of each.
    """

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[AnyArray, "batch K T"]) -> Float[Array, "batch K T outputs"]:
        """Convolves; nothing follows the last one."""
        sizes = zip((1, *self.features[:-1]), self.features, strict=True)
        layers = [_Weights(outputs, name=f"conv{index}")(inputs) for index, (inputs, outputs) in enumerate(sizes)]
        return lax.platform_dependent(jnp.asarray(x), layers, cpu=by_shifts, default=by_convolutions)


class _Weights(nn.Module):
    """Kernel and bias of one layer."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array]:
        kernel = self.param("kernel", torch_default_kernel_init, (3, 3, inputs, self.features))
        return kernel, self.param("bias", torch_default_bias_init(9 * inputs), (self.features,))
