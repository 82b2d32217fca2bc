"""Training an AL-RNN: teacher forcing in all its forms, the loss, the regularisers.

Windows are xs (..., T + 1, N): x_0 gives the initial state, x_1..x_T are predicted. Time is the axis before
the last everywhere outside the kernels, and any axes before it are batch.

The recipe (appendix and code): uniformly drawn windows of one long trajectory, 50 batches of 16 to an epoch,
`add_noise` afresh on each; RAdam with a rate that decays exponentially from epoch to epoch; no clipping, no weight
decay. Every 25 epochs a free run (`generate`) of the length of the data is judged by D_stsp (and D_H, prediction
error), and the checkpoint with the smallest D_stsp is kept. P is chosen by a sweep, P = 0, 1, 2, ..: the one where
D_stsp drops and then levels off; or by leaky units with trained slopes under `slope_penalty`, counting those that
stay nonlinear.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpapers.sequence.alrnn.kernels import Forcing, OrbitInfo, PWLMap, forced_orbit
from jaxpapers.sequence.alrnn.model import (
    ALRNNParams,
    AnyArray,
    NumPWL,
    check_num_pwl,
    known_number,
    negative_slopes,
)

FORCED = ("readouts", "state")


def teacher_forced(
    params: ALRNNParams,
    xs: Float[AnyArray, "*batch window observed"],
    tau: int | Int[Array, ""],
    alpha: float | int | Float[Array, ""] = 1.0,
    *,
    num_pwl: NumPWL,
    forced: str = "readouts",
    method: str = "sequential",
    symbols: Shaped[AnyArray, "*batch time pwl"] | None = None,
    max_iterations: int | None = None,
) -> tuple[
    Float[Array, "*batch time observed"],
    Float[Array, "*batch time latent"],
    OrbitInfo,
]:
    """Run the model along a window of data that is fed in every tau steps (Sec. 3).

    z~_0 = [x_0; L x_0]; for t = 1..T: z_t = step(z~_{t-1}), the prediction is z_t[:N], and z~_t = z_t except
    when t is a multiple of tau:

    - forced="readouts": the first N units become alpha x_t + (1 - alpha) z_t[:N], the others run on. With
      alpha = 1 this is identity (sparse) teacher forcing, the paper's setting: no gradient passes the
      replaced entries.
    - forced="state": the whole state becomes alpha [x_t; L x_t] + (1 - alpha) z_t. With tau = 1 this is
      generalised teacher forcing (Hess et al. 2023), which damps every step by 1 - alpha.

    Args:
        params: the model.
        xs: windows of T + 1 observations.
        tau: forcing interval; beyond T nothing is forced.
        alpha: forcing strength, 0 to 1.
        num_pwl: P.
        forced: "readouts" or "state".
        method: "sequential"; "newton", the iteration on the symbols; "solver", the same on the states, by the
            general solver of `ops.newton` (see kernels); or "symbols", one affine scan under given symbols. Values
            and gradients agree where the info says converged. Newton pays on an accelerator, for long windows and
            strong forcing; on a CPU the sequential scan wins.
        symbols: the bits of z~_0..z~_{T-1}; needed by "symbols", and a first guess to "newton" and "solver" (by
            default the bits of [x_t; L x_t]).
        max_iterations: limit on Newton's iterations; None for T, which always suffices in exact arithmetic.

    Returns:
        The predictions x^_1..x^_T, the states z_1..z_T before forcing, and how they were found.

    Raises:
        ValueError: if P does not fit (see `check_num_pwl`), tau < 1, alpha is outside [0, 1], a window has
            fewer than 2 observations, a mode is unknown, symbols are missing, misplaced or of a wrong shape,
            or max_iterations < 1.
    """
    if (symbols is None and method == "symbols") or (symbols is not None and method == "sequential"):
        raise ValueError(f"method {method!r} {'needs' if symbols is None else 'takes no'} symbols")
    problem = forced_problem(params, xs, tau, alpha, num_pwl=num_pwl, forced=forced)
    guess = _first_guess(params, xs, symbols, num_pwl)
    columns, _, info = forced_orbit(method, max_iterations, *problem, guess)

    batch = xs.shape[:-2]
    info = OrbitInfo(info.iterations.reshape(batch), info.converged.reshape(batch))
    return _rows(columns[:, : xs.shape[-1]], batch), _rows(columns, batch), info


def forcing_loss(
    params: ALRNNParams,
    xs: Float[AnyArray, "*batch window observed"],
    tau: int | Int[Array, ""],
    alpha: float | int | Float[Array, ""] = 1.0,
    *,
    num_pwl: NumPWL,
    forced: str = "readouts",
    method: str = "sequential",
    max_iterations: int | None = None,
) -> Float[Array, ""]:
    """Mean of (x^_t - x_t)^2 over batch, t = 1..T and dimensions, with the unforced predictions (Sec. 3).

    Arguments and errors are those of `teacher_forced`.
    """
    predictions, _, _ = teacher_forced(
        params,
        xs,
        tau,
        alpha,
        num_pwl=num_pwl,
        forced=forced,
        method=method,
        max_iterations=max_iterations,
    )
    return jnp.mean(jnp.square(predictions - xs[..., 1:, :]))


def forced_problem(
    params: ALRNNParams,
    xs: Float[AnyArray, "*batch window observed"],
    tau: int | Int[Array, ""],
    alpha: float | int | Float[Array, ""] = 1.0,
    *,
    num_pwl: NumPWL,
    forced: str = "readouts",
) -> tuple[PWLMap, Float[Array, "latent flat_batch"], Forcing]:
    """The recurrence behind `teacher_forced`: the map, the initial states, what is kept and injected.

    With `kernels.linearise` it gives a general Newton solver all it needs: z~_t = keep_t * f(z~_{t-1}) +
    inject_t, its Jacobian and its remainder. Batch axes are flattened and last (see kernels).

    Raises:
        ValueError: as `teacher_forced`.
    """
    latent_dim, observed_dim = params.a.shape[0], params.L.shape[1]
    if xs.ndim < 2 or xs.shape[-2] < 2 or xs.shape[-1] != observed_dim:
        raise ValueError(f"windows must be (..., T + 1 >= 2, {observed_dim}), got {xs.shape}")
    check_num_pwl(num_pwl, latent_dim, observed_dim)
    if forced not in FORCED:
        raise ValueError(f"forced must be one of {FORCED}, got {forced!r}")
    if (known := known_number(tau)) is not None and known < 1:
        raise ValueError(f"tau must be at least 1, got {tau}")
    if (known := known_number(alpha)) is not None and not 0 <= known <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")

    a, W, h, L = map(jnp.asarray, (params.a, params.W, params.h, params.L))
    columns = _columns(xs)
    z0 = jnp.concatenate([columns[0], L @ columns[0]])
    if forced == "readouts":
        data = jnp.pad(columns[1:], ((0, 0), (0, latent_dim - observed_dim), (0, 0)))
        units = jnp.arange(latent_dim) < observed_dim
    else:
        data = jnp.concatenate([columns[1:], L @ columns[1:]], axis=1)
        units = jnp.ones(latent_dim, bool)
    # x_0 is the initial state, so data come in after the predictions of x_tau, x_2tau, ...
    times = jnp.arange(1, columns.shape[0])
    weight = jnp.where((times % tau == 0)[:, None] & units, alpha, 0).astype(z0.dtype)
    slopes = negative_slopes(num_pwl, latent_dim, params.slopes, a.dtype)
    return PWLMap(a, W, h, slopes), z0, Forcing(keep=1 - weight, inject=weight[..., None] * data)


def _columns(xs: AnyArray) -> Array:
    """(..., time, dim) as (time, dim, flattened batch), the kernels' layout."""
    xs = jnp.asarray(xs)
    return jnp.moveaxis(xs.reshape(-1, *xs.shape[-2:]), 0, -1)


def _rows(columns: Array, batch: tuple[int, ...]) -> Array:
    """The way back: (time, dim, flattened batch) as (*batch, time, dim)."""
    return jnp.moveaxis(columns, -1, 0).reshape(*batch, *columns.shape[:2])


def _first_guess(params: ALRNNParams, xs: AnyArray, symbols: AnyArray | None, num_pwl: NumPWL) -> Array:
    """Signs of z~_0..z~_{T-1} to start from: the given symbols, else those of [x_t; L x_t]."""
    if symbols is None:
        columns = _columns(xs)[:-1]
        return jnp.concatenate([columns, params.L @ columns], axis=1) > 0
    count = known_number(num_pwl)
    if count is None:
        raise ValueError("symbols need a static num_pwl: their number of bits is a shape")
    expected = (*xs.shape[:-2], xs.shape[-2] - 1, count)
    if symbols.shape != expected:
        raise ValueError(f"symbols must be {expected} (bits of z~_0..z~_T-1), got {symbols.shape}")
    linear = params.a.shape[0] - count
    return jnp.pad(_columns(symbols) > 0, ((0, 0), (linear, 0), (0, 0)))


def generate_with_resets(
    params: ALRNNParams, xs: Float[AnyArray, "*batch window observed"], tau: int, num_pwl: NumPWL
) -> tuple[Float[Array, "*batch time observed"], Float[Array, "*batch time latent"]]:
    """Generation whose readouts are reset to the data every tau steps: the fMRI figures (tau = 7).

    It sees data all along, so it is no free generation, and its errors do not compare with those of `generate`.

    Returns:
        Predictions and states of steps 1..T, those of a reset step before the reset.

    Raises:
        ValueError: as `teacher_forced`.
    """
    predictions, states, _ = teacher_forced(params, xs, tau, num_pwl=num_pwl)
    return predictions, states


def latent_regulariser(params: ALRNNParams) -> Float[Array, ""]:
    """|| relu(a + diag(W) - 0.05) ||_2, against divergence (the code's latent regulariser; EEG, weight 0.1)."""
    excess = jax.nn.relu(params.a + jnp.diag(jnp.asarray(params.W)) - 0.05)
    squared = jnp.sum(jnp.square(excess))
    # The norm has no gradient at zero: a model without any excess is left alone.
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def alternative_regulariser(params: ALRNNParams) -> Float[Array, ""]:
    """|1 - a|_1 + |W|_1 + |h|_1, towards the identity map (the code's alternative)."""
    return jnp.sum(jnp.abs(1 - params.a)) + jnp.sum(jnp.abs(params.W)) + jnp.sum(jnp.abs(params.h))


def guess_regulariser(params: ALRNNParams) -> Float[Array, ""]:
    """|L|^2, for the observation model."""
    return jnp.sum(jnp.square(params.L))


def slope_penalty(params: ALRNNParams, num_pwl: NumPWL) -> Float[Array, ""]:
    """sum_i |1 - s_i| over the piecewise-linear units: pushes leaky units to linear ones (appendix).

    Raises:
        ValueError: if the parameters have no slopes.
    """
    return jnp.sum(jnp.abs(1 - _unit_slopes(params, num_pwl)))


def count_nonlinear(params: ALRNNParams, num_pwl: NumPWL, threshold: float = 0.1) -> Int[Array, ""]:
    """How many units stayed nonlinear, |1 - s_i| > threshold (appendix: about 2 for Lorenz-63).

    Raises:
        ValueError: if the parameters have no slopes.
    """
    return jnp.sum(jnp.abs(1 - _unit_slopes(params, num_pwl)) > threshold)


def _unit_slopes(params: ALRNNParams, num_pwl: NumPWL) -> Array:
    if params.slopes is None:
        raise ValueError("these parameters have no slopes; init_params(..., slope=...) makes some")
    slopes = jnp.asarray(params.slopes)
    return negative_slopes(num_pwl, slopes.size, slopes, slopes.dtype)


def add_noise(
    key: Key[Array, ""], xs: Float[AnyArray, "*shape"], sigma: float | int | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """Add N(0, sigma^2) to a whole window, inputs and targets alike, afresh at each update (Sec. 3).

    Raises:
        ValueError: if sigma < 0.
    """
    if (known := known_number(sigma)) is not None and known < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    xs = jnp.asarray(xs)
    return xs + sigma * jax.random.normal(key, xs.shape, xs.dtype)


def predictability_time(lyapunov_exponent: float | int) -> float:
    """The theory's forcing interval tau: ln 2 / lambda_max (Mikhaeil et al. 2022).

    In the unit of time of the exponent: steps for an exponent per step (Lorenz-63 at dt = 0.01: 76). In
    practice tau is tuned, and smaller.

    Raises:
        ValueError: if the exponent is not positive: without chaos no interval is too long.
    """
    if not lyapunov_exponent > 0:
        raise ValueError(f"needs a positive Lyapunov exponent, got {lyapunov_exponent}")
    return math.log(2) / lyapunov_exponent
