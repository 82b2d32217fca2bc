"""Attention as plain functions of queries, keys and values (batch, tokens, heads, head_dim).

All share one signature, `attention(q, k, v, *, key=None, ...)`, so that a layer can be built with any of them, further
arguments bound by `functools.partial`. The key drives what is random (dropout, drawn keys, rotations); without it
nothing is dropped, and what has to be drawn is drawn from a fixed key. With `causal=True` full, flash and ProbSparse
attention are those of a decoder to its own tokens. The exception is LSH attention, whose queries are its keys as well:
`lsh_attention(qk, v, ...)` has a layer of its own, `LSHSelfAttention`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpapers.nn.dropout import keep_mask
from jaxpapers.nn.initializers import torch_dense
from jaxpapers.typing import AnyArray

AttentionFunction = Callable[..., Array]

FLOW_EPSILON = 1e-6
SELF_LOGIT = -5e4  # of a token to itself in LSH attention: only a token that sees no other attends to itself


def attention_weights(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    mask: Bool[AnyArray, "*batch_heads queries keys"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch heads queries keys"]:
    """softmax(q k^T / sqrt(head_dim)) over the keys, in float32 at least.

    Args:
        q: queries.
        k: keys.
        mask: False where a query must not see a key, the same for all or (batch, heads, queries, keys).
        causal: queries see their past and themselves alone.

    Raises:
        ValueError: causal attention to others' tokens.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    if (mask := _with_past(mask, causal, q, k)) is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def full_attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
    mask: Bool[AnyArray, "*batch_heads queries keys"] | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
) -> Float[Array, "batch queries heads value_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v (Vaswani et al., arXiv 1706.03762, Eq. 1).

    Args:
        q: queries.
        k: keys.
        v: values.
        key: of the dropout; None: nothing is dropped.
        mask: False where a query must not see a key, the same for all or (batch, heads, queries, keys); a query needs
            one key at least.
        causal: queries see their past and themselves alone.
        dropout_rate: share of the weights that are set to zero, the others grow accordingly.

    Raises:
        ValueError: causal attention to others' tokens.
    """
    mask = _with_past(mask, causal, q, k)
    batch, _, heads, head_dim = q.shape
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # Heads beside the batch make plain products of both contractions, and the softmax's sum divides the result, not the
    # weights, which are many more numbers.
    q, k, v = (jnp.moveaxis(jnp.asarray(x), 2, 1).reshape(batch * heads, -1, x.shape[-1]) for x in (q, k, v))
    logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=exact) * head_dim**-0.5
    if mask is not None:
        logits = jnp.where(jnp.asarray(mask).reshape(-1, *mask.shape[-2:]), logits, -jnp.inf)
    # Whatever is subtracted cancels: no derivative goes through it.
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if key is not None and dropout_rate:
        weights = jnp.where(keep_mask(key, dropout_rate, weights.shape), weights, 0)
        total = total * (1 - dropout_rate)
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(v.dtype), v, preferred_element_type=exact) / total
    return jnp.moveaxis(out.reshape(batch, heads, *out.shape[1:]), 1, 2).astype(v.dtype)


def _with_past(mask: AnyArray | None, causal: bool, q: AnyArray, k: AnyArray) -> AnyArray | None:
    """The mask, without the tokens to come where attention is causal."""
    if not causal:
        return mask
    _check_causal(q.shape[1], k.shape[1])
    past = np.tri(q.shape[1], dtype=bool)
    return past if mask is None else past & mask


def _check_causal(queries: int, keys: int) -> None:
    if queries != keys:
        raise ValueError(f"causal attention is that of tokens to themselves, got {queries} queries and {keys} keys")


def causal_attention(
    q: Float[AnyArray, "batch time heads head_dim"],
    k: Float[AnyArray, "batch time heads head_dim"],
    v: Float[AnyArray, "batch time heads head_dim"],
    *,
    key: PRNGKeyArray | None = None,
    chunk: int | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Full attention to the past and the present, some queries at a time, in float32 at least.

    `full_attention(..., causal=True)` without mask and dropout, whose memory chunks bound. `flash_attention` goes by
    chunks of keys instead, all queries at once.

    Args:
        q: queries.
        k: keys.
        v: values.
        key: nothing is random here.
        chunk: queries whose weights are held at once, and computed again in the backward pass: memory grows with
            chunk * time, not with time^2. It need not divide the time. None: all queries at once.

    Raises:
        ValueError: a chunk below 1.
    """
    q, k, v = (jnp.asarray(each) for each in (q, k, v))
    if chunk is None:
        return full_attention(q, k, v, causal=True)
    if chunk < 1:
        raise ValueError(f"attention's chunk must be at least 1, got {chunk}")
    batch, time, *shape = q.shape
    chunk = min(chunk, time)
    filled = jnp.pad(q, ((0, 0), (0, -time % chunk), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(filled.reshape(batch, -1, chunk, *shape), 1, 0)

    def attend(part: tuple[Array, Array]) -> Array:
        start, q = part
        past = jnp.arange(time) <= start + jnp.arange(chunk)[:, None]
        return full_attention(q, k, v, mask=past)

    # The loop keeps XLA from merging the second computation with the first.
    out = lax.map(jax.checkpoint(attend, prevent_cse=False), (chunk * jnp.arange(len(chunks)), chunks))
    return jnp.moveaxis(out, 0, 1).reshape(filled.shape)[:, :time]


def flash_attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
    causal: bool = False,
    block_size: int = 32,
) -> Float[Array, "batch queries heads value_dim"]:
    """The function of `full_attention`, one block of keys after another (Dao et al., arXiv 2205.14135, Alg. 1).

    A running maximum and sum of the softmax take the place of the matrix of weights: memory is linear in the keys, in
    the backward pass as well, which computes the weights of each block again.

    Args:
        q: queries.
        k: keys.
        v: values.
        key: nothing is random here.
        causal: queries see their past and themselves alone; what lies ahead of them is computed all the same.
        block_size: keys of a block; it need not divide their number.

    Raises:
        ValueError: block_size below 1; causal attention to others' tokens.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if causal:
        _check_causal(q.shape[1], k.shape[1])
    return _flash(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal, min(block_size, k.shape[1]))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flash(q: Array, k: Array, v: Array, causal: bool, block_size: int) -> Array:
    return _flash_forward(q, k, v, causal, block_size)[0]


def _flash_forward(q: Array, k: Array, v: Array, causal: bool, block_size: int) -> tuple[Array, tuple[Array, ...]]:
    def step(carry: tuple[Array, Array, Array], block: tuple[Array, Array, Array]) -> tuple[Any, None]:
        top, total, out = carry
        k, v, places = block
        logits = _block_logits(q, k, places, last)
        # Every query sees the first key, so that the maximum is a number from the first block on.
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
        added = jnp.einsum("bhqk,bkhd->bhqd", weights.astype(v.dtype), v, preferred_element_type=exact)
        return (higher, shrink * total + jnp.sum(weights, axis=-1), shrink[..., None] * out + added), None

    exact = jnp.promote_types(q.dtype, jnp.float32)
    batch, queries, heads, _ = q.shape
    last = _last_seen(queries, k.shape[1], causal)
    start = (
        jnp.full((batch, heads, queries), -jnp.inf, exact),
        jnp.zeros((batch, heads, queries), exact),
        jnp.zeros((batch, heads, queries, v.shape[-1]), exact),
    )
    (top, total, out), _ = lax.scan(step, start, _blocks(k, v, block_size))
    out = jnp.moveaxis(out / total[..., None], 1, 2).astype(v.dtype)
    return out, (q, k, v, out, top + jnp.log(total))


def _flash_backward(
    causal: bool, block_size: int, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    q, k, v, out, log_total = residuals
    exact = log_total.dtype
    last = _last_seen(q.shape[1], k.shape[1], causal)
    product = partial(jnp.einsum, preferred_element_type=exact)
    # sum_k weight_k d(weight_k), which the softmax subtracts, without the weights
    mean = product("bqhd,bqhd->bhq", out, cotangent)

    def step(dq: Array, block: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, v, places = block
        weights = jnp.exp(_block_logits(q, k, places, last) - log_total[..., None])
        dv = product("bhqk,bqhd->bkhd", weights.astype(v.dtype), cotangent)
        slopes = weights * (product("bqhd,bkhd->bhqk", cotangent, v) - mean[..., None]) * q.shape[-1] ** -0.5
        slopes = slopes.astype(q.dtype)
        return dq + product("bhqk,bkhd->bqhd", slopes, k), (product("bhqk,bqhd->bkhd", slopes, q), dv)

    dq, blocks = lax.scan(step, jnp.zeros(q.shape, exact), _blocks(k, v, block_size))
    dk, dv = (
        jnp.moveaxis(each, 0, 1).reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)
        for each, like in zip(blocks, (k, v), strict=True)
    )
    return dq.astype(q.dtype), dk, dv


_flash.defvjp(_flash_forward, _flash_backward)


def _blocks(k: Array, v: Array, block_size: int) -> tuple[Array, Array, Array]:
    """Keys and values with a leading axis of blocks, the last filled up with zeros, and the places of the keys."""
    keys = k.shape[1]
    missing = -keys % block_size
    places = jnp.arange(keys + missing).reshape(-1, block_size)
    filled = (jnp.pad(each, ((0, 0), (0, missing), (0, 0), (0, 0))) for each in (k, v))
    k, v = (jnp.moveaxis(each.reshape(each.shape[0], -1, block_size, *each.shape[2:]), 1, 0) for each in filled)
    return k, v, places


def _last_seen(queries: int, keys: int, causal: bool) -> Array:
    """Place of the last key that each query sees, or that all of them see."""
    return jnp.arange(queries)[:, None] if causal else jnp.asarray(keys - 1)


def _block_logits(q: Array, k: Array, places: Array, last: Array) -> Array:
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    return jnp.where(places <= last, logits, -jnp.inf)


def weights_of(attention: AttentionFunction) -> Callable[..., Float[Array, "batch heads queries keys"]] | None:
    """What tells the weights that an attention function applies: `weights(q, k)`, before any dropout.

    Args:
        attention: a function of this module, or a `functools.partial` of it, whose mask then counts.

    Returns:
        `attention_weights` with that mask, for full, flash and causal attention; None for the others, which apply no
        such weights.
    """
    function, bound = getattr(attention, "func", attention), getattr(attention, "keywords", {})
    if function is causal_attention:
        return partial(attention_weights, causal=True)
    if function not in (full_attention, flash_attention):
        return None
    return partial(attention_weights, **{name: bound[name] for name in ("mask", "causal") if name in bound})


def flow_attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch queries heads value_dim"]:
    """Attention as a flow from keys to queries, linear in both (Flowformer, arXiv 2202.06258, Sec. 3).

    With sigmoids of queries and keys as capacities, keys compete for a flow out of them that is held constant (a
    softmax over the keys), and queries take in a share of theirs (a sigmoid).

    Args:
        q: queries.
        k: keys.
        v: values.
        key: nothing is random here.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    q, k = (jax.nn.sigmoid(jnp.asarray(each, exact)) for each in (q, k))

    def flow(ends: Array, others: Array) -> Array:
        total = jnp.sum(others, axis=1) + FLOW_EPSILON
        return jnp.einsum("blhd,bhd->blh", ends + FLOW_EPSILON, total)[..., None]

    incoming, outgoing = flow(q, k), flow(k, q)
    conserved_incoming, conserved_outgoing = flow(q, k / outgoing), flow(k, q / incoming)
    share = jax.nn.sigmoid(conserved_incoming * (q.shape[1] / k.shape[1]))
    won = jax.nn.softmax(conserved_outgoing, axis=1) * k.shape[1]
    gathered = jnp.einsum("bkhd,bkhv->bhdv", k, won * v)
    return (jnp.einsum("bqhd,bhdv->bqhv", q, gathered) / incoming * share).astype(v.dtype)


def probsparse_attention(
    q: Float[AnyArray, "batch queries heads head_dim"],
    k: Float[AnyArray, "batch keys heads head_dim"],
    v: Float[AnyArray, "batch keys heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
    factor: int = 1,
    sampled: Int[AnyArray, "asking samples"] | None = None,
    causal: bool = False,
    reference_layout: bool = False,
) -> Float[Array, "batch queries heads value_dim"]:
    """Full attention for the queries that have most to tell, the mean of the values for the others (ProbSparse).

    Informer, arXiv 2012.07436, Eq. 4: each query meets a few drawn keys, the same for the whole batch and all heads;
    the measure max(q k) - sum(q k) / keys of their products picks factor * ceil(ln(queries)) queries.

    Args:
        q: queries.
        k: keys.
        v: values.
        key: of the drawn keys.
        factor: factor * ceil(ln(tokens)) keys are drawn for a query, and queries picked, but no more than there are.
        sampled: indices of the keys that each query meets, instead of drawn ones.
        causal: of a decoder to its own tokens: queries see their past, and those that are not picked get the sum of the
            values so far. The keys that a query meets are drawn from all, in the authors' code as well, so that what is
            picked, though nothing else, depends on tokens to come.
        reference_layout: as the authors' code for iTransformer, read the result's memory (batch, heads, queries,
            head_dim) as (batch, queries, heads, head_dim), which mixes heads and positions.

    Raises:
        ValueError: factor below 1; `sampled` for another number of queries; causal attention to others' tokens.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    q, k, v = (jnp.asarray(each) for each in (q, k, v))
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if causal:
        _check_causal(queries, keys)
    if sampled is None:
        key = jax.random.key(0) if key is None else key
        sampled = jax.random.randint(key, (queries, _some(factor, keys)), 0, keys)
    elif sampled.shape[0] != queries:
        raise ValueError(f"sampled needs a row for each of the {queries} queries, got {sampled.shape[0]}")
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # Which queries are picked has no derivative.
    still_q, still_k = (lax.stop_gradient(each).astype(exact) for each in (q, k))

    def meet(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        top, total = carry
        products = jnp.einsum("bqhd,bqhd->bhq", still_q, still_k[:, index])
        return (jnp.maximum(top, products), total + products), None

    start = jnp.full((batch, heads, queries), -jnp.inf, exact), jnp.zeros((batch, heads, queries), exact)
    (top, total), _ = lax.scan(meet, start, jnp.asarray(sampled).T)
    _, picked = lax.top_k(top - total / keys, _some(factor, queries))
    past = jnp.arange(keys) <= picked[..., None] if causal else None
    picked = jnp.moveaxis(picked, 1, 2)
    attended = full_attention(jnp.take_along_axis(q, picked[..., None], axis=1), k, v, mask=past)
    if causal:
        out = jnp.cumsum(v, axis=1)
    else:
        out = jnp.broadcast_to(jnp.mean(v, axis=1, keepdims=True), (batch, queries, *v.shape[2:]))
    place = jnp.arange(batch)[:, None, None], picked, jnp.arange(heads)
    out = out.at[place].set(attended.astype(out.dtype), unique_indices=True)
    return jnp.moveaxis(out, 1, 2).reshape(out.shape) if reference_layout else out


def _some(factor: int, tokens: int) -> int:
    return min(factor * max(math.ceil(math.log(tokens)), 1), tokens)


def lsh_attention(
    qk: Float[AnyArray, "batch tokens heads head_dim"],
    v: Float[AnyArray, "batch tokens heads value_dim"],
    *,
    key: PRNGKeyArray | None = None,
    rotations: Float[AnyArray, "rotated rounds half_buckets"] | None = None,
    bucket_size: int = 4,
    num_rounds: int = 4,
) -> Float[Array, "batch tokens heads value_dim"]:
    """Attention among tokens that a random rotation puts into the same bucket (Reformer, arXiv 2001.04451, Sec. 2).

    Queries are the keys, keys at unit length. In each round a token's hash is the argmax of [x R, -x R]; sorted by it,
    the tokens are cut into chunks, and each chunk attends to itself and to the one before. The rounds are averaged with
    the softmax of their log normalisers. As in `reformer_pytorch`, chunks need not end with their bucket, the chunk
    before a round's first one is the last of the round before, and a pair that meets in two rounds counts twice.

    Args:
        qk: queries, and the directions of the keys.
        v: values.
        key: of the rotations.
        rotations: R, one of every round, instead of drawn ones: (head_dim, num_rounds, tokens / bucket_size / 2).
        bucket_size: tokens of a chunk. So few tokens or less attend to all, without hashing.
        num_rounds: of hashing.

    Raises:
        ValueError: bucket_size or num_rounds below 1; more than bucket_size tokens that 2 bucket_size does not divide;
            rotations of another shape.
    """
    tokens, head_dim = qk.shape[1], qk.shape[-1]
    if bucket_size < 1 or num_rounds < 1:
        raise ValueError(f"bucket_size and num_rounds must be at least 1, got {bucket_size} and {num_rounds}")
    if tokens > bucket_size and tokens % (2 * bucket_size):
        raise ValueError(f"{tokens} tokens are not a multiple of 2 bucket_size = {2 * bucket_size}")
    qk, v = (jnp.moveaxis(jnp.asarray(each), 1, 2) for each in (qk, v))
    if tokens <= bucket_size:
        place = jnp.arange(tokens)
        out, _ = _attend_to_others(qk, qk, v, place, place)
        return jnp.moveaxis(out, 1, 2)
    shape = (head_dim, num_rounds, tokens // bucket_size // 2)
    if rotations is None:
        rotations = jax.random.normal(jax.random.key(0) if key is None else key, shape, qk.dtype)
    elif rotations.shape != shape:
        raise ValueError(f"rotations must have the shape {shape}, got {rotations.shape}")
    turned = jnp.einsum("bhte,erm->bhrtm", lax.stop_gradient(qk), rotations)
    hashes = jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1)
    order = jnp.argsort(hashes, axis=-1)  # stable: inside a bucket by position
    places = order.reshape(*order.shape[:2], -1)
    gather = partial(jnp.take_along_axis, indices=places[..., None], axis=2)

    def chunks(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, bucket_size, *x.shape[3:])

    def with_previous(x: Array) -> Array:
        return jnp.concatenate([x, jnp.roll(x, 1, axis=2)], axis=3)

    qk, v, places = chunks(gather(qk)), chunks(gather(v)), chunks(places)
    out, log_total = _attend_to_others(qk, with_previous(qk), with_previous(v), places, with_previous(places))
    back = jnp.argsort(order, axis=-1)
    out = jnp.take_along_axis(out.reshape(*order.shape, -1), back[..., None], axis=3)
    log_total = jnp.take_along_axis(log_total.reshape(order.shape), back, axis=3)
    share = jax.nn.softmax(log_total, axis=2)[..., None].astype(out.dtype)
    return jnp.moveaxis(jnp.sum(share * out, axis=2), 1, 2)


def _attend_to_others(q: Array, k: Array, v: Array, query_places: Array, key_places: Array) -> tuple[Array, Array]:
    """Attention of (..., queries, head_dim) to directions of k, to itself only if need be; and log normalisers."""
    exact = jnp.promote_types(q.dtype, jnp.float32)
    # The floor stands inside the root: a token of zeros would have the gradient 0 * inf.
    length = jnp.sum(jnp.square(k.astype(exact)), axis=-1, keepdims=True)
    k = (k * lax.rsqrt(jnp.maximum(length, 1e-24))).astype(q.dtype)
    logits = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=exact) * q.shape[-1] ** -0.5
    logits = jnp.where(query_places[..., :, None] == key_places[..., None, :], SELF_LOGIT, logits)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - log_total[..., None]).astype(v.dtype)
    return jnp.einsum("...qk,...kd->...qd", weights, v), log_total


class LSHSelfAttention(nn.Module):
    """Multi-head self-attention by `lsh_attention`: one map to queries and keys, one to values, a third out of them.

    As in the authors' code for iTransformer, tokens of zeros that are not masked fill up to a multiple of
    2 bucket_size.

    Attributes:
        num_heads: they divide the width.
        bucket_size: tokens of a chunk.
        num_rounds: of hashing.
        dtype: of the computation; None: that of inputs and parameters.
    """

    num_heads: int
    bucket_size: int = 4
    num_rounds: int = 4
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        deterministic: bool = True,
        rotations: Float[AnyArray, "rotated rounds half_buckets"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Attends.

        Args:
            x: tokens.
            deterministic: True: the same rotations in every call; False: drawn from the stream `dropout`.
            rotations: these instead (see `lsh_attention`).

        Raises:
            ValueError: heads that do not divide the width, or as `lsh_attention`.
        """
        batch, tokens, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide the width {width}")
        x = jnp.pad(x, ((0, 0), (0, -tokens % (2 * self.bucket_size)), (0, 0)))
        dense = partial(torch_dense, width, width, dtype=self.dtype)
        qk, v = (
            dense(use_bias=False, name=name)(x).reshape(batch, -1, self.num_heads, width // self.num_heads)
            for name in ("query_key", "value")
        )
        key = None if deterministic else self.make_rng("dropout")
        attend = partial(lsh_attention, bucket_size=self.bucket_size, num_rounds=self.num_rounds)
        out = attend(qk, v, key=key, rotations=rotations)
        return dense(name="out")(out[:, :tokens].reshape(batch, tokens, width))
