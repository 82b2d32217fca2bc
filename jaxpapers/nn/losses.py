"""Losses of classes and of pairs that several papers share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpapers.ops.checks import check_labels
from jaxpapers.ops.similarity import unit
from jaxpapers.typing import AnyArray


def cross_entropy(
    logits: Float[AnyArray, "*batch classes"], labels: Int[AnyArray, "*batch"], label_smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """-sum of target log p, target (1 - s) one-hot + s / L (PyTorch's label smoothing), in float32 at least.

    Raises:
        ValueError: labels out of range; smoothing outside of [0, 1].
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_labels(labels, logits.shape[-1])
    exact = jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(exact, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.asarray(labels)[..., None], axis=-1)[..., 0]
    return -(1 - label_smoothing) * chosen - label_smoothing * jnp.mean(log_p, axis=-1)


def info_nce(
    u: Float[AnyArray, "batch dim"],
    v: Float[AnyArray, "batch dim"],
    temperature: float | Float[AnyArray, ""],
    normalize: bool = True,
) -> Float[Array, ""]:
    """Symmetric InfoNCE of the pairs (u_i, v_i): the mean of both directions' cross-entropies (arXiv 2103.00020).

    The other rows of the batch are the negatives. With a learned scale s of the logits, exp(s), the temperature is
    exp(-s).

    Args:
        u: embeddings of one side (images, say).
        v: embeddings of the other, row by row their partners.
        temperature: divides the cosines.
        normalize: False: scalar products of the embeddings as they are.

    Raises:
        ValueError: a temperature that is not above 0, where it is no traced value.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    u, v = (unit(each) if normalize else jnp.asarray(each) for each in (u, v))
    scores = jnp.matmul(u, v.T, precision="highest") / temperature
    pairs = jnp.arange(u.shape[0])
    return jnp.mean(cross_entropy(scores, pairs) + cross_entropy(scores.T, pairs)) / 2
