"""Nonlinear recurrences whose channels are independent, in one pass over memory: Pallas kernels for TPU and GPU.

Where df/dh is diagonal, or made of small blocks with one block a channel, no channel needs another: a tile of channels
keeps its state on chip, runs through time, reads every input once and writes every state once. That is the limit of
the hardware, and no Newton iteration is needed for it (ParaRNN, arXiv 2510.21450, App. D, fuses the iteration).

    forward    h_t = f(h_{t-1}, x_t)                                        t = 1..L, h in registers
    backward   (dx_t, dtheta, lambda') = vjp of f at (h_{t-1}, x_t), applied to lambda + g_t;   lambda <- lambda'

The backward kernel runs from L to 1, reads h_{t-1} from the states (shifted by one where they lie, not copied), writes
dx once, sums dtheta on chip, and ends with dh_0 = lambda.

f is an ordinary JAX function of one step of one sequence. Its jaxpr (and that of its vjp, so that custom derivatives
hold) is evaluated on tiles: the last axis of every array in it is the channels, all axes before it are loops in Python,
so that f[0], stack, reshapes and sums over gates cost nothing on either chip. What mixes channels is refused.

Tiles. TPU: channels on the 128 lanes, sequences on the sublanes (with fewer than 8 sequences, groups of 128 channels);
4096 numbers a tile and array, four float32 registers of 8 x 128 for each dependent step, to hide the latency of its
transcendentals. The time block is what fits: arrays of one step, twice (the next block is fetched meanwhile), within
BUDGET = 8 MiB of the 16 MiB of VMEM that a kernel may use on v5e and v5p by default. A float32 GRU moves 4 arrays
(3 gates in, 1 state out), 64 KiB a step: blocks of 64 steps; its backward pass 8: 32 steps. GPU: a program for each
sequence and 128 channels, state and gradients in registers, one number a thread. Measured on: nothing yet.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.extend import core
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

from jaxpapers.ops._tiles import filled, on_tiles

TILE = 4096  # numbers of one array in a TPU tile
LANES, SUBLANES = 128, 8
WIDEST = 512  # channels of a TPU tile
LONGEST = 256  # steps of a TPU block
BUDGET = 8 * 2**20  # bytes of VMEM for blocks
GPU_TILE = 128  # channels of a GPU program
KINDS = ("tpu", "gpu")


def fused_states(
    step: Callable[..., Array],
    constants: Sequence[Shaped[Array, "..."]],
    xs: PyTree[Shaped[Array, "time ..."]],
    h0: Shaped[Array, "..."],
    *,
    state_axes: int,
    kind: str | None = None,
    mesh: Mesh | None = None,
) -> Shaped[Array, "time ..."]:
    """h_1..h_L of h_t = step(h_{t-1}, x_t, *constants), by one kernel.

    Args:
        step: of one sequence, `(state, input, *constants) -> state`; its state and inputs are float32 (float64 where
            those come in), its constants what they are.
        constants: floats, scalars or (..., n).
        xs: inputs (time, *batch, ..., n), floats. Axes between batch and channels are moved before the batch on TPU:
            a copy, unless the compiler lets the producer write them so. A tuple of (time, *batch, n) needs none.
        h0: (*batch, n), or (*batch, k, n).
        state_axes: 1 or 2.
        kind: "tpu" or "gpu": that kernel, interpreted, on any platform. None: the platform's own; on CPU the TPU
            kernel, interpreted.
        mesh: split the first batch axis over the mesh axis `data`, a kernel on each device; in a program for several
            devices there is no other way, as the compiler cannot split a kernel.

    Returns:
        (time, *batch, *state) in the dtype of h0. No derivatives: `fused_cotangents` has them.

    Raises:
        ValueError: shapes or dtypes that do not fit; a step that mixes channels; a batch that the mesh does not
            divide.
    """
    if mesh is not None:
        local = functools.partial(fused_states, step, state_axes=state_axes, kind=kind)
        batch, timed = _split_batch(mesh, h0, state_axes)
        shard = jax.shard_map(local, mesh=mesh, in_specs=(P(), timed, batch), out_specs=timed, check_vma=False)
        return shard(tuple(constants), xs, h0)
    problem = _problem(step, constants, xs, h0, state_axes)
    run = functools.partial(_forward, problem)
    flat = (problem.consts, problem.flat_xs(xs), problem.flat(h0))
    states = _dispatch(run, kind, flat)
    return states.reshape(states.shape[0], *h0.shape)


def fused_cotangents(
    step: Callable[..., Array],
    constants: Sequence[Shaped[Array, "..."]],
    xs: PyTree[Shaped[Array, "time ..."]],
    h0: Shaped[Array, "..."],
    states: Shaped[Array, "time ..."],
    cotangent: Shaped[Array, "time ..."],
    *,
    state_axes: int,
    kind: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[tuple[Array, ...], PyTree[Array], Array]:
    """Cotangents of constants, xs and h0 from that of the states, by one kernel backwards in time.

    Args:
        step: as in `fused_states`.
        constants: as in `fused_states`.
        xs: as in `fused_states`.
        h0: as in `fused_states`.
        states: what `fused_states` returned.
        cotangent: of the states.
        state_axes: as in `fused_states`.
        kind: as in `fused_states`.
        mesh: as in `fused_states`.

    Returns:
        (constants, xs, h0), shaped and typed like these.

    Raises:
        ValueError: as `fused_states`.
    """
    if mesh is not None:

        def local(constants: tuple, *arrays: Any) -> tuple:
            of_step, of_xs, of_h0 = fused_cotangents(step, constants, *arrays, state_axes=state_axes, kind=kind)
            return lax.psum(of_step, "data"), of_xs, of_h0

        batch, timed = _split_batch(mesh, h0, state_axes)
        specs = (P(), timed, batch, timed, timed)
        shard = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[:3], check_vma=False)
        return shard(tuple(constants), xs, h0, states, cotangent)
    problem = _problem(step, constants, xs, h0, state_axes)
    run = functools.partial(_backward, problem)
    args = (problem.consts, problem.flat_xs(xs), problem.flat(h0), problem.flat(states, 1), problem.flat(cotangent, 1))
    dconsts, dxs, dh0 = _dispatch(run, kind, args)
    leaves, tree = jax.tree.flatten(xs)
    dxs = [dx.reshape(x.shape) for dx, x in zip(dxs, leaves, strict=True)]
    dconstants = []
    for dc, c in zip(dconsts, constants, strict=True):
        summed = dc.sum(0)
        dconstants.append((summed if c.ndim else summed.sum()).astype(c.dtype))
    return tuple(dconstants), jax.tree.unflatten(tree, dxs), dh0.reshape(h0.shape).astype(h0.dtype)


def fusable(
    step: Callable[..., Array],
    constants: Sequence[Shaped[Array, "..."]],
    xs: PyTree[Shaped[Array, "time ..."]],
    h0: Shaped[Array, "..."],
    *,
    state_axes: int,
    mesh: Mesh | None = None,
) -> bool:
    """Whether `fused_states` takes these arguments as they are, of float32 or float64."""
    if any(computed(leaf.dtype) != leaf.dtype for leaf in jax.tree.leaves((xs, h0))):
        return False
    try:
        if mesh is not None:
            _split_batch(mesh, h0, state_axes)
        _problem(step, constants, xs, h0, state_axes)
    except ValueError:
        return False
    return True


def _split_batch(mesh: Mesh, h0: Array, state_axes: int) -> tuple[P, P]:
    """Places of arrays (batch, ...) and (time, batch, ...)."""
    batch = h0.shape[: h0.ndim - state_axes]
    devices = mesh.shape.get("data", 0)
    if not devices or not batch or batch[0] % devices:
        raise ValueError(f"a batch of {batch} does not divide over the axis 'data' of the mesh {dict(mesh.shape)}")
    return P("data"), P(None, "data")


def _dispatch(run: Callable, kind: str | None, args: tuple) -> Any:
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown, expected one of {KINDS}")
        return run(kind, True, *args)
    # By the platform that is compiled for, not the one that compiles: planning for a TPU needs no TPU.
    gpu = functools.partial(run, "gpu", False)
    return lax.platform_dependent(
        *args,
        cpu=functools.partial(run, "tpu", True),
        tpu=functools.partial(run, "tpu", False),
        cuda=gpu,
        rocm=gpu,
    )


class _Problem(NamedTuple):
    """The step as jaxprs over one sequence, and what they need."""

    step: core.ClosedJaxpr  # (h, *inputs, *consts) -> h
    pullback: core.ClosedJaxpr  # (lambda, h, *inputs, *consts) -> (dh, *dinputs, *dconstants)
    consts: tuple[Array, ...]  # the differentiated constants, and after them those that are not
    differentiated: int
    batch: tuple[int, ...]
    rows: int
    channels: int
    lead: tuple[int, ...]  # of the state
    dtype: Any  # of the computation

    def flat(self, array: Array, before: int = 0) -> Array:
        """One batch axis."""
        after = array.shape[before + len(self.batch) :]
        return array.reshape(*array.shape[:before], self.rows, *after)

    def flat_xs(self, xs: PyTree) -> tuple[Array, ...]:
        return tuple(self.flat(x, 1) for x in jax.tree.leaves(xs))


def _problem(step: Callable, constants: Sequence[Array], xs: PyTree, h0: Array, state_axes: int) -> _Problem:
    leaves, tree = jax.tree.flatten(xs)
    batch, state = h0.shape[: h0.ndim - state_axes], h0.shape[h0.ndim - state_axes :]
    channels = state[-1]
    for x in leaves:
        if x.ndim < 2 + len(batch) or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"an input {x.shape} of {x.dtype} must be (time, *batch, ..., {channels}) floats")
    if 0 in h0.shape or any(0 in x.shape for x in leaves):
        raise ValueError(f"empty arrays: xs {[x.shape for x in leaves]}, h0 {h0.shape}")

    def one(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, computed(dtype))

    h = one(state, h0.dtype)
    inputs = [one(x.shape[1 + len(batch) :], x.dtype) for x in leaves]

    def flat_step(h: Array, *rest: Array) -> Array:
        return step(h, jax.tree.unflatten(tree, rest[: len(inputs)]), *rest[len(inputs) :])

    given = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in constants]
    traced = jax.make_jaxpr(flat_step)(h, *inputs, *given)
    out = traced.out_avals[0]
    if (out.shape, out.dtype) != (h.shape, h.dtype):
        raise ValueError(f"f maps a state {h.shape} of {h.dtype} to {out.shape} of {out.dtype}")
    # Arrays that the step closes over and that are not differentiated are inputs of the kernel like the others.
    consts = (*constants, *map(jnp.asarray, traced.consts))
    for c in consts:
        if (c.ndim and c.shape[-1] != channels) or not jnp.issubdtype(c.dtype, jnp.floating):
            raise ValueError(
                f"a constant {c.shape} of {c.dtype} that f closes over must be a scalar or (..., {channels}) floats"
            )

    def pulled(closed: Any, cotangent: Array, h: Array, *rest: Array) -> Any:
        arguments = (h, *rest[: len(inputs) + len(constants)])
        hidden = rest[len(inputs) + len(constants) :]
        return jax.vjp(lambda *a: core.jaxpr_as_fun(closed)(*a, *hidden)[0], *arguments)[1](cotangent)

    hidden = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in consts[len(constants) :]]
    arguments = (h, *inputs, *given, *hidden)
    number = len(traced.consts)

    def open_step(*args: Array) -> list[Array]:
        arguments, consts = (args[:-number], args[-number:]) if number else (args, ())
        return jax.core.eval_jaxpr(traced.jaxpr, consts, *arguments)

    closed = jax.make_jaxpr(open_step)(*arguments)
    pullback = jax.make_jaxpr(functools.partial(pulled, closed))(h, *arguments)
    problem = _Problem(closed, pullback, consts, len(constants), batch, math.prod(batch), channels, state[:-1], h.dtype)
    _check_channels(problem, arguments)
    return problem


def computed(dtype: Any) -> Any:
    """The dtype of the arithmetic: float32, or float64 where that comes in."""
    return jnp.promote_types(dtype, jnp.float32)


def _check_channels(problem: _Problem, arguments: Sequence[jax.ShapeDtypeStruct]) -> None:
    """Evaluates the step on tiles of no particular size, for the errors."""

    def run(tile: Array) -> list[Array]:
        values = [filled(a.shape[:-1], tile.astype(a.dtype)) for a in arguments]
        (out,) = on_tiles(problem.step, problem.channels, values, partial_sums=False)
        return [jnp.asarray(o) for o in np.broadcast_to(out, problem.lead).ravel()]

    jax.eval_shape(run, jax.ShapeDtypeStruct((3, 5), jnp.float32))


class _Layout(NamedTuple):
    """Where rows (sequences), channels and time lie in the kernel's arrays, and its tiles.

    tpu: (time, *lead, rows, channels), in blocks of (block, *lead, row_tile, channel_tile), time the innermost grid
    axis. Blocks that reach over an edge read anything there, and what they write there is dropped: rows and channels
    are independent, and steps beyond the last are not run. gpu: (time, rows, *lead, channels), channels padded; one
    program for all times, whose blocks are addresses.
    """

    kind: str
    steps: int
    rows: int
    channels: int
    folded: bool
    row_tile: int
    channel_tile: int
    block: int

    @property
    def grid(self) -> tuple[int, ...]:
        if self.kind == "gpu":
            return self.rows, -(-self.channels // self.channel_tile)
        rows, channels = self.kernel_axes
        return -(-rows // self.row_tile), -(-channels // self.channel_tile), -(-self.steps // self.block)

    @property
    def kernel_axes(self) -> tuple[int, int]:
        return (self.rows * self.channels // LANES, LANES) if self.folded else (self.rows, self.channels)

    @property
    def padding(self) -> int:
        return -self.channels % self.channel_tile if self.kind == "gpu" else 0

    def place(self, array: Array, timed: bool) -> Array:
        """(time?, rows, *lead, channels) to the kernel's."""
        if self.kind == "gpu":
            return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, self.padding)]) if self.padding else array
        array = jnp.moveaxis(array, int(timed), -2)
        return array.reshape(*array.shape[:-2], *self.kernel_axes)

    def back(self, array: Array, timed: bool) -> Array:
        """The kernel's to (time?, rows, *lead, channels)."""
        if self.kind == "gpu":
            return array[..., : self.channels]
        array = array.reshape(*array.shape[:-2], self.rows, self.channels)
        return jnp.moveaxis(array, -2, int(timed))

    def shape(self, lead: tuple[int, ...], dtype: Any, timed: bool) -> jax.ShapeDtypeStruct:
        time = (self.steps,) if timed else ()
        if self.kind == "gpu":
            return jax.ShapeDtypeStruct((*time, self.rows, *lead, self.channels + self.padding), dtype)
        return jax.ShapeDtypeStruct((*time, *lead, *self.kernel_axes), dtype)

    def spec(self, lead: tuple[int, ...], time: Callable | None = None, block: int | None = None) -> pl.BlockSpec:
        """The block of a program: `time(chunk)` numbers those along time; None for arrays without time."""
        zeros = (0,) * len(lead)
        if self.kind == "gpu":
            whole = () if time is None else (self.steps,)
            return pl.BlockSpec(
                (*whole, None, *lead, self.channel_tile), lambda r, c: (*(0 for _ in whole), r, *zeros, c)
            )
        tile = (*lead, self.row_tile, self.channel_tile)
        if time is None:
            return pl.BlockSpec(tile, lambda r, c, t: (*zeros, r, c))
        return pl.BlockSpec((block or self.block, *tile), lambda r, c, t: (time(t), *zeros, r, c))

    def chunk(self) -> Any:
        return pl.program_id(2) if self.kind == "tpu" else 0

    def steps_in(self, block: Any) -> Any:
        """Steps of a block of time that are real."""
        if self.steps % self.block == 0:
            return self.block
        return jnp.minimum(self.block, self.steps - block * self.block)

    @property
    def options(self) -> dict[str, Any]:
        if self.kind == "gpu":
            return {"compiler_params": plgpu.CompilerParams(num_warps=max(1, self.channel_tile // 32), num_stages=1)}
        return {"compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))}


def _layout(kind: str, problem: _Problem, timed: Sequence[tuple[tuple[int, ...], Any]], steps: int) -> _Layout:
    rows, channels = problem.rows, problem.channels
    if kind == "gpu":
        tile = min(GPU_TILE, max(16, pl.next_power_of_2(channels)))
        return _Layout(kind, steps, rows, channels, False, 1, tile, steps)
    folded = rows < SUBLANES and channels % LANES == 0 and channels > LANES
    kernel_rows, kernel_channels = (rows * channels // LANES, LANES) if folded else (rows, channels)
    channel_tile = min(kernel_channels, WIDEST)
    padded_channels = -(-channel_tile // LANES) * LANES
    row_tile = min(kernel_rows, max(SUBLANES, TILE // padded_channels // SUBLANES * SUBLANES))
    padded_rows = -(-row_tile // SUBLANES) * SUBLANES
    numbers = padded_rows * padded_channels
    step_bytes = sum(math.prod(lead) * numbers * jnp.dtype(dtype).itemsize for lead, dtype in timed)
    block = max(1, min(steps, LONGEST, BUDGET // (2 * step_bytes)))
    return _Layout(kind, steps, rows, channels, folded, row_tile, channel_tile, block)


def _read(ref: Any, lead: tuple[int, ...], dtype: Any, time: tuple = ()) -> np.ndarray:
    value = np.empty(lead, object)
    for index in np.ndindex(lead):
        place = (*time, *index)
        value[index] = ref[place if place else ...].astype(dtype)
    return value


def _write(ref: Any, lead: tuple[int, ...], value: np.ndarray, time: tuple = ()) -> None:
    for index in np.ndindex(lead):
        place = (*time, *index)
        tile = np.broadcast_to(value, lead)[index]
        tile_shape = ref.shape[len(place) :]
        ref[place if place else ...] = jnp.broadcast_to(tile, tile_shape).astype(ref.dtype)


def _chosen(first: Any, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    out = np.empty(one.shape, object)
    for index in np.ndindex(one.shape):
        out[index] = jnp.where(first, one[index], other[index])
    return out


def _listed(value: np.ndarray, lead: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> list[Array]:
    """Tiles for the carry of a loop: all of one shape and dtype."""
    return [jnp.broadcast_to(tile, shape).astype(dtype) for tile in np.broadcast_to(value, lead).ravel()]


def _unlisted(tiles: Sequence[Array], lead: tuple[int, ...]) -> np.ndarray:
    value = np.empty(lead, object)
    for index, tile in zip(np.ndindex(lead), tiles, strict=True):
        value[index] = tile
    return value


def _with_rows(problem: _Problem, layout: _Layout, const: Array) -> Array:
    """A constant for every sequence: read once, not once a step, and its gradient needs no sum inside the kernel."""
    const = jnp.broadcast_to(const, (*const.shape[:-1], problem.channels))
    return layout.place(jnp.broadcast_to(const, (problem.rows, *const.shape)), timed=False)


def _forward(problem: _Problem, kind: str, interpret: bool, consts: tuple, xs: tuple, h0: Array) -> Array:
    steps, lead = xs[0].shape[0], problem.lead
    x_leads = [x.shape[2:-1] for x in xs]
    c_leads = [c.shape[:-1] for c in consts]
    timed = [*((x_lead, x.dtype) for x_lead, x in zip(x_leads, xs, strict=True)), (lead, h0.dtype)]
    layout = _layout(kind, problem, timed, steps)

    def kernel(*refs: Any) -> None:
        x_refs, h0_ref, c_refs = refs[: len(xs)], refs[len(xs)], refs[len(xs) + 1 : -2]
        states_ref, last_ref = refs[-2:]
        chunk = layout.chunk()
        constants = [_read(ref, c, ref.dtype) for ref, c in zip(c_refs, c_leads, strict=True)]
        h = _read(h0_ref, lead, problem.dtype)
        if kind == "tpu":
            h = _chosen(chunk == 0, h, _read(last_ref, lead, problem.dtype))
        tile = h.flat[0].shape

        def body(t: Any, h: list[Array]) -> list[Array]:
            inputs = [_read(ref, x, computed(ref.dtype), (t,)) for ref, x in zip(x_refs, x_leads, strict=True)]
            arguments = [_unlisted(h, lead), *inputs, *constants]
            (new,) = on_tiles(problem.step, problem.channels, arguments, partial_sums=False)
            _write(states_ref, lead, new, (t,))
            return _listed(new, lead, tile, problem.dtype)

        h = lax.fori_loop(0, layout.steps_in(chunk), body, _listed(h, lead, tile, problem.dtype))
        _write(last_ref, lead, _unlisted(h, lead))

    states, _ = pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[
            *(layout.spec(x, lambda t: t) for x in x_leads),
            layout.spec(lead),
            *(layout.spec(c) for c in c_leads),
        ],
        out_specs=[layout.spec(lead, lambda t: t), layout.spec(lead)],
        out_shape=[layout.shape(lead, h0.dtype, True), layout.shape(lead, problem.dtype, False)],
        interpret=interpret,
        name="recurrence_forward",
        **layout.options,
    )(
        *(layout.place(x, timed=True) for x in xs),
        layout.place(h0, timed=False),
        *(_with_rows(problem, layout, c) for c in consts),
    )
    return layout.back(states, timed=True)


def _backward(
    problem: _Problem, kind: str, interpret: bool, consts: tuple, xs: tuple, h0: Array, states: Array, cotangent: Array
) -> tuple[list[Array], list[Array], Array]:
    steps, lead = xs[0].shape[0], problem.lead
    x_leads = [x.shape[2:-1] for x in xs]
    c_leads = [c.shape[:-1] for c in consts]
    d_leads = c_leads[: problem.differentiated]
    d_dtypes = [computed(c.dtype) for c in consts[: problem.differentiated]]
    timed = [(x_lead, x.dtype) for x_lead, x in zip(x_leads, xs, strict=True)]
    layout = _layout(kind, problem, [*timed, *timed, (lead, h0.dtype), (lead, cotangent.dtype)], steps)
    blocks = 1 if kind == "gpu" else layout.grid[2]
    before = [states] if kind == "tpu" else []

    def backwards(t: Any) -> Any:
        return blocks - 1 - t

    def just_before(t: Any) -> Any:
        return jnp.maximum(backwards(t) * layout.block - 1, 0)

    def kernel(*refs: Any) -> None:
        rest = iter(refs)
        x_refs = [next(rest) for _ in xs]
        h0_ref, states_ref, g_ref = next(rest), next(rest), next(rest)
        before_refs = [next(rest) for _ in before]
        c_refs = [next(rest) for _ in consts]
        dx_refs = [next(rest) for _ in xs]
        dh0_ref = next(rest)
        dc_refs = list(rest)
        chunk = layout.chunk()
        block = backwards(chunk)
        count = layout.steps_in(block)
        constants = [_read(ref, c, ref.dtype) for ref, c in zip(c_refs, c_leads, strict=True)]
        first = _read(h0_ref, lead, problem.dtype)
        for ref in before_refs:
            first = _chosen(block == 0, first, _read(ref, lead, problem.dtype, (0,)))
        tile = first.flat[0].shape

        def start(ref: Any, lead: tuple[int, ...], dtype: Any) -> list[Array]:
            zeros = filled(lead, jnp.zeros(tile, dtype))
            # What the kernel adds up stays in its output block, from one block of time to the next.
            value = zeros if kind == "gpu" else _chosen(chunk == 0, zeros, _read(ref, lead, dtype))
            return _listed(value, lead, tile, dtype)

        def body(i: Any, carry: tuple) -> tuple:
            carried, sums = carry
            t = count - 1 - i
            earlier = _read(states_ref, lead, problem.dtype, (jnp.maximum(t - 1, 0),))
            prev = _chosen(t == 0, first, earlier)
            g = _read(g_ref, lead, problem.dtype, (t,))
            total = _unlisted([a + b for a, b in zip(g.ravel(), carried, strict=True)], lead)
            inputs = [_read(ref, x, computed(ref.dtype), (t,)) for ref, x in zip(x_refs, x_leads, strict=True)]
            dh, *others = on_tiles(
                problem.pullback, problem.channels, [total, prev, *inputs, *constants], partial_sums=True
            )
            for ref, x, dx in zip(dx_refs, x_leads, others[: len(xs)], strict=True):
                _write(ref, x, dx, (t,))
            added = [
                [s + d for s, d in zip(sum_, _listed(dc, c, tile, dtype), strict=True)]
                for sum_, dc, c, dtype in zip(sums, others[len(xs) :], d_leads, d_dtypes, strict=True)
            ]
            return _listed(dh, lead, tile, problem.dtype), added

        sums = [start(ref, c, dtype) for ref, c, dtype in zip(dc_refs, d_leads, d_dtypes, strict=True)]
        carried, sums = lax.fori_loop(0, count, body, (start(dh0_ref, lead, problem.dtype), sums))
        _write(dh0_ref, lead, _unlisted(carried, lead))
        for ref, c, sum_ in zip(dc_refs, d_leads, sums, strict=True):
            _write(ref, c, _unlisted(sum_, c))

    x_specs = [layout.spec(x, backwards) for x in x_leads]
    outs = pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[
            *x_specs,
            layout.spec(lead),
            layout.spec(lead, backwards),
            layout.spec(lead, backwards),
            *(layout.spec(lead, just_before, 1) for _ in before),
            *(layout.spec(c) for c in c_leads),
        ],
        out_specs=[*x_specs, layout.spec(lead), *(layout.spec(c) for c in d_leads)],
        out_shape=[
            *(layout.shape(lead, dtype, True) for lead, dtype in timed),
            layout.shape(lead, problem.dtype, False),
            *(layout.shape(c, dtype, False) for c, dtype in zip(d_leads, d_dtypes, strict=True)),
        ],
        interpret=interpret,
        name="recurrence_backward",
        **layout.options,
    )(
        *(layout.place(x, timed=True) for x in xs),
        layout.place(h0, timed=False),
        *(layout.place(array, timed=True) for array in (states, cotangent, *before)),
        *(_with_rows(problem, layout, c) for c in consts),
    )
    dxs = [layout.back(dx, timed=True) for dx in outs[: len(xs)]]
    dh0, dconsts = outs[len(xs)], outs[len(xs) + 1 :]
    return [layout.back(dc, timed=False) for dc in dconsts], dxs, layout.back(dh0, timed=False)
