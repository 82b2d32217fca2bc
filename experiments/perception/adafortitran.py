"""AdaFortiTran: channel estimation in OFDM by a transformer that is told SNR, delay spread and Doppler shift.

Reproduces the three sweeps with all rivals, the robustness over the Doppler shift, the effect of depth,
and the limits of bilinear interpolation and LMMSE, which are closed forms.

The paper's data are "fixed" realisations: their generator draws the same channel again for the same delay spread and
Doppler shift, so that training and test share 240 channels and differ in noise alone. These happen to be easier than
most: the matched LMMSE, which has no memory, reaches -18.9 dB on them, 4.3 below its mean over all channels (the
bound). What lies below the matched LMMSE on the same slots is memory: AdaFortiTran at about every second point of the
other two sweeps, by 6 dB at 1000 Hz, and at none of the SNR sweep. Beside every result on such data stand the bound and
the same table on "fresh" channels, on which no estimator can be below it.

`small` takes 9 minutes on 2 CPU cores (half as long again on slow ones). There, a batch has 5 slots, which leaves time
for 4,000 updates, and the conditions are standardised before AdaFortiTran and CE-ViT see them. The authors give them
raw, up to 1000, as `paper` does: then the adapter is of use after 2,000 updates of 16 slots, and after 4,000 of 6
hardly so. On fresh channels models have one seed and 1,000 updates: they are reported beside the claims, which are of
fixed channels, and are far from what they could reach. Other densities are left to `paper`. Its updates need 1.3 GiB a
chip on v5e:4x4, 8.2 with 12 layers; to compile one takes two minutes.

The first claim holds by its budget: AdaFortiTran is 0.82 dB below FortiTran here (0.69 in a run whose sums had another
order), but 0.23 dB after 4,000 updates of 4 slots, and 0.48 dB after 3,500 of 5. Seeds differ by as much, and with one
of the two CE-ViT is ahead; the more training, the larger the gap.

The claim on the Doppler sweep fails in its second half: AdaFortiTran's worst point is far below FortiTran's (-10.7
against -7.1 dB in a run of this size), but its range is larger (14.5 against 13.1 dB), because it gains most at 200 Hz,
the easiest point. All models are still learning the channels by heart when they end; the paper's have up to 1,000
epochs of 100,000 slots for that. CE-ViT, which is told the conditions as well, is close behind AdaFortiTran.

Reported without a claim: models of fresh TDL-A channels on TDL-B and TDL-C (`mismatch`), and other densities of pilots
(`density`, which train models of their own). Reached by a field alone: fixed channels that share their phases, as those
of objects with one seed strictly do (`shared_phases`), another first pilot row (`grid.offset`). Left out is the
little interference between subcarriers of the MATLAB generator at high Doppler shifts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.catalogue import require
from experiments.claims import mean, mean_and_each, measured
from experiments.harness import Claim, Metrics, Paper, Run
from experiments.perception._adafortitran_figures import (
    comparison,
    density_table,
    draw_closed_forms,
    draw_curves,
    draw_density,
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
    chunk_of,
    decibels,
    draw_tests,
    errors_program,
    fit_sample,
    linear_estimators,
    on_profile,
    rows_of,
    score_linear,
    score_model,
    slots_program,
    training_bound,
)
from experiments.perception._adafortitran_training import (
    OTHERS,
    STAGES,
    bank_of,
    empty_bank,
    epoch_length,
    grid_of,
    set_up,
    train,
    validation_program,
)
from jaxpapers.data import tdl
from jaxpapers.perception.adafortitran import CEViT, FortiTran
from jaxpapers.train import abstract, abstractly, state_shardings, update_program

PAPER = Paper(
    title="AdaFortiTran: An Adaptive Transformer Model for Robust OFDM Channel Estimation",
    authors="B. Guler, H. Jafarkhani",
    year=2025,
    arxiv="2505.09076",
    code="BerkIGuler/AdaFortiTran",
)
COVER = "sweeps"
RIVALS = ("fortitran", *OTHERS)
MODELS = ("adafortitran", *RIVALS)


def get_config(preset: str = "small") -> ConfigDict:
    """Settings of a preset.

    Args:
      preset: "smoke", "small" or "paper".
    """
    config: dict[str, Any] = {
        "seed": 0,
        "num_seeds": {"fixed": 2, "fresh": 1},
        "bank_seed": 1,
        "shared_phases": False,  # of the bank's channels: False: they are independent; True: smooth in the conditions
        "test_seed": 2,
        "together": True,  # all seeds of a model in one population; False: one by one, each stopped early
        "snr_reference": "grid",
        "test_slots": 400,  # a point
        "test_chunk": 100,
        "sample_slots": 4_000,  # from which the sample LMMSE is fitted, test_chunk of them at a time
        "grid": {"subcarriers": 24, "spacing": 3, "offset": -1, "columns": (2, 11), "sinusoids": 32},  # -1: symmetric
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
            "standardise": True,  # the conditions, before the adapters of AdaFortiTran and CE-ViT
            "dtype": "float32",  # of the encoders; CNNs and sums stay in float32
            "remat": False,
            "cevit_patch": (8, 4),  # (10, 4) does not divide 24 subcarriers
            "cevit_width": 128,
            "sisrafnet_channels": 16,
            "sisrafnet_width": 64,
        },
        "layers": {"adafortitran": 3, "adafortitran_s": 1, "fortitran": 3},
        "training": {
            "batch_size": 5,
            "updates": {"fixed": 4_000, "fresh": 1_000, "density": 500},
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
        # profiles that the models of "fresh" channels are tested on, too, and slots a point
        "mismatch": {"profiles": ("TDL-B", "TDL-C"), "slots": 100},
        "density": {"spacings": (), "models": ("adafortitran", "fortitran")},  # other pilot rows, one in so many
    }
    match preset:
        case "smoke":
            config |= {"num_seeds": {"fixed": 1, "fresh": 1}, "test_slots": 4, "test_chunk": 4, "sample_slots": 20}
            config["grid"] |= {"subcarriers": 12, "sinusoids": 4}
            config["model"] |= {"width": 8, "num_heads": 2, "cevit_patch": (6, 4), "cevit_width": 8}
            config["model"] |= {"sisrafnet_channels": 4, "sisrafnet_width": 8}
            config["layers"] |= {"adafortitran": 1, "fortitran": 1}
            config["training"] |= {"batch_size": 8, "updates_per_call": 2, "log_every": 2}
            config["training"] |= {"updates": {"fixed": 4, "fresh": 4, "density": 4}}
            config["stages"] |= {"fixed": ("adafortitran", "cevit", "linear"), "fresh": ("linear",)}
            config["closed_forms"] |= {"subcarriers": 12, "slots": 8, "chunk": 8}
            config |= {"mismatch": {"profiles": ("TDL-B",), "slots": 4}}
            config["density"] |= {"spacings": (6,), "models": ("linear",)}
        case "small":
            pass  # the settings above
        case "paper":
            config |= {"together": False, "num_seeds": {"fixed": 1, "fresh": 1}, "test_slots": 2_000, "test_chunk": 200}
            config |= {"sample_slots": 20_000}
            config["mismatch"] |= {"slots": 2_000}
            config["grid"] |= {"subcarriers": 120}
            config["model"] |= {"cevit_patch": (10, 4), "standardise": False}
            config["layers"] |= {"adafortitran": 6, "adafortitran_m": 3, "adafortitran_xl": 12}
            config["density"] |= {"spacings": (4, 5, 6, 8)}
            slots, batch_size, epochs = 100_000, 512, 1_000
            epoch = slots // batch_size
            config["training"] |= {"slots": slots, "batch_size": batch_size, "patience": 15}
            config["training"] |= {"updates": dict.fromkeys(("fixed", "fresh", "density"), epochs * epoch)}
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
    for stage in STAGES:
        require(config.num_seeds[stage] >= 1, f"num_seeds.{stage}", config.num_seeds[stage], "at least 1")
    require(config.test_chunk >= 1, "test_chunk", config.test_chunk, "at least 1")
    chunk, mismatch = config.test_chunk, config.mismatch
    slots = {"test_slots": config.test_slots, "sample_slots": config.sample_slots, "mismatch.slots": mismatch.slots}
    for field, count in slots.items():
        require(count >= 1 and count % chunk == 0, field, count, f"a multiple of test_chunk={chunk}")
    references = tdl.SNR_REFERENCES
    require(config.snr_reference in references, "snr_reference", config.snr_reference, f"one of {references}")
    _check_conditions(config)
    _check_networks(config)
    _check_training(config)
    unknown = set(mismatch.profiles) - set(tdl.TABLES)
    require(not unknown, "mismatch.profiles", mismatch.profiles, f"some of {tuple(tdl.TABLES)}")
    for spacing in config.density.spacings:
        fits = spacing >= 1 and config.grid.subcarriers % spacing == 0 and config.grid.subcarriers >= 2 * spacing
        fits = fits and spacing != config.grid.spacing
        expected = f"divisors of subcarriers={config.grid.subcarriers}, at most half of it, and not grid.spacing"
        require(fits, "density.spacings", config.density.spacings, expected)
    offset, spacings = config.grid.offset, (config.grid.spacing, *config.density.spacings)
    within = -1 <= offset < min(spacings)
    require(within, "grid.offset", offset, f"-1 (symmetric) or a row before the spacing {min(spacings)}")
    require(config.grid.sinusoids >= 1, "grid.sinusoids", config.grid.sinusoids, "at least 1")
    closed = config.closed_forms
    multiple = closed.chunk >= 1 and closed.slots >= 1 and closed.slots % closed.chunk == 0
    require(multiple, "closed_forms.slots", closed.slots, f"a multiple of chunk={closed.chunk}")
    least = 2 * config.grid.spacing
    require(closed.subcarriers >= least, "closed_forms.subcarriers", closed.subcarriers, f"two rows of pilots: {least}")


def _check_conditions(config: ConfigDict) -> None:
    """They can be simulated, and the bank has every test point."""
    for name in config.conditions:
        values = config.conditions[name]
        low = -np.inf if name == "snrs_db" else 0
        require(
            len(values) and min(values) >= low, f"conditions.{name}", values, "some numbers, spreads and shifts >= 0"
        )
    shifts, limit = config.conditions.dopplers_hz, tdl.doppler_limit(grid_of(config))
    require(max(shifts) < limit, "conditions.dopplers_hz", shifts, f"below {limit:.0f}, for the closed forms")
    for index, name in ((1, "delay_spreads_ns"), (2, "dopplers_hz")):
        values = config.conditions[name]
        missing = set(POINTS[:, index].tolist()) - set(map(float, values))
        require(not missing, f"conditions.{name}", values, f"a list with {sorted(missing)}, which the tests need")


def _check_training(config: ConfigDict) -> None:
    recipe = config.training
    for field in ("batch_size", "updates_per_call", "log_every"):
        require(recipe[field] >= 1, f"training.{field}", recipe[field], "at least 1")
    for stage, updates in recipe.updates.items():
        require(updates >= 1, f"training.updates.{stage}", updates, "at least 1")
    require(recipe.rate > 0, "training.rate", recipe.rate, "above 0")
    decays = recipe.last_rate > 0 or (recipe.last_rate == 0 and recipe.schedule != "exponential_decay")
    require(decays, "training.last_rate", recipe.last_rate, "above 0, or 0 where the schedule is no exponential_decay")
    enough = recipe.slots == 0 or recipe.slots >= recipe.batch_size
    require(enough, "training.slots", recipe.slots, "0 (every slot is new) or at least training.batch_size")

    def can_stop(every: int) -> bool:
        """Whether calls of `updates_per_call` end after so many updates, or none has to."""
        return every % recipe.updates_per_call == 0 or every >= max(recipe.updates.values())

    called = f"a multiple of updates_per_call={recipe.updates_per_call}"
    require(can_stop(recipe.log_every), "training.log_every", recipe.log_every, f"{called}, or as many as all updates")
    if config.together:
        return
    chunk, epoch = recipe.validation_chunk, epoch_length(config)
    fits = recipe.validation_slots >= chunk >= 1 and recipe.validation_slots % chunk == 0
    require(fits, "training.validation_slots", recipe.validation_slots, f"a multiple of validation_chunk={chunk}")
    require(recipe.patience >= 1, "training.patience", recipe.patience, "at least 1")
    require(can_stop(epoch), "training.slots", recipe.slots, f"such that its epochs ({epoch} updates) are {called}")


def _check_networks(config: ConfigDict) -> None:
    recipe, grid = config.model, config.grid
    patch = recipe.patch
    known = (*config.layers, *OTHERS)
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
    for field in ("num_heads", "sisrafnet_channels", "sisrafnet_width"):
        require(recipe[field] >= 1, f"model.{field}", recipe[field], "at least 1")
    for width, heads in (("width", recipe.num_heads), ("cevit_width", CEViT.num_heads)):
        divides = recipe[width] >= 1 and recipe[width] % heads == 0
        require(divides, f"model.{width}", recipe[width], f"a multiple of num_heads={heads}")
    require(0 <= recipe.dropout < 1, "model.dropout", recipe.dropout, "in [0, 1)")
    require(recipe.dtype in ("float32", "bfloat16"), "model.dtype", recipe.dtype, "float32 or bfloat16")
    tokens = grid.subcarriers * 14 // (patch[0] * patch[1])
    most = FortiTran.max_tokens
    require(tokens <= most, "model.patch", patch, f"so large that there are at most {most} tokens, not {tokens}")


def check_mesh(config: ConfigDict, mesh: Mesh | None) -> None:
    """Refuses a mesh that does not divide the batches.

    Raises:
      UsageError: the batch.
    """
    devices, recipe = mesh.shape["data"] if mesh else 1, config.training
    fields = ("batch_size",) if config.together else ("batch_size", "validation_chunk")
    for field in fields:
        divides = recipe[field] % devices == 0
        require(divides, f"training.{field}", recipe[field], f"a multiple of mesh.data={devices}")


def programs(config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """The jitted programs of all models on a mesh and their abstract arguments: `name -> (function, arguments)`.

    They train, validate where there is a validation, draw the test slots and score; the last two take one device.
    """
    check_config(config)
    check_mesh(config, mesh)
    jitted: dict[str, tuple[Callable, tuple]] = {}
    for stage in config.stages:
        jitted |= _programs_of(stage, stage, config.stages[stage], config, mesh)
    for spacing in config.density.spacings:
        jitted |= _programs_of(f"density_{spacing}", "fixed", config.density.models, thinned(spacing, config), mesh)
    return jitted


def _programs_of(
    title: str, stage: str, names: Sequence[str], config: ConfigDict, mesh: Mesh
) -> dict[str, tuple[Callable, tuple]]:
    whole, bank = NamedSharding(mesh, PartitionSpec()), empty_bank(config)
    points, draw = abstract(POINTS, whole), slots_program(stage, bank, config.test_slots, config)
    chunk = abstract(jax.eval_shape(lambda points: chunk_of(draw(points), 0), points), whole)
    jitted: dict[str, tuple[Callable, tuple]] = {f"{title}/tests": (draw, (points,))}
    for name in names:
        setup = set_up(stage, name, None if config.together else 0, bank, config, abstractly)
        shardings = state_shardings(setup.state, mesh)
        state = abstract(setup.state, shardings)
        updates = update_program(setup.train_step, setup.batches, config.training.updates_per_call, shardings)
        jitted[f"{title}/{name}/updates"] = (updates, (state, *abstract((setup.keys, setup.batches.data), whole)))
        params = state.params
        if config.together:
            params = abstract(jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), params), whole)
        else:
            validate = validation_program(stage, setup.model, bank, config, mesh)
            jitted[f"{title}/{name}/validation"] = (validate, (params,))
        jitted[f"{title}/{name}/errors"] = (errors_program(setup.model), (params, chunk))
    return jitted


def run(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Closed forms, training of all models, the sweeps, the figures; returns the numbers."""
    check_config(config)
    check_mesh(config, run.mesh)
    metrics = analyse_closed_forms(config)
    run.figure("closed_forms", draw_closed_forms(metrics, config))
    bank = bank_of(config)
    linear = linear_of(config)
    metrics |= {"points": POINTS, "bound/db": decibels(linear.errors["bound"])}
    metrics |= {"bound/mean": metrics["bound/db"].mean(), "bound/training": training_bound(config)}
    for stage in config.stages:
        tests = draw_tests(stage, bank, config.test_slots, config)
        others = config.mismatch.profiles if stage == "fresh" else ()
        strange = {profile: draw_tests(stage, bank, config.mismatch.slots, config, profile) for profile in others}
        known = {profile: on_profile(linear, profile, config) for profile in others}
        sample = fit_sample(stage, bank, config)
        mismatched = {profile: score_linear(known[profile], sample, slots) for profile, slots in strange.items()}
        scores = score_linear(linear, sample, tests)
        for name in config.stages[stage]:
            seeds, updates = config.num_seeds[stage], config.training.updates[stage]
            run.say(f"{stage}: {name_of(name)}, {seeds} seed{'s' * (seeds > 1)}, {updates:,} updates")
            model, params = train(stage, name, bank, config, run)
            metrics[f"parameters/{name}"] = sum(leaf[0].size for leaf in jax.tree.leaves(params))
            scores[name] = score_model(model, params, tests)
            for profile, slots in strange.items():
                mismatched[profile][name] = score_model(model, params, slots)
            if name == "adafortitran":
                run.figure(f"slot_{stage}", draw_slot(model, params, tests, linear, config))
        metrics |= _report(stage, stage, scores, metrics["bound/db"], run)
        for profile, rows in mismatched.items():
            bound = decibels(known[profile].errors["bound"])
            metrics |= {f"mismatch/{profile}/bound/db": bound, f"mismatch/{profile}/bound/mean": bound.mean()}
            metrics |= _report(f"mismatch/{profile}", f"{stage}, tested on {profile}", rows, bound, run)
    if text := comparison(metrics, config):
        run.say(text)
        run.file("comparison.txt", text)
    metrics |= study_density(metrics, bank, config, run)
    run.figure("sweeps", draw_sweeps(metrics, config))
    run.figure("curves", draw_curves(run.workdir, metrics["bound/training"], config))
    return metrics


def _report(path: str, title: str, scores: dict[str, np.ndarray], bound: np.ndarray, run: Run) -> dict[str, Any]:
    """Prints and keeps the table of some slots; `<path>/<estimator>/db` and `/mean`."""
    text = table(title, scores, bound)
    run.say(text)
    run.file(f"{path.replace('/', '_')}.txt", text)
    rows = {f"{path}/{name}/db": row for name, row in scores.items()}
    return rows | {f"{path}/{name}/mean": row.mean(axis=1) for name, row in scores.items()}


def linear_of(config: ConfigDict) -> Linear:
    """The closed forms of the models' own grid."""
    return linear_estimators(config.grid.subcarriers, config.snr_reference, config)


def thinned(spacing: int, config: ConfigDict) -> ConfigDict:
    """The config of the models with one pilot row in so many, trained as long as `density` has it."""
    other = config.copy_and_resolve_references()
    other.grid.spacing = spacing
    other.training.updates.fixed = config.training.updates.density
    return other


def study_density(known: Metrics, bank: tdl.ChannelBank, config: ConfigDict, run: Run) -> dict[str, Any]:
    """`density/<spacing>/<estimator>/db` of fixed channels at 5 dB, 200 ns, 500 Hz: one pilot row in so many.

    The spacing of the stages is taken over from what is known, where it has all models.
    """
    point = SWEEPS["snr"].index((5, 200, 500))
    names = (*config.density.models, "bilinear", "pooled")
    metrics: dict[str, Any] = {}
    for spacing in config.density.spacings:
        other = thinned(spacing, config)
        linear, tests = linear_of(other), draw_tests("fixed", bank, other.test_slots, other)
        rows = score_linear(linear, fit_sample("fixed", bank, other), tests)
        for name in config.density.models:
            run.say(f"one pilot row in {spacing}: {name_of(name)}, {other.training.updates.fixed:,} updates")
            rows[name] = score_model(*train("fixed", name, bank, other, run, f"density_{spacing}_{name}"), tests)
        metrics |= {f"density/{spacing}/{name}/db": rows[name][:, point] for name in names}
        metrics[f"density/{spacing}/bound/db"] = decibels(linear.errors["bound"])[point]
    if not metrics:
        return {}
    spacings = set(config.density.spacings)
    if all(f"fixed/{name}/db" in known for name in names):
        first = config.grid.spacing
        spacings.add(first)
        metrics |= {f"density/{first}/{name}/db": np.asarray(known[f"fixed/{name}/db"])[:, point] for name in names}
        metrics[f"density/{first}/bound/db"] = np.asarray(known["bound/db"])[point]
    shown = ((*names, "bound"), sorted(spacings), config)
    text = density_table(metrics, *shown)
    run.say(text)
    run.file("density.txt", text)
    run.figure("density", draw_density(metrics, *shown))
    return metrics


ROWS = (*RIVALS, "bilinear", "pooled", "sample")  # what the adaptive model is compared with
# What chance can put an estimator below the conditional mean on 400 slots, in dB.
SAMPLING_MARGIN = 0.1


def _means_text(metrics: Metrics, stage: str, names: tuple[str, ...]) -> str:
    seeds = {name: measured(metrics, f"{stage}/{name}/mean") for name in names}
    return ", ".join(f"{name_of(name)} {mean_and_each(values, '.2f')}" for name, values in seeds.items())


def _adaptive_is_best(metrics: Metrics) -> bool:
    ours = mean(metrics, "fixed/adafortitran/mean")
    rivals = {name: mean(metrics, f"fixed/{name}/mean") for name in ROWS}
    # np.min, not min: a NaN among them must be the smallest, so that every comparison with it fails.
    lowest = np.min([*rivals.values()])
    ahead = ours < lowest and ours <= rivals["fortitran"] - 0.5 and ours <= rivals["pooled"] - 1
    names = _fresh_names(metrics)
    above = np.min([mean(metrics, f"fresh/{name}/mean") for name in names]) >= metrics["bound/mean"]
    return bool(ahead and above and _lowest_gap(metrics, names) >= -SAMPLING_MARGIN)


def _fresh_names(metrics: Metrics) -> tuple[str, ...]:
    """AdaFortiTran and those rivals that were trained on fresh channels, too; the closed forms always are there."""
    return ("adafortitran", *(name for name in ROWS if name not in RIVALS or f"fresh/{name}/mean" in metrics))


def _lowest_gap(metrics: Metrics, names: Sequence[str]) -> float:
    """The smallest difference in dB to the matched LMMSE, which is the bound on the same slots: any seed and point."""
    matched = np.asarray(metrics["fresh/matched/db"], float)
    return float(np.min([np.min(np.asarray(metrics[f"fresh/{name}/db"], float) - matched) for name in names]))


def _adaptive_text(metrics: Metrics) -> str:
    bound = f"bound {float(metrics['bound/mean']):.2f}"
    names = {"fixed": ("adafortitran", *ROWS, "matched"), "fresh": _fresh_names(metrics)}
    means = "; ".join(f"{stage} ({bound}): {_means_text(metrics, stage, names[stage])}" for stage in STAGES)
    gap = _lowest_gap(metrics, names["fresh"])
    return f"{means}; smallest distance to the matched LMMSE at a fresh point {gap:+.2f}"


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
    return mean(metrics, "fixed/adafortitran/mean") <= mean(metrics, "fixed/adafortitran_s/mean") + 0.1


def _depth_text(metrics: Metrics) -> str:
    text = _means_text(metrics, "fixed", ("adafortitran", "adafortitran_s"))
    counts = (f"{metrics[f'parameters/{name}']:,}" for name in ("adafortitran", "adafortitran_s"))
    return f"{text}; {' and '.join(counts)} parameters; bound {float(metrics['bound/mean']):.2f}"


CLAIMS = (
    Claim(
        "adaptive",
        "the three sweeps",
        "fixed channels, the same budget (in `small` 4,000 updates of 5 slots, and the conditions standardised for "
        "both models that take them): the mean of the 17 points' dB is the lowest of all, at least 0.5 dB below "
        "FortiTran's and 1 dB below that of the pooled LMMSE; on fresh channels (in `small` after "
        "1,000 updates, one seed) no mean is below the bound, and at no point any seed more than "
        f"{SAMPLING_MARGIN} dB below the matched LMMSE on the same 400 slots",
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
