"""Figures and tables of `adafortitran`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics
from experiments.perception._adafortitran_scores import CLOSED, SWEEPS, Linear, decibels, rows_of
from experiments.perception._adafortitran_training import grid_of, pilots_of
from jaxpapers.data import tdl
from jaxpapers.perception.adafortitran import apply_linear
from jaxpapers.train import read_metrics

NAMES = {
    "adafortitran": "AdaFortiTran",
    "fortitran": "FortiTran",
    "cevit": "CE-ViT",
    "sisrafnet": "SisRafNet",
    "linear": "Linear",
    "bilinear": "LS, bilinear",
    "pooled": "LMMSE, pooled",
    "sample": "LMMSE, of samples",
    "matched": "LMMSE, matched",
    "adafortitran_s": "AdaFortiTran-S",
    "adafortitran_m": "AdaFortiTran-M",
    "adafortitran_xl": "AdaFortiTran-XL",
    "bound": "bound, unseen channels",
}
STYLE = {
    "adafortitran": (figures.BLUE, "o-"),
    "fortitran": (figures.VERMILION, "s-"),
    "cevit": (figures.GREEN, "^-"),
    "sisrafnet": (figures.PURPLE, "v-"),
    "linear": (figures.ORANGE, "D-"),
    "bilinear": (figures.GREY, "x:"),
    "pooled": (figures.SKY, "x--"),
    "sample": (figures.SKY, "+:"),
}
LABELS = {"snr": "SNR (dB)", "delay_spread": "delay spread (ns)", "doppler": "Doppler shift (Hz)"}
TITLES = {
    "snr": "200 ns, 500 Hz",
    "delay_spread": "10 dB, 600 Hz",
    "doppler": "10 dB, 100 ns",
}
# Read off the paper's figures, +-0.8 dB; of the delay spread none was.
PUBLISHED = {"snr": (-22.4, -26.1, -28.4, -29.4, -29.8, -30.0), "doppler": (-26.4, -25.1, -27.1, -27.2, -16.6)}
# An outside run of the authors' code (`echojayne/RAN_Benchmarks`).
RERUN = {"snr": (-21.93, -25.89, -28.68, -30.28, -31.00, -31.27)}
CARD_ROWS = {
    "AdaFortiTran, read off the paper": (PUBLISHED, "o"),
    "AdaFortiTran, the authors' code run elsewhere": (RERUN, "*"),
}


def name_of(model: str) -> str:
    """How a model is called in figures."""
    return NAMES.get(model, model)


def table(stage: str, scores: Mapping[str, np.ndarray], bound: np.ndarray) -> str:
    """Means over the seeds in dB, a row an estimator, the bound below: all 17 points and their mean."""
    header = [f"{stage}: E|h - h^|^2 in dB, mean of the seeds; the bound is that of channels never seen"]
    columns = [f"{row[axis]}" for axis, rows in enumerate(SWEEPS.values()) for row in rows]
    lines = [f"{'':22s}{'mean':>7s}  " + "".join(f"{column:>7s}" for column in columns)]
    rows = {name_of(name): values.mean(axis=0) for name, values in scores.items()} | {NAMES["bound"]: bound}
    for name, values in rows.items():
        lines.append(f"{name:22s}{values.mean():7.2f}  " + "".join(f"{value:7.2f}" for value in values))
    return "\n".join(header + lines) + "\n"


def density_table(metrics: Metrics, names: Sequence[str], spacings: Sequence[int], config: ConfigDict) -> str:
    """Errors at one point in dB, a row an estimator, a column a density of pilots; the bound below."""
    recipe = config.training.updates
    own = f", {recipe.fixed:,} at {config.grid.spacing}" if config.grid.spacing in spacings else ""
    lines = [
        "fixed channels at 5 dB, 200 ns, 500 Hz: E|h - h^|^2 in dB, mean of the seeds, one pilot row in so many; "
        f"{recipe.density:,} updates{own}",
        f"{'':22s}" + "".join(f"{spacing:>7d}" for spacing in spacings),
    ]
    for name in names:
        row = [np.mean(metrics[f"density/{spacing}/{name}/db"]) for spacing in spacings]
        lines.append(f"{name_of(name):22s}" + "".join(f"{value:7.2f}" for value in row))
    return "\n".join(lines) + "\n"


def has_papers_pilots(num_subcarriers: int, config: ConfigDict) -> bool:
    """Whether a grid so wide is the paper's, with its pilots: 120 subcarriers, every third one from the second on."""
    pilots = pilots_of(config, num_subcarriers)
    return num_subcarriers == 120 and all(map(np.array_equal, pilots, tdl.pilot_indices(120, 3)))


def is_papers_grid(config: ConfigDict) -> bool:
    """Whether what the paper reports is of this grid, these pilots and this noise."""
    return has_papers_pilots(config.grid.subcarriers, config) and config.snr_reference == "grid"


def comparison(metrics: Metrics, config: ConfigDict) -> str:
    """AdaFortiTran beside what is known of it: the paper's SNR sweep, and on fresh channels the two linear limits."""
    lines = []
    if is_papers_grid(config) and "fixed/adafortitran/db" in metrics:
        lines.append("SNR sweep, 0 to 25 dB, fixed channels:")
        ours = np.mean(metrics["fixed/adafortitran/db"], axis=0)[rows_of("snr")]
        rows = {"AdaFortiTran here": ours} | {name: values["snr"] for name, (values, _) in CARD_ROWS.items()}
        rows[NAMES["bound"]] = np.asarray(metrics["bound/db"])[rows_of("snr")]
        lines += [f"{name:46s}" + "".join(f"{value:7.2f}" for value in values) for name, values in rows.items()]
    if "fresh/adafortitran/mean" in metrics:
        ours, pooled = (float(np.mean(metrics[f"fresh/{name}/mean"])) for name in ("adafortitran", "pooled"))
        bound = float(metrics["bound/mean"])
        between = "lies" if bound <= ours <= pooled else "does not lie"
        lines.append(
            f"fresh channels: AdaFortiTran {ours:.2f} {between} between the bound {bound:.2f} and the pooled LMMSE "
            f"{pooled:.2f}; trained as long as in the paper it should"
        )
    return "".join(f"{line}\n" for line in lines)


def _axis(sweep: str) -> list[float]:
    place = list(SWEEPS).index(sweep)
    return [point[place] for point in SWEEPS[sweep]]


def draw_sweeps(metrics: Metrics, config: ConfigDict) -> Figure:
    """Errors against each condition, mean over the seeds and their range: the stages, the three sweeps."""
    stages = list(config.stages)
    figure, grid = figures.grid(len(stages), 3, (10.5, 3.2 * len(stages) + 0.6), sharey="row")
    for stage, axes in zip(stages, grid, strict=True):
        for sweep, ax in zip(SWEEPS, axes, strict=True):
            x, rows = _axis(sweep), rows_of(sweep)
            for name, (colour, style) in STYLE.items():
                if f"{stage}/{name}/db" in metrics:
                    values = np.asarray(metrics[f"{stage}/{name}/db"])[:, rows].T
                    look = {"color": colour, "label": NAMES[name], "markersize": 4, "linewidth": 1.2}
                    figures.mean_and_range(ax, x, values, style, **look)
            ax.plot(x, np.asarray(metrics["bound/db"])[rows], "k--", linewidth=1, label=NAMES["bound"])
            for label, (values, marker) in CARD_ROWS.items() if stage == "fixed" and is_papers_grid(config) else ():
                if sweep in values:
                    ax.plot(x, values[sweep], marker, color=figures.BLUE, markerfacecolor="white", label=label)
            ax.set(xlabel=LABELS[sweep], title=f"{stage} channels, {TITLES[sweep]}")
        axes[0].set(ylabel="error (dB)")
    figures.legend_below(figure, 5)
    return figure


def draw_closed_forms(metrics: Metrics, config: ConfigDict) -> Figure:
    """Bilinear interpolation, pooled LMMSE and the bound on a wide grid, for both SNR references.

    Lines are closed forms, crosses simulations, dots what the paper reports for AdaFortiTran, where the grid is its.
    """
    figure, grid = figures.grid(2, 3, (10.5, 6.6), sharey="row")
    checked = np.asarray(metrics["closed/checked"])
    is_papers = has_papers_pilots(config.closed_forms.subcarriers, config)
    colours = dict(zip(CLOSED, (figures.GREY, figures.SKY, figures.BLACK), strict=True))
    for reference, axes in zip(tdl.SNR_REFERENCES, grid, strict=True):
        for place, (sweep, ax) in enumerate(zip(SWEEPS, axes, strict=True)):
            x = _axis(sweep)
            for name, colour in colours.items():
                values = np.asarray(metrics[f"closed/{reference}/{name}/db"])[rows_of(sweep)]
                ax.plot(x, values, "--" if name == "bound" else "-", color=colour, label=NAMES[name])
                for point, value in zip(checked, metrics[f"closed/{reference}/{name}/simulated"], strict=True):
                    if tuple(point.tolist()) in SWEEPS[sweep]:
                        ax.plot(point[place], value, "x", color=colour)
            if is_papers and reference == "grid" and sweep in PUBLISHED:
                label = "AdaFortiTran, as published (fixed channels)"
                ax.plot(x, PUBLISHED[sweep], "o", color=figures.BLUE, markersize=4, label=label)
            ax.set(xlabel=LABELS[sweep], title=f"SNR of the {reference}, {TITLES[sweep]}")
        axes[0].set(ylabel="error (dB)")
    figures.legend_below(figure, 5)
    return figure


def draw_density(metrics: Metrics, names: Sequence[str], spacings: Sequence[int], config: ConfigDict) -> Figure:
    """Errors of fixed channels at one point against the number of pilot rows, mean over the seeds and their range."""
    figure, (ax,) = figures.panels(1, 6.0, 4.0)
    rows = [config.grid.subcarriers // spacing for spacing in spacings]
    for name in names:
        values = [metrics[f"density/{spacing}/{name}/db"] for spacing in spacings]
        colour, style = STYLE.get(name, (figures.BLACK, "--"))
        figures.mean_and_range(ax, rows, values, style, color=colour, markersize=4, label=name_of(name))
    ax.set(xlabel="pilot rows", ylabel="error (dB)", title="fixed channels, 5 dB, 200 ns, 500 Hz")
    figures.legend_below(figure, 5)
    return figure


def draw_curves(workdir: Path, bound: float, config: ConfigDict) -> Figure:
    """E|h - h^|^2 of the training batches against the update, with dropout where there is any, a line a seed.

    Args:
      workdir: of the run.
      bound: of unseen channels in the training's conditions, in dB.
      config: of the experiment.
    """
    figure, axes = figures.panels(len(config.stages), width=5.0, sharey=True)
    for stage, ax in zip(config.stages, axes, strict=True):
        for name in config.stages[stage]:
            for index, (steps, values) in enumerate(_curves(workdir, stage, name, config)):
                colour, style = STYLE.get(name, (figures.BLACK, "-"))
                line = ":" if name not in STYLE else style[-1]
                label = name_of(name) if index == 0 else None
                ax.plot(steps, decibels(2 * values), line, color=colour, linewidth=0.8, label=label)
        ax.axhline(bound, color="k", linestyle="--", linewidth=1, label=NAMES["bound"])
        ax.set(xlabel="update", title=f"{stage} channels, training")
    axes[0].set(ylabel="error (dB)")
    figures.legend_below(figure, 5)
    return figure


def _curves(workdir: Path, stage: str, name: str, config: ConfigDict) -> list[tuple[np.ndarray, np.ndarray]]:
    """(updates, losses) of every seed."""
    title = f"{stage}_{name}"
    titles = [title] if config.together else [f"{title}_{seed}" for seed in range(config.num_seeds[stage])]
    found = []
    for each in titles:
        lines: list[dict[str, Any]] = [line for line in read_metrics(workdir, each) if "train/loss" in line]
        steps = np.array([line["step"] for line in lines])
        losses = np.array([np.atleast_1d(line["train/loss"]) for line in lines])
        found += [(steps, row) for row in losses.T]
    return found


def draw_slot(model: nn.Module, params: Any, tests: tdl.Batch, linear: Linear, config: ConfigDict) -> Figure:
    """|h| of a test slot (10 dB, 200 ns, 500 Hz), its estimates by the first seed and in closed form, their errors."""
    point = SWEEPS["snr"].index((10, 200, 500))
    ls, h, conditions = (np.asarray(part[point, 0, :1]) for part in (tests.ls, tests.h, tests.conditions))
    grid, pilots = grid_of(config), pilots_of(config)
    size = (grid.num_subcarriers, grid.num_symbols)
    first = jax.tree.map(lambda leaf: leaf[0], params)
    estimates = {
        NAMES["bilinear"]: apply_linear(linear.bilinear, ls, size),
        NAMES["matched"]: apply_linear(linear.matched[point], ls, size),
        NAMES["adafortitran"]: jax.jit(model.apply)({"params": first}, ls, conditions),
    }
    figure, axes = figures.grid(2, 4, (9.0, 6.0), sharex=True, sharey=True)
    top = np.abs(h).max()
    image = _field(axes[0, 0], np.abs(h[0]), "channel |h|", 0, top, "viridis")
    axes[1, 0].plot(*np.meshgrid(pilots.columns, pilots.rows), "s", color=figures.BLUE, markersize=4)
    axes[1, 0].set(title="pilots")
    for column, (name, estimate) in enumerate(estimates.items(), 1):
        _field(axes[0, column], np.abs(estimate[0]), name, 0, top, "viridis")
        error = decibels(np.square(np.abs(h[0] - estimate[0])) + 1e-12)
        mean = decibels(np.mean(np.square(np.abs(h[0] - estimate[0]))))
        errors = _field(axes[1, column], error, f"error, mean {mean:.1f} dB", -40, 0, "magma")
    for ax in axes[1]:
        ax.set(xlabel="symbol")
    for ax in axes[:, 0]:
        ax.set(ylabel="subcarrier")
    figure.colorbar(image, ax=axes[0], label="|h|", shrink=0.8)
    figure.colorbar(errors, ax=axes[1], label="dB", shrink=0.8)
    return figure


def _field(ax: Axes, values: np.ndarray, title: str, low: float, high: float, colours: str) -> Any:
    ax.set(title=title)
    return ax.imshow(values, origin="lower", aspect="auto", vmin=low, vmax=high, cmap=colours)
