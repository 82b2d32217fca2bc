"""Search with prefixes: exact, re-ranked, by a funnel; its measures, its cost, few-shot classes (Sec. 4.3, App. E, F).

Similarity is the cosine of prefixes, which orders as the L2 distance of truncated, then normalised embeddings does.
Neighbours of equal similarity come in the order of their index. The database is kept as it is, at full width; a search
by a prefix reads the prefixes of its rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpapers.representation.matryoshka.prefixes import (
    AnyArray,
    check_labels,
    check_size,
    inverse_norm,
    truncate,
)

BLOCK = 65_536  # rows of the database whose similarities are held at once, for
QUERY_BLOCK = 1_024  # so many queries: 256 MiB in float32
# Listed rows, K x dim numbers a query, that re-ranking holds at once: large enough to keep a device busy, small beside
# its memory whatever K and dim are (200 rows of 2,048 numbers: 80 queries; 1,024 of them would fill 1.7 GB).
RERANK_BYTES = 128 * 2**20


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

    return _by_blocks(search, truncate(queries, dim), query_block)


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
    padded, rows = _split_rows(database, mesh, axis)
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
    return shard(truncate(queries, dim), padded)


def _split_rows(database: AnyArray, mesh: Mesh, axis: str) -> tuple[Array, int]:
    """The database, filled up with zeros to what the devices of an axis divide, and the rows that each has."""
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
    size = _even_block(count, size)
    padded = jnp.pad(queries, ((0, -count % size), (0, 0)))
    found = lax.map(search, padded.reshape(-1, size, queries.shape[1]))
    return found.reshape(len(padded), -1)[:count]


def _even_block(count: int, most: int) -> int:
    """Size of blocks of at most so many, as even as they can be."""
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


def rerank(
    neighbors: Int[AnyArray, "queries k"],
    queries: Float[AnyArray, "queries dim"],
    database: Float[AnyArray, "items dim"],
    dim: int,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    query_block: int | None = None,
) -> Int[Array, "queries k"]:
    """The lists in the order of the similarity at another size (adaptive retrieval, Sec. 4.3.1); same members.

    Args:
        neighbors: short-lists, not changed.
        queries: embeddings.
        database: embeddings.
        dim: size of the prefixes that are compared.
        mesh: devices over which the rows of the database are split; the similarities, not the rows, are exchanged.
            That saves memory, not time: every device computes all K products of a query, with a row of its own in the
            place of those that it lacks, and what they give is left out. None: the database is whole.
        axis: of the mesh.
        query_block: queries whose listed rows are held at once; None: as many as fill `RERANK_BYTES`.

    Raises:
        ValueError: a size outside of 1..d; neighbours that are no rows of the database; a mesh without the axis.
    """
    check_size(dim, database.shape[1])
    if query_block is not None and query_block < 1:
        raise ValueError(f"query_block must be at least 1, got {query_block}")
    _check_neighbors(neighbors, database.shape[0])
    exact = jnp.promote_types(jnp.result_type(queries, database), jnp.float32)
    if query_block is None:
        query_block = max(1, RERANK_BYTES // max(1, neighbors.shape[1] * dim * exact.itemsize))

    def distance_to(part: Array, query: Array, listed: Array) -> Array:
        # Slices of the wanted width: whole rows, cut afterwards, would read the full embeddings.
        rows = jax.vmap(lambda row: lax.dynamic_slice(part, (row, 0 * row), (1, dim))[0])(listed)
        products = jnp.matmul(rows, query, precision="highest", preferred_element_type=exact)
        return -products * inverse_norm(rows).astype(exact)

    def in_order(queries: Array, neighbors: Array, distance: Callable[[Array, Array], Array]) -> Array:
        if not len(queries):
            return neighbors

        def reorder(one: tuple[Array, Array]) -> Array:
            query, listed = one
            return lax.sort((distance(query, listed), listed), num_keys=2)[1]

        return lax.map(reorder, (queries, neighbors), batch_size=_even_block(len(queries), query_block))

    queries, neighbors = truncate(queries, dim), jnp.asarray(neighbors)
    if mesh is None:
        return in_order(queries, neighbors, partial(distance_to, jnp.asarray(database)))
    padded, rows = _split_rows(database, mesh, axis)

    def local(queries: Array, neighbors: Array, part: Array) -> Array:
        first = lax.axis_index(axis) * rows

        def distance(query: Array, listed: Array) -> Array:
            place = listed - first
            own = (place >= 0) & (place < rows)
            return lax.psum(jnp.where(own, distance_to(part, query, jnp.where(own, place, 0)), 0), axis)

        return in_order(queries, neighbors, distance)

    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec(axis))
    shard = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return shard(queries, neighbors, padded)


def funnel(
    neighbors: Int[AnyArray, "queries k"],
    queries: Float[AnyArray, "queries dim"],
    database: Float[AnyArray, "items dim"],
    dims: Sequence[int],
    lengths: Sequence[int],
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    query_block: int | None = None,
) -> Int[Array, "queries last"]:
    """Funnel retrieval (Sec. 4.3.1): for every stage (D_i, K_i), keep the first K_i and order these at size D_i.

    Args:
        neighbors: lists by a small prefix.
        queries: embeddings.
        database: embeddings.
        dims: D_i.
        lengths: K_i, not growing; the last one is the length of the result.
        mesh: see `rerank`.
        axis: see `rerank`.
        query_block: see `rerank`.

    Raises:
        ValueError: no stages, or not as many lengths as dims; lengths that grow, exceed the lists, or are below 1;
            sizes outside of 1..d.
    """
    check_funnel(dims, lengths, database.shape[1], neighbors.shape[1])
    for dim, length in zip(dims, lengths, strict=True):
        listed = neighbors[:, :length]
        neighbors = rerank(listed, queries, database, dim, mesh=mesh, axis=axis, query_block=query_block)
    return jnp.asarray(neighbors)


def check_funnel(dims: Sequence[int], lengths: Sequence[int], width: int, listed: int) -> None:
    """Refuses stages that `funnel` cannot run on lists of `listed` neighbours and embeddings of a width.

    Raises:
        ValueError: see `funnel`.
    """
    if not dims or len(dims) != len(lengths):
        raise ValueError(
            f"a funnel needs as many lengths as dims, at least one; got {tuple(dims)} and {tuple(lengths)}"
        )
    shrinks = all(before >= after for before, after in pairwise((listed, *lengths)))
    if not shrinks or min(lengths) < 1:
        raise ValueError(f"lengths must not grow from {listed}, and be at least 1; got {tuple(lengths)}")
    for dim in dims:
        check_size(dim, width)


def _check_neighbors(neighbors: AnyArray, items: int) -> None:
    try:
        check_labels(neighbors, items)
    except ValueError as error:
        raise ValueError(f"neighbours are rows of a database of {items}: {error}") from None


class RetrievalMetrics(NamedTuple):
    """Means over the queries, 0 to 1; relevant is what has the query's label.

    Attributes:
        top1: the first neighbour is relevant: accuracy of the 1-NN classifier.
        map_at_k: (1/k) sum over j <= k of P@j rel_j. The divisor is k, as in the paper, not the number of hits.
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
    """Measures of the first k neighbours (App. E).

    Raises:
        ValueError: k below 1 or above the lists' length; neighbours that are no rows of the database.
    """
    if not 1 <= k <= neighbors.shape[1]:
        raise ValueError(f"k must be between 1 and the lists' length {neighbors.shape[1]}, got {k}")
    _check_neighbors(neighbors, db_labels.shape[0])
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


def search_mflops(items: int, dim: int, shortlist: int = 0, rerank_dim: int = 0) -> float:
    """Cost of a query in MFLOPs, a multiply-add counted once: exact search at `dim`, then a re-ranked short-list."""
    return (items * dim + shortlist * rerank_dim) / 1e6


def funnel_mflops(items: int, dim: int, dims: Sequence[int], lengths: Sequence[int]) -> float:
    """Cost of a query in MFLOPs: exact search at `dim`, then every stage of a funnel."""
    return search_mflops(items, dim) + sum(search_mflops(k, d) for d, k in zip(dims, lengths, strict=True))


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
    """Class whose mean of raw, truncated features is nearest (few-shot, Sec. 4.4); a class without support is never.

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
