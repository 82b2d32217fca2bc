"""Travelling waves: the limit cycle, and the field against a plain numpy sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.data.waves import simulate_waves, stuart_landau, wave_field


def test_amplitude_settles_on_the_unit_circle():
    a = np.asarray(jax.jit(lambda a: stuart_landau(a, 120))(jnp.asarray([0.2 + 0j, 1.2j])))
    # Euler with w h = 0.03 shifts the radius by about w^2 h / (4 growth) = 0.025.
    np.testing.assert_allclose(np.abs(a[:, -1]), 1, atol=0.04)


def test_field_is_the_sum_of_its_harmonics():
    a = 0.7 + 0.4j
    x, y = 2 * np.pi * 5 / 16, -1 + 2 * 3 / 15
    expected = 0.3 * np.exp(-(y**2)) * abs(a) ** 2
    for m in (1, 2, 3):
        term = 0.6 ** (m - 1) * (a**m * np.exp(-2j * m * x)).real * np.exp(-((y / (0.5 + 0.1 * m)) ** 2))
        expected += term * (1 + 0.05 * x) * (y if m == 2 else 1)
    np.testing.assert_allclose(wave_field(jnp.asarray(a))[3, 5], expected, atol=1e-6)  # float32


def test_simulation_is_pure_and_refuses_bad_input():
    first, second = (simulate_waves(jax.random.key(0), 2, 5) for _ in range(2))
    assert first.shape == (2, 5, 16, 16)
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="num_trajectories"):
        simulate_waves(jax.random.key(0), 0, 5)
