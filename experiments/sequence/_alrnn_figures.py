"""AL-RNN's experiment, second part: its figures."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from experiments import figures
from experiments.sequence._alrnn_study import MINIMAL_P, Study, region_name
from jaxpapers.ops.dsr_metrics import smoothed_power_spectrum
from jaxpapers.sequence import alrnn
from jaxpapers.train import member

TITLES = {
    "lorenz63": "Lorenz-63",
    "rossler": "Rössler",
    "ecg": "ECG",
    "fmri": "fMRI",
    "eeg": "EEG",
    "lorenz96": "Lorenz-96",
}
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}  # behind text that stands on a line
VIEWS = {"lorenz63": (0, 2, "x", "z"), "rossler": (0, 1, "x", "y")}  # axes and names of the classical pictures


def draw_attractors(studies: Mapping[str, Study]) -> Figure:
    """Free runs of the best minimal models, coloured by region, with their real fixed points (Figs. 4, 5)."""
    chosen = [studies[name] for name in VIEWS if name in studies]
    figure, axes = figures.panels(len(chosen), width=3.9, height=3.6)
    for study, ax in zip(chosen, axes, strict=True):
        first, second, *labels = VIEWS[study.name]
        num_pwl = MINIMAL_P[study.name]
        row = study.best(num_pwl)
        points = alrnn.fixed_points(member(study.params, row), num_pwl)
        code = alrnn.symbolic_code(study.orbits[row], num_pwl)
        orbit_by_symbol(
            ax,
            study.orbits[row][:, [first, second]],
            code.symbols,
            labels=(f"{labels[0]} (standardised)", f"{labels[1]} (standardised)"),
            names=[f"region {region_name(bits)}" for bits in code.bits],
            points=points.points[points.real][:, [first, second]],
            reference=study.series[:20_000, [first, second]],
        )
        ax.set_title(
            f"{TITLES[study.name]}, P = {num_pwl}: {len(code.counts)} regions, D_stsp {study.scores['d_stsp'][row]:.2f}"
        )
    return figure


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
        colour = figures.COLOURS[symbol % len(figures.COLOURS)]
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


def draw_graphs(studies: Mapping[str, Study]) -> Figure:
    """Transition graphs of the symbols of the best minimal models (Sec. 3)."""
    figure, axes = figures.panels(len(studies), width=3.9, height=3.9)
    for study, ax in zip(studies.values(), axes, strict=True):
        num_pwl = MINIMAL_P[study.name]
        code = alrnn.symbolic_code(study.orbits[study.best(num_pwl)], num_pwl)
        counts = alrnn.transition_counts(code.symbols, len(code.counts))
        transition_graph(ax, counts, [region_name(bits) for bits in code.bits])
        ax.set_title(f"{TITLES[study.name]}, P = {num_pwl}")
    return figure


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
            color=figures.COLOURS[source % len(figures.COLOURS)],
        )
        axes.add_patch(arrow)
        # The label stands where arc3 with this rad has its middle, a little to the right of the chord.
        step = places[target] - places[source]
        middle = (places[source] + places[target]) / 2 + 0.14 * np.array([step[1], -step[0]])
        axes.text(*middle, f"{probabilities[source, target]:.1%}", ha="center", va="center", fontsize=8, bbox=LABEL)
    share = visits / visits.sum()
    for index, (place, name) in enumerate(zip(places, names, strict=True)):
        axes.scatter(*place, s=500 + 900 * share[index], color=figures.COLOURS[index % len(figures.COLOURS)], zorder=3)
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


def draw_sweeps(studies: Mapping[str, Study]) -> Figure:
    """D_stsp against P (Fig. 3)."""
    figure, axes = figures.panels(len(studies))
    for study, ax in zip(studies.values(), axes, strict=True):
        values = {p: study.scores["d_stsp"][study.population.num_pwl == p] for p in study.recipe.num_pwl}
        names = {p: f"{p}\n(PLRNN)" if p == study.recipe.latent_dim else str(p) for p in values}
        figures.sweep(
            ax,
            {names[p]: seeds for p, seeds in values.items()},
            xlabel="number P of ReLU units",
            ylabel="D_stsp (nats)",
        )
        ax.set_title(f"{TITLES[study.name]}, {len(np.unique(study.population.seed))} seeds")
    return figure


def draw_spectra(studies: Mapping[str, Study]) -> Figure:
    """Smoothed power spectra of the first observable, data against the best minimal model (D_H)."""
    figure, axes = figures.panels(len(studies))
    for study, ax in zip(studies.values(), axes, strict=True):
        num_pwl = MINIMAL_P[study.name]
        row = study.best(num_pwl)
        orbit = study.orbits[row][:, :1]
        pair = {"data": study.series[: len(orbit), :1], f"P = {num_pwl}": orbit}
        curves = {
            name: np.asarray(smoothed_power_spectrum(x, study.recipe.smoothing))[:, 0] for name, x in pair.items()
        }
        frequencies = np.fft.rfftfreq(len(orbit), study.recipe.dt)
        shown = frequencies < 0.1 / study.recipe.dt
        unit = "1 / row" if study.recipe.dt == 1 else "1 / time unit"
        spectra(
            ax,
            frequencies[shown],
            {name: curve[shown] for name, curve in curves.items()},
            xlabel=f"frequency ({unit})",
        )
        ax.set_title(f"{TITLES[study.name]}, D_H {study.scores['d_h'][row]:.2f}")
    return figure


def spectra(axes: Axes, frequencies: np.ndarray, curves: Mapping[str, np.ndarray], *, xlabel: str) -> None:
    """Power spectra on a logarithmic scale, the first curve (the data) in grey.

    Args:
      axes: where to draw.
      frequencies: (frequencies,).
      curves: name -> (frequencies,).
      xlabel: name and unit of the frequency.
    """
    for index, (name, power) in enumerate(curves.items()):
        colour, width = (figures.COLOURS[index - 1], 1.0) if index else (figures.GREY, 2.5)
        axes.semilogy(frequencies, np.maximum(power, 1e-12), label=name, color=colour, linewidth=width)
    axes.set(xlabel=xlabel, ylabel="power (share)")
    axes.legend(fontsize=8)


def draw_signal(study: Study) -> Figure:
    """A recorded signal and a free run of the best minimal model, both without the run's transient."""
    num_pwl = MINIMAL_P[study.name]
    reset = study.recipe.reset
    run = f"readouts reset every {reset} rows" if reset else "free run"
    row = study.best(num_pwl)
    figure, (ax,) = figures.panels(1, width=7.0, height=2.6)
    orbit = study.orbits[row][:, 0]
    data = study.series[: len(orbit) + study.transient, 0][study.transient :]
    rows = study.transient + np.arange(len(orbit))
    shown = slice(min(1000, len(data)))
    ax.plot(rows[shown], data[shown], color=figures.GREY, label="data")
    ax.plot(rows[shown], orbit[shown], color=figures.COLOURS[0], linewidth=1, label=f"{run}, P = {num_pwl}")
    ax.set(xlabel="row", ylabel="first observable")
    ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncol=2)
    figure.suptitle(f"{TITLES[study.name]}, D_stsp {study.scores['d_stsp'][row]:.2f}", fontsize=10)
    return figure


def draw_slopes(study: Study) -> Figure:
    """Units that stay nonlinear, and the quality, against the penalty on the slopes (appendix)."""
    penalties = np.unique(study.population.lambda_lin)
    figure, axes = figures.panels(2)
    for ax, measure, label in zip(
        axes, ("nonlinear", "d_stsp"), ("units with |1 - s| > 0.1", "D_stsp (nats)"), strict=True
    ):
        values = {f"{p:g}": study.scores[measure][study.population.lambda_lin == p] for p in penalties}
        figures.sweep(ax, values, xlabel="penalty on the slopes, lambda_lin", ylabel=label)
    figure.suptitle(f"{TITLES[study.name]}: trained slopes", fontsize=10)
    return figure
