"""Figures of `itransformer`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics
from experiments.sequence._itransformer_analysis import AttentionMaps, forecasts, sample
from experiments.sequence._itransformer_stages import ABLATIONS, ablation_name
from experiments.sequence._itransformer_training import Trained

COLOUR = {"vanilla": figures.COLOURS[1], "vanilla_norm": figures.COLOURS[4], "inverted": figures.COLOURS[0]}
NAMES = {"vanilla": "tokens of time steps", "vanilla_norm": "and instance normalisation", "inverted": "inverted"}
COMPONENT = {"attention": "attn", "ffn": "FFN", "none": "-"}


def _bars(ax: Axes, groups: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """A group of bars each name, a bar each series: the mean over seeds, every seed a dot."""
    width = 0.8 / max(len(series) for series in groups.values())
    for place, series in enumerate(groups.values()):
        for index, (name, values) in enumerate(series.items()):
            x = place + (index - (len(series) - 1) / 2) * width
            ax.bar(x, np.mean(np.asarray(values, float)), width, color=colours[name])
            figures.dots(ax, x, values, ".", color="black", markersize=4)
    figures.names_below(ax, list(groups), rotation=30)


def promotions(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """What was trained with both kinds of tokens: name -> kind -> errors of the seeds, means over the horizons."""
    found: dict[str, dict[str, list]] = {}
    for name in metrics:
        if match := re.fullmatch(r"(.+)_inverted/mse", name):
            kinds = {kind: metrics.get(f"{match[1]}_{kind}/mse") for kind in ("vanilla", "vanilla_norm", "inverted")}
            if kinds["vanilla"] is not None:
                group = found.setdefault(re.sub(r"_\d+(?=_|$)", "", match[1]).replace("_", " "), {})
                for kind, mse in kinds.items():
                    if mse is not None:
                        group.setdefault(kind, []).append(np.atleast_1d(np.asarray(mse, float)))
    return {name: {kind: np.mean(rows, axis=0) for kind, rows in group.items()} for name, group in found.items()}


def draw_promotion(metrics: Metrics) -> Figure:
    """Test errors of each attention and data set with tokens of time steps and inverted (Table 2)."""
    groups = promotions(metrics)
    figure, (ax,) = figures.panels(1, width=2.0 + 0.9 * len(groups))
    _bars(ax, groups, COLOUR)
    for kind in dict.fromkeys(kind for series in groups.values() for kind in series):
        ax.bar(0, 0, color=COLOUR[kind], label=NAMES[kind])
    ax.set(ylabel="test MSE")
    ax.legend(fontsize=8)
    return figure


def look_backs(metrics: Metrics) -> dict[str, dict[int, np.ndarray]]:
    """Model or data set -> look-back -> errors of the seeds."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, values in metrics.items():
        if match := re.fullmatch(r"(.+)_look_back_(\d+)/mse", name):
            found.setdefault(match[1], {})[int(match[2])] = np.atleast_1d(np.asarray(values, float))
    for name, rows in found.items():
        if (row := metrics.get(f"{name}_96/mse")) is not None:  # of Table 1, where the look-back is 96
            rows.setdefault(96, np.atleast_1d(np.asarray(row, float)))
    return {name: dict(sorted(rows.items())) for name, rows in found.items()}


def draw_look_back(metrics: Metrics) -> Figure:
    """Test error against the length of the look-back, mean over the seeds and their range (Fig. 6)."""
    curves = look_backs(metrics)
    figure, axes = figures.panels(len(curves))
    for index, (ax, (name, rows)) in enumerate(zip(axes, curves.items(), strict=True)):
        steps, colour = list(rows), COLOUR["vanilla" if "vanilla" in name else "inverted"]
        figures.mean_and_range(ax, steps, rows.values(), "o-", color=colour)
        ax.set(xlabel="look-back (steps)", title=name.replace("_", " "))
        ax.set_xticks(steps, steps)
        if index == 0:
            ax.set(ylabel="test MSE")
    return figure


def cka_panels(metrics: Metrics, config: ConfigDict) -> dict[str, dict[str, tuple[str, float, float]]]:
    """Data set -> stage -> (model, CKA, test MSE), of the data sets with both kinds of tokens."""
    panels: dict[str, dict[str, tuple[str, float, float]]] = {}
    for name, stage in config.stages.items():
        if f"{name}/cka" in metrics:
            cka, mse = (float(np.mean(np.asarray(metrics[f"{name}/{key}"], float))) for key in ("cka", "mse"))
            panels.setdefault(stage.data, {})[name] = (stage.model, cka, mse)
    return {data: rows for data, rows in panels.items() if len({model for model, _, _ in rows.values()}) > 1}


def draw_cka(panels: Mapping[str, Mapping[str, tuple[str, float, float]]]) -> Figure:
    """Test error against the similarity of the first and the last block's representations (Fig. 7, left)."""
    figure, axes = figures.panels(len(panels), width=3.8)
    shapes = {"itransformer": ("inverted", "o"), "vanilla": ("vanilla", "s")}
    for ax, (data, rows) in zip(axes, panels.items(), strict=True):
        for model, (kind, marker) in shapes.items():
            points = [(cka, mse) for found, cka, mse in rows.values() if found == model]
            if points:
                ax.plot(*zip(*points, strict=True), marker, color=COLOUR[kind], markersize=5, label=NAMES[kind])
        ax.set(xlabel="CKA of first and last block", title=data)
    axes[0].set(ylabel="test MSE")
    axes[0].legend(fontsize=8)
    return figure


UNSEEN = {"unseen": "the first", "unseen_none_ffn": "the first, no attention", "unseen_ci": "the first, CI"}
AXES, SHARES = "component on the variate, on the temporal axis", "trained on a fifth of the variates"


def variate_panels(metrics: Metrics, config: ConfigDict) -> dict[str, dict[str, dict[str, Any]]]:
    """Panel -> bar's label -> measure -> errors of the seeds, of what was trained."""
    panels: dict[str, dict[str, dict[str, Any]]] = {AXES: {}, SHARES: {}}
    for data in dict.fromkeys(name.partition("_")[0] for name in config.stages):
        own = metrics.get(f"{data}_inverted/mse", metrics.get(f"{data}_96/mse"))
        rows = {part: metrics.get(f"{ablation_name(data, part)}/mse") for part in ABLATIONS[1:]}
        rows = {part: mse for part, mse in ({ABLATIONS[0]: own} | rows).items() if mse is not None}
        for components, mse in rows.items() if len(rows) > 1 else ():
            panels[AXES][f"{data}: {', '.join(COMPONENT[part] for part in components)}"] = {"mse": mse}
        subset = metrics.get(f"{data}_subset/mse")
        if own is not None and subset is not None:
            panels[SHARES] |= {f"{data}, all": {"mse": own}, f"{data}, new ones each batch": {"mse": subset}}
        for stage, label in UNSEEN.items():
            parts = {part: metrics.get(f"{data}_{stage}/{part}") for part in ("mse_seen", "mse_unseen")}
            if all(part is not None for part in parts.values()):
                panels[SHARES][f"{data}, {label}"] = parts
    return {title: groups for title, groups in panels.items() if groups}


def draw_variates(panels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Ablations (Table 3); unseen variates and subsets in training (Figs. 5, 8)."""
    figure, axes = figures.panels(len(panels), width=4.6, height=3.8)
    labels = {"mse": "all variates", "mse_seen": "those seen in training", "mse_unseen": "unseen ones"}
    colours = dict(zip(labels, figures.COLOURS, strict=False))
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        _bars(ax, groups, colours)
        ax.set(title=title)
        for part in dict.fromkeys(part for series in groups.values() for part in series):
            ax.bar(0, 0, color=colours[part], label=labels[part])
    axes[-1].legend(fontsize=8)
    axes[0].set(ylabel="test MSE")
    return figure


def draw_forecasts(trained: Mapping[str, Trained], windows: int = 3, variates: Sequence[int] = (0, -1)) -> Figure:
    """Forecasts of some test windows by the first seeds, against what came."""
    found = {name: forecasts(one, windows) for name, one in trained.items()}
    first = next(iter(trained.values()))
    x, y, _ = sample(first, windows)
    size = (3.4 * windows, 2.3 * len(variates))
    figure, grid = figures.grid(len(variates), windows, size)
    T, S = x.shape[1], y.shape[1]
    for row, variate in zip(grid, variates, strict=True):
        for column, ax in enumerate(row):
            truth = np.concatenate([x[column, :, variate], y[column, :, variate]])
            ax.plot(np.arange(-T, S), truth, color=figures.GREY, label="data")
            for index, (name, values) in enumerate(found.items()):
                ax.plot(values[column, :, variate], color=figures.COLOURS[index], linewidth=1.1, label=name)
            ax.axvline(0, color=figures.GREY, linewidth=0.6)
        row[0].set(ylabel="standard deviations")
    for ax in grid[-1]:
        ax.set(xlabel="steps")
    figures.legend_below(figure, 1 + len(found))
    return figure


def draw_attention(found: Mapping[str, AttentionMaps]) -> Figure:
    """First layer's map, correlations of the look-back; last layer's map, correlations of the future (Fig. 7)."""
    figure, grid = figures.grid(len(found), 4, (12.0, 3.1 * len(found)))
    for row, (name, maps) in zip(grid, found.items(), strict=True):
        parts = {
            "first layer": maps.maps[0],
            "lagged correlations, look-back": maps.past,
            "last layer": maps.maps[-1],
            "lagged correlations, future": maps.future,
        }
        for ax, (title, values) in zip(row, parts.items(), strict=True):
            values = np.where(np.eye(len(values), dtype=bool), np.nan, values)  # everybody resembles himself
            image = ax.imshow(values, cmap="viridis")
            figure.colorbar(image, ax=ax, shrink=0.75)
            ax.set(title=title, xticks=[], yticks=[])
        row[0].set(ylabel=name.replace("_", " "))
    return figure
