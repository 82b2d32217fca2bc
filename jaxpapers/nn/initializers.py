"""Initialisers of the frameworks that the papers' authors used.

Initialisation is part of a method. PyTorch's Linear and Conv layers draw kernel and bias from
U(-1/sqrt(fan_in), 1/sqrt(fan_in)), variance 1 / (3 fan_in); flax draws kernels from a truncated normal of
variance 1 / fan_in and sets biases to zero. To build a PyTorch layer in flax, give both, as `torch_dense` does:

    nn.Conv(
        features,
        window,
        kernel_init=torch_default_kernel_init,
        bias_init=torch_default_bias_init(fan_in=math.prod(window) * x.shape[-1]),
    )
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpapers.nn.dense import Dense


def torch_default_kernel_init(
    key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Kernel of torch.nn.Linear and torch.nn.Conv1d/2d/3d: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    PyTorch writes it as kaiming_uniform(a = sqrt(5)). fan_in is the product of all axes but the last, as flax
    lays kernels out: (in, out) for Dense, (*window, in / groups, out) for Conv. It is not for kernels with
    several output axes (DenseGeneral, flax's attention), nor where PyTorch has another rule: ConvTranspose
    (fan_in = window size times out / groups), MultiheadAttention (Xavier-uniform input projections),
    Embedding (N(0, 1)), recurrent cells (1 / sqrt(hidden)).

    Args:
        key: randomness.
        shape: shape of the kernel, at least two axes, none empty.
        dtype: floating dtype of the kernel.

    Raises:
        ValueError: fewer than two axes, or no inputs.
    """
    fan_in = math.prod(shape[:-1])
    if len(shape) < 2 or fan_in < 1:
        raise ValueError(f"a kernel needs axes (*window, in, out) with at least one input, got shape {shape}")
    return _uniform(key, shape, dtype, fan_in)


def torch_default_bias_init(fan_in: int) -> Callable[..., Array]:
    """Initialiser of the bias of torch.nn.Linear and Conv1d/2d/3d: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
        fan_in: inputs of the layer that the bias belongs to (window size times in / groups for Conv): a bias
            does not know them, so the layer has to say.

    Raises:
        ValueError: fan_in below 1.
    """
    if fan_in < 1:
        raise ValueError(f"fan_in must be at least 1, got {fan_in}")

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        return _uniform(key, shape, dtype, fan_in)

    return init


def torch_dense(features: int, inputs: int, **options: Any) -> nn.Dense:
    """A flax Dense that starts as torch.nn.Linear(inputs, features) does.

    Args:
        features: outputs.
        inputs: length of the last axis of what it will be applied to.
        options: further attributes of `nn.Dense`; they win.
    """
    initialisers = {"kernel_init": torch_default_kernel_init, "bias_init": torch_default_bias_init(inputs)}
    return Dense(features, **(initialisers | options))


def _uniform(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike, fan_in: int) -> Float[Array, "..."]:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
