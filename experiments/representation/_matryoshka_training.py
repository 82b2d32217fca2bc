"""Training of Matryoshka's models and their rivals.

A part of `matryoshka`. A family is what trains in one program: MRL and its boosted importance; MRL-E; MRL with other
sizes; the fixed features FF-m of all sizes (one network with the features from m on masked, which is FF-m exactly); the
slimmable network; MRL by fine-tuning FF-d, a family for each number of layers that learn (App. K.1); contrastive MRL
with its rivals of one size, whose importance is 0 elsewhere (App. C). Small encoders (MLP) train together under `vmap`,
all seeds; ResNets and ViTs one by one, their batches split over the mesh. All models of a seed see the same images,
changed in the same way, in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.representation._matryoshka_data import augment, centre_crop, epoch_rows, pixels, shape_of
from jaxpapers.data.images import ImageData
from jaxpapers.data.windows import host_batches
from jaxpapers.nn.resnet import ResNet
from jaxpapers.nn.vit import ViT
from jaxpapers.representation.matryoshka import (
    NestedHead,
    SlimmableMLP,
    init_slimmable,
    keep_first,
    nested_contrastive,
    nested_cross_entropy,
    slimmable_features,
    uniform_sizes,
)
from jaxpapers.train import (
    POPULATION_RULES,
    LossFn,
    OnDevice,
    TrainState,
    TrainStep,
    batch_part,
    create_population,
    create_state,
    jit_once,
    make_optimizer,
    make_train_step,
    member,
    member_keys,
    place_batch,
    to_host,
    vmap_step,
)

# Family -> its variants, which differ in numbers alone; a family that starts from another's models comes later.
FAMILIES = {
    "mrl": ("mrl", "mrl_boost"),
    "mrl_e": ("mrl_e",),
    "uniform": ("uniform",),
    "late": ("late",),
    "ff": ("ff",),
    "slim": ("slim",),
    "finetuned_0": ("finetuned_0",),
    "finetuned_1": ("finetuned_1",),
    "finetuned_2": ("finetuned_2",),
    "contrastive": ("contrastive", "contrastive_ff"),
}
# Family -> how many of the encoder's last layers learn with the new heads.
FINETUNED = {"finetuned_0": 0, "finetuned_1": 1, "finetuned_2": 2}
ONE_SIZE = ("ff", "contrastive_ff")  # variants whose models are trained for one size each
ENCODERS = ("mlp", "resnet", "vit")
VARIANTS = tuple(variant for variants in FAMILIES.values() for variant in variants)
SLIM_WIDTHS = (0.25, 0.5, 0.75, 1.0)
SCHEDULES = ("one_cycle", "triangle")


class Row(NamedTuple):
    """A model: its variant, the size of its features (of one size: m; others: all) and its seed."""

    variant: str
    size: int
    seed: int


def families(recipe: ConfigDict) -> list[str]:
    """Those with a variant that the recipe wants."""
    return [family for family, variants in FAMILIES.items() if set(variants) & set(recipe.variants)]


def rows_of(family: str, recipe: ConfigDict) -> list[Row]:
    """The models of a family."""
    variants = [variant for variant in FAMILIES[family] if variant in recipe.variants]
    sizes = {"ff": recipe.nesting, "contrastive_ff": recipe.contrastive_sizes}
    rows = []
    for variant in variants:
        seeds = range(1 if variant in recipe.single_seed else recipe.num_seeds)
        rows += [Row(variant, m, seed) for m in sizes.get(variant, (recipe.features,)) for seed in seeds]
    return rows


def recipe_of(family: str, recipe: ConfigDict) -> ConfigDict:
    """The recipe with the budget of a family: fine-tuned and contrastive models have their own."""
    own = recipe.copy_and_resolve_references()
    if family in FINETUNED:
        own.updates, own.rate = recipe.finetune_updates, recipe.finetune_rate
        if recipe.encoder != "mlp":  # from the start at the resolution at which the encoder's training ended
            own.epochs, own.sides = recipe.finetune_epochs, (recipe.sides[1],) * 2
    elif family == "contrastive":
        own.updates = recipe.contrastive_updates
    return own


def nesting_of(family: str, recipe: ConfigDict) -> tuple[int, ...]:
    """Sizes of the heads that are trained."""
    match family:
        case "ff":
            return (recipe.features,)
        case "uniform":
            return uniform_sizes(recipe.features, recipe.uniform_count, recipe.nesting[0])
        case "late":
            return tuple(recipe.nesting[1:])
        case "slim":
            return tuple(round(width * recipe.features) for width in SLIM_WIDTHS)
        case _:
            return tuple(recipe.nesting)


def networks(family: str, recipe: ConfigDict) -> tuple[SlimmableMLP | ResNet | ViT, NestedHead]:
    """Encoder and head."""
    head = NestedHead(shape_of(recipe).classes, nesting_of(family, recipe), tied=family in ("mrl_e", "slim"))
    if recipe.encoder == "mlp":
        return SlimmableMLP(tuple(recipe.hidden), recipe.features), head
    dtype = jnp.dtype(recipe.dtype)
    if recipe.encoder == "vit":
        layers = recipe.num_layers, recipe.num_heads, recipe.mlp_units
        return ViT(recipe.patch, recipe.features, *layers, dtype=dtype), head
    blocks = tuple(recipe.stage_sizes), recipe.bottleneck, recipe.width
    return ResNet(*blocks, recipe.stem, recipe.blur, dtype=dtype), head


def encoder_layers(recipe: ConfigDict) -> list[str]:
    """Regular expressions of the encoder's layers (residual networks: blocks), the first one first."""
    match recipe.encoder:
        case "mlp":
            return [rf"(kernel|bias|norm)_{index}(/|$)" for index in range(len(recipe.hidden) + 1)]
        case "resnet":
            blocks = [(stage, index) for stage, count in enumerate(recipe.stage_sizes) for index in range(count)]
            return ["stem(_norm)?/", *(f"stage{stage}_block{index}/" for stage, index in blocks)]
        case _:
            first, last = [r"(patches|positions|class_token)(/|$)"], recipe.num_layers - 1
            blocks = [f"blocks/layers_{index}/" for index in range(last)]
            return [*first, *blocks, f"(blocks/layers_{last}|norm)/"]


def importance_of(row: Row, family: str, recipe: ConfigDict) -> np.ndarray:
    """c_m of a model."""
    weights = np.ones(len(nesting_of(family, recipe)), np.float32)
    if row.variant == "contrastive_ff":
        return np.float32([m == row.size for m in nesting_of(family, recipe)])
    if row.variant == "mrl_boost":
        boosted = recipe.boost[: len(weights)]
        weights[: len(boosted)] = boosted
    return weights


def encoder_input(recipe: ConfigDict, side: int = 0) -> jax.ShapeDtypeStruct:
    """One image as the encoder takes it."""
    height, width, channels = shape_of(recipe).image
    if recipe.encoder == "mlp":
        return jax.ShapeDtypeStruct((1, height * width * channels), jnp.float32)
    return jax.ShapeDtypeStruct((1, side or height, side or width, channels), jnp.float32)


def initialiser(family: str, recipe: ConfigDict) -> Callable[[Array], tuple[Any, Any]]:
    """`key -> (params, batch statistics)`; all families start a seed's encoder with the same numbers."""
    encoder, head = networks(family, recipe)

    def init(key: Array) -> tuple[Any, Any]:
        # A convolution's parameters do not depend on the image's size, a ViT's positions do.
        x = jnp.zeros(encoder_input(recipe, recipe.sides[0] if recipe.encoder == "vit" else 32).shape)
        encoder_key, head_key = jax.random.split(key)
        if family == "slim":
            variables = init_slimmable(encoder, SLIM_WIDTHS, encoder_key, x)
        else:
            variables = encoder.init(encoder_key, x)
        params = {"encoder": variables["params"]}
        if family != "contrastive":
            params["head"] = head.init(head_key, jnp.zeros((1, recipe.features)))["params"]
        return params, variables.get("batch_stats", {})

    return init


def represent(
    family: str, recipe: ConfigDict, params: Any, extra: Mapping[str, Any], x: Array, train: bool
) -> tuple[list[Array], Any]:
    """Features of each width that is no other's part, and the running statistics."""
    encoder, _ = networks(family, recipe)
    statistics = extra["batch_stats"]
    variables = {"params": params["encoder"], "batch_stats": statistics}
    if family == "slim":
        return slimmable_features(encoder, SLIM_WIDTHS, variables, x, train)
    if train and statistics and family not in FINETUNED:  # a fine-tuned encoder keeps its statistics
        z, changed = encoder.apply(variables, x, train=True, mutable="batch_stats")
        return [z], changed["batch_stats"]
    return [encoder.apply(variables, x)], statistics


def logits_of(family: str, recipe: ConfigDict, params: Any, extra: Mapping[str, Any], parts: list[Array]) -> Array:
    """Of all heads (sizes, batch, classes)."""
    if family == "slim":
        kernel, bias = params["head"]["kernel"], params["head"]["bias"]
        return jnp.stack([z @ kernel[: z.shape[1]] + bias for z in parts])
    _, head = networks(family, recipe)
    seen = keep_first(parts[0], extra["size"]) if family == "ff" else parts[0]
    return head.apply({"params": params["head"]}, seen)


def loss_of(family: str, recipe: ConfigDict, side: int = 0) -> LossFn:
    """Eq. 1 on batches {"image", "label"}: numbers that were changed already (MLP), or bytes that are cropped here.

    Contrastive: Eq. 1 with InfoNCE of two views of every image, {"image", "other"}, or two crops.
    """
    flat = recipe.encoder == "mlp"

    def loss_fn(params: Any, extra: Any, batch: dict[str, Array], key: Array) -> tuple:
        x = batch["image"] if flat else augment(recipe, key, pixels(batch["image"]), side)
        parts, statistics = represent(family, recipe, params, extra, x, train=True)
        logits = logits_of(family, recipe, params, extra, parts)
        loss = nested_cross_entropy(logits, batch["label"], extra["importance"], recipe.label_smoothing)
        accuracy = jnp.mean(jnp.argmax(logits[-1], axis=-1) == batch["label"])
        return loss, ({**extra, "batch_stats": statistics}, {"accuracy": accuracy})

    def contrastive(params: Any, extra: Any, batch: dict[str, Array], key: Array) -> tuple:
        if flat:
            views = [batch["image"], batch["other"]]
        else:
            views = [augment(recipe, each, pixels(batch["image"]), side) for each in jax.random.split(key)]
        (z,), statistics = represent(family, recipe, params, extra, jnp.concatenate(views), train=True)
        u, v = jnp.split(z, 2)
        loss = nested_contrastive(u, v, nesting_of(family, recipe), recipe.temperature, extra["importance"])
        return loss, ({**extra, "batch_stats": statistics}, {})

    return contrastive if family == "contrastive" else loss_fn


def learning_rate(recipe: ConfigDict) -> optax.Schedule:
    """One-cycle: by cosines from 1/25 of the rate to all of it at 30%, and to nothing. Triangle: linear up and down."""
    if recipe.schedule == "one_cycle":
        return optax.cosine_onecycle_schedule(recipe.updates, recipe.rate)
    top = recipe.warmup * recipe.updates
    return lambda step: recipe.rate * jnp.interp(step, jnp.array([0, top, recipe.updates]), jnp.array([1e-4, 1.0, 0.0]))


def optimizer_of(family: str, recipe: ConfigDict) -> optax.GradientTransformation:
    """AdamW as PyTorch has it (everything decays), or SGD with momentum 0.9, whose decay spares the norms.

    Of a fine-tuned model the first layers are frozen.
    """
    layers = encoder_layers(recipe)
    still = layers[: len(layers) - FINETUNED[family]] if family in FINETUNED else []
    frozen = [f"^encoder/{layer}" for layer in still]
    if recipe.optimizer == "adamw":
        return make_optimizer("adamw", learning_rate(recipe), frozen=frozen, weight_decay=recipe.weight_decay)

    def decays(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    decay = optax.add_decayed_weights(recipe.weight_decay, decays)
    return optax.chain(decay, make_optimizer("sgd", learning_rate(recipe), frozen=frozen, momentum=0.9))


def fresh_statistics(shapes: Any, models: tuple[int, ...] = ()) -> Any:
    """Means 0 and variances 1, as BatchNorm starts."""
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.full((*models, *leaf.shape), float(path[-1].key == "var"), leaf.dtype), shapes
    )


def extra_of(rows: list[Row], family: str, recipe: ConfigDict) -> dict[str, Any]:
    """What differs between the models of a family, a row each, and their statistics as BatchNorm starts."""
    _, statistics = jax.eval_shape(initialiser(family, recipe), jax.random.key(0))
    return {
        "batch_stats": fresh_statistics(statistics, (len(rows),)),
        "importance": np.stack([importance_of(row, family, recipe) for row in rows]),
        "size": np.array([row.size for row in rows], np.int32),
    }


class Trained(NamedTuple):
    """A trained model, on the host.

    Attributes:
      row: which it is.
      family: of its program.
      params: of encoder and head.
      extra: running statistics, importance, size.
    """

    row: Row
    family: str
    params: Any
    extra: Any


class Population(NamedTuple):
    """What trains the models of a family together.

    Attributes:
      rows: which model is which; the last one is repeated until the devices of a mesh can share them evenly.
      state: before the first update; its `extra` is that of `extra_of`.
      train_step: of the population.
      batches: images, changed at random, and labels, one row a model.
      keys: one a model.
    """

    rows: list[Row]
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array


def set_up_population(
    family: str,
    images: np.ndarray,
    labels: np.ndarray,
    recipe: ConfigDict,
    seed: int,
    mesh: Mesh | None = None,
    jit: Callable[..., Callable] = jit_once,
    pretrained: Mapping[int, Trained] | None = None,
) -> Population:
    """State, update and batches of a family of small networks; fine-tuned ones start from the model of their seed."""
    rows = rows_of(family, recipe)
    devices = mesh.shape["data"] if mesh else 1
    rows += rows[-1:] * (-len(rows) % devices)
    optimizer, init = optimizer_of(family, recipe), initialiser(family, recipe)
    seeds = jax.random.split(jax.random.key(seed), recipe.num_seeds)
    init_keys, data_keys, keys = member_keys(seeds, 3)
    of_seed = np.array([row.seed for row in rows])
    sizes = np.array([row.size for row in rows])
    order = np.stack(
        [epoch_rows(len(images), recipe.batch_size, recipe.updates, seed + index) for index in range(recipe.num_seeds)]
    )

    extra, learned = extra_of(rows, family, recipe), None
    if pretrained:
        models = [pretrained[row_seed] for row_seed in of_seed]
        learned, statistics = (
            jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
            for trees in ([m.params["encoder"] for m in models], [m.extra["batch_stats"] for m in models])
        )
        extra |= {"batch_stats": statistics}

    def start(index: Array) -> Any:
        params, _ = init(init_keys[jnp.asarray(of_seed)[index]])
        if learned is not None:
            params = {**params, "encoder": jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], learned)}
        if family == "ff":  # a head of m inputs starts within 1/sqrt(m), not 1/sqrt(d)
            scale = jnp.sqrt(recipe.features / jnp.asarray(sizes)[index])
            params = {**params, "head": jax.tree.map(lambda leaf: scale * leaf, params["head"])}
        return params

    def batch_at(step: Array, data: tuple[Array, Array, Array]) -> dict[str, Array]:
        order, images, labels = data
        numbers = order[:, step]
        originals = pixels(images[numbers])
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(data_keys)

        def view(keys: Array) -> Array:
            found = jax.vmap(lambda key, part: augment(recipe, key, part))(keys, originals)
            return found.reshape(*found.shape[:2], -1)[of_seed]

        if family == "contrastive":
            others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(step_keys)
            return {"image": view(step_keys), "other": view(others)}
        return {"image": view(step_keys), "label": labels[numbers][of_seed]}

    return Population(
        rows,
        create_population(start, optimizer, jnp.arange(len(rows)), extra, jit),
        vmap_step(make_train_step(loss_of(family, recipe), optimizer)),
        OnDevice(batch_at, (order, images, labels)),
        keys[of_seed],
    )


def single_state(
    row: Row,
    family: str,
    recipe: ConfigDict,
    seed: int,
    pretrained: Mapping[int, Trained] | None = None,
    jit: Callable[..., Callable] = jit_once,
) -> TrainState:
    """One large network before its first update."""
    params, statistics = jit(initialiser(family, recipe))(jax.random.fold_in(jax.random.key(seed), row.seed))
    if pretrained:
        model = pretrained[row.seed]
        params, statistics = {**params, "encoder": model.params["encoder"]}, model.extra["batch_stats"]
    if family == "ff":
        scale = (recipe.features / row.size) ** 0.5
        params = {**params, "head": jax.tree.map(lambda leaf: scale * leaf, params["head"])}
    extra = {"batch_stats": statistics, "importance": importance_of(row, family, recipe), "size": np.int32(row.size)}
    params, extra = jax.tree.map(jnp.array, (params, extra))  # copies: `fit` donates them, others start from them, too
    return create_state(params, optimizer_of(family, recipe), extra)


def single_step(family: str, recipe: ConfigDict, side: int) -> TrainStep:
    """The update of one large network, on crops of a side."""
    return make_train_step(loss_of(family, recipe, side), optimizer_of(family, recipe))


def crop_sides(recipe: ConfigDict) -> list[tuple[int, int]]:
    """(side of the crops, last update with it), in their order: from `sides[0]` to `sides[1]` in steps of 32 pixels.

    Before the ramp's first epoch the smaller side, from its last one on the larger, between them by interpolation.
    """
    epoch = recipe.updates // recipe.epochs
    sides = np.interp(np.arange(recipe.epochs), recipe.ramp, recipe.sides)
    steps = [round(side / 32) * 32 for side in sides] if recipe.sides[1] > recipe.sides[0] else [recipe.sides[0]]
    changes = [index for index, (before, after) in enumerate(pairwise(steps), 1) if before != after]
    return [(steps[last - 1], last * epoch) for last in changes] + [(steps[-1], recipe.updates)]


def train_family(
    name: str, family: str, data: ImageData, config: ConfigDict, run: Run, pretrained: Mapping[int, Trained]
) -> Iterator[Trained]:
    """Trains the models of a family on a data set; yields them in the order of `rows_of`.

    Args:
      name: of the data set.
      family: of `FAMILIES`.
      data: images.
      config: of the run.
      run: keeps checkpoints and metrics.
      pretrained: by seed, where fine-tuned models start.
    """
    recipe = recipe_of(family, config[name])
    before = pretrained if family in FINETUNED else None
    rows = rows_of(family, recipe)
    run.say(f"{name}: {family}, {len(rows)} model{'s' * (len(rows) > 1)}, {recipe.updates:,} updates")
    if recipe.encoder == "mlp":
        images, labels = data.train_images, data.train_labels
        setup = set_up_population(family, images, labels, recipe, config.seed, run.mesh, pretrained=before)
        fitted = run.fit(
            f"{name}_{family}",
            setup.state,
            setup.train_step,
            setup.batches,
            recipe.updates,
            key=setup.keys,
            steps_per_call=recipe.updates_per_call,
            log_every=10 * recipe.updates_per_call,
            rules=POPULATION_RULES if run.mesh else (),
        )
        params, extra = to_host((fitted.state.params, fitted.state.extra))
        for index, row in enumerate(rows):
            yield Trained(row, family, member(params, index), member(extra, index))
        return
    for row in rows:
        state = single_state(row, family, recipe, config.seed, before)
        state = _train_single(name, state, row, family, recipe, data, config.seed, run)
        yield Trained(row, family, *to_host((state.params, state.extra)))


def _train_single(
    name: str, state: TrainState, row: Row, family: str, recipe: ConfigDict, data: ImageData, seed: int, run: Run
) -> TrainState:
    source = {"image": data.train_images, "label": data.train_labels}
    part = batch_part(run.mesh) if run.mesh else (0, 1)
    batches = host_batches(source, recipe.batch_size, seed + row.seed, part=part)
    for side, last in crop_sides(recipe):  # one stage: a later part goes on from the checkpoint of the one before
        fitted = run.fit(
            f"{name}_{row.variant}_{row.size}_{row.seed}",
            state,
            single_step(family, recipe, side),
            batches,
            last,
            key=jax.random.key(seed + row.seed),
            log_every=recipe.updates_per_call,
            checkpoint_every=max(1, recipe.updates // recipe.epochs),
        )
        state = fitted.state
    return state


class Embedded(NamedTuple):
    """What a trained model says of the images, by its running statistics.

    Attributes:
      row: which model it is.
      nesting: sizes of its heads.
      database: features of the training images: an array (images, width) for each width that is no other's part.
      queries: features of the test images, likewise.
      logits: (sizes, test images, classes); None for contrastive models.
      mirrored: of the mirror images; None where they are not asked for.
      head: parameters of the head; None for contrastive models.
    """

    row: Row
    nesting: tuple[int, ...]
    database: list[np.ndarray]
    queries: list[np.ndarray]
    logits: np.ndarray | None
    mirrored: np.ndarray | None
    head: Any


def make_embed(family: str, recipe: ConfigDict, heads: bool = True) -> Callable[[Any, Any, Array], dict[str, Any]]:
    """`(params, extra, images) -> {"parts", "logits", "mirrored"}`, of bytes; jitted.

    Parts are (images, width), logits (images, sizes, classes). Without `heads` the parts alone: what a database needs.
    """

    def prepare(images: Array) -> Array:
        if recipe.encoder == "mlp":
            return pixels(images).reshape(len(images), -1)
        return centre_crop(pixels(images), recipe.test_crop, recipe.test_side)

    def represented(params: Any, extra: Any, images: Array) -> list[Array]:
        return represent(family, recipe, params, extra, prepare(images), train=False)[0]

    def classified(params: Any, extra: Any, parts: list[Array]) -> Array:
        if family != "slim":
            return jnp.moveaxis(logits_of(family, recipe, params, extra, parts), 0, 1)
        # Sizes below a network's own: its first coordinates, the head's first rows.
        kernel, bias = params["head"]["kernel"], params["head"]["bias"]
        narrow = [(m, next(z for z in parts if z.shape[1] >= m)) for m in recipe.nesting]
        return jnp.stack([z[:, :m] @ kernel[:m] + bias for m, z in narrow], axis=1)

    def embed(params: Any, extra: Any, images: Array) -> dict[str, Any]:
        parts = represented(params, extra, images)
        if not heads:
            return {"parts": parts}
        found = {"parts": parts, "logits": classified(params, extra, parts)}
        if recipe.mirror:
            found["mirrored"] = classified(params, extra, represented(params, extra, images[:, :, ::-1]))
        return found

    return jax.jit(embed)


def embedded_rows(recipe: ConfigDict, mesh: Mesh | None) -> int:
    """Images of a batch that is embedded: those of the recipe, or the next number that the devices divide."""
    devices = 1 if mesh is None else mesh.shape["data"]
    return -(-recipe.test_batch // devices) * devices


def embed_images(
    embed: Callable[..., dict[str, Any]], model: Trained, images: np.ndarray, recipe: ConfigDict, mesh: Mesh | None
) -> dict[str, Any]:
    """What `make_embed` says, of all images, batch by batch; on a mesh each batch is split over `data`."""
    size, whole = embedded_rows(recipe, mesh), None
    params, extra = model.params, model.extra
    if mesh is not None:
        params, extra = jax.device_put((params, extra), NamedSharding(mesh, PartitionSpec()))
    for first in range(0, len(images), size):
        batch = np.asarray(images[first : first + size])
        filled = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        index, parts = batch_part(mesh) if mesh is not None else (0, 1)
        rows = filled[index * size // parts : (index + 1) * size // parts]
        found = to_host(embed(params, extra, rows if mesh is None else place_batch(rows, mesh)))
        if whole is None:  # arrays of their final size: ImageNet's features fill 10 GB, and are held once
            whole = jax.tree.map(lambda part: np.empty((len(images), *part.shape[1:]), part.dtype), found)
        for kept, part in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            kept[first : first + len(batch)] = part[: len(batch)]
    assert whole is not None  # there are images
    return whole


def embed_model(
    embed: Callable[..., dict[str, Any]],
    embed_database: Callable[..., dict[str, Any]],
    model: Trained,
    data: ImageData,
    recipe: ConfigDict,
    mesh: Mesh | None,
) -> Embedded:
    """Features and logits of a model; those of the training images where anything is searched among them."""
    tests = embed_images(embed, model, data.test_images, recipe, mesh)
    searched = recipe.neighbours or recipe.shots
    database = embed_images(embed_database, model, data.train_images, recipe, mesh)["parts"] if searched else []
    nesting = tuple(recipe.nesting) if model.family == "slim" else nesting_of(model.family, recipe)
    nesting = (model.row.size,) if model.row.variant in ONE_SIZE else nesting
    logits, mirrored = (np.moveaxis(tests[what], 1, 0) if what in tests else None for what in ("logits", "mirrored"))
    return Embedded(model.row, nesting, database, tests["parts"], logits, mirrored, model.params.get("head"))
