"""Affine scans: every method against the sequential one, by length, structure, batch and width.

Two goals stand at the end of the report:

1. the chunked method takes at most half the time of the plain `lax.associative_scan` (`parallel`) at 16,384 steps;
2. `auto` takes at most 1.15 times as long as the best method, at every point of the sweep. A point that misses it
   is timed once more with three times the rounds, and the second figures count: on a busy machine one of many
   ratios is off by chance.

`lax.scan` is the recurrence as one would write it without this library; it shows that the sequential method, the
baseline of all ratios, is not a straw man. With --grad every rival also computes the gradients of sum h^2 with
respect to A and b; `lax.scan` then stands for autodiff through the loop.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import (
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
from jaxpapers.ops.scan import METHODS, affine_scan

CHUNKED_GOAL, CHUNKED_LENGTH, AUTO_GOAL = 0.5, 16_384, 1.15
LARGEST = 2**23  # numbers in A: above that a point is left out (the parallel method needs several copies)


class Point(NamedTuple):
    """One place of the sweep; `width` counts the numbers in a state."""

    structure: str
    length: int
    batch: int
    width: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the matrices and of the inputs, time first."""
        lead = (self.length, self.batch)
        if self.structure == "block":
            return (*lead, 2, 2, self.width // 2), (*lead, 2, self.width // 2)
        matrix = (self.width, self.width) if self.structure == "dense" else (self.width,)
        return (*lead, *matrix), (*lead, self.width)

    def __str__(self) -> str:
        name = "block 2x2" if self.structure == "block" else self.structure
        return f"{name}, L = {self.length}, batch {self.batch}, width {self.width}"


FULL = [
    Point(structure, 2**power, batch, width)
    for structure, sizes in {
        "diagonal": ((1, 16), (4, 64), (64, 64)),
        "block": ((1, 16), (4, 64)),
        "dense": ((1, 8), (8, 8)),
    }.items()
    for batch, width in sizes
    for power in (8, 10, 12, 14, 16)
]
QUICK = [
    Point(structure, 2**power, *size)
    for structure, size in {"diagonal": (4, 64), "block": (1, 16), "dense": (1, 8)}.items()
    for power in (8, 11, 14)
]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scan", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small sweep")
    parser.add_argument("--grad", action="store_true", help="time the states and the gradients with respect to A and b")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each rival")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)

    points = [point for point in (QUICK if args.quick else FULL) if math.prod(point.shapes[0]) <= LARGEST]
    print(environment_line())
    print("states and gradients" if args.grad else "states", "- times over the sequential method's, MiB beside inputs")
    table = figure_table("", "ms", *METHODS, "lax.scan", "auto/best")
    results = []
    for point in points:
        result = measure(point, args.grad, args.rounds)
        results.append(result)
        table.add_row(*row(point, result))
    print_table(table)
    summarise(points, results)
    if args.json:
        figures = [point._asdict() | result for point, result in zip(points, results, strict=True)]
        write_json(args.json, {"environment": environment(), "gradients": args.grad, "points": figures})
    return 0


def measure(point: Point, grad: bool, rounds: int) -> dict[str, Any]:
    """Seconds per round and peak bytes of every rival at one point."""
    A, b = inputs(point)
    rivals: dict[str, Callable] = {
        method: partial(affine_scan, structure=point.structure, method=method) for method in METHODS
    }
    rivals["lax.scan"] = partial(plain_scan, structure=point.structure)
    if grad:
        rivals = {name: with_gradients(f) for name, f in rivals.items()}
    compiled = {name: jax.jit(f).lower(A, b).compile() for name, f in rivals.items()}
    calls = {name: partial(program, A, b) for name, program in compiled.items()}
    times = times_with_second_chance(calls, rounds, lambda times: auto_over_best(times) > AUTO_GOAL)
    return {"seconds": times, "bytes": {name: peak_memory(program) for name, program in compiled.items()}}


def inputs(point: Point) -> tuple[jax.Array, jax.Array]:
    """A with entries that keep the states bounded, b normal."""
    shape_A, shape_b = point.shapes
    key_A, key_b = jax.random.split(jax.random.key(0))
    row = {"diagonal": 1, "block": 2, "dense": point.width}[point.structure]
    return jax.random.uniform(key_A, shape_A, minval=-1.0) / row, jax.random.normal(key_b, shape_b)


def plain_scan(A: jax.Array, b: jax.Array, structure: str) -> jax.Array:
    def step(h: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, addend = inputs
        if structure == "diagonal":
            h = a * h + addend
        elif structure == "block":
            h = jnp.einsum("...oin,...in->...on", a, h) + addend
        else:
            h = jnp.einsum("...oi,...i->...o", a, h) + addend
        return h, h

    return lax.scan(step, jnp.zeros_like(b[0]), (A, b))[1]


def with_gradients(scan: Callable) -> Callable:
    return jax.value_and_grad(lambda A, b: jnp.sum(scan(A, b) ** 2), argnums=(0, 1))


def auto_over_best(times: Mapping[str, Sequence[float]]) -> float:
    return over_best(times, "auto", METHODS).median


def row(point: Point, result: dict[str, Any]) -> list[str]:
    times = result["seconds"]
    over = ratios(times, "sequential")
    cells = [f"{over[name].median:.2f} ({mebibytes(result['bytes'][name])})" for name in (*METHODS, "lax.scan")]
    milliseconds = f"{1e3 * statistics.median(times['sequential']):.3f}"
    return [str(point), milliseconds, *cells, f"{auto_over_best(times):.2f}"]


def summarise(points: Sequence[Point], results: Sequence[dict[str, Any]]) -> None:
    """The two goals, point by point and in one line each."""
    print(f"\nchunked / parallel at {CHUNKED_LENGTH} steps (goal: at most {CHUNKED_GOAL})")
    for point, result in zip(points, results, strict=True):
        if point.length == CHUNKED_LENGTH:
            ratio = ratios(result["seconds"], "parallel")["chunked"]
            memory = [mebibytes(result["bytes"][name]) for name in ("chunked", "parallel")]
            verdict = "holds" if ratio.median <= CHUNKED_GOAL else "misses"
            print(f"  {verdict:<7} {ratio}, {memory[0]} / {memory[1]} MiB: {point}")
    worst, point = max(
        (auto_over_best(result["seconds"]), point) for point, result in zip(points, results, strict=True)
    )
    verdict = "holds" if worst <= AUTO_GOAL else "misses"
    print(f"auto / best method (goal: at most {AUTO_GOAL}): {verdict}, at worst {worst:.2f}, at {point}")
