"""Oscillators that are heard by many variates, each with delays of its own: a series in which other variates tell.

x_n(t) = sum_j A_nj s_j(t - d_nj) + noise, with s_j AR(2) processes of unit variance: a test of forecasters that look
across variates, with best linear forecasts in closed form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

DRAWS = 4  # of a key of oscillators: weights, delays, innovations, noise


class Mixture(NamedTuple):
    """Who hears which oscillator, how loudly and how late.

    Attributes:
        weights: A_nj.
        delays: d_nj, steps.
    """

    weights: Float[Array, "variates latents"]
    delays: Int[Array, "variates latents"]


def draw_mixture(
    key: PRNGKeyArray,
    num_variates: int = 64,
    num_latents: int = 8,
    *,
    amplitude: float = 0.3,
    spread: float = 0.3,
    max_delay: int = 12,
) -> Mixture:
    """The mixture of `delayed_oscillators`: A_nj uniform in amplitude (1 -+ spread) / sqrt(J), d_nj in 0..max_delay.

    Raises:
        ValueError: counts below 1; amplitude not above 0; negative spread or delay.
    """
    if num_variates < 1 or num_latents < 1:
        raise ValueError(f"num_variates and num_latents must be at least 1, got {num_variates} and {num_latents}")
    if amplitude <= 0 or spread < 0 or max_delay < 0:
        raise ValueError(
            f"expected amplitude > 0, spread >= 0 and max_delay >= 0; got {amplitude}, {spread} and {max_delay}"
        )
    weight_key, delay_key = jax.random.split(key, DRAWS)[:2]
    shape = (num_variates, num_latents)
    scale = amplitude / np.sqrt(num_latents)
    low, high = scale * (1 - spread), scale * (1 + spread)
    return Mixture(
        jax.random.uniform(weight_key, shape, minval=low, maxval=high),
        jax.random.randint(delay_key, shape, 0, max_delay + 1),
    )


class Oscillators(NamedTuple):
    """s_j(t) = first_j s_j(t-1) + second_j s_j(t-2) + u_j(t), of unit variance.

    Attributes:
        first: 2 r cos(2 pi / P_j).
        second: -r^2.
        innovation: variance of u_j.
    """

    first: Float64[np.ndarray, "latents"]
    second: Float64[np.ndarray, "latents"]
    innovation: Float64[np.ndarray, "latents"]


def oscillators(num_latents: int, radius: float, periods: tuple[float, float]) -> Oscillators:
    """AR(2) processes with periods evenly spaced in the logarithm.

    Args:
        num_latents: J.
        radius: r, below 1: oscillators forget within about 1 / (1 - r) steps.
        periods: the shortest and the longest, in steps, above 2.

    Raises:
        ValueError: no oscillator, a radius outside (0, 1), periods of 2 steps or less.
    """
    if num_latents < 1 or not 0 < radius < 1 or min(periods) <= 2:
        raise ValueError(
            "expected at least one oscillator, 0 < radius < 1 and periods above 2; got "
            f"{num_latents}, {radius} and {periods}"
        )
    first = 2 * radius * np.cos(2 * np.pi / np.geomspace(*periods, num_latents))
    second = np.full(num_latents, -(radius**2))
    # The inverse of an AR(2)'s variance with unit innovations.
    return Oscillators(first, second, (1 + second) * ((1 - second) ** 2 - first**2) / (1 - second))


def delayed_oscillators(
    key: PRNGKeyArray,
    num_steps: int,
    num_variates: int = 64,
    num_latents: int = 8,
    *,
    amplitude: float = 0.3,
    spread: float = 0.3,
    max_delay: int = 12,
    radius: float = 0.998,
    periods: tuple[float, float] = (48.0, 96.0),
    noise: float = 0.1,
) -> Float[Array, "time variates"]:
    """Variates that hear the same few oscillators, each with weights and delays of its own: others know its future.

        x_n(t) = sum_j A_nj s_j(t - d_nj) + noise e_n(t),  s_j(t) = 2 r cos(2 pi / P_j) s_j(t-1) - r^2 s_j(t-2) + u_j(t)

    The AR(2) oscillators s_j have unit variance (see `oscillators`), A and d are those of `draw_mixture` with this key.
    Nearby periods make a variate's own window a poor witness of its oscillators, where noise hides their differences.

    Args:
        key: draws weights, delays, innovations and noise.
        num_steps: rows.
        num_variates: N.
        num_latents: J.
        amplitude: standard deviation of a variate without noise, where all its weights are the mean ones.
        spread: of the weights, relative to their mean.
        max_delay: delays are drawn from 0..max_delay.
        radius: r, below 1.
        periods: the shortest and the longest, in steps, above 2.
        noise: standard deviation of e.

    Raises:
        ValueError: num_steps below 1, negative noise; as `draw_mixture` and `oscillators`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    mixture = draw_mixture(key, num_variates, num_latents, amplitude=amplitude, spread=spread, max_delay=max_delay)
    first, second, innovation = oscillators(num_latents, radius, periods)
    drive_key, noise_key = jax.random.split(key, DRAWS)[2:]
    transient = int(np.ceil(7 / (1 - radius)))  # r^transient is below 1e-3
    rows = transient + max_delay + num_steps

    def step(
        state: tuple[Float[Array, "latents"], Float[Array, "latents"]], drive: Float[Array, "latents"]
    ) -> tuple[tuple[Float[Array, "latents"], Float[Array, "latents"]], Float[Array, "latents"]]:
        before, last = state
        new = first * last + second * before + drive
        return (last, new), new

    drive = jax.random.normal(drive_key, (rows, num_latents)) * np.sqrt(innovation)
    _, latents = lax.scan(step, (jnp.zeros(num_latents), jnp.zeros(num_latents)), drive)
    latents = latents[transient:]

    def variate(weights: Float[Array, "latents"], delays: Int[Array, "latents"]) -> Float[Array, "time"]:
        late = jax.vmap(lambda j, d: lax.dynamic_slice(latents, (max_delay - d, j), (num_steps, 1))[:, 0])
        return weights @ late(jnp.arange(num_latents), delays)

    clean = jax.vmap(variate, out_axes=1)(*mixture)
    return clean + noise * jax.random.normal(noise_key, clean.shape)
