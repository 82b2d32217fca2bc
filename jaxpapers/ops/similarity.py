"""Directions of vectors, similarity of whole representations, and how many directions a matrix has."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxpapers.typing import AnyArray

EPSILON = 1e-12  # smallest norm that is divided by


def inverse_norm(z: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch"]:
    """1 / |z| in float32 at least, at most 1e12: finite for a zero vector, and so is its gradient."""
    exact = jnp.asarray(z, jnp.promote_types(z.dtype, jnp.float32))
    return lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(exact), axis=-1), EPSILON**2))


def unit(z: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Vectors over their norms, these in float32 at least; a zero vector stays zero."""
    z = jnp.asarray(z)
    return z * inverse_norm(z)[..., None].astype(z.dtype)


def linear_cka(a: Float[AnyArray, "samples p"], b: Float[AnyArray, "others q"]) -> Float[Array, ""]:
    """Similarity |a' b|^2 / (|a' a| |b' b|) of two representations, columns centred, Frobenius norms.

    Between 0 and 1, blind to rotations and to one scale of each (Kornblith et al., arXiv 1905.00414). NaN where
    a representation is constant.

    Args:
        a: features of the samples.
        b: other features of the same samples.

    Raises:
        ValueError: fewer than two samples, or another number in b.
    """
    if a.shape[0] != b.shape[0] or a.shape[0] < 2:
        raise ValueError(f"needs the same samples, at least 2, in a and b, got {a.shape[0]} and {b.shape[0]}")
    a, b = (jnp.asarray(each, jnp.promote_types(each.dtype, jnp.float32)) for each in (a, b))
    a, b = (each - jnp.mean(each, axis=0) for each in (a, b))
    # A scale of 1: fourth powers leave the range of float32 soon.
    a, b = (each / jnp.linalg.norm(each) for each in (a, b))
    with jax.default_matmul_precision("highest"):
        cross, own, other = (jnp.linalg.norm(u.T @ v) for u, v in ((a, b), (a, a), (b, b)))
    return jnp.square(cross) / (own * other)


def effective_rank(W: Float[AnyArray, "rows columns"]) -> Float[Array, ""]:
    """exp(entropy of the singular values, normalised to sum 1), from 1 to min(rows, columns).

    Of a Gram matrix W' W it is that of W's squared singular values, which some call by the same name.
    """
    singular = jnp.linalg.svd(jnp.asarray(W), compute_uv=False)
    p = singular / jnp.sum(singular)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)))
