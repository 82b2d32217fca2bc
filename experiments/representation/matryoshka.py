"""Matryoshka: one embedding whose prefixes are all representations, for classification, retrieval and cascades.

Reproduces accuracy by size of MRL and MRL-E against one model a size (Figs. 2, 3), against compression afterwards
(Tables 1, 2: SVD, random features and projections, a slimmable network), adaptive and funnel retrieval with their cost
(Fig. 8), sizes between those trained (Fig. 5) and the cascade of heads (Figs. 6, 7). Reported without a claim: few-shot
classes, superclasses, importance and spacing of the sizes, MRL by fine-tuning a fixed-feature model's last layers
(App. K), and, with a budget of a fifth, contrastive MRL on two views of each image (App. C).

`small` takes 12 minutes on 2 CPU cores: an MLP on Omniglot's small background sets (242 characters, 15 drawers to train
and to be searched, 5 to test), and on Fashion-MNIST for the cascade, 2 seeds each, one where no claim rests on a
variant. With 1,210 test images a standard error is 1.1 points, 0.7 for differences of two models on the same images. A
data set whose files cannot be had is left out, with a word.

What `small` does not show: MRL by fine-tuning stays far behind. Where two layers learn, top-1 at m = 8 is 32.6 and
36.9 (two seeds), 71 for MRL from the start; in the paper 6 points are missing there. From m = 128 on it is 2 points
behind (the paper: 1.5). Of an MLP's three layers 0, 1 or 2 learn, for 300 updates, and BatchNorm keeps the statistics
of the trained encoder, which is a choice of ours. Contrastive MRL does not reach its rivals of one size but for the
smallest: 1-NN is 41.4 against 40.9 at m = 8, 54.8 against 57.7 at 32, 54.6 against 57.9 at 256, after 300 updates of
one seed.

`paper` is ResNet50 on ImageNet-1K, batches split over `data`: MRL (also boosted, with uniform sizes, by fine-tuning),
MRL-E, nine fixed-feature models and the slimmable network, one after the other; fewer by `config.imagenet.variants`.
ImageNet has no reader here: `run` takes a folder of arrays; `_matryoshka_data` says how its images are to be resized. A
ViT is a change of fields: encoder=vit, features=768, nesting=(12, 24, ..., 768), sides and test_side of 224.

Left out of `paper`: MRL without the smallest size (add `late` to the variants) and MRL-8boost (boost=(2.0,);
`mrl_boost` is MRL-8+16boost); the probe on random features (Rand. LP), whose full-batch fit wants all of ImageNet's on
one device. Left out altogether: the contrastive and masked-language models on JFT, ALIGN and Wikipedia (their losses
are in the library); ImageNet-4K; the robustness sets; HNSW (FAISS' is a rival in `benchmarks search`);
`lax.approx_max_k` on TPUs; a log-softmax over labels that are split over devices; for MRL's separate heads, the logits
of one at a time, computed again in the backward pass, as the masked-language loss does it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.catalogue import UsageError, require
from experiments.claims import each, measured
from experiments.harness import Claim, Metrics, Paper, Run
from experiments.representation._matryoshka_data import AUGMENTATIONS, SOURCES, load_images, shape_of
from experiments.representation._matryoshka_figures import (
    draw_ablations,
    draw_accuracy,
    draw_cascade,
    draw_further,
    draw_interpolation,
    draw_retrieval,
)
from experiments.representation._matryoshka_study import (
    answers_of,
    depth_of,
    funnel_program,
    measures_of,
    nearest_means,
    probed,
    project,
    rows_of_a_device,
    search_program,
    study,
    svd_projection,
    ways_of,
)
from experiments.representation._matryoshka_training import (
    ENCODERS,
    FINETUNED,
    SCHEDULES,
    VARIANTS,
    crop_sides,
    embedded_rows,
    families,
    make_embed,
    recipe_of,
    rows_of,
    set_up_population,
    single_state,
    single_step,
)
from jaxpapers.representation import matryoshka as mrl
from jaxpapers.train import POPULATION_RULES, abstract, abstractly, member, state_shardings, update_program

PAPER = Paper(
    title="Matryoshka Representation Learning",
    authors="A. Kusupati, G. Bhatt, A. Rege, M. Wallingford, A. Sinha, V. Ramanujan, W. Howard-Snyder, K. Chen, "
    "S. Kakade, P. Jain, A. Farhadi",
    year=2022,
    arxiv="2205.13147",
    code="RAIVNLab/MRL",
)
COVER = "accuracy"


def get_config(preset: str = "small") -> ConfigDict:
    """Settings of a preset; each data set has a group of fields of its own.

    Args:
      preset: "smoke", "small" or "paper".
    """
    recipe: dict[str, Any] = {
        "num_seeds": 2,
        "single_seed": (),  # variants with the first seed alone
        "encoder": "mlp",  # or "resnet", "vit"
        "optimizer": "adamw",  # or "sgd"
        "schedule": "one_cycle",
        "rate": 3e-3,
        "weight_decay": 1e-2,
        "label_smoothing": 0.1,
        "batch_size": 128,
        "updates_per_call": 50,
        "test_batch": 605,
        "boost": (2.0, 1.5),  # importance of the smallest sizes in `mrl_boost`, the others have 1
        "uniform_count": 7,  # sizes of `uniform`
        "finetune_updates": 300,  # of the models `finetuned_<layers of the encoder that learn with the new heads>`
        "finetune_rate": 3e-3,
        "contrastive_updates": 300,
        "contrastive_sizes": (8, 32, 256),  # of `contrastive_ff`, one model each
        "temperature": 0.1,  # of the contrastive loss
        "neighbours": 0,  # k of 1-NN and mAP, as claims and figures have them; 0: nothing is searched
        "depths": (10, 25, 50, 100),  # k of all measures, in lists that are long enough
        "adaptive": (),  # (size of the short-list, size of the re-ranking, length)
        "funnels": (),  # (size of the short-list, sizes, lengths)
        "shots": (),
        "draws": 5,  # of the examples of few-shot classes
        "probe_updates": 0,  # of the linear probes on random features; 0: none
        "mirror": False,  # whether a cascade adds the logits of the mirror image
        "splits": 10,
    }
    omniglot = recipe | {
        "source": "omniglot",
        "hidden": (512, 512),
        "features": 256,
        "nesting": (4, 8, 16, 32, 64, 128, 256),
        "variants": VARIANTS,
        # No claim rests on them.
        "single_seed": ("mrl_boost", "uniform", "late", "slim", "contrastive", "contrastive_ff"),
        "updates": 1_500,
        "augmentation": "affine",
        "neighbours": 10,
        "adaptive": ((16, 256, 100), (8, 256, 50)),
        "funnels": (
            (16, (32, 64, 128, 256), (100, 50, 25, 10)),
            (8, (16, 32, 64, 128, 256), (200, 100, 50, 25, 10)),
        ),
        "shots": (1, 3, 5, 7, 9),
        "probe_updates": 150,
        "calibration": 403,
    }
    fashion = recipe | {
        "source": "fashion_mnist",
        "hidden": (256, 256),
        "features": 64,
        "nesting": (2, 4, 8, 16, 32, 64),
        "variants": ("mrl", "mrl_e"),
        "updates": 3_000,
        "augmentation": "mirror",
        "test_batch": 2_000,
        "mirror": True,
        "calibration": 2_000,
    }
    config: dict[str, Any] = {"seed": 0, "datasets": ("omniglot", "fashion")}
    match preset:
        case "smoke":
            tiny = {"source": "generated", "classes": 6, "side": 12, "train_per_class": 12, "test_per_class": 5}
            tiny |= {
                "num_seeds": 1,
                "single_seed": (),
                "hidden": (16,),
                "features": 8,
                "nesting": (2, 4, 8),
                "updates": 20,
            }
            tiny |= {"batch_size": 16, "updates_per_call": 10, "test_batch": 72, "calibration": 10, "splits": 2}
            tiny |= {"uniform_count": 3, "finetune_updates": 10, "contrastive_updates": 10, "contrastive_sizes": (4,)}
            tiny |= {"depths": (10, 25)}
            # The variants that are left out differ in a list of numbers from one that is not.
            variants = ("mrl", "mrl_boost", "mrl_e", "ff", "slim", "finetuned_1", "contrastive", "contrastive_ff")
            config["omniglot"] = omniglot | tiny | {"variants": variants}
            config["omniglot"] |= {"adaptive": ((2, 8, 20),), "funnels": ((2, (4, 8), (20, 10)),), "shots": (1, 3)}
            config["omniglot"] |= {"draws": 2, "probe_updates": 10}
            config["fashion"] = fashion | tiny | {"variants": ("mrl",)}
        case "small":
            config |= {"omniglot": omniglot, "fashion": fashion}
        case "paper":
            epoch = 1_281_167 // 512
            config["datasets"] = ("imagenet",)
            config["imagenet"] = recipe | {
                "source": "arrays",
                "folder": "imagenet",
                "train_images": 1_281_167,
                "test_images": 50_000,
                "side": 256,
                "classes": 1_000,
                "num_seeds": 1,
                "encoder": "resnet",
                "stage_sizes": (3, 4, 6, 3),
                "bottleneck": True,
                "width": 64,
                "stem": "imagenet",
                "blur": True,
                "patch": 16,  # from here to mlp_units: of a ViT
                "num_layers": 12,
                "num_heads": 12,
                "mlp_units": 3_072,
                "dtype": "bfloat16",
                "features": 2048,
                "nesting": mrl.log_spaced_sizes(2048),
                "uniform_count": 11,
                "variants": ("mrl", "mrl_boost", "mrl_e", "uniform", "ff", "slim", *FINETUNED),
                "optimizer": "sgd",
                "schedule": "triangle",
                "rate": 0.425,  # the README's commands'; the text has 0.475
                "warmup": 2 / 40,
                "weight_decay": 1e-4,
                "epochs": 40,
                "updates": 40 * epoch,
                "finetune_epochs": 10,
                "finetune_updates": 10 * epoch,
                "finetune_rate": 0.1,
                "updates_per_call": 100,
                "batch_size": 512,
                "augmentation": "crop",
                "sides": (160, 192),  # of the crops: the first until epoch ramp[0], the second from ramp[1]
                "ramp": (29, 34),
                "test_side": 256,
                "test_crop": 224 / 256,
                "test_batch": 1_024,
                "neighbours": 10,
                "adaptive": ((16, 2048, 200), (8, 2048, 200)),
                "funnels": (
                    (16, (32, 64, 128, 256, 2048), (200, 100, 50, 25, 10)),
                    (8, (16, 32, 64, 128, 2048), (200, 100, 50, 25, 10)),
                    (8, (16, 32, 64, 128, 2048), (400, 200, 50, 25, 10)),
                    (8, (16, 32, 64, 128, 2048), (800, 400, 200, 50, 10)),
                ),
                "shots": (1, 3, 5, 7, 9),
                "mirror": True,
                "calibration": 10_000,
                "splits": 30,
            }
        case _:
            raise ValueError(f"preset must be smoke, small or paper, got {preset!r}")
    return ConfigDict(config)


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot be trained or measured, before anything is.

    Raises:
      UsageError: the field with its value, and what it takes.
    """
    known = sorted(name for name, value in config.items() if isinstance(value, ConfigDict) and "source" in value)
    for name in config.datasets:
        require(name in known, "datasets", config.datasets, f"some of {known}")
        _check_recipe(name, config[name])
    require(config.datasets, "datasets", config.datasets, f"some of {known}")


def _check_recipe(name: str, recipe: ConfigDict) -> None:
    def check(holds: Any, field: str, expected: str) -> None:
        require(holds, f"{name}.{field}", recipe[field], expected)

    choices = {
        "source": SOURCES,
        "encoder": ENCODERS,
        "optimizer": ("adamw", "sgd"),
        "schedule": SCHEDULES,
        "augmentation": AUGMENTATIONS,
    }
    for field, options in choices.items():
        check(recipe[field] in options, field, f"one of {options}")
    crops, kind = recipe.encoder != "mlp", recipe.encoder
    check(
        (recipe.augmentation == "crop") == crops, "augmentation", f"{'crop' if crops else 'affine or mirror'} ({kind})"
    )
    check(not crops or recipe.source == "arrays", "source", f"arrays for a {kind}")
    for field in ("num_seeds", "updates", "updates_per_call", "batch_size", "test_batch", "draws"):
        check(recipe[field] >= 1, field, "at least 1")
    for field in ("neighbours", "probe_updates", "splits", "weight_decay"):
        check(recipe[field] >= 0, field, "at least 0")
    check(recipe.rate > 0, "rate", "above 0")
    check(0 <= recipe.label_smoothing <= 1, "label_smoothing", "in [0, 1]")
    unknown = set(recipe.variants) - set(VARIANTS)
    check(recipe.variants and not unknown, "variants", f"some of {VARIANTS}")
    check(not set(recipe.single_seed) - set(VARIANTS), "single_seed", f"some of {VARIANTS}")
    try:
        mrl.check_nesting(recipe.nesting, recipe.features)
    except ValueError as error:
        raise UsageError(f"config.{name}.nesting: {error}") from None
    check("late" not in recipe.variants or len(recipe.nesting) >= 2, "nesting", "2 sizes for late")
    if "uniform" in recipe.variants:
        most = recipe.features - recipe.nesting[0] + 1
        check(2 <= recipe.uniform_count <= most, "uniform_count", f"in 2..{most}")
    tuned = set(FINETUNED) & set(recipe.variants)
    check(not tuned or "ff" in recipe.variants, "variants", "with ff, from which fine-tuned models start")
    check(not tuned or recipe.finetune_updates >= 1, "finetune_updates", "at least 1")
    check(not tuned or recipe.finetune_rate > 0, "finetune_rate", "above 0")
    if contrastive := {"contrastive", "contrastive_ff"} & set(recipe.variants):
        check(recipe.contrastive_updates >= 1, "contrastive_updates", "at least 1")
        check(recipe.temperature > 0, "temperature", "above 0")
        check(set(recipe.contrastive_sizes) <= set(recipe.nesting), "contrastive_sizes", f"some of {recipe.nesting}")
    check("slim" not in recipe.variants or recipe.features % 4 == 0, "features", "a multiple of 4 for slim")
    slim_layers = "slim" not in recipe.variants or all(units % 4 == 0 for units in recipe.get("hidden", ()))
    require(slim_layers, f"{name}.hidden", recipe.get("hidden"), "multiples of 4 for slim")
    check(all(weight >= 0 for weight in recipe.boost), "boost", "at least 0 each")
    shape = shape_of(recipe)
    check(recipe.batch_size <= shape.train, "batch_size", f"at most the {shape.train} images")
    check(recipe.neighbours <= shape.train, "neighbours", f"at most the {shape.train} images")
    in_range = all(1 <= k <= shape.train for k in recipe.depths)
    check(recipe.depths and in_range, "depths", f"some of 1..{shape.train}")
    check(not recipe.splits or 1 <= recipe.calibration < shape.test, "calibration", f"in 1..{shape.test - 1}")
    check(not recipe.shots or min(recipe.shots) >= 1, "shots", "at least 1 each")
    _check_ways(name, recipe, shape.train)
    check(not contrastive or recipe.neighbours, "neighbours", "at least 1: contrastive models have no other measure")
    if crops:
        _check_large(check, recipe)


def _check_ways(name: str, recipe: ConfigDict, items: int) -> None:
    adaptive = [((small, large), (k, k), 0) for small, large, k in recipe.adaptive]
    funnels = [((small, *dims), (lengths[0], *lengths), recipe.neighbours) for small, dims, lengths in recipe.funnels]
    for field, ways in (("adaptive", adaptive), ("funnels", funnels)):
        for dims, lengths, least in ways:
            try:
                mrl.check_funnel(dims, lengths, recipe.features, items)
            except ValueError as error:
                raise UsageError(f"config.{name}.{field}: {error}") from None
            long_enough = lengths[-1] >= max(least, recipe.neighbours)
            require(long_enough, f"{name}.{field}", recipe[field], f"lists of at least {recipe.neighbours}")
    try:
        ways_of(recipe)
    except ValueError as error:
        raise UsageError(f"config.{name}: {error}") from None
    searched = recipe.neighbours or not (recipe.adaptive or recipe.funnels)
    require(searched, f"{name}.neighbours", recipe.neighbours, "at least 1 for adaptive retrieval and funnels")


def _check_large(check: Callable[[Any, str, str], None], recipe: ConfigDict) -> None:
    if recipe.encoder == "resnet":
        outputs = recipe.width * 2 ** (len(recipe.stage_sizes) - 1) * (4 if recipe.bottleneck else 1)
        check(recipe.features == outputs, "features", f"{outputs}, what the stages give")
        check("slim" not in recipe.variants or recipe.width % 4 == 0, "width", "a multiple of 4 for slim")
    else:
        check("slim" not in recipe.variants, "variants", "without slim for a vit")
        check(
            recipe.num_heads >= 1 and recipe.features % recipe.num_heads == 0, "num_heads", "a divisor of the features"
        )
        check(recipe.num_layers >= 2 and recipe.mlp_units >= 1, "num_layers", "at least 2, with mlp_units")
        same = set(recipe.sides) == {recipe.test_side} and recipe.test_side % recipe.patch == 0
        check(same, "sides", "those of the tests, a multiple of the patch: a ViT's positions belong to one size")
    budgets = [("updates", "epochs")]
    budgets += [("finetune_updates", "finetune_epochs")] if set(FINETUNED) & set(recipe.variants) else []
    budgets += [("contrastive_updates", "epochs")] if "contrastive" in recipe.variants else []
    for updates, epochs in budgets:
        whole = recipe[epochs] >= 1 and recipe[updates] % recipe[epochs] == 0
        check(whole, epochs, f"a divisor of {updates}={recipe[updates]}")
    check(0 < recipe.warmup < 1, "warmup", "in (0, 1)")
    check(recipe.dtype in ("float32", "bfloat16"), "dtype", "float32 or bfloat16")
    check(0 < recipe.test_crop <= 1, "test_crop", "in (0, 1]")
    check(len(recipe.sides) == 2 and 1 <= recipe.sides[0] <= recipe.sides[1], "sides", "two sides that do not shrink")
    check(len(recipe.ramp) == 2 and recipe.ramp[0] < recipe.ramp[1], "ramp", "two epochs that rise")


def programs(config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """The jitted programs of the run on a mesh and their abstract arguments: `name -> (function, arguments)`.

    Only shapes matter here, so zeros stand for the images and no file is read. What is measured of lists, features and
    logits is computed on one device: its arguments lie whole on each.
    """
    check_config(config)
    jitted: dict[str, tuple[Callable, tuple]] = {}
    for name in config.datasets:
        make = _population_programs if config[name].encoder == "mlp" else _single_programs
        for family in families(config[name]):
            jitted |= {f"{name}/{family}/{what}": program for what, program in make(name, family, config, mesh).items()}
        for programs_of in (_search_programs, _measure_programs):
            jitted |= {f"{name}/{what}": program for what, program in programs_of(config[name], mesh).items()}
    return jitted


def _embed_programs(family: str, recipe: ConfigDict, model: tuple[Any, Any], batch: Any) -> dict[str, Any]:
    found = {"embed": (make_embed(family, recipe, family != "contrastive"), (*model, batch))}
    if recipe.neighbours or recipe.shots:
        found["embed_database"] = (make_embed(family, recipe, heads=False), (*model, batch))
    return found


def _population_programs(name: str, family: str, config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    recipe = recipe_of(family, config[name])
    shape, whole = shape_of(recipe), NamedSharding(mesh, PartitionSpec())
    images, labels = np.zeros((shape.train, *shape.image), np.uint8), np.zeros(shape.train, np.int32)
    setup = set_up_population(family, images, labels, recipe, config.seed, mesh, abstractly)
    shardings = state_shardings(setup.state, mesh, POPULATION_RULES)
    updates = update_program(setup.train_step, setup.batches, recipe.updates_per_call, shardings)
    model = jax.eval_shape(lambda state: member((state.params, state.extra), 0), setup.state)
    split = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.ShapeDtypeStruct((embedded_rows(recipe, mesh), *shape.image), np.uint8, sharding=split)
    arguments = (abstract(setup.state, shardings), *abstract((setup.keys, setup.batches.data), whole))
    return {"updates": (updates, arguments), **_embed_programs(family, recipe, abstract(model, whole), batch)}


def _single_programs(name: str, family: str, config: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    recipe = recipe_of(family, config[name])
    shape = shape_of(recipe)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    row = rows_of(family, recipe)[0]
    state = jax.eval_shape(lambda: single_state(row, family, recipe, config.seed, jit=jax.jit))
    shardings = state_shardings(state, mesh)

    def batch(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape.image), np.uint8, sharding=split)

    labels = jax.ShapeDtypeStruct((recipe.batch_size,), np.int32, sharding=split)
    arguments = (
        abstract(state, shardings),
        {"image": batch(recipe.batch_size), "label": labels},
        abstract(jax.random.key(0), whole),
    )
    found: dict[str, tuple[Callable, tuple]] = {}
    for side, _ in crop_sides(recipe):
        step = single_step(family, recipe, side)
        update = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
        found[f"update_{side}"] = (update, arguments)
    model = abstract((state.params, state.extra), whole)
    return found | _embed_programs(family, recipe, model, batch(embedded_rows(recipe, mesh)))


def _search_programs(recipe: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """What `_matryoshka_study` searches with; exact search at the largest size, those at the others read less."""
    if not recipe.neighbours:
        return {}
    shape = shape_of(recipe)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    rows = rows_of_a_device(shape.train, mesh) * mesh.shape["data"]
    queries = jax.ShapeDtypeStruct((shape.test, recipe.features), jnp.float32, sharding=whole)
    database = jax.ShapeDtypeStruct((rows, recipe.features), jnp.float32, sharding=split)
    searched = (queries, database)
    found = {"search": (search_program(recipe.features, depth_of(recipe), shape.train, mesh), searched)}
    if "mrl" in recipe.variants:
        for name, way in ways_of(recipe).items():
            k = way.lengths[0]
            listed = jax.ShapeDtypeStruct((shape.test, k), jnp.int32, sharding=whole)
            found[f"{name}/search"] = (search_program(way.small, k, shape.train, mesh), searched)
            found[f"{name}/order"] = (funnel_program(way.dims, way.lengths, mesh), (listed, *searched))
    if "ff" in recipe.variants:
        projection = jax.ShapeDtypeStruct((recipe.features, recipe.features), jnp.float32, sharding=whole)
        found["svd_projection"] = (jax.jit(partial(svd_projection, k=min(shape.train, recipe.features))), (database,))
        found["project"] = (project, (database, projection))
    return found


def _measure_programs(recipe: ConfigDict, mesh: Mesh) -> dict[str, tuple[Callable, tuple]]:
    """What `_matryoshka_study` computes of lists, features and logits, at the largest size."""
    shape, variants, whole = shape_of(recipe), set(recipe.variants), NamedSharding(mesh, PartitionSpec())

    def numbers(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=whole)

    def integers(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=whole)

    found: dict[str, tuple[Callable, tuple]] = {}
    labels, queries = integers(shape.train), numbers(shape.test, recipe.features)
    if recipe.neighbours:
        depths = (recipe.neighbours, *recipe.depths)
        listed = integers(shape.test, depth_of(recipe))
        found["measures"] = (jax.jit(partial(measures_of, depths=depths)), (listed, labels, integers(shape.test)))
    if recipe.shots and variants & {"mrl", "ff"}:
        examples = shape.classes * max(recipe.shots)  # where every class has so many
        support = numbers(recipe.draws, examples, recipe.features)
        few = jax.jit(partial(nearest_means, classes=shape.classes, m=recipe.features))
        found["few_shot"] = (few, (support, integers(examples), queries, numbers(len(recipe.shots), examples)))
    if recipe.probe_updates and "ff" in variants:
        probe = jax.jit(partial(probed, classes=shape.classes, num_steps=recipe.probe_updates))
        masks, database = numbers(len(recipe.nesting), recipe.features), numbers(shape.train, recipe.features)
        found["random_lp"] = (probe, (masks, database, queries, labels))
    if recipe.splits and variants & {"mrl", "mrl_e"}:
        logits = numbers(len(recipe.nesting), shape.test, shape.classes)
        found["answers"] = (answers_of, (logits, logits if recipe.mirror else None))
    return found


def run(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains and measures all models of every data set, draws the figures; returns the numbers."""
    check_config(config)
    found, metrics = run.load(config.datasets, lambda name: load_images(config[name], config.seed))
    for name, data in found.items():
        metrics |= study(name, data, config, run)
    drawn = [name for name in found if "mrl" in config[name].variants]
    searched = [name for name in drawn if config[name].neighbours]
    for name in searched:
        end = "" if len(searched) == 1 else f"_{name}"
        run.figure(f"accuracy{end}", draw_accuracy(metrics, name, config))
        run.figure(f"retrieval{end}", draw_retrieval(metrics, name, config))
        run.figure(f"interpolation{end}", draw_interpolation(metrics, name, config))
        run.figure(f"ablations{end}", draw_ablations(metrics, name, config))
        run.figure(f"further{end}", draw_further(metrics, name, config))
    if cascades := [name for name in drawn if config[name].splits]:
        run.figure("cascade", draw_cascade(metrics, cascades, config))
    return metrics


SIZES = (4, 8, 16, 32, 64, 128, 256)  # of the claims on Omniglot
FASHION_SIZES = (2, 4, 8, 16, 32, 64)
ADAPTIVE, FUNNEL = "16_to_256", "funnel_16"
WAYS = (ADAPTIVE, "8_to_256", FUNNEL, "funnel_8")


def _by_size(metrics: Metrics, variant: str, what: str, sizes: tuple[int, ...]) -> np.ndarray:
    """(sizes, seeds)."""
    return np.stack([measured(metrics, f"omniglot/{variant}/{what}/{m}") for m in sizes])


def _ahead(metrics: Metrics, what: str, least: int, rival: str = "ff") -> np.ndarray:
    """(sizes, seeds) of MRL less the rival, from a size on."""
    sizes = tuple(m for m in SIZES if m >= least)
    return _by_size(metrics, "mrl", what, sizes) - _by_size(metrics, rival, what, sizes)


def _one_model_is_all(metrics: Metrics) -> bool:
    linear = _ahead(metrics, "top1", 8)
    seeds = linear.shape[1] >= 2
    near = linear.mean() >= -1.0 and linear.min() >= -3.0
    return bool(seeds and near and _ahead(metrics, "nn", 32).mean() >= 0.5 and _ahead(metrics, "map", 32).mean() >= 1.0)


def _means(values: np.ndarray) -> str:
    """Over the seeds, of each size."""
    return each(values.mean(axis=1), ".1f")


def _one_model_text(metrics: Metrics) -> str:
    linear, nn, mean_average = (_ahead(metrics, *which) for which in (("top1", 8), ("nn", 32), ("map", 32)))
    rows = [
        f"{name} {_means(_by_size(metrics, variant, 'top1', SIZES))}"
        for name, variant in (("MRL", "mrl"), ("FF", "ff"))
    ]
    small = _ahead(metrics, "nn", 8)[0]
    return (
        f"top-1 at m = 4..256: {'; '.join(rows)}; difference m >= 8 {linear.mean():+.2f}, least {linear.min():+.1f}; "
        f"m >= 32: 1-NN {nn.mean():+.2f}, mAP@10 {mean_average.mean():+.2f} ({linear.shape[1]} seeds); "
        f"1-NN at m = 8 {small.mean():+.1f}"
    )


def _against_compression(metrics: Metrics) -> dict[str, np.ndarray]:
    """MRL less what it is compared with, one number a seed."""
    rivals = np.max([_by_size(metrics, rival, "nn", (8,))[0] for rival in ("svd", "random_fs", "jl")], axis=0)
    return {
        "top-1 at 8, SVD": _ahead(metrics, "top1", 8, "svd")[0],
        "1-NN at 8, the best of SVD, first features, JL": _by_size(metrics, "mrl", "nn", (8,))[0] - rivals,
        "top-1 at 16, SVD": _ahead(metrics, "top1", 16, "svd")[0],
    }


def _compression_is_no_substitute(metrics: Metrics) -> bool:
    ahead = _against_compression(metrics).values()
    return all(bool(row.min() >= margin) for row, margin in zip(ahead, (20, 10, 8), strict=True))


def _compression_text(metrics: Metrics) -> str:
    rows = _against_compression(metrics).items()
    return "; ".join(f"{name}: {each(row, '+.1f')}" for name, row in rows)


def _way(metrics: Metrics, way: str) -> tuple[np.ndarray, float]:
    """(1-NN and mAP, seeds) of a way of retrieval, and its MFLOPs a query."""
    found = np.stack([measured(metrics, f"omniglot/retrieval/{way}/{what}") for what in ("nn", "map")])
    return found, float(measured(metrics, f"omniglot/retrieval/{way}/mflops")[0])


def _single_shot(metrics: Metrics, mflops: float) -> np.ndarray:
    """(1-NN and mAP, seeds) of exact search at a cost, between the sizes by interpolation."""
    size = 1e6 * mflops / float(metrics["omniglot/items"])
    curves = [_by_size(metrics, "mrl", what, SIZES).T for what in ("nn", "map")]
    return np.array([[mrl.interpolated(SIZES, row, size) for row in seeds] for seeds in curves])


def _adaptive_is_as_good(metrics: Metrics) -> bool:
    full = mrl.search_mflops(int(metrics["omniglot/items"]), SIZES[-1])
    best = _single_shot(metrics, full)
    cheap = [_way(metrics, way)[1] <= full / 8 for way in (ADAPTIVE, FUNNEL)]
    good = [np.all(_way(metrics, way)[0] >= best - 0.5) for way in (ADAPTIVE, FUNNEL)]
    above = [np.all(found > _single_shot(metrics, mflops)) for found, mflops in (_way(metrics, way) for way in WAYS)]
    return all(map(bool, (*cheap, *good, *above)))


def _adaptive_text(metrics: Metrics) -> str:
    full = mrl.search_mflops(int(metrics["omniglot/items"]), SIZES[-1])
    parts = [f"single-shot 256: {' / '.join(f'{v:.2f}' for v in _single_shot(metrics, full).mean(axis=1))}"]
    for way in WAYS:
        found, mflops = _way(metrics, way)
        parts.append(f"{way}: {' / '.join(f'{v:.2f}' for v in found.mean(axis=1))} at {full / mflops:.1f}x less")
    return f"top-1 / mAP@10: {'; '.join(parts)} ({found.shape[1]} seeds)"


def _tied_distance(metrics: Metrics) -> np.ndarray:
    """Mean over m >= 16 of |MRL-E - MRL|, one number a seed."""
    return np.abs(_ahead(metrics, "top1", 16, "mrl_e")).mean(axis=0)


def _tied_text(metrics: Metrics) -> str:
    small = -_ahead(metrics, "top1", 4, "mrl_e").mean(axis=1)
    return (
        f"mean |MRL-E - MRL| over m >= 16: {each(_tied_distance(metrics), '.1f')}; "
        f"MRL-E {_means(_by_size(metrics, 'mrl_e', 'top1', SIZES))}; at m = 4 {small[0]:+.1f}, at 8 {small[1]:+.1f}"
    )


BETWEEN = tuple(m for m in mrl.sizes_between(SIZES) if m > 8)


def _between(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
    """(sizes between, seeds) 1-NN, and (sizes, seeds) of the sizes around them."""
    return _by_size(metrics, "mrl", "nn", BETWEEN), _by_size(metrics, "mrl", "nn", SIZES[1:])


def _interpolates(metrics: Metrics) -> bool:
    middle, ends = _between(metrics)
    low, high = np.minimum(ends[:-1], ends[1:]), np.maximum(ends[:-1], ends[1:])
    return bool(np.all((low - 1.0 <= middle) & (middle <= high + 1.0)))


def _interpolation_text(metrics: Metrics) -> str:
    middle, ends = _between(metrics)
    return f"1-NN at {BETWEEN}: {_means(middle)} between {_means(ends)} ({middle.shape[1]} seeds)"


def _fashion(metrics: Metrics, what: str) -> np.ndarray:
    """Means over the splits, one number a seed."""
    return np.atleast_2d(np.asarray(metrics[f"fashion/cascade_mrl/{what}"], float)).mean(axis=1)


def _cascade_is_small(metrics: Metrics) -> bool:
    accuracy, size = _fashion(metrics, "accuracy/64"), _fashion(metrics, "expected/64")
    heads = np.stack([_fashion(metrics, f"head/{m}") for m in FASHION_SIZES])
    between = [float(mrl.interpolated(FASHION_SIZES, row, m)) for row, m in zip(heads.T, size, strict=True)]
    good = (accuracy >= heads[-1] - 0.4) & (size <= 6.4) & (accuracy >= heads[0] + 1.5) & (accuracy >= between)
    return bool(np.all(good))


def _cascade_text(metrics: Metrics) -> str:
    accuracy, size = _fashion(metrics, "accuracy/64"), _fashion(metrics, "expected/64")
    heads = "; ".join(f"{m}: {_fashion(metrics, f'head/{m}').mean():.2f}" for m in FASHION_SIZES)
    pairs = ", ".join(f"{a:.2f} at expected size {m:.2f}" for a, m in zip(accuracy, size, strict=True))
    return f"{pairs}; heads {heads}; oracle {measured(metrics, 'fashion/cascade_mrl/oracle').mean():.1f}"


CLAIMS = (
    Claim(
        "one_model",
        "Figs. 2, 3, Tables 1, 2",
        "Omniglot, the same budget, 2 seeds or more: the mean over m >= 8 of top-1 of MRL less that of the model "
        "trained for m is at least -1.0, none (of any seed) is below -3; the mean over m >= 32 is at least +0.5 for "
        "1-NN and +1 for mAP@10",
        "66.6 against 65.3 at m = 8, 76.8 against 76.9 at 2048",
        _one_model_text,
        _one_model_is_all,
    ),
    Claim(
        "compression",
        "Tables 1, 2",
        "in every seed: at m = 8 top-1 of MRL is 20 points above the truncated SVD of the full model's head, its 1-NN "
        "10 above the best of SVD, first features and random projection; at m = 16 top-1 is 8 above the SVD",
        "at m = 8: MRL 66.6, SVD 2.3, random features 4.6",
        _compression_text,
        _compression_is_no_substitute,
    ),
    Claim(
        "retrieval",
        "Fig. 8",
        "in every seed: 100 neighbours by 16 features re-ranked at 256, and the funnel 16 to 256, are at most 0.5 "
        "points below exact search at 256 in top-1 and mAP@10, at 1/8 of its MFLOPs a query or less; all four adaptive "
        "ways are above exact search at equal MFLOPs",
        "16, re-ranked at 2048: as accurate as 2048 at 128 times fewer FLOPs",
        _adaptive_text,
        _adaptive_is_as_good,
    ),
    Claim(
        "tied",
        "Sec. 4.2",
        "in every seed the mean over m >= 16 of |top-1 of MRL-E less that of MRL| is at most 2.0 points",
        "within 1 % from m = 16 on",
        _tied_text,
        lambda metrics: bool(np.all(_tied_distance(metrics) <= 2.0)),
    ),
    Claim(
        "interpolation",
        "Fig. 5, Table 8",
        "in every seed 1-NN at m = 12, 24, 48, 96, 192 lies between that of the trained sizes beside it, give or take "
        "1.0",
        "untrained sizes lie on the curve",
        _interpolation_text,
        _interpolates,
    ),
    Claim(
        "cascade",
        "Figs. 6, 7",
        "Fashion-MNIST, means of 10 splits, in every seed: with all exits the accuracy is at most 0.4 points below the "
        "64-d head at an expected size of at most 6.4, at least 1.5 above the 2-d head, and at least that of the heads "
        "interpolated at the expected size",
        "76.3 % at an expected size of 37, as FF-512",
        _cascade_text,
        _cascade_is_small,
    ),
)
