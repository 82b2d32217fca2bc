"""Grids as sequences of patches, and back: the tokens of vision transformers and their kin."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxpapers.typing import AnyArray


def patchify(
    x: Shaped[AnyArray, "*batch height width channels"], patch: tuple[int, int]
) -> Shaped[Array, "*batch tokens entries"]:
    """Cuts grids into patches: tokens in row-major order of the patches, entries in row-major order, channels last.

    Args:
        x: grids.
        patch: height and width of a patch.

    Raises:
        ValueError: patches that do not fill the grid.
    """
    *batch, height, width, channels = x.shape
    rows, columns = patch
    require_divisible((height, width), patch)
    cut = jnp.asarray(x).reshape(*batch, height // rows, rows, width // columns, columns, channels)
    return jnp.swapaxes(cut, -4, -3).reshape(*batch, -1, rows * columns * channels)


def unpatchify(
    tokens: Shaped[AnyArray, "*batch tokens entries"], size: tuple[int, int], patch: tuple[int, int]
) -> Shaped[Array, "*batch height width channels"]:
    """The inverse of `patchify`, for grids of a height and width; the channels are what the entries leave.

    Raises:
        ValueError: patches that do not fill the grid, or another number of tokens or entries.
    """
    (height, width), (rows, columns) = size, patch
    require_divisible(size, patch)
    *batch, count, entries = tokens.shape
    if count != height * width // (rows * columns) or entries < 1 or entries % (rows * columns):
        raise ValueError(f"{count} tokens of {entries} entries do not fill a grid {size} with patches {patch}")
    cut = jnp.asarray(tokens).reshape(*batch, height // rows, width // columns, rows, columns, -1)
    return jnp.swapaxes(cut, -4, -3).reshape(*batch, height, width, entries // (rows * columns))


def require_divisible(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Refuses patches that do not fill a grid.

    Raises:
        ValueError: with both.
    """
    if min(patch) < 1 or size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"patches of {patch} do not fill a grid of {size}: they must divide it")
