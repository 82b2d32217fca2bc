"""Simulated dynamical systems: Lorenz-63, Roessler and Lorenz-96, by the classical Runge-Kutta method.

A vector field is a function x -> dx/dt of an autonomous system; `rk4` makes one step of it and `integrate` a
trajectory. The simulators draw a start, drop the way to the attractor and return the rest, so that every
synthetic claim of the papers can be checked without a download:

    series, mean, std = standardise(simulate_lorenz63(jax.random.key(0), 100_000))

Everything runs in the precision of the start (float32, or float64 under x64). On a chaotic attractor a
trajectory can be reproduced on one machine only: rounding grows by e every 1.1 time units of Lorenz-63, so
another compiler or precision gives another trajectory of the same attractor, with the same statistics.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

VectorField = Callable[[Array], Array]
Scalar = Float[ArrayLike, ""]


def lorenz63(
    x: Float[Array, "*batch 3"], sigma: Scalar = 10.0, rho: Scalar = 28.0, beta: Scalar = 8.0 / 3.0
) -> Float[Array, "*batch 3"]:
    """Convection in three modes (Lorenz 1963): x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z.

    Fixed points are the origin and C+- = (+-r, +-r, rho - 1), r = sqrt(beta (rho - 1)); the divergence is
    -(sigma + 1 + beta) everywhere.
    """
    x_, y, z = x[..., 0], x[..., 1], x[..., 2]
    return jnp.stack([sigma * (y - x_), x_ * (rho - z) - y, x_ * y - beta * z], axis=-1)


def rossler(x: Float[Array, "*batch 3"], a: Scalar = 0.2, b: Scalar = 0.2, c: Scalar = 5.7) -> Float[Array, "*batch 3"]:
    """Roessler's band (1976): x' = -y - z, y' = x + a y, z' = b + z (x - c).

    Fixed points are (a q, -q, q) with q = (c +- sqrt(c^2 - 4 a b)) / (2 a); the inner one (-) is the spiral
    about which the band turns.
    """
    x_, y, z = x[..., 0], x[..., 1], x[..., 2]
    return jnp.stack([-y - z, x_ + a * y, b + z * (x_ - c)], axis=-1)


def lorenz96(x: Float[Array, "*batch dim"], forcing: Scalar = 8.0) -> Float[Array, "*batch dim"]:
    """A ring of weather (Lorenz 1996): x_i' = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F, indices cyclic.

    Raises:
        ValueError: fewer than 4 variables, where the neighbours coincide.
    """
    if x.shape[-1] < 4:
        raise ValueError(f"lorenz96 needs at least 4 variables, got {x.shape[-1]}")
    following, previous, before = (jnp.roll(x, shift, axis=-1) for shift in (-1, 1, 2))
    return (following - before) * previous - x + forcing


def rk4(vector_field: VectorField, dt: Scalar) -> VectorField:
    """One step of the classical fourth-order Runge-Kutta method as a function x(t) -> x(t + dt).

    The local error is O(dt^5), the error at a fixed time O(dt^4).

    Args:
        vector_field: x -> dx/dt on arrays of any shape.
        dt: step in the system's units of time; negative goes backwards.
    """

    def step(x: Float[Array, "*state"]) -> Float[Array, "*state"]:
        k1 = vector_field(x)
        k2 = vector_field(x + dt / 2 * k1)
        k3 = vector_field(x + dt / 2 * k2)
        k4 = vector_field(x + dt * k3)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


def integrate(
    vector_field: VectorField,
    x0: Float[Array, "*state"],
    dt: Scalar,
    num_steps: int,
    sample_every: int = 1,
) -> Float[Array, "time *state"]:
    """Trajectory of `num_steps` samples from x0, which is its row 0; row k is the state at k sample_every dt.

    Args:
        vector_field: x -> dx/dt on arrays of any shape.
        x0: start; its dtype is the precision of the integration.
        dt: step of the integrator.
        num_steps: rows of the result.
        sample_every: steps of the integrator from one row to the next.

    Raises:
        ValueError: num_steps or sample_every below 1.
    """
    if num_steps < 1 or sample_every < 1:
        raise ValueError(f"num_steps and sample_every must be at least 1, got {num_steps} and {sample_every}")
    step = rk4(vector_field, dt)

    def advance(x: Array, _: None) -> tuple[Array, Array]:
        return lax.fori_loop(0, sample_every, lambda _, x: step(x), x), x

    return lax.scan(advance, x0, length=num_steps)[1]


def simulate_lorenz63(
    key: PRNGKeyArray, num_steps: int, dt: Scalar = 0.01, sample_every: int = 1, transient: int = 1_000
) -> Float[Array, "time 3"]:
    """Trajectory on the Lorenz-63 attractor, as in the AL-RNN benchmarks (dt = 0.01, 1,000 rows dropped).

    Mean (0, 0, 23.56), standard deviation (7.92, 9.01, 8.61); the largest Lyapunov exponent is 0.906 per
    unit of time.

    Args:
        key: draws the start from N(0, I).
        num_steps: rows of the result.
        dt: step of the integrator.
        sample_every: steps of the integrator from one row to the next.
        transient: rows dropped before the first.

    Raises:
        ValueError: num_steps or sample_every below 1, or a negative transient.
    """
    x0 = jax.random.normal(key, (3,))
    return _after_transient(lorenz63, x0, dt, num_steps, sample_every, transient)


def simulate_rossler(
    key: PRNGKeyArray, num_steps: int, dt: Scalar = 0.02, sample_every: int = 4, transient: int = 1_000
) -> Float[Array, "time 3"]:
    """Trajectory on the Roessler attractor, as in the AL-RNN benchmarks (steps of 0.02, rows 0.08 apart).

    Mean (0.18, -0.89, 0.89), standard deviation (5.15, 4.84, 2.84); the largest Lyapunov exponent is 0.071
    per unit of time.

    Args:
        key: draws the start from N(0, I), all but surely in the basin of the attractor.
        num_steps: rows of the result.
        dt: step of the integrator.
        sample_every: steps of the integrator from one row to the next.
        transient: rows dropped before the first.

    Raises:
        ValueError: num_steps or sample_every below 1, or a negative transient.
    """
    x0 = jax.random.normal(key, (3,))
    return _after_transient(rossler, x0, dt, num_steps, sample_every, transient)


def simulate_lorenz96(
    key: PRNGKeyArray,
    num_steps: int,
    num_variables: int = 20,
    forcing: Scalar = 8.0,
    dt: Scalar = 0.01,
    sample_every: int = 1,
    transient: int = 1_000,
) -> Float[Array, "time dim"]:
    """Trajectory on the Lorenz-96 attractor (chaotic at F = 8).

    Args:
        key: draws the start from N(F, 1), about the unstable fixed point x_i = F.
        num_steps: rows of the result.
        num_variables: length of the ring, at least 4.
        forcing: F.
        dt: step of the integrator.
        sample_every: steps of the integrator from one row to the next.
        transient: rows dropped before the first.

    Raises:
        ValueError: fewer than 4 variables, or as `integrate`.
    """
    x0 = jax.random.normal(key, (num_variables,)) + forcing
    field = partial(lorenz96, forcing=forcing)
    return _after_transient(field, x0, dt, num_steps, sample_every, transient)


def _after_transient(
    field: VectorField, x0: Array, dt: Scalar, num_steps: int, sample_every: int, transient: int
) -> Array:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if transient < 0:
        raise ValueError(f"transient must be 0 or more, got {transient}")
    return integrate(field, x0, dt, num_steps + transient, sample_every)[transient:]


def standardise(
    x: Float[Array | np.ndarray, "time dim"],
) -> tuple[Float[Array, "time dim"], Float[Array, "dim"], Float[Array, "dim"]]:
    """Each dimension to mean 0 and standard deviation 1 over time: (x - mean) / std, with mean and std.

    The standard deviation is the population's (divisor: the number of rows). A dimension that does not vary
    becomes 0, with std 1, so that x = standardised * std + mean always holds.

    Args:
        x: series; numpy arrays become JAX arrays, in JAX's default precision.

    Returns:
        The standardised series, the mean and the standard deviation of the dimensions.
    """
    x = jnp.asarray(x)
    mean = x.mean(axis=0)
    std = x.std(axis=0)
    # The mean of equal numbers is off by a few roundings, which then look like a standard deviation.
    varies = std > 8 * jnp.finfo(x.dtype).eps * jnp.abs(mean)
    std = jnp.where(varies, std, 1)
    return jnp.where(varies, (x - mean) / std, 0), mean, std


def delay_embedding(x: Float[Array | np.ndarray, "time"], dim: int, lag: int) -> Float[Array, "rows dim"]:
    """Delay vectors of a scalar series (Takens): row t is (x_t, x_{t+lag}, ..., x_{t+(dim-1) lag}).

    The result has time - (dim - 1) lag rows.

    Args:
        x: scalar series.
        dim: components of a delay vector.
        lag: rows between neighbouring components.

    Raises:
        ValueError: dim or lag below 1, or a series too short for a single delay vector.
    """
    if dim < 1 or lag < 1:
        raise ValueError(f"dim and lag must be at least 1, got dim={dim} and lag={lag}")
    rows = x.shape[0] - (dim - 1) * lag
    if rows < 1:
        raise ValueError(
            f"dim={dim} and lag={lag} need a series of at least {(dim - 1) * lag + 1} rows, got {x.shape[0]}"
        )
    x = jnp.asarray(x)
    return jnp.stack([x[k * lag : k * lag + rows] for k in range(dim)], axis=-1)
