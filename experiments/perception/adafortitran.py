"""AdaFortiTran: channel estimation in OFDM by a transformer that is told SNR, delay spread and Doppler shift.

Reproduces the three sweeps with all rivals, the robustness over the Doppler shift, the effect of depth,
and the limits of bilinear interpolation and LMMSE, which are closed forms.

The paper's data are "fixed" realisations: their generator draws the same channel again for the same delay spread and
Doppler shift, so that training and test share 240 channels and differ in noise alone. What lies below the Bayes bound
there is memory. Beside every result on such data stand the bound and the same table on "fresh" channels, on which no
estimator can be below it.

Reported without a claim: models of fresh TDL-A channels on TDL-B and TDL-C (`mismatch`), and other densities of pilots
(`density`, which train models of their own). Left out, as the card has it: the little interference between subcarriers
of the MATLAB generator at high Doppler shifts.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.catalogue import require
from experiments.harness import Claim, Metrics, Paper, Run
from experiments.perception._adafortitran_figures import (
    draw_closed_forms,
    draw_curves,
    draw_slot,
    draw_sweeps,
    name_of,
    table,
)
from experiments.perception._adafortitran_scores import (
    CHECKED,
    CLOSED,
    POINTS,
    SWEEPS,
    Linear,
    analyse_closed_forms,
    decibels,
    draw_tests,
    linear_estimators,
    rows_of,
    score_linear,
    score_model,
)
from experiments.perception._adafortitran_training import (
    STAGES,
    bank_of,
    empty_bank,
    set_up,
    train,
)
from jaxpapers.data import tdl
from jaxpapers.train import abstract, abstractly, state_shardings, update_program

PAPER = Paper(
    title="AdaFortiTran: An Adaptive Transformer Model for Robust OFDM Channel Estimation",
    authors="B. Guler, H. Jafarkhani",
    year=2025,
    arxiv="2505.09076",
    code="BerkIGuler/AdaFortiTran",
)
COVER = "sweeps"
RIVALS = ("fortitran", "cevit", "sisrafnet", "linear")
MODELS = ("adafortitran", *RIVALS)


def get_config(preset: str = "small") -> ConfigDict:
    """Settings of a preset.

    Args:
      preset: "smoke", "small" or "paper".
    """
    config: dict[str, Any] = {
        "seed": 0,
        "num_seeds": 2,
        "bank_seed": 1,
        "test_seed": 2,
        "together": True,  # all seeds of a model in one population; False: one by one, batches split over the mesh
        "snr_reference": "grid",
        "test_slots": 400,  # a point
        "test_chunk": 100,
        "sample_slots": 4_000,  # from which the sample LMMSE is fitted
        "grid": {"subcarriers": 24, "spacing": 3, "columns": (2, 11), "sinusoids": 32},
        "conditions": {
            "snrs_db": tuple(range(0, 30, 5)),
            "delay_spreads_ns": tuple(range(25, 325, 25)),
            "dopplers_hz": tuple(range(50, 1050, 50)),
        },
        "model": {
            "patch": (3, 2),
            "width": 32,
            "num_heads": 4,
            "dropout": 0.1,
            "adapter": (7, 42),  # hidden sizes
            "remat": False,
            "cevit_patch": (8, 4),  # (10, 4) does not divide 24 subcarriers
            "cevit_width": 128,
            "sisrafnet_channels": 16,
            "sisrafnet_width": 64,
        },
        "layers": {"adafortitran": 3, "adafortitran_s": 1, "fortitran": 3},
        "training": {
            "batch_size": 16,
            "updates": 4_000,
            "rate": 1e-3,
            "last_rate": 2e-5,
            "schedule": "cosine_decay_schedule",
            "updates_per_call": 50,
            "log_every": 50,
            "slots": 0,  # of the training set; 0: no set, all slots are new
            "validation_slots": 0,
            "validation_chunk": 1,
            "patience": 0,  # epochs
        },
        "stages": {"fixed": (*MODELS, "adafortitran_s"), "fresh": MODELS},
        "closed_forms": {"subcarriers": 120, "slots": 2_000, "chunk": 200},
        "mismatch": ("TDL-B", "TDL-C"),  # profiles that the models of "fresh" channels are tested on, too
        "density": {"spacings": (), "models": ("adafortitran", "fortitran")},  # other pilot rows, one in so many
    }
    match preset:
        case "smoke":
            config |= {"num_seeds": 1, "test_slots": 4, "test_chunk": 4, "sample_slots": 20}
            config["grid"] |= {"subcarriers": 12, "sinusoids": 4}
            config["model"] |= {"width": 8, "num_heads": 2, "cevit_patch": (6, 4), "cevit_width": 8}
            config["model"] |= {"sisrafnet_channels": 4, "sisrafnet_width": 8}
            config["layers"] |= {"adafortitran": 2, "fortitran": 2}
            config["training"] |= {"batch_size": 4, "updates": 4, "updates_per_call": 2, "log_every": 2}
            config["stages"] |= {"fresh": ("adafortitran", "linear")}
            config["closed_forms"] |= {"subcarriers": 12, "slots": 8, "chunk": 8}
            config |= {"mismatch": ("TDL-B",)}
            config["density"] |= {"spacings": (6,), "models": ("adafortitran",)}
        case "small":
            pass  # the settings above
        case "paper":
            config |= {"together": False, "num_seeds": 1, "test_slots": 2_000, "test_chunk": 200}
            config |= {"sample_slots": 20_000}
            config["grid"] |= {"subcarriers": 120}
            config["model"] |= {"cevit_patch": (10, 4)}
            config["layers"] |= {"adafortitran": 6, "adafortitran_m": 3, "adafortitran_xl": 12}
            config["density"] |= {"spacings": (4, 5, 6, 8)}
            slots, batch_size, epochs = 100_000, 512, 1_000
            epoch = slots // batch_size
            config["training"] |= {"slots": slots, "batch_size": batch_size, "updates": epochs * epoch, "patience": 15}
            config["training"] |= {"schedule": "exponential_decay", "last_rate": 1e-3 * 0.995**epochs}
            config["training"] |= {"updates_per_call": 39, "log_every": epoch}
            config["training"] |= {"validation_slots": 10_000, "validation_chunk": 400}
            config["stages"] |= {"fixed": (*MODELS, "adafortitran_s", "adafortitran_m", "adafortitran_xl")}
        case _:
            raise ValueError(f"preset must be smoke, small or paper, got {preset!r}")
    return ConfigDict(config)


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot be trained, before anything is.

    Raises:
      UsageError: the field with its value, and what it takes.
    """
    for field in ("num_seeds", "test_slots", "test_chunk", "sample_slots"):
        require(config[field] >= 1, field, config[field], "at least 1")
    for name, chunk in (("test_slots", config.test_chunk),):
        require(config[name] % chunk == 0, name, config[name], f"a multiple of {chunk}")
    references = tdl.SNR_REFERENCES
    require(config.snr_reference in references, "snr_reference", config.snr_reference, f"one of {references}")
    for name in config.conditions:
        values = config.conditions[name]
        low = -np.inf if name == "snrs_db" else 0
        require(
            len(values) and min(values) >= low, f"conditions.{name}", values, "some numbers, spreads and shifts >= 0"
        )
    _check_points(config)
    _check_networks(config)
    recipe = config.training
    for field in ("batch_size", "updates", "updates_per_call"):
        require(recipe[field] >= 1, f"training.{field}", recipe[field], "at least 1")
    require(recipe.rate > 0, "training.rate", recipe.rate, "above 0")
    require(recipe.slots >= 0, "training.slots", recipe.slots, "at least 0 (0: every slot is new)")
    if not config.together:
        chunk = recipe.validation_chunk
        fits = recipe.validation_slots >= chunk >= 1 and recipe.validation_slots % chunk == 0
        require(fits, "training.validation_slots", recipe.validation_slots, f"a multiple of validation_chunk={chunk}")
        require(recipe.patience >= 1, "training.patience", recipe.patience, "at least 1")
    unknown = set(config.mismatch) - set(tdl.TABLES)
    require(not unknown, "mismatch", config.mismatch, f"some of {tuple(tdl.TABLES)}")
    for spacing in config.density.spacings:
        fits = spacing >= 1 and config.grid.subcarriers % spacing == 0 and config.grid.subcarriers >= 2 * spacing
        expected = f"divisors of subcarriers={config.grid.subcarriers}, at most half of it"
        require(fits, "density.spacings", config.density.spacings, expected)
    closed = config.closed_forms
    multiple = closed.chunk >= 1 and closed.slots >= 1 and closed.slots % closed.chunk == 0
    require(multiple, "closed_forms.slots", closed.slots, f"a multiple of chunk={closed.chunk}")


def _check_points(config: ConfigDict) -> None:
    """The bank has every test point."""
    for index, name in ((1, "delay_spreads_ns"), (2, "dopplers_hz")):
        values = config.conditions[name]
        missing = set(POINTS[:, index].tolist()) - set(map(float, values))
        require(not missing, f"conditions.{name}", values, f"a list with {sorted(missing)}, which the tests need")


def _check_networks(config: ConfigDict) -> None:
    recipe, grid = config.model, config.grid
    patch = recipe.patch
    known = (*config.layers, *RIVALS)
    require(set(config.stages) <= set(STAGES), "stages", tuple(config.stages), f"some of {STAGES}")
    unknown = set(config.density.models) - set(known)
    require(not unknown, "density.models", config.density.models, f"some of {known}")
    for stage in config.stages:
        unknown = set(config.stages[stage]) - set(known)
        require(not unknown, f"stages.{stage}", config.stages[stage], f"some of {known}")
    for name in config.layers:
        require(config.layers[name] >= 1, f"layers.{name}", config.layers[name], "at least 1")
        named = name == "fortitran" or name.startswith("adafortitran")
        require(named, "layers", name, "fortitran, adafortitran or adafortitran_<suffix>")
    for width, (rows, columns), field in ((14, patch, "patch"), (28, recipe.cevit_patch, "cevit_patch")):
        fits = min(rows, columns) >= 1 and grid.subcarriers % rows == 0 and width % columns == 0
        size = (grid.subcarriers, width)
        require(fits, f"model.{field}", recipe[field], f"a divisor of {size}, entry by entry")
    fits = grid.spacing >= 1 and grid.subcarriers % grid.spacing == 0 and grid.subcarriers >= 2 * grid.spacing
    require(fits, "grid.subcarriers", grid.subcarriers, f"a multiple of spacing={grid.spacing}, at least twice it")
    columns = list(grid.columns)
    within = len(columns) >= 2 and columns == sorted(set(columns)) and columns[0] >= 0 and columns[-1] < 14
    require(within, "grid.columns", grid.columns, "at least two ascending symbols of 0 to 13")
    for width in ("width", "cevit_width"):
        divides = recipe[width] >= 1 and recipe[width] % recipe.num_heads == 0
        require(divides, f"model.{width}", recipe[width], f"a multiple of num_heads={recipe.num_heads}")
    require(0 <= recipe.dropout < 1, "model.dropout", recipe.dropout, "in [0, 1)")


def programs(config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """The jitted programs of the training on a mesh and their abstract arguments: `name -> (function, arguments)`."""
    check_config(config)
    whole = NamedSharding(mesh, PartitionSpec())
    bank = empty_bank(config)
    jitted: dict[str, tuple[Callable, tuple]] = {}
    for stage in config.stages:
        for name in config.stages[stage]:
            setup = set_up(stage, name, None if config.together else 0, bank, config, abstractly)
            shardings = state_shardings(setup.state, mesh)
            calls = config.training.updates_per_call
            updates = update_program(setup.train_step, setup.batches, calls, shardings)
            jitted[f"{stage}/{name}/updates"] = (
                updates,
                (abstract(setup.state, shardings), abstract(setup.keys, whole)),
            )
    return jitted


def run(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Closed forms, training of all models, the sweeps, the figures; returns the numbers."""
    check_config(config)
    metrics = analyse_closed_forms(config)
    run.figure("closed_forms", draw_closed_forms(metrics))
    bank = bank_of(config)
    linear = linear_of(config)
    metrics |= {"points": POINTS, "bound/db": decibels(linear.errors["bound"])}
    metrics["bound/mean"] = metrics["bound/db"].mean()
    for stage in config.stages:
        tests = draw_tests(stage, bank, config)
        others = config.mismatch if stage == "fresh" else ()
        strange = {profile: draw_tests(stage, bank, config, profile) for profile in others}
        for profile, slots in strange.items():
            rows = score_linear(stage, linear_of(config, profile), slots, bank, config)
            metrics |= {f"mismatch/{profile}/{name}/mean": row.mean(axis=1) for name, row in rows.items()}
        scores = score_linear(stage, linear, tests, bank, config)
        for name in config.stages[stage]:
            run.say(f"{stage}: {name_of(name)}, {config.num_seeds} seeds, {config.training.updates:,} updates")
            model, params = train(stage, name, bank, config, run)
            metrics[f"parameters/{name}"] = sum(leaf[0].size for leaf in jax.tree.leaves(params))
            scores[name] = score_model(model, params, tests)
            for profile, slots in strange.items():
                metrics[f"mismatch/{profile}/{name}/mean"] = score_model(model, params, slots).mean(axis=1)
            if name == "adafortitran":
                run.figure(f"slot_{stage}", draw_slot(model, params, tests, linear, config))
        for name, rows in scores.items():
            metrics |= {f"{stage}/{name}/db": rows, f"{stage}/{name}/mean": rows.mean(axis=1)}
        text = table(stage, scores, metrics["bound/db"])
        run.say(text)
        run.file(f"{stage}.txt", text)
    metrics |= study_density(bank, config, run)
    run.figure("sweeps", draw_sweeps(metrics, config))
    run.figure("curves", draw_curves(run.workdir, config))
    return metrics


def linear_of(config: ConfigDict, profile: str = "TDL-A") -> Linear:
    """The closed forms of the models' own grid."""
    return linear_estimators(config.grid.subcarriers, config.snr_reference, config, profile)


def study_density(bank: tdl.ChannelBank, config: ConfigDict, run: Run) -> dict[str, Any]:
    """`density/<spacing>/<estimator>/db` of fixed channels at 5 dB, 200 ns, 500 Hz: one pilot row in so many."""
    point = SWEEPS["snr"].index((5, 200, 500))
    metrics: dict[str, Any] = {}
    for spacing in config.density.spacings:
        thinned = config.copy_and_resolve_references()
        thinned.grid.spacing = spacing
        linear = linear_of(thinned)
        metrics |= {f"density/{spacing}/{name}/db": decibels(row)[point] for name, row in linear.errors.items()}
        tests = draw_tests("fixed", bank, thinned)
        for name in config.density.models:
            run.say(f"one pilot row in {spacing}: {name_of(name)}")
            model, params = train("fixed", name, bank, thinned, run, f"density_{spacing}_{name}")
            metrics[f"density/{spacing}/{name}/db"] = score_model(model, params, tests)[:, point]
    return metrics


ROWS = (*RIVALS, "bilinear", "pooled", "sample")  # what the adaptive model is compared with


def _mean(metrics: Metrics, stage: str, name: str) -> float:
    """Of the 17 points' dB and the seeds."""
    return float(np.mean(metrics[f"{stage}/{name}/mean"]))


def _means_text(metrics: Metrics, stage: str, names: tuple[str, ...]) -> str:
    parts = []
    for name in names:
        seeds = np.atleast_1d(metrics[f"{stage}/{name}/mean"])
        each = f" ({', '.join(f'{value:.2f}' for value in seeds)})" if len(seeds) > 1 else ""
        parts.append(f"{name_of(name)} {_mean(metrics, stage, name):.2f}{each}")
    return ", ".join(parts)


def _adaptive_is_best(metrics: Metrics) -> bool:
    ours, rivals = _mean(metrics, "fixed", "adafortitran"), {name: _mean(metrics, "fixed", name) for name in ROWS}
    ahead = ours < min(rivals.values()) and ours <= rivals["fortitran"] - 0.5 and ours <= rivals["pooled"] - 1
    fresh = [_mean(metrics, "fresh", name) for name in ("adafortitran", *ROWS)]
    return bool(ahead and min(fresh) >= metrics["bound/mean"])


def _adaptive_text(metrics: Metrics) -> str:
    bound = f"bound {float(metrics['bound/mean']):.2f}"
    rows = (_means_text(metrics, stage, ("adafortitran", *ROWS)) for stage in STAGES)
    return "; ".join(f"{stage} ({bound}): {text}" for stage, text in zip(STAGES, rows, strict=True))


CARD = {"grid": (-11.87, -13.34, -14.88), "pilot": (-8.47, -12.21, -13.44)}  # of CLOSED, means over the 17 points


def _closed(metrics: Metrics, reference: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(metrics[f"closed/{reference}/{name}/db"], float) for name in CLOSED}


def _linear_limits(metrics: Metrics) -> bool:
    holds = []
    slow = SWEEPS["doppler"].index((10, 100, 200)) + rows_of("doppler").start
    for reference, card in CARD.items():
        rows = _closed(metrics, reference)
        for name in CLOSED:
            simulated = np.asarray(metrics[f"closed/{reference}/{name}/simulated"], float)
            holds.append(np.all(np.abs(simulated - rows[name][list(CHECKED)]) <= 0.3))
        holds.append(np.all(rows["bound"] <= rows["pooled"]))
        gain = rows["bilinear"] - rows["pooled"]
        others = np.delete(gain, slow) if reference == "grid" else gain
        holds.append(np.all(others > 0))
        if reference == "grid":
            holds.append(abs(gain[slow] + 2.1) <= 0.05)
        holds.append(np.all(np.abs(np.array([rows[name].mean() for name in CLOSED]) - card) <= 0.05))
    return bool(np.all(holds))


def _linear_text(metrics: Metrics) -> str:
    parts, worst = [], 0.0
    for reference in CARD:
        rows = _closed(metrics, reference)
        parts.append(f"{reference}: {', '.join(f'{name_of(name)} {rows[name].mean():.2f}' for name in CLOSED)}")
        for name in CLOSED:
            simulated = np.asarray(metrics[f"closed/{reference}/{name}/simulated"], float)
            worst = max(worst, float(np.abs(simulated - rows[name][list(CHECKED)]).max()))
    return f"{'; '.join(parts)}; simulations off by at most {worst:.2f} dB"


def _doppler(metrics: Metrics, name: str) -> np.ndarray:
    """(5,) dB of the Doppler sweep, mean of the seeds."""
    return np.asarray(metrics[f"fixed/{name}/db"], float)[:, rows_of("doppler")].mean(axis=0)


def _robust(metrics: Metrics) -> bool:
    ours, *others = (_doppler(metrics, name) for name in ("adafortitran", "fortitran", "pooled"))
    worst = all(ours.max() <= other.max() - 1 for other in others)
    return bool(worst and all(np.ptp(ours) < np.ptp(other) for other in others))


def _robust_text(metrics: Metrics) -> str:
    parts = []
    for name in ("adafortitran", "fortitran", "pooled"):
        row = _doppler(metrics, name)
        parts.append(f"{name_of(name)} worst {row.max():.2f}, spread {np.ptp(row):.2f}")
    high = np.asarray(metrics["fixed/adafortitran/db"], float)[:, rows_of("snr")][:, -1].mean()
    bound = np.asarray(metrics["bound/db"], float)
    limits = f"bound {bound[rows_of('doppler')].max():.2f} there, {bound[rows_of('snr')][-1]:.2f} at 25 dB"
    return f"{'; '.join(parts)}; AdaFortiTran at 25 dB {high:.2f}; {limits}"


def _deeper_is_no_worse(metrics: Metrics) -> bool:
    return _mean(metrics, "fixed", "adafortitran") <= _mean(metrics, "fixed", "adafortitran_s") + 0.1


def _depth_text(metrics: Metrics) -> str:
    text = _means_text(metrics, "fixed", ("adafortitran", "adafortitran_s"))
    counts = (f"{metrics[f'parameters/{name}']:,}" for name in ("adafortitran", "adafortitran_s"))
    return f"{text}; {' and '.join(counts)} parameters; bound {float(metrics['bound/mean']):.2f}"


CLAIMS = (
    Claim(
        "adaptive",
        "the three sweeps",
        "fixed channels, the same budget: the mean of the 17 points' dB is the lowest of all, at least 0.5 dB below "
        "FortiTran's and 1 dB below that of the pooled LMMSE; on fresh channels nothing is below the bound",
        "lowest in all three sweeps",
        _adaptive_text,
        _adaptive_is_best,
    ),
    Claim(
        "linear_limits",
        "the three sweeps",
        "closed forms at K = 120: simulated errors within 0.3 dB; bound <= pooled LMMSE; the pooled LMMSE beats "
        "bilinear interpolation but at 200 Hz with the SNR of the grid (2.1 dB worse there); means over the 17 points "
        "-11.87, -13.34, -14.88 (SNR of the grid) and -8.47, -12.21, -13.44 dB (of the pilots), +-0.05",
        "LS is the worst, LMMSE is limited in mixed conditions",
        _linear_text,
        _linear_limits,
    ),
    Claim(
        "doppler",
        "Doppler sweep",
        "fixed channels: AdaFortiTran's worst point of the Doppler sweep is at least 1 dB below that of FortiTran and "
        "of the pooled LMMSE, and its range over the sweep is smaller than theirs",
        "-27 dB up to 800 Hz, -16.6 at 1000; -30 at 25 dB",
        _robust_text,
        _robust,
    ),
    Claim(
        "depth",
        "model sizes",
        "fixed channels: three layers are not worse than one by more than 0.1 dB, mean over points and seeds",
        "deeper is better (1, 3, 6, 12 layers)",
        _depth_text,
        _deeper_is_no_worse,
    ),
)
