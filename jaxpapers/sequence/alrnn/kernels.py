"""Forced orbits of a piecewise-linear map as scans, forward and backward.

The recurrence of all kinds of teacher forcing is, for t = 1..T,

    z_t  = A z~_{t-1} + W phi(z~_{t-1}) + h          the prediction (before forcing)
    z~_t = k_t * z_t + u_t                           the state that runs on: k_t keeps, u_t injects data

and, given the signs of z~_{t-1}, hence the diagonal D_t = phi'(z~_{t-1}), it is affine:

    z~_t = J_t z~_{t-1} + b_t,    J_t = diag(k_t) (A + W D_t),    b_t = k_t * h + u_t.

Three ways to the same orbit: one step after the other; one affine scan when the signs ("symbols") are known;
or Newton's method, which for such a map is an iteration on the signs alone: guess them, scan, read off the
signs, and so on. When the signs repeat the orbit is exact, so it ends after finitely many rounds (the first
t states are exact after t rounds), whatever the guess.

The same iteration is at hand as one on the states, by the general solver of `ops.newton` ("solver"): the same number
of rounds and the same states up to rounding, as long as no iterate overflows. It goes on from the states of the round
before and ends when their residual is down to rounding, where the iteration on signs computes every round from the
signs alone and ends when they repeat: an orbit that a wrong guess sends to infinity does not stop that one.

The adjoint of z_t is affine too, and needs the signs of the forward pass only:

    lambda_t = g_t + k_t * (A + D_{t+1} W^T) lambda_{t+1},    g_t = dl/dz_t,

one reverse scan. The parameters' gradients are sums over time of products with lambda; autodiff would carry
them through the reverse scan, here they are single matrix products after it.

Layout: time first and the batch last, (T, M, B): the step is then W @ z, an (M, M) by (M, B) product with
the batch on the vector lanes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.ops.newton import solve_recurrence
from jaxpapers.ops.scan import affine_scan

# Accelerators would round the factors (TF32, bfloat16); over hundreds of chaotic steps that is another orbit.
HIGHEST = lax.Precision.HIGHEST

METHODS = ("sequential", "newton", "symbols", "solver")

# The residual at which "solver" ends, in units of the precision. A settled orbit of standardised data leaves a few
# units; a sign that is still wrong far more, unless its state is as near to zero.
SOLVER_TOLERANCE = 1024


class PWLMap(NamedTuple):
    """z -> a * z + W phi(z) + h, with phi of slope 1 above 0 and `slopes` below (1 for linear units)."""

    a: Float[Array, "latent"]
    W: Float[Array, "latent latent"]
    h: Float[Array, "latent"]
    slopes: Float[Array, "latent"]


class Forcing(NamedTuple):
    """What happens to a state after its step: z~_t = keep_t * z_t + inject_t, t = 1..T."""

    keep: Float[Array, "time latent"]
    inject: Float[Array, "time latent batch"]


class OrbitInfo(NamedTuple):
    """How an orbit was found, one entry per sequence.

    Attributes:
        iterations: affine scans that were needed (0 for the sequential method).
        converged: whether the signs that the orbit was computed with are its own, and it is finite: then it
            is exact. Of "solver": whether its residual is that of rounding. Always true of the sequential method.
    """

    iterations: Array
    converged: Array


def linearise(
    pwl: PWLMap, forcing: Forcing, positive: Bool[Array, "time latent batch"]
) -> tuple[Float[Array, "time batch latent latent"], Float[Array, "time batch latent"]]:
    """J_t and b_t with z~_t = J_t z~_{t-1} + b_t, given the signs of z~_{t-1}, t = 1..T (Eq. 4).

    This is what a general Newton solver for z~_t = f(z~_{t-1}) asks for: J_t is the exact Jacobian df/dz and
    b_t the remainder f(z) - J_t z, which for a piecewise-linear f depends on z through the signs alone.
    Layout of `ops.scan.affine_scan`.
    """
    slopes = jnp.moveaxis(_slopes(pwl, positive), -1, 1)
    keep = forcing.keep[:, None, :]
    matrices = keep[..., None] * (jnp.diag(pwl.a) + pwl.W * slopes[..., None, :])
    return matrices, keep * pwl.h + jnp.moveaxis(forcing.inject, -1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def forced_orbit(
    method: str,
    max_iterations: int | None,
    pwl: PWLMap,
    z0: Float[Array, "latent batch"],
    forcing: Forcing,
    guess: Bool[Array, "time latent batch"],
) -> tuple[Float[Array, "time latent batch"], Bool[Array, "time latent batch"] | None, OrbitInfo]:
    """Predictions z_1..z_T of the forced recurrence, with its own backward pass (module docstring).

    Reverse mode only, of any order. Gradients reach the map, z0 and the forcing; the signs have none.

    Args:
        method: "sequential", "newton" (on the signs), "symbols" or "solver" (on the states).
        max_iterations: limit on Newton's affine scans; None for T, which always suffices in exact arithmetic.
        pwl: the map.
        z0: the state z~_0.
        forcing: what is kept and injected after each step.
        guess: signs of z~_0..z~_{T-1}: the symbols, or Newton's first guess; the sequential method takes none
            of it.

    Returns:
        The predictions z_t, the signs of z~_{t-1} that they were computed with (None for the sequential
        method: their own), and how they were found.

    Raises:
        ValueError: if the method is unknown or max_iterations is below 1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if method == "sequential":
        states = _sequential(pwl, z0, forcing)
        batch = z0.shape[-1]
        return states, None, OrbitInfo(jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))
    if method == "solver":
        previous, iterations, settled = _solver(pwl, z0, forcing, guess, max_iterations)
        positive = previous > 0
        states = _predict(pwl, previous, positive)
        return states, positive, OrbitInfo(iterations, settled & jnp.all(jnp.isfinite(states), axis=(0, 1)))
    if method == "symbols":
        previous = _given_symbols(pwl, z0, forcing, guess)
        iterations = jnp.ones(z0.shape[-1], jnp.int32)
        positive = guess
    else:
        previous, positive, iterations = _newton(pwl, z0, forcing, guess, max_iterations)
    states = _predict(pwl, previous, positive)
    settled = ~_differ(pwl, positive, previous > 0) & jnp.all(jnp.isfinite(states), axis=(0, 1))
    return states, positive, OrbitInfo(iterations, settled)


def _orbit_forward(method, max_iterations, pwl, z0, forcing, guess):
    # Through the differentiable function itself, so that a second derivative finds this rule again and not
    # the scans, of which Newton's loop has no reverse mode.
    states, positive, info = forced_orbit(method, max_iterations, pwl, z0, forcing, guess)
    return (states, positive, info), (pwl, z0, forcing, states, positive)


def _orbit_backward(method, max_iterations, residuals, cotangents):
    pwl, z0, forcing, states, positive = residuals
    previous = jnp.concatenate([z0[None], _forced(forcing, states)[:-1]])  # z~_0..z~_{T-1}
    if method == "sequential":
        positive = previous > 0
        lambdas = _adjoint_sequential(pwl, forcing, states, cotangents[0])
    else:
        lambdas = _adjoint_scan(pwl, forcing.keep, positive, cotangents[0])
    slopes = _slopes(pwl, positive)
    pulled = _matmul(pwl.W.T, lambdas)
    before = pwl.a[:, None] * lambdas + slopes * pulled  # dl/dz~_0..dl/dz~_{T-1}
    after = jnp.concatenate([before[1:], jnp.zeros_like(before[:1])])
    d_pwl = PWLMap(
        a=jnp.sum(lambdas * previous, axis=(0, 2)),
        W=jnp.einsum("tib,tjb->ij", lambdas, slopes * previous, precision=HIGHEST),
        h=jnp.sum(lambdas, axis=(0, 2)),
        slopes=jnp.sum(jnp.where(positive, 0, pulled * previous), axis=(0, 2)),
    )
    d_forcing = Forcing(keep=jnp.sum(after * states, axis=2), inject=after)
    # Not before[0]: where nobody asks for the forcing's gradient, all the rest of `before` is dead code.
    d_z0 = pwl.a[:, None] * lambdas[0] + slopes[0] * _matmul(pwl.W.T, lambdas[0])
    return d_pwl, d_z0, d_forcing, None


forced_orbit.defvjp(_orbit_forward, _orbit_backward)


def _slopes(pwl: PWLMap, positive: Array) -> Array:
    return jnp.where(positive, 1, pwl.slopes[:, None])


def _predict(pwl: PWLMap, z: Array, positive: Array) -> Array:
    return pwl.a[:, None] * z + _matmul(pwl.W, _slopes(pwl, positive) * z) + pwl.h[:, None]


def _matmul(matrix: Array, columns: Array) -> Array:
    return jnp.matmul(matrix, columns, precision=HIGHEST)


def _forced(forcing: Forcing, states: Array) -> Array:
    """z~_t from z_t, at one time or at all."""
    return forcing.keep[..., None] * states + forcing.inject


def _sequential(pwl: PWLMap, z0: Array, forcing: Forcing) -> Array:
    def body(z, forcing):
        state = _predict(pwl, z, z > 0)
        return _forced(forcing, state), state

    # Not unrolled: XLA:CPU fuses neighbouring steps and then computes what they share twice (slower by a
    # tenth to a third).
    return lax.scan(body, z0, forcing)[1]


def _adjoint_sequential(pwl: PWLMap, forcing: Forcing, states: Array, cotangents: Array) -> Array:
    # The carry is lambda_{t+1} and the signs of z~_t are read off inside: the scan then runs over arrays just
    # as the forward pass left them, without shifted copies (a fifth of the time of a training step).
    transposed = pwl.W.T

    def body(following, inputs):
        forcing, state, cotangent = inputs
        slopes = _slopes(pwl, _forced(forcing, state) > 0)
        after = pwl.a[:, None] * following + slopes * _matmul(transposed, following)
        lambda_ = cotangent + forcing.keep[:, None] * after
        return lambda_, lambda_

    inputs = (forcing, states, cotangents)
    return lax.scan(body, jnp.zeros_like(states[0]), inputs, reverse=True)[1]


def _adjoint_scan(pwl: PWLMap, keep: Array, positive: Array, cotangents: Array) -> Array:
    # lambda_t needs the slopes of step t + 1. Nothing follows the last prediction: the scan starts from zero
    # there, whatever its matrix.
    following = jnp.moveaxis(jnp.roll(_slopes(pwl, positive), -1, axis=0), -1, 1)
    matrices = keep[:, None, :, None] * (jnp.diag(pwl.a) + following[..., None] * pwl.W.T)
    return _dense_scan(matrices, jnp.moveaxis(cotangents, -1, 1), reverse=True)


def _dense_scan(matrices: Array, offsets: Array, start: Array | None = None, *, reverse: bool = False) -> Array:
    """`affine_scan` of (T, B, M, M) and (T, B, M), its states in this module's layout (T, M, B)."""
    states: Any = affine_scan(matrices, offsets, start, structure="dense", reverse=reverse)
    return jnp.moveaxis(states, 1, -1)


def _given_symbols(pwl: PWLMap, z0: Array, forcing: Forcing, positive: Array) -> Array:
    """z~_0..z~_{T-1} under given signs, by one affine scan."""
    matrices, offsets = linearise(pwl, forcing, positive)
    forced = _dense_scan(matrices, offsets, z0.T)  # z~_1..z~_T
    return jnp.concatenate([z0[None], forced[:-1]])


def _differ(pwl: PWLMap, positive: Array, other: Array) -> Bool[Array, "batch"]:
    """Whether two sign patterns of a sequence differ on any unit that is not linear."""
    return jnp.any((positive != other) & (pwl.slopes != 1)[:, None], axis=(0, 1))


def _newton(
    pwl: PWLMap, z0: Array, forcing: Forcing, guess: Array, max_iterations: int | None
) -> tuple[Array, Array, Int[Array, "batch"]]:
    limit = guess.shape[0] if max_iterations is None else max_iterations

    def unsettled(carry):
        _, _, _, changed, rounds = carry
        return jnp.any(changed) & (rounds < limit)

    def again(carry):
        previous, _, iterations, changed, rounds = carry
        positive = previous > 0
        previous = _given_symbols(pwl, z0, forcing, positive)
        iterations = iterations + changed
        return previous, positive, iterations, _differ(pwl, positive, previous > 0), rounds + 1

    batch = z0.shape[-1]
    # A guess enters by its signs alone, so any numbers with these signs start the loop.
    start = jnp.where(guess, 1, -1).astype(z0.dtype).at[0].set(z0)
    carry = (start, guess, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), 0)
    previous, positive, iterations, _, _ = lax.while_loop(unsettled, again, carry)
    return previous, positive, iterations


def _solver(
    pwl: PWLMap, z0: Array, forcing: Forcing, guess: Array, max_iterations: int | None
) -> tuple[Array, Int[Array, "batch"], Bool[Array, "batch"]]:
    """z~_0..z~_{T-1} by the general solver, each sequence by itself, so that it has its own number of iterations."""

    def step(z: Array, forcing: Forcing) -> Array:
        return forcing.keep * _predict(pwl, z[:, None], z[:, None] > 0)[:, 0] + forcing.inject

    def jacobian(z: Array, forcing: Forcing) -> Array:
        slopes = _slopes(pwl, z[:, None] > 0)[:, 0]
        return forcing.keep[:, None] * (jnp.diag(pwl.a) + pwl.W * slopes)

    def solve(z0: Array, inject: Array, guess: Array) -> tuple[Array, Array, Array]:
        # The solver starts from z~_1..z~_T. The sign of z~_0 is known, that of z~_T is not asked for.
        start = jnp.where(jnp.roll(guess, -1, axis=0), 1, -1).astype(z0.dtype)
        solution = solve_recurrence(
            step,
            Forcing(forcing.keep, inject),
            z0,
            structure="dense",
            jacobian=jacobian,
            guess=start,
            max_iterations=len(start) if max_iterations is None else max_iterations,
            tolerance=SOLVER_TOLERANCE * float(jnp.finfo(z0.dtype).eps),
            method="chunked",
        )
        previous = jnp.concatenate([z0[None], solution.states[:-1]])
        return previous, solution.iterations, solution.converged

    return jax.vmap(solve, in_axes=-1, out_axes=(-1, 0, 0))(z0, forcing.inject, guess)


def prefix_products(matrices: Float[Array, "time *batch dim dim"]) -> Float[Array, "time *batch dim dim"]:
    """J_t J_{t-1} .. J_1 for every t: behind Floquet multipliers and finite-time Lyapunov exponents.

    The products grow as fast as the map expands. For long chaotic orbits use `ops.dsr_metrics.lyapunov_spectrum`,
    which renormalises.
    """
    nothing = jnp.zeros(matrices.shape[:-1], matrices.dtype)
    _, products = affine_scan(matrices, nothing, structure="dense", return_products=True)
    return products
