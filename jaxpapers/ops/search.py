"""Exact search for the nearest vectors, over the devices of a mesh as well; measures of what it finds; class means.

Similarity is the cosine, of whole vectors or of their first coordinates: the database is kept as it is, at full width,
and a search by a prefix reads the prefixes of its rows. Neighbours of equal similarity come in the order of their
index.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpapers.ops.checks import check_labels, check_size
from jaxpapers.ops.similarity import inverse_norm, unit
from jaxpapers.typing import AnyArray

BLOCK = 65_536  # rows of the database whose similarities are held at once, for
QUERY_BLOCK = 1_024  # so many queries: 256 MiB in float32


def exact_search(
    queries: Float[AnyArray, "queries dim"],
    database: Float[AnyArray, "items dim"],
    k: int,
    *,
    dim: int | None = None,
    block: int = BLOCK,
    query_block: int = QUERY_BLOCK,
) -> Int[Array, "queries k"]:
    """The k nearest rows of the database for every query, the nearest first.

    Similarities are computed block by block, and only the best k so far are kept: never a matrix queries x items.

    Args:
        queries: embeddings.
        database: embeddings.
        k: length of the lists.
        dim: size of the prefixes that are compared; None: the whole embeddings.
        block: rows of the database in a block.
        query_block: queries in a block.

    Raises:
        ValueError: more neighbours than there are items, or none; a size outside of 1..d; blocks below 1.
    """
    items, width = database.shape
    dim = _check_search(items, width, k, dim, block, query_block)
    database = jnp.asarray(database)

    def search(rows: Array) -> Array:
        return _best(rows, database, k, dim, block)[1]

    return _by_blocks(search, unit(jnp.asarray(queries)[:, :dim]), query_block)


def sharded_search(
    queries: Float[AnyArray, "queries dim"],
    database: Float[AnyArray, "items dim"],
    k: int,
    mesh: Mesh,
    *,
    axis: str = "data",
    dim: int | None = None,
    valid: int | None = None,
    block: int = BLOCK,
    query_block: int = QUERY_BLOCK,
) -> Int[Array, "queries k"]:
    """`exact_search` in a database whose rows are split over the devices of a mesh axis.

    Each device searches its rows; the lists, not the rows, are exchanged and merged. Rows that the devices do not
    divide are padded, which copies them: better give a database that was filled up to what they divide, and `valid`.

    Args:
        queries: embeddings, whole on every device.
        database: embeddings, split (or to be split) over the axis.
        k: length of the lists.
        mesh: the devices.
        axis: of the mesh.
        dim: size of the prefixes that are compared; None: the whole embeddings.
        valid: number of the rows that are items, the first ones; None: all.
        block: rows of the database in a block.
        query_block: queries in a block; lists of so many are exchanged at once.

    Raises:
        ValueError: as `exact_search`; a mesh without the axis; more valid rows than there are.
    """
    items, width = database.shape
    if valid is not None and not 1 <= valid <= items:
        raise ValueError(f"valid must be between 1 and the {items} rows of the database, got {valid}")
    items = items if valid is None else valid
    dim = _check_search(items, width, k, dim, block, query_block)
    padded, rows = split_rows(database, mesh, axis)
    local_k = min(k, rows)

    def local(queries: Array, part: Array) -> Array:
        first = lax.axis_index(axis) * rows

        def search(some: Array) -> Array:
            scores, index = _best(some, part, local_k, dim, block, jnp.clip(items - first, 0, rows))
            scores, index = (
                lax.all_gather(found, axis, axis=1, tiled=True) for found in (scores, index.astype(jnp.int32) + first)
            )
            return _best_of_lists(scores, index, k)[1]  # shards come in their order: ties keep the lower index

        return _by_blocks(search, queries, query_block)

    specs = (PartitionSpec(), PartitionSpec(axis))
    shard = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return shard(unit(jnp.asarray(queries)[:, :dim]), padded)


def split_rows(database: Float[AnyArray, "items dim"], mesh: Mesh, axis: str) -> tuple[Float[Array, "rows dim"], int]:
    """The database, filled up with zeros to what the devices of an axis divide, and the rows that each has.

    Raises:
        ValueError: a mesh without the axis.
    """
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}, not {axis!r}")
    items, shards = database.shape[0], mesh.shape[axis]
    rows = -(-items // shards)
    padded = jnp.asarray(database)
    return jnp.pad(padded, ((0, rows * shards - items), (0, 0))) if items % shards else padded, rows


def _check_search(items: int, width: int, k: int, dim: int | None, block: int, query_block: int) -> int:
    if not 1 <= k <= items:
        raise ValueError(f"k must be between 1 and the {items} items of the database, got {k}")
    if block < 1 or query_block < 1:
        raise ValueError(f"block and query_block must be at least 1, got {block} and {query_block}")
    return check_size(width if dim is None else dim, width)


def _by_blocks(search: Callable[[Array], Array], queries: Array, size: int) -> Array:
    """`search` of so many queries at a time; the last block is filled up with zeros."""
    count = queries.shape[0]
    if count <= size:
        return search(queries)
    size = even_block(count, size)
    padded = jnp.pad(queries, ((0, -count % size), (0, 0)))
    found = lax.map(search, padded.reshape(-1, size, queries.shape[1]))
    return found.reshape(len(padded), -1)[:count]


def even_block(count: int, most: int) -> int:
    """Size of blocks of at most `most`, as even as they can be, that hold `count` in all."""
    return -(-count // -(-count // most))


def _best(
    queries: Array, database: Array, k: int, dim: int, block: int, valid: int | Array | None = None
) -> tuple[Array, Array]:
    """(similarity, index) of the k best of the first `valid` rows, -inf where there are fewer."""
    items = database.shape[0]
    block = min(block, items)
    exact = jnp.promote_types(jnp.result_type(queries, database), jnp.float32)

    def best_in(step: Array) -> tuple[Array, Array]:
        # The last block starts early enough to be whole; what the one before had is left out.
        start = jnp.minimum(step * block, items - block)
        rows = lax.dynamic_slice(database, (start, jnp.zeros_like(start)), (block, dim))
        products = jnp.matmul(queries, rows.T, precision="highest", preferred_element_type=exact)
        index = start + jnp.arange(block, dtype=jnp.int32)
        counts = index >= step * block
        if valid is not None:
            counts &= index < valid
        scores = jnp.where(counts, products * inverse_norm(rows).astype(exact), -jnp.inf)
        scores, place = lax.top_k(scores, min(k, block))
        return scores, start + place

    blocks = -(-items // block)
    if blocks == 1:
        return best_in(jnp.int32(0))

    def advance(best: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], None]:
        scores, index = (jnp.concatenate(pair, axis=1) for pair in zip(best, best_in(step), strict=True))
        return _best_of_lists(scores, index, k), None

    nothing = jnp.full((len(queries), k), -jnp.inf, exact), jnp.zeros((len(queries), k), jnp.int32)
    return lax.scan(advance, nothing, jnp.arange(blocks, dtype=jnp.int32))[0]


def _best_of_lists(scores: Array, index: Array, k: int) -> tuple[Array, Array]:
    """The best k of lists; of equal ones the first (`lax.top_k` keeps their order)."""
    scores, place = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(index, place, axis=1)


def check_neighbors(neighbors: Int[AnyArray, "queries k"], items: int) -> None:
    """Refuses neighbours that are no rows of a database of so many items, where they are no traced values.

    Raises:
        ValueError: the first such neighbour.
    """
    try:
        check_labels(neighbors, items)
    except ValueError as error:
        raise ValueError(f"neighbours are rows of a database of {items}: {error}") from None


class RetrievalMetrics(NamedTuple):
    """Means over the queries, 0 to 1; relevant is what has the query's label.

    Attributes:
        top1: the first neighbour is relevant: accuracy of the 1-NN classifier.
        map_at_k: (1/k) sum over j <= k of P@j rel_j. The divisor is k, as in Matryoshka's paper (arXiv 2205.13147,
            App. E), not the number of hits.
        precision: hits / k.
        recall: hits / items of the query's class in the database (0 where there are none).
        hit_rate: at least one hit.
    """

    top1: Float[Array, ""]
    map_at_k: Float[Array, ""]
    precision: Float[Array, ""]
    recall: Float[Array, ""]
    hit_rate: Float[Array, ""]


def retrieval_metrics(
    neighbors: Int[AnyArray, "queries listed"],
    db_labels: Int[AnyArray, "items"],
    query_labels: Int[AnyArray, "queries"],
    k: int,
) -> RetrievalMetrics:
    """Measures of the first k neighbours.

    Raises:
        ValueError: k below 1 or above the lists' length; neighbours that are no rows of the database.
    """
    if not 1 <= k <= neighbors.shape[1]:
        raise ValueError(f"k must be between 1 and the lists' length {neighbors.shape[1]}, got {k}")
    check_neighbors(neighbors, db_labels.shape[0])
    db_labels, query_labels = jnp.asarray(db_labels), jnp.asarray(query_labels)
    relevant = db_labels[jnp.asarray(neighbors)[:, :k]] == query_labels[:, None]
    hits = jnp.cumsum(relevant, axis=1)
    precision_at = hits / jnp.arange(1, k + 1)
    in_order = jnp.sort(db_labels)  # counts by bisection: no matrix queries x items
    low, high = (jnp.searchsorted(in_order, query_labels, side=side) for side in ("left", "right"))
    return RetrievalMetrics(
        top1=jnp.mean(relevant[:, 0].astype(precision_at.dtype)),
        map_at_k=jnp.mean(jnp.sum(precision_at * relevant, axis=1)) / k,
        precision=jnp.mean(precision_at[:, -1]),
        recall=jnp.mean(hits[:, -1] / jnp.maximum(high - low, 1)),
        hit_rate=jnp.mean((hits[:, -1] > 0).astype(precision_at.dtype)),
    )


def nearest_class_mean(
    support: Float[AnyArray, "support dim"],
    labels: Int[AnyArray, "support"],
    queries: Float[AnyArray, "queries dim"],
    num_classes: int,
    *,
    dim: int | None = None,
    weights: Float[AnyArray, "support"] | None = None,
    cosine: bool = False,
) -> Int[Array, "queries"]:
    """Class whose mean of raw, truncated features is nearest, as for few shots; a class without support is never.

    Args:
        support: features of the labelled examples.
        labels: their classes.
        queries: features to be classified.
        num_classes: k of "k-way".
        dim: size of the prefixes; None: whole.
        weights: of the examples, 0 for those that are left out; None: all 1.
        cosine: by the cosine instead of the L2 distance.

    Raises:
        ValueError: labels out of range; a size outside of 1..d.
    """
    check_labels(labels, num_classes)
    dim = check_size(support.shape[1] if dim is None else dim, support.shape[1])
    support, queries = jnp.asarray(support)[:, :dim], jnp.asarray(queries)[:, :dim]
    weights = jnp.ones(len(support), support.dtype) if weights is None else jnp.asarray(weights, support.dtype)
    count = jax.ops.segment_sum(weights, labels, num_classes)
    means = jax.ops.segment_sum(weights[:, None] * support, labels, num_classes) / jnp.maximum(count, 1e-12)[:, None]
    products = jnp.matmul(queries, means.T, precision="highest")
    # |q|^2 is the same for all classes.
    scores = products * inverse_norm(means) if cosine else products - jnp.sum(jnp.square(means), axis=1) / 2
    return jnp.argmax(jnp.where(count > 0, scores, -jnp.inf), axis=1)
