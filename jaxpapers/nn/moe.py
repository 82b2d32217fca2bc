"""Routing of tokens to experts, and experts' products without a dropped token, as plain functions.

The pairs (token, chosen expert) are sorted by expert, and one grouped matrix product serves all experts, whatever their
loads; shapes are static.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.typing import AnyArray


class Routing(NamedTuple):
    """Where the tokens go.

    Attributes:
        experts: chosen by each token, the likeliest first.
        weights: of their outputs: the router's probabilities, which do not sum to 1 over the chosen ones.
        load_balance: E sum_e f_e P_e with f_e the share of the assignments and P_e the mean probability; 1 where both
            are uniform (Switch Transformers, arXiv 2101.03961, Eq. 4).
        z_loss: mean of log(Z)^2, Z the softmax's denominator (ST-MoE, arXiv 2202.08906, Eq. 5).
        load: f_e.
    """

    experts: Int[Array, "*batch chosen"]
    weights: Float[Array, "*batch chosen"]
    load_balance: Float[Array, ""]
    z_loss: Float[Array, ""]
    load: Float[Array, "experts"]


def route(
    logits: Float[AnyArray, "*batch experts"], top_k: int, mask: Bool[AnyArray, "*batch"] | None = None
) -> Routing:
    """The top_k likeliest experts of every token.

    Args:
        logits: of the router, in float32 at least.
        top_k: experts a token.
        mask: False for tokens that do not count (padding): they are left out of losses and load.

    Raises:
        ValueError: top_k outside of 1..experts.
    """
    count = logits.shape[-1]
    if not 1 <= top_k <= count:
        raise ValueError(f"top_k must be between 1 and the {count} experts, got {top_k}")
    logits = jnp.asarray(logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = lax.top_k(probabilities, top_k)
    tokens = tuple(range(logits.ndim - 1))
    counts = jnp.ones(logits.shape[:-1], logits.dtype) if mask is None else jnp.asarray(mask, logits.dtype)
    total = jnp.maximum(jnp.sum(counts), 1)
    chosen = jnp.sum(jax.nn.one_hot(experts, count, dtype=logits.dtype), axis=-2)
    load = jnp.sum(chosen * counts[..., None], tokens) / (total * top_k)
    mean = jnp.sum(probabilities * counts[..., None], tokens) / total
    z_loss = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counts) / total
    return Routing(experts, weights, count * jnp.sum(load * mean), z_loss, load)


def apply_experts(
    x: Float[AnyArray, "tokens width"],
    experts: Int[AnyArray, "tokens chosen"],
    weights: Float[AnyArray, "tokens chosen"],
    num_experts: int,
    run: Callable[[Array, Array], Array],
    mask: Bool[AnyArray, "tokens"] | None = None,
    block: int = 1,
) -> Float[Array, "tokens width"]:
    """The weighted sum of the chosen experts' outputs, no token dropped.

    Args:
        x: tokens.
        experts: chosen by each token.
        weights: of their outputs.
        num_experts: E.
        run: (rows, width) sorted by expert, (E,) rows of each expert -> (rows, width). Some rows are padding: zeros on
            the way in; what it makes of them is masked.
        mask: False for tokens that get no expert; their output is 0.
        block: each expert's rows are padded to a multiple of it.

    Raises:
        ValueError: a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    tokens, top_k = experts.shape
    owner = jnp.asarray(experts).reshape(-1)
    if mask is not None:
        owner = jnp.where(jnp.repeat(mask, top_k), owner, num_experts)  # behind all experts
    order = jnp.argsort(owner)
    counts = jnp.bincount(owner, length=num_experts + 1)
    sizes = -(-counts[:num_experts] // block) * block
    # The place of an assignment: where its expert's rows start, and how many of them come before it.
    starts, before = (jnp.cumsum(sizes), jnp.cumsum(counts)[:-1])
    starts, before = (jnp.concatenate([jnp.zeros(1, ends.dtype), ends]) for ends in (starts, before))
    place = (starts - before)[owner[order]] + jnp.arange(len(order))
    count = -(-(len(order) + num_experts * (block - 1)) // block) * block
    source = jnp.full(count, tokens).at[place].set(jnp.where(owner[order] < num_experts, order // top_k, tokens))
    rows = jnp.asarray(x).at[source].get(mode="fill", fill_value=0)
    outputs = jnp.where((source < tokens)[:, None], run(rows, sizes), 0)
    places = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    back = outputs[places].reshape(*experts.shape, -1)
    return jnp.einsum("tkw,tk->tw", back, jnp.asarray(weights, back.dtype))


def grouped_dot(
    rows: Float[AnyArray, "rows inputs"],
    matrices: Float[AnyArray, "experts inputs outputs"],
    sizes: Int[AnyArray, "experts"],
    block: int = 1,
) -> Float[Array, "rows outputs"]:
    """Every row times the matrix of its expert; zeros behind the last expert's rows.

    Args:
        rows: sorted by expert.
        matrices: one an expert.
        sizes: rows of each expert, multiples of `block`; what comes behind them is padding.
        block: 1: one ragged product, which TPUs and GPUs have an instruction for, and which elsewhere costs as much as
            all experts on all rows. Above: one product of each block of rows with a copy of its expert's matrix.

    Raises:
        ValueError: rows that are no whole number of blocks.
    """
    if block < 1 or len(rows) % block:
        raise ValueError(f"{len(rows)} rows are no whole number of blocks of {block}")
    if block == 1:
        products = lax.ragged_dot(jnp.asarray(rows), jnp.asarray(matrices), jnp.asarray(sizes, jnp.int32))
        return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(sizes), products, 0)  # there it may hold anything
    blocks = jnp.asarray(rows).reshape(-1, block, rows.shape[-1])
    owner = jnp.searchsorted(jnp.cumsum(sizes), block * jnp.arange(len(blocks)), side="right")
    # A product with one-hot rows, not indexing: the transpose of that is a scatter, slow on a CPU.
    chosen = jax.nn.one_hot(owner, len(matrices), dtype=matrices.dtype)
    copies = jnp.einsum("be,eio->bio", chosen, matrices)
    return jnp.einsum("bri,bio->bro", blocks, copies).reshape(len(rows), -1)
