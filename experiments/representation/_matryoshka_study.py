"""What is measured of Matryoshka's trained models: classification, retrieval, cascades, few-shot classes.

A part of `matryoshka`. Accuracies are percentages, one number a seed; names of measures are

    <data>/<variant>/top1/<m>           linear classifier on m features
    <data>/<variant>/super/<m>          its superclass (Omniglot: the alphabet)
    <data>/<variant>/nn/<m>, /map/<m>   1-NN accuracy and mAP@k in the training images
    <data>/retrieval/<way>/nn, /map, /mflops
    <data>/cascade/<what>/<m>           (seeds, splits), of the cascade with the last exit m, or of the head m
    <data>/few_shot/<variant>/<m>/<n>   nearest class mean of n examples
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.representation._matryoshka_data import superclasses
from experiments.representation._matryoshka_training import (
    Embedded,
    embed_model,
    families,
    make_embed,
    train_family,
)
from jaxpapers.data.images import ImageData
from jaxpapers.representation import matryoshka as mrl
from jaxpapers.train import place, to_host

Scores = defaultdict[str, list[Any]]
Search = Callable[[int, int], np.ndarray]  # (size, k) -> neighbours

exact_search = jax.jit(mrl.exact_search, static_argnames=("k", "dim"))
sharded_search = jax.jit(mrl.sharded_search, static_argnames=("k", "mesh", "dim"))
rerank = jax.jit(mrl.rerank, static_argnames="dim")
funnel = jax.jit(mrl.funnel, static_argnames=("dims", "lengths"))
retrieval_metrics = jax.jit(mrl.retrieval_metrics, static_argnames="k")
learn_thresholds = jax.jit(mrl.learn_thresholds)
cascade = jax.jit(mrl.cascade, static_argnames="max_exit")


def study(name: str, data: ImageData, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains and measures all models of a data set, one family after the other; what is measured is kept, no more."""
    recipe, scores = config[name], Scores(list)
    for family in families(recipe):
        embed = make_embed(family, recipe)
        for model in train_family(name, family, data, config, run):
            measure(embed_model(embed, model, data, recipe, run.mesh), data, recipe, config.seed, run.mesh, scores)
    measured = {f"{name}/{what}": np.array(values) for what, values in scores.items()}
    return {f"{name}/items": len(data.train_images), **measured}


def measure(model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, mesh: Mesh | None, scores: Scores) -> None:
    """Adds what a model's features and logits are worth."""
    variant, features = model.row.variant, recipe.features
    score_heads(variant, model.nesting, model.logits, data, scores)
    if recipe.neighbours:
        # Sizes without a head of their own are searched, too: those between MRL's, all of the ablations'.
        sizes = model.nesting if variant == "ff" else tuple(recipe.nesting)
        sizes += mrl.sizes_between(recipe.nesting) if variant == "mrl" else ()
        for m in sizes:
            search = make_search(*_part(model, m), mesh)
            score_lists(f"{variant}/{{}}/{m}", search(m, recipe.neighbours), data, recipe, scores)
    if variant == "mrl":
        score_ways(model, data, recipe, mesh, scores)
    if variant in ("mrl", "mrl_e") and recipe.splits:
        score_cascade(variant, model, data, recipe, seed, scores)
    if variant in ("mrl", "ff"):
        score_few_shot(model, data, recipe, seed, scores)
    if model.row.variant == "ff" and model.row.size == features:
        score_compressed(model, data, recipe, seed, mesh, scores)


def _part(model: Embedded, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Database and queries of the narrowest network that has m features."""
    index = next(index for index, z in enumerate(model.queries) if z.shape[1] >= m)
    return model.database[index], model.queries[index]


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


def make_search(database: np.ndarray, queries: np.ndarray, mesh: Mesh | None) -> Search:
    """Exact search by prefixes, over the devices of a mesh where there is one."""
    if mesh is None:
        return lambda m, k: np.asarray(exact_search(queries, database, k=k, dim=m))
    rows = -(-len(database) // mesh.shape["data"]) * mesh.shape["data"]
    if rows == len(database):
        database = place(database, NamedSharding(mesh, PartitionSpec("data")))
    return lambda m, k: to_host(sharded_search(queries, database, k=k, mesh=mesh, dim=m))


def score_lists(name: str, neighbors: np.ndarray, data: ImageData, recipe: ConfigDict, scores: Scores) -> None:
    """1-NN accuracy and mAP of lists."""
    found = retrieval_metrics(neighbors, data.train_labels, data.test_labels, k=recipe.neighbours)
    scores[name.format("nn")].append(100 * float(found.top1))
    scores[name.format("map")].append(100 * float(found.map_at_k))


def score_ways(model: Embedded, data: ImageData, recipe: ConfigDict, mesh: Mesh | None, scores: Scores) -> None:
    """Adaptive and funnel retrieval: accuracy and MFLOPs a query (Fig. 8)."""
    if not recipe.adaptive and not recipe.funnels:
        return
    (database,), (queries,) = model.database, model.queries
    search, items = make_search(database, queries, mesh), len(database)
    for small, large, k in recipe.adaptive:
        way = f"retrieval/{small}_to_{large}"
        score_lists(
            way + "/{}", np.asarray(rerank(search(small, k), queries, database, dim=large)), data, recipe, scores
        )
        scores[f"{way}/mflops"].append(mrl.search_mflops(items, small, k, large))
    for small, dims, lengths in recipe.funnels:
        way, stages = f"retrieval/funnel_{small}", {"dims": tuple(dims), "lengths": tuple(lengths)}
        listed = search(small, lengths[0])
        score_lists(way + "/{}", np.asarray(funnel(listed, queries, database, **stages)), data, recipe, scores)
        scores[f"{way}/mflops"].append(mrl.funnel_mflops(items, small, dims, lengths))


def score_compressed(
    model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, mesh: Mesh | None, scores: Scores
) -> None:
    """What full-size fixed features give when they are compressed afterwards (Tables 1, 2).

    A rotation of the features by the singular vectors, or a random projection, is done once: its prefixes are the
    projections to fewer dimensions.
    """
    (database,), (queries,) = model.database or [None], model.queries
    layer = model.head["head_0"]
    rank = min(layer["kernel"].shape)
    key = jax.random.fold_in(jax.random.key(seed), model.row.seed)
    sizes = tuple(recipe.nesting)
    full = mrl.svd_head(layer["kernel"], layer["bias"], rank)
    reduced = np.asarray(queries @ full.projection)
    kernel, bias = np.asarray(full.kernel), np.asarray(full.bias)
    truncated = np.stack([reduced[:, :m] @ kernel[:m] + bias for m in sizes])
    score_heads("svd", sizes, truncated, data, scores)
    if recipe.probe_updates and database is not None:
        chosen = [mrl.random_features(key, recipe.features, m) for m in sizes]
        masks = jnp.stack([jnp.zeros(recipe.features).at[rows].set(1) for rows in chosen])
        score_heads(
            "random_lp",
            sizes,
            np.asarray(probed(masks, database, queries, data.train_labels, len(data.classes), recipe.probe_updates)),
            data,
            scores,
        )
    if not recipe.neighbours or database is None:
        return
    width = min(database.shape)
    ways = {
        "svd": np.asarray(mrl.svd_projection(database, width)),
        "random_fs": np.eye(recipe.features, dtype=np.float32),  # the order of a fixed feature means nothing
        "jl": np.asarray(mrl.jl_projection(key, recipe.features, recipe.features)),
    }
    for variant, projection in ways.items():
        search = make_search(database @ projection, queries @ projection, mesh)
        for m in sizes:
            if m <= projection.shape[1]:
                score_lists(f"{variant}/{{}}/{m}", search(m, recipe.neighbours), data, recipe, scores)


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
    places = []
    for _ in range(recipe.draws):
        order = np.lexsort((rng.uniform(size=len(labels)), labels))  # class by class, at random within each
        starts = np.searchsorted(labels[order], labels[order])
        place_of = np.empty(len(labels), int)
        place_of[order] = np.arange(len(labels)) - starts
        places.append(place_of)
    weights = np.stack([[place_of < n for place_of in places] for n in recipe.shots]).astype(np.float32)
    for m in model.nesting:
        predicted = np.asarray(nearest_means(database, labels, queries, weights, len(data.classes), m))
        for n, row in zip(recipe.shots, predicted, strict=True):
            scores[f"few_shot/{model.row.variant}/{m}/{n}"].append(percent(row == data.test_labels))


@partial(jax.jit, static_argnums=(4, 5))
def nearest_means(support: Any, labels: Any, queries: Any, weights: Any, classes: int, m: int) -> Any:
    """Predictions (shots, draws, queries) by the examples that the weights leave."""

    def one(weights: Any) -> Any:
        return mrl.nearest_class_mean(support, labels, queries, classes, dim=m, weights=weights)

    return jax.lax.map(jax.vmap(one), weights)


def score_cascade(
    variant: str, model: Embedded, data: ImageData, recipe: ConfigDict, seed: int, scores: Scores
) -> None:
    """Adaptive classification: thresholds from a random part of the test images, accuracy and size on the others."""
    if model.mirrored is None:
        probs = np.asarray(jax.nn.softmax(model.logits, axis=-1))
    else:
        probs = np.asarray(mrl.mirrored_probabilities(model.logits, model.mirrored))
    labels, sizes, group = data.test_labels, model.nesting, f"cascade_{variant}"
    right = np.argmax(probs, axis=-1) == labels
    rng = np.random.default_rng((seed, model.row.seed))
    found: Scores = defaultdict(list)  # one row a split
    for _ in range(recipe.splits):
        chosen, rest = np.split(rng.permutation(len(labels)), [recipe.calibration])
        thresholds = learn_thresholds(probs[:, chosen], labels[chosen])
        found["thresholds"].append(np.asarray(thresholds))
        for last, m in enumerate(sizes):
            result = cascade(probs, thresholds, max_exit=last)
            exits = np.asarray(result.exit_index)[rest]
            found[f"accuracy/{m}"].append(percent(np.asarray(result.prediction)[rest] == labels[rest]))
            found[f"expected/{m}"].append(float(mrl.expected_size(exits, sizes)))
            found[f"cumulative/{m}"].append(float(mrl.expected_size(exits, sizes, cumulative=True)))
            found[f"head/{m}"].append(percent(right[last, rest]))
    for what, row in found.items():
        scores[f"{group}/{what}"].append(row)
    scores[f"{group}/oracle"].append(100 * float(mrl.oracle_accuracy(probs, labels)))
    scores[f"{group}/majority"].append(percent(np.asarray(mrl.majority_vote(probs)) == labels))
