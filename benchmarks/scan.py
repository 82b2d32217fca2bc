"""Affine recurrences: every method of `affine_scan` against the sequential one, lengths 2^8 to 2^16.

Two goals are judged at the end: chunked at least twice as fast as plain `associative_scan` at L = 16,384, and `auto`
never slower than 1.15 times the best method.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.timing import (
    environment,
    environment_line,
    paired_times,
    peak_memory,
    print_table,
    ratio_table,
    ratios,
    write_json,
)
from jaxpapers.ops.scan import METHODS, affine_scan

SHAPES = {  # structure -> (shape of a matrix, shape of a state)
    "diagonal": ((64,), (64,)),
    "block": ((2, 2, 32), (2, 32)),
    "dense": ((8, 8), (8,)),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scan", description=__doc__.partition("\n")[0])
    parser.add_argument("--grad", action="store_true", help="forward and backward")
    parser.add_argument("--quick", action="store_true", help="two lengths, one batch")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each method")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    lengths = [2**8, 2**14] if args.quick else [2**8, 2**10, 2**12, 2**14, 2**16]
    batches = [1] if args.quick else [1, 16]

    print(environment_line())
    figures = []
    for structure, length, batch in itertools.product(SHAPES, lengths, batches):
        times, memory = measure(structure, length, batch, args.grad, args.rounds)
        print_table(ratio_table(f"{structure}, L = {length}, batch {batch}", times, "sequential", memory))
        figures.append({"structure": structure, "length": length, "batch": batch, "seconds": times, "bytes": memory})
    judge(figures)
    if args.json:
        write_json(args.json, {"environment": environment(), "grad": args.grad, "figures": figures})
    return 0


def measure(structure: str, length: int, batch: int, grad: bool, rounds: int) -> tuple[dict, dict]:
    matrix, state = SHAPES[structure]
    key_a, key_b = jax.random.split(jax.random.key(0))
    a = 0.5 * jax.random.uniform(key_a, (length, batch, *matrix), minval=-1)
    b = jax.random.normal(key_b, (length, batch, *state))
    compiled = {}
    for method in METHODS:
        solve = partial(affine_scan, structure=structure, method=method)
        program: Callable = jax.grad(lambda a, b, solve=solve: jnp.sum(solve(a, b) ** 2), (0, 1)) if grad else solve
        compiled[method] = jax.jit(program).lower(a, b).compile()
    calls = {method: partial(program, a, b) for method, program in compiled.items()}
    return paired_times(calls, rounds), {method: peak_memory(program) for method, program in compiled.items()}


def judge(figures: list[dict]) -> None:
    gains, excess = {}, []
    for figure in figures:
        name = f"{figure['structure']}, batch {figure['batch']}"
        if figure["length"] == 2**14:
            gains[name] = ratios(figure["seconds"], "chunked")["parallel"].median
        excess.append(
            (max(ratios(figure["seconds"], best)["auto"].median for best in METHODS), f"{name}, L = {figure['length']}")
        )
    print("associative_scan / chunked at L = 16,384: " + "; ".join(f"{k}: {v:.1f}" for k, v in gains.items()))
    print(f"auto / best, worst case: {max(excess)[0]:.2f} ({max(excess)[1]})")
