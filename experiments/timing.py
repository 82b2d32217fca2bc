"""Times and memory of programs that experiments report; the benchmarks have paired times (`benchmarks.timing`)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least of so many runs, after one that compiles.

    Args:
      call: its result is waited for (`jax.block_until_ready`).
      repeats: timed runs, at least 1.
    """
    return min(seconds_in_turns({"call": call}, repeats)["call"])


def seconds_in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of several calls, one after the other and again, so that what else the machine does falls on all alike.

    Args:
      calls: their results are waited for; each runs once before, which compiles and is not timed.
      repeats: timed runs of each.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program needs beside its arguments and results, by XLA's account."""
    analysis: Any = program.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def residuals(function: Callable[..., jax.Array], *args: Any) -> list[jax.ShapeDtypeStruct]:
    """The arrays that reverse mode keeps between the passes: what the function's pull-back holds, each once."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))


def residual_bytes(function: Callable[..., jax.Array], *args: Any) -> int:
    """Bytes of the `residuals`."""
    return sum(array.size * array.dtype.itemsize for array in residuals(function, *args))
