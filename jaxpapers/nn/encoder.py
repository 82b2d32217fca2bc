"""Parts of a Transformer as PyTorch has them: attention with biases, encoder and decoder blocks, and its positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpapers.nn.attention import AttentionFunction, full_attention, weights_of
from jaxpapers.nn.dropout import Dropout
from jaxpapers.nn.initializers import torch_dense

LAYER_NORM_EPSILON = 1e-5  # PyTorch's; flax has 1e-6
NORMS = ("post", "pre")
gelu = partial(nn.gelu, approximate=False)


class MultiHeadAttention(nn.Module):
    """Attention of x to itself or to a memory, with biases.

    Sows the weights as `attention_weights` into the collection `intermediates` where it is mutable and the function
    applies such weights (see `nn.attention.weights_of`).

    Attributes:
        num_heads: they divide the width.
        attention: any function of `nn.attention`.
        packed: initialise as torch.nn.MultiheadAttention (input maps Xavier-uniform as one matrix, their biases and the
            output's 0) instead of four torch.nn.Linear.
        dtype: of the computation; None: that of inputs and parameters.
    """

    num_heads: int
    attention: AttentionFunction = full_attention
    packed: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        memory: Float[Array, "batch others width"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch tokens width"]:
        """Attends.

        Args:
            x: the tokens that ask.
            memory: the tokens that are asked; None: x.
            deterministic: False: with dropout, from the stream `dropout`.

        Raises:
            ValueError: heads that do not divide the width.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide the width {width}")
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.packed:  # (3 width, width): fan_in + fan_out = 4 width
            options |= {"kernel_init": _uniform((6 / (4 * width)) ** 0.5), "bias_init": nn.initializers.zeros}
        memory = x if memory is None else memory
        q, k, v = (
            torch_dense(width, width, name=name, **options)(source).reshape(*source.shape[:2], self.num_heads, -1)
            for name, source in (("query", x), ("key", memory), ("value", memory))
        )
        weights = weights_of(self.attention)
        if weights is not None and self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention_weights", weights(q, k))
        key = None if deterministic else self.make_rng("dropout")
        out = self.attention(q, k, v, key=key).reshape(x.shape)
        options = {"bias_init": nn.initializers.zeros} if self.packed else {}
        return torch_dense(width, width, dtype=self.dtype, name="out", **options)(out)


def _uniform(bound: float) -> Callable[..., Array]:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class EncoderBlock(nn.Module):
    """Attention and an MLP, each with a residual and a LayerNorm behind the sum ("post") or before the branch ("pre").

        post: x <- LN(x + drop(attention(x)));  x <- LN(x + drop(W2 drop(act(W1 x))))
        pre:  x <- x + drop(attention(LN(x)));  x <- x + drop(W2 drop(act(W1 LN(x))))

    Attributes:
        num_heads: of the attention.
        hidden: units of the MLP.
        norm: "post" or "pre".
        activation: of the MLP; GELU with erf by default.
        attention: any function of `nn.attention`, its own dropout included.
        packed: initialisation of the attention (see `MultiHeadAttention`).
        dropout_rate: of both branches and inside the MLP.
        dtype: of the computation; None: that of inputs and parameters.
        epsilon: of the LayerNorms.
    """

    num_heads: int
    hidden: int
    norm: str = "post"
    activation: Callable[[Array], Array] = gelu
    attention: AttentionFunction = full_attention
    packed: bool = False
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    epsilon: float = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], deterministic: bool = True
    ) -> Float[Array, "batch tokens width"]:
        """Applies the block.

        Raises:
            ValueError: an unknown norm; heads that do not divide the width.
        """
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is unknown, expected one of {NORMS}")
        attend = MultiHeadAttention(self.num_heads, self.attention, self.packed, self.dtype, name="attention")
        mlp = EncoderMLP(self.hidden, self.activation, self.dropout_rate, self.dtype, name="mlp")
        branches = (
            ("attention_norm", lambda y: attend(y, deterministic=deterministic)),
            ("mlp_norm", lambda y: mlp(y, deterministic)),
        )
        for name, branch in branches:
            norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)
            drop = Dropout(self.dropout_rate, deterministic)
            x = norm(x + drop(branch(x))) if self.norm == "post" else x + drop(branch(norm(x)))
        return x


class EncoderMLP(nn.Module):
    """W2 drop(act(W1 x)) with biases.

    Attributes:
        hidden: units.
        activation: between the two layers.
        dropout_rate: of the hidden units.
        dtype: of the computation; None: that of inputs and parameters.
    """

    hidden: int
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"], deterministic: bool = True) -> Float[Array, "*batch width"]:
        """Applies both layers."""
        hidden = self.activation(torch_dense(self.hidden, x.shape[-1], dtype=self.dtype, name="up")(x))
        hidden = Dropout(self.dropout_rate, deterministic)(hidden)
        return torch_dense(x.shape[-1], self.hidden, dtype=self.dtype, name="down")(hidden)


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to a memory, MLP: x <- LayerNorm(x + drop(branch(x))) each.

    Attributes:
        num_heads: of both attentions.
        hidden: units of the MLP.
        activation: of the MLP; GELU with erf by default.
        attention: a function of `nn.attention` that takes `causal`, for both, its own dropout included.
        dropout_rate: of the branches and inside the MLP.
        dtype: of the computation; None: that of inputs and parameters.
        epsilon: of the LayerNorms.
    """

    num_heads: int
    hidden: int
    activation: Callable[[Array], Array] = gelu
    attention: AttentionFunction = full_attention
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    epsilon: float = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        memory: Float[Array, "batch others width"],
        deterministic: bool = True,
    ) -> Float[Array, "batch tokens width"]:
        """Applies the block.

        Args:
            x: the tokens so far.
            memory: the encoder's tokens.
            deterministic: False: with dropout, from the stream `dropout`.

        Raises:
            ValueError: heads that do not divide the width.
        """
        own, cross = (
            MultiHeadAttention(self.num_heads, function, dtype=self.dtype, name=f"{name}_attention")
            for name, function in (("self", partial(self.attention, causal=True)), ("cross", self.attention))
        )
        mlp = EncoderMLP(self.hidden, self.activation, self.dropout_rate, self.dtype, name="mlp")
        branches = (
            ("self_norm", lambda x: own(x, deterministic=deterministic)),
            ("cross_norm", lambda x: cross(x, memory, deterministic=deterministic)),
            ("mlp_norm", lambda x: mlp(x, deterministic)),
        )
        for name, branch in branches:
            x = x + Dropout(self.dropout_rate, deterministic)(branch(x))
            x = nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)(x)
        return x


def sinusoidal_positions(steps: int, width: int) -> Float[np.ndarray, "steps width"]:
    """Sine and cosine of position / 10000^(2 i / width) in channels 2 i and 2 i + 1 (arXiv 1706.03762, Sec. 3.5)."""
    angles = np.arange(steps)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(steps, -1)[:, :width]
