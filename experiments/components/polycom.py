"""PolyCom: learned polynomials composed with ReLU or with a norm, as the activation of language models.

Reproduces the comparison of activations at equal parameters (dense models; PolyNorm, PolyReLU against SwiGLU, ReLU²,
ReLU, GELU), the ablation of orders and compositions, a mixture of experts, the rates of approximation of the theory and
the memory of the fused backward pass. Reported without a claim: the whole grid of learning rates, the ablation, the
mixture of experts, PolyNorm and SwiGLU on a second text, the coefficients, effective ranks and the similarity of
neighbouring layers.

`small` takes 11 minutes on 2 CPU cores: Tiny Shakespeare, character by character, models of 61,784 parameters, 1,200
updates of 8 windows of 48, all activations from the same seeds on the same batches, one where no claim rests on them.
The initialisation is the paper's, N(0, 2 / (5 d)): with the usual 0.02 pre-activations at d = 48 are about 0.14, where
powers are of no use, and PolyNorm loses to SwiGLU. The gap between the two is smallest at half the rate of the claims.
The second text is WikiText-2 without its training file: trained on the validation file, read on the test file; training
and validation loss are 1.772 and 1.836 for PolyNorm, 1.779 and 1.846 for SwiGLU, one seed each.

What it does not show: the paper's losses and downstream scores, which want billions of tokens. Effective ranks of
PolyNorm's matrices are 45.70 to 45.94 in the first and 43.49 to 43.68 in the last of a block, three seeds: slightly but
consistently above SwiGLU's (44.87 to 44.94, 42.69 to 42.82), about level with ReLU²'s, up to 0.5 above ReLU's. SwiGLU's
have 128 units instead of 192, and Gaussian matrices of the two shapes lie as far apart: 45.4 and 46.4.

Where it disagrees with the paper: neighbouring layers are more alike with PolyNorm, not less (mean cosines .78, .67 and
.77 by seed; SwiGLU's .65, .67 and .63). In the ablation, on one seed, PolySiLU has the lowest training loss (1.835;
PolyNorm 1.839, PolyPReLU 1.848, PolyGELU 1.852, PolyReLU 1.854), while the paper has PolyNorm and PolyReLU in front.
`polynorm` holds on the means alone: with seed 1 PolyNorm is behind SwiGLU in training (1.868 against 1.858) and in
validation (1.943 against 1.938).

`paper` has the models of Table 1 and the mixture of experts (`stages.<name>.size`): where a field is -1 (or empty) the
size's figure stands, and what is given counts (`--config.lm.batch_size=256`), down to a model for one accelerator.
Parameters are sharded over `data` (fsdp), an update takes `lm.microbatch` sequences a device at once, logits and
attention come in chunks: on v5e:8x8 an update of a dense model needs 1.8 GiB a chip, of the mixture 8.8. The texts are
token ids in files (`lm.text`, `stages.<name>.text`: `tokens/<folder>` below the data folder, with train.npy or
train.bin, and validation likewise); RedPajama and OLMoE-mix have to be tokenized beforehand. One model a stage, as in
the paper; the claims are then checked on it without a second seed. The mixture's rate ends at a tenth, as the paper
says; in the authors' configuration the cosine would take 5e12 tokens, and the rate stays next to its peak. `lm.decay`
says what AdamW decays: the coefficients, too, which the authors' code leaves out (see `weight_decay_mask`).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.catalogue import require
from experiments.claims import each, mean, mean_and_each, measured
from experiments.components._polycom_figures import (
    COMPARED,
    NAMES,
    RIVALS,
    draw_ablation,
    draw_approximation,
    draw_loss,
    draw_ranks,
    draw_rates,
    has_experts,
    in_order,
    label,
    main_stages,
    other_text,
)
from experiments.components._polycom_theory import METHODS, analyse_approximation, analyse_overhead, slopes
from experiments.components._polycom_tokens import (
    FILES,
    is_text,
    load_tokens,
    text_of,
    vocabulary,
)
from experiments.components._polycom_training import (
    length_of,
    rows_of,
    set_up_population,
    set_up_single,
    size_of,
    study_single,
    study_small,
)
from experiments.harness import Claim, Metrics, Paper, Run
from jaxpapers.components.polycom import ACTIVATIONS, DECAYS, GATED, SIZES
from jaxpapers.data.text import ENCODINGS, OWN_SOURCE, TEXTS
from jaxpapers.train import abstract, abstractly, state_shardings, update_program

PAPER = Paper(
    title="Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models",
    authors="Z. Zhuo, Y. Wang, Y. Zeng, X. Li, X. Zhou, J. Ma",
    year=2025,
    arxiv="2411.03884",
    code="BryceZhuo/PolyCom",
)
COVER = "loss"
SEEDS = 3  # that the claims ask for


def get_config(preset: str = "small") -> ConfigDict:
    """Settings of a preset.

    Args:
      preset: "smoke", "small" or "paper".
    """
    stage = {
        "activation": "polynorm",
        "order": 3,
        "size": "",  # of SIZES, whose figures stand where a field here or in `lm` is -1 or empty; "": a small model
        "text": "",  # instead of `lm.text`
        "hidden": 192,  # units of an ungated block (of an expert), two thirds of them with a gate
        "num_experts": 0,
        "top_k": 0,
        "block": 16,  # rows of a block of experts; 1: a ragged product, for accelerators
        "rates": (3e-3,),  # of the claims; others of the grid
        "num_seeds": 0,  # at most the experiment's; 0: these
    }
    single = stage | {"num_seeds": 1}  # no claim rests on it
    grid = {name: stage | {"activation": name, "rates": (3e-3, 1.5e-3, 6e-3)} for name in COMPARED}
    orders = {
        f"{name}_{order}": single | {"activation": name, "order": order}
        for name in ("polynorm", "polyrelu")
        for order in (2, 4)
    }
    compositions = {
        name: single | {"activation": name} for name in ("polyprelu", "polygelu", "polysilu", "polyrelunorm")
    }
    experts = {"num_experts": 8, "top_k": 2, "hidden": 96}
    second = {
        f"wiki_{name}": single | {"activation": name, "text": "wikitext2_small"} for name in ("polynorm", "swiglu")
    }
    config: dict[str, Any] = {
        "seed": 0,
        "num_seeds": 3,
        "num_rate_seeds": 1,  # at the other rates
        "optimizer": "adamw",
        "router": {"load_balance": 0.01, "z_loss": 0.001},
        "approximation": {"cells": (4, 8, 16, 32, 64), "levels": (1, 2, 3, 4, 5, 6, 7, 8), "points": 4096},
        "overhead": {"tokens": 2048, "width": 512, "order": 3, "repeats": 20, "exact_tokens": 16},
        "lm": {
            "text": "tinyshakespeare",  # or another of TEXTS, or `tokens/<folder>`: files of token ids
            "encoding": "characters",  # of texts; files have ids already
            "vocab_size": -1,  # -1: of the size, or else of the text
            "width": 48,
            "num_layers": 2,
            "num_heads": 3,
            "length": 48,
            "batch_size": 8,
            "microbatch": 0,  # sequences of a device at once, of models with a size; 0: all
            "loss_chunk": 0,  # steps whose logits are held at once; 0: all
            "attention_chunk": 0,  # queries whose weights are held at once; 0: all
            "updates": 1_200,
            "updates_per_call": 100,
            "evaluate_every": 300,
            "test_windows": 1_536,  # 73,728 characters
            "warmup": 50,  # updates
            "last_rate": 0.1,  # of the peak
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "decay": DECAYS,  # what is decayed; (): as the size says
            "clip_norm": 1.0,
            "dtype": "float32",
            "remat": False,
            "scan": False,
        },
        "stages": grid
        | orders
        | compositions
        | second
        | {f"moe_{name}": single | experts | {"activation": name} for name in ("polynorm", "swiglu")},
    }
    match preset:
        case "smoke":
            config |= {"num_seeds": 1}
            config["approximation"] |= {"cells": (16, 32), "levels": (1, 7), "points": 512}
            config["overhead"] |= {"tokens": 64, "width": 32, "repeats": 2, "exact_tokens": 4}
            tiny = {"width": 12, "num_layers": 1, "num_heads": 2, "length": 12, "batch_size": 4, "updates": 10}
            tiny |= {"warmup": 2, "updates_per_call": 5, "evaluate_every": 5, "test_windows": 8}
            config["lm"] |= tiny | {"text": OWN_SOURCE}
            names = ("polynorm", "moe_swiglu")
            config["stages"] = {name: config["stages"][name] | {"hidden": 24} for name in names}
        case "small":
            pass  # the settings above
        case "paper":
            config |= {"num_seeds": 1}
            left_open = ("width", "num_layers", "num_heads", "length", "batch_size", "updates", "warmup")
            config["lm"] |= dict.fromkeys(left_open, -1) | {"decay": ()}
            config["lm"] |= {"dtype": "bfloat16", "remat": True, "scan": True}
            config["lm"] |= {"microbatch": 1, "loss_chunk": 1_024, "attention_chunk": 512}
            config["lm"] |= {"updates_per_call": 10, "evaluate_every": 1_000}
            sized = dict.fromkeys(("hidden", "num_experts", "top_k"), -1) | {"rates": (-1.0,), "block": 1}
            dense = stage | sized | {"size": "1B", "text": f"{FILES}redpajama"}
            sparse = stage | sized | {"size": "1B-7B", "text": f"{FILES}olmoe_mix"}
            config["stages"] = {name: dense | {"activation": name} for name in ("polynorm", "polyrelu", *RIVALS)} | {
                f"moe_{name}": sparse | {"activation": name} for name in ("polynorm", "swiglu")
            }
        case _:
            raise ValueError(f"preset must be smoke, small or paper, got {preset!r}")
    return ConfigDict(config)


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot be trained, before anything is.

    Raises:
      UsageError: the field with its value, and what it takes.
    """
    require(config.seed >= 0, "seed", config.seed, "at least 0")
    require(config.num_seeds >= 1, "num_seeds", config.num_seeds, "at least 1")
    seeds = config.num_rate_seeds
    require(1 <= seeds <= config.num_seeds, "num_rate_seeds", seeds, f"between 1 and num_seeds={config.num_seeds}")
    recipe = config.lm
    require(is_text(recipe.text), "lm.text", recipe.text, f"one of {TEXTS}, or a folder {FILES}...")
    require(recipe.encoding in ENCODINGS, "lm.encoding", recipe.encoding, f"one of {ENCODINGS}")
    require(recipe.dtype in ("float32", "bfloat16"), "lm.dtype", recipe.dtype, "float32 or bfloat16")
    for field in ("updates_per_call", "evaluate_every", "test_windows"):
        require(recipe[field] >= 1, f"lm.{field}", recipe[field], "at least 1")
    for field in ("microbatch", "loss_chunk", "attention_chunk"):
        require(recipe[field] >= 0, f"lm.{field}", recipe[field], "at least 0")
    require(0 < recipe.last_rate <= 1, "lm.last_rate", recipe.last_rate, "in (0, 1], a share of the peak")
    require(recipe.clip_norm > 0, "lm.clip_norm", recipe.clip_norm, "above 0")
    require(recipe.weight_decay >= 0, "lm.weight_decay", recipe.weight_decay, "at least 0")
    require(set(recipe.decay) <= set(DECAYS), "lm.decay", recipe.decay, f"some of {DECAYS}")
    fits = len(recipe.betas) == 2 and all(0 <= beta < 1 for beta in recipe.betas)
    require(fits, "lm.betas", recipe.betas, "two numbers in [0, 1)")
    for field, value in config.router.items():
        require(value >= 0, f"router.{field}", value, "at least 0")
    for field in ("cells", "levels"):
        values = config.approximation[field]
        require(values and min(values) >= 1, f"approximation.{field}", values, "some numbers, each at least 1")
    require(config.approximation.points >= 1, "approximation.points", config.approximation.points, "at least 1")
    for field, value in config.overhead.items():
        require(value >= 1, f"overhead.{field}", value, "at least 1")
    require(len(config.stages), "stages", config.stages, "at least one stage")
    for name in config.stages:
        _check_stage(name, config)


def _check_stage(name: str, config: ConfigDict) -> None:
    stage, recipe, field = config.stages[name], config.lm, f"stages.{name}"
    require(stage.activation in ACTIVATIONS, f"{field}.activation", stage.activation, f"one of {ACTIVATIONS}")
    require(not stage.size or stage.size in SIZES, f"{field}.size", stage.size, f"empty or one of {[*SIZES]}")
    require(not stage.text or is_text(stage.text), f"{field}.text", stage.text, "empty or as lm.text")
    fits = 0 <= stage.num_seeds <= config.num_seeds
    require(fits, f"{field}.num_seeds", stage.num_seeds, f"between 0 and num_seeds={config.num_seeds}")
    require(stage.order >= 1, f"{field}.order", stage.order, "at least 1")
    require(stage.block >= 1, f"{field}.block", stage.block, "at least 1")
    require(stage.rates, f"{field}.rates", stage.rates, "some learning rates, above 0 each")
    text = text_of(name, config)
    vocab_size = vocabulary(text, recipe.encoding, recipe.vocab_size)
    size, length = size_of(name, config, vocab_size), length_of(name, config)
    rates = (size.learning_rate, *stage.rates[1:])
    require(min(rates) > 0, f"{field}.rates", stage.rates, "some learning rates, above 0 each")
    found = {"width": size.width, "num_layers": size.num_layers, "num_heads": size.num_heads, "length": length}
    found |= {"batch_size": size.batch_size, "updates": size.steps}
    for what, value in found.items():
        require(value >= 1, f"lm.{what}", value, "at least 1")
    heads = size.num_heads
    even = size.width % (2 * heads) == 0
    require(even, "lm.width", size.width, f"a multiple of 2 num_heads={2 * heads} (rotary positions)")
    fits = 0 <= size.warmup < 1
    require(fits, "lm.warmup", recipe.warmup, f"from 0 to below {size.steps}")
    fits = size.vocab_size >= max(vocab_size, 1)
    require(fits, "lm.vocab_size", recipe.vocab_size, f"at least the number of tokens of {text}, which a file needs")
    multiple = 3 if stage.activation in GATED else 1
    fits = size.hidden >= 1 and size.hidden % multiple == 0
    require(fits, f"{field}.hidden", size.hidden, f"a multiple of {multiple}")
    if size.num_experts:
        fits = 1 <= size.top_k <= size.num_experts
        require(fits, f"{field}.top_k", size.top_k, f"between 1 and num_experts={size.num_experts}")
    if stage.size:
        require(len(stage.rates) == 1, f"{field}.rates", stage.rates, "one learning rate where there is a size")
        require(config.num_seeds == 1, "num_seeds", config.num_seeds, f"1, as {field} has a size")
        return
    for what, off in (("scan", False), ("microbatch", 0)):
        require(recipe[what] == off, f"lm.{what}", recipe[what], f"{off} for small models, which train side by side")


def programs(config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """The jitted programs of the training on a mesh and their abstract arguments: `name -> (function, arguments)`."""
    check_config(config)
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    jitted: dict[str, tuple[Callable, tuple]] = {}
    for name in config.stages:
        if not config.stages[name].size:
            text = np.zeros(10 * (config.lm.length + 1), np.int32)
            vocab_size = vocabulary(text_of(name, config), config.lm.encoding, config.lm.vocab_size)
            setup = set_up_population(name, text, vocab_size, config, abstractly)
            updates = update_program(setup.train_step, setup.batches, config.lm.updates_per_call)
            jitted[f"lm/{name}"] = (updates, abstract((setup.state, setup.keys, setup.batches.data), whole))
            continue
        single = set_up_single(name, config, mesh if mesh.size > 1 else None, abstractly)
        shardings = state_shardings(single.state, mesh, single.rules)
        state, key = abstract(single.state, shardings), abstract(jax.random.key(0), whole)

        def tokens(rows: int, name: str = name) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, length_of(name, config) + 1), np.int32, sharding=split)

        update = jax.jit(single.train_step, donate_argnums=0, out_shardings=(shardings, whole))
        jitted[f"lm/{name}/update"] = (update, (state, tokens(single.size.batch_size), key))
        weights = jax.ShapeDtypeStruct((single.rows,), np.float32, sharding=split)
        jitted[f"lm/{name}/evaluate"] = (single.evaluate, (state.params, tokens(single.rows), weights))
    return jitted


def run(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Measures approximation and memory, trains the language models, draws the figures; returns the numbers."""
    check_config(config)
    for name in config.stages:
        if config.stages[name].size:
            rows_of(name, config, run.mesh)  # a batch that the mesh does not divide is refused before anything is done
    texts, metrics = run.load(
        dict.fromkeys(text_of(name, config) for name in config.stages),
        lambda text: load_tokens(text, config.lm.encoding, config.lm.vocab_size),
        said="the language models on {} are",
        key="lm/{}",
    )
    metrics |= analyse_approximation(config)
    run.figure("approximation", draw_approximation(metrics))
    metrics |= analyse_overhead(config)
    trained = [name for name in config.stages if text_of(name, config) in texts]
    if not trained:
        return metrics
    for name in trained:
        study = study_single if config.stages[name].size else study_small
        metrics |= study(name, texts[text_of(name, config)], config, run)
    config = ConfigDict({**config, "stages": {name: config.stages[name] for name in trained}})
    sized = any(config.stages[name].size for name in trained)
    metrics["lm/sized"] = sized
    run.figure("loss", draw_loss(run.workdir, config, main_stages(config)))
    if experts := [name for name in in_order(config) if has_experts(name, config)]:
        run.figure("experts", draw_loss(run.workdir, config, experts))
    if sized:
        return metrics
    run.say(rate_table(metrics, config))
    run.figure("rates", draw_rates(metrics, config))
    run.figure("ranks", draw_ranks(metrics, config))
    run.figure("ablation", draw_ablation(metrics, config))
    return metrics


def rate_table(metrics: Metrics, config: ConfigDict) -> str:
    """The grid of learning rates: training and validation loss of every activation, mean of the seeds of each rate.

    The stages on other texts stand below: their losses do not compare with those above.
    """
    main = main_stages(config)
    names = main + [name for name in in_order(config) if name not in main and other_text(name, config)]
    labels = [label(name, config) for name in names]
    lines = ["training / validation loss by peak learning rate"]
    for name, shown in zip(names, labels, strict=True):
        first, *others = config.stages[name].rates
        prefixes = {first: name} | {rate: f"{name}/rate_{rate:g}" for rate in others}
        cells = [
            f"{rate:g}: {np.mean(metrics[f'{prefixes[rate]}/train']):.3f} / "
            f"{np.mean(metrics[f'{prefixes[rate]}/validation']):.3f}"
            for rate in sorted(prefixes)
        ]
        lines.append(f"{shown:{max(map(len, labels))}}   {'   '.join(cells)}")
    return "\n".join(lines)


def _require_seeds(metrics: Metrics, names: tuple[str, ...]) -> None:
    """Makes a claim `not run` where small models have too few seeds; large ones are one each, as in the paper."""
    sized = bool(metrics["lm/sized"])
    fewest = min(np.size(metrics[f"{name}/{what}"]) for name in names for what in ("train", "validation"))
    if fewest < SEEDS and not sized:
        raise KeyError(f"{SEEDS} seeds")


def _polynorm_is_lowest(metrics: Metrics) -> bool:
    _require_seeds(metrics, ("polynorm", *RIVALS))
    train, valid = ({name: mean(metrics, f"{name}/{what}") for name in COMPARED} for what in ("train", "validation"))
    others = ("relu2", "relu", "gelu")
    return bool(
        train["swiglu"] - train["polynorm"] >= 0.005
        and all(train[name] - train["polynorm"] >= 0.015 for name in others)
        and all(valid[name] - valid["polynorm"] >= 0.008 for name in others)
        and valid["polynorm"] <= valid["swiglu"]
    )


def _polyrelu_is_between(metrics: Metrics) -> bool:
    _require_seeds(metrics, ("polynorm", "polyrelu", "relu2", "relu", "gelu"))
    checks = []
    for what in ("train", "validation"):
        loss = {name: mean(metrics, f"{name}/{what}") for name in COMPARED}
        checks += [loss[name] - loss["polyrelu"] >= 0.012 for name in ("relu", "gelu")]
        checks += [loss["polyrelu"] <= loss["relu2"], loss["polynorm"] <= loss["polyrelu"] + 0.003]
    return all(checks)


def _loss_text(metrics: Metrics, names: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        losses = [mean_and_each(measured(metrics, f"{name}/{what}"), ".4f") for what in ("train", "validation")]
        rows.append(f"{NAMES[name]} {' / '.join(losses)}")
    return f"training (seeds) / validation (seeds): {'; '.join(rows)}"


def _rates_are_optimal(metrics: Metrics) -> bool:
    cells = np.asarray(metrics["approximation/cells"])
    n2, n3 = (np.asarray(metrics[f"approximation/n{n}"], float) for n in (2, 3))
    fine = cells >= 16
    levels, errors = np.asarray(metrics["sawtooth/levels"]), np.asarray(metrics["sawtooth/error"], float)
    return bool(
        np.sum(fine) >= 2  # or there is no slope
        and np.all(np.abs(slopes(n2[fine], cells[fine]) + 2) <= 0.1)
        and np.all(np.abs(slopes(n3, cells) + 3) <= 0.05)
        and np.all(np.abs(errors - 2.0 ** (-2 * levels - 2)) <= 1e-9)
        and _levels_needed(metrics) == 7
        and float(metrics["exact/square"]) <= 1e-12
        and float(metrics["exact/product"]) <= 1e-12
    )


def _levels_needed(metrics: Metrics) -> int:
    """Of the ReLU network, for an error of 1.5e-5."""
    levels, errors = np.asarray(metrics["sawtooth/levels"]), np.asarray(metrics["sawtooth/error"], float)
    return int(np.min(levels[errors < 1.55e-5], initial=10**6))


def _rates_text(metrics: Metrics) -> str:
    cells = np.asarray(metrics["approximation/cells"])
    parts = []
    for n in (2, 3):
        errors = np.asarray(metrics[f"approximation/n{n}"], float)
        parts.append(f"n = {n}: {errors[0]:.2e} to {errors[-1]:.2e}, slopes {each(slopes(errors, cells), '.2f')}")
    square, product = (float(metrics[f"exact/{what}"]) for what in ("square", "product"))
    exact = f"PolyReLU's x^2 to {square:.0e}, u v to {product:.0e}"
    return f"{'; '.join(parts)}; ReLU levels {_levels_needed(metrics)}, {exact}"


def _kept(metrics: Metrics) -> dict[str, float]:
    """Bytes between the passes, over those of the input."""
    total = float(metrics["overhead/input_bytes"])
    return {name: float(metrics[f"overhead/{name}/residual_bytes"]) / total for name in METHODS}


def _backward_is_lean(metrics: Metrics) -> bool:
    total, scalars = float(metrics["overhead/input_bytes"]), 3 * 4 * float(metrics["overhead/tokens"])
    kept = _kept(metrics)
    fused = kept["fused"] * total <= 1.05 * total + scalars
    return bool(fused and kept["plain"] >= 2.5 and float(metrics["overhead/gradient_difference"]) <= 1e-10)


def _lean_text(metrics: Metrics) -> str:
    kept = _kept(metrics)
    rows = [
        f"{name} {kept[name]:.2f} x the input, {float(metrics[f'overhead/{name}/milliseconds']):.1f} ms"
        for name in METHODS
    ]
    difference = float(metrics["overhead/gradient_difference"])
    return f"{'; '.join(rows)}; gradients differ by {difference:.0e}"


CLAIMS = (
    Claim(
        "polynorm",
        "Sec. 4, Fig. 1",
        "on Tiny Shakespeare at equal parameters, same batches, 3 seeds at 3e-3 (of the paper's models: 1 seed, on the "
        "text and at the rate of the run): PolyNorm's mean training loss is "
        "below SwiGLU's by 0.005 or more and below ReLU²'s, ReLU's and GELU's by 0.015; its validation loss below "
        "these three by 0.008 and not above SwiGLU's",
        "1.3B: training PolyNorm 2.174, SwiGLU 2.191, GELU 2.209, ReLU 2.218",
        lambda metrics: _loss_text(metrics, ("polynorm", *RIVALS)),
        _polynorm_is_lowest,
    ),
    Claim(
        "polyrelu",
        "Sec. 4, Fig. 1",
        "the same runs: PolyReLU's mean training and validation loss are below ReLU's and GELU's by 0.012 or more and "
        "not above ReLU²'s; PolyNorm's not above PolyReLU's by more than 0.003",
        "1.3B: training PolyReLU 2.180, PolyNorm 2.174, GELU 2.209, ReLU 2.218",
        lambda metrics: _loss_text(metrics, ("polyrelu", "polynorm", "relu2", "relu", "gelu")),
        _polyrelu_is_between,
    ),
    Claim(
        "rate",
        "Sec. 3",
        "local Taylor networks of sin(2 pi x): log-log slopes of the sup-error within 0.1 of -2 (n = 2, 16 cells and "
        "more) and within 0.05 of -3 (n = 3); ReLU's x^2 errs by 2^(-2m-2) to 1e-9 with m levels, so that 1.5e-5 takes "
        "7, and a PolyReLU layer by 1e-12 at most, as u v does",
        "O(eps^(-d/n)) weights; ReLU networks ln(1/eps) times as many",
        _rates_text,
        _rates_are_optimal,
    ),
    Claim(
        "memory",
        "Sec. 4",
        "2048 tokens of width 512: between the passes the fused PolyNorm keeps at most 1.05 times the input and 3 "
        "numbers a token, plain automatic differentiation at least 2.5 times the input; gradients agree to 1e-10 in "
        "float64",
        "no overhead worth mentioning with recomputation",
        _lean_text,
        _backward_is_lean,
    ),
)
