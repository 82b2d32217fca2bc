"""Simulators: against scipy's adaptive integrator, closed forms, and the authors' files where at hand."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxpapers.data.download import find
from jaxpapers.data.dynamics import (
    delay_embedding,
    integrate,
    lorenz63,
    lorenz96,
    rk4,
    rossler,
    simulate_lorenz63,
    simulate_lorenz96,
    simulate_rossler,
    standardise,
)
from jaxpapers.data.series import ALRNN_SERIES, alrnn_series


def lorenz63_numpy(_, s):
    x, y, z = s
    return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z


def rossler_numpy(_, s):
    x, y, z = s
    return -y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)


def lorenz96_numpy(_, s):
    n = len(s)
    return [(s[(i + 1) % n] - s[i - 2]) * s[i - 1] - s[i] + 8 for i in range(n)]


SYSTEMS: dict[str, tuple[Callable, Callable, list[float]]] = {
    "lorenz63": (lorenz63, lorenz63_numpy, [1.0, 2.0, 25.0]),
    "rossler": (rossler, rossler_numpy, [-3.0, 2.0, 0.5]),
    "lorenz96": (lorenz96, lorenz96_numpy, [8.0, 7.5, 8.2, 6.0, 9.0]),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_rk4_is_of_fourth_order_and_agrees_with_scipy(name):
    field, oracle, start = SYSTEMS[name]
    exact = solve_ivp(oracle, (0, 1), start, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    with jax.enable_x64(True):
        # dt is traced and the number of steps the largest, so that one compilation serves all three.
        solve = jax.jit(lambda dt: integrate(field, jnp.asarray(start), dt, 401))
        errors = [np.abs(np.asarray(solve(1 / n))[n] - exact).max() for n in (100, 200, 400)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 4, atol=0.25)  # the next term of the error is O(dt) smaller
    assert errors[-1] < 1e-5  # measured: 5e-6 for Lorenz-96, less for the others


def test_row_0_is_the_start_and_rows_are_sample_every_steps_apart():
    with jax.enable_x64(True):
        x0 = jnp.asarray([1.0, 2.0, 25.0])
        fine = jax.jit(lambda x: integrate(lorenz63, x, 0.01, 41))(x0)
        coarse = jax.jit(lambda x: integrate(lorenz63, x, 0.01, 11, sample_every=4))(x0)
        step = jax.jit(rk4(lorenz63, 0.01))
        np.testing.assert_array_equal(fine[0], x0)
        np.testing.assert_allclose(fine[2], step(step(x0)), rtol=1e-14)
        np.testing.assert_allclose(coarse, fine[::4], rtol=1e-12)  # the same steps, compiled twice


def test_fields_vanish_at_their_fixed_points():
    with jax.enable_x64(True):
        r = np.sqrt(8 / 3 * 27)
        points = jnp.asarray([[0, 0, 0], [r, r, 27], [-r, -r, 27]])
        np.testing.assert_allclose(jax.jit(lorenz63)(points), 0, atol=1e-13)  # rounding of numbers up to 230
        np.testing.assert_allclose(jax.jit(rk4(lorenz63, 0.01))(points), points, rtol=1e-14, atol=1e-14)
        q = (5.7 + np.array([-1, 1]) * np.sqrt(5.7**2 - 0.16)) / 0.4
        np.testing.assert_allclose(jax.jit(rossler)(jnp.stack([0.2 * q, -q, q], axis=1)), 0, atol=1e-13)
        np.testing.assert_array_equal(jax.jit(partial(lorenz96, forcing=3.5))(jnp.full(6, 3.5)), 0)


STATES = np.random.default_rng(0).uniform(-30, 30, size=(50, 5))


def test_divergences():
    """Div f: -(sigma + 1 + beta) for Lorenz-63, a + x - c for Roessler, -n for Lorenz-96."""
    with jax.enable_x64(True):
        divergence = lambda field, x: jax.jit(jax.vmap(lambda x: jnp.trace(jax.jacfwd(field)(x))))(x)  # noqa: E731
        np.testing.assert_allclose(divergence(lorenz63, STATES[:, :3]), -41 / 3, rtol=1e-12)
        np.testing.assert_allclose(divergence(rossler, STATES[:, :3]), 0.2 + STATES[:, 0] - 5.7, rtol=1e-12)
        np.testing.assert_allclose(divergence(lorenz96, STATES), -5, rtol=1e-12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_fields_by_their_components_one_or_many_states_at_a_time(name):
    field, oracle, start = SYSTEMS[name]
    states = STATES[:, : len(start)]
    oracle_fields = np.array([oracle(0, state) for state in states])
    with jax.enable_x64(True):
        # Terms reach 30 * 30, so that 1e-12 is ten roundings.
        np.testing.assert_allclose(jax.jit(field)(states), oracle_fields, atol=1e-12)
        np.testing.assert_allclose(jax.jit(field)(states[0]), oracle_fields[0], atol=1e-12)


def test_symmetry_of_lorenz63_and_energy_of_lorenz96():
    with jax.enable_x64(True):
        x = jnp.asarray(STATES[:, :3])
        mirror = jnp.asarray([-1.0, -1.0, 1.0])
        np.testing.assert_array_equal(lorenz63(mirror * x), mirror * lorenz63(x))
        # Advection conserves energy: x . x' = -|x|^2 + F sum x, whose terms reach 30^3.
        x = jnp.asarray(STATES)
        power = (x * lorenz96(x)).sum(axis=1)
        np.testing.assert_allclose(power, -(x**2).sum(axis=1) + 8 * x.sum(axis=1), atol=1e-9)


def test_volumes_shrink_at_the_rate_of_the_divergence():
    with jax.enable_x64(True):
        flow = jax.jit(jax.jacfwd(lambda x: integrate(lorenz63, x, 0.002, 251)[-1]))
        volume = np.linalg.det(flow(jnp.asarray([1.0, 2.0, 25.0])))
        # Error of RK4 at dt = 0.002 is about 1e-8; the determinant cancels three digits (stretching by 20).
        np.testing.assert_allclose(volume, np.exp(-41 / 3 * 0.5), rtol=1e-5)


def test_gradients_flow_backwards_through_a_trajectory():
    with jax.enable_x64(True):
        end = jax.jit(lambda rho: integrate(partial(lorenz63, rho=rho), jnp.ones(3), 0.01, 26, 2)[-1].sum())
        gradient = jax.jit(jax.grad(end))(28.0)
        h = 1e-5
        np.testing.assert_allclose(gradient, (end(28.0 + h) - end(28.0 - h)) / (2 * h), rtol=1e-7)


def test_the_start_decides_the_precision():
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(lambda x: integrate(rossler, x, 0.02, 3), jnp.ones(3, dtype)).dtype == dtype
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            for simulate in (simulate_lorenz63, simulate_rossler, simulate_lorenz96):
                shape = jax.eval_shape(partial(simulate, num_steps=3, transient=0), jax.random.key(0))
                assert shape.dtype == dtype


CARD = {  # the AL-RNN card's "Generators": its figures are of one series each, rounded to two digits
    "lorenz63": (simulate_lorenz63, [0, 0, 23.5], [7.91, 9.03, 8.70]),
    "rossler": (simulate_rossler, [0.18, -0.87, 0.88], [5.14, 4.83, 2.86]),
}


@pytest.fixture(scope="module", params=CARD)
def simulated(request):
    simulate, mean, std = CARD[request.param]
    run = jax.jit(lambda key: standardise(simulate(key, 100_000)))
    return request.param, run(jax.random.key(0)), np.asarray(mean), np.asarray(std)


def test_statistics_of_the_attractors_are_the_cards(simulated):
    name, (z, mean, std), card_mean, card_std = simulated
    # Over 64 seeds the means scatter by (0.24, 0.24, 0.03) and (0.001, 0.004, 0.004), the standard deviations
    # by less than 0.4 %; the card's own 8.70 is 1.1 % above the mean of the seeds.
    tolerance = np.asarray([1.0, 1.0, 0.12]) if name == "lorenz63" else 0.03
    assert np.all(np.abs(mean - card_mean) < tolerance)
    np.testing.assert_allclose(std, card_std, rtol=0.015)
    z = np.asarray(z, np.float64)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=1e-6)


def test_histograms_are_those_of_the_authors_series(simulated):
    name, (z, *_), _, _ = simulated
    if find(ALRNN_SERIES[name].file) is None:
        pytest.skip(f"{ALRNN_SERIES[name].file.name} is not in $JAXPAPERS_DATA")
    theirs = alrnn_series(name)
    for dim in range(3):
        edges = np.linspace(theirs[:, dim].min() - 0.2, theirs[:, dim].max() + 0.2, 31)
        counts = [np.histogram(series[:, dim], edges)[0] / len(series) for series in (np.asarray(z), theirs)]
        distance = np.abs(counts[0] - counts[1]).sum() / 2
        # Total variation between them over 12 seeds: at most 0.048 (Lorenz, whose lobes are visited unevenly
        # within 1,000 units of time) and 0.015 (Roessler).
        assert distance < (0.1 if name == "lorenz63" else 0.03)


def test_the_authors_lorenz_series_obeys_our_field():
    if find(ALRNN_SERIES["lorenz63"].file) is None:
        pytest.skip("alrnn/lorenz63.npy is not in $JAXPAPERS_DATA")
    series = alrnn_series("lorenz63").astype(np.float64)
    velocity = (series[2:, 0] - series[:-2, 0]) / 0.02
    design = np.stack([series[1:-1, 0], series[1:-1, 1], np.ones(len(velocity))], axis=1)
    on_x, on_y, _ = np.linalg.lstsq(design, velocity, rcond=None)[0]
    # x' = 10 (y - x) in units of the standard deviations: coefficients -10 and 10 std_y / std_x. Central
    # differences at dt = 0.01 and the 0.1 % scatter of the standard deviations leave less than 1 %.
    np.testing.assert_allclose([on_x, on_y], [-10, 10 * 9.01 / 7.92], rtol=0.01)


def test_lorenz96_settles_on_its_attractor():
    run = jax.jit(lambda key: simulate_lorenz96(key, 4_000, num_variables=20))
    x = np.asarray(run(jax.random.key(0)), np.float64)
    # On average x . x' = 0, so <x^2> = F <x>; known at F = 8: <x> = 2.3 to 2.4, std 3.6.
    np.testing.assert_allclose((x**2).mean(), 8 * x.mean(), rtol=0.02)  # ends of 40 units of time
    np.testing.assert_allclose([x.mean(), x.std()], [2.35, 3.64], rtol=0.05)


@pytest.mark.parametrize("simulate", [simulate_lorenz63, simulate_rossler, simulate_lorenz96])
def test_simulators_are_functions_of_the_key(simulate):
    keys = jnp.stack([jax.random.key(seed) for seed in (0, 0, 1)])
    first, again, other = jax.jit(jax.vmap(partial(simulate, num_steps=5, transient=20)))(keys)
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other).any()


def test_the_transient_is_dropped_from_the_front():
    run = lambda *sizes: jax.jit(lambda key: simulate_rossler(key, sizes[0], transient=sizes[1]))  # noqa: E731
    part, whole = run(5, 20)(jax.random.key(0)), run(25, 0)(jax.random.key(0))
    np.testing.assert_allclose(part, whole[20:], rtol=1e-5, atol=1e-5)  # 20 rows amplify rounding little


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integrate(rossler, jnp.ones(3), 0.1, 0), "num_steps .* got 0 and 1"),
        (lambda: integrate(rossler, jnp.ones(3), 0.1, 2, 0), "sample_every .* got 2 and 0"),
        (lambda: simulate_lorenz63(jax.random.key(0), 5, transient=-1), "transient .* got -1"),
        (lambda: lorenz96(jnp.ones(3)), "at least 4 variables, got 3"),
        (lambda: delay_embedding(jnp.ones(5), 0, 1), "dim=0"),
        (lambda: delay_embedding(jnp.ones(5), 2, 0), "lag=0"),
        (lambda: delay_embedding(jnp.ones(6), 3, 3), "at least 7 rows, got 6"),
    ],
)
def test_impossible_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("offset", [0.0, 3e3])
def test_standardise_keeps_its_digits_in_float32(offset):
    x = (offset + np.random.default_rng(0).normal(size=(50_000, 2)) * [0.5, 20]).astype(np.float32)
    z, mean, std = jax.jit(standardise)(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(std, exact.std(axis=0), rtol=1e-5)
    # The mean itself is rounded to 2^-24 of the offset: 2e-4, in units of the smaller std 0.5.
    np.testing.assert_allclose(np.asarray(z, np.float64).mean(axis=0), 0, atol=1e-6 + offset * 2**-23 / 0.5)
    np.testing.assert_allclose(z * std + mean, x, rtol=1e-6, atol=1e-5)


def test_standardise_leaves_a_constant_dimension_at_zero():
    x = np.stack([np.full(1000, 0.1, np.float32), np.arange(1000, dtype=np.float32)], axis=1)
    z, mean, std = jax.jit(standardise)(x)
    np.testing.assert_array_equal(z[:, 0], 0)
    assert std[0] == 1
    np.testing.assert_allclose(mean[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(z[[0, -1], 1], np.array([-1, 1]) * np.sqrt(3), rtol=2e-3)  # a uniform's ends
    with jax.enable_x64(True):
        assert standardise(x.astype(np.float64))[0].dtype == jnp.float64


@pytest.mark.parametrize(("dim", "lag", "time"), [(1, 5, 6), (2, 1, 9), (4, 3, 20), (3, 4, 9)])
def test_delay_embedding_by_its_indices(dim, lag, time):
    x = np.random.default_rng(0).normal(size=time).astype(np.float32)
    embedded = delay_embedding(x, dim, lag)
    rows = time - (dim - 1) * lag
    oracle = np.array([[x[t + k * lag] for k in range(dim)] for t in range(rows)])
    np.testing.assert_array_equal(embedded, oracle)
