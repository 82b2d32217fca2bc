"""Figures of `matryoshka`."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics
from experiments.representation._matryoshka_study import ways_of
from jaxpapers.representation import matryoshka as mrl

NAMES = {
    "mrl": "MRL",
    "mrl_boost": "MRL, small sizes boosted",
    "mrl_e": "MRL-E",
    "uniform": "MRL, uniform sizes",
    "late": "MRL without the smallest size",
    "ff": "fixed features, one model a size",
    "slim": "slimmable network",
    "svd": "SVD",
    "random_fs": "first features",
    "jl": "random projection",
    "random_lp": "random features, probe",
    "finetuned_0": "fine-tuned: heads alone",
    "finetuned_1": "fine-tuned: heads and the last layer",
    "finetuned_2": "fine-tuned: heads and two layers",
    "contrastive": "contrastive MRL",
    "contrastive_ff": "contrastive, one model a size",
}
STYLES = {name: (colour, "-") for name, colour in zip(("mrl", "ff", "mrl_e", "slim"), figures.COLOURS, strict=False)}
STYLES |= {name: (colour, "--") for name, colour in zip(("svd", "random_fs", "jl"), figures.COLOURS[4:], strict=True)}
STYLES |= {"random_lp": (figures.GREY, "--")}
ABLATIONS = dict(zip(("mrl_boost", "uniform", "late"), figures.COLOURS, strict=False))


def curve(metrics: Metrics, name: str, sizes: Iterable[int]) -> tuple[list[int], np.ndarray]:
    """(sizes, (sizes, seeds)) of a measure where it was taken."""
    known = [m for m in sizes if f"{name}/{m}" in metrics]
    return known, np.array([np.atleast_1d(metrics[f"{name}/{m}"]) for m in known])


def by_size(ax: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis of sizes, each with its number."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(sizes), [str(m) for m in sizes])
    ax.minorticks_off()


def plot(ax: Axes, known: Sequence[int], values: np.ndarray, colour: str, style: str, label: str) -> None:
    """The mean of the seeds as a line, each seed a dot."""
    if not len(known):
        return
    ax.plot(known, values.mean(axis=1), style, color=colour, label=label, linewidth=1.5)
    ax.plot(known, values, ".", color=colour, markersize=4)


def draw_accuracy(metrics: Metrics, name: str, config: ConfigDict) -> Figure:
    """Linear and 1-NN accuracy against the size, with all baselines (Figs. 2, 3)."""
    sizes = config[name].nesting
    figure, axes = figures.panels(2, width=4.2, height=4.6, sharey=True)
    for ax, what, title in zip(axes, ("top1", "nn"), ("linear classifier", "1-NN"), strict=True):
        for variant, (colour, style) in STYLES.items():
            known, values = curve(metrics, f"{name}/{variant}/{what}", sizes)
            plot(ax, known, values, colour, style, "_nolegend_")
        by_size(ax, sizes)
        ax.set(xlabel="size of the representation", title=title)
    for variant, (colour, style) in STYLES.items():
        if any(key.startswith(f"{name}/{variant}/") for key in metrics):
            axes[0].plot([], [], style, color=colour, label=NAMES[variant])
    axes[0].set(ylabel="accuracy (%)")
    figures.legend_below(figure, 3)
    return figure


def draw_retrieval(metrics: Metrics, name: str, config: ConfigDict) -> Figure:
    """1-NN accuracy and mAP against the cost of a query: single-shot, re-ranked, funnel (Fig. 8)."""
    recipe, items = config[name], metrics[f"{name}/items"]
    figure, axes = figures.panels(2, width=4.2, height=3.6)
    for ax, what, title in zip(axes, ("nn", "map"), ("1-NN accuracy (%)", f"mAP@{recipe.neighbours} (%)"), strict=True):
        known, values = curve(metrics, f"{name}/mrl/{what}", recipe.nesting)
        cost = [mrl.search_mflops(items, m) for m in known]
        ax.plot(cost, values.mean(axis=1), "-o", color=figures.COLOURS[0], markersize=4, label="single-shot")
        for m, x, y in zip(known, cost, values.mean(axis=1), strict=True):
            ax.annotate(
                str(m), (x, y), xytext=(3, -10), textcoords="offset points", fontsize=7, color=figures.COLOURS[0]
            )
        for index, (key, way) in enumerate(ways_of(recipe).items()):
            x, y = (np.mean(metrics[f"{name}/retrieval/{key}/{of}"]) for of in ("mflops", what))
            shade = figures.COLOURS[1 + index % (len(figures.COLOURS) - 1)]
            marker = "s" if index < len(recipe.adaptive) else "^"
            hollow = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": "none"}
            ax.plot(x, y, marker=marker, color=shade, label=way.label, **hollow)
        ax.set_xscale("log")
        # The smallest size, far below the others, would leave these in one line.
        low, high = values.mean(axis=1)[min(1, len(known) - 1)], values.max()
        ax.set(
            xlabel="MFLOPs a query", title=title, ylim=(low - 0.1 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
        )
    axes[0].legend(fontsize=8, loc="lower right")
    return figure


def draw_cascade(metrics: Metrics, names: Sequence[str], config: ConfigDict) -> Figure:
    """Accuracy of the cascade against the expected size, beside single heads and oracle (Fig. 6, App. J); means."""
    figure, axes = figures.panels(len(names), width=4.2, height=3.4)
    for ax, name in zip(axes, names, strict=True):
        sizes, group = config[name].nesting, f"{name}/cascade_mrl"
        known, heads = curve(metrics, f"{group}/head", sizes)
        plot(ax, known, heads.mean(axis=-1), figures.GREY, "-", "single heads")
        known, oracle = curve(metrics, f"{group}/oracle", sizes)
        plot(ax, known, oracle, figures.GREY, ":", "oracle: any head up to m")
        kinds = (("expected", "cascade, E[m]", 0), ("cumulative", "cascade, all heads up to the exit", 1))
        for kind, label, colour in kinds:
            x, y = (curve(metrics, f"{group}/{what}", sizes)[1].mean(axis=-1) for what in (kind, "accuracy"))
            shade = figures.COLOURS[colour]
            ax.plot(x.mean(axis=1), y.mean(axis=1), "-o", color=shade, markersize=4, label=label)
        by_size(ax, sizes)
        ax.set(xlabel="size, or expected size", title=name)
    axes[0].set(ylabel="accuracy (%)")
    axes[0].legend(fontsize=8)
    return figure


def draw_interpolation(metrics: Metrics, name: str, config: ConfigDict) -> Figure:
    """1-NN accuracy and mAP at the sizes that were trained, and between them (Fig. 5)."""
    sizes = config[name].nesting
    figure, axes = figures.panels(2, width=4.2)
    for ax, what, title in zip(axes, ("nn", "map"), ("1-NN accuracy (%)", "mAP (%)"), strict=True):
        known, values = curve(metrics, f"{name}/mrl/{what}", sizes)
        plot(ax, known, values, figures.COLOURS[0], "-", "trained sizes")
        between, values = curve(metrics, f"{name}/mrl/{what}", mrl.sizes_between(sizes))
        ax.plot(between, values.mean(axis=1), "D", color=figures.COLOURS[1], markersize=5, label="sizes between them")
        by_size(ax, sizes)
        ax.set(xlabel="size of the representation", title=title)
    axes[0].legend(fontsize=8)
    return figure


def draw_ablations(metrics: Metrics, name: str, config: ConfigDict) -> Figure:
    """Importance and spacing, as differences to MRL (App. K), and few-shot accuracy against fixed features."""
    recipe = config[name]
    figure, axes = figures.panels(3, width=3.4)
    for ax, what, title in zip(axes, ("top1", "nn"), ("linear classifier", "1-NN"), strict=False):
        for variant, colour in ABLATIONS.items():
            known, values = curve(metrics, f"{name}/{variant}/{what}", recipe.nesting)
            if known:
                _, plain = curve(metrics, f"{name}/mrl/{what}", known)
                plot(ax, known, values - plain[:, : values.shape[1]], colour, "-", NAMES[variant])  # of its own seeds
        ax.axhline(0, color=figures.GREY, linewidth=0.8)
        by_size(ax, recipe.nesting)
        ax.set(xlabel="size", title=title)
    axes[0].set(ylabel="difference to MRL (points)")
    for index, n in enumerate(recipe.shots):
        for variant, style in (("mrl", "-"), ("ff", ":")):
            keys = [(m, f"{name}/few_shot/{variant}/{m}/{n}") for m in recipe.nesting]
            found: list[Any] = [(m, np.mean(metrics[key])) for m, key in keys if key in metrics]
            if found:
                label = f"{n} shot{'s' * (n > 1)}" if variant == "mrl" else "_nolegend_"
                axes[2].plot(*zip(*found, strict=True), style, color=figures.COLOURS[index % 7], label=label)
    by_size(axes[2], recipe.nesting)
    axes[2].set(xlabel="size", title="nearest class mean (dotted: fixed features)", ylabel="accuracy (%)")
    for ax in axes[1:]:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    return figure


def draw_further(metrics: Metrics, name: str, config: ConfigDict) -> Figure:
    """MRL by fine-tuning (App. K.1), contrastive MRL (App. C), superclasses, against the size."""
    sizes = config[name].nesting
    panels = (
        ("top1", "fine-tuning, linear classifier", ("mrl", "ff", "finetuned_0", "finetuned_1", "finetuned_2")),
        ("nn", "contrastive, 1-NN", ("contrastive", "contrastive_ff")),
        ("map", f"contrastive, mAP@{config[name].neighbours}", ("contrastive", "contrastive_ff")),
        ("super", "superclass", ("mrl", "ff")),
    )
    figure, axes = figures.panels(len(panels), width=3.4)
    for ax, (what, title, variants) in zip(axes, panels, strict=True):
        for variant, colour in zip(variants, figures.COLOURS, strict=False):
            known, values = curve(metrics, f"{name}/{variant}/{what}", sizes)
            plot(ax, known, values, colour, "-", NAMES[variant])
        if what == "super":
            known, fine = curve(metrics, f"{name}/mrl/top1", sizes)
            plot(ax, known, fine, figures.COLOURS[0], ":", "MRL, the class itself")
        by_size(ax, sizes)
        ax.set(xlabel="size", title=title)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    axes[0].set(ylabel="accuracy (%)")
    return figure
