"""Delayed oscillators: their variance, recurrences, delays and noise; what is refused."""

import jax
import numpy as np
import pytest

from jaxpapers.data.oscillators import delayed_oscillators, draw_mixture, oscillators

MIX = {"num_variates": 5, "num_latents": 3, "max_delay": 4, "amplitude": 1.0, "spread": 0.8}
OPTIONS = MIX | {"radius": 0.95, "periods": (4.0, 24.0)}


@pytest.fixture(scope="module")
def clean():
    return np.asarray(jax.jit(lambda key: delayed_oscillators(key, 20_000, noise=0.0, **OPTIONS))(jax.random.key(0)))


def test_variates_have_the_variance_of_their_weights(clean):
    assert clean.shape == (20_000, 5)
    weights, delays = draw_mixture(jax.random.key(0), **MIX)
    assert ((weights * np.sqrt(3) >= 0.2) & (weights * np.sqrt(3) <= 1.8)).all()
    assert set(np.ravel(delays).tolist()) <= set(range(5))
    # About 20,000 / (2 / (1 - r)) = 500 independent samples.
    np.testing.assert_allclose(clean.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(clean.std(axis=0), np.linalg.norm(weights, axis=1), rtol=0.15)


def test_variates_obey_the_recurrences_of_their_oscillators(clean):
    # All three characteristic polynomials leave sums of five innovations each, which are uncorrelated from lag 5 on
    # (here 9, for the delays); with one of them left out its oscillator stays.
    filters = [np.array([1, -2 * 0.95 * np.cos(2 * np.pi / period), 0.95**2]) for period in np.geomspace(4, 24, 3)]

    def remembered(column, chosen):
        for j in chosen:
            column = np.convolve(column, filters[j], mode="valid")
        return max(abs(np.corrcoef(column[lag:], column[:-lag])[0, 1]) for lag in range(9, 14))

    for column in clean.T:
        assert remembered(column, (0, 1, 2)) < 0.04  # five standard errors of 20,000 numbers
    for left_out in range(3):
        chosen = [j for j in range(3) if j != left_out]
        assert max(remembered(column, chosen) for column in clean.T) > 0.1


def test_delays_and_weights_are_those_of_the_mixture():
    options = MIX | {"num_latents": 1}
    key = jax.random.key(3)
    weights, delays = (np.asarray(part)[:, 0] for part in draw_mixture(key, **options))
    x = np.asarray(jax.jit(lambda key: delayed_oscillators(key, 50, noise=0.0, radius=0.9, **options))(key)) / weights
    assert len(set(delays.tolist())) > 1
    for n in range(1, 5):
        lag = delays[n] - delays[0]
        ahead, behind = (0, n) if lag >= 0 else (n, 0)
        np.testing.assert_allclose(x[abs(lag) :, behind], x[: 50 - abs(lag), ahead], atol=1e-5)  # float32


def test_oscillators_have_unit_variance():
    first, second, innovation = oscillators(4, 0.95, (5.0, 40.0))
    # The sum of the squared impulse responses, which have died out after 400 steps: 0.95^400 = 1e-9.
    for a1, a2, q in zip(first, second, innovation, strict=True):
        response = [1.0, a1]
        while len(response) < 400:
            response.append(a1 * response[-1] + a2 * response[-2])
        np.testing.assert_allclose(q * np.sum(np.square(response)), 1, rtol=1e-6)


def test_noise_is_added_and_white():
    draw = jax.jit(lambda key: [delayed_oscillators(key, 4000, noise=noise, **OPTIONS) for noise in (0.0, 0.5)])
    clean, noisy = map(np.asarray, draw(jax.random.key(1)))
    noise = noisy - clean
    np.testing.assert_allclose(noise.std(), 0.5, atol=0.01)  # of 20,000 numbers
    np.testing.assert_allclose(np.mean(noise[1:] * noise[:-1]), 0, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_variates": 0}, "num_variates and num_latents must be at least 1, got 0 and 8"),
        ({"amplitude": 0.0}, "amplitude > 0"),
        ({"spread": -0.1}, "spread >= 0"),
        ({"max_delay": -1}, "max_delay >= 0"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"radius": 1.0}, "radius < 1"),
        ({"periods": (2.0, 9.0)}, "periods above 2"),
    ],
)
def test_impossible_oscillators_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        delayed_oscillators(jax.random.key(0), **({"num_steps": 10} | options))
