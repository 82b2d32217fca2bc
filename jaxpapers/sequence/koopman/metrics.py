"""Measures of a forecast (Table 2). Normalisation and distance of spectra are not stated in the paper: see each."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import ndimage

from jaxpapers.ops.dsr_metrics import power_spectrum_hellinger
from jaxpapers.typing import AnyArray


def nrmse(
    x_true: Float[AnyArray, "batch *shape"],
    x: Float[AnyArray, "batch *shape"],
    extent: Float[AnyArray, "batch"] | None = None,
) -> Float[Array, ""]:
    """RMSE / (max - min) of each trajectory, mean over trajectories (the normalisation is our reading).

    Args:
        x_true: what was to be forecast.
        x: the forecast.
        extent: max - min of each trajectory; None: of the part that is given.
    """
    x_true, x = jnp.asarray(x_true), jnp.asarray(x)
    axes = tuple(range(1, x_true.ndim))
    error = jnp.sqrt(jnp.mean(jnp.square(x - x_true), axis=axes))
    return jnp.mean(error / (jnp.ptp(x_true, axis=axes) if extent is None else jnp.asarray(extent)))


def ssim(x_true: Float[np.ndarray, "height width"], x: Float[np.ndarray, "height width"], window: int = 7) -> float:
    """Structural similarity (Wang et al. 2004) of two fields, uniform windows, range that of the true field (host).

    Raises:
        ValueError: a window that does not fit into the field, or a constant true field.
    """
    if not 1 < window <= min(x_true.shape):
        raise ValueError(f"window must lie in 2..{min(x_true.shape)}, got {window}")
    extent = float(np.ptp(x_true))
    if extent <= 0:
        raise ValueError(f"the true field must not be constant, got {float(x_true.flat[0])} everywhere")
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2

    def mean(field: np.ndarray) -> np.ndarray:
        inside = tuple(slice(window // 2, window // 2 + size - window + 1) for size in field.shape)
        return ndimage.uniform_filter(field, window)[inside]

    scale = window**2 / (window**2 - 1)
    a, b = x_true.astype(np.float64), x.astype(np.float64)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = scale * (mean(a * a) - mean_a**2), scale * (mean(b * b) - mean_b**2)
    covariance = scale * (mean(a * b) - mean_a * mean_b)
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def spectral_distribution_error(
    x_true: Float[AnyArray, "time dim"], x: Float[AnyArray, "time dim"]
) -> Float[Array, ""]:
    """Hellinger distance of the normalised power spectra in time, mean over dimensions (our reading), 0 to 1.

    The mean is left out; a constant forecast (one that died out) is at distance 1 from a series that varies.
    """
    return power_spectrum_hellinger(x_true, x, sigma=0)


def histogram_kl(
    x_true: Float[AnyArray, "time dim"], x: Float[AnyArray, "other_time dim"], bins: int = 50
) -> Float[Array, ""]:
    """KL divergence of the marginal histograms on the true range, mean over dimensions.

    Outliers fall into the end bins, NaNs into none, so that a forecast that blows up is far away.

    Raises:
        ValueError: bins < 2.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    x_true, x = jnp.asarray(x_true), jnp.asarray(x)
    low, high = x_true.min(axis=0), x_true.max(axis=0)

    def shares(series: Array) -> Array:
        place = jnp.clip(jnp.floor((series - low) / (high - low) * bins), 0, bins - 1)
        counts = jnp.sum(place[:, :, None] == jnp.arange(bins), axis=0) + 1e-6
        return counts / (len(series) + 1e-6 * bins)

    p, q = shares(x_true), shares(x)
    return jnp.mean(jnp.sum(p * jnp.log(p / q), axis=-1))
