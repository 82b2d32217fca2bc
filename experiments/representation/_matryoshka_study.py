"""What is measured of Matryoshka's trained models: classification, retrieval, cascades, few-shot classes.

A part of `matryoshka`. Accuracies are percentages, one number a seed; names of measures are

    <data>/<variant>/top1/<m>           linear classifier on m features
    <data>/<variant>/super/<m>          its superclass (Omniglot: the alphabet)
    <data>/<variant>/nn/<m>, /map/<m>   1-NN accuracy and mAP@k in the training images, k = config.<data>.neighbours
    <data>/<variant>/map@<k>/<m>, /precision@<k>/<m>, /recall@<k>/<m>, /hit@<k>/<m>
    <data>/retrieval/<way>/...          the same measures, as far as the lists go, and /mflops
    <data>/cascade_<variant>/<what>/<m> (seeds, splits): `accuracy`, `expected` and `cumulative` size of the cascade
                                        whose last exit is m; accuracy of this `head` alone
    <data>/cascade_<variant>/thresholds (seeds, splits, heads but the last)
    <data>/cascade_<variant>/oracle/<m> share that any head up to m has right; /oracle: any head
    <data>/cascade_<variant>/majority   accuracy of the class that most heads predict
    <data>/few_shot/<variant>/<m>/<n>   nearest class mean of n examples
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.representation._matryoshka_data import superclasses
from experiments.representation._matryoshka_training import (
    ONE_SIZE,
    Embedded,
    Trained,
    embed_model,
    families,
    make_embed,
    train_family,
)
from jaxpapers.data.images import ImageData
from jaxpapers.representation import matryoshka as mrl
from jaxpapers.train import place, to_host

Scores = defaultdict[str, list[Any]]
MEASURES = ("map", "precision", "recall", "hit")

learn_thresholds = jax.jit(mrl.learn_thresholds)
cascade = jax.jit(mrl.cascade)


class Index(NamedTuple):
    """A database and its queries where they are searched, for all sizes.

    Attributes:
      database: on one device; or its rows split over those of a mesh, with zeros at the end, so that they divide it.
      queries: whole on every device.
      items: rows of the database that count.
      mesh: None for one device.
    """

    database: Array
    queries: Array
    items: int
    mesh: Mesh | None


def make_index(database: np.ndarray, queries: np.ndarray, mesh: Mesh | None) -> Index:
    """Brings both onto the devices; each gets its rows alone, and no second copy is made on the host."""
    items, width = database.shape
    if mesh is None:
        return Index(jnp.asarray(database), jnp.asarray(queries), items, None)
    rows = rows_of_a_device(items, mesh)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        found = database[index[0]]
        return np.pad(found, ((0, rows - len(found)), (0, 0)))

    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.make_array_from_callback((rows * mesh.shape["data"], width), split, part)
    return Index(placed, place(queries, whole), items, mesh)


def rows_of_a_device(items: int, mesh: Mesh) -> int:
    """Rows of a database that each device along `data` has."""
    return -(-items // mesh.shape["data"])


@cache
def search_program(m: int, k: int, items: int, mesh: Mesh | None) -> Callable[[Array, Array], Array]:
    """`(queries, database) -> neighbours` by m coordinates; jitted."""
    if mesh is None:
        return jax.jit(partial(mrl.exact_search, k=k, dim=m))
    return jax.jit(partial(mrl.sharded_search, k=k, mesh=mesh, dim=m, valid=items))


@cache
def funnel_program(
    dims: tuple[int, ...], lengths: tuple[int, ...], mesh: Mesh | None
) -> Callable[[Array, Array, Array], Array]:
    """`(neighbours, queries, database) -> neighbours` by stages; jitted. One stage is adaptive retrieval."""
    return jax.jit(partial(mrl.funnel, dims=dims, lengths=lengths, mesh=mesh))


@jax.jit
def project(rows: Array, projection: Any) -> Array:
    """Rows in other coordinates; they stay where they are."""
    return jnp.matmul(rows, projection, precision="highest")


svd_projection = jax.jit(mrl.svd_projection, static_argnames="k")  # zeros at the end change nothing


def search(index: Index, m: int, k: int) -> np.ndarray:
    """The k nearest by m coordinates, of every query."""
    return to_host(search_program(m, k, index.items, index.mesh)(index.queries, index.database))


def depth_of(recipe: ConfigDict) -> int:
    """Length of the lists that are measured."""
    return max(recipe.neighbours, *recipe.depths)


class Way(NamedTuple):
    """Retrieval in stages.

    Attributes:
      label: for figures.
      small: size by which the lists are made.
      dims: sizes by which they are ordered again.
      lengths: and how long they then are.
    """

    label: str
    small: int
    dims: tuple[int, ...]
    lengths: tuple[int, ...]


def ways_of(recipe: ConfigDict) -> dict[str, Way]:
    """Adaptive retrieval and funnels by name; where names would be the same, the short-list's length follows.

    Raises:
      ValueError: two with the same sizes and the same short-list.
    """
    found = [(f"{a}_to_{b}", Way(f"{a}, re-ranked at {b}", a, (b,), (k,))) for a, b, k in recipe.adaptive]
    for small, dims, lengths in recipe.funnels:
        found.append((f"funnel_{small}", Way(f"funnel from {small}", small, tuple(dims), tuple(lengths))))
    counts = Counter(name for name, _ in found)
    ways: dict[str, Way] = {}
    for name, way in found:
        if counts[name] > 1:
            name, way = f"{name}_{way.lengths[0]}", way._replace(label=f"{way.label}, {way.lengths[0]} listed")
        if name in ways:
            raise ValueError(f"two ways of retrieval are {name}: they start from the same short-list")
        ways[name] = way
    return ways


def study(name: str, data: ImageData, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains and measures all models of a data set, one family after the other; what is measured is kept, no more."""
    recipe, scores = config[name], Scores(list)
    pretrained: dict[int, Trained] = {}
    for family in families(recipe):
        embed, embed_database = (make_embed(family, recipe, heads) for heads in (family != "contrastive", False))
        for model in train_family(name, family, data, config, run, pretrained):
            if model.row.variant == "ff" and model.row.size == recipe.features:
                pretrained[model.row.seed] = model
            found = embed_model(embed, embed_database, model, data, recipe, run.mesh)
            measure(found, data, recipe, config.seed, run.mesh, scores)
    measured = {f"{name}/{what}": np.array(values) for what, values in scores.items()}
    return {f"{name}/items": len(data.train_images), **measured}


def measure(model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, mesh: Mesh | None, scores: Scores) -> None:
    """Adds what a model's features and logits are worth."""
    variant, features = model.row.variant, recipe.features
    if model.logits is not None:
        score_heads(variant, model.nesting, model.logits, data, scores)
    index = None
    if recipe.neighbours:
        # Sizes without a head of their own are searched, too: those between MRL's, all of the ablations'.
        sizes = model.nesting if variant in ONE_SIZE else tuple(recipe.nesting)
        sizes += mrl.sizes_between(recipe.nesting) if variant == "mrl" else ()
        for part, wanted in groupby(sizes, lambda m: narrowest(model.queries, m)):
            index = make_index(model.database[part], model.queries[part], mesh)
            for m in wanted:
                score_lists(f"{variant}/{{}}/{m}", search(index, m, depth_of(recipe)), data, recipe, scores)
    if variant == "mrl" and index is not None:
        score_ways(index, data, recipe, scores)
    if variant in ("mrl", "mrl_e") and recipe.splits:
        score_cascade(variant, model, data, recipe, seed, scores)
    if variant in ("mrl", "ff"):
        score_few_shot(model, data, recipe, seed, scores)
    if model.row.variant == "ff" and model.row.size == features:
        score_compressed(model, index, data, recipe, seed, scores)


def narrowest(parts: list[np.ndarray], m: int) -> int:
    """Number of the narrowest network that has m features."""
    return next(index for index, z in enumerate(parts) if z.shape[1] >= m)


def percent(right: Any) -> float:
    """Share of what is true."""
    return 100 * float(np.mean(right))


def score_heads(variant: str, sizes: Any, logits: np.ndarray, data: ImageData, scores: Scores) -> None:
    """Accuracy of linear classifiers, one a size."""
    groups = superclasses(data)
    for m, head in zip(sizes, logits, strict=True):
        predicted = np.argmax(head, axis=-1)
        scores[f"{variant}/top1/{m}"].append(percent(predicted == data.test_labels))
        if groups is not None:
            scores[f"{variant}/super/{m}"].append(percent(groups[predicted] == groups[data.test_labels]))


@partial(jax.jit, static_argnames="depths")
def measures_of(neighbors: Any, db_labels: Any, query_labels: Any, depths: tuple[int, ...]) -> list[Any]:
    """Measures of lists, at several lengths."""
    return [mrl.retrieval_metrics(neighbors, db_labels, query_labels, k) for k in depths]


def score_lists(name: str, neighbors: np.ndarray, data: ImageData, recipe: ConfigDict, scores: Scores) -> None:
    """1-NN accuracy of lists; mAP, precision, recall and hit rate at all lengths that they have."""
    depths = tuple(k for k in recipe.depths if k <= neighbors.shape[1])
    first, *found = measures_of(neighbors, data.train_labels, data.test_labels, (recipe.neighbours, *depths))
    scores[name.format("nn")].append(100 * float(first.top1))
    scores[name.format("map")].append(100 * float(first.map_at_k))
    for k, measured in zip(depths, found, strict=True):
        values = (measured.map_at_k, measured.precision, measured.recall, measured.hit_rate)
        for what, value in zip(MEASURES, values, strict=True):
            scores[name.format(f"{what}@{k}")].append(100 * float(value))


def score_ways(index: Index, data: ImageData, recipe: ConfigDict, scores: Scores) -> None:
    """Adaptive and funnel retrieval: accuracy and MFLOPs a query (Fig. 8)."""
    for name, way in ways_of(recipe).items():
        listed = search(index, way.small, way.lengths[0])
        found = to_host(funnel_program(way.dims, way.lengths, index.mesh)(listed, index.queries, index.database))
        score_lists(f"retrieval/{name}/{{}}", found, data, recipe, scores)
        mflops = mrl.funnel_mflops(index.items, way.small, way.dims, way.lengths)
        scores[f"retrieval/{name}/mflops"].append(mflops)


def score_compressed(
    model: Embedded, index: Index | None, data: ImageData, recipe: ConfigDict, seed: int, scores: Scores
) -> None:
    """What full-size fixed features give when they are compressed afterwards (Tables 1, 2).

    A rotation of the features by the singular vectors, or a random projection, is done once: its prefixes are the
    projections to fewer dimensions.
    """
    (queries,), layer = model.queries, model.head["head_0"]
    key = jax.random.fold_in(jax.random.key(seed), model.row.seed)
    sizes = tuple(recipe.nesting)
    full = mrl.svd_head(layer["kernel"], layer["bias"], min(layer["kernel"].shape))
    reduced = np.asarray(queries @ full.projection)
    kernel, bias = np.asarray(full.kernel), np.asarray(full.bias)
    truncated = np.stack([reduced[:, :m] @ kernel[:m] + bias for m in sizes])
    score_heads("svd", sizes, truncated, data, scores)
    if recipe.probe_updates and model.database:
        chosen = [mrl.random_features(key, recipe.features, m) for m in sizes]
        masks = jnp.stack([jnp.zeros(recipe.features).at[rows].set(1) for rows in chosen])
        fitted = masks, model.database[0], queries, data.train_labels, len(data.classes), recipe.probe_updates
        score_heads("random_lp", sizes, np.asarray(probed(*fitted)), data, scores)
    if index is None:
        return
    ways = {
        "random_fs": None,  # the features as they are: the order of a fixed feature means nothing
        "svd": to_host(svd_projection(index.database, k=min(index.items, recipe.features))),
        "jl": to_host(mrl.jl_projection(key, recipe.features, recipe.features)),
    }
    for variant, projection in ways.items():
        turned, width = index, recipe.features
        if projection is not None:
            database, turned_queries = (project(rows, projection) for rows in (index.database, index.queries))
            turned, width = index._replace(database=database, queries=turned_queries), projection.shape[1]
        for m in sizes:
            if m <= width:
                score_lists(f"{variant}/{{}}/{m}", search(turned, m, depth_of(recipe)), data, recipe, scores)


@partial(jax.jit, static_argnums=(4, 5))
def probed(masks: Any, database: Any, queries: Any, labels: Any, classes: int, num_steps: int) -> Any:
    """Logits of the queries by linear classifiers that were fitted to the features that each mask leaves."""

    def one(mask: Any) -> Any:
        kernel, bias = mrl.linear_probe(database * mask, labels, classes, num_steps=num_steps)
        return queries @ kernel + bias

    return jax.lax.map(one, masks)


def score_few_shot(model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, scores: Scores) -> None:
    """Nearest class mean of n examples a class, mean of several draws; all models of a seed have the same examples."""
    if not recipe.shots:
        return
    (database,), (queries,) = model.database, model.queries
    rng, labels = np.random.default_rng((seed, model.row.seed)), data.train_labels
    by_class = np.sort(labels)
    place = np.arange(len(labels)) - np.searchsorted(by_class, by_class)  # of each image within its class
    listed = place < max(recipe.shots)
    draws = [np.lexsort((rng.uniform(size=len(labels)), labels))[listed] for _ in range(recipe.draws)]
    support = database[np.stack(draws)]
    weights = (place[listed] < np.array(recipe.shots)[:, None]).astype(np.float32)
    for m in model.nesting:
        predicted = np.asarray(nearest_means(support, by_class[listed], queries, weights, len(data.classes), m))
        for n, row in zip(recipe.shots, predicted, strict=True):
            scores[f"few_shot/{model.row.variant}/{m}/{n}"].append(percent(row == data.test_labels))


@partial(jax.jit, static_argnums=(4, 5))
def nearest_means(support: Any, labels: Any, queries: Any, weights: Any, classes: int, m: int) -> Any:
    """Predictions (shots, draws, queries) by the examples (draws, examples, width) that each row of weights leaves."""

    def one(examples: Any, weights: Any) -> Any:
        return mrl.nearest_class_mean(examples, labels, queries, classes, dim=m, weights=weights)

    return jax.lax.map(lambda row: jax.vmap(one, in_axes=(0, None))(support, row), weights)


def score_cascade(
    variant: str, model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, scores: Scores
) -> None:
    """Adaptive classification: thresholds from a random part of the test images, accuracy and size on the others."""
    assert model.logits is not None
    answers = jax.device_get(answers_of(model.logits, model.mirrored))  # two numbers a head and image, for all splits
    labels, sizes, group = data.test_labels, model.nesting, f"cascade_{variant}"
    right = answers.prediction == labels
    rng = np.random.default_rng((seed, model.row.seed))
    found: Scores = defaultdict(list)  # one row a split
    for _ in range(recipe.splits):
        chosen, rest = np.split(rng.permutation(len(labels)), [recipe.calibration])
        calibration, others = (mrl.HeadAnswers(*(part[:, index] for part in answers)) for index in (chosen, rest))
        thresholds = learn_thresholds(calibration, labels[chosen])
        found["thresholds"].append(np.asarray(thresholds))
        stops = np.asarray(cascade(others, thresholds).exit_index)
        for last, m in enumerate(sizes):
            exits = np.minimum(stops, last)  # what would go on to later heads stops at the last one that may be used
            found[f"accuracy/{m}"].append(percent(right[exits, rest]))
            found[f"expected/{m}"].append(float(mrl.expected_size(exits, sizes)))
            found[f"cumulative/{m}"].append(float(mrl.expected_size(exits, sizes, cumulative=True)))
            found[f"head/{m}"].append(percent(right[last, rest]))
    for what, row in found.items():
        scores[f"{group}/{what}"].append(row)
    for last, m in enumerate(sizes):
        up_to = mrl.HeadAnswers(*(part[: last + 1] for part in answers))
        scores[f"{group}/oracle/{m}"].append(100 * float(mrl.oracle_accuracy(up_to, labels)))
    scores[f"{group}/oracle"].append(100 * float(mrl.oracle_accuracy(answers, labels)))
    scores[f"{group}/majority"].append(percent(np.asarray(mrl.majority_vote(answers)) == labels))


@jax.jit
def answers_of(logits: Any, mirrored: Any) -> mrl.HeadAnswers:
    """Class and confidence of every head (sizes, images), with the mirror images' logits (None: without)."""
    if mirrored is None:
        return mrl.head_answers(jax.nn.softmax(logits, axis=-1))
    return mrl.head_answers(mrl.mirrored_probabilities(logits, mirrored))
