"""Softmax attention by the quickest route on a CPU, where half of an update goes into it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

AnyArray = Array | np.ndarray


def attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "batch queries heads value_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, the function of `nn.attention.full_attention`.

    Heads are moved to the batch, which makes plain products of all contractions, and the sum of the softmax divides the
    result instead of the weights, which are many more numbers. Dropout acts on the weights that the sum has divided, so
    that it commutes.

    Args:
        q: queries.
        k: keys.
        v: values.
        key: of the dropout; None: nothing is dropped.
        dropout_rate: share of the weights that are set to zero, the others grow accordingly.
    """
    batch, _, heads, head_dim = q.shape
    exact = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (jnp.moveaxis(jnp.asarray(x), 2, 1).reshape(batch * heads, -1, x.shape[-1]) for x in (q, k, v))
    logits = jnp.einsum("nqd,nkd->nqk", q * head_dim**-0.5, k, preferred_element_type=exact)
    # Whatever is subtracted cancels: no derivative goes through it.
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if key is not None and dropout_rate:
        weights = jnp.where(jax.random.bernoulli(key, 1 - dropout_rate, weights.shape), weights, 0)
        total = total * (1 - dropout_rate)
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(v.dtype), v, preferred_element_type=exact) / total
    return jnp.moveaxis(out.reshape(batch, heads, *out.shape[1:]), 1, 2).astype(v.dtype)
