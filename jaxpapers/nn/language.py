"""What language models share: the loss of the next token."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpapers.typing import AnyArray


class LossTerms(NamedTuple):
    """The parts of `language_loss`, means over the tokens that count.

    Attributes:
        cross_entropy: -log p(target), in nats.
        z_loss: log(Z)^2, without its coefficient.
        accuracy: of the likeliest token.
    """

    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    accuracy: Float[Array, ""]


def language_loss(
    logits: Float[AnyArray, "*batch vocab"],
    targets: Int[AnyArray, "*batch"],
    weights: Float[AnyArray, "*batch"] | None = None,
    z_loss: float | int = 0.0,
) -> tuple[Float[Array, ""], LossTerms]:
    """Cross-entropy + z_loss * mean of log(Z)^2, with Z the softmax's denominator.

    Args:
        logits: of every position.
        targets: the tokens that follow.
        weights: of the positions, such as 0 for masked ones; None: all count the same. All zero: the loss is 0.
        z_loss: coefficient.

    Returns:
        The loss and its parts.
    """
    values = _of_tokens(logits, targets)
    dtype = values.cross_entropy.dtype
    weights = jnp.ones(targets.shape, dtype) if weights is None else jnp.asarray(weights, dtype)
    return _mean_loss(_sums(values, weights), weights, z_loss)


def chunked_language_loss(
    head: Callable[[Array], Array],
    hidden: Float[AnyArray, "*batch time width"],
    targets: Int[AnyArray, "*batch time"],
    weights: Float[AnyArray, "*batch time"] | None = None,
    z_loss: float | int = 0.0,
    *,
    chunk: int,
) -> tuple[Float[Array, ""], LossTerms]:
    """`language_loss(head(hidden), targets, weights, z_loss)`, with logits of `chunk` steps at once and no more.

    They are computed again in the backward pass: what is kept for it are the hidden states. A chunk takes its steps
    from all over the sequence, at equal distances: where devices share the sequence, they share every chunk.

    Args:
        head: hidden states (*batch, steps, width) -> logits (*batch, steps, vocab), each step by itself; a function of
            whatever parameters it closes over.
        hidden: states of every position.
        targets: the tokens that follow.
        weights: of the positions, as of `language_loss`.
        z_loss: coefficient.
        chunk: steps of every sequence whose logits are held at a time; it need not divide their number.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    time = targets.shape[-1]
    chunk = min(chunk, time)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else jnp.asarray(weights)

    def split(array: AnyArray) -> Array:
        """(chunks, *batch, chunk, ...), filled up with zeros, whose weight is 0."""
        axis = targets.ndim - 1
        array = jnp.asarray(array)
        filled = jnp.pad(array, [(0, -time % chunk if i == axis else 0) for i in range(array.ndim)])
        apart = filled.reshape(*array.shape[:axis], chunk, -1, *array.shape[axis + 1 :])
        return jnp.moveaxis(apart, axis + 1, 0)

    def sums(part: tuple[Array, Array, Array]) -> LossTerms:
        states, following, counts = part
        values = _of_tokens(head(states), following)
        return _sums(values, counts.astype(values.cross_entropy.dtype))

    # The loop keeps XLA from merging the second computation with the first.
    parts = lax.map(jax.checkpoint(sums, prevent_cse=False), (split(hidden), split(targets), split(weights)))
    return _mean_loss(jax.tree.map(jnp.sum, parts), weights, z_loss)


def _of_tokens(logits: AnyArray, targets: AnyArray) -> LossTerms:
    """The parts of every token."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(jnp.asarray(logits), targets[..., None], axis=-1)[..., 0]
    right = (jnp.argmax(logits, axis=-1) == targets).astype(log_z.dtype)
    return LossTerms(log_z - chosen, jnp.square(log_z), right)


def _sums(values: LossTerms, weights: Array) -> LossTerms:
    return jax.tree.map(lambda value: jnp.sum(weights * value), values)


def _mean_loss(sums: LossTerms, weights: Array, z_loss: float | int) -> tuple[Array, LossTerms]:
    dtype = sums.cross_entropy.dtype
    count = jnp.maximum(jnp.sum(weights, dtype=dtype), jnp.finfo(dtype).tiny)
    terms = jax.tree.map(lambda total: total / count, sums)
    return terms.cross_entropy + z_loss * terms.z_loss, terms
