"""What the figures of several experiments share: panels, colours, legends, and how seeds are drawn."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#9a9a9a"
# Okabe and Ito's palette: told apart by the colour-blind, and in grey print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of `size` (width, height) in inches, and its axes (rows, columns); options as of `Figure.subplots`."""
    figure = Figure(figsize=size, layout="constrained")  # not pyplot's, which keeps all figures until they are closed
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panels(count: int, width: float = 3.5, height: float = 3.2, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A row of `count` axes."""
    figure, axes = grid(1, count, (width * count, height), **options)
    return figure, list(axes[0])


def legend_below(figure: Figure, columns: int) -> None:
    """One legend for all axes, below them, each label once."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for row in found for handle, label in zip(*row, strict=True)}
    figure.legend(handles.values(), handles, fontsize=8, loc="outside lower center", ncol=columns)


def names_below(axes: Axes, names: Sequence[str], rotation: float = 60) -> None:
    """Names at 0, 1, ... of the x axis, slanted by so many degrees."""
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right", fontsize=8)


def dots(axes: Axes, place: float, values: Any, style: str = "o", **options: Any) -> None:
    """One or more seeds as dots above a place of the x axis; options as of `Axes.plot`."""
    values = np.atleast_1d(np.asarray(values, float))
    axes.plot(np.full(len(values), place), values, style, **options)


def mean_and_range(axes: Axes, x: Any, rows: Iterable[Any], style: str = "-", **options: Any) -> None:
    """A line through the means of the seeds, and a band from the least to the largest of them.

    Args:
      axes: where to draw.
      x: (points,).
      rows: of each point one or more seeds.
      style: of the line.
      **options: of the line, as of `Axes.plot`.
    """
    rows = [np.atleast_1d(row) for row in rows]
    (line,) = axes.plot(x, [row.mean() for row in rows], style, **options)
    low, high = [row.min() for row in rows], [row.max() for row in rows]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


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
        dots(axes, position, np.where(failed, np.nan, seeds), color=COLOURS[0], alpha=0.6, ms=5)
        dots(axes, position, np.full(failed.sum(), top), "x", color=COLOURS[1], ms=7, mew=2)
    if not np.isfinite(everything).all():
        axes.plot([], [], "x", color=COLOURS[1], ms=7, mew=2, label="failed")
    axes.plot(positions, medians, color=COLOURS[0], linewidth=1.5, label="median")
    axes.set_xticks(positions, list(values))
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend(fontsize=8)
