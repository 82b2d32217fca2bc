"""Travelling waves behind a cylinder-like wake: Stuart-Landau amplitude and the field it carries."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray


def stuart_landau(
    a0: Complex[Array, "*batch"],
    num_steps: int,
    growth: float = 0.1,
    frequency: float = 2 * np.pi / 20,
    shear: float = 0.3,
    substeps: int = 10,
) -> Complex[Array, "*batch time"]:
    """dA/dt = growth (1 - |A|^2) A + i w (1 + shear (1 - |A|^2)) A by Euler; row 0 is the start, one row a frame.

    Raises:
        ValueError: num_steps or substeps below 1.
    """
    if num_steps < 1 or substeps < 1:
        raise ValueError(f"num_steps and substeps must be at least 1, got {num_steps} and {substeps}")

    def euler(_: Array | int, a: Array) -> Array:
        excess = 1 - jnp.square(jnp.abs(a))
        return a + a * (growth * excess + 1j * frequency * (1 + shear * excess)) / substeps

    def frame(a: Array, _: None) -> tuple[Array, Array]:
        return lax.fori_loop(0, substeps, euler, a), a

    return jnp.moveaxis(lax.scan(frame, a0, length=num_steps)[1], 0, -1)


def wave_field(a: Complex[Array, "*shape"], size: int = 16) -> Float[Array, "*shape size size"]:
    """Field (Y, X) of amplitude A: three harmonics travelling in X, X in [0, 2 pi), Y in [-1, 1], and a mean flow."""
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    x = jnp.arange(size) * (2 * np.pi / size)
    y = jnp.linspace(-1, 1, size)[:, None]
    a = a[..., None, None]
    field = 0.3 * jnp.exp(-jnp.square(y)) * jnp.square(jnp.abs(a))
    for m in (1, 2, 3):
        envelope = jnp.exp(-jnp.square(y / (0.5 + 0.1 * m))) * (1 + 0.05 * x) * (y if m == 2 else 1)
        field = field + 0.6 ** (m - 1) * jnp.real(a**m * jnp.exp(-2j * m * x)) * envelope
    return field


def noisy_wave_fields(
    key: PRNGKeyArray, a: Complex[Array, "*shape"], size: int = 16, noise: float = 0.01, channels: int = 1
) -> Float[Array, "*shape size size channels"]:
    """Fields of amplitude A and white noise; channel c is a phase of c pi/2 ahead.

    Raises:
        ValueError: size below 2, channels below 1, or negative noise.
    """
    if channels < 1 or noise < 0:
        raise ValueError(f"needs channels >= 1 and noise >= 0, got {channels} and {noise}")
    fields = jnp.stack([wave_field(1j**channel * a, size) for channel in range(channels)], axis=-1)
    return fields + noise * jax.random.normal(key, fields.shape)


def simulate_amplitudes(
    key: PRNGKeyArray, num_trajectories: int, num_steps: int
) -> Complex[Array, "trajectories time"]:
    """Amplitudes from |A(0)| ~ U(0.2, 1.2) and a random phase.

    Raises:
        ValueError: num_trajectories or num_steps below 1.
    """
    if num_trajectories < 1:
        raise ValueError(f"num_trajectories must be at least 1, got {num_trajectories}")
    radius_key, phase_key = jax.random.split(key)
    radius = jax.random.uniform(radius_key, (num_trajectories,), minval=0.2, maxval=1.2)
    phase = jax.random.uniform(phase_key, (num_trajectories,), maxval=2 * np.pi)
    return stuart_landau(radius * jnp.exp(1j * phase), num_steps)
