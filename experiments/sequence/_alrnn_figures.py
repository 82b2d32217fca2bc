"""AL-RNN's experiment, second part: its figures."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

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
        figures.orbit_by_symbol(
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


def draw_graphs(studies: Mapping[str, Study]) -> Figure:
    """Transition graphs of the symbols of the best minimal models (Sec. 3)."""
    figure, axes = figures.panels(len(studies), width=3.9, height=3.9)
    for study, ax in zip(studies.values(), axes, strict=True):
        num_pwl = MINIMAL_P[study.name]
        code = alrnn.symbolic_code(study.orbits[study.best(num_pwl)], num_pwl)
        counts = alrnn.transition_counts(code.symbols, len(code.counts))
        figures.transition_graph(ax, counts, [region_name(bits) for bits in code.bits])
        ax.set_title(f"{TITLES[study.name]}, P = {num_pwl}")
    return figure


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
        figures.spectra(
            ax,
            frequencies[shown],
            {name: curve[shown] for name, curve in curves.items()},
            xlabel=f"frequency ({unit})",
        )
        ax.set_title(f"{TITLES[study.name]}, D_H {study.scores['d_h'][row]:.2f}")
    return figure


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
