"""Exact search, its measures and class means against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.timing import temporary_bytes
from jaxpapers.ops.search import exact_search, nearest_class_mean, retrieval_metrics, sharded_search
from jaxpapers.train import make_mesh

# The search runs compiled: op by op it would compile dozens of small programs.
search = jax.jit(exact_search, static_argnames=("k", "dim", "block", "query_block"))
sharded = jax.jit(sharded_search, static_argnames=("k", "mesh", "dim", "valid", "block", "query_block"))
measures = jax.jit(retrieval_metrics, static_argnames="k")


def brute_force(queries, database, dim, k):
    """Order by cosine, then by index."""
    q, x = (np.asarray(part, np.float64)[:, :dim] for part in (queries, database))
    norms = np.linalg.norm(x, axis=1)
    scores = q @ x.T / np.where(norms == 0, 1, norms)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module")
def search_data():
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 6)).astype(np.float32), rng.normal(size=(41, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("k", "block", "query_block"), [(1, 1, 1), (5, 4, 3), (41, 40, 1000), (41, 1000, 3), (5, 41, 7), (9, 4, 1000)]
)
def test_search_does_not_depend_on_its_blocks(search_data, k, block, query_block):
    queries, database = search_data
    found = search(queries, database, k=k, dim=4, block=block, query_block=query_block)
    np.testing.assert_array_equal(found, brute_force(queries, database, 4, k))


@pytest.mark.parametrize("block", [3, 64])
def test_equal_neighbours_come_by_index_and_lengths_do_not_matter(search_data, block):
    rng = np.random.default_rng(4)
    # Coordinates 0 and +-1 with two of them set: equal cosines are equal bits.
    rows = np.zeros((30, 4), np.float32)
    for row in rows:
        row[rng.choice(4, 2, replace=False)] = rng.choice([-1, 1], 2)
    scaled = rows * 2.0 ** rng.integers(-3, 4, size=(30, 1))
    expected = brute_force(rows[:5], rows, 4, 30)
    scaled = scaled.astype(np.float32)
    np.testing.assert_array_equal(search(rows[:5], scaled, k=30, block=block), expected)
    found = sharded(rows[:5], scaled, k=30, mesh=make_mesh(data=8), block=block)
    np.testing.assert_array_equal(found, expected)
    queries, database = search_data
    scaled = database * rng.uniform(0.1, 10, size=(41, 1)).astype(np.float32)
    found = search(3 * queries, scaled, k=41)
    np.testing.assert_array_equal(found, brute_force(queries, database, 6, 41))


def test_a_zero_row_is_no_nan():
    database = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    np.testing.assert_array_equal(search(database[1:2], database, k=3), [[1, 0, 2]])
    np.testing.assert_array_equal(search(database[:1], database, k=3), [[0, 1, 2]])


@pytest.mark.parametrize(("items", "k"), [(41, 9), (40, 7), (5, 5)])  # padded; even; fewer rows than devices
def test_a_search_over_devices_is_that_of_one(search_data, items, k):
    queries, database = search_data
    found = sharded(queries, database[:items], k=k, mesh=make_mesh(data=8), dim=5, block=4, query_block=4)
    np.testing.assert_array_equal(found, brute_force(queries, database[:items], 5, k))


def test_rows_that_only_fill_up_are_never_found(search_data):
    queries, database = search_data
    filled = np.concatenate([database, np.zeros((7, 6), np.float32)])
    options = {"k": 41, "mesh": make_mesh(data=8), "dim": 5, "block": 4}
    found = sharded(queries, filled, valid=41, **options)
    np.testing.assert_array_equal(found, brute_force(queries, database, 5, 41))


def test_no_queries_have_no_neighbours(search_data):
    _, database = search_data
    assert search(np.zeros((0, 6), np.float32), database, k=9).shape == (0, 9)


def test_search_holds_no_matrix_of_all_pairs():
    queries, database = (jax.ShapeDtypeStruct((count, 16), jnp.float32) for count in (3000, 50_000))
    lowered = search.lower(queries, database, k=10, dim=8, block=1000, query_block=500)
    assert temporary_bytes(lowered.compile()) < 50e6  # all pairs: 600 MB; a block of them: 2 MB


@given(st.sampled_from([1, 5, 12]), st.integers(0, 2**31))
def test_measures_by_loops(k, seed):
    rng = np.random.default_rng(seed)
    labels, query_labels = rng.integers(0, 4, size=30), rng.integers(0, 5, size=9)
    neighbors = np.stack([rng.permutation(30)[:12] for _ in range(9)])
    found = [float(value) for value in measures(neighbors, labels, query_labels, k=k)]
    rows = []
    for row, label in zip(neighbors, query_labels, strict=True):
        relevant = labels[row[:k]] == label
        average = sum(relevant[: j + 1].mean() for j in range(k) if relevant[j]) / k
        recall = relevant.sum() / max(np.sum(labels == label), 1)
        rows.append((relevant[0], average, relevant.mean(), recall, relevant.any()))
    np.testing.assert_allclose(found, np.mean(rows, axis=0), rtol=1e-5, atol=1e-7)
    top1, mean_average, precision, _, hit_rate = found
    assert 0 <= mean_average <= precision + 1e-6 <= hit_rate + 2e-6 <= 1 + 3e-6
    if k == 1:
        np.testing.assert_allclose([mean_average, precision], top1)


def test_measures_of_simple_lists():
    neighbors, query = np.arange(10)[None], np.zeros(1, int)
    ahead = measures(neighbors, np.array([0] * 3 + [1] * 7), query, k=10)
    np.testing.assert_allclose((ahead.map_at_k, ahead.precision, ahead.recall, ahead.hit_rate), (0.3, 0.3, 1, 1))
    np.testing.assert_allclose(measures(neighbors, np.zeros(10, int), query, k=10), 1)


def test_nearest_class_mean_by_loops():
    rng = np.random.default_rng(5)
    support, queries = rng.normal(size=(20, 6)).astype(np.float32), rng.normal(size=(15, 6)).astype(np.float32)
    labels = np.append(rng.integers(0, 3, size=18), [4, 4])  # nobody has label 3
    weights = (rng.uniform(size=20) > 0.3).astype(np.float32)
    weights[labels == 0] = [1] + [0] * (np.sum(labels == 0) - 1)
    for given_weights in (None, weights):
        used = np.ones(20, bool) if given_weights is None else weights > 0
        classes = [c for c in range(5) if (used & (labels == c)).any()]
        means = np.stack([support[used & (labels == c), :4].mean(axis=0) for c in classes])
        distance = np.linalg.norm(queries[:, None, :4] - means, axis=2)
        cosine = queries[:, :4] @ means.T / np.linalg.norm(means, axis=1)
        ours = partial(nearest_class_mean, support, labels, queries, 5, dim=4, weights=given_weights)
        np.testing.assert_array_equal(ours(), np.array(classes)[distance.argmin(axis=1)])
        np.testing.assert_array_equal(ours(cosine=True), np.array(classes)[cosine.argmax(axis=1)])


Z = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
LABELS = np.array([1, 4, 0, 4, 2, 3], np.int32)
TWO = np.array([0, 1, 0, 1])
LIST = np.arange(5)[None] % 4
BAD = {
    "k_large": (lambda: exact_search(Z, Z, 7), "k must be between 1 and the 6 items of the database, got 7"),
    "k_zero": (lambda: exact_search(Z, Z, 0), "got 0"),
    "dim": (lambda: exact_search(Z, Z, 1, dim=17), "not 17"),
    "block": (lambda: exact_search(Z, Z, 1, block=0), "block and query_block must be at least 1, got 0"),
    "axis": (lambda: sharded_search(Z, Z, 1, make_mesh(data=8), axis="rows"), "not 'rows'"),
    "few_valid": (lambda: sharded_search(Z, Z, 3, make_mesh(data=8), valid=2), "the 2 items of the database"),
    "metrics_k": (lambda: retrieval_metrics(LIST, TWO, TWO[:1], 6), "lists' length 5, got 6"),
    "metrics_rows": (lambda: retrieval_metrics(LIST, TWO[:3], TWO[:1], 2), "rows of a database of 3"),
    "support": (lambda: nearest_class_mean(Z, LABELS, Z, 4), "0..3, got 4"),
    "valid": (
        lambda: sharded_search(Z, Z, 1, make_mesh(data=8), valid=7),
        "valid must be between 1 and the 6 rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
