"""What every benchmark shares: paired timings, peak memory, ratio tables, the environment line, a JSON file.

A lone timing says little on a shared machine: a neighbour's load moves it by a factor of two. Rivals are
therefore timed in turn, round after round, and reported as ratios to a named baseline of the same round; the
load then falls on both sides of each ratio. A typical benchmark:

    fns = {"old": jax.jit(old), "new": jax.jit(new)}
    times = paired_times({name: lambda f=f: f(x) for name, f in fns.items()}, rounds=9)
    print_table(ratio_table("scan, L = 1024", times, baseline="old", memory=memories))
    write_json(path, {"environment": environment(), "seconds": times})
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from rich.console import Console
from rich.table import Table

from jaxpapers.train import write_whole

T = TypeVar("T")
# Where the output is no terminal (a log, a pipe) rich would fold the tables at 80 columns.
CONSOLE = Console(width=None if sys.stdout.isatty() else 130)


class Ratio(NamedTuple):
    """A rival's time over the baseline's: the median over the rounds and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"

    def cells(self, digits: int = 2) -> tuple[str, str]:
        """Median and quartiles, for two columns of a table."""
        return f"{self.median:.{digits}f}", f"{self.low:.{digits}f}-{self.high:.{digits}f}"


def paired_times(
    rivals: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    min_sample_s: float = 2e-3,
    max_loops: int = 1000,
) -> dict[str, list[float]]:
    """Time several callables in turn, in one run.

    Each callable first runs unmeasured (compilation, allocation), then twice more to choose how many calls
    make one sample of at least `min_sample_s`. Then every round takes one sample of each rival; the order is
    reversed from one round to the next, so that no rival always finds the caches as the same neighbour left
    them.

    Args:
        rivals: name -> callable without arguments; its result is waited for (`jax.block_until_ready`).
        rounds: samples per rival.
        min_sample_s: seconds that a sample lasts at least; shorter calls are repeated and averaged.
        max_loops: upper limit on the calls of one sample.

    Returns:
        name -> seconds per call, one figure per round; the k-th figures of all rivals belong together.

    Raises:
        ValueError: if there is no rival or no round.
    """
    if not rivals or rounds < 1:
        raise ValueError(f"needs at least one rival and one round, got {len(rivals)} and rounds={rounds}")
    loops = {}
    for name, call in rivals.items():
        jax.block_until_ready(call())
        once = min(_sample(call, 1), _sample(call, 1))
        loops[name] = max(1, min(max_loops, int(min_sample_s / max(once, 1e-9)) + 1))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for _ in range(rounds):
        for name in order:
            times[name].append(_sample(rivals[name], loops[name]))
        order.reverse()
    return times


def _sample(call: Callable[[], Any], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / loops


def ratios(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Ratio]:
    """Time of each rival over the baseline's, round by round (median and quartiles of the paired ratios).

    Args:
        times: what `paired_times` returned.
        baseline: the rival that stands below the fraction bar.

    Raises:
        ValueError: if the baseline is not among the rivals.
    """
    if baseline not in times:
        raise ValueError(f"baseline {baseline!r} is not among the rivals {sorted(times)}")
    result = {}
    for name, samples in times.items():
        paired = [sample / base for sample, base in zip(samples, times[baseline], strict=True)]
        quartiles = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else 3 * paired
        low, median, high = quartiles
        result[name] = Ratio(median, low, high)
    return result


def over_best(times: Mapping[str, Sequence[float]], name: str, rivals: Sequence[str]) -> Ratio:
    """The time of one over that of the fastest among some (by the median), which may be itself.

    Args:
        times: what `paired_times` returned.
        name: the one that is judged.
        rivals: those among whom the fastest is looked for.
    """
    best = min(rivals, key=lambda rival: statistics.median(times[rival]))
    return ratios(times, best)[name]


def times_with_second_chance(
    rivals: Mapping[str, Callable[[], Any]],
    rounds: int,
    misses: Callable[[Mapping[str, Sequence[float]]], bool],
) -> dict[str, list[float]]:
    """`paired_times`; where these miss a goal, once more with three times the rounds, and the second figures count.

    On a busy machine one of many ratios is off by chance.

    Args:
        rivals: as for `paired_times`.
        rounds: samples per rival, of the first try.
        misses: whether such times miss the goal.
    """
    times = paired_times(rivals, rounds)
    return paired_times(rivals, 3 * rounds) if misses(times) else times


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a compiled program needs beside its arguments: temporaries and outputs, by XLA's account.

    Args:
        compiled: `jax.jit(f).lower(*args).compile()`.

    Returns:
        The bytes, or None where the backend gives no account.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def ratio_table(
    title: str,
    times: Mapping[str, Sequence[float]],
    baseline: str,
    memory: Mapping[str, int | None] | None = None,
) -> Table:
    """A table with one row per rival: milliseconds (median), ratio to the baseline, quartiles, peak memory.

    Args:
        title: headline of the table.
        times: what `paired_times` returned.
        baseline: the rival with ratio 1.
        memory: name -> bytes (see `peak_memory`); the column is left out without it.
    """
    headings = ("", "ms", f"x {baseline}", "quartiles", *(["MiB"] if memory is not None else []))
    table = figure_table(*headings, title=title)
    for name, ratio in ratios(times, baseline).items():
        row = [name, f"{1e3 * statistics.median(times[name]):.3f}", *ratio.cells()]
        table.add_row(*row, *([mebibytes(memory.get(name))] if memory is not None else []))
    return table


def figure_table(*headings: str, title: str | None = None) -> Table:
    """An empty table of figures: all columns but the first are flush right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def mebibytes(size: int | None) -> str:
    """Bytes as a short text in MiB; "-" where unknown."""
    return "-" if size is None else f"{size / 2**20:.2f}"


def print_table(table: Table) -> None:
    """Print a rich table to standard output, unfolded where that is no terminal."""
    CONSOLE.print(table)


def find_rival(name: str, load: Callable[[], T]) -> T | None:
    """What `load` imports; None, with a word, where that is not installed or where JAX does not compute on a CPU."""
    if jax.devices()[0].platform == "cpu":
        with contextlib.suppress(ImportError):
            return load()
    print(f"{name} takes no part: that wants a CPU and pip install 'jaxpapers[bench]'")
    return None


def environment() -> dict[str, Any]:
    """What a timing depends on: device, number of devices, jax version, cores this process may use."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "cores": cores,
    }


def environment_line() -> str:
    """`environment` as one line, for the head of a printed report."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())


def write_json(path: str | Path, payload: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never half of it.

    Args:
        path: file to write; its folder is made if it is missing.
        payload: anything `json` can write.
    """
    write_whole(Path(path), json.dumps(payload, indent=1) + "\n")
