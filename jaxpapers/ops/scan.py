"""Affine recurrences h_t = A_t h_{t-1} + b_t, solved step by step or in parallel over time.

One recurrence stands under linear RNNs and state-space layers, the Newton iterations of nonlinear RNNs, their
backward passes, and piecewise-linear RNNs whose region is known. Two facts make it parallel: an affine map is a
pair (A, b), and doing one map after another is again a pair,

    (A_2, b_2) o (A_1, b_1) = (A_2 A_1, A_2 b_1 + b_2),

so that any bracketing of the time axis gives the same states. See `combine` for the algebra.

`affine_scan` takes the structure of A (diagonal, small blocks, dense), the time axis, the direction and the
method; `affine_scan_sharded` does the same for a sequence split over devices.

Derivatives. The recurrence is the linear system (I - S) h = b with (S h)_t = A_t h_{t-1}, and it is differentiated
as one (`lax.custom_linear_solve`): the tangent solves the same system, the cotangent the transposed one,

    lambda_t = g_t + A_{t+1}^T lambda_{t+1},    dA_t = lambda_t (x) h_{t-1},    db_t = lambda_t,
    dh_0 = A_1^T lambda_1,

by the same method, backwards. Only A and the states are kept for it, never a tree of intermediate products.
Forward mode, reverse mode and any nesting of the two work.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

Structure = str  # one of STRUCTURES
Method = str  # one of METHODS
Element = tuple[jax.Array, jax.Array]

STRUCTURES = ("diagonal", "block", "dense")
METHODS = ("auto", "sequential", "parallel", "chunked")
VECTOR_AXES = {"diagonal": 1, "block": 2, "dense": 1}
MATRIX_AXES = {"diagonal": 1, "block": 3, "dense": 2}

# Steps inside a chunk, except for matrices on CPU (see _chunk_size_on_cpu). Up to UNROLLED of them become straight-line
# code, each step one vectorised pass over all chunks: for diagonals, whose steps are one multiplication, that is the
# faster form on XLA:CPU, and on accelerators many short chunks leave few dependent steps.
DEFAULT_CHUNK = 8
UNROLLED = 8

# XLA:CPU emits a multiply-and-sum of up to this many products as one loop, and hands larger ones to a library call
# that takes 10 to 60 times as long for sums as short as a block's (jax 0.10, measured between 2048 and 4096).
FUSED_PRODUCTS = 2048


class _Recurrence(NamedTuple):
    """What the solvers need to know beside the arrays. Everything in it is static.

    A solver computes, in the order of processing (backwards in time if `reverse`),

        adjoint=False:  y_t = A_t c + b_t,  c <- y_t        (the recurrence itself)
        adjoint=True:   y_t = c + b_t,      c <- A_t^T y_t  (its transpose: A_t enters after y_t, not before)

    from a carry c that is the given initial state, or zero if that is None.
    """

    structure: Structure
    axis: int
    reverse: bool
    adjoint: bool = False
    columns: bool = False  # the state is a matrix (for the cumulated products), not a vector

    @property
    def transposed(self) -> "_Recurrence":
        return self._replace(reverse=not self.reverse, adjoint=not self.adjoint)

    def matrix(self, a: jax.Array) -> jax.Array:
        """A_t as the carry sees it: transposed in the adjoint recurrence."""
        if not self.adjoint or self.structure == "diagonal":
            return a
        return jnp.swapaxes(a, -2, -3) if self.structure == "block" else jnp.swapaxes(a, -1, -2)

    def apply(self, a: jax.Array, state: jax.Array) -> jax.Array:
        """The matrix (already transposed where need be) times the state."""
        return _product(a, state, self.structure, self.columns)

    def start(self, a: jax.Array, b: jax.Array) -> Element:
        """One step from the zero carry: (output, new carry). Does not read A_t unless it must."""
        return b, (self.apply(self.matrix(a), b) if self.adjoint else b)

    def step(self, a: jax.Array, b: jax.Array, carry: jax.Array) -> Element:
        """One step: (output, new carry)."""
        if self.adjoint:
            output = carry + b
            return output, self.apply(self.matrix(a), output)
        output = self.apply(a, carry) + b
        return output, output


def affine_scan(
    A: Shaped[Array | np.ndarray, "..."],
    b: Shaped[Array | np.ndarray, "..."],
    h0: Shaped[Array | np.ndarray, "..."] | None = None,
    *,
    structure: Structure = "diagonal",
    axis: int = 0,
    reverse: bool = False,
    method: Method = "auto",
    chunk_size: int | None = None,
    return_products: bool = False,
) -> Shaped[Array, "..."] | tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """All states of h_t = A_t h_{t-1} + b_t (or, with `reverse`, of h_t = A_t h_{t+1} + b_t).

    Shapes, with the time axis first (`axis=0`):

        structure    A                         b                     A_t h
        diagonal     (time, ..., D or 1)       (time, ..., D)        A * h
        block        (time, ..., k, k, n)      (time, ..., k, n)     sum_i A[o, i, :] h[i, :] for each o
        dense        (time, ..., D, D)         (time, ..., D)        A @ h

    A scalar A_t is a diagonal one with a trailing axis of size 1. A block-diagonal matrix of n blocks k x k keeps
    the block index as the last axis, so that the arithmetic runs over it; entries are ordered (out, in).

    The axes before the state axes are the leading axes: time and batch. `axis` counts among the leading axes of b,
    0 for time-major, 1 for (batch, time, ...); no layout is transposed, the solvers index the axis where it is.
    Leading axes of A and b broadcast against each other (size 1 against any); an A (or b) with a single leading
    axis is time alone, shared by the batch. Gradients sum over what was broadcast. A may have size 1 in time: a
    time-invariant A is not copied over time by the sequential and chunked methods (it is by the parallel one).

    Methods, all returning the same numbers up to rounding (L steps, state of s numbers, matrix of m):

        sequential   one step after the other: L steps, least work, memory for the states alone;
        parallel     `lax.associative_scan` over (A, b): about 2 log2 L steps, 2L products of matrices, 2-4 L m memory;
        chunked      steps one after the other inside chunks of `chunk_size`, all chunks at once; their summaries
                     form a recurrence chunk_size times shorter, solved in the same way; then every chunk is run
                     again from its right initial state. About L products of matrices, memory L m / chunk_size
                     beside the states (and, with chunks of at most 8 steps, a copy of them), and
                     chunk_size * log(L) / log(chunk_size) steps twice over;
        auto         sequential on CPU; elsewhere sequential up to 16 steps, else chunked. On CPU the benchmark
                     (`python -m benchmarks scan`, with and without `--grad`) finds no length, batch, width or
                     structure where another method is faster; the rule for accelerators follows from the number
                     of dependent steps and has not been measured. The choice is made for the platform that the
                     program is compiled for.

    Products of many A with |A| > 1 overflow before the states need to; the sequential method forms no products.

    Args:
        A: the matrices (see above). Float or complex; bfloat16 and float16 are computed in float32.
        b: the inputs (see above).
        h0: the state before the first step (after the last one, if `reverse`): one time slice of b, or
            broadcastable to it. None means zero, and then A's first step in the order of processing is not read.
        structure: "diagonal", "block" or "dense".
        axis: the time axis among the leading axes of b, not negative.
        reverse: run backwards in time.
        method: "auto", "sequential", "parallel" or "chunked".
        chunk_size: steps inside a chunk of the chunked method, at least 2. None: 8, but for small blocks and dense
            matrices on CPU long chunks, from 4 of them upwards, whose number divides the length (where none does,
            8). Sizes above 8 become loops and compile to a smaller program; on CPU these are fast where the size
            divides the length.
        return_products: also return P_t = A_t ... A_1 (with `reverse`, P_t = A_t ... A_L).

    Returns:
        The states, shaped like b (broadcast against A), in the promoted dtype of the inputs; with
        `return_products` a pair (states, products), products shaped like A with all time steps.

    Raises:
        ValueError: for shapes that do not fit, an axis that is not a leading axis, unknown names, a chunk size
            below 2, or numbers that are neither float nor complex.
    """
    _check_names(structure, method, chunk_size)
    A, b, initial, dtype = _canonical(A, b, h0, structure, axis)
    recurrence = _Recurrence(structure, axis, reverse)

    def run(rec: _Recurrence, A: jax.Array, b: jax.Array, carry: jax.Array | None) -> Element:
        return _solve(rec, A, b, carry, method, chunk_size)

    previous = functools.partial(_previous, recurrence)
    states = _linear_solve(recurrence, A, b, initial, run, previous).astype(dtype)
    if not return_products:
        return states
    steps = b.shape[axis]
    shape = (*A.shape[:axis], steps, *A.shape[axis + 1 :])
    identity = jnp.broadcast_to(_identity(A, structure), shape[:axis] + shape[axis + 1 :])
    zeros = jnp.zeros(shape, A.dtype)
    products = _linear_solve(recurrence._replace(columns=True), A, zeros, identity, run, previous)
    return states, products.astype(dtype)


def affine_scan_sharded(
    A: Shaped[Array | np.ndarray, "..."],
    b: Shaped[Array | np.ndarray, "..."],
    h0: Shaped[Array | np.ndarray, "..."] | None = None,
    *,
    mesh: Mesh,
    seq_axis: str = "seq",
    structure: Structure = "diagonal",
    axis: int = 0,
    reverse: bool = False,
    method: Method = "auto",
) -> Shaped[Array, "..."]:
    """`affine_scan` with the time axis split over the devices of one mesh axis.

    Every device reduces its stretch of time to one map, one all-gather exchanges these maps (a matrix and a vector
    per device and batch entry), every device composes the maps before its own and solves its stretch from the
    state that this gives. The transposed recurrence of the gradient runs in the same way, and the products with
    h_{t-1} fetch a single state from the neighbour. Other mesh axes are left to the compiler: a batch sharded
    over `data` stays so.

    Args:
        A: as in `affine_scan`.
        b: as in `affine_scan`; its number of time steps is a multiple of the size of `seq_axis`.
        h0: as in `affine_scan`, replicated over `seq_axis`.
        mesh: a mesh with an axis `seq_axis`, all axes of type `AxisType.Auto`.
        seq_axis: the mesh axis over which time is split.
        structure: as in `affine_scan`.
        axis: as in `affine_scan`.
        reverse: as in `affine_scan`.
        method: how every device solves its stretch.

    Returns:
        The states, sharded over time.

    Raises:
        ValueError: as `affine_scan`; for a mesh without `seq_axis` or with axes that are not `AxisType.Auto`; for
            a length that the size of `seq_axis` does not divide.
    """
    _check_names(structure, method)
    if seq_axis not in mesh.shape:
        raise ValueError(f"seq_axis {seq_axis!r} is not an axis of the mesh, which has {tuple(mesh.shape)}")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(f"the mesh has axis types {mesh.axis_types}, expected AxisType.Auto for every axis")
    A, b, initial, dtype = _canonical(A, b, h0, structure, axis)
    devices = mesh.shape[seq_axis]
    if b.shape[axis] % devices:
        raise ValueError(f"the {b.shape[axis]} time steps are no multiple of the {devices} devices along {seq_axis!r}")
    whole, split = PartitionSpec(), PartitionSpec(*[None] * axis, seq_axis)
    A_split = whole if A.shape[axis] == 1 else split
    # Under jit: a shard_map that leaves mesh axes to the compiler does not run eagerly.
    shard = functools.partial(jax.shard_map, mesh=mesh, axis_names={seq_axis}, check_vma=False)

    def run(rec: _Recurrence, A: jax.Array, b: jax.Array, carry: jax.Array | None) -> Element:
        over_devices = _Recurrence(structure, 0, rec.reverse)

        def local(A: jax.Array, b: jax.Array, carry: jax.Array | None) -> Element:
            products, offsets = lax.all_gather(_summary(rec, A, b, method), seq_axis)
            carries, last = _sequential(over_devices, products, offsets, carry)
            entry = _at(_previous(over_devices, carries, carry), lax.axis_index(seq_axis), 0)
            return _solve(rec, A, b, entry, method, None)[0], last

        return jax.jit(shard(local, in_specs=(A_split, split, whole), out_specs=(split, whole)))(A, b, carry)

    def previous(states: jax.Array, initial: jax.Array | None) -> jax.Array:
        recurrence = _Recurrence(structure, axis, reverse)
        first = devices - 1 if reverse else 0

        def local(states: jax.Array, initial: jax.Array | None) -> jax.Array:
            sent = _at(states, 0 if reverse else states.shape[axis] - 1, axis)
            neighbours = [(i + 1, i) if reverse else (i, i + 1) for i in range(devices - 1)]
            received = lax.ppermute(sent, seq_axis, neighbours)
            if initial is not None:
                received = jnp.where(lax.axis_index(seq_axis) == first, initial, received)
            return _previous(recurrence, states, received)

        return jax.jit(shard(local, in_specs=(split, whole), out_specs=split))(states, initial)

    return _linear_solve(_Recurrence(structure, axis, reverse), A, b, initial, run, previous).astype(dtype)


def combine(
    earlier: tuple[Shaped[Array, "..."], Shaped[Array, "..."]],
    later: tuple[Shaped[Array, "..."], Shaped[Array, "..."]],
    structure: Structure,
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """The map `later` after the map `earlier`: (A_2, b_2) o (A_1, b_1) = (A_2 A_1, A_2 b_1 + b_2).

    A pair (A, b) stands for h -> A h + b. Composition of maps is associative, with the identity (I, 0); it is not
    commutative. The k-th state is the b of the composition of the first k maps, applied to h_0:

        h_k = P_k h_0 + s_k,    (P_k, s_k) = (A_k, b_k) o ... o (A_1, b_1).

    Args:
        earlier: (A_1, b_1), shaped as in `affine_scan`, any leading axes.
        later: (A_2, b_2).
        structure: "diagonal", "block" or "dense".

    Returns:
        The pair (A_2 A_1, A_2 b_1 + b_2).

    Raises:
        ValueError: for an unknown structure.
    """
    _check_names(structure)
    (first, offset), (second, addend) = earlier, later
    product = _product(second, first, structure, columns=True)
    return product, _product(second, offset, structure) + addend


# The linear system, and its derivatives


def _linear_solve(
    rec: _Recurrence,
    A: jax.Array,
    b: jax.Array,
    initial: jax.Array | None,
    run: Callable[[_Recurrence, jax.Array, jax.Array, jax.Array | None], Element],
    previous: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """The states as the solution of a linear system, so that JAX derives every derivative from two solvers.

    `run(recurrence, A, b, carry)` returns (outputs, last carry); `previous(states, initial)` shifts by one step.
    The initial state is an unknown like the others (its equation is h_0 = h0): folding it into b would copy b.
    """

    def matvec(unknowns: tuple[jax.Array | None, jax.Array]) -> tuple[jax.Array | None, jax.Array]:
        start, states = unknowns
        return start, states - _product_for_gradients(A, previous(states, start), rec.structure, rec.columns)

    def solve(_: Any, right: tuple[jax.Array | None, jax.Array]) -> tuple[jax.Array | None, jax.Array]:
        start, inputs = right
        return start, run(rec, A, inputs, start)[0]

    def solve_transposed(_: Any, right: tuple[jax.Array | None, jax.Array]) -> tuple[jax.Array | None, jax.Array]:
        start, cotangent = right
        adjoint, carry = run(rec.transposed, A, cotangent, None)
        return (None if start is None else start + carry), adjoint

    if b.shape[rec.axis] == 0:
        return b
    # custom_linear_solve's rule fails where only A or only one of the other two carries a derivative (jax 0.10): behind
    # the barrier both of these do. A itself does not pass it, so that it stays known where b and initial are linear.
    _, initial, b = lax.optimization_barrier((A, initial, b))
    return lax.custom_linear_solve(matvec, (initial, b), solve, solve_transposed)[1]


def _previous(rec: _Recurrence, states: jax.Array, initial: jax.Array | None) -> jax.Array:
    """The state that each step starts from: `states` shifted by one in the order of processing."""
    last = states.shape[rec.axis] - 1
    if initial is None:
        initial = jnp.zeros_like(_at(states, 0, rec.axis))
    edge = jnp.expand_dims(initial, rec.axis)
    if rec.reverse:
        return jnp.concatenate([lax.slice_in_dim(states, 1, last + 1, axis=rec.axis), edge], rec.axis)
    return jnp.concatenate([edge, lax.slice_in_dim(states, 0, last, axis=rec.axis)], rec.axis)


# The solvers: (recurrence, A, b, carry or None) -> (outputs, last carry)


def _solve(
    rec: _Recurrence,
    A: jax.Array,
    b: jax.Array,
    carry: jax.Array | None,
    method: Method,
    chunk_size: int | None,
) -> Element:
    sequential = functools.partial(_sequential, rec)
    chunked = functools.partial(_chunked, rec, chunk_size=chunk_size or DEFAULT_CHUNK)
    if method == "parallel":
        return _parallel(rec, A, b, carry)
    if method == "sequential" or (method == "auto" and b.shape[rec.axis] <= ACCELERATOR_SEQUENTIAL_STEPS):
        return sequential(A, b, carry)
    if method == "auto":
        return lax.platform_dependent(A, b, carry, cpu=sequential, default=chunked)
    if chunk_size is not None or rec.structure == "diagonal":
        return chunked(A, b, carry)
    on_cpu = functools.partial(_chunked, rec, chunk_size=_chunk_size_on_cpu(rec, A, b))
    return lax.platform_dependent(A, b, carry, cpu=on_cpu, default=chunked)


def _chunk_size_on_cpu(rec: _Recurrence, A: jax.Array, b: jax.Array) -> int:
    """Few and long chunks where a step is small: as many as keep their products within FUSED_PRODUCTS, at least 4.

    Their number divides the length. Where no number up to twice that does, the chunks are short: see `_chunk_reader`.
    """
    steps = b.shape[rec.axis]
    products = A.size // A.shape[rec.axis] * b.shape[-2 if rec.structure == "block" else -1]
    least = FUSED_PRODUCTS // max(products, 1)
    sizes = (steps // count for count in range(least, 2 * least) if steps % count == 0)
    return max(DEFAULT_CHUNK, next(sizes, DEFAULT_CHUNK)) if least >= 4 else DEFAULT_CHUNK


# Unmeasured: a launch of a kernel costs a few microseconds on an accelerator, and below this length the chunked
# method's extra passes launch no fewer kernels than the steps that they would save.
ACCELERATOR_SEQUENTIAL_STEPS = 16


def _sequential(rec: _Recurrence, A: jax.Array, b: jax.Array, carry: jax.Array | None) -> Element:
    """One step after the other, reading and writing the time axis in place, wherever it is."""
    steps = b.shape[rec.axis]

    def time(position: Any) -> Any:
        return steps - 1 - position if rec.reverse else position

    first = _at(A, time(0), rec.axis), _at(b, time(0), rec.axis)
    output, carry = rec.start(*first) if carry is None else rec.step(*first, carry)

    def body(position: Any, loop: Element) -> Element:
        carry, outputs = loop
        t = time(position)
        output, carry = rec.step(_at(A, t, rec.axis), _at(b, t, rec.axis), carry)
        return carry, _put(outputs, output, t, rec.axis)

    outputs = _put(jnp.zeros_like(b), output, time(0), rec.axis)
    carry, outputs = _steps(steps, body, (carry, outputs))
    return outputs, carry


def _parallel(rec: _Recurrence, A: jax.Array, b: jax.Array, carry: jax.Array | None) -> Element:
    """`lax.associative_scan` over the pairs (A_t, b_t), or (A_t^T, A_t^T b_t) for the carries of the adjoint."""
    A = jnp.broadcast_to(A, (*A.shape[: rec.axis], b.shape[rec.axis], *A.shape[rec.axis + 1 :]))
    first = b.shape[rec.axis] - 1 if rec.reverse else 0
    matrix = rec.matrix(A)
    inputs = b
    if carry is not None:
        change = carry if rec.adjoint else rec.apply(_at(A, first, rec.axis), carry)
        inputs = _put(b, _at(b, first, rec.axis) + change, first, rec.axis)

    def compose(earlier: Element, later: Element) -> Element:
        product = _product(later[0], earlier[0], rec.structure, columns=True)
        return product, rec.apply(later[0], earlier[1]) + later[1]

    pairs = (matrix, rec.apply(matrix, inputs) if rec.adjoint else inputs)
    carries = lax.associative_scan(compose, pairs, reverse=rec.reverse, axis=rec.axis)[1]
    last = _at(carries, b.shape[rec.axis] - 1 - first, rec.axis)
    return (inputs + _previous(rec, carries, None) if rec.adjoint else carries), last


def _chunked(rec: _Recurrence, A: jax.Array, b: jax.Array, carry: jax.Array | None, chunk_size: int) -> Element:
    """Every chunk summarised as one map, the summaries solved, every chunk run again from its initial state.

    The steps that fill no chunk are run last and one by one: padding them would copy A and b.
    """
    axis, steps = rec.axis, b.shape[rec.axis]
    if steps < 2 * chunk_size:
        return _sequential(rec, A, b, carry)
    chunks, rest = divmod(steps, chunk_size)
    at = _chunk_reader(rec, A, b, chunks, chunk_size)
    entries, _ = _chunked(rec._replace(adjoint=False), *_summaries(rec, at, chunk_size), carry, chunk_size)
    a, inputs = at(0)
    output, carries = rec.step(a, inputs, _previous(rec, entries, carry))
    if carry is None and not rec.adjoint:
        # The very first A is not to be read: it may hold anything.
        first = chunks - 1 if rec.reverse else 0
        output = carries = _put(output, _at(inputs, first, axis), first, axis)
    outputs, carries = _rerun(rec, at, output, carries, chunk_size)
    outputs = outputs.reshape((*b.shape[:axis], chunks * chunk_size, *b.shape[axis + 1 :]))
    carry = _at(carries, 0 if rec.reverse else chunks - 1, axis)
    if rest == 0:
        return outputs, carry
    tail, carry = _sequential(rec, _last_steps(rec, A, rest), _last_steps(rec, b, rest), carry)
    return jnp.concatenate([tail, outputs] if rec.reverse else [outputs, tail], axis), carry


def _summaries(rec: _Recurrence, at: Callable[[Any], Element], chunk_size: int) -> Element:
    """The map of every chunk, from the carry that enters it to the carry that leaves it: (products, offsets)."""

    def body(position: Any, summary: Element) -> Element:
        a, inputs = at(position)
        product = _product(rec.matrix(a), summary[0], rec.structure, columns=True)
        return product, rec.step(a, inputs, summary[1])[1]

    a, inputs = at(0)
    return _steps(chunk_size, body, (rec.matrix(a), rec.start(a, inputs)[1]))


def _summary(rec: _Recurrence, A: jax.Array, b: jax.Array, method: Method) -> Element:
    """The map of all steps together, from the first carry to the last: (product, offset)."""
    steps = b.shape[rec.axis]
    in_one = functools.partial(_summary_by_chunks, rec, chunk_size=steps)
    by_chunks = functools.partial(_summary_by_chunks, rec, chunk_size=DEFAULT_CHUNK)
    if method == "sequential" or steps <= ACCELERATOR_SEQUENTIAL_STEPS:
        return in_one(A, b)
    if method == "auto":
        return lax.platform_dependent(A, b, cpu=in_one, default=by_chunks)
    return by_chunks(A, b)


def _summary_by_chunks(rec: _Recurrence, A: jax.Array, b: jax.Array, chunk_size: int) -> Element:
    chunks, rest = divmod(b.shape[rec.axis], chunk_size)
    if chunks == 0:
        return _summary_by_chunks(rec, A, b, b.shape[rec.axis])
    summaries = _summaries(rec, _chunk_reader(rec, A, b, chunks, chunk_size), chunk_size)
    forward = rec._replace(adjoint=False)
    if chunks > 1:
        summary = _summary_by_chunks(forward, *summaries, chunk_size)
    else:
        summary = _at(summaries[0], 0, rec.axis), _at(summaries[1], 0, rec.axis)
    if rest == 0:
        return summary
    tail = _summary_by_chunks(rec, _last_steps(rec, A, rest), _last_steps(rec, b, rest), rest)
    return combine(summary, tail, rec.structure)


def _rerun(
    rec: _Recurrence,
    at: Callable[[Any], Element],
    output: jax.Array,
    carries: jax.Array,
    chunk_size: int,
) -> Element:
    """The outputs of all chunks, as (chunks, chunk_size) on the time axis, from the first output and carries on."""
    after = rec.axis + 1
    if chunk_size <= UNROLLED:
        outputs = [output]
        for position in range(1, chunk_size):
            output, carries = rec.step(*at(position), carries)
            outputs.append(output)
        return jnp.stack(outputs[::-1] if rec.reverse else outputs, after), carries

    def put(outputs: jax.Array, output: jax.Array, position: Any) -> jax.Array:
        return _put(outputs, output, chunk_size - 1 - position if rec.reverse else position, after)

    def body(position: Any, loop: Element) -> Element:
        carries, outputs = loop
        output, carries = rec.step(*at(position), carries)
        return carries, put(outputs, output, position)

    empty = jnp.zeros((*output.shape[:after], chunk_size, *output.shape[after:]), output.dtype)
    carries, outputs = _steps(chunk_size, body, (carries, put(empty, output, 0)))
    return outputs, carries


def _chunk_reader(
    rec: _Recurrence, A: jax.Array, b: jax.Array, chunks: int, chunk_size: int
) -> Callable[[Any], Element]:
    """A function position -> (A, b) at that step, in the order of processing, of every chunk, in the order of time."""
    axis = rec.axis
    first = b.shape[axis] - chunks * chunk_size if rec.reverse else 0

    def in_chunks(x: jax.Array) -> jax.Array:
        if x.shape[axis] == 1:
            return jnp.expand_dims(x, axis)
        x = lax.slice_in_dim(x, first, first + chunks * chunk_size, axis=axis)
        return x.reshape((*x.shape[:axis], chunks, chunk_size, *x.shape[axis + 1 :]))

    def strided(x: jax.Array, step: int) -> jax.Array:
        if x.shape[axis] == 1:
            return x
        last = first + (chunks - 1) * chunk_size + step
        return lax.slice_in_dim(x, first + step, last + 1, chunk_size, axis)

    # Inside a loop's body XLA:CPU computes the index of every number that such a view reads; outside it, a view of
    # fewer steps than there are is a copy.
    whole = chunk_size > UNROLLED and chunks * chunk_size == b.shape[axis]
    views = (in_chunks(A), in_chunks(b)) if whole else None

    def at(position: Any) -> Element:
        step = chunk_size - 1 - position if rec.reverse else position
        if views is None and isinstance(step, int):
            return strided(A, step), strided(b, step)
        a, inputs = views or (in_chunks(A), in_chunks(b))
        return _at(a, step, axis + 1), _at(inputs, step, axis + 1)

    return at


def _last_steps(rec: _Recurrence, x: jax.Array, count: int) -> jax.Array:
    """The last `count` steps in the order of processing (a constant stays as it is)."""
    steps = x.shape[rec.axis]
    if steps == 1:
        return x
    first = 0 if rec.reverse else steps - count
    return lax.slice_in_dim(x, first, first + count, axis=rec.axis)


def _steps(steps: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`body` at the positions 1..steps-1, as straight-line code if they are few."""
    if steps > UNROLLED:
        return lax.fori_loop(1, steps, body, carry)
    for position in range(1, steps):
        carry = body(position, carry)
    return carry


def _at(x: jax.Array, t: Any, axis: int) -> jax.Array:
    """The slice at time t; a constant (size 1) has one for all times."""
    t = 0 if x.shape[axis] == 1 else t
    return lax.dynamic_index_in_dim(x, t, axis, keepdims=False, allow_negative_indices=False)


def _put(x: jax.Array, value: jax.Array, t: Any, axis: int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, axis, allow_negative_indices=False)


# Products of small matrices


def _product(a: jax.Array, x: jax.Array, structure: Structure, columns: bool = False) -> jax.Array:
    """The matrix a times the vector x, or times the matrix x if `columns`."""
    if structure == "diagonal":
        return a * x
    left, right, summed = _terms(a, x, structure, columns)
    if math.prod(jnp.broadcast_shapes(left.shape, right.shape)) <= FUSED_PRODUCTS:
        return jnp.sum(left * right, summed)
    if structure == "dense":
        spec = "...oi,...ij->...oj" if columns else "...oi,...i->...o"
        return jnp.einsum(spec, a, x, precision=lax.Precision.HIGHEST)
    # Entry by entry: each is one vectorised pass over the leading axes and the blocks.
    size = a.shape[-2]
    if columns:
        columns_out = range(x.shape[-2])
        rows = [
            jnp.stack([sum(a[..., o, i, :] * x[..., i, j, :] for i in range(size)) for j in columns_out], -2)
            for o in range(size)
        ]
        return jnp.stack(rows, -3)
    return jnp.stack([sum(a[..., o, i, :] * x[..., i, :] for i in range(size)) for o in range(size)], -2)


def _product_for_gradients(a: jax.Array, x: jax.Array, structure: Structure, columns: bool) -> jax.Array:
    """`_product` in the form whose transpose, the gradient with respect to a, is one outer product."""
    if structure != "block":
        return _product(a, x, structure, columns)
    left, right, summed = _terms(a, x, structure, columns)
    return jnp.sum(left * right, summed)


def _terms(a: jax.Array, x: jax.Array, structure: Structure, columns: bool) -> tuple[jax.Array, jax.Array, int]:
    """Two arrays whose product, summed over the returned axis, is the matrix a times x."""
    if structure == "dense":
        return (a[..., None], x[..., None, :, :], -2) if columns else (a, x[..., None, :], -1)
    return (a[..., None, :], x[..., None, :, :, :], -3) if columns else (a, x[..., None, :, :], -2)


def _identity(A: jax.Array, structure: Structure) -> jax.Array:
    """The matrix that changes nothing, broadcastable to one A_t."""
    if structure == "diagonal":
        return jnp.ones((1,), A.dtype)
    eye = jnp.eye(A.shape[-2], dtype=A.dtype)
    return eye[..., None] if structure == "block" else eye


# Checks at the door


def _check_names(structure: str, method: str = "auto", chunk_size: int | None = None) -> None:
    if structure not in STRUCTURES:
        raise ValueError(f"structure {structure!r} is unknown, expected one of {STRUCTURES}")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown, expected one of {METHODS}")
    if chunk_size is not None and chunk_size < 2:
        raise ValueError(f"chunk_size {chunk_size} is too small, expected at least 2 steps in a chunk")


def _canonical(
    A: Any, b: Any, h0: Any | None, structure: Structure, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array | None, Any]:
    """A, b and h0 in the dtype of the computation, with equal numbers of leading axes, b and h0 in full shape.

    Also returns the dtype of the result.
    """
    inputs = [jnp.asarray(x) for x in (A, b, *(() if h0 is None else (h0,)))]
    dtype = jnp.result_type(*inputs)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"A, b and h0 must be float or complex, got dtypes {[str(x.dtype) for x in inputs]}")
    A, b, *rest = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in inputs)
    shapes = f"A {A.shape} and b {b.shape} for structure {structure!r} and time axis {axis}"
    matrix_axes, vector_axes = MATRIX_AXES[structure], VECTOR_AXES[structure]
    if A.ndim <= matrix_axes or b.ndim <= vector_axes:
        raise ValueError(f"{shapes}: A needs {matrix_axes} and b {vector_axes} state axes after the time axis")
    leading = max(A.ndim - matrix_axes, b.ndim - vector_axes)
    if not 0 <= axis < leading:
        raise ValueError(f"{shapes}: the time axis must be one of the leading axes 0..{leading - 1}")
    A, b = (_with_batch(x, axes, leading, axis) for x, axes in ((A, matrix_axes), (b, vector_axes)))
    if A.ndim - matrix_axes != leading or b.ndim - vector_axes != leading:
        raise ValueError(f"{shapes}: the numbers of leading axes differ, and neither is time alone")
    if not _state_fits(A.shape[leading:], b.shape[leading:], structure):
        raise ValueError(f"{shapes}: the state axes {A.shape[leading:]} and {b.shape[leading:]} do not fit")
    if A.shape[axis] not in (1, b.shape[axis]):
        raise ValueError(f"{shapes}: A has {A.shape[axis]} time steps, b has {b.shape[axis]}")
    without_time = [x.shape[:axis] + x.shape[axis + 1 : leading] for x in (A, b)]
    try:
        batch = jnp.broadcast_shapes(*without_time)
    except ValueError as error:
        raise ValueError(f"{shapes}: the batch axes {without_time} do not broadcast") from error
    state = b.shape[leading:]
    b = jnp.broadcast_to(b, (*batch[:axis], b.shape[axis], *batch[axis:], *state))
    if not rest:
        return A, b, None, dtype
    try:
        return A, b, jnp.broadcast_to(rest[0], batch + state), dtype
    except ValueError as error:
        raise ValueError(f"h0 {rest[0].shape} does not broadcast to a time slice of b, {batch + state}") from error


def _with_batch(x: jax.Array, state_axes: int, leading: int, axis: int) -> jax.Array:
    """An array with time as its only leading axis gets batch axes of size 1 around it."""
    if x.ndim - state_axes != 1:
        return x
    return x.reshape((1,) * axis + x.shape[:1] + (1,) * (leading - axis - 1) + x.shape[1:])


def _state_fits(matrix: tuple[int, ...], vector: tuple[int, ...], structure: Structure) -> bool:
    if structure == "diagonal":
        return matrix[0] in (1, vector[0])
    if structure == "dense":
        return matrix == (vector[0], vector[0])
    return matrix[:2] == (vector[0], vector[0]) and matrix[2] in (1, vector[1])
