"""Prefixes of an embedding: lists of sizes, truncation, and what lies between the sizes that were trained (Fig. 5)."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpapers.ops.checks import check_size
from jaxpapers.ops.similarity import unit
from jaxpapers.typing import AnyArray


def check_nesting(nesting: Sequence[int], width: int) -> tuple[int, ...]:
    """The sizes m_1 < ... < m_G = d, as a tuple.

    Args:
        nesting: M.
        width: d, of the embedding.

    Raises:
        ValueError: sizes that do not rise strictly from 1 or more to d.
    """
    sizes = tuple(nesting)
    rises = all(small < large for small, large in pairwise((0, *sizes)))
    if not sizes or not rises or sizes[-1] != width:
        raise ValueError(f"nesting must rise strictly from at least 1 to the width {width}, got {sizes}")
    return sizes


def log_spaced_sizes(width: int, smallest: int = 8) -> tuple[int, ...]:
    """The paper's list: d and its halves down to `smallest` (8, 16, ..., 2048; ViT-B/16: 12, 24, ..., 768).

    Raises:
        ValueError: not 1 <= smallest <= width.
    """
    if not 1 <= smallest <= width:
        raise ValueError(f"smallest must be between 1 and the width {width}, got {smallest}")
    sizes = [width]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= smallest:
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def uniform_sizes(width: int, count: int, smallest: int = 8) -> tuple[int, ...]:
    """`count` sizes from `smallest` to d with equal steps, rounded: the ablation MRL-Uniform (App. K).

    Raises:
        ValueError: fewer than two sizes, or steps below 1.
    """
    if count < 2 or smallest < 1 or width - smallest < count - 1:
        raise ValueError(f"{count} sizes do not fit between {smallest} and {width} in steps of at least 1")
    return tuple(round(float(size)) for size in np.linspace(smallest, width, count))


def sizes_between(nesting: Sequence[int]) -> tuple[int, ...]:
    """The middles of neighbouring sizes (12, 24, 48, ... of 8, 16, 32, 64, ...), which are not trained (Fig. 5)."""
    return tuple((low + high) // 2 for low, high in pairwise(nesting) if high - low > 1)


def interpolated(
    sizes: Sequence[int] | Int[AnyArray, "sizes"],
    values: Sequence[float] | Float[AnyArray, "sizes"],
    at: float | int | Sequence[float] | Float[AnyArray, "*shape"] | Int[AnyArray, "*shape"],
) -> Float[np.ndarray, "..."]:
    """A measure between the sizes at which it is known, linear in log2 of the size; flat outside of them.

    Args:
        sizes: rising.
        values: the measure at each.
        at: sizes, not necessarily whole, at which it is wanted (an expected size of a cascade, say).

    Raises:
        ValueError: sizes that do not rise from above 0, or as many values.
    """
    known = np.asarray(sizes, float)
    if known.shape != np.shape(values) or known.size == 0 or known[0] <= 0 or (np.diff(known) <= 0).any():
        raise ValueError(
            f"sizes must rise from above 0, with one value each; got {sizes} and {np.shape(values)} values"
        )
    return np.asarray(np.interp(np.log2(np.asarray(at, float)), np.log2(known), np.asarray(values, float)))


def truncate(z: Float[AnyArray, "*batch dim"], m: int, normalize: bool = True) -> Float[Array, "*batch m"]:
    """The first m coordinates of an embedding, then divided by their own norm (Sec. 4.3): in this order.

    Args:
        z: embeddings.
        m: size.
        normalize: False: truncated alone. A zero prefix stays zero; the norm is taken in float32 at least.

    Raises:
        ValueError: m outside of 1..d.
    """
    check_size(m, z.shape[-1])
    prefix = jnp.asarray(z)[..., :m]
    return unit(prefix) if normalize else prefix


def keep_first(z: Float[AnyArray, "*batch dim"], m: int | Int[AnyArray, ""]) -> Float[Array, "*batch dim"]:
    """Zeros from coordinate m on: a truncation whose size may be traced, such as one a model of a population.

    Raises:
        ValueError: m outside of 1..d, where it is no traced value.
    """
    if not isinstance(m, jax.core.Tracer):
        check_size(int(m), z.shape[-1])
    return jnp.where(jnp.arange(z.shape[-1]) < m, z, jnp.zeros((), z.dtype))
