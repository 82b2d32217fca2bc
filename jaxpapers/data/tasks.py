"""Synthetic sequence tasks: what a recurrent state can hold and a layer of attention or of linear recurrence cannot.

The four tasks of ParaRNN (Danieli, Rodriguez, Sarabia, Suau, Zappella, ICLR 2026, arXiv 2510.21450, Tables 1 and 6),
each a pure function of a key:

| task | tokens | label at a position |
| --- | --- | --- |
| `parity` | bits | whether the ones so far are odd in number |
| `mqar` | pairs of key and value, then keys again amid noise | the value of the key |
| `k_hop` | anything | the token k jumps away, see `k_hop_labels` |
| `keep_nth` | anything | the n-th token of the sequence |

Sizes are Python integers, so that shapes are static: under `jit` they are static arguments (or bound by `partial`), and
`vmap` runs over keys, one of each seed. The mask says where a label counts: it is the weight of the position in a loss.
Labels outside of the mask are 0, a valid token, so that nothing has to be guarded before a look-up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray


class TaskBatch(NamedTuple):
    """Sequences of a task and what a model shall say at each position.

    Attributes:
        tokens: the input, int32.
        labels: the answer at each position; 0 where it does not count.
        mask: where the label counts.
    """

    tokens: Int[Array, "batch length"]
    labels: Int[Array, "batch length"]
    mask: Bool[Array, "batch length"]


def parity(key: PRNGKeyArray, batch: int, length: int) -> TaskBatch:
    """Running parity of random bits: y_l = (x_1 + .. + x_l) mod 2, at every position (Table 6, "Parity").

    The last label is the parity of the whole sequence, on which the paper's table judges.

    Args:
        key: draws the bits, 0 or 1 alike.
        batch: number of sequences.
        length: of each.

    Raises:
        ValueError: batch or length below 1.
    """
    _check_sizes(batch, length)
    tokens = _draw(key, (batch, length), 0, 2)
    return TaskBatch(tokens, running_parity(tokens), jnp.ones(tokens.shape, bool))


def running_parity(tokens: Int[Array | np.ndarray, "*batch length"]) -> Int[Array, "*batch length"]:
    """Sum mod 2 of all tokens up to and including each position."""
    # Of the lowest bits, so that no sum can overflow.
    return jnp.cumsum(jnp.asarray(tokens) & 1, axis=-1) & 1


def mqar(key: PRNGKeyArray, batch: int, length: int, num_pairs: int = 2, vocab: int = 128) -> TaskBatch:
    """Multi-query associative recall: `num_pairs` pairs (key, value), later each key again (Table 6, "MQAR").

    A sequence is k_1 v_1 .. k_n v_n and then noise, in which every key returns once, at a random place; there, and
    nowhere else, the label counts and is the key's value.

    The paper leaves the alphabets open. Here keys come from the lower half of the vocabulary, [0, vocab // 2), all
    different in a sequence, and values from the rest, each drawn by itself. Noise is drawn from all tokens that are no
    key of the sequence, so that a key after the pairs is always a question.

    Args:
        key: draws keys, values, places and noise.
        batch: number of sequences.
        length: of each, 3 num_pairs at least.
        num_pairs: kappa, 2 in the paper.
        vocab: number of tokens, 128 in the paper.

    Raises:
        ValueError: batch or num_pairs below 1, fewer than num_pairs keys in half the vocabulary, or a length that does
            not hold the pairs and the questions.
    """
    _check_sizes(batch, length)
    num_keys = vocab // 2
    if num_pairs < 1 or num_pairs > num_keys:
        raise ValueError(f"num_pairs must be between 1 and vocab // 2 = {num_keys}, got {num_pairs}")
    if length < 3 * num_pairs:
        raise ValueError(f"{num_pairs} pairs and a question for each need a length of {3 * num_pairs}, got {length}")
    rest = length - 2 * num_pairs
    of_keys, of_values, of_places, of_noise = jax.random.split(key, 4)
    keys = _distinct(of_keys, batch, num_keys, num_pairs)
    values = _draw(of_values, keys.shape, num_keys, vocab)
    pairs = jnp.stack([keys, values], axis=-1).reshape(batch, -1)

    # Uniform over the tokens that are no keys: count them off, and step over each key that is met.
    noise = _draw(of_noise, (batch, rest), 0, vocab - num_pairs)
    for taken in jnp.sort(keys, axis=1).T:
        noise += noise >= taken[:, None]

    places = _distinct(of_places, batch, rest, num_pairs)
    rows = jnp.arange(batch)[:, None]
    nothing = jnp.zeros_like(pairs)
    return TaskBatch(
        tokens=jnp.concatenate([pairs, noise.at[rows, places].set(keys)], axis=1),
        labels=jnp.concatenate([nothing, jnp.zeros_like(noise).at[rows, places].set(values)], axis=1),
        mask=jnp.concatenate([nothing > 0, jnp.zeros(noise.shape, bool).at[rows, places].set(True)], axis=1),
    )


def _distinct(key: PRNGKeyArray, batch: int, population: int, count: int) -> Int[Array, "batch count"]:
    """In each row `count` different numbers below `population`, every ordered choice as likely."""
    # The places of the largest of so many random numbers: one selection where a shuffle takes several sorts.
    return jax.lax.top_k(jax.random.uniform(key, (batch, population)), count)[1]


def k_hop(key: PRNGKeyArray, batch: int, length: int, hops: int = 1, vocab: int = 10) -> TaskBatch:
    """k-hop induction on uniformly random tokens (Table 6, "k-hop"): labels and mask of `k_hop_labels`.

    The paper takes vocab = 10 for one hop and 5 for two.

    Args:
        key: draws the tokens.
        batch: number of sequences.
        length: of each.
        hops: k.
        vocab: number of tokens.

    Raises:
        ValueError: batch, length, hops or vocab below 1.
    """
    _check_sizes(batch, length)
    _check_vocab(vocab)
    tokens = _draw(key, (batch, length), 0, vocab)
    labels, mask = k_hop_labels(tokens, hops)
    return TaskBatch(tokens, labels, mask)


def k_hop_labels(
    tokens: Int[Array | np.ndarray, "*batch length"], hops: int
) -> tuple[Int[Array, "*batch length"], Bool[Array, "*batch length"]]:
    """The token `hops` jumps away from every position, and whether there are that many jumps.

    A jump goes from a position to the one right after the last strictly earlier occurrence of the same token. The
    label is the token at the end of the last jump. A position whose token is new, and one from which jumps lead to
    such a position too early, has none: label 0, mask False.

    The last occurrences come from one stable sort of the tokens (equal tokens lie together there, in the order of their
    positions): O(L log L), no L x L array.

    Raises:
        ValueError: hops below 1.
    """
    if hops < 1:
        raise ValueError(f"hops must be at least 1, got {hops}")
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    order = jnp.argsort(tokens, axis=-1, stable=True)
    ordered = jnp.take_along_axis(tokens, order, axis=-1)
    repeated = jnp.concatenate([jnp.zeros_like(order[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    before = jnp.where(repeated, jnp.roll(order, 1, axis=-1), -1)
    last = jnp.put_along_axis(jnp.zeros_like(order), order, before, axis=-1, inplace=False)  # -1: none

    place, defined = positions, jnp.ones(tokens.shape, bool)
    for _ in range(hops):
        earlier = jnp.take_along_axis(last, place, axis=-1)
        defined &= earlier >= 0
        place = jnp.where(defined, earlier + 1, 0)
    return jnp.where(defined, jnp.take_along_axis(tokens, place, axis=-1), 0), defined


def keep_nth(key: PRNGKeyArray, batch: int, length: int, n: int = 5, vocab: int = 128) -> TaskBatch:
    """Remember the n-th token of a uniformly random sequence (Table 6, "Keep-nth").

    The paper says no more than that. Here the answer is asked from position n (counted from 1) to the end, as the
    running parity is: at position n it is the token itself, after it a memory of it; the last position is the answer
    after the whole sequence.

    Args:
        key: draws the tokens.
        batch: number of sequences.
        length: of each.
        n: which token, counted from 1; 5 in the paper.
        vocab: number of tokens, 128 in the paper.

    Raises:
        ValueError: batch, length or vocab below 1, n not between 1 and length.
    """
    _check_sizes(batch, length)
    _check_vocab(vocab)
    if not 1 <= n <= length:
        raise ValueError(f"n must be between 1 and the length {length}, got {n}")
    tokens = _draw(key, (batch, length), 0, vocab)
    mask = jnp.broadcast_to(jnp.arange(length) >= n - 1, tokens.shape)
    return TaskBatch(tokens, jnp.where(mask, tokens[:, n - 1 : n], 0), mask)


def _check_sizes(batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")


def _check_vocab(vocab: int) -> None:
    if vocab < 1:
        raise ValueError(f"vocab must be at least 1, got {vocab}")


def _draw(key: PRNGKeyArray, shape: tuple[int, ...], low: int, high: int) -> Int[Array, "..."]:
    """Tokens in [low, high), int32 whatever the default integer."""
    return jax.random.randint(key, shape, low, high, jnp.int32)
