"""Short-lists of a search with prefixes, re-ranked once or by a funnel, and their cost (Sec. 4.3, App. E, F).

The search, its measures, and the nearest class mean of few shots (Sec. 4.4) are `ops.search`. Similarity is the cosine
of prefixes, which orders as the L2 distance of truncated, then normalised embeddings does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpapers.ops.checks import check_size
from jaxpapers.ops.search import check_neighbors, even_block, split_rows
from jaxpapers.ops.similarity import inverse_norm
from jaxpapers.representation.matryoshka.prefixes import truncate
from jaxpapers.typing import AnyArray

# Listed rows, K x dim numbers a query, that re-ranking holds at once: large enough to keep a device busy, small beside
# its memory whatever K and dim are (200 rows of 2,048 numbers: 80 queries; 1,024 of them would fill 1.7 GB).
RERANK_BYTES = 128 * 2**20


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
    check_neighbors(neighbors, database.shape[0])
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

        return lax.map(reorder, (queries, neighbors), batch_size=even_block(len(queries), query_block))

    queries, neighbors = truncate(queries, dim), jnp.asarray(neighbors)
    if mesh is None:
        return in_order(queries, neighbors, partial(distance_to, jnp.asarray(database)))
    padded, rows = split_rows(database, mesh, axis)

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


def search_mflops(items: int, dim: int, shortlist: int = 0, rerank_dim: int = 0) -> float:
    """Cost of a query in MFLOPs, a multiply-add counted once: exact search at `dim`, then a re-ranked short-list."""
    return (items * dim + shortlist * rerank_dim) / 1e6


def funnel_mflops(items: int, dim: int, dims: Sequence[int], lengths: Sequence[int]) -> float:
    """Cost of a query in MFLOPs: exact search at `dim`, then every stage of a funnel."""
    return search_mflops(items, dim) + sum(search_mflops(k, d) for d, k in zip(dims, lengths, strict=True))
