"""Travelling waves: the limit cycle, and the field against a plain numpy sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.data.waves import noisy_wave_fields, simulate_amplitudes, stuart_landau, wave_field


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


def test_simulations_start_in_the_annulus_and_their_noise_is_white():
    a = simulate_amplitudes(jax.random.key(0), 400, 2)
    radius = np.abs(a[:, 0])
    assert radius.min() >= 0.2
    assert radius.max() <= 1.2
    np.testing.assert_allclose(radius.mean(), 0.7, atol=4 * 0.29 / 20)  # four standard errors
    np.testing.assert_allclose(np.mean(a[:, 0] / radius), 0, atol=4 / 20)
    fields = np.asarray(noisy_wave_fields(jax.random.key(1), a[:40], noise=0.5, channels=2))
    assert fields.shape == (40, 2, 16, 16, 2)
    clean = np.stack([wave_field(a[:40]), wave_field(1j * a[:40])], axis=-1)
    noise = (fields - clean).reshape(-1)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.5], atol=0.01)  # of 41,000 numbers
    np.testing.assert_allclose(np.mean(noise[1:] * noise[:-1]), 0, atol=0.01)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_trajectories must be at least 1, got 0"):
        simulate_amplitudes(jax.random.key(0), 0, 5)
    with pytest.raises(ValueError, match="needs channels >= 1 and noise >= 0, got 0"):
        noisy_wave_fields(jax.random.key(0), jnp.ones(2, complex), channels=0)
