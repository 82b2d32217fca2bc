"""Training of Matryoshka's models and their rivals.

A part of `matryoshka`. A family is what trains in one program: MRL and its boosted importance; MRL-E; MRL with other
sizes; the fixed features FF-m of all sizes (one network with the features from m on masked, which is FF-m exactly); the
slimmable network. Small encoders (MLP) train together under `vmap`, all seeds; residual networks one by one, their
batches split over the mesh. All models of a seed see the same images, changed in the same way, in the same order.
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
from jaxpapers.representation.matryoshka import (
    NestedHead,
    SlimmableMLP,
    init_slimmable,
    keep_first,
    nested_cross_entropy,
    slimmable_features,
    uniform_sizes,
)
from jaxpapers.train import (
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
    place_batch,
    to_host,
    vmap_step,
)

# Family -> its variants; the variants of a family differ in numbers alone.
FAMILIES = {
    "mrl": ("mrl", "mrl_boost"),
    "mrl_e": ("mrl_e",),
    "uniform": ("uniform",),
    "late": ("late",),
    "ff": ("ff",),
    "slim": ("slim",),
}
VARIANTS = tuple(variant for variants in FAMILIES.values() for variant in variants)
SLIM_WIDTHS = (0.25, 0.5, 0.75, 1.0)
POPULATION_RULES = (("", PartitionSpec("data")),)  # on a mesh, every device trains its share of the models
SCHEDULES = ("one_cycle", "triangle")


class Row(NamedTuple):
    """A model: its variant, the size of its features (FF-m: m; others: all) and its seed."""

    variant: str
    size: int
    seed: int


def families(recipe: ConfigDict) -> list[str]:
    """Those with a variant that the recipe wants."""
    return [family for family, variants in FAMILIES.items() if set(variants) & set(recipe.variants)]


def rows_of(family: str, recipe: ConfigDict) -> list[Row]:
    """The models of a family."""
    variants = [variant for variant in FAMILIES[family] if variant in recipe.variants]
    sizes = recipe.nesting if family == "ff" else (recipe.features,)
    return [Row(v, m, seed) for v in variants for m in sizes for seed in range(recipe.num_seeds)]


def nesting_of(family: str, recipe: ConfigDict) -> tuple[int, ...]:
    """Sizes of the heads that are trained."""
    match family:
        case "ff":
            return (recipe.features,)
        case "uniform":
            return uniform_sizes(recipe.features, len(recipe.nesting), recipe.nesting[0])
        case "late":
            return tuple(recipe.nesting[1:])
        case "slim":
            return tuple(round(width * recipe.features) for width in SLIM_WIDTHS)
        case _:
            return tuple(recipe.nesting)


def networks(family: str, recipe: ConfigDict) -> tuple[SlimmableMLP | ResNet, NestedHead]:
    """Encoder and head."""
    head = NestedHead(shape_of(recipe).classes, nesting_of(family, recipe), tied=family in ("mrl_e", "slim"))
    if recipe.encoder == "mlp":
        return SlimmableMLP(tuple(recipe.hidden), recipe.features), head
    blocks = tuple(recipe.stage_sizes), recipe.bottleneck, recipe.width
    return ResNet(*blocks, recipe.stem, recipe.blur, dtype=jnp.dtype(recipe.dtype)), head


def importance_of(row: Row, family: str, recipe: ConfigDict) -> np.ndarray:
    """c_m of a model."""
    weights = np.ones(len(nesting_of(family, recipe)), np.float32)
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
        x = jnp.zeros(encoder_input(recipe, 32).shape)  # a convolution's parameters do not depend on the image's size
        encoder_key, head_key = jax.random.split(key)
        if family == "slim":
            variables = init_slimmable(encoder, SLIM_WIDTHS, encoder_key, x)
        else:
            variables = encoder.init(encoder_key, x)
        params = {
            "encoder": variables["params"],
            "head": head.init(head_key, jnp.zeros((1, recipe.features)))["params"],
        }
        return params, variables["batch_stats"]

    return init


def classify(family: str, recipe: ConfigDict, params: Any, extra: Mapping[str, Any], x: Array, train: bool) -> tuple:
    """Logits of all heads (sizes, batch, classes), features of each width that is no other's part, statistics."""
    encoder, head = networks(family, recipe)
    variables = {"params": params["encoder"], "batch_stats": extra["batch_stats"]}
    if family == "slim":
        parts, statistics = slimmable_features(encoder, SLIM_WIDTHS, variables, x, train)
        kernel, bias = params["head"]["kernel"], params["head"]["bias"]
        return jnp.stack([z @ kernel[: z.shape[1]] + bias for z in parts]), parts, statistics
    if train:
        z, changed = encoder.apply(variables, x, train=True, mutable="batch_stats")
        statistics = changed["batch_stats"]
    else:
        z, statistics = encoder.apply(variables, x), extra["batch_stats"]
    seen = keep_first(z, extra["size"]) if family == "ff" else z
    return head.apply({"params": params["head"]}, seen), [z], statistics


def loss_of(family: str, recipe: ConfigDict, side: int = 0) -> LossFn:
    """Eq. 1 on batches {"image", "label"}: numbers that were changed already (MLP), or bytes that are cropped here."""

    def loss_fn(params: Any, extra: Any, batch: dict[str, Array], key: Array) -> tuple:
        x = batch["image"]
        if recipe.encoder != "mlp":
            x = augment(recipe, key, pixels(x), side)
        logits, _, statistics = classify(family, recipe, params, extra, x, train=True)
        loss = nested_cross_entropy(logits, batch["label"], extra["importance"], recipe.label_smoothing)
        accuracy = jnp.mean(jnp.argmax(logits[-1], axis=-1) == batch["label"])
        return loss, ({**extra, "batch_stats": statistics}, {"accuracy": accuracy})

    return loss_fn


def learning_rate(recipe: ConfigDict) -> optax.Schedule:
    """One-cycle: by cosines from 1/25 of the rate to all of it at 30%, and to nothing. Triangle: linear up and down."""
    if recipe.schedule == "one_cycle":
        return optax.cosine_onecycle_schedule(recipe.updates, recipe.rate)
    top = recipe.warmup * recipe.updates
    return lambda step: recipe.rate * jnp.interp(step, jnp.array([0, top, recipe.updates]), jnp.array([1e-4, 1.0, 0.0]))


def optimizer_of(recipe: ConfigDict) -> optax.GradientTransformation:
    """AdamW as PyTorch has it (everything decays), or SGD with momentum 0.9, whose decay spares the norms."""
    if recipe.optimizer == "adamw":
        return make_optimizer("adamw", learning_rate(recipe), weight_decay=recipe.weight_decay)

    def decays(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    decay = optax.add_decayed_weights(recipe.weight_decay, decays)
    return optax.chain(decay, make_optimizer("sgd", learning_rate(recipe), momentum=0.9))


def fresh_statistics(shapes: Any, models: tuple[int, ...] = ()) -> Any:
    """Means 0 and variances 1, as BatchNorm starts."""
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.full((*models, *leaf.shape), float(path[-1].key == "var"), leaf.dtype), shapes
    )


def extra_of(rows: list[Row], family: str, recipe: ConfigDict) -> dict[str, Any]:
    """What differs between the models of a family, a row each, and their statistics before the first update."""
    _, statistics = jax.eval_shape(initialiser(family, recipe), jax.random.key(0))
    return {
        "batch_stats": fresh_statistics(statistics, (len(rows),)),
        "importance": np.stack([importance_of(row, family, recipe) for row in rows]),
        "size": np.array([row.size for row in rows], np.int32),
    }


class Population(NamedTuple):
    """What trains the models of a family together.

    Attributes:
      rows: which model is which; the last one is repeated until the devices of a mesh can share them evenly.
      state: before the first update.
      train_step: of the population.
      batches: images and labels, one row a model.
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
) -> Population:
    """State, update and batches of a family of small networks."""
    rows = rows_of(family, recipe)
    devices = mesh.shape["data"] if mesh else 1
    rows += rows[-1:] * (-len(rows) % devices)
    optimizer, init = optimizer_of(recipe), initialiser(family, recipe)
    seeds = jax.random.split(jax.random.key(seed), recipe.num_seeds)
    init_keys, data_keys, keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(seeds), 1, 0)
    of_seed = np.array([row.seed for row in rows])
    sizes = np.array([row.size for row in rows])
    order = np.stack(
        [epoch_rows(len(images), recipe.batch_size, recipe.updates, seed + index) for index in range(recipe.num_seeds)]
    )

    def start(index: Array) -> Any:
        params, _ = init(init_keys[jnp.asarray(of_seed)[index]])
        if family == "ff":  # a head of m inputs starts within 1/sqrt(m), not 1/sqrt(d)
            scale = jnp.sqrt(recipe.features / jnp.asarray(sizes)[index])
            params = {**params, "head": jax.tree.map(lambda leaf: scale * leaf, params["head"])}
        return params

    def draw(step: Array) -> dict[str, Array]:
        chosen = jnp.asarray(order)[:, step]
        found = jax.vmap(lambda key, part: augment(recipe, jax.random.fold_in(key, step), pixels(part)))(
            data_keys, jnp.asarray(images)[chosen]
        )
        flat = found.reshape(*found.shape[:2], -1)
        return {"image": flat[of_seed], "label": jnp.asarray(labels)[chosen][of_seed]}

    return Population(
        rows,
        create_population(start, optimizer, jnp.arange(len(rows)), extra_of(rows, family, recipe), jit),
        vmap_step(make_train_step(loss_of(family, recipe), optimizer)),
        OnDevice(draw),
        keys[of_seed],
    )


def single_state(row: Row, family: str, recipe: ConfigDict, seed: int) -> TrainState:
    """One residual network before its first update."""
    params, statistics = initialiser(family, recipe)(jax.random.fold_in(jax.random.key(seed), row.seed))
    if family == "ff":
        scale = (recipe.features / row.size) ** 0.5
        params = {**params, "head": jax.tree.map(lambda leaf: scale * leaf, params["head"])}
    extra = {"batch_stats": statistics, "importance": importance_of(row, family, recipe), "size": np.int32(row.size)}
    return create_state(params, optimizer_of(recipe), jax.tree.map(jnp.asarray, extra))


def single_step(family: str, recipe: ConfigDict, side: int) -> TrainStep:
    """The update of one residual network, on crops of a side."""
    return make_train_step(loss_of(family, recipe, side), optimizer_of(recipe))


def crop_sides(recipe: ConfigDict) -> list[tuple[int, int]]:
    """(side of the crops, last update with it), in their order: from `sides[0]` to `sides[1]` in steps of 32 pixels.

    Before the ramp's first epoch the smaller side, from its last one on the larger, between them by interpolation.
    """
    epoch = recipe.updates // recipe.epochs
    sides = np.interp(np.arange(recipe.epochs), recipe.ramp, recipe.sides)
    steps = [round(side / 32) * 32 for side in sides] if recipe.sides[1] > recipe.sides[0] else [recipe.sides[0]]
    changes = [index for index, (before, after) in enumerate(pairwise(steps), 1) if before != after]
    return [(steps[last - 1], last * epoch) for last in changes] + [(steps[-1], recipe.updates)]


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


def train_family(name: str, family: str, data: ImageData, config: ConfigDict, run: Run) -> Iterator[Trained]:
    """Trains the models of a family on a data set; yields them in the order of `rows_of`."""
    recipe = config[name]
    rows = rows_of(family, recipe)
    run.say(f"{name}: {family}, {len(rows)} model{'s' * (len(rows) > 1)}, {recipe.updates:,} updates")
    if recipe.encoder == "mlp":
        images, labels = data.train_images, data.train_labels
        setup = set_up_population(family, images, labels, recipe, config.seed, run.mesh)
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
        state = _train_single(name, row, family, data, config, run)
        yield Trained(row, family, *to_host((state.params, state.extra)))


def _train_single(name: str, row: Row, family: str, data: ImageData, config: ConfigDict, run: Run) -> TrainState:
    recipe = config[name]
    state = single_state(row, family, recipe, config.seed)
    source = {"image": data.train_images, "label": data.train_labels}
    part = batch_part(run.mesh) if run.mesh else (0, 1)
    batches = host_batches(source, recipe.batch_size, config.seed + row.seed, part=part)
    for side, last in crop_sides(recipe):  # one stage: a later part goes on from the checkpoint of the one before
        fitted = run.fit(
            f"{name}_{row.variant}_{row.size}_{row.seed}",
            state,
            single_step(family, recipe, side),
            batches,
            last,
            key=jax.random.key(config.seed + row.seed),
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
      logits: (sizes, test images, classes).
      mirrored: of the mirror images; None where they are not asked for.
      head: parameters of the head.
    """

    row: Row
    nesting: tuple[int, ...]
    database: list[np.ndarray]
    queries: list[np.ndarray]
    logits: np.ndarray
    mirrored: np.ndarray | None
    head: Any


def make_embed(family: str, recipe: ConfigDict) -> Callable[[Any, Any, Array], dict[str, Any]]:
    """`(params, extra, images) -> {"parts", "logits", "mirrored"}`, of bytes; jitted."""

    def prepare(images: Array) -> Array:
        if recipe.encoder == "mlp":
            return pixels(images).reshape(len(images), -1)
        return centre_crop(pixels(images), recipe.test_crop, recipe.test_side)

    def embed(params: Any, extra: Any, images: Array) -> dict[str, Any]:
        def once(images: Array) -> tuple[Array, list[Array]]:
            logits, parts, _ = classify(family, recipe, params, extra, prepare(images), train=False)
            if family == "slim":  # sizes below a network's own: its first coordinates, the head's first rows
                kernel, bias = params["head"]["kernel"], params["head"]["bias"]
                narrow = [(m, next(z for z in parts if z.shape[1] >= m)) for m in recipe.nesting]
                logits = jnp.stack([z[:, :m] @ kernel[:m] + bias for m, z in narrow])
            return logits, parts

        logits, parts = once(images)
        found = {"parts": parts, "logits": logits}
        return found | ({"mirrored": once(images[:, :, ::-1])[0]} if recipe.mirror else {})

    return jax.jit(embed)


def embed_images(
    embed: Callable[..., dict[str, Any]], model: Trained, images: np.ndarray, recipe: ConfigDict, mesh: Mesh | None
) -> dict[str, Any]:
    """What `make_embed` says, of all images, batch by batch; on a mesh each batch is split over `data`."""
    size, found = recipe.test_batch, []
    params, extra = model.params, model.extra
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        params, extra = jax.device_put((params, extra), whole)
    for first in range(0, len(images), size):
        batch = np.asarray(images[first : first + size])
        filled = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        index, parts = batch_part(mesh) if mesh is not None else (0, 1)
        rows = filled[index * size // parts : (index + 1) * size // parts]
        result = to_host(embed(params, extra, rows if mesh is None else place_batch(rows, mesh)))
        kept = len(batch)
        found.append({k: [z[:kept] for z in v] if k == "parts" else v[:, :kept] for k, v in result.items()})
    joined: dict[str, Any] = {
        "parts": [np.concatenate(parts) for parts in zip(*(f["parts"] for f in found), strict=True)]
    }
    return joined | {k: np.concatenate([f[k] for f in found], axis=1) for k in found[0] if k != "parts"}


def embed_model(
    embed: Callable[..., dict[str, Any]], model: Trained, data: ImageData, recipe: ConfigDict, mesh: Mesh | None
) -> Embedded:
    """Features and logits of a model; those of the training images where anything is searched among them."""
    tests = embed_images(embed, model, data.test_images, recipe, mesh)
    searched = recipe.neighbours or recipe.shots
    database = embed_images(embed, model, data.train_images, recipe, mesh)["parts"] if searched else []
    nesting = tuple(recipe.nesting) if model.family == "slim" else nesting_of(model.family, recipe)
    nesting = (model.row.size,) if model.family == "ff" else nesting
    mirrored = tests.get("mirrored")
    return Embedded(model.row, nesting, database, tests["parts"], tests["logits"], mirrored, model.params["head"])
