"""What language models share: the loss of the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray


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
    z_loss: float | int = 1e-4,
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
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(jnp.asarray(logits), targets[..., None], axis=-1)[..., 0]
    weights = jnp.ones_like(log_z) if weights is None else jnp.asarray(weights, log_z.dtype)
    count = jnp.maximum(jnp.sum(weights), jnp.finfo(log_z.dtype).tiny)

    def mean(values: Array) -> Array:
        return jnp.sum(weights * values) / count

    right = (jnp.argmax(logits, axis=-1) == targets).astype(log_z.dtype)
    terms = LossTerms(mean(log_z - chosen), mean(jnp.square(log_z)), mean(right))
    return terms.cross_entropy + z_loss * terms.z_loss, terms
