"""Symbolic analysis of an orbit: which linear regions it visits, in which order, and how many such orders.

Host code on numpy arrays: the number of regions in use is known only once the orbit is.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpapers.sequence.alrnn.model import check_num_pwl
from jaxpapers.typing import AnyArray


class SymbolicCode(NamedTuple):
    """An orbit as symbols, 0 being the region visited most often.

    Attributes:
        symbols: (time,), the region of each state.
        bits: (used, P), the regions in use by frequency, their number being at most 2^P. Regions visited
            equally often stand in the order of their bits read as a binary number.
        counts: (used,), visits of each.
        occupation: (used,), the same as fractions of the time.
    """

    symbols: np.ndarray
    bits: np.ndarray
    counts: np.ndarray
    occupation: np.ndarray


def symbolic_code(z: Float[AnyArray, "time latent"], num_pwl: int) -> SymbolicCode:
    """Regions of an orbit (transient dropped), as integers in the order of their frequency (Sec. 3).

    Raises:
        ValueError: if the orbit is empty or not finite (NaN > 0 is False and would pass for a region), or if P
            does not fit.
    """
    z = np.asarray(z)
    check_num_pwl(num_pwl, z.shape[1])
    if z.shape[0] == 0 or not np.all(np.isfinite(z)):
        raise ValueError(f"needs a finite orbit of at least one state, got {_describe(z)}")
    bits = (z[:, z.shape[1] - num_pwl :] > 0).astype(int)
    regions, symbols, counts = np.unique(bits, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    return SymbolicCode(rank[symbols.reshape(-1)], regions[order], counts[order], counts[order] / len(z))


def _describe(z: np.ndarray) -> str:
    bad = np.flatnonzero(~np.all(np.isfinite(z), axis=1))
    return f"{len(z)} states" + (f", not finite from time {bad[0]} on" if bad.size else "")


def transition_counts(
    symbols: Int[AnyArray, "time"], num_symbols: int | None = None
) -> Int[np.ndarray, "symbol symbol"]:
    """How often symbol j follows symbol i in one step, in row i and column j (Sec. 3).

    The rows sum to the visits (the last state of the orbit has no successor).

    Args:
        symbols: the orbit's symbols.
        num_symbols: size of the matrix; None for the largest symbol + 1.

    Raises:
        ValueError: if a symbol is negative or not below num_symbols, or there are none.
    """
    symbols, size = _checked(symbols, num_symbols)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (symbols[:-1], symbols[1:]), 1)
    return counts


def _checked(symbols: AnyArray, num_symbols: int | None) -> tuple[np.ndarray, int]:
    symbols = np.asarray(symbols)
    if symbols.size == 0:
        raise ValueError("needs at least one symbol, got none")
    size = int(symbols.max()) + 1 if num_symbols is None else num_symbols
    if symbols.min() < 0 or symbols.max() >= size:
        raise ValueError(f"symbols must lie in 0..{size - 1}, got {symbols.min()}..{symbols.max()}")
    return symbols, size


def admissibility_graph(counts: Int[AnyArray, "symbol symbol"]) -> Bool[np.ndarray, "symbol symbol"]:
    """Which transitions occur at all: T_ij > 0 (Sec. 3)."""
    return np.asarray(counts) > 0


def transition_probabilities(
    counts: Int[AnyArray, "symbol symbol"],
) -> Float[np.ndarray, "symbol symbol"]:
    """P(next = j | now = i); the row of a symbol without successor is zero."""
    counts = np.asarray(counts)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def visit_connectome(
    symbols: Int[AnyArray, "time"], num_symbols: int | None = None
) -> Float[np.ndarray, "symbol symbol"]:
    """The authors' tutorial's connectome: transitions between successive visits, as fractions of all.

    A visit is a run of one symbol, and counts once on the diagonal however long it lasts; the last run, which
    nothing ends, is no visit. Only for parity with published figures: time spent in a region does not show.

    Raises:
        ValueError: as `transition_counts`, and if the orbit never leaves its first region.
    """
    symbols, size = _checked(symbols, num_symbols)
    visits = symbols[:-1][symbols[1:] != symbols[:-1]]
    if visits.size == 0:
        raise ValueError("the orbit never changes its region: it has no visit that ends")
    connectome = transition_counts(visits, size).astype(float)
    np.add.at(connectome, (visits, visits), 1)
    return connectome / connectome.sum()


def words(symbols: Int[AnyArray, "time"], length: int) -> Int[np.ndarray, "words length"]:
    """The set of words of a length that occur in a symbol sequence, in lexicographic order (Sec. 3).

    Raises:
        ValueError: unless 1 <= length <= number of symbols.
    """
    symbols = np.asarray(symbols)
    if not 1 <= length <= symbols.size:
        raise ValueError(f"length must lie in 1..{symbols.size}, got {length}")
    return np.unique(np.lib.stride_tricks.sliding_window_view(symbols, length), axis=0)


def topological_entropy(graph: Bool[AnyArray, "symbol next_symbol"] | Int[AnyArray, "symbol next_symbol"]) -> float:
    """Log of the spectral radius of the 0/1 admissibility matrix, in nats per step (Sec. 3).

    The growth rate of the number of paths: exact for a subshift of finite type, an upper bound on that of an
    observed symbol sequence. A graph without a cycle has entropy -inf.

    Raises:
        ValueError: if the graph is not square, or empty.
    """
    graph = np.asarray(graph)
    if graph.shape[0] != graph.shape[1] or graph.size == 0:
        raise ValueError(f"needs a square matrix, got shape {graph.shape}")
    adjacency = (graph > 0).astype(float)
    # Eigenvalues of a nilpotent matrix come out far from 0 in floating point, so look for a cycle first.
    starts = np.ones(len(adjacency), bool)
    for _ in range(len(adjacency)):
        starts = adjacency @ starts > 0  # vertices from which one step more is possible
    if not starts.any():
        return -np.inf
    return float(np.log(np.max(np.abs(np.linalg.eigvals(adjacency)))))


def word_entropy(symbols: Int[AnyArray, "time"], max_length: int) -> Float[np.ndarray, "length"]:
    """log(N(n+1)/N(n)), n = 1..max_length, with N(n) the number of words of length n (Sec. 3, appendix).

    It estimates the topological entropy as n grows, as long as the orbit is long against exp(n entropy).

    Raises:
        ValueError: unless 1 <= max_length < number of symbols.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return np.diff(np.log([len(words(symbols, n)) for n in range(1, max_length + 2)]))


def label_accuracy(symbols: Int[AnyArray, "time"], labels: Int[AnyArray, "labels"]) -> float:
    """How well regions tell labels: the accuracy of naming each region's most frequent label (fMRI experiment).

    Raises:
        ValueError: if there are no symbols, not as many labels, or a negative entry.
    """
    symbols, size = _checked(symbols, None)
    labels, num_labels = _checked(labels, None)
    if symbols.shape != labels.shape:
        raise ValueError(f"needs one label per symbol, got {labels.shape} and {symbols.shape}")
    table = np.zeros((size, num_labels), int)
    np.add.at(table, (symbols, labels), 1)
    return float(table.max(axis=1).sum() / symbols.size)
