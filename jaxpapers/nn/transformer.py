"""Parts of a decoder-only Transformer: rotary positions, causal attention in chunks or with a cache, SwiGLU."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpapers.nn.attention import causal_attention, full_attention
from jaxpapers.nn.dense import Dense, DenseGeneral
from jaxpapers.typing import AnyArray, Initializer

NORM_EPSILON = 1e-5


def rotary(
    x: Float[AnyArray, "*batch time heads head_dim"], positions: Int[AnyArray, "time"], base: float = 10_000.0
) -> Float[Array, "*batch time heads head_dim"]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, Eq. 34), channel i paired with i + head_dim / 2.

    The pair (x_i, x_{i + head_dim / 2}) is turned by the angle position * base^(-2 i / head_dim), so that products
    of queries and keys depend on the difference of their positions alone.

    Raises:
        ValueError: an odd head_dim.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")
    # Angles in float32: bfloat16 cannot tell position 256 from 257.
    frequencies = base ** (-jnp.arange(head_dim // 2, dtype=jnp.float32) / (head_dim // 2))
    angles = (positions.astype(jnp.float32)[:, None] * frequencies)[:, None, :]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(jnp.asarray(x), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention to the past and the present, without biases.

    With a cache, a call continues where the last one ended: keys and values stay in the variable collection `cache`,
    whose zeros are an empty past. A call beyond the cache's length gives NaN.

    Attributes:
        num_heads: they divide the width.
        rotary: turn queries and keys by their positions; without, the layer sees no positions but the order.
        dtype: of the computation; None: that of inputs and parameters. Softmax is in float32 at least.
        cache_length: keep keys and values of this many tokens; None: no cache.
        qk_norm: RMSNorm over the whole width of queries and of keys, before they are turned (OLMoE, arXiv 2409.02060).
        chunk: queries at once (see `causal_attention`); not with a cache.
        kernel_init: of query, key and value.
        out_init: of the output projection.
    """

    num_heads: int
    rotary: bool = True
    dtype: DTypeLike | None = None
    cache_length: int | None = None
    qk_norm: bool = False
    chunk: int | None = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    out_init: Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Attends.

        Raises:
            ValueError: heads that do not divide the width; an odd head_dim with rotary positions; more tokens than
                the cache can take; a chunk with a cache; as `causal_attention`.
        """
        _, steps, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide the width {width}")
        if self.cache_length is not None and self.chunk is not None:
            raise ValueError(f"chunk={self.chunk} has no meaning with a cache, which sees a few queries at a time")
        shape = (self.num_heads, width // self.num_heads)

        def project(name: str) -> Array:
            dense = DenseGeneral(shape, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name=name)
            return dense(x)

        q, k, v = (project(name) for name in ("query", "key", "value"))
        if self.qk_norm:
            axes = (-2, -1)
            q, k = (
                nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, reduction_axes=axes, feature_axes=axes, name=name)(each)
                for name, each in (("query_norm", q), ("key_norm", k))
            )
        if self.cache_length is None:
            if self.rotary:
                q, k = (rotary(each, jnp.arange(steps)) for each in (q, k))
            out = causal_attention(q, k, v, chunk=self.chunk)
        else:
            out = self._continued(q, k, v, self.cache_length)
        return DenseGeneral(
            width, axis=(-2, -1), use_bias=False, kernel_init=self.out_init, dtype=self.dtype, name="out"
        )(out)

    def _continued(self, q: Array, k: Array, v: Array, length: int) -> Array:
        batch, steps, *shape = q.shape
        if steps > length:
            raise ValueError(f"{steps} tokens are more than the cache of length {length} can take")
        keys = self.variable("cache", "keys", jnp.zeros, (batch, length, *shape), k.dtype)
        values = self.variable("cache", "values", jnp.zeros, (batch, length, *shape), v.dtype)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        positions = index.value + jnp.arange(steps)
        if self.rotary:
            q, k = (rotary(each, positions) for each in (q, k))
        keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, index.value, axis=1)
        values.value = lax.dynamic_update_slice_in_dim(values.value, v, index.value, axis=1)
        index.value = index.value + steps
        past = jnp.arange(length) <= positions[:, None]
        out = full_attention(q, keys.value, values.value, mask=past)
        # The update above moves what does not fit to the end of the cache, over other tokens.
        return jnp.where(index.value <= length, out, jnp.nan)


def swiglu_width(width: int, multiple: int = 256) -> int:
    """Hidden units of a SwiGLU with about the parameters of a plain MLP of 4 * width: 8 / 3 * width, rounded up."""
    return -(-8 * width // (3 * multiple)) * multiple


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (GLU Variants, arXiv 2002.05202, Eq. 6).

    Attributes:
        hidden: hidden units; None: `swiglu_width` of the input.
        dtype: of the computation; None: that of inputs and parameters.
    """

    hidden: int | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applies the layer."""
        hidden = swiglu_width(x.shape[-1]) if self.hidden is None else self.hidden
        gate, up = (Dense(hidden, use_bias=False, dtype=self.dtype, name=name)(x) for name in ("gate", "up"))
        return Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="down")(nn.silu(gate) * up)
