"""Nonlinear recurrences h_t = f(h_{t-1}, x_t) solved for all t at once, by Newton's method.

All states together are the unknown of one system, r_t(h) = f(h_{t-1}, x_t) - h_t = 0. Newton's step for it is an
affine recurrence,

    delta_t = J_t delta_{t-1} + r_t,    J_t = df/dh (h_{t-1}, x_t),    h <- h + delta,

which `affine_scan` solves in parallel (DEER, arXiv 2309.12252; ParaRNN, arXiv 2510.21450, Sec. 2). After k steps the
first k states are exact, so that it always ends; how early depends on f: a recurrence that is linear in h takes one
step, one that forgets its past takes a few, a chaotic one takes about as many as there are states.

The structure of J decides the cost: diagonal (the channels of f do not mix), blocks, dense. "quasi" takes the diagonal
of a dense J in its place (quasi-DEER, arXiv 2407.19115): cheaper steps, more of them, the same solution.

Derivatives are those of the solution, not of the iteration: differentiating r = 0 gives

    dh_t = J_t dh_{t-1} + (df/dx_t) dx_t + (df/dparams) dparams,

one more affine recurrence with the exact J at the solution, and its transpose in reverse mode. No iterate is kept.
Forward mode, reverse mode and any nesting of the two work; f may close over arrays that are differentiated.

`method="fused"` does not iterate: where channels are independent, `jaxpapers.ops.fused` runs through time with the
state on chip. Its reverse mode is a kernel as well, which a `custom_jvp` has no place for, so that it stands behind a
`custom_vjp` of its own: the first derivative in reverse mode is the kernel; derivatives of that one, in either mode
and to any order, are those of the implicit formula above, to which both kernels fall back when they are
differentiated. Forward mode as the first (innermost) derivative is an error of JAX there ("can't apply forward-mode
autodiff (jvp) to a custom_vjp function"): another method has it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxpapers.ops.fused import computed, fusable, fused_cotangents, fused_states
from jaxpapers.ops.scan import affine_scan, affine_scan_sharded
from jaxpapers.typing import AnyArray

Number = float | int
Step = Callable[[Array, Any], Array]  # (state, input) -> state, of one time and one sequence
Jacobian = Callable[[Array, Any], Array]

STRUCTURES = ("diagonal", "block", "dense", "quasi")
METHODS = ("auto", "sequential", "parallel", "chunked", "fused")
KERNELS = ("diagonal", "block")  # structures of the fused method
STATE_AXES = {"diagonal": 1, "block": 2, "dense": 1, "quasi": 1}
FALLBACKS = (None, "sequential")
LARGEST_JACOBIANS = 2**30  # numbers of all dense Jacobians, above which "auto" does without them


class Solution(NamedTuple):
    """States of a recurrence, and how they were found.

    Attributes:
        states: (time, *batch, *state).
        residuals: (max_iterations + 1,) largest |f(h_{t-1}, x_t) - h_t| of the guess and after each iteration; NaN for
            iterations that were not needed. Of the sequential and fused methods 0, then NaN.
        iterations: done; of segments the most.
        converged: whether the last residual is at most the tolerance or, where there is none, the square root of the
            machine's epsilon times the largest |state|, or 1 (3e-4 in float32).
    """

    states: Shaped[Array, "..."]
    residuals: Float[Array, "iterates"]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def solve_recurrence(
    f: Step,
    xs: PyTree[Shaped[AnyArray, "..."]],
    h0: Shaped[AnyArray, "..."],
    *,
    structure: str,
    jacobian: Jacobian | None = None,
    guess: Shaped[AnyArray, "..."] | None = None,
    max_iterations: int = 3,
    tolerance: Number = 0.0,
    relative_tolerance: Number = 0.0,
    damping: Number = 1.0,
    trust: Number = 0.0,
    clip_iterates: Number = 0.0,
    segment: int = 0,
    fallback: str | None = None,
    method: str = "auto",
    mesh: Mesh | None = None,
) -> Solution:
    """Solves h_t = f(h_{t-1}, x_t), t = 1..L.

    Args:
        f: one step of one sequence, `(state, input) -> state`; it is vectorised over time and batch here. States are
            (D,), or (k, n) for "block": n channels of k numbers each, which may mix inside a channel alone.
        xs: inputs, a tree of arrays (time, *batch, ...).
        h0: (*batch, *state), the state before the first input.
        structure: of df/dh: "diagonal", "block", "dense", or "quasi" (f is dense, the iteration uses the diagonal).
            It is believed: `check_structure` tells whether it is true.
        jacobian: `(state, input) -> df/dh` in closed form, of one step of one sequence: (D,) for diagonal and quasi,
            (k, k, n) for block, (D, D) for dense, output before input. None: by forward differentiation, in
            1, k, or D products.
        guess: (time, *batch, *state) to start from, such as the solution of a neighbouring problem. None: f(0, x_t)
            (ParaRNN, Eq. A.1).
        max_iterations: of Newton's method. Three are enough for ParaRNN's cells. This and the options down to
            `fallback` are those of the iteration: sequential and fused states have none.
        tolerance: stop when the largest |residual| is at most this. With 0 here and below all `max_iterations` are
            done, which is cheaper: residual and Jacobian come from one evaluation, and no condition waits for all
            devices. A NaN stops nothing: where one sequence is lost, the others go on.
        relative_tolerance: stop, too, when it is at most this share of the guess's.
        damping: h <- h + damping * delta, in (0, 1].
        trust: lambda >= 0 of a Kalman filter that holds the steps back where products of |J| > 1 would blow them up:
            delta is the filtered mean of the model delta_t = J_t delta_{t-1} + r_t + noise of variance 1, observed to
            be 0 with noise of variance 1 / lambda. As in the code of ELK (arXiv 2407.19115), whose text derives a
            smoother from Levenberg and Marquardt's term; the filter costs one pass, and the solution is the same.
            Diagonal and quasi only; more iterations are needed.
        clip_iterates: clip iterates to +- this and set their NaNs to 0, as DEER's authors do (1e8), so that a product
            that has overflowed is not the end: states before it are exact, and those after it follow. 0: off.
        segment: solve as many steps at a time, one segment after the other, each from the last state of the one
            before: less memory, and fewer iterations where |J| > 1. What is left over at the end is a shorter segment.
            0: all at once.
        fallback: "sequential": where the iteration has not converged, the states are computed one after the other.
        method: "sequential" (one step of f after the other, no iteration), or how the affine recurrences are solved:
            "parallel" (`lax.associative_scan`), "chunked". "fused": one kernel on TPU and GPU, for "diagonal" and
            "block", inputs and closed-over arrays of floats that end in the channel axis (or scalars); computed in
            float32 at least; no iteration, and no forward-mode derivative as the first one (see the module). On CPU
            it is interpreted, for tests. "auto": sequential on CPU (the fastest at every point of `python -m
            benchmarks recurrence`), and where dense Jacobians would fill the memory (2^30 numbers); on TPU the states
            are the kernel's where it applies and a mesh tells where the batch lies, or there is one device alone, since
            the compiler cannot split a kernel, and their derivatives those of all other methods; elsewhere chunked.
            By the bytes that it moves the kernel should be the choice on GPUs, too; that has not been measured.
        mesh: its axis `seq` splits the time axis: xs (and guess) lie there so, h0 on every device. Where it does not,
            its axis `data` splits the first batch axis for the kernel.

    Returns:
        The solution. Its states can be differentiated with respect to xs, h0 and what f closes over; the
        derivatives are exact where the states are.

    Raises:
        ValueError: unknown names; options out of their range; shapes that do not fit.
    """
    newton = _Newton(max_iterations, tolerance, relative_tolerance, damping, trust, clip_iterates, segment, affine_scan)
    _check_options(structure, method, fallback, newton)
    xs, h0 = jax.tree.map(jnp.asarray, xs), jnp.asarray(h0)
    batch, state = _split_shape(h0, xs, structure)
    length = jax.tree.leaves(xs)[0].shape[0]
    if guess is not None and guess.shape != (length, *h0.shape):
        expected = (length, *h0.shape)
        raise ValueError(f"the guess has shape {guess.shape}, expected (time, *batch, *state) = {expected}")
    one = (
        jax.ShapeDtypeStruct(state, h0.dtype),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1 + len(batch) :], x.dtype), xs),
    )
    out = jax.eval_shape(f, *one)
    if (out.shape, out.dtype) != (state, h0.dtype):
        raise ValueError(f"f maps a state {state} of {h0.dtype} to {out.shape} of {out.dtype}")
    # What the functions close over becomes an argument, so that derivatives reach it.
    fused = method == "fused"
    if fused:
        if structure not in KERNELS:
            raise ValueError(f"method 'fused' takes the structures {KERNELS}, got {structure!r}")
        wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, computed(a.dtype)), one)
        raw, step_constants = jax.closure_convert(f, *wide)
        step: Callable = _widened(raw)
    else:
        raw = None
        step, step_constants = jax.closure_convert(f, *one)
    exact: Callable = _forward_jacobian(step, "dense" if structure == "quasi" else structure)
    if jacobian is None:
        used: Callable = _diagonal_of(exact) if structure == "quasi" else exact
        used_constants = step_constants
    else:
        used, used_constants = jax.closure_convert(jacobian, *one)
        exact = exact if structure == "quasi" else used
    cell = _Cell(
        step=functools.partial(_over, step, 1 + len(batch)),
        one_step=functools.partial(_over, _by_rows(step, structure), len(batch)),
        jacobian=functools.partial(_over, used, 1 + len(batch)),
        exact=functools.partial(_over, exact, 1 + len(batch)),
        # The derivatives' Jacobian is the cell's own, unless that is an approximation.
        exact_is_own=exact is used,
        structure="diagonal" if structure == "quasi" else structure,
        exact_structure="dense" if structure == "quasi" else structure,
        fused=raw,
    )
    solver: Callable = functools.partial(affine_scan, method="auto" if fused else method)
    if mesh is not None and mesh.shape.get("seq", 1) > 1:
        if fused or segment:
            raise ValueError(
                "method 'fused' and segments run through time on one device: the mesh must not split `seq`"
            )
        method = "chunked" if method == "auto" else method  # one step after the other would leave devices idle
        solver = functools.partial(affine_scan_sharded, method=method, mesh=mesh)
    elif method == "auto" and structure == "dense" and length * math.prod(h0.shape) * state[0] > LARGEST_JACOBIANS:
        method = "sequential"
    elif method == "auto" and structure in KERNELS and (mesh is not None or _alone_on_a_tpu()):
        state_axes = STATE_AXES[structure]
        if fusable(step, step_constants, xs, h0, state_axes=state_axes, mesh=mesh):
            cell = cell._replace(fused=step)
    newton = newton._replace(scan=solver, mesh=mesh)
    constants = (step_constants, used_constants)
    if fused:
        return _fused(cell, newton, constants, xs, h0)
    return _solution(cell, newton, method, fallback, constants, xs, h0, guess)


def _alone_on_a_tpu() -> bool:
    return jax.default_backend() == "tpu" and jax.device_count() == 1


class _Cell(NamedTuple):
    """The step and its Jacobians, over all times and sequences: `(prev, xs, constants) -> array`."""

    step: Callable
    one_step: Callable  # over sequences alone, `(rows, x, constants) -> rows`
    jacobian: Callable
    exact: Callable
    exact_is_own: bool
    structure: str
    exact_structure: str
    fused: Callable | None  # the step of one sequence in float32 at least, for the kernel


class _Newton(NamedTuple):
    """The iteration's options; `scan(J, r, initial, structure=...)` solves an affine recurrence."""

    max_iterations: int
    tolerance: Number
    relative_tolerance: Number
    damping: Number
    trust: Number
    clip_iterates: Number
    segment: int
    scan: Callable
    mesh: Mesh | None = None  # of the kernel


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _solution(
    cell: _Cell,
    newton: _Newton,
    method: str,
    fallback: str | None,
    constants: tuple,
    xs: PyTree,
    h0: Array,
    guess: Array | None,
) -> Solution:
    def one_by_one(constants: tuple, xs: PyTree, h0: Array) -> Array:
        def body(rows: tuple[Array, ...], x: PyTree) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            rows = cell.one_step(rows, x, constants[0])
            return rows, rows

        block = cell.structure == "block"
        rows: tuple[Array, ...] = jnp.unstack(h0, axis=-2) if block else (h0,)
        states = lax.scan(body, rows, xs)[1]
        return jnp.stack(states, axis=-2) if block else states[0]

    def without_iterations(states: Array) -> Solution:
        residuals = jnp.full(newton.max_iterations + 1, jnp.nan, jnp.float32).at[0].set(0.0)
        return Solution(states, residuals, jnp.zeros((), jnp.int32), jnp.isfinite(states).all())

    def sequential(constants: tuple, xs: PyTree, h0: Array, guess: Array | None) -> Solution:
        return without_iterations(one_by_one(constants, xs, h0))

    def by_newton(constants: tuple, xs: PyTree, h0: Array, guess: Array | None) -> Solution:
        found = _iterate(cell, newton, constants, xs, h0, guess)
        if fallback is None:
            return found
        states = lax.cond(found.converged, lambda *_: found.states, one_by_one, constants, xs, h0)
        return found._replace(states=states)

    if method == "sequential":
        return sequential(constants, xs, h0, guess)

    def by_kernel(constants: tuple, xs: PyTree, h0: Array, guess: Array | None) -> Solution:
        assert cell.fused is not None
        axes = STATE_AXES[cell.structure]
        states = fused_states(cell.fused, constants[0], xs, h0, state_axes=axes, mesh=newton.mesh)
        return without_iterations(states)

    if method == "fused":
        return by_kernel(constants, xs, h0, guess)
    if method == "auto":
        tpu = by_newton if cell.fused is None else by_kernel
        return lax.platform_dependent(constants, xs, h0, guess, cpu=sequential, tpu=tpu, default=by_newton)
    return by_newton(constants, xs, h0, guess)


@_solution.defjvp
def _solution_jvp(
    cell: _Cell, newton: _Newton, method: str, fallback: str | None, primals: tuple, tangents: tuple
) -> tuple[Solution, Solution]:
    constants, xs, h0, _ = primals
    # A call of `_solution`, so that this rule can be differentiated in its turn.
    found = _solution(cell, newton, method, fallback, *primals)

    # Reverse mode keeps inputs and states alone: Jacobians and gates are computed again, and not before they are used.
    @jax.checkpoint
    def tangent_of_states(states: Array, constants: tuple, xs: PyTree, h0: Array, moves: tuple) -> Array:
        prev = _previous(states, h0)
        J = cell.exact(prev, xs, constants[1] if cell.exact_is_own else constants[0])

        def forced(step_constants: Any, xs: PyTree) -> Array:
            return cell.step(prev, xs, step_constants)

        _, change = jax.jvp(forced, (constants[0], xs), (moves[0], moves[1]))
        return newton.scan(J, change, moves[2], structure=cell.exact_structure)

    moved = tangent_of_states(found.states, constants, xs, h0, (tangents[0][0], *tangents[1:3]))
    return found, jax.tree.map(_zero_tangent, found)._replace(states=moved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(cell: _Cell, newton: _Newton, constants: tuple, xs: PyTree, h0: Array) -> Solution:
    return _solution(cell, newton, "fused", None, constants, xs, h0, None)


def _fused_forward(cell: _Cell, newton: _Newton, constants: tuple, xs: PyTree, h0: Array) -> tuple[Solution, tuple]:
    # `_solution` has derivatives of its own, for those who differentiate this rule.
    found = _solution(cell, newton, "fused", None, constants, xs, h0, None)
    return found, (constants, xs, h0, found.states)


def _fused_backward(cell: _Cell, newton: _Newton, kept: tuple, cotangent: Solution) -> tuple:
    return _cotangents(cell, newton, *kept, cotangent.states)


_fused.defvjp(_fused_forward, _fused_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _cotangents(
    cell: _Cell, newton: _Newton, constants: tuple, xs: PyTree, h0: Array, states: Array, cotangent: Array
) -> tuple:
    """Cotangents of (constants, xs, h0), by the kernel."""
    assert cell.fused is not None
    arrays = (constants[0], xs, h0, states, cotangent)
    axes = STATE_AXES[cell.structure]
    of_step, of_xs, of_h0 = fused_cotangents(cell.fused, *arrays, state_axes=axes, mesh=newton.mesh)
    return (list(of_step), jax.tree.map(jnp.zeros_like, constants[1])), of_xs, of_h0


@_cotangents.defjvp
def _cotangents_jvp(cell: _Cell, newton: _Newton, primals: tuple, tangents: tuple) -> tuple:
    def by_the_formula(constants: tuple, xs: PyTree, h0: Array, states: Array, cotangent: Array) -> tuple:
        prev = _previous(states, h0)
        J = cell.exact(prev, xs, constants[1] if cell.exact_is_own else constants[0])

        def moved(change: Array, start: Array) -> Array:
            return newton.scan(J, change, start, structure=cell.exact_structure)

        # lambda_t = g_t + J_{t+1}^T lambda_{t+1}, and dh_0: the transpose of the recurrence of the tangents.
        adjoint, of_h0 = jax.vjp(moved, jnp.zeros_like(states), jnp.zeros_like(h0))[1](cotangent)
        of_step, of_xs = jax.vjp(lambda c, xs: cell.step(prev, xs, c), constants[0], xs)[1](adjoint)
        return (of_step, jax.tree.map(jnp.zeros_like, constants[1])), of_xs, of_h0

    found = _cotangents(cell, newton, *primals)
    return found, jax.jvp(by_the_formula, primals, tangents)[1]


def _iterate(cell: _Cell, newton: _Newton, constants: tuple, xs: PyTree, h0: Array, guess: Array | None) -> Solution:
    """Newton's method on all steps at once, or on one segment after the other."""
    length = jax.tree.leaves(xs)[0].shape[0]
    if not 0 < newton.segment < length:
        return _iterate_together(cell, newton, constants, xs, h0, guess)

    def solve(h: Array, segment: tuple) -> tuple[Array, Solution]:
        found = _iterate_together(cell, newton, constants, segment[0], h, segment[1])
        return found.states[-1], found

    count = length // newton.segment
    whole = count * newton.segment
    inputs = (xs, guess)
    split = jax.tree.map(lambda x: x[:whole].reshape(count, newton.segment, *x.shape[1:]), inputs)
    last, found = lax.scan(solve, h0, split)
    states, residuals, iterations, converged = found._replace(states=found.states.reshape(whole, *h0.shape))
    if whole < length:
        _, rest = solve(last, jax.tree.map(lambda x: x[whole:], inputs))
        states = jnp.concatenate([states, rest.states])
        residuals = jnp.concatenate([residuals, rest.residuals[None]])
        iterations, converged = jnp.append(iterations, rest.iterations), jnp.append(converged, rest.converged)
    # The largest of each iteration: a NaN of one that was done counts, of one that was not needed does not.
    done = jnp.arange(newton.max_iterations + 1) <= iterations[:, None]
    worst = jnp.max(jnp.where(done, residuals, -jnp.inf), axis=0)
    return Solution(states, jnp.where(done.any(axis=0), worst, jnp.nan), jnp.max(iterations), jnp.all(converged))


def _iterate_together(
    cell: _Cell, newton: _Newton, constants: tuple, xs: PyTree, h0: Array, guess: Array | None
) -> Solution:
    def residual(h: Array) -> Array:
        return cell.step(_previous(h, h0), xs, constants[0]) - h

    def size(r: Array) -> Array:
        return jnp.max(jnp.abs(r), initial=0.0).astype(jnp.float32)

    def goal(sizes: Array) -> Array:
        return jnp.maximum(newton.tolerance, newton.relative_tolerance * sizes[0])

    def improved(h: Array, r: Array) -> Array:
        J = cell.jacobian(_previous(h, h0), xs, constants[1])
        if newton.trust:
            J, r = _held_back(J, r, newton.trust)
        h = h + newton.damping * newton.scan(J, r, None, structure=cell.structure)
        if newton.clip_iterates:
            h = jnp.where(jnp.isnan(h), 0.0, jnp.clip(h, -newton.clip_iterates, newton.clip_iterates))
        return h

    def iterate(h: Array, _: None) -> tuple[Array, Array]:
        r = residual(h)
        return improved(h, r), size(r)

    def unfinished(loop: tuple) -> Array:
        iteration, _, r, sizes = loop
        return (iteration < newton.max_iterations) & ~(size(r) <= goal(sizes))  # so that a NaN does not stop it

    def iterate_once_more(loop: tuple) -> tuple:
        iteration, h, r, sizes = loop
        h = improved(h, r)
        r = residual(h)
        return iteration + 1, h, r, sizes.at[iteration + 1].set(size(r))

    steps = jax.tree.leaves(xs)[0].shape[0]
    if guess is None:
        guess = cell.step(jnp.zeros((steps, *h0.shape), h0.dtype), xs, constants[0])
    start = jnp.broadcast_to(guess, (steps, *h0.shape)).astype(h0.dtype)
    if newton.tolerance or newton.relative_tolerance:
        r = residual(start)
        sizes = jnp.full(newton.max_iterations + 1, jnp.nan, jnp.float32).at[0].set(size(r))
        loop = (jnp.zeros((), jnp.int32), start, r, sizes)
        iterations, h, r, sizes = lax.while_loop(unfinished, iterate_once_more, loop)
        enough = goal(sizes)
    else:
        iterations = jnp.asarray(newton.max_iterations, jnp.int32)
        h, sizes = lax.scan(iterate, start, length=newton.max_iterations)
        r = residual(h)
        sizes = jnp.append(sizes, size(r))
        enough = float(jnp.finfo(h.dtype).eps) ** 0.5 * jnp.maximum(1, size(h))
    last = size(r)
    return Solution(h, sizes, iterations, jnp.isfinite(last) & (last <= enough))


def _over(function: Callable, axes: int, prev: PyTree, xs: PyTree, constants: Any) -> Any:
    """A function of one step and one sequence, over the leading axes of states and inputs."""

    def mapped(prev: PyTree, x: PyTree) -> Any:
        return function(prev, x, *constants)

    for _ in range(axes):
        mapped = jax.vmap(mapped)
    return mapped(prev, xs)


def _by_rows(step: Callable, structure: str) -> Callable:
    """A step whose state is a tuple: of blocks the rows, elsewhere the one array.

    XLA's loops on CPU are vectorised where every array that they carry is computed by itself, not where rows are put
    together and taken apart again: five times faster.
    """
    if structure != "block":
        return lambda rows, x, *constants: (step(*rows, x, *constants),)
    return lambda rows, x, *constants: jnp.unstack(step(jnp.stack(rows), x, *constants))


def _widened(step: Callable) -> Callable:
    """A step that takes float32 at least, for states and inputs of any dtype."""

    def widened(h: Array, x: PyTree, *constants: Any) -> Array:
        wide, inputs = jax.tree.map(lambda a: a.astype(computed(a.dtype)), (h, x))
        return step(wide, inputs, *constants).astype(h.dtype)

    return widened


def _previous(states: Array, h0: Array) -> Array:
    """h_0..h_{L-1} of the states h_1..h_L."""
    return jnp.concatenate([h0[None], states[:-1]])


def _forward_jacobian(step: Callable, structure: str) -> Callable:
    """df/dh of one step by forward differentiation, in the layout of `affine_scan`."""

    def jacobian(h: Array, x: Any, *constants: Any) -> Array:
        def along(direction: Array) -> Array:
            return jax.jvp(lambda h: step(h, x, *constants), (h,), (direction,))[1]

        if structure == "diagonal":
            return along(jnp.ones_like(h))
        if structure == "block":
            # Column i of every block at once: the channels do not mix.
            directions = jnp.eye(h.shape[0], dtype=h.dtype)[:, :, None] * jnp.ones_like(h)
            return jnp.moveaxis(jax.vmap(along)(directions), 0, 1)
        return jax.vmap(along, out_axes=1)(jnp.eye(h.shape[0], dtype=h.dtype))

    return jacobian


def _diagonal_of(jacobian: Callable) -> Callable:
    return lambda h, x, *constants: jnp.diagonal(jacobian(h, x, *constants))


def _held_back(J: Array, r: Array, trust: float) -> tuple[Array, Array]:
    """The Kalman filter of delta_t = J_t delta_{t-1} + r_t + N(0, 1), observed as 0 + N(0, 1 / trust), as a recurrence.

    With the variance p_t of what is known of delta_t, and q_t = J_t^2 p_{t-1} + 1 of what is predicted,

        p_t = q_t / (1 + trust q_t),    mean_t = (J_t mean_{t-1} + r_t) / (1 + trust q_t),

    so that p_t is a fractional linear function of p_{t-1}: products of 2 x 2 matrices, one associative scan.
    """
    square = jnp.square(J)
    ones = jnp.ones_like(J)
    matrices = (square, ones, trust * square, (1 + trust) * ones)  # p -> (a p + b) / (c p + d)

    def compose(earlier: tuple, later: tuple) -> tuple:
        (a, b, c, d), (e, f, g, h) = earlier, later
        product = (e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d)
        scale = 1 / (product[2] + product[3])  # the function does not change, and the numbers stay finite
        return tuple(entry * scale for entry in product)

    _, b, _, d = lax.associative_scan(compose, matrices)
    before = jnp.concatenate([jnp.zeros_like(J[:1]), (b / d)[:-1]])  # delta_0 = 0 is known
    weight = 1 / (1 + trust * (square * before + 1))
    return weight * J, weight * r


def _zero_tangent(value: Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)


def check_structure(
    f: Step,
    x: PyTree[Shaped[AnyArray, "..."]],
    h: Shaped[AnyArray, "*state"],
    structure: str,
    jacobian: Jacobian | None = None,
) -> None:
    """Raises if df/dh at a state and an input has entries outside of the declared structure, or is not `jacobian`.

    For tests of a cell, on a few random states and inputs: a solver that is told something false iterates on and on, or
    ends with the right states and wrong derivatives.

    Args:
        f: one step, `(state, input) -> state`.
        x: one input.
        h: one state.
        structure: "diagonal" or "block"; every f is dense.
        jacobian: the closed form that `solve_recurrence` would be given.

    Raises:
        ValueError: it has, or is not (by more than 1000 epsilons of its size); or an unknown structure.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure {structure!r} is unknown, expected one of {STRUCTURES}")
    if h.ndim != STATE_AXES[structure]:
        raise ValueError(f"a state of {structure!r} has {STATE_AXES[structure]} axes, got shape {h.shape}")
    if structure in ("dense", "quasi") and jacobian is None:
        return
    full = jax.jacfwd(f)(jnp.asarray(h), x)
    if structure == "diagonal":
        inside, outside = jnp.diagonal(full), full - jnp.diag(jnp.diagonal(full))
    elif structure == "block":
        inside = jnp.einsum("aibi->abi", full)
        outside = jnp.where(jnp.eye(h.shape[1], dtype=bool)[None, :, None, :], 0, full)
    else:
        inside, outside = jnp.diagonal(full) if structure == "quasi" else full, jnp.zeros(())
    worst = float(jnp.max(jnp.abs(outside)))
    if not worst <= 0:  # nor NaN
        raise ValueError(f"df/dh is not {structure!r}: an entry outside of the structure is {worst:.3g}")
    if jacobian is not None:
        error = float(jnp.max(jnp.abs(jacobian(jnp.asarray(h), x) - inside)))
        allowed = 1000 * float(jnp.finfo(full.dtype).eps) * max(1.0, float(jnp.max(jnp.abs(inside))))
        if not error <= allowed:
            raise ValueError(f"the closed-form Jacobian is off by {error:.3g}, more than rounding ({allowed:.3g})")


def _check_options(structure: str, method: str, fallback: str | None, newton: _Newton) -> None:
    for name, value, known in (
        ("structure", structure, STRUCTURES),
        ("method", method, METHODS),
        ("fallback", fallback, FALLBACKS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown, expected one of {known}")
    if newton.max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {newton.max_iterations}")
    for name in ("tolerance", "relative_tolerance", "trust", "clip_iterates", "segment"):
        if not getattr(newton, name) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(newton, name)}")
    if not 0 < newton.damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {newton.damping}")
    if newton.trust and structure not in ("diagonal", "quasi"):
        raise ValueError(f"trust needs a diagonal or quasi structure, got {structure!r}")


def _split_shape(h0: AnyArray, xs: PyTree, structure: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(batch, state) axes of h0, which the inputs must share."""
    axes = STATE_AXES[structure]
    leaves = jax.tree.leaves(xs)
    batch, state = h0.shape[: h0.ndim - axes], h0.shape[h0.ndim - axes :]
    lengths = {leaf.shape[0] for leaf in leaves if leaf.ndim}
    fits = all(leaf.shape[1 : 1 + len(batch)] == batch for leaf in leaves)
    fits &= len(lengths) == 1 and lengths != {0}
    if len(state) != axes or not fits or not jnp.issubdtype(h0.dtype, jnp.floating):
        raise ValueError(
            f"xs {[leaf.shape for leaf in leaves]} must be (time, *batch, ...) with one length above 0, and h0 "
            f"{h0.shape} of {h0.dtype} floats (*batch, *state), with {axes} state axes for {structure!r}"
        )
    return batch, state
