"""Times of programs that experiments report; the benchmarks have paired ones (`benchmarks.timing`)."""

import time
from collections.abc import Callable
from typing import Any

import jax


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least of so many runs, after one that compiles.

    Args:
      call: its result is waited for (`jax.block_until_ready`).
      repeats: timed runs, at least 1.
    """
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
