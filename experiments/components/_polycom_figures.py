"""Figures of `polycom`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.components._polycom_tokens import FILES, text_of
from experiments.components._polycom_training import members, size_of
from experiments.harness import Metrics
from jaxpapers.train import read_metrics

NAMES = {
    "polynorm": "PolyNorm",
    "polyrelu": "PolyReLU",
    "swiglu": "SwiGLU",
    "relu2": "ReLU²",
    "relu": "ReLU",
    "gelu": "GELU",
    "polyprelu": "PolyPReLU",
    "polygelu": "PolyGELU",
    "polysilu": "PolySiLU",
    "polyrelunorm": "PolyReLUNorm",
}
RIVALS = ("swiglu", "relu2", "relu", "gelu")
COMPARED = ("polynorm", "polyrelu", *RIVALS)
TEXT_NAMES = {"wikitext2_small": "WikiText-2, small"}


def label(name: str, config: ConfigDict) -> str:
    """A stage as a person would call it."""
    stage = config.stages[name]
    order = "" if stage.order == 3 or not stage.activation.startswith("poly") else f", r = {stage.order}"
    experts = " (MoE)" if has_experts(name, config) else ""
    text = f", {TEXT_NAMES.get(stage.text, stage.text)}" if other_text(name, config) else ""
    return NAMES[stage.activation] + order + experts + text


def has_experts(name: str, config: ConfigDict) -> bool:
    """Whether a stage's models are mixtures of experts."""
    return size_of(name, config).num_experts > 0


def other_text(name: str, config: ConfigDict) -> bool:
    """Whether a small stage reads another text than the others: losses on two texts do not compare."""
    return not config.stages[name].size and text_of(name, config) != config.lm.text


def main_stages(config: ConfigDict) -> list[str]:
    """The stages that are named after an activation of the paper's comparison, in its order; all, if none is."""
    return [name for name in COMPARED if name in config.stages] or in_order(config)


def in_order(config: ConfigDict) -> list[str]:
    """All stages, their activations in the order of `NAMES`: a ConfigDict has its fields in that of the alphabet."""
    activations = [*NAMES]
    return sorted(config.stages, key=lambda name: activations.index(config.stages[name].activation))


def unit(names: Sequence[str], config: ConfigDict) -> str:
    """What losses are of."""
    files = any(text_of(name, config).startswith(FILES) for name in names)
    return "nats a token" if files else f"nats a {config.lm.encoding.removesuffix('s')}"


def draw_loss(workdir: Path, config: ConfigDict, names: Sequence[str]) -> Figure:
    """Training and validation loss against the update, mean of the seeds, of stages on the same batches."""
    figure, axes = figures.panels(2)
    for index, name in enumerate(names):
        lines: list[dict[str, Any]] = read_metrics(workdir, f"lm_{name}")
        seeds = [row.rate == config.stages[name].rates[0] for row in members(name, config)]
        for ax, metric in zip(axes, ("train/cross_entropy", "eval/cross_entropy"), strict=True):
            points = [(line["step"], np.mean(np.atleast_1d(line[metric])[seeds])) for line in lines if metric in line]
            ax.plot(*zip(*points, strict=True), color=figures.COLOURS[index], label=label(name, config))
    for ax, title in zip(axes, ("training", "validation"), strict=True):
        low = min(line.get_ydata().min() for line in ax.get_lines())
        ax.set(xlabel="update", title=title, ylim=(low - 0.02, low + 0.4))  # what they differ by is in the end
    axes[0].set(ylabel=f"cross-entropy ({unit(names, config)})")
    axes[1].legend(fontsize=8)
    return figure


def draw_rates(metrics: Metrics, config: ConfigDict) -> Figure:
    """Loss against the learning rate, mean of the seeds of each rate, all activations."""
    figure, axes = figures.panels(2)
    for index, name in enumerate(main_stages(config)):
        first, *others = config.stages[name].rates
        prefixes = {first: name} | {rate: f"{name}/rate_{rate:g}" for rate in others}
        rates = sorted(prefixes)
        for ax, what in zip(axes, ("train", "validation"), strict=True):
            values = [np.mean(metrics[f"{prefixes[rate]}/{what}"]) for rate in rates]
            ax.semilogx(rates, values, "o-", color=figures.COLOURS[index], markersize=4, label=label(name, config))
            ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
            ax.minorticks_off()
    for ax, title in zip(axes, ("training", "validation"), strict=True):
        ax.set(xlabel="peak learning rate", title=title)
    axes[0].set(ylabel=f"cross-entropy ({unit(main_stages(config), config)})")
    axes[1].legend(fontsize=8)
    return figure


def draw_approximation(metrics: Metrics) -> Figure:
    """Left: sup-error of the local Taylor network against its cells. Right: of x^2 against a ReLU network's levels."""
    figure, axes = figures.panels(2)
    cells = np.asarray(metrics["approximation/cells"])
    for index, n in enumerate((2, 3)):
        errors = np.asarray(metrics[f"approximation/n{n}"])
        colour = figures.COLOURS[index]
        axes[0].loglog(cells, errors, "o-", color=colour, markersize=4, label=f"n = {n}")
        line = errors[-1] * (cells / cells[-1]) ** -float(n)
        axes[0].loglog(cells, line, ":", color=figures.GREY, label=f"slope $-${n}")
    axes[0].set_xticks(cells, [str(cell) for cell in cells])
    axes[0].minorticks_off()
    axes[0].set(xlabel="cells", ylabel="sup error", title=r"sin(2$\pi$x), local Taylor network (PolyReLU)")
    axes[0].legend(fontsize=8)
    axes[1].semilogy(
        metrics["sawtooth/levels"], metrics["sawtooth/error"], "o-", color=figures.COLOURS[1], label="ReLU"
    )
    exact = max(float(metrics["exact/square"]), np.finfo(float).eps)
    axes[1].axhline(exact, color=figures.COLOURS[0], label="PolyReLU, one layer")
    axes[1].set(xlabel="levels of the ReLU network", title="x$^2$ on [0, 1]")
    axes[1].legend(fontsize=8)
    return figure


def draw_ranks(metrics: Metrics, config: ConfigDict) -> Figure:
    """Effective rank of the matrices of the feed-forward blocks, a dot a seed."""
    names = [name for name in in_order(config) if f"{name}/rank/up" in metrics and not other_text(name, config)]
    figure, axes = figures.panels(2)
    for ax, matrix, title in zip(axes, ("up", "down"), ("first matrix", "last matrix"), strict=True):
        _dots(ax, [metrics[f"{name}/rank/{matrix}"] for name in names], [label(name, config) for name in names])
        ax.set(title=title)
    axes[0].set(ylabel="effective rank")
    return figure


def draw_ablation(metrics: Metrics, config: ConfigDict) -> Figure:
    """Loss of all stages on one text: orders, compositions, experts beside the activations, a dot a seed."""
    names = [name for name in config.stages if not other_text(name, config)]
    names.sort(key=lambda name: np.mean(metrics[f"{name}/train"]))
    figure, axes = figures.panels(2, width=4.0)
    for ax, what in zip(axes, ("train", "validation"), strict=True):
        _dots(ax, [metrics[f"{name}/{what}"] for name in names], [label(name, config) for name in names])
        ax.set(title="training" if what == "train" else "validation")
    axes[0].set(ylabel=f"cross-entropy ({unit(names, config)})")
    return figure


def _dots(ax: Axes, values: Sequence[Any], labels: Sequence[str]) -> None:
    for index, row in enumerate(values):
        figures.dots(ax, index, row, color=figures.COLOURS[0], alpha=0.6, markersize=4)
        ax.plot([index - 0.25, index + 0.25], [np.mean(row)] * 2, color=figures.COLOURS[0])
    figures.names_below(ax, labels)
