"""Tasks: golden figures, oracles that walk through the sequences, and what each task promises."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxpapers.data.tasks import TaskBatch, k_hop, k_hop_labels, keep_nth, mqar, parity, running_parity

GOLDEN = Path(__file__).parents[1] / "golden" / "pararnn" / "k_hop.npz"
labels_of = jax.jit(k_hop_labels, static_argnums=1)
# Few shapes: each compiles.
LENGTHS = (1, 2, 13)
TASKS = {
    "parity": partial(parity, batch=6, length=24),
    "mqar": partial(mqar, batch=6, length=24, num_pairs=3, vocab=16),
    "k_hop": partial(k_hop, batch=6, length=24, hops=2, vocab=4),
    "keep_nth": partial(keep_nth, batch=6, length=24, n=5, vocab=16),
}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_golden_k_hop(golden, hops):
    labels, mask = labels_of(golden["tokens"], hops)
    np.testing.assert_array_equal(np.where(mask, labels, -1), golden[f"label_k{hops}"])
    np.testing.assert_array_equal(labels[~mask], 0)
    np.testing.assert_array_equal(labels_of(golden["tokens"][2], hops)[0], labels[2])  # no batch axis


def test_golden_parity(golden):
    np.testing.assert_array_equal(running_parity(golden["tokens"]), golden["parity"])


def drawn(task, seed, *sizes):
    """A batch as numpy arrays; one program for it, where every operation by itself would be one."""
    return jax.tree.map(np.asarray, jax.jit(lambda key: task(key, *sizes))(jax.random.key(seed)))


def k_hop_oracle(tokens, hops):
    """Walks back from every position, looking at one token after the other."""
    answers = []
    for position in range(len(tokens)):
        place, left = position, hops
        while left and tokens[place] in tokens[:place]:
            earlier = place - 1
            while tokens[earlier] != tokens[place]:
                earlier -= 1
            place, left = earlier + 1, left - 1
        answers.append(-1 if left else tokens[place])
    return answers


@given(data=st.data(), hops=st.sampled_from([1, 2, 4]), length=st.sampled_from(LENGTHS), vocab=st.integers(1, 12))
def test_k_hop_is_a_walk(data, hops, length, vocab):
    row = st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length)
    tokens = np.array(data.draw(st.tuples(row, row)))
    labels, mask = labels_of(tokens, hops)
    np.testing.assert_array_equal(np.where(mask, labels, -1), [k_hop_oracle(row, hops) for row in tokens.tolist()])
    assert not np.any(mask[:, 0])  # nothing is earlier than the first token


@given(data=st.data(), length=st.sampled_from(LENGTHS))
def test_parity_counts(data, length):
    tokens = np.array(data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)), np.int32)
    expected, odd = [], False
    for token in tokens.tolist():
        odd ^= token % 2 == 1
        expected.append(odd)
    np.testing.assert_array_equal(running_parity(tokens), expected)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_its_key(name):
    task = TASKS[name]
    key = jax.random.key(3)
    # Through a program of its own, so that nothing is remembered from the first.
    batch, again = jax.jit(task)(key), jax.jit(lambda key: task(key))(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert isinstance(batch, TaskBatch)
    assert [leaf.shape for leaf in batch] == [(6, 24)] * 3
    assert [leaf.dtype for leaf in batch] == [jnp.int32, jnp.int32, jnp.bool_]
    with jax.enable_x64(True):
        assert jax.eval_shape(task, key).tokens.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(batch.labels)[~np.asarray(batch.mask)], 0)
    assert len({np.asarray(row).tobytes() for row in batch.tokens}) == 6

    keys = jax.random.split(key, 3)
    seeds = jax.jit(jax.vmap(task))(keys)
    assert seeds.tokens.shape == (3, 6, 24)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[1], seeds), jax.jit(task)(keys[1]))
    assert not np.array_equal(seeds.tokens[0], seeds.tokens[1])


def test_parity_asks_everywhere_about_even_bits():
    batch = drawn(parity, 0, 64, 100)
    assert np.all(batch.mask)
    np.testing.assert_array_equal(batch.labels, np.cumsum(batch.tokens, axis=1) % 2)
    np.testing.assert_array_equal(np.unique(batch.tokens), [0, 1])
    # Both bits and both answers are as likely at every place: 6400 draws, five standard deviations.
    for values in (batch.tokens, batch.labels):
        np.testing.assert_allclose(np.mean(values), 0.5, atol=5 * 0.5 / 80)


@pytest.mark.parametrize(
    ("length", "num_pairs", "vocab"),
    [(100, 2, 128), (9, 3, 6), (12, 4, 9), (3, 1, 2)],
    ids=["paper", "every key and no room for noise", "odd vocabulary", "smallest"],
)
def test_mqar_asks_for_what_it_has_given(length, num_pairs, vocab):
    batch = drawn(mqar, 1, 32, length, num_pairs, vocab)
    half = vocab // 2
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < vocab
    for tokens, labels, mask in zip(*batch, strict=True):
        keys, values = tokens[: 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2]
        assert len(set(keys)) == num_pairs
        assert np.all(keys < half)
        assert np.all(values >= half)
        given = dict(zip(keys.tolist(), values.tolist(), strict=True))
        asked = [place for place in range(2 * num_pairs, length) if tokens[place] in given]
        assert np.flatnonzero(mask).tolist() == asked
        assert sorted(tokens[asked]) == sorted(keys)  # every key, once
        assert [given[token] for token in tokens[asked].tolist()] == labels[asked].tolist()


def test_mqar_asks_everywhere_in_any_order_and_draws_everything():
    batch = drawn(mqar, 2, 4_000, 14, 2, 12)
    places = np.nonzero(batch.mask)[1].reshape(-1, 2)
    assert stats.chisquare(np.bincount(places.ravel() - 4, minlength=10)).pvalue > 1e-3  # a fixed key
    first = np.take_along_axis(batch.tokens, places[:, :1], axis=1)[:, 0]
    np.testing.assert_allclose(np.mean(first == batch.tokens[:, 0]), 0.5, atol=5 * 0.5 / np.sqrt(4_000))
    # Keys 0..5, values 6..11, and noise from all that are no keys: symmetric inside each half.
    for sample, low, high in (
        (batch.tokens[:, [0, 2]], 0, 6),
        (batch.tokens[:, [1, 3]], 6, 12),
        (batch.labels[batch.mask], 6, 12),
    ):
        assert stats.chisquare(np.bincount(sample.ravel() - low, minlength=high - low)).pvalue > 1e-3
        assert sample.min() == low
        assert sample.max() == high - 1
    noise = batch.tokens[:, 4:][~batch.mask[:, 4:]]
    # 4 of the 10 tokens that are no keys lie in the lower half.
    np.testing.assert_allclose(np.mean(noise < 6), 0.4, atol=5 * np.sqrt(0.24 / noise.size))


def test_k_hop_labels_its_own_tokens():
    batch = drawn(k_hop, 4, 16, 40, 2, 5)
    expected = [k_hop_oracle(tokens, 2) for tokens in batch.tokens.tolist()]
    np.testing.assert_array_equal(np.where(batch.mask, batch.labels, -1), expected)
    np.testing.assert_array_equal(np.unique(batch.tokens), np.arange(5))


@pytest.mark.parametrize("n", [1, 5, 12])
def test_keep_nth_asks_for_one_token_from_there_on(n):
    batch = drawn(keep_nth, 5, 8, 12, n, 128)
    for tokens, labels, mask in zip(*batch, strict=True):
        assert np.flatnonzero(mask).tolist() == list(range(n - 1, 12))
        assert set(labels[mask]) == {tokens[n - 1]}
    assert batch.tokens.max() < 128


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parity(KEY, 0, 5), "batch and length must be at least 1, got 0 and 5"),
        (lambda: parity(KEY, 2, 0), "got 2 and 0"),
        (lambda: mqar(KEY, 0, 9, 3, 8), "got 0 and 9"),
        (lambda: mqar(KEY, 2, 9, 0, 8), r"num_pairs must be between 1 and vocab // 2 = 4, got 0"),
        (lambda: mqar(KEY, 2, 30, 5, 9), r"vocab // 2 = 4, got 5"),
        (lambda: mqar(KEY, 2, 30, 1, 0), r"vocab // 2 = 0, got 1"),
        (lambda: mqar(KEY, 2, 8, 3, 8), "3 pairs and a question for each need a length of 9, got 8"),
        (lambda: k_hop(KEY, 2, 8, 0, 8), "hops must be at least 1, got 0"),
        (lambda: k_hop(KEY, 2, 8, 1, 0), "vocab must be at least 1, got 0"),
        (lambda: k_hop(KEY, 2, -1, 1, 5), "got 2 and -1"),
        (lambda: keep_nth(KEY, 2, 8, 0), "n must be between 1 and the length 8, got 0"),
        (lambda: keep_nth(KEY, 2, 8, 9), "n must be between 1 and the length 8, got 9"),
        (lambda: keep_nth(KEY, 2, 8, 3, -2), "vocab must be at least 1, got -2"),
        (lambda: keep_nth(KEY, 0, 8, 3), "got 0 and 8"),
    ],
)
def test_impossible_tasks(make, message):
    with pytest.raises(ValueError, match=message):
        make()
