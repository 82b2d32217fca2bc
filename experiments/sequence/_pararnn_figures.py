"""Figures of `pararnn`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics
from experiments.sequence._pararnn_solver import CELLS
from jaxpapers.train import read_metrics

NAMES = {
    "gru": "ParaGRU",
    "lstm": "ParaLSTM",
    "linear": "linear RNN",
    "mamba2": "Mamba2-like",
    "attention": "Transformer",
}


def draw_residuals(metrics: Metrics, config: ConfigDict) -> Figure:
    """Newton's residual per iteration, a line a width and length: the worst of the seeds (Fig. 4)."""
    figure, axes = figures.panels(2, sharey=True)
    for ax, cell in zip(axes, CELLS, strict=True):
        for index, width in enumerate(config.newton.widths):
            for length, style in zip(config.newton.lengths, ("-", "--", ":", "-."), strict=False):
                worst = np.max(metrics[f"newton/{cell}/D{width}/L{length}"], axis=0)
                colour = figures.COLOURS[index]
                ax.semilogy(worst, style, marker="o", markersize=3, color=colour, label=f"D = {width}, L = {length}")
        ax.set(xlabel="Newton iteration", title=NAMES[cell])
    axes[0].set(ylabel="largest residual")
    axes[1].legend(fontsize=8)
    return figure


def draw_clip(metrics: Metrics, config: ConfigDict) -> Figure:
    """Iterations until the residual is below 1e-5, against the size of a and c; crosses were not enough."""
    figure, axes = figures.panels(2)
    for ax, cell in zip(axes, CELLS, strict=True):
        found = {f"{a:g}": metrics[f"clip/{cell}/{a:g}"] for a in config.clip.amplitudes}
        values = {name: np.where(np.isfinite(row), row, np.nan) for name, row in found.items()}
        figures.sweep(ax, values, xlabel="largest |a|, |c|", ylabel="iterations to 1e-5")
        ax.set(title=NAMES[cell])
    return figure


def draw_speed(metrics: Metrics) -> Figure:
    """Time of the sequential loop over that of the parallel routes, against the length (Figs. 1, 5)."""
    figure, axes = figures.panels(2, sharey=True)
    lengths = metrics["speed/lengths"]
    for ax, cell in zip(axes, CELLS, strict=True):
        sequential = np.asarray(metrics[f"speed/{cell}/sequential"])
        methods = [name.rpartition("/")[2] for name in metrics if name.startswith(f"speed/{cell}/")]
        for index, method in enumerate(method for method in methods if method != "sequential"):
            ratio = sequential / np.asarray(metrics[f"speed/{cell}/{method}"])
            ax.loglog(lengths, ratio, marker="o", markersize=3, color=figures.COLOURS[index], label=method)
        ax.axhline(1, color=figures.GREY, linewidth=0.8)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.set(xlabel="sequence length", title=NAMES[cell])
    axes[0].set(ylabel="speed-up over the sequential loop")
    axes[1].legend(fontsize=8)
    return figure


def draw_tasks(metrics: Metrics, config: ConfigDict) -> Figure:
    """Accuracy of every mixer on every task, a dot a seed (Table 6)."""
    names = list(config.tasks)
    figure, axes = figures.panels(len(names), width=2.3, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        for index, mixer in enumerate(config.tasks[name].mixers):
            what = "last" if name == "parity" else "accuracy"
            figures.dots(ax, index, metrics[f"tasks/{name}/{mixer}/{what}"], color=figures.COLOURS[index])
        figures.names_below(ax, [NAMES[mixer] for mixer in config.tasks[name].mixers])
        ax.set(title=name, ylim=(0, 1.05))
    axes[0].set(ylabel="accuracy")
    return figure


def draw_language(workdir: Path, config: ConfigDict) -> Figure:
    """Cross-entropy of training and validation text against the update, all mixers on the same tokens (Table 5)."""
    figure, axes = figures.panels(2, sharey=True)
    for index, mixer in enumerate(config.lm.mixers):
        lines: list[dict[str, Any]] = read_metrics(workdir, f"lm_{mixer}")
        for ax, name in zip(axes, ("train/cross_entropy", "eval/cross_entropy"), strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            ax.plot(*zip(*points, strict=True), color=figures.COLOURS[index], label=NAMES[mixer])
    for ax, title in zip(axes, ("training", "validation"), strict=True):
        ax.set(xlabel="update", title=title)
    axes[0].set(ylabel="cross-entropy (nats a character)")
    axes[1].legend(fontsize=8)
    return figure
