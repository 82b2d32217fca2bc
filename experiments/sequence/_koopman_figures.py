"""Figures of `koopman`."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics
from experiments.sequence._koopman_forecast import Score, Spectra
from experiments.sequence._koopman_training import Data

NAMES = {
    "dmd": "DMD",
    "kkr": "KKR",
    "vae": "VAE",
    "kae": "KAE",
    "entropy": "entropy alone",
    "information": "information alone",
    "full": "full loss",
}
COLOUR = {
    "dmd": figures.BLACK,
    "kkr": figures.SKY,
    "vae": figures.ORANGE,
    "kae": figures.VERMILION,
    "entropy": figures.GREEN,
    "information": figures.PURPLE,
    "full": figures.BLUE,
}
TITLES = {
    "lorenz": "Lorenz-63",
    "waves": "travelling waves",
    "waves_random": "waves, random start of K",
    "waves_least_squares": "waves, K by least squares",
    "waves_learned": "waves, learned K",
}


def draw_covariance(spectra: Mapping[str, Mapping[str, Spectra]], config: ConfigDict) -> Figure:
    """Eigenvalues of the latent covariance, a line a seed, the stages of one system together (Fig. 20)."""
    systems = [name for name in ("lorenz", "waves") if any(config.stages[stage].data == name for stage in spectra)]
    figure, axes = figures.panels(len(systems), sharey=True)
    for ax, system in zip(axes, systems, strict=True):
        drawn: dict[str, np.ndarray] = {}
        for stage, variants in spectra.items():
            if config.stages[stage].data == system:
                for variant, found in variants.items():
                    drawn.setdefault(variant, found.shares)  # of the system's first stage that has the variant
        for variant, shares in drawn.items():
            for index, row in enumerate(shares):
                label = NAMES[variant] if index == 0 else None
                ax.semilogy(np.arange(1, len(row) + 1), np.maximum(row, 1e-9), color=COLOUR[variant], label=label)
        ax.set(xlabel="mode of the latent covariance", title=TITLES[system])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8, loc="lower left")
    axes[0].set(ylabel="share of the variance", ylim=(1e-9, 2))
    return figure


def draw_water(metrics: Metrics, config: ConfigDict) -> Figure:
    """Variances of the modes, and their effective number, against the weight of the entropy (Fig. 1c)."""
    weights = [f"{weight:g}" for weight in metrics["water/weights"]]
    allocations = np.asarray(metrics["water/allocations"])
    figure, (left, right) = figures.panels(2)
    bottom = np.zeros(len(weights))
    for mode, gain in enumerate(config.water.gains):
        colour = figures.COLOURS[mode % len(figures.COLOURS)]
        left.bar(weights, allocations[:, mode], bottom=bottom, color=colour, label=f"gain {gain:g}")
        bottom += allocations[:, mode]
    left.set(xlabel="weight of the entropy", ylabel="variance of the mode")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=3, columnspacing=0.8)
    right.plot(weights, metrics["water/dimensions"], "o-", color=figures.COLOURS[0])
    right.axhline(len(config.water.gains), color=figures.GREY, linewidth=0.8, linestyle="--")
    right.set(xlabel="weight of the entropy", ylabel="effective dimension", ylim=(1, None))
    return figure


def draw_eigenvalues(spectra: Mapping[str, Mapping[str, Spectra]], config: ConfigDict) -> Figure:
    """Eigenvalues of the first seed's K, KAE and full loss, a panel a stage of the waves (Fig. 2)."""
    stages = [name for name in spectra if config.stages[name].data == "waves"] or list(spectra)
    figure, axes = figures.panels(len(stages), width=3.4, height=3.7)
    for ax, stage in zip(axes, stages, strict=True):
        ax.add_patch(Circle((0, 0), 1, fill=False, color=figures.GREY, linewidth=0.8))
        for variant, marker in (("kae", "o"), ("full", "x")):
            if variant in spectra[stage]:
                values = spectra[stage][variant].eigenvalues[0]
                filled = {"markerfacecolor": "none"} if marker == "o" else {}
                ax.plot(values.real, values.imag, marker, ms=5, color=COLOUR[variant], label=NAMES[variant], **filled)
        limit = 1.1 * max(1.0, *(np.abs(found.eigenvalues[0]).max() for found in spectra[stage].values()))
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=TITLES.get(stage, stage))
        ax.set(xlabel="real part")
    axes[0].set(ylabel="imaginary part")
    figures.legend_below(figure, 2)
    return figure


def draw_forecasts(scores: Mapping[str, Mapping[str, list[Score]]], config: ConfigDict) -> Figure:
    """Error against the steps, mean over the seeds and their range: Lorenz-63, and every stage of the waves."""
    drawn = {"lorenz": {**scores["lorenz"], **scores.get("lorenz_batch", {})}, "waves": scores["waves"]}
    others = [name for name in config.stages if config.stages[name].data == "waves" and name != "waves"]
    drawn |= {name: {"dmd": scores["waves"]["dmd"], **scores[name]} for name in others}
    figure, axes = figures.panels(len(drawn), width=2.9, height=3.4)
    for ax, (name, methods) in zip(axes, drawn.items(), strict=True):
        _errors(ax, {method: [one.errors for one in seeds] for method, seeds in methods.items()})
        ax.set(xlabel="steps", title=TITLES.get(name, name))
    if len(axes) > 2:
        for ax in axes[2:]:
            ax.sharey(axes[1])
    axes[0].set(ylabel="normalised error")
    figures.legend_below(figure, 6)
    return figure


def _errors(ax: Axes, curves: Mapping[str, list[np.ndarray]]) -> None:
    for name, rows in curves.items():
        values = np.maximum(np.stack(rows), 1e-6)
        steps = np.arange(1, values.shape[1] + 1)
        figures.mean_and_range(ax, steps, values.T, color=COLOUR[name], label=NAMES[name], linewidth=1.3)
    top = max(float(np.median(np.stack(rows)[:, -1])) for rows in curves.values())
    ax.set(yscale="log", ylim=(None, min(10.0, 3 * top)))


def draw_fields(scores: Mapping[str, Mapping[str, list[Score]]], data: Data, config: ConfigDict) -> Figure:
    """The first test field and its forecasts by the first seeds, after each of the horizons."""
    shape = (config.waves.size, config.waves.size, config.waves.channels)
    rows = {"truth": data.test[0, 1:]}
    for stage, suffix in (("waves", ""), ("waves_least_squares", ",\nleast squares")):
        for name, found in scores.get(stage, {}).items():
            if name in ("dmd", "vae", "kae", "full"):
                rows[NAMES[name] + suffix] = found[0].forecast
    limit = float(np.abs(data.test[0]).max())
    size = (1.5 * len(rows) + 1, 1.6 * len(config.horizons))
    figure, grid = figures.grid(len(config.horizons), len(rows), size)
    for column, (name, forecast) in zip(grid.T, rows.items(), strict=True):
        column[0].set_title(name)
        for ax, step in zip(column, config.horizons, strict=True):
            field = forecast[step - 1].reshape(shape)[..., 0]
            image = ax.imshow(field, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
    for ax, step in zip(grid[:, 0], config.horizons, strict=True):
        ax.set_ylabel(f"{step} steps")
    figure.colorbar(image, ax=grid, shrink=0.6, label="standard deviations")
    return figure
