"""Nonlinear recurrences (ParaGRU, ParaLSTM): every method against `lax.scan` and DEER; a language model's update.

The cells run over given pre-activations: input maps and projections are left out. With --grad every rival also computes
the gradients of sum h^2 with respect to pre-activations and parameters; the language model's update, which has
gradients in any case, is part of the run without. Two rivals come from outside of the library:

- `lax.scan`: the cell as one would write it without this library, differentiated by autodiff;
- `DEER`: Lim et al., arXiv 2309.12252, whose public code, `seq1d` of github.com/machine-discovery/deer, solves the same
  problem in JAX. It cannot be had from PyPI (`deer` there is another project), so that `deer` below is our version of
  its algorithm: dense Jacobians, the guess 0, its tolerances, clipped iterates, its derivative. One of its Jacobians,
  one matrix a step and sequence, is L x B x D x D; it takes part where that is at most 2^24 numbers (64 MiB; there are
  several copies). For a ParaLSTM D is twice the width. It stops at its own tolerance, 1e-3, the others at rounding.

Before anything is timed all rivals must agree. Ratios are to the sequential method. The goals at the end of the report:

1. `auto` takes at most 1.15 times as long as the best method, at every point;
2. an update of the ParaGRU language model (2 layers of width 128) takes no longer with `auto` than with the sequential
   method, at any shape: the lower quartile of the ratios is at most 1, where the two are one program in particular;
3. on an accelerator, `fused` takes at most 1.5 times as long as a plain copy of the same bytes wherever
   batch x width is large enough to fill the chip, and nowhere longer than the other methods.

What misses 1 or 2 is timed once more with three times the rounds, and the second figures count.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.timing import (
    Ratio,
    environment,
    environment_line,
    figure_table,
    mebibytes,
    over_best,
    peak_memory,
    print_table,
    ratios,
    times_with_second_chance,
    write_json,
)
from experiments import figures
from jaxpapers.ops.newton import METHODS
from jaxpapers.sequence.pararnn import (
    GRUParams,
    LSTMParams,
    ParaRNNLM,
    Solver,
    init_gru,
    init_lstm,
    language_loss,
    newton_residual,
    project_recurrent,
    solve,
)
from jaxpapers.train import TrainState, create_state, make_train_step, write_whole

Params = GRUParams | LSTMParams
State = tuple[jax.Array, ...]  # (h,) of the GRU, (c, h) of the LSTM

AUTO_GOAL, UPDATE_GOAL, COPY_GOAL, FUSED_GOAL = 1.15, 1.0, 1.5, 1.0
FILLED = 2**16  # batch x width that leaves no core of an accelerator without work
LARGEST, LARGEST_ON_CPU = 2**28, 2**23  # pre-activations: a point with more is left out
LARGEST_DENSE = 2**24  # numbers in one of DEER's Jacobians
DEER_ATOL, DEER_RTOL = 1e-4, 1e-3  # its authors' for float32
AGREEMENT, DEERS_AGREEMENT = 1e-3, 1e-2  # of the largest number: DEER stops at steps of 1e-3
CELLS = {"gru": ("ParaGRU", 1), "lstm": ("ParaLSTM", 2)}  # name, numbers of state per channel
LANGUAGE = {"width": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 65}
LANGUAGE_METHODS = ("auto", "sequential", "chunked")


class Point(NamedTuple):
    """One place of the sweep; `width` counts channels."""

    cell: str
    batch: int
    width: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pre-activations."""
        return self.length, self.batch, 3, self.width

    @property
    def dense(self) -> int:
        """Numbers in one dense Jacobian for each step and sequence."""
        return self.length * self.batch * (CELLS[self.cell][1] * self.width) ** 2

    def __str__(self) -> str:
        return f"{CELLS[self.cell][0]}, batch {self.batch}, width {self.width}, L = {self.length}"


SIZES = ((1, 16), (1, 64), (4, 64), (16, 128), (8, 1024), (64, 1024))  # batch, width
FULL = [Point(cell, *size, 2**power) for cell in CELLS for size in SIZES for power in (6, 9, 12, 14)]
QUICK = [
    Point("gru", 1, 16, 4096),
    Point("lstm", 1, 16, 256),
    Point("gru", 16, 128, 256),
    Point("lstm", 16, 128, 64),
    *(Point(cell, 64, 1024, 512) for cell in CELLS),
]
FULL_UPDATES = [(batch, length) for batch in (4, 16) for length in (64, 128, 256, 512)]
QUICK_UPDATES = [(16, 128)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recurrence", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small sweep")
    parser.add_argument("--grad", action="store_true", help="time states and gradients of the cells alone")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each rival")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--plot", help="PNG file for the ratios against the length")
    args = parser.parse_args(argv)

    accelerator = jax.devices()[0].platform != "cpu"
    largest = LARGEST if accelerator else LARGEST_ON_CPU
    chosen = QUICK if args.quick else FULL
    points = [point for point in chosen if math.prod(point.shape) <= largest]
    print(environment_line())
    if len(points) < len(chosen):
        print(f"{len(chosen) - len(points)} of {len(chosen)} points left out: more than {largest:,} pre-activations")
    results = sweep(points, args.grad, args.rounds, accelerator=accelerator)
    updates = [] if args.grad else sweep_updates(QUICK_UPDATES if args.quick else FULL_UPDATES, args.rounds)
    summarise(results, updates)
    if args.json:
        figures = {"gradients": args.grad, "points": results, "updates": updates}
        write_json(args.json, {"environment": environment()} | figures)
    if args.plot:
        figure = draw(results, updates, "states and gradients" if args.grad else "states")
        write_whole(Path(args.plot), lambda file: figure.savefig(file, format="png", dpi=110))
    return 0


# The sweep over cells


def sweep(points: Sequence[Point], grad: bool, rounds: int, *, accelerator: bool) -> list[dict[str, Any]]:
    """Measures every point, and prints the table."""
    names = ["sequential", *(name for name in METHODS if name != "sequential" and (accelerator or name != "fused"))]
    names += ["lax.scan", "DEER", *(["copy"] if accelerator else [])]
    print("states and gradients" if grad else "states", "- times over the sequential method's, MiB beside inputs")
    table = figure_table("", "ms", *names[1:], "auto/best")
    results = []
    for point in points:
        result = measure(point, grad, rounds, accelerator=accelerator)
        times, over = result["seconds"], ratios(result["seconds"], "sequential")
        cells = [
            f"{over[name].median:.2f} ({mebibytes(result['bytes'][name])})" if name in over else "-" for name in names
        ]
        milliseconds = (
            f"{1e3 * statistics.median(times['sequential']):.3f} ({mebibytes(result['bytes']['sequential'])})"
        )
        table.add_row(str(point), milliseconds, *cells[1:], f"{auto_over_best(times).median:.2f}")
        results.append(point._asdict() | result)
    print_table(table)
    return results


def measure(point: Point, grad: bool, rounds: int, *, accelerator: bool) -> dict[str, Any]:
    """Seconds per round, peak bytes and difference from the sequential method of every rival at one point."""
    arrays = inputs(point)
    rivals = rivals_at(point, accelerator=accelerator)
    programs = {name: with_gradients(f, point.width) if grad else f for name, f in rivals.items()}
    if accelerator:
        programs["copy"] = partial(plain_copy, numbers=CELLS[point.cell][1], grad=grad)
    compiled = {name: jax.jit(f).lower(*arrays).compile() for name, f in programs.items()}
    expected = comparable(compiled["sequential"](*arrays), grad, point.width)
    errors = {
        name: difference(comparable(compiled[name](*arrays), grad, point.width), expected)
        for name in rivals
        if name != "sequential"
    }
    refuse_disagreement(str(point), errors)
    calls = {name: partial(program, *arrays) for name, program in compiled.items()}
    times = times_with_second_chance(calls, rounds, lambda times: auto_over_best(times).median > AUTO_GOAL)
    memory = {name: peak_memory(program) for name, program in compiled.items()}
    return {"seconds": times, "bytes": memory, "errors": errors}


def inputs(point: Point) -> tuple[Params, jax.Array]:
    """Parameters as the paper draws and clips them, and pre-activations that are normal, as those of normal inputs."""
    init = init_gru if point.cell == "gru" else init_lstm
    # As many heads as channels keep the input map, which is not used, small.
    params = init(jax.random.key(0), point.width, point.width, point.width)
    return project_recurrent(params, 0.5), jax.random.normal(jax.random.key(1), point.shape)


def rivals_at(point: Point, *, accelerator: bool) -> dict[str, Callable]:
    """Name -> `(params, pre-activations) -> states`."""

    def by_method(params: Params, g: jax.Array, method: str) -> jax.Array:
        return solve(params, g, solver=Solver(method=method)).states

    # On CPU the fused kernel is interpreted: a test, no rival.
    rivals = {name: partial(by_method, method=name) for name in METHODS if accelerator or name != "fused"}
    rivals["lax.scan"] = plain_scan
    if point.dense <= LARGEST_DENSE:
        rivals["DEER"] = deer_states
    return rivals


def with_gradients(states: Callable, width: int) -> Callable:
    return jax.value_and_grad(lambda params, g: jnp.sum(outputs(states(params, g), width) ** 2), argnums=(0, 1))


def outputs(states: jax.Array | State, width: int) -> jax.Array:
    """h, (time, batch, width), of states as any rival returns them."""
    last = states[-1] if isinstance(states, tuple) else states
    return last.reshape(*last.shape[:2], -1)[..., -width:]


def comparable(result: Any, grad: bool, width: int) -> list[jax.Array]:
    """The arrays of a result in which rivals must agree."""
    return jax.tree.leaves(result) if grad else [outputs(result, width)]


def difference(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> float:
    """The largest difference over the largest number, of the worst array (NaN if there is one)."""
    pairs = zip(found, expected, strict=True)
    return float(
        jnp.max(jnp.stack([jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30) for a, b in pairs]))
    )


def refuse_disagreement(where: str, errors: Mapping[str, float]) -> None:
    """Raises SystemExit rather than let programs be timed that compute different things."""
    for name, error in errors.items():
        if not error <= (DEERS_AGREEMENT if name == "DEER" else AGREEMENT):
            raise SystemExit(f"error: {where}: {name} differs from the sequential method by {error:.1e} of its size")


def auto_over_best(times: Mapping[str, Sequence[float]]) -> Ratio:
    return over_best(times, "auto", [method for method in METHODS if method in times])


# Rivals from outside of the library


def gru_step(params: GRUParams, state: State, g: jax.Array) -> State:
    (h,), A = state, params.A
    z = jax.nn.sigmoid(A[0] * h + g[..., 0, :])
    r = jax.nn.sigmoid(A[1] * h + g[..., 1, :])
    candidate = jnp.tanh(A[2] * h * r + g[..., 2, :])
    return (h + z * (candidate - h),)


def lstm_step(params: LSTMParams, state: State, g: jax.Array) -> State:
    (c, h), A, C = state, params.A, params.C
    forget = jax.nn.sigmoid(A[0] * h + C[0] * c + g[..., 0, :])
    update = jnp.tanh(A[2] * h + g[..., 2, :])
    c = forget * c + (1 - forget) * update
    return c, jax.nn.sigmoid(A[1] * h + C[1] * c + g[..., 1, :]) * jnp.tanh(c)


def plain_step(params: Params) -> tuple[Callable[..., State], int]:
    """One step of a cell, and the number of arrays in its state."""
    return (lstm_step, 2) if isinstance(params, LSTMParams) else (gru_step, 1)


def plain_scan(params: Params, g: jax.Array) -> State:
    step, arrays = plain_step(params)

    def body(state: State, g_t: jax.Array) -> tuple[State, State]:
        state = step(params, state, g_t)
        return state, state

    zeros = jnp.zeros((g.shape[1], g.shape[3]), g.dtype)
    return lax.scan(body, (zeros,) * arrays, g)[1]


def plain_copy(params: Params, g: jax.Array, numbers: int, grad: bool) -> tuple[jax.Array, ...]:
    """What the kernels move: pre-activations read once, states written once.

    With gradients the states are then read for their cotangents, which are written; and pre-activations, states and
    cotangents are read for the gradient of the pre-activations, which is written.
    """

    def added(x: jax.Array, rows: range) -> jax.Array:
        return sum(x[..., row : row + 1, :] for row in rows)

    states = g[..., :numbers, :] + added(g, range(numbers, 3))
    if not grad:
        return (states,)
    states = lax.optimization_barrier(states)  # otherwise one pass would do
    cotangents = lax.optimization_barrier(2 * states)
    return states, g * added(states + cotangents, range(numbers))


def deer_states(params: Params, g: jax.Array) -> jax.Array:
    """States (time, batch, D), (c, h) of the LSTM side by side, by `deer` under `vmap`, as its authors use it."""
    step, arrays = plain_step(params)

    def flat_step(params: Params, y: jax.Array, g_t: jax.Array) -> jax.Array:
        return jnp.concatenate(step(params, tuple(jnp.split(y, arrays)), g_t))

    y0 = jnp.zeros(arrays * g.shape[3], g.dtype)
    return jax.vmap(lambda g: deer(flat_step, params, y0, g), in_axes=1, out_axes=1)(g)


def deer(f: Callable[[Any, jax.Array, jax.Array], jax.Array], params: Any, y0: jax.Array, xs: jax.Array) -> jax.Array:
    """All y_t = f(params, y_{t-1}, x_t), t = 1..L, of one sequence as DEER finds them.

    From y = y0 at all times it repeats, with dense J_t = df/dy (y_{t-1}, x_t) and the last iterate on the right,

        y_t <- J_t y_{t-1} + f(y_{t-1}, x_t) - J_t y_{t-1}

    by an associative scan, clips the iterate to +-1e8, sets its NaNs to 0, and ends when no entry has changed by more
    than DEER_ATOL + DEER_RTOL |y|, or after 10,000 iterations. Its derivative solves the recurrence of the tangents
    with the J of the last iteration, those of the iterate before the result; reverse mode is that scan transposed by
    JAX.

    Returns:
        (time, D).
    """
    return _deer(f, params, y0, xs)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _deer(f: Callable, params: Any, y0: jax.Array, xs: jax.Array) -> jax.Array:
    return _deer_iterations(f, params, y0, xs)[0]


@_deer.defjvp
def _deer_jvp(f: Callable, primals: tuple, tangents: tuple) -> tuple:
    params, y0, xs = primals
    ys, J = _deer_iterations(f, params, y0, xs)
    before = jnp.concatenate([y0[None], ys[:-1]])

    def forced(params: Any, xs: jax.Array) -> jax.Array:
        return jax.vmap(f, (None, 0, 0))(params, before, xs)

    _, change = jax.jvp(forced, (params, xs), (tangents[0], tangents[2]))
    return ys, _dense_recurrence(J, change, tangents[1])


def _deer_iterations(f: Callable, params: Any, y0: jax.Array, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The solution, and the Jacobians that led to it."""

    def unfinished(loop: tuple) -> jax.Array:
        iteration, ys, _, change = loop
        return (iteration < 10_000) & jnp.any(change > DEER_ATOL + DEER_RTOL * jnp.abs(ys))

    def body(loop: tuple) -> tuple:
        iteration, ys, _, _ = loop
        before = jnp.concatenate([y0[None], ys[:-1]])
        J = jax.vmap(jax.jacfwd(f, 1), (None, 0, 0))(params, before, xs)
        rest = jax.vmap(f, (None, 0, 0))(params, before, xs) - jnp.einsum("tij,tj->ti", J, before)
        new = jnp.clip(_dense_recurrence(J, rest, y0), -1e8, 1e8)
        new = jnp.where(jnp.isnan(new), 0.0, new)
        return iteration + 1, new, J, jnp.abs(new - ys)

    shape = (xs.shape[0], *y0.shape)
    start = jnp.broadcast_to(y0, shape), jnp.zeros((*shape, *y0.shape), y0.dtype), jnp.full(shape, jnp.inf, y0.dtype)
    _, ys, J, _ = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), *start))
    return ys, J


def _dense_recurrence(J: jax.Array, b: jax.Array, y0: jax.Array) -> jax.Array:
    """y_t = J_t y_{t-1} + b_t by an associative scan over L + 1 pairs, the first being (I, y0)."""

    def compose(earlier: tuple, later: tuple) -> tuple:
        (A, a), (B, b) = earlier, later
        return B @ A, jnp.einsum("...ij,...j->...i", B, a) + b

    pairs = jnp.concatenate([jnp.eye(len(y0), dtype=J.dtype)[None], J]), jnp.concatenate([y0[None], b])
    return lax.associative_scan(compose, pairs)[1][1:]


# The language model


def sweep_updates(shapes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Measures an update of the language model at every (batch, length), and prints the table."""
    print("\nupdate of the ParaGRU language model - times over the sequential method's, quartiles, MiB beside inputs")
    table = figure_table("", "ms", "auto", "chunked, 3 iterations")
    optimizer = optax.adamw(3e-3)
    params = jax.jit(ParaRNNLM(**LANGUAGE).init)(jax.random.key(3), jnp.zeros((1, 8), jnp.int32))["params"]
    state = create_state(params, optimizer)
    results = []
    for batch, length in shapes:
        result = measure_update(state, optimizer, batch, length, rounds)
        times, over = result["seconds"], ratios(result["seconds"], "sequential")
        cells = [f"{over[name]} ({mebibytes(result['bytes'][name])})" for name in ("auto", "chunked")]
        milliseconds = (
            f"{1e3 * statistics.median(times['sequential']):.1f} ({mebibytes(result['bytes']['sequential'])})"
        )
        table.add_row(f"batch {batch}, L = {length}", milliseconds, *cells)
        results.append({"batch": batch, "length": length} | result)
    print_table(table)
    return results


def measure_update(
    state: TrainState, optimizer: optax.GradientTransformation, batch: int, length: int, rounds: int
) -> dict[str, Any]:
    """Seconds per round, peak bytes and difference of loss and gradient's norm, of one update by every method."""
    tokens = jax.random.randint(jax.random.key(2), (batch, length + 1), 0, LANGUAGE["vocab_size"])
    arrays = state, tokens, jax.random.key(4)
    compiled = {name: compile_update(name, optimizer, arrays) for name in LANGUAGE_METHODS}
    terms = {name: [program(*arrays)[1][key] for key in ("loss", "grad_norm")] for name, program in compiled.items()}
    errors = {name: difference(terms[name], terms["sequential"]) for name in terms if name != "sequential"}
    refuse_disagreement(f"update, batch {batch}, L = {length}", errors)
    calls = {name: partial(program, *arrays) for name, program in compiled.items()}
    times = times_with_second_chance(calls, rounds, lambda times: ratios(times, "sequential")["auto"].low > UPDATE_GOAL)
    memory = {name: peak_memory(program) for name, program in compiled.items()}
    return {"seconds": times, "bytes": memory, "errors": errors}


def compile_update(method: str, optimizer: optax.GradientTransformation, arrays: tuple) -> jax.stages.Compiled:
    model = ParaRNNLM(**LANGUAGE, mixer_options={"solver": Solver(method=method, max_iterations=3)})

    def loss_fn(params: Any, extra: Any, batch: jax.Array, key: jax.Array) -> tuple:
        logits, sown = model.apply({"params": params}, batch[:, :-1], mutable="diagnostics")
        loss, _ = language_loss(logits, batch[:, 1:], z_loss=1e-4)
        return loss, (extra, {"newton_residual": newton_residual(sown["diagnostics"])})

    return jax.jit(make_train_step(loss_fn, optimizer)).lower(*arrays).compile()


# The report


def point_of(result: Mapping[str, Any]) -> Point:
    return Point(*(result[field] for field in Point._fields))


def summarise(results: Sequence[dict[str, Any]], updates: Sequence[dict[str, Any]]) -> None:
    """The goals, the worst place of each and all places that miss it."""
    auto = {str(point_of(result)): auto_over_best(result["seconds"]) for result in results}
    print(f"\n{verdict('auto / best method', auto, AUTO_GOAL, 'median')}")
    update = {
        f"batch {result['batch']}, L = {result['length']}": ratios(result["seconds"], "sequential")["auto"]
        for result in updates
    }
    if update:
        print(verdict("update by auto / by the sequential method", update, UPDATE_GOAL, "low"))
    fused = [result for result in results if "fused" in result["seconds"]]
    filled = [result for result in fused if result["batch"] * result["width"] >= FILLED]
    copy = {str(point_of(result)): ratios(result["seconds"], "copy")["fused"] for result in filled}
    if copy:
        print(verdict("fused / plain copy of the same bytes", copy, COPY_GOAL, "median"))
    others = {
        str(point_of(result)): over_best(result["seconds"], "fused", ("sequential", "parallel", "chunked"))
        for result in fused
    }
    if others:
        print(verdict("fused / best of the other methods", others, FUSED_GOAL, "low"))


def verdict(what: str, found: Mapping[str, Ratio], goal: float, statistic: str) -> str:
    """One line on a goal, and one on every place that misses it."""
    worst = max(found, key=lambda place: getattr(found[place], statistic))
    missing = [place for place in found if getattr(found[place], statistic) > goal]
    which = {"median": "", "low": ", by the lower quartile"}[statistic]
    line = f"{what} (goal: at most {goal}{which}): {'misses' if missing else 'holds'}"
    line += f" at {len(missing)} of {len(found)}" if missing else ""
    line += f", at worst {found[worst]}, at {worst}"
    return "\n".join([line, *(f"  misses {found[place]}: {place}" for place in missing)])


def draw(results: Sequence[dict[str, Any]], updates: Sequence[dict[str, Any]], title: str) -> Figure:
    """Ratios against the length: a row a cell, a column a size; below them the language model's update."""
    sizes = sorted({(result["batch"], result["width"]) for result in results}, key=math.prod)
    batches = sorted({result["batch"] for result in updates})
    shape = len(CELLS) + bool(updates), max(len(sizes), len(batches))
    size = 3.2 * shape[1], 0.6 + 2.6 * shape[0]
    figure, grid = figures.grid(*shape, size, sharex="row")
    rivals = [name for name in (*METHODS, "lax.scan", "DEER", "copy") if name != "sequential"]
    colours = {name: figures.COLOURS[index % len(figures.COLOURS)] for index, name in enumerate(rivals)}
    for row, (cell, (name, _)) in zip(grid, CELLS.items(), strict=False):
        for axes, (batch, width) in zip(row, sizes, strict=False):
            here = [r for r in results if (r["cell"], r["batch"], r["width"]) == (cell, batch, width)]
            draw_ratios(axes, here, colours)
            axes.set_title(f"{name}, batch {batch}, width {width}", fontsize=10)
    for axes, batch in zip(grid[-1], batches, strict=False):
        draw_ratios(axes, [result for result in updates if result["batch"] == batch], colours)
        axes.set(yscale="linear")
        axes.set_title(f"language model's update, batch {batch}", fontsize=10)
    for axes in grid.flat:
        axes.set_visible(bool(axes.lines))
    for row in grid:
        row[0].set(ylabel="time / sequential")
    figure.suptitle(f"{title} ({environment()['device']})")
    handles = {line.get_label(): line for axes in grid.flat for line in axes.lines if line.get_label() in colours}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def draw_ratios(axes: Axes, results: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> None:
    """Median and quartiles of every rival's ratio to the sequential method."""
    if not results:
        return
    axes.axhline(1, color=figures.GREY, linewidth=0.8)
    for name, colour in colours.items():
        with_it = [result for result in results if name in result["seconds"]]
        if not with_it:
            continue
        lengths = [result["length"] for result in with_it]
        found = [ratios(result["seconds"], "sequential")[name] for result in with_it]
        axes.fill_between(
            lengths, [r.low for r in found], [r.high for r in found], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(lengths, [r.median for r in found], marker="o", markersize=3, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=8)
    axes.set(xlabel="sequence length")
