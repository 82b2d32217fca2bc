"""Linear estimators in closed form: bilinear interpolation, LMMSE, and what they leave."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, Int

from jaxpapers.typing import AnyArray

Indices = Sequence[int] | Int[AnyArray, "_"]  # rows and columns differ in number


def linear_weights(points: Indices, size: int) -> Float[np.ndarray, "size points"]:
    """Matrix of linear interpolation, with linear extrapolation, from values at `points` to those at 0 .. size - 1.

    Raises:
        ValueError: fewer than two points, or points that do not ascend within the grid.
    """
    x = np.asarray(points)
    if len(x) < 2:
        raise ValueError(f"linear interpolation needs at least 2 pilot rows and columns, got {len(x)}")
    _require_within(x, size)
    place = np.arange(size)
    left = np.clip(np.searchsorted(x, place, side="right") - 1, 0, len(x) - 2)
    share = (place - x[left]) / (x[left + 1] - x[left])
    weights = np.zeros((size, len(x)))
    weights[place, left], weights[place, left + 1] = 1 - share, share
    return weights


def _require_within(points: Indices, size: int) -> None:
    x = np.asarray(points)
    if x.min() < 0 or x.max() >= size or (np.diff(x) <= 0).any():
        raise ValueError(f"pilots must ascend within 0 to {size - 1}, got {x.tolist()}")


def bilinear_interpolate(
    ls: Complex[AnyArray, "*batch r c"], rows: Indices, columns: Indices, num_subcarriers: int, num_symbols: int
) -> Complex[Array, "*batch K T"]:
    """Linear interpolation and extrapolation along time, then along frequency.

    Raises:
        ValueError: fewer than two pilot rows or columns, pilots outside the grid or of another number.
    """
    if ls.shape[-2:] != (len(rows), len(columns)):
        raise ValueError(f"expected pilots of shape {(len(rows), len(columns))}, got {ls.shape[-2:]}")
    over_rows, over_columns = linear_weights(rows, num_subcarriers), linear_weights(columns, num_symbols)
    return jnp.einsum("kr,...rc,tc->...kt", over_rows, jnp.asarray(ls), over_columns, precision="highest")


def bilinear_matrix(
    rows: Indices, columns: Indices, num_subcarriers: int, num_symbols: int
) -> Float[np.ndarray, "cells pilots"]:
    """`bilinear_interpolate` as a matrix on row-major vectors.

    Raises:
        ValueError: as `linear_weights`.
    """
    return np.kron(linear_weights(rows, num_subcarriers), linear_weights(columns, num_symbols))


def lmmse_filter(
    cross: Complex[AnyArray, "cells pilots"],
    pilots: Complex[AnyArray, "pilots pilots"],
    s2: Float[AnyArray, ""] | float,
) -> Complex[Array, "cells pilots"]:
    """R_hp (R_pp + s2 I)^-1, by the eigenvectors of R_pp: with s2 = 0 directions without power count for nothing."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(pilots))
    values = jnp.maximum(values, 0) + s2
    least = len(values) * jnp.finfo(values.dtype).eps * jnp.max(values)
    inverse = jnp.where(values > least, 1 / jnp.where(values > least, values, 1), 0)
    product = partial(jnp.matmul, precision="highest")
    return product(product(jnp.asarray(cross), vectors) * inverse, vectors.conj().T)


def _pilot_covariances(
    F: Inexact[AnyArray, "K K"], J: Inexact[AnyArray, "T T"], rows: Indices, columns: Indices
) -> tuple[Array, Array]:
    """R_hp and R_pp."""
    F, J, r, c = jnp.asarray(F), jnp.asarray(J), np.asarray(rows), np.asarray(columns)
    for points, size in ((r, len(F)), (c, len(J))):
        _require_within(points, size)
    return jnp.kron(F[:, r], J[:, c]), jnp.kron(F[r[:, None], r], J[c[:, None], c])


def lmmse_matrix(
    F: Inexact[AnyArray, "K K"],
    J: Inexact[AnyArray, "T T"],
    rows: Indices,
    columns: Indices,
    s2: Float[AnyArray, ""] | float,
) -> Complex[Array, "cells pilots"]:
    """The linear estimator of least mean square error, R_hp (R_pp + s2 I)^-1 with R = F (x) J, on row-major vectors.

    Args:
        F: covariance over subcarriers; for a pooled estimator its mean over conditions.
        J: covariance over symbols; likewise. (Where delay spreads and Doppler shifts are independent, the mean of the
            products is the product of the means.)
        rows: of the pilots.
        columns: of the pilots.
        s2: noise variance.

    Raises:
        ValueError: pilots outside the grid.
    """
    return lmmse_filter(*_pilot_covariances(F, J, rows, columns), s2)


def apply_linear(
    matrix: Inexact[AnyArray, "cells pilots"], ls: Complex[AnyArray, "*batch r c"], size: tuple[int, int]
) -> Complex[Array, "*batch K T"]:
    """An estimator's matrix on pilots; size is (K, T).

    Raises:
        ValueError: a matrix for other pilots or another grid.
    """
    expected = (size[0] * size[1], ls.shape[-2] * ls.shape[-1])
    if matrix.shape != expected:
        raise ValueError(f"expected a matrix of shape {expected}, got {matrix.shape}")
    flat = jnp.asarray(ls).reshape(*ls.shape[:-2], -1)
    return jnp.matmul(flat, jnp.asarray(matrix).T, precision="highest").reshape(*ls.shape[:-2], *size)


def linear_error(
    matrix: Inexact[AnyArray, "cells pilots"],
    F: Inexact[AnyArray, "K K"],
    J: Inexact[AnyArray, "T T"],
    rows: Indices,
    columns: Indices,
    s2: Float[AnyArray, ""] | float,
) -> Float[Array, "K T"]:
    """E|h - G ls|^2 of every cell for any linear estimator G: R - 2 Re(G R_ph) + G (R_pp + s2 I) G^H, its diagonal.

    Raises:
        ValueError: pilots outside the grid.
    """
    cross, pilots = _pilot_covariances(F, J, rows, columns)
    G = jnp.asarray(matrix)
    product = jnp.matmul(G, pilots, precision="highest") + s2 * G - 2 * cross
    power = jnp.outer(jnp.diagonal(F).real, jnp.diagonal(J).real)
    return power + jnp.sum(product * G.conj(), axis=1).real.reshape(power.shape)


def lmmse_bound(
    F: Inexact[AnyArray, "K K"],
    J: Inexact[AnyArray, "T T"],
    rows: Indices,
    columns: Indices,
    s2: Float[AnyArray, ""] | float,
) -> Float[Array, ""]:
    """Mean over the cells of R - R_hp (R_pp + s2 I)^-1 R_ph: what the matched LMMSE leaves.

    For Gaussian channels it is the conditional mean, and no estimator leaves less on channels that it has not seen.

    Raises:
        ValueError: pilots outside the grid.
    """
    return jnp.mean(linear_error(lmmse_matrix(F, J, rows, columns, s2), F, J, rows, columns, s2))


def fit_sample_covariances(
    ls: Complex[AnyArray, "batch r c"], h: Complex[AnyArray, "batch K T"]
) -> tuple[Complex[Array, "cells pilots"], Complex[Array, "pilots pilots"]]:
    """Sample means of h ls^H and ls ls^H, for `lmmse_filter`.

    The second contains the noise of the samples; the authors add s2 once more.
    """
    x, y = (jnp.asarray(part).reshape(len(part), -1) for part in (ls, h))
    product = partial(jnp.matmul, precision="highest")
    return product(y.T, x.conj()) / len(x), product(x.T, x.conj()) / len(x)
