"""Nearest neighbours: exact search and Matryoshka's adaptive retrieval against FAISS' IndexFlatL2 and IndexHNSWFlat.

Synthetic embeddings in clusters, whose coordinates matter less and less, as a Matryoshka embedding's do: a prefix
finds the neighbourhood, the whole embedding the neighbours. All queries are given at once, and all lists are by the
cosine; FAISS is given unit vectors, whose L2 distances have that order.

- `exact`: `exact_search` with blocks of its own choice, and once more with smaller ones (--block);
- `adaptive`: a short-list by the first coordinates, re-ranked at full width; `funnel`: the same list through stages
  that double the width and halve the list;
- `FAISS IndexFlatL2` chooses between loops of its own and products of matrices by the number of queries, with a
  threshold that was found on machines of many cores; `IndexFlatL2, BLAS` always takes the products;
- `FAISS IndexHNSWFlat`: at the smallest efSearch, of a doubling list, with the recall of `adaptive` or more.

FAISS takes part on a CPU where it is installed. Nothing is timed unless its exact lists and ours agree. Recall@k is the
part of the k exact neighbours that a list has. HNSW needs its graph first: its construction has a line of its own.
Where other programs use the cores, FAISS' threads wait for each other: there, give both sides one core
(`taskset -c 0`, --faiss-threads 1).
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    environment,
    figure_table,
    find_rival,
    paired_times,
    print_table,
    ratios,
    write_json,
)
from benchmarks.training import SAMPLE_S
from jaxpapers.ops.search import exact_search
from jaxpapers.ops.similarity import unit
from jaxpapers.representation.matryoshka import funnel, rerank

ITEMS_A_CLUSTER = 50
# Standard deviations fall as (1 + j)^-DECAY over the coordinates j. At the defaults the first 16 alone find .40
# of the ten neighbours, and .98 once their best 200 are re-ranked: prefix and re-ranking are both worth something.
DECAY = 0.75
HNSW_LINKS = 32  # a node's, as in the paper (Sec. 4.3)
EF_SEARCH = tuple(2**power for power in range(4, 13))
# Of squared distances of unit vectors, which float32 gives to some 1e-7: neighbours that are so close may swap.
AGREEMENT = 1e-5

EXACT, ADAPTIVE, FUNNEL = "exact", "adaptive", "funnel"
FLAT, FLAT_BLAS, HNSW = "FAISS IndexFlatL2", "FAISS IndexFlatL2, BLAS", "FAISS IndexHNSWFlat"
BASELINES = (EXACT, ADAPTIVE)

Search = Callable[[], Any]  # () -> neighbours, queries x k


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    where = environment() | {name: getattr(args, name) for name in ("items", "width", "queries", "k")}
    where |= {"shortlist": args.shortlist, "shortlist dim": args.shortlist_dim}
    faiss = find_faiss(args.faiss_threads)
    if faiss:
        where |= {"faiss": faiss.__version__, "faiss threads": faiss.omp_get_max_threads()}

    print(", ".join(f"{name} {value}" for name, value in where.items()))
    database, queries = embeddings(args.items, args.queries, args.width)
    exact, fast = our_searches(queries, database, args)
    flat = flat_searches(faiss, queries, database, args.k) if faiss else {}
    measure_recall = agreeing_recall(exact | flat, queries, database)
    calls = exact | fast | flat
    recall = {name: measure_recall(search()) for name, search in calls.items()}
    results = {"environment": where}
    if faiss:
        index, seconds = hnsw_index(faiss, database)
        print(f"HNSW's construction took {seconds:.1f} s")
        at = {ef: partial(hnsw_search, index, np.array(unit(queries)), args.k, ef) for ef in EF_SEARCH}
        ef = choose_ef(lambda ef: measure_recall(at[ef]()), recall[ADAPTIVE])
        results["hnsw"] = {"links": HNSW_LINKS, "construction_s": seconds, "efSearch": ef}
        if ef is None:
            print(f"HNSW takes no part: up to efSearch {EF_SEARCH[-1]} its recall is below {recall[ADAPTIVE]:.3f}")
        else:
            print(f"HNSW takes efSearch {ef}")
            calls[HNSW], recall[HNSW] = at[ef], measure_recall(at[ef]())
    times = paired_times(calls, args.rounds, SAMPLE_S)
    report(times, recall, args.queries, args.k)
    if args.json:
        write_json(args.json, results | {"recall": recall, "seconds": times})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; exits where sizes do not fit together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks search", description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=50_000, help="embeddings in the database")
    parser.add_argument("--width", type=int, default=256, help="of the embeddings")
    parser.add_argument("--queries", type=int, default=256, help="of one call")
    parser.add_argument("--k", type=int, default=10, help="neighbours that are wanted")
    parser.add_argument("--shortlist-dim", type=int, default=16, help="size of the prefixes that make the short-list")
    parser.add_argument("--shortlist", type=int, default=200, help="its length")
    parser.add_argument("--block", type=int, default=4096, help="rows of the database in a block of exact search")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each rival")
    parser.add_argument("--faiss-threads", type=int, help="threads of FAISS; its own choice without")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    if min(value for value in vars(args).values() if isinstance(value, int)) < 1:
        parser.error("every number must be at least 1")
    if not args.k <= args.shortlist <= args.items:
        parser.error(f"k {args.k}, short-list {args.shortlist}, items {args.items}: none may exceed the next")
    if args.shortlist_dim > args.width:
        parser.error(f"a prefix of {args.shortlist_dim} exceeds the width {args.width}")
    return args


def find_faiss(threads: int | None) -> Any:
    """FAISS, or None where it takes no part."""
    faiss = find_rival("FAISS", lambda: importlib.import_module("faiss"))
    if faiss and threads is not None:
        faiss.omp_set_num_threads(threads)
    return faiss


def embeddings(items: int, queries: int, width: int) -> tuple[jax.Array, jax.Array]:
    """(database, queries): Gaussian clusters as wide as their centres are apart, scaled coordinate by coordinate."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((-(-items // ITEMS_A_CLUSTER), width), np.float32)
    z = rng.standard_normal((items + queries, width), np.float32)
    z += centres[rng.integers(len(centres), size=len(z))]
    z *= (1 + np.arange(width, dtype=np.float32)) ** -DECAY
    return jnp.asarray(z[:items]), jnp.asarray(z[items:])


def funnel_stages(width: int, dim: int, shortlist: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes that double from the short-list's to the width, and lengths that halve down to k.

    16, 200 of 256, 10: (32, 64, 128, 256) and (100, 50, 25, 10), the paper's.
    """
    dims = []
    while (dim := 2 * dim) < width:
        dims.append(dim)
    lengths = [max(k, shortlist >> stage) for stage in range(1, len(dims) + 1)]
    return (*dims, width), (*lengths, k)


def our_searches(
    queries: jax.Array, database: jax.Array, args: argparse.Namespace
) -> tuple[dict[str, Search], dict[str, Search]]:
    """Exact ones, and those by short-lists."""
    dim, shortlist, k = args.shortlist_dim, args.shortlist, args.k
    dims, lengths = funnel_stages(database.shape[1], dim, shortlist, k)

    def adaptive(queries: jax.Array, database: jax.Array) -> jax.Array:
        listed = exact_search(queries, database, shortlist, dim=dim)
        return rerank(listed, queries, database, database.shape[1])[:, :k]

    def by_funnel(queries: jax.Array, database: jax.Array) -> jax.Array:
        return funnel(exact_search(queries, database, shortlist, dim=dim), queries, database, dims, lengths)

    def ready(search: Callable[..., jax.Array]) -> Search:
        return partial(jax.jit(search), queries, database)

    exact = {
        EXACT: ready(partial(exact_search, k=k)),
        f"{EXACT}, blocks of {args.block}": ready(partial(exact_search, k=k, block=args.block)),
    }
    return exact, {ADAPTIVE: ready(adaptive), FUNNEL: ready(by_funnel)}


def flat_searches(faiss: Any, queries: jax.Array, database: jax.Array, k: int) -> dict[str, Search]:
    """FAISS' exact search with the routine of its choice, and by BLAS."""
    index = faiss.IndexFlatL2(database.shape[1])
    index.add(np.array(unit(database)))
    wanted = np.array(unit(queries))

    def search() -> np.ndarray:
        return index.search(wanted, k)[1]

    def by_blas() -> np.ndarray:
        own_choice = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 0
        try:
            return search()
        finally:
            faiss.cvar.distance_compute_blas_threshold = own_choice

    return {FLAT: search, FLAT_BLAS: by_blas}


def hnsw_index(faiss: Any, database: jax.Array) -> tuple[Any, float]:
    """The index, and the seconds of its construction."""
    index, vectors = faiss.IndexHNSWFlat(database.shape[1], HNSW_LINKS), np.array(unit(database))
    start = time.perf_counter()
    index.add(vectors)
    return index, time.perf_counter() - start


def hnsw_search(index: Any, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
    """Neighbours, queries x k; -1 where fewer were found."""
    index.hnsw.efSearch = ef
    return index.search(queries, k)[1]


def choose_ef(recall_at: Callable[[int], float], least: float) -> int | None:
    """The smallest of EF_SEARCH with a recall of at least `least`; None where there is none."""
    return next((ef for ef in EF_SEARCH if recall_at(ef) >= least), None)


def squared_distances(neighbors: Any, queries: jax.Array, database: jax.Array) -> np.ndarray:
    """Of unit vectors, in float64, queries x k; infinite where a neighbour is missing (-1)."""

    def exact_unit(z: np.ndarray) -> np.ndarray:
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    neighbors = np.asarray(neighbors)
    rows = exact_unit(np.asarray(database)[neighbors].astype(np.float64))
    wanted = exact_unit(np.asarray(queries, np.float64))[:, None]
    return np.where(neighbors < 0, np.inf, np.sum(np.square(rows - wanted), axis=-1))


def agreeing_recall(
    exact: Mapping[str, Search], queries: jax.Array, database: jax.Array
) -> Callable[[np.ndarray], float]:
    """What measures the recall of lists against the exact ones.

    Raises:
        SystemExit: two exact searches find different neighbours.
    """
    found = {name: squared_distances(search(), queries, database) for name, search in exact.items()}
    expected = found[EXACT]
    for name, distances in found.items():
        refuse_disagreement(name, distances, expected)

    def recall(neighbors: np.ndarray) -> float:
        # By distances: of neighbours that are equally far, either counts.
        return float(np.mean(squared_distances(neighbors, queries, database) <= expected[:, -1:] + AGREEMENT))

    return recall


def refuse_disagreement(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises SystemExit rather than let searches be timed that find different neighbours, but for ties."""
    error = np.max(np.abs(found - expected))
    if not error <= AGREEMENT:
        raise SystemExit(f"error: {name}: squared distances of its neighbours differ from ours by up to {error:.1e}")


def report(times: Mapping[str, Sequence[float]], recall: Mapping[str, float], queries: int, k: int) -> None:
    """Prints the table, with ratios to our exact search and to adaptive retrieval."""
    over = {baseline: ratios(times, baseline) for baseline in BASELINES}
    headings = [text for baseline in over for text in (f"x {baseline}", "quartiles")]
    table = figure_table("", "ms a query", f"recall@{k}", *headings, title=f"{queries} queries at once")
    for name, samples in times.items():
        cells = [f"{1e3 * statistics.median(samples) / queries:.4f}", f"{recall[name]:.3f}"]
        for each in over.values():
            cells += each[name].cells()
        table.add_row(name, *cells)
    print_table(table)
