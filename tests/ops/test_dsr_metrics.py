"""Measures of reconstruction against numpy, scipy, closed forms and the golden figures."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.ops.dsr_metrics import (
    _chirp_rfft,
    gmm_log_density,
    gmm_log_ratio,
    lyapunov_spectrum,
    power_spectrum_hellinger,
    prediction_error,
    smoothed_power_spectrum,
    state_space_divergence_binned,
    state_space_divergence_gmm,
)

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "alrnn" / "metrics.npz"))
X_TRUE, X_GEN = GOLDEN["x_true"], GOLDEN["x_gen"]
binned = jax.jit(state_space_divergence_binned, static_argnames=("bins", "version"))
hellinger = jax.jit(power_spectrum_hellinger, static_argnames=("sigma", "padding"))
spectrum = jax.jit(smoothed_power_spectrum, static_argnames=("sigma", "padding"))


def orbit(seed, steps=200, dim=2):
    """A random walk that is drawn back to 0: coloured, so that its spectrum and histogram have a shape."""
    noise = np.random.default_rng(seed).normal(size=(steps, dim))
    x = np.zeros((steps, dim))
    for t in range(1, steps):
        x[t] = 0.8 * x[t - 1] + noise[t]
    return x


# ---- D_stsp, binning


@pytest.mark.parametrize("bins", [8, 30])
@pytest.mark.parametrize("version", ["python", "julia", "legacy"])
def test_golden_binned_divergence(version, bins):
    golden = GOLDEN[f"dstsp_bin_{version}_{bins}"]
    with jax.enable_x64(True):
        ours = binned(X_TRUE.astype(float), X_GEN.astype(float), bins, version=version)
    # The tutorial's version sums 27,000 cells in float32.
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-5 if version == "python" else 1e-9)


def test_binned_divergence_in_float32():
    ours = binned(X_TRUE, X_GEN, 30)
    assert ours.dtype == jnp.float32
    # Sums over 27,000 cells in float32.
    np.testing.assert_allclose(ours, GOLDEN["dstsp_bin_julia_30"], rtol=0, atol=1e-5)


def binned_oracle(x_true, x_gen, bins, version):
    """Numpy's own histogram, and the sums in full."""
    std = x_true.std(axis=0, ddof=1)
    low, high = {
        "julia": (x_true.min(0) - 0.1 * std, x_true.max(0) + 0.1 * std),
        "legacy": (-2 * std, 2 * std),
        "python": (x_true.min(0), x_true.max(0)),
    }[version]
    edges = [np.linspace(a, b, bins + 1) for a, b in zip(low, high, strict=True)]
    densities = []
    for x in (x_true, x_gen):
        if version == "python":
            first = np.any(x < [edge[1] for edge in edges], axis=1)
            x = x[~first & np.all(x < high, axis=1)]
        counts, _ = np.histogramdd(x, edges)
        densities.append((counts + 1e-5) / (counts.sum() + 1e-5 * counts.size))
    p, q = densities
    return np.sum(p * np.log(p / q))


@given(
    seed=st.integers(0, 10**6),
    bins=st.sampled_from([1, 7]),
    version=st.sampled_from(["julia", "legacy", "python"]),
    shift=st.floats(-1.0, 1.0),
)
def test_binned_divergence_is_the_histograms(seed, bins, version, shift):
    x_true, x_gen = orbit(seed), orbit(seed + 1) + shift
    if bins == 1 and version == "python":
        return  # dropping the first of one bin leaves nothing
    with jax.enable_x64(True):
        ours = binned(x_true, x_gen, bins, version=version)
    np.testing.assert_allclose(ours, binned_oracle(x_true, x_gen, bins, version), rtol=1e-9, atol=1e-12)
    assert float(ours) >= -1e-12


@pytest.mark.parametrize("version", ["python", "julia", "legacy"])
def test_binned_divergence_sees_the_set_of_points_alone(version):
    x, other = orbit(0), orbit(1)
    shuffled = np.random.default_rng(2).permutation(x)
    with jax.enable_x64(True):
        divergence = partial(binned, bins=7, version=version)
        assert abs(float(divergence(x, x))) < 1e-14
        assert abs(float(divergence(x, shuffled))) < 1e-14
        np.testing.assert_allclose(divergence(x, other), divergence(shuffled, other), rtol=1e-12)


def test_a_collapsed_orbit_ends_at_the_laplace_floor():
    # All of p where q has but the smoothing: log of the two totals and counts, cell by cell.
    x = np.repeat(np.linspace(-1, 1, 10)[:, None], 2, axis=1).repeat(50, axis=0)
    with jax.enable_x64(True):
        floor = binned(x, np.full((500, 2), [-1.0, 1.0]), 10)
    p = (50 + 1e-5) / (500 + 1e-5 * 100)
    q = 1e-5 / (500 + 1e-5 * 100)
    rest = 1e-5 / (500 + 1e-5 * 100) * np.log(1e-5 / (500 + 1e-5))  # its own cell, where p has none
    np.testing.assert_allclose(floor, 10 * p * np.log(p / q) + rest, rtol=1e-9)


def test_failed_orbits_are_nan_and_many_orbits_are_one_vmap():
    x = orbit(0).astype(np.float32)
    bad = [x.copy() for _ in range(3)]
    bad[0][17, 1], bad[1][3, 0], bad[2] = np.nan, np.inf, x + 100
    together = jax.jit(jax.vmap(lambda y: state_space_divergence_binned(x, y, 7)))(np.stack([x, *bad, 0.5 * x]))
    together = np.asarray(together)
    assert np.isnan(together[1:4]).all()
    np.testing.assert_allclose(together[[0, 4]], [0, binned(x, (0.5 * x), 7)], rtol=1e-6, atol=1e-6)


# ---- D_stsp, mixtures


def test_golden_gmm_divergence():
    sigma2 = float(GOLDEN["gmm_sigma2"])
    with jax.enable_x64(True):
        x_true, x_gen = X_TRUE.astype(float), X_GEN.astype(float)
        samples = x_true[GOLDEN["gmm_index"]] + np.sqrt(sigma2) * GOLDEN["gmm_noise"].astype(float)
        ours = jax.jit(partial(gmm_log_ratio, sigma2=sigma2))(samples, x_true, x_gen)
    np.testing.assert_allclose(ours, GOLDEN["dstsp_gmm"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_gmm_density_is_scipys_in_every_chunking(chunk):
    points, centres = orbit(0, 13, 4) + 50, orbit(1, 40, 4) + 50  # far from 0, where |x|^2 cancels
    squared = np.sum((points[:, None] - centres) ** 2, axis=2)
    expected = scipy.special.logsumexp(-squared / 0.6, axis=1) - np.log(40) - 2 * np.log(2 * np.pi * 0.3)
    with jax.enable_x64(True):
        ours = jax.jit(partial(gmm_log_density, sigma2=0.3, chunk=chunk))(points, centres)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_gmm_divergence_is_zero_for_equal_sets_and_ranks_like_the_binned_one():
    x = orbit(0, 2000).astype(np.float32)
    gmm = jax.jit(lambda y: state_space_divergence_gmm(jax.random.key(0), x, y, 0.3))
    assert abs(gmm(x)) < 1e-6  # float32
    assert abs(gmm(np.random.default_rng(1).permutation(x))) < 1e-4  # float32 sums in another order
    shifts = [0.0, 0.5, 1.0, 2.0, 4.0]
    by_gmm = [float(gmm(x + np.float32(shift))) for shift in shifts]
    by_bins = [float(binned(x, x + np.float32(shift), 10)) for shift in shifts]
    assert by_gmm == sorted(by_gmm)
    assert by_bins == sorted(by_bins)


def test_gmm_divergence_draws_from_the_first_steps_of_the_data():
    x = np.concatenate([orbit(0, 300), orbit(1, 100) + 1e3]).astype(np.float32)
    first = jax.jit(lambda key: state_space_divergence_gmm(key, x, x[:300] + 1, 0.3, max_steps=300, num_samples=50))
    direct = jax.jit(lambda key: state_space_divergence_gmm(key, x[:300], x[:300] + 1, 0.3, num_samples=50))
    np.testing.assert_allclose(first(jax.random.key(0)), direct(jax.random.key(0)), rtol=1e-6)
    assert first(jax.random.key(1)) != first(jax.random.key(0))


def test_gmm_divergence_of_a_failed_orbit_is_nan():
    x = orbit(0).astype(np.float32)
    y = x.copy()
    y[5, 1] = np.nan
    assert np.isnan(jax.jit(lambda y: state_space_divergence_gmm(jax.random.key(0), x, y, 0.3))(y))


# ---- D_H


@pytest.mark.parametrize("sigma", [1, 20])
def test_golden_spectra(sigma):
    with jax.enable_x64(True):
        x_true, x_gen = X_TRUE.astype(float), X_GEN.astype(float)
        np.testing.assert_allclose(spectrum(x_true, sigma), GOLDEN[f"spectrum_true_{sigma}"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(hellinger(x_true, x_gen, sigma), GOLDEN[f"dh_python_{sigma}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 64, 97, 990, 4999])
def test_the_tpus_transform_is_numpys(steps):
    x = np.random.default_rng(steps).normal(size=(steps, 2))
    expected = np.fft.rfft(x, axis=0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(_chirp_rfft(jnp.asarray(x)), expected, atol=1e-10 * steps)
    # float32: eps times the largest coefficient times the logarithm of the length, with room
    single = _chirp_rfft(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(single, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("padding", "scipy_mode"), [("symmetric", "reflect"), ("reflect", "mirror")])
@pytest.mark.parametrize(("sigma", "steps"), [(1.5, 51), (20, 200), (20, 60)])
def test_smoothing_is_scipys_with_either_border(padding, scipy_mode, sigma, steps):
    # sigma = 20 over 31 frequencies: the kernel is wider than the spectrum, which is mirrored more than once.
    x = orbit(0, steps)
    with jax.enable_x64(True):
        ours = spectrum(x, sigma, padding=padding)
    standard = (x - x.mean(0)) / x.std(0)
    power = np.abs(np.fft.rfft(standard, axis=0)) ** 2
    smooth = scipy.ndimage.gaussian_filter1d(power, sigma, axis=0, mode=scipy_mode)
    np.testing.assert_allclose(ours, smooth / smooth.sum(axis=0), rtol=1e-9, atol=1e-13)


@given(seed=st.integers(0, 10**6), sigma=st.sampled_from([0, 3]))
def test_hellinger_is_a_distance_that_sees_no_scale(seed, sigma):
    x, y = orbit(seed), orbit(seed + 1) ** 3
    with jax.enable_x64(True):
        distance = hellinger(x, y, sigma)
        assert hellinger(x, x, sigma) == 0
        assert 0 < distance < 1
        np.testing.assert_allclose(hellinger(y, x, sigma), distance, rtol=1e-10)
        np.testing.assert_allclose(hellinger(x, 3 - 0.2 * y, sigma), distance, rtol=1e-9)
        p, q = (np.asarray(spectrum(z, sigma)) for z in (x, y))
    np.testing.assert_allclose(distance, np.mean(np.sqrt(1 - np.sum(np.sqrt(p * q), axis=0))), rtol=1e-7)


def test_failed_and_collapsed_orbits_are_as_far_as_can_be():
    x = orbit(0).astype(np.float32)
    diverged = x.copy()
    diverged[100:] = np.nan
    assert hellinger(x, diverged, 3) == 1
    constant = np.full_like(x, 0.7)
    assert hellinger(x, constant, 3) == 1
    assert hellinger(constant, constant, 3) == 0
    half = np.stack([x[:, 0], constant[:, 1]], axis=1)
    np.testing.assert_allclose(hellinger(x, half, 3), 0.5, rtol=1e-6)
    tone = np.sin(2 * np.pi * np.arange(200) * np.array([[5], [40]]) / 200).T.astype(np.float32)
    np.testing.assert_allclose(hellinger(tone, tone[:, ::-1], 0), 1, rtol=1e-3)


# ---- prediction error, Lyapunov exponents


@pytest.mark.parametrize("horizon", [1, 20])
def test_prediction_error_is_the_loop(horizon):
    xs = orbit(0, 50)
    matrix = np.array([[0.7, 0.5], [-0.4, 0.6]])
    with jax.enable_x64(True):
        ours = jax.jit(
            lambda xs: prediction_error(lambda z: jnp.tanh(z @ matrix.T), lambda x: 2 * x, lambda z: z / 2, xs, horizon)
        )(xs)
    errors = []
    for t in range(50 - horizon):
        z = 2 * xs[t]
        for _ in range(horizon):
            z = np.tanh(matrix @ z)
        errors.append((z / 2 - xs[t + horizon]) ** 2)
    np.testing.assert_allclose(ours, np.mean(errors), rtol=1e-11)


def test_lyapunov_exponents_of_linear_maps_are_the_logarithms_of_their_factors():
    with jax.enable_x64(True):
        matrix = jnp.array([[1.2, 5.0, -3.0], [0.0, 0.7, 2.0], [0.0, 0.0, 0.01]])
        rotation = 1.1 * jnp.array([[0.6, -0.8], [0.8, 0.6]])
        exponents = jax.jit(lambda z: lyapunov_spectrum(lambda z: matrix @ z, z, 2000))(np.ones(3))
        # The vectors align within a few steps; that start weighs 1 / steps.
        np.testing.assert_allclose(exponents, np.log([1.2, 0.7, 0.01]), atol=5e-3)
        both = jax.jit(lambda z: lyapunov_spectrum(lambda z: rotation @ z, z, 100))(np.ones(2))
        np.testing.assert_allclose(both, np.log(1.1), rtol=1e-12)
        # A single vector must not be a unit vector: here e_1 would never leave its axis.
        diagonal = jnp.diag(jnp.array([0.5, 2.0]))
        one = jax.jit(lambda z: lyapunov_spectrum(lambda z: diagonal @ z, z, 1000, num_exponents=1))(np.ones(2))
        np.testing.assert_allclose(one, [np.log(2)], atol=5e-3)
        singular = jax.jit(lambda z: lyapunov_spectrum(lambda z: z * np.array([0.5, 0.0]), z, 10))(np.ones(2))
        np.testing.assert_allclose(singular, [np.log(0.5), -np.inf], rtol=1e-12)


def test_lyapunov_spectrum_of_the_henon_map():
    def henon(z):
        return jnp.stack([1 - 1.4 * z[0] ** 2 + z[1], 0.3 * z[0]])

    with jax.enable_x64(True):
        every = jax.jit(lambda z: lyapunov_spectrum(henon, z, 20_000, transient=100))(np.array([0.1, 0.1]))
        tenth = jax.jit(lambda z: lyapunov_spectrum(henon, z, 20_000, transient=100, qr_every=10))(np.array([0.1, 0.1]))
        # The Jacobian has determinant -0.3 everywhere.
        np.testing.assert_allclose(every.sum(), np.log(0.3), rtol=1e-10)
        np.testing.assert_allclose(every[0], 0.419, atol=5e-3)  # the literature's figure
        np.testing.assert_allclose(tenth, every, rtol=1e-8)
        largest = jax.jit(jax.vmap(lambda z: lyapunov_spectrum(henon, z, 20_000, num_exponents=1, transient=100)))(
            np.array([[0.1, 0.1], [0.2, 0.1]])
        )
        np.testing.assert_allclose(largest[:, 0], 0.419, atol=5e-3)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: state_space_divergence_binned(x, x, 0), "bins must be at least 1"),
        (lambda x: state_space_divergence_binned(x, x, 50_000), r"bins\^2 below 2\^31"),
        (lambda x: state_space_divergence_binned(x, x, 5, version="matlab"), "version must be one of .*'matlab'"),
        (lambda x: state_space_divergence_binned(x, x[:, :1], 5), "differ in dimension: 2 and 1"),
        (lambda x: state_space_divergence_gmm(jax.random.key(0), x, x, 0.0), "must be positive: sigma2=0.0"),
        (lambda x: state_space_divergence_gmm(jax.random.key(0), x, x, -1.0), "must be positive: sigma2=-1.0"),
        (lambda x: state_space_divergence_gmm(jax.random.key(0), x, x, 1.0, num_samples=0), "num_samples=0"),
        (lambda x: gmm_log_ratio(x, x, x, 0.0), "sigma2=0.0"),
        (lambda x: gmm_log_density(x, x, 1.0, chunk=0), "chunk=0"),
        (lambda x: power_spectrum_hellinger(x, x[:-1], 1), "one shape"),
        (lambda x: smoothed_power_spectrum(x, -1), "sigma=-1"),
        (lambda x: smoothed_power_spectrum(x, 1, padding="wrap"), "padding='wrap'"),
        (lambda x: smoothed_power_spectrum(x[:1], 1), "2 steps or more"),
        (lambda x: prediction_error(lambda z: z, lambda x: x, lambda z: z, x, 0), r"1\.\.199, got 0"),
        (lambda x: prediction_error(lambda z: z, lambda x: x, lambda z: z, x, 200), r"1\.\.199, got 200"),
        (lambda x: lyapunov_spectrum(lambda z: z, x[0], 10, num_exponents=3), r"1\.\.2, got 3"),
        (lambda x: lyapunov_spectrum(lambda z: z, x[0], 10, qr_every=3), "multiple of qr_every"),
        (lambda x: lyapunov_spectrum(lambda z: z, x[0], 0), "multiple of qr_every"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(orbit(0).astype(np.float32))


@pytest.mark.parametrize("version", ["julia", "legacy", "python"])
def test_a_constant_dimension_is_no_reason_for_nan(version):
    x = np.random.default_rng(0).normal(size=(500, 3))
    x[:, 1] = 2.0
    # The tutorial's version drops the first bin of an axis, and here the data stand in the middle of theirs.
    assert float(state_space_divergence_binned(x, x, 4, version=version)) == pytest.approx(0, abs=1e-6)
