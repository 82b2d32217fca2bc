"""Fixed points and cycles of an AL-RNN in closed form, exhaustively and by the SCYFI heuristic.

Within a region the map is affine. A cycle through given regions, a "word", therefore solves one linear
system; it is real if its points lie in the regions assumed, else virtual. Host code in numpy float64: how many
there are is known only at the end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, Shaped

from jaxpapers.sequence.alrnn.model import ALRNNParams, check_num_pwl
from jaxpapers.typing import AnyArray

MAX_WORDS = 1_000_000


class FixedPoints(NamedTuple):
    """One fixed point per linear region.

    Attributes:
        bits: (regions, P).
        points: (regions, M), z* = (I - W_D)^-1 h; NaN where I - W_D is singular.
        real: (regions,), whether the point lies in its region. The others are virtual: no fixed points of the
            model, though orbits within the region move as if they were.
        eigenvalues: (regions, M), of W_D, largest modulus first.
        spectral_radius: (regions,); a real point is stable where it is below 1.
    """

    bits: np.ndarray
    points: np.ndarray
    real: np.ndarray
    eigenvalues: np.ndarray
    spectral_radius: np.ndarray


class Cycle(NamedTuple):
    """A real cycle of length k; a fixed point is one of length 1.

    Attributes:
        word: (k, P), the bits along the cycle, of its rotations the first in lexicographic order.
        points: (k, M).
        multipliers: (M,), eigenvalues of the Jacobian of k steps, largest modulus first; the cycle is stable if
            the first has a modulus below 1.
    """

    word: np.ndarray
    points: np.ndarray
    multipliers: np.ndarray


class _Host(NamedTuple):
    """The parameters that matter here, as float64."""

    a: np.ndarray
    W: np.ndarray
    h: np.ndarray
    slopes: np.ndarray  # (P,), of the piecewise-linear units for z <= 0

    def matrix(self, bits: np.ndarray) -> np.ndarray:
        """W_D of a region, or of many along leading axes."""
        linear = np.ones((*bits.shape[:-1], self.a.size - self.slopes.size))
        gates = np.concatenate([linear, np.where(bits > 0, 1.0, self.slopes)], axis=-1)
        return np.diag(self.a) + self.W * gates[..., None, :]

    def bits(self, points: np.ndarray) -> np.ndarray:
        return (points[..., self.a.size - self.slopes.size :] > 0).astype(int)


def _host(params: ALRNNParams, num_pwl: int) -> _Host:
    a, w, h = (np.asarray(v, np.float64) for v in (params.a, params.W, params.h))
    check_num_pwl(num_pwl, a.size)
    slopes = np.zeros(a.size) if params.slopes is None else np.asarray(params.slopes, np.float64)
    return _Host(a, w, h, slopes[a.size - num_pwl :])


def _all_bits(num_pwl: int) -> np.ndarray:
    """(2^P, P), regions in binary order."""
    return (np.arange(2**num_pwl)[:, None] >> np.arange(num_pwl)[::-1]) & 1


def _sorted_eigenvalues(matrices: np.ndarray) -> np.ndarray:
    values = np.linalg.eigvals(matrices).astype(complex)
    return np.take_along_axis(values, np.argsort(-np.abs(values), axis=-1, kind="stable"), axis=-1)


def fixed_points(params: ALRNNParams, num_pwl: int, bits: Shaped[AnyArray, "regions pwl"] | None = None) -> FixedPoints:
    """The fixed point of every linear region, real or virtual (Sec. 3, Fig. 5).

    Args:
        params: the model.
        num_pwl: P.
        bits: the regions to look at (those in use, say, as `symbolic_code` lists them); None for all 2^P.

    Raises:
        ValueError: if P does not fit, the bits are not P each, or all regions were too many to list.
    """
    host = _host(params, num_pwl)
    if bits is None:
        if 2**num_pwl > MAX_WORDS:
            raise ValueError(f"2^{num_pwl} regions are too many to list: give the bits of those in use")
        bits = _all_bits(num_pwl)
    bits = np.asarray(bits).astype(int)
    if bits.shape[1] != num_pwl:
        raise ValueError(f"needs {num_pwl} bits per region, got {bits.shape[1]}")
    points = np.stack([_cycle_points(host, region[None])[0][0] for region in bits])
    eigenvalues = _sorted_eigenvalues(host.matrix(bits))
    return FixedPoints(
        bits=bits,
        points=points,
        real=np.all(np.isfinite(points), axis=1) & np.all(host.bits(points) == bits, axis=1),
        eigenvalues=eigenvalues,
        spectral_radius=np.abs(eigenvalues[:, 0]),
    )


def _cycle_points(host: _Host, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (k, M) of the cycle that moves by the word's matrices, and the product of these.

    z* = (I - W_Dk .. W_D1)^-1 b with b = sum_j W_Dk .. W_Dj+1 h; NaN where there is no such point.
    """
    product, offset = np.eye(host.a.size), np.zeros(host.a.size)
    matrices = host.matrix(word)
    for matrix in matrices:
        product, offset = matrix @ product, matrix @ offset + host.h
    try:
        points = [np.linalg.solve(np.eye(host.a.size) - product, offset)]
    except np.linalg.LinAlgError:
        return np.full((len(word), host.a.size), np.nan), product
    for matrix in matrices[:-1]:
        points.append(matrix @ points[-1] + host.h)
    return np.stack(points), product


def _cycle_if_real(host: _Host, word: np.ndarray) -> Cycle | None:
    points, product = _cycle_points(host, word)
    if not np.all(np.isfinite(points)) or np.any(host.bits(points) != word):
        return None
    return Cycle(word, points, _sorted_eigenvalues(product))


def lyndon_words(num_symbols: int, max_length: int) -> Iterator[tuple[int, ...]]:
    """One word of each necklace that is no repetition of a shorter one, in lexicographic order (Duval 1988).

    Those are the words that a cycle can have: rotations are the same cycle, repetitions a shorter one.
    """
    word = [-1]
    while word:
        word[-1] += 1
        yield tuple(word)
        word = (word * max_length)[:max_length]
        while word and word[-1] == num_symbols - 1:
            word.pop()


def cycles(params: ALRNNParams, num_pwl: int, max_length: int) -> list[Cycle]:
    """All real cycles of length 1..max_length, by trying every word (Sec. 3).

    Ordered by length, then word. A cycle is listed once, under its shortest length.

    Raises:
        ValueError: if P does not fit, max_length < 1, or there are too many words: then use `scyfi`.
    """
    host = _host(params, num_pwl)
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if 2 ** (num_pwl * max_length) > MAX_WORDS * max_length:
        raise ValueError(f"about 2^{num_pwl * max_length} words of length {max_length} are too many to try: use scyfi")
    regions = _all_bits(num_pwl)
    by_length = sorted(lyndon_words(len(regions), max_length), key=len)  # stable: words stay in order
    found = (_cycle_if_real(host, regions[list(word)]) for word in by_length)
    return [cycle for cycle in found if cycle is not None]


def scyfi(
    key: Key[Array, ""],
    params: ALRNNParams,
    num_pwl: int,
    length: int,
    *,
    start_words: Shaped[AnyArray, "words length pwl"] | None = None,
    patience: int = 100,
    inner_steps: int = 100,
) -> list[Cycle]:
    """Real cycles of one length by the SCYFI heuristic (Eisenmann et al. 2023), for words too many to list.

    From a word, compute the cycle it would have; take the word of the true orbit that starts there; if it is
    the same the cycle is real, else go on from the new word. Restart after `inner_steps` words or when a word
    comes back.

    Args:
        key: random key.
        params: the model.
        num_pwl: P.
        length: k, of the cycles sought; cycles of a divisor of k do not count.
        start_words: words to start from, as bits: those that occur in data are the better starts. They are
            drawn at random; None for random bits.
        patience: give up after so many restarts in a row that found nothing new.
        inner_steps: words per restart at most.

    Returns:
        The cycles found, by word. Nothing says that these are all.

    Raises:
        ValueError: if P does not fit, a count is below 1, or the start words are not (n, length, P).
    """
    host = _host(params, num_pwl)
    if min(length, patience, inner_steps) < 1:
        raise ValueError(f"must be at least 1 each: {length=}, {patience=}, {inner_steps=}")
    if start_words is not None and (start_words.shape[1:] != (length, num_pwl) or len(start_words) == 0):
        raise ValueError(f"start_words must be (n, {length}, {num_pwl}), got {start_words.shape}")
    starts = None if start_words is None else np.asarray(start_words).astype(int)
    # The loop is numpy's and its length depends on what it finds: the key only seeds it.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    found: dict[bytes, Cycle] = {}
    idle = 0
    while idle < patience:
        idle += 1
        start = rng.integers(2, size=(length, num_pwl)) if starts is None else starts[rng.integers(len(starts))]
        cycle = _follow(host, start, inner_steps)
        if cycle is not None and cycle.word.tobytes() not in found:
            found[cycle.word.tobytes()] = cycle
            idle = 0
    return sorted(found.values(), key=lambda cycle: cycle.word.tolist())


def _follow(host: _Host, word: np.ndarray, inner_steps: int) -> Cycle | None:
    seen = set()
    for _ in range(inner_steps):
        if word.tobytes() in seen:
            return None
        seen.add(word.tobytes())
        points, _ = _cycle_points(host, word)
        if not np.all(np.isfinite(points)):
            return None
        orbit_word = _orbit_word(host, points[0], len(word))
        if np.array_equal(orbit_word, word):
            return _cycle_if_real(host, _first_rotation(word)) if _primitive(word) else None
        word = orbit_word
    return None


def _orbit_word(host: _Host, point: np.ndarray, length: int) -> np.ndarray:
    word = [host.bits(point)]
    for _ in range(length - 1):
        point = host.matrix(word[-1]) @ point + host.h
        word.append(host.bits(point))
    return np.stack(word)


def _primitive(word: np.ndarray) -> bool:
    """Whether the word is no repetition of a shorter one."""
    return not any(
        np.array_equal(np.roll(word, shift, axis=0), word) for shift in range(1, len(word)) if len(word) % shift == 0
    )


def _first_rotation(word: np.ndarray) -> np.ndarray:
    return min((np.roll(word, -shift, axis=0) for shift in range(len(word))), key=lambda w: w.tolist())
