"""Training: one update of a paper's model against its authors' algorithm in PyTorch.

Forward pass, backward pass and optimizer, with dropout where the paper trains with it; the same weights and batch on
both sides, a compiled program of ours against eager PyTorch (`benchmarks.rivals`, a file a paper). Nothing is timed
unless losses and gradients agree. The last line is the geometric mean over the papers (a paper's own figure is that of
its points) against the goal.

What stands against the goal on a CPU. Most of an update are products of matrices, which PyTorch makes about as fast as
the cores can: where a large product runs at 210 GFLOP/s, its whole update of the ResNet runs at 155, that of PolyCom's
model at 104. XLA is ahead in what lies between them. It is behind in convolutions (86 GFLOP/s with 64 channels, 170
with 256), for whose kernels' gradients it also copies the activations into another order, a fifth of the ResNet's
update. And it allocates all temporaries of an update anew, a gigabyte for the larger AdaFortiTran: their page faults
are 5 to 35% of our updates. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 takes them away, and as much of PyTorch's.

PyTorch chooses its number of threads, usually that of the cores. Where other programs use these, its threads wait for
each other at every operation, ten times as long as they compute: such a comparison says nothing. There, give both sides
one core (`taskset -c 0`, --torch-threads 1).
"""

import argparse
import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.alrnn import import_torch
from benchmarks.rivals import AGREEMENT
from benchmarks.timing import (
    environment,
    environment_line,
    figure_table,
    paired_times,
    print_table,
    ratio_table,
    ratios,
    write_json,
)

GOAL = 1.5
# A parameter whose gradient is 0 but for rounding (a key's bias, a bias before BatchNorm) is measured by the rest.
SMALL = 1e-3
SAMPLE_S = 0.2  # threads of PyTorch spin for some milliseconds after their work: little beside this


def papers() -> list[str]:
    """Slugs of the papers that have a rival."""
    return sorted(path.stem for path in (Path(__file__).parent / "rivals").glob("*.py") if path.stem != "__init__")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__.partition("\n")[0])
    known = papers()
    parser.add_argument("slug", nargs="*", help=f"of {', '.join(known)}; all of them without")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each side")
    parser.add_argument("--torch-threads", type=int, help="threads of PyTorch; its own choice without")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    for slug in args.slug:  # `choices` would refuse the empty list, too
        if slug not in known:
            parser.error(f"there is no rival of {slug!r}, only of {', '.join(known)}")
    torch = import_torch()
    if args.torch_threads is not None:
        torch.set_num_threads(args.torch_threads)
    where = environment() | {"torch": torch.__version__, "torch threads": torch.get_num_threads()}

    print(f"{environment_line()}, torch {where['torch']}, torch threads {where['torch threads']}")
    results = {slug: compare(torch, slug, args.rounds) for slug in args.slug or known}
    summarise(results)
    if args.json:
        write_json(args.json, {"environment": where, "seconds": results})
    return 0


def compare(torch: Any, slug: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of both sides at every point of a paper.

    Raises:
        SystemExit: the two sides compute different things.
    """
    rival = importlib.import_module(f"benchmarks.rivals.{slug}")
    results = {}
    for point, settings in rival.POINTS.items():
        sides = rival.make(torch, **settings)
        ours, theirs = sides.gradients()
        worst = refuse_disagreement(f"{slug}, {point}", ours, theirs, sides.agreement)
        print(f"{slug}, {point}: loss {float(ours[0]):.6f}, gradients differ by {worst:.0e} at most")
        times = paired_times({"jaxpapers": sides.ours, "PyTorch": sides.theirs}, rounds, SAMPLE_S)
        print_table(ratio_table("One update", times, baseline="jaxpapers"))
        results[point] = times
    return results


def refuse_disagreement(where: str, ours: tuple, theirs: tuple, agreement: float = AGREEMENT) -> float:
    """Refuses to time two programs that compute different things.

    Args:
        where: paper and point.
        ours: loss and gradients.
        theirs: likewise, in the same layout.
        agreement: by how much a gradient may differ; the loss by AGREEMENT.

    Returns:
        The largest difference of a parameter's gradient, over its norm (at least SMALL of the whole gradient's).

    Raises:
        SystemExit: the losses, or the gradients of a parameter, differ by more.
    """
    norm = np.linalg.norm
    least = SMALL * norm([norm(leaf) for leaf in jax.tree.leaves(theirs[1])])

    def difference(mine: Any, other: Any) -> float:
        return float(norm(np.asarray(mine) - np.asarray(other)) / max(norm(other), least))

    errors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): error
        for path, error in jax.tree.leaves_with_path(jax.tree.map(difference, ours[1], theirs[1]))
    }
    loss_error = abs(float(ours[0]) / float(theirs[0]) - 1)
    for name, error in {"the loss": loss_error, **errors}.items():
        if not error <= (AGREEMENT if name == "the loss" else agreement):
            raise SystemExit(f"error: {where}: {name} differs from PyTorch's by {error:.1e} of its size")
    return max(errors.values())


def summarise(results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """How many of PyTorch's updates ours makes in the same time, point by point, and the mean against the goal."""
    mean = statistics.geometric_mean
    table = figure_table("", "times faster", "quartiles", title="Updates against PyTorch's")
    means = []
    for slug, points in results.items():
        over = {point: ratios(times, "jaxpapers")["PyTorch"] for point, times in points.items()}
        for point, ratio in over.items():
            table.add_row(f"{slug}, {point}", *ratio.cells())
        means.append(mean(ratio.median for ratio in over.values()))
    print_table(table)
    verdict = "reached" if mean(means) >= GOAL else "missed"
    print(f"geometric mean over {len(means)} papers: {mean(means):.2f} times faster; goal {GOAL}: {verdict}")
