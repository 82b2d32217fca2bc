"""Measures of dynamical systems reconstruction: does a free run have the attractor, the spectrum, the exponents?

Orbits are compared as wholes, never step by step: two runs of the same chaotic system part after a few
Lyapunov times, and still have the same histogram (D_stsp), the same power spectrum (D_H) and the same
Lyapunov exponents. The definitions are those of Brenner et al. 2024 (arXiv 2410.14240) and of the papers
before it (Koppe et al. 2019, Mikhaeil et al. 2022, Hess et al. 2023).

A number of this kind means something beside another of the same definition, length, bins and box only: 2,000
points instead of 100,000 turn a D_stsp of 1 into 4.4.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.typing import AnyArray

BINNINGS = ("julia", "legacy", "python")
PADDINGS = ("symmetric", "reflect")
LAPLACE = 1e-5  # added to every cell's count


def state_space_divergence_binned(
    x_true: Float[AnyArray, "time observed"],
    x_gen: Float[AnyArray, "gen_time gen_observed"],
    bins: int,
    *,
    version: str = "julia",
) -> Float[Array, ""]:
    """D_stsp by binning: KL(p_true || p_gen) of N-dimensional histograms, in nats.

    For N up to about 10 (there are bins^N cells). p = (count + 1e-5) / (total + 1e-5 bins^N). Points outside of
    the box, which the true data span, are dropped before normalising (along a dimension in which the data are constant
    it is 1 wide). The versions differ by the box:

    - "julia": [min - 0.1 std, max + 0.1 std], what the papers report;
    - "legacy": [-2 std, 2 std];
    - "python": [min, max], and points in the first bin of any axis are dropped as well: an off-by-one of the
      authors' Python tutorial, kept for parity with its numbers.

    Without any overlap the value ends at a floor of bins, N and the number of points (14.66 for 30 bins in three
    dimensions and 100,000 points).

    Args:
        x_true: data.
        x_gen: generated orbit; `vmap` over it for many.
        bins: per axis.
        version: "julia", "legacy" or "python".

    Returns:
        The divergence; NaN if the generated orbit is not finite or has no point in the box: the worst value,
        not one to skip.

    Raises:
        ValueError: if bins < 1, bins^N does not fit an index, the version is unknown or the dimensions differ.
    """
    observed_dim = _common_dim(x_true, x_gen)
    if bins < 1 or bins**observed_dim >= 2**31:
        raise ValueError(f"bins must be at least 1 and bins^{observed_dim} below 2^31, got bins={bins}")
    if version not in BINNINGS:
        raise ValueError(f"version must be one of {BINNINGS}, got {version!r}")
    dtype = jnp.promote_types(jnp.result_type(x_true, x_gen), jnp.float32)
    x_true, x_gen = jnp.asarray(x_true, dtype), jnp.asarray(x_gen, dtype)
    low, high = _box(x_true, version)
    first_bin = 1 if version == "python" else 0
    true_counts = _histogram(x_true, low, high, bins, first_bin)
    gen_counts = _histogram(x_gen, low, high, bins, first_bin)
    p, q = ((counts + LAPLACE) / (counts.sum() + LAPLACE * bins**observed_dim) for counts in (true_counts, gen_counts))
    usable = jnp.all(jnp.isfinite(x_gen)) & (gen_counts.sum() > 0)
    return jnp.where(usable, jnp.sum(p * jnp.log(p / q)), jnp.nan)


def _common_dim(x_true: AnyArray, x_gen: AnyArray) -> int:
    if x_true.shape[1] != x_gen.shape[1]:
        raise ValueError(f"orbits differ in dimension: {x_true.shape[1]} and {x_gen.shape[1]}")
    return x_true.shape[1]


def _box(x: Array, version: str) -> tuple[Array, Array]:
    std = jnp.std(x, axis=0, ddof=1)
    margin = 0.1 if version == "julia" else 0
    low, high = x.min(axis=0) - margin * std, x.max(axis=0) + margin * std
    if version == "legacy":
        low, high = -2 * std, 2 * std
    constant = high <= low  # a box without width would hold no point, not even the data
    return jnp.where(constant, x[0] - 0.5, low), jnp.where(constant, x[0] + 0.5, high)


def _histogram(x: Array, low: Array, high: Array, bins: int, first_bin: int) -> Array:
    """Counts per cell, (bins^N,), as floats."""
    # The box is tested on x itself: XLA divides by multiplying with a reciprocal, and at the box's edge, where the
    # "python" box has data points, the rounding of that would decide.
    bin_ = jnp.clip(jnp.floor((x - low) / (high - low) * bins), 0, bins - 1)
    inside = jnp.all((x >= low) & (x < high) & (bin_ >= first_bin), axis=1)
    weights = bins ** np.arange(x.shape[1])[::-1]
    cell = jnp.where(inside, jnp.where(inside[:, None], bin_, 0).astype(jnp.int32) @ weights, bins ** x.shape[1])
    # Integer counts: float32 ones stop adding up at 2^24.
    counts = jnp.zeros(bins ** x.shape[1], jnp.int32).at[cell].add(1, mode="drop")
    return counts.astype(x.dtype)


def state_space_divergence_gmm(
    key: Key[Array, ""],
    x_true: Float[AnyArray, "time observed"],
    x_gen: Float[AnyArray, "gen_time gen_observed"],
    sigma2: float | int,
    *,
    num_samples: int = 1000,
    max_steps: int = 10_000,
) -> Float[Array, ""]:
    """D_stsp with Gaussian mixtures, for many dimensions: Monte Carlo estimate of KL(p_true || p_gen).

    p(x) = 1/T sum_t N(x; x_t, sigma^2 I), estimated as the mean of log p_true/p_gen over points drawn from
    p_true (Hershey & Olsen 2007). Only the first `max_steps` of each orbit are used. In logarithms, so that no
    sample is lost to underflow (the authors drop those).

    Args:
        key: random key.
        x_true: data.
        x_gen: generated orbit.
        sigma2: variance of every mixture component.
        num_samples: Monte Carlo points.
        max_steps: components of either mixture at most.

    Returns:
        The estimate; it can be below 0 by its error; NaN if the generated orbit is not finite.

    Raises:
        ValueError: if sigma2 <= 0, a count is below 1, or the dimensions differ.
    """
    _common_dim(x_true, x_gen)
    if sigma2 <= 0 or num_samples < 1 or max_steps < 1:
        raise ValueError(f"must be positive: {sigma2=}, {num_samples=}, {max_steps=}")
    x_true, x_gen = jnp.asarray(x_true)[:max_steps], jnp.asarray(x_gen)[:max_steps]
    key_centre, key_noise = jax.random.split(key)
    centres = x_true[jax.random.randint(key_centre, (num_samples,), 0, x_true.shape[0])]
    noise = jax.random.normal(key_noise, centres.shape, centres.dtype)
    return gmm_log_ratio(centres + math.sqrt(sigma2) * noise, x_true, x_gen, sigma2)


def gmm_log_ratio(
    samples: Float[AnyArray, "samples observed"],
    x_true: Float[AnyArray, "time true_observed"],
    x_gen: Float[AnyArray, "gen_time gen_observed"],
    sigma2: float | int,
) -> Float[Array, ""]:
    """Mean of log p_true/p_gen over given points: `state_space_divergence_gmm` without its randomness.

    Raises:
        ValueError: if sigma2 <= 0 or the dimensions differ.
    """
    log_p, log_q = (gmm_log_density(samples, x, sigma2) for x in (x_true, x_gen))
    return jnp.mean(log_p - log_q)


def gmm_log_density(
    points: Float[AnyArray, "points observed"],
    centres: Float[AnyArray, "time centre_observed"],
    sigma2: float | int,
    *,
    chunk: int = 64,
) -> Float[Array, "points"]:
    """Logarithm of 1/T sum_t N(x; x_t, sigma^2 I) at each point, `chunk` points at a time (chunk * T distances).

    Raises:
        ValueError: if sigma2 <= 0, chunk < 1, or the dimensions differ.
    """
    observed_dim = _common_dim(points, centres)
    if sigma2 <= 0 or chunk < 1:
        raise ValueError(f"must be positive: {sigma2=}, {chunk=}")
    # Distances by |x|^2 - 2 x.c + |c|^2, one matrix product; about the mean, where it cancels least.
    mean = jnp.mean(jnp.asarray(centres), axis=0)
    points, centres = points - mean, centres - mean
    squared = jnp.sum(jnp.square(centres), axis=1)

    def log_density(point: Array) -> Array:
        product = jnp.matmul(centres, point, precision=lax.Precision.HIGHEST)
        distances = jnp.maximum(jnp.sum(jnp.square(point)) - 2 * product + squared, 0)
        return jax.nn.logsumexp(-distances / (2 * sigma2))

    normaliser = math.log(centres.shape[0]) + observed_dim / 2 * math.log(2 * math.pi * sigma2)
    return lax.map(log_density, points, batch_size=chunk) - normaliser


def smoothed_power_spectrum(
    x: Float[AnyArray, "time observed"], sigma: float | int, *, padding: str = "symmetric"
) -> Float[Array, "frequency observed"]:
    """Power spectrum of each dimension, smoothed by a Gaussian and normalised to sum 1.

    Standardise, |rfft|^2, convolve with a Gaussian of `sigma` frequency bins cut off at 4 sigma, clip negatives,
    divide by the sum. At the borders the spectrum is mirrored, with ("symmetric", scipy's "reflect") or without
    ("reflect", Julia's) repeating the edge bin; at sigma = 20 that changes D_H by about 1e-3.

    Args:
        x: orbit.
        sigma: of the Gaussian, in frequency bins; 0 for none.
        padding: "symmetric" or "reflect".

    Returns:
        (time // 2 + 1, observed); zero for a dimension that does not vary.

    Raises:
        ValueError: if sigma < 0, the padding is unknown, or there are fewer than 2 steps.
    """
    if sigma < 0 or padding not in PADDINGS or x.shape[0] < 2:
        raise ValueError(
            f"needs sigma >= 0, padding in {PADDINGS} and 2 steps or more, got {sigma=}, {padding=}, {x.shape[0]}"
        )
    x = jnp.asarray(x)
    scale = jnp.std(x, axis=0)
    # The mean of equal numbers is off by a few roundings, which standardised would be a spectrum.
    varies = scale > 8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=0)
    standard = jnp.where(varies, (x - jnp.mean(x, axis=0)) / jnp.where(varies, scale, 1), 0)
    power = jnp.square(jnp.abs(_rfft(standard)))
    if sigma > 0:
        radius = int(4 * sigma + 0.5)
        gaussian = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
        kernel = jnp.asarray(gaussian / gaussian.sum(), power.dtype)
        padded = jnp.pad(power, ((radius, radius), (0, 0)), mode=padding)
        power = jax.vmap(lambda row: jnp.convolve(row, kernel, mode="valid"), in_axes=1, out_axes=1)(padded)
        power = jnp.maximum(power, 0)
    total = jnp.sum(power, axis=0)
    return power / jnp.where(total > 0, total, 1)


def _rfft(x: Array) -> Array:
    """`jnp.fft.rfft` over the first axis, within the memory of a TPU."""
    return lax.platform_dependent(x, tpu=_chirp_rfft, default=partial(jnp.fft.rfft, axis=0))


def _chirp_rfft(x: Array) -> Array:
    """The same by FFTs whose length is a power of two (Bluestein 1970).

    On a TPU the FFT of another length is a product with the DFT's matrix, 110 GB for 99,000 steps. With
    jk = (j^2 + k^2 - (k - j)^2) / 2 the transform is a convolution with a chirp, which zeros may lengthen.
    """
    n = x.shape[0]
    length = 2 ** math.ceil(math.log2(2 * n - 1))
    squares = np.square(np.arange(n)) % (2 * n)  # the chirp's period: large arguments would lose their digits
    exact = np.exp(-1j * np.pi * squares / n).reshape(-1, *[1] * (x.ndim - 1))
    kernel = np.zeros((length, *exact.shape[1:]), complex)
    kernel[:n] = exact.conj()
    kernel[length - n + 1 :] = exact[:0:-1].conj()
    dtype = jnp.result_type(x, jnp.complex64)
    chirp, transfer = jnp.asarray(exact, dtype), jnp.asarray(np.fft.fft(kernel, axis=0), dtype)
    convolved = jnp.fft.ifft(transfer * jnp.fft.fft(x * chirp, length, axis=0), axis=0)
    return (convolved[:n] * chirp)[: n // 2 + 1]


def power_spectrum_hellinger(
    x_true: Float[AnyArray, "time observed"],
    x_gen: Float[AnyArray, "gen_time gen_observed"],
    sigma: float | int,
    *,
    padding: str = "symmetric",
) -> Float[Array, ""]:
    """D_H: Hellinger distance of the smoothed power spectra, mean over dimensions.

    H = ||sqrt p - sqrt q||_2 / sqrt 2 = sqrt(1 - sum sqrt(p q)), 0 to 1.

    Args:
        x_true: data.
        x_gen: generated orbit of the same length (spectra of different lengths have different bins).
        sigma: of the smoothing (20 in the paper, 1 for fMRI); 0 for none.
        padding: see `smoothed_power_spectrum`.

    Returns:
        The distance; 1 for a generated orbit that is not finite, as the paper counts it, and in a dimension where
        one of the two does not vary (both: 0).

    Raises:
        ValueError: if the shapes differ, and as `smoothed_power_spectrum`.
    """
    if x_true.shape != x_gen.shape:
        raise ValueError(f"orbits must have one shape, got {x_true.shape} and {x_gen.shape}")
    x_gen = jnp.asarray(x_gen)
    finite = jnp.all(jnp.isfinite(x_gen))
    p, q = (smoothed_power_spectrum(x, sigma, padding=padding) for x in (x_true, jnp.where(finite, x_gen, 0)))
    distance = jnp.sqrt(jnp.sum(jnp.square(jnp.sqrt(p) - jnp.sqrt(q)), axis=0) / 2)
    distance = jnp.where(jnp.any(p > 0, axis=0) == jnp.any(q > 0, axis=0), distance, 1)
    return jnp.where(finite, jnp.mean(distance), 1)


def prediction_error(
    step: Callable[[Array], Array],
    init_state: Callable[[Array], Array],
    observe: Callable[[Array], Array],
    xs: Float[AnyArray, "time observed"],
    horizon: int,
) -> Float[Array, ""]:
    """PE_n: mean squared error of n-step predictions from every data point that has a successor n steps on.

    Args:
        step: next state of a batch of states (batch, ...).
        init_state: states from a batch of observations (batch, observed).
        observe: observations from a batch of states.
        xs: data.
        horizon: n (20 in the paper).

    Raises:
        ValueError: unless 1 <= horizon < time.
    """
    if not 1 <= horizon < xs.shape[0]:
        raise ValueError(f"horizon must lie in 1..{xs.shape[0] - 1}, got {horizon}")
    xs = jnp.asarray(xs)
    states = lax.fori_loop(0, horizon, lambda _, z: step(z), init_state(xs[:-horizon]))
    return jnp.mean(jnp.square(observe(states) - xs[horizon:]))


def lyapunov_spectrum(
    step: Callable[[Array], Array],
    z0: Float[AnyArray, "latent"],
    steps: int,
    *,
    num_exponents: int | None = None,
    transient: int = 0,
    qr_every: int = 1,
) -> Float[Array, "exponents"]:
    """Lyapunov exponents per step, largest first; divide by the time step for physical units.

    Tangent vectors are carried along by the step's exact Jacobian and kept orthonormal by a QR decomposition;
    the exponents are the mean logarithms of R's diagonal (Benettin et al. 1980). Works for any differentiable
    step, and under `vmap` over z0 or over a model inside of `step`.

    Args:
        step: next state of one state.
        z0: state to start from.
        steps: steps to average over, a multiple of qr_every.
        num_exponents: how many of the largest exponents; None for all, 1 for lambda_max alone (cheapest).
        transient: steps to take before.
        qr_every: steps between decompositions; above 1 it saves time, until the vectors align.

    Returns:
        The exponents; -inf where a direction is mapped to zero, NaN on a diverging orbit.

    Raises:
        ValueError: if there are not 1..dim exponents, steps is no positive multiple of qr_every, or transient
            is negative.
    """
    z0 = jnp.asarray(z0)
    count = z0.size if num_exponents is None else num_exponents
    if not 1 <= count <= z0.size:
        raise ValueError(f"num_exponents must lie in 1..{z0.size}, got {num_exponents}")
    if qr_every < 1 or steps < 1 or steps % qr_every or transient < 0:
        raise ValueError(
            f"needs steps a positive multiple of qr_every and transient >= 0, got {steps=}, {qr_every=}, {transient=}"
        )

    def advance(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, vectors = carry
        z, push = jax.linearize(step, z)
        return z, jax.vmap(push, in_axes=1, out_axes=1)(vectors)

    def renormalised(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        z, vectors, total = carry
        z, vectors = lax.fori_loop(0, qr_every, advance, (z, vectors))
        vectors, r = jnp.linalg.qr(vectors)
        return (z, vectors, total + jnp.log(jnp.abs(jnp.diag(r)))), None

    z = lax.fori_loop(0, transient, lambda _, z: step(z), z0)
    # All of them span the space however they start; fewer could stay for good in an invariant subspace of a sparse
    # map if they were unit vectors, so they start in no special position (but always the same one).
    start = jnp.eye(z0.size, dtype=z0.dtype)
    if count < z0.size:
        start = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (z0.size, count), z0.dtype))[0]
    carry = (z, start, jnp.zeros(count, z0.dtype))
    (_, _, total), _ = lax.scan(renormalised, carry, length=steps // qr_every)
    return jnp.sort(total / steps)[::-1]
