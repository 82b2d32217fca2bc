"""Figures that several experiments draw; each function returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

GREY = "#9a9a9a"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}  # behind text that stands on a line
# Okabe and Ito's palette: told apart by the colour-blind, and in grey print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def panels(count: int, width: float = 3.5, height: float = 3.2, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A row of `count` axes."""
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), squeeze=False, layout="constrained", **options
    )
    return figure, list(axes[0])


def orbit_by_symbol(
    axes: Axes,
    orbit: np.ndarray,
    symbols: np.ndarray,
    *,
    labels: tuple[str, str],
    names: Sequence[str],
    points: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> None:
    """An orbit in the plane, coloured by its symbols.

    Args:
      axes: where to draw.
      orbit: (time, 2).
      symbols: (time,) integers from 0.
      labels: of the two axes.
      names: of the symbols, for the legend.
      points: (points, 2) marked with crosses, such as fixed points.
      reference: (time, 2) drawn in grey behind, such as the data.
    """
    if reference is not None:
        axes.plot(*reference.T, color="#d0d0d0", linewidth=0.4, label="data", rasterized=True)
    for symbol, name in enumerate(names):
        chosen = orbit[symbols == symbol]
        colour = COLOURS[symbol % len(COLOURS)]
        axes.plot(*chosen.T, ".", markersize=1.0, color=colour, rasterized=True)
        axes.plot([], [], "o", markersize=5, color=colour, label=name)
    # A fixed point far from the orbit would squeeze the orbit into a corner: the frame is the orbit's.
    extent = orbit if reference is None else np.concatenate([orbit, reference])
    low, high = extent.min(axis=0), extent.max(axis=0)
    margin = 0.15 * (high - low)
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    if points is not None and len(points):
        axes.plot(*points.T, "kX", markersize=8, markeredgecolor="white", linestyle="none", label="real fixed points")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, fontsize=8, handletextpad=0.2, columnspacing=0.8
    )


def transition_graph(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """Symbols on a circle, sized by their occupation; arrows as wide as their transition probability.

    Args:
      axes: where to draw.
      counts: (symbols, symbols), from row to column.
      names: of the symbols.
    """
    visits = counts.sum(axis=1)
    probabilities = counts / np.maximum(visits, 1)[:, None]
    angles = np.pi / 2 + 2 * np.pi * np.arange(len(names)) / len(names)
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for source, target in zip(*np.nonzero(counts), strict=True):
        if source == target:
            continue
        arrow = FancyArrowPatch(
            places[source],
            places[target],
            connectionstyle="arc3,rad=0.18",
            arrowstyle="-|>",
            mutation_scale=12,
            shrinkA=22,
            shrinkB=22,
            linewidth=0.8 + 4 * np.sqrt(probabilities[source, target]),
            color=COLOURS[source % len(COLOURS)],
        )
        axes.add_patch(arrow)
        # The label stands where arc3 with this rad has its middle, a little to the right of the chord.
        step = places[target] - places[source]
        middle = (places[source] + places[target]) / 2 + 0.14 * np.array([step[1], -step[0]])
        axes.text(*middle, f"{probabilities[source, target]:.1%}", ha="center", va="center", fontsize=8, bbox=LABEL)
    share = visits / visits.sum()
    for index, (place, name) in enumerate(zip(places, names, strict=True)):
        axes.scatter(*place, s=500 + 900 * share[index], color=COLOURS[index % len(COLOURS)], zorder=3)
        axes.text(
            *place,
            f"{name}\n{share[index]:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            zorder=4,
        )
        stays = probabilities[index, index]
        side = "center" if abs(place[0]) < 0.5 else "left" if place[0] > 0 else "right"
        axes.text(*(1.35 * place), f"stays\n{stays:.1%}", ha=side, va="center", fontsize=8, color="#444444")
    axes.set(xlim=(-1.8, 1.8), ylim=(-1.7, 1.7), aspect="equal")
    axes.axis("off")


def sweep(axes: Axes, values: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str) -> None:
    """A measure against a parameter: every seed a dot, the median a line; NaN (failed) seeds as crosses at the top.

    Args:
      axes: where to draw.
      values: parameter -> measure of each seed.
      xlabel: name of the parameter.
      ylabel: name of the measure.
    """
    positions = range(len(values))
    everything = np.concatenate([np.ravel(seeds) for seeds in values.values()]).astype(float)
    top = 1.1 * np.max(everything, where=np.isfinite(everything), initial=0.0) or 1.0
    medians = []
    for position, seeds in zip(positions, values.values(), strict=True):
        seeds = np.asarray(seeds, dtype=float)
        failed = ~np.isfinite(seeds)
        medians.append(np.median(np.where(failed, top, seeds)))
        axes.plot([position] * len(seeds), np.where(failed, np.nan, seeds), "o", color=COLOURS[0], alpha=0.6, ms=5)
        axes.plot([position] * failed.sum(), [top] * failed.sum(), "x", color=COLOURS[1], ms=7, mew=2)
    if not np.isfinite(everything).all():
        axes.plot([], [], "x", color=COLOURS[1], ms=7, mew=2, label="failed")
    axes.plot(positions, medians, color=COLOURS[0], linewidth=1.5, label="median")
    axes.set_xticks(positions, list(values))
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend(fontsize=8)


def spectra(axes: Axes, frequencies: np.ndarray, curves: Mapping[str, np.ndarray], *, xlabel: str) -> None:
    """Power spectra on a logarithmic scale, the first curve (the data) in grey.

    Args:
      axes: where to draw.
      frequencies: (frequencies,).
      curves: name -> (frequencies,).
      xlabel: name and unit of the frequency.
    """
    for index, (name, power) in enumerate(curves.items()):
        style = {"color": GREY, "linewidth": 2.5} if index == 0 else {"color": COLOURS[index - 1], "linewidth": 1.0}
        axes.semilogy(frequencies, np.maximum(power, 1e-12), label=name, **style)
    axes.set(xlabel=xlabel, ylabel="power (share)")
    axes.legend(fontsize=8)
