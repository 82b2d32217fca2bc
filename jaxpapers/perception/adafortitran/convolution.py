"""Stacks of 3x3 convolutions of one to a few dozen channels, which is where all models here spend their time on a CPU.

Most devices take them as matrix products, `by_shifts`. On a CPU, XLA leaves its fast convolutions inside a `lax.scan`
over updates and under `vmap` over models with kernels of their own, where AdaFortiTran's CNNs then take about ten times
as long as by shifts (32 grids of 24 x 14, forward and backward, two cores). For a TPU it needs minutes and tens of GB
to compile the gradients of so narrow ones. GPUs keep `by_convolutions`. Products have (almost) all digits of float32:
by default accelerators would multiply fewer, which below -25 dB would be the error.
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

    The rows of a grid lie one behind the other, each with a zero at its left (the next one's is that at the right) and
    zeros above: a neighbour is a fixed number of places away, and a shift is one slice. Where a layer has more outputs
    than inputs the inputs are shifted and then multiplied, elsewhere the products are: the fewer channels are copied
    nine times.
    """
    batch, K, T = x.shape
    border = ((1, 0), (1, 0))
    inside = np.pad(np.ones((K, T), np.float32), border).reshape(-1)
    shifts = [(row - 1) * (T + 1) + column - 1 for row in range(3) for column in range(3)]
    margin, places = T + 2, inside.size

    def shifted(y: Array, shift: int) -> Array:
        return lax.slice_in_dim(y, margin + shift, margin + shift + places, axis=-1)

    def padded(y: Array) -> Array:
        return jnp.pad(y, (*((0, 0),) * (y.ndim - 1), (margin, margin)))

    def product(matrix: Array, y: Array) -> Array:
        # Three passes of bfloat16 on a TPU: 1e-6 off. All six take it ten times as long to compile.
        return jnp.matmul(matrix, y.reshape(len(y), -1), precision="high").reshape(-1, batch, places)

    y = jnp.pad(jnp.asarray(x), ((0, 0), *border)).reshape(1, batch, places)
    for index, layer in enumerate(layers):
        kernel, bias = map(jnp.asarray, layer)
        y = nn.relu(y) * inside if index else y
        inputs, outputs = kernel.shape[2:]
        if inputs <= outputs:
            y = padded(y)
            y = product(kernel.reshape(-1, outputs).T, jnp.concatenate([shifted(y, shift) for shift in shifts]))
        else:
            products = product(jnp.swapaxes(kernel, 2, 3).reshape(-1, inputs), y).reshape(9, outputs, batch, places)
            products = padded(products)
            y = reduce(jnp.add, [shifted(products[place], shift) for place, shift in enumerate(shifts)])
        y = y + bias[:, None, None]
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
        x = jnp.asarray(x)
        return lax.platform_dependent(x, layers, cuda=by_convolutions, rocm=by_convolutions, default=by_shifts)


class _Weights(nn.Module):
    """Kernel and bias of one layer."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array]:
        kernel = self.param("kernel", torch_default_kernel_init, (3, 3, inputs, self.features))
        return kernel, self.param("bias", torch_default_bias_init(9 * inputs), (self.features,))
