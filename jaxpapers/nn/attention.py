"""Attention as plain functions of queries, keys and values (batch, tokens, heads, head_dim).

All share one signature, `attention(q, k, v, *, key=None, ...)`, so that a layer can be built with any of them. The key
drives what is random (dropout, drawn keys, rotations); without it nothing is dropped, and what has to be drawn is drawn
from a fixed key.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

AnyArray = Array | np.ndarray
AttentionFunction = Callable[..., Array]


def attention_weights(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    mask: Bool[AnyArray, "queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """softmax(q k^T / sqrt(head_dim)) over the keys, in float32 at least.

    Args:
        q: queries.
        k: keys.
        mask: False where a query must not see a key.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def full_attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads head_dim"],
    *,
    key: PRNGKeyArray | None = None,
    mask: Bool[AnyArray, "queries keys"] | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v (Vaswani et al., arXiv 1706.03762, Eq. 1).

    Args:
        q: queries.
        k: keys.
        v: values.
        key: of the dropout; None: nothing is dropped.
        mask: False where a query must not see a key; a query needs one key at least.
        dropout_rate: share of the weights that are set to zero, the others grow accordingly.
    """
    weights = attention_weights(q, k, mask).astype(v.dtype)
    if key is not None and dropout_rate:
        kept = jax.random.bernoulli(key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
