"""Batches: pure functions of the step, valid windows, even coverage, epochs that are permutations."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxpapers.data.windows import host_batches, sample_windows, window_batches

TIME, BATCH, WINDOW = 60, 16, 8
# Row t holds t and -t, so that a window tells where it was cut.
SERIES = np.stack([np.arange(TIME), -np.arange(TIME)], axis=1).astype(np.float32)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def batch():
    return jax.jit(window_batches(SERIES, BATCH, WINDOW, KEY))


def test_a_windows_batch_depends_on_its_step_alone(batch):
    forwards = [np.asarray(batch(step)) for step in range(6)]
    backwards = [np.asarray(batch(step)) for step in reversed(range(6))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({x.tobytes() for x in forwards}) == 6
    resumed = jax.jit(window_batches(SERIES, BATCH, WINDOW, jax.random.key(7)))
    np.testing.assert_array_equal(resumed(np.int64(5)), forwards[5])
    np.testing.assert_array_equal(window_batches(SERIES, BATCH, WINDOW, KEY)(jnp.asarray(5)), forwards[5])
    np.testing.assert_array_equal(
        sample_windows(jax.random.fold_in(KEY, 5), jnp.asarray(SERIES), BATCH, WINDOW), forwards[5]
    )


def test_windows_are_consecutive_rows_and_start_everywhere_alike(batch):
    windows = np.asarray(jax.jit(jax.vmap(batch))(jnp.arange(1_000)))
    starts = windows[:, :, 0, 0]
    np.testing.assert_array_equal(windows[..., 0], starts[..., None] + np.arange(WINDOW))
    np.testing.assert_array_equal(windows[..., 1], -windows[..., 0])
    counts = np.bincount(starts.astype(int).ravel(), minlength=TIME - WINDOW + 1)
    assert len(counts) == TIME - WINDOW + 1  # the last window that fits, and none beyond
    assert stats.chisquare(counts).pvalue > 1e-3  # a fixed key: it holds or it does not


def test_seeds_under_vmap_have_their_own_windows():
    keys = jax.random.split(KEY, 3)
    step = jax.jit(
        lambda keys, series, step: jax.vmap(lambda key: window_batches(series, BATCH, WINDOW, key)(step))(keys)
    )
    together = step(keys, SERIES, 2)
    assert together.shape == (3, BATCH, WINDOW, 2)
    for one, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(one, window_batches(SERIES, BATCH, WINDOW, key)(2))
    assert not np.array_equal(together[0], together[1])


def test_a_window_may_be_the_whole_series_in_any_precision():
    whole = window_batches(SERIES, 2, TIME, KEY)(0)
    np.testing.assert_array_equal(whole, [SERIES, SERIES])
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        with jax.enable_x64(True):
            batch = window_batches(jnp.asarray(SERIES, dtype), 2, 3, jax.random.key(7))
            assert jax.eval_shape(batch, 0).dtype == dtype


@pytest.mark.parametrize("make", [window_batches, lambda s, b, w, k: sample_windows(k, s, b, w)])
@pytest.mark.parametrize(
    ("batch_size", "window_length", "message"),
    [(4, 61, "windows of 61 rows .* series of 60 rows"), (0, 8, "got 0 and 8"), (4, 0, "got 4 and 0")],
)
def test_impossible_windows(make, batch_size, window_length, message):
    with pytest.raises(ValueError, match=message):
        make(SERIES, batch_size, window_length, KEY)


def examples(n):
    return {"image": np.arange(n * 6, dtype=np.uint8).reshape(n, 2, 3), "label": np.arange(n)}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_without_its_remainder(n, batch_size, seed):
    batch_size = min(batch_size, n)
    batches = host_batches(examples(n), batch_size, seed)
    steps = n // batch_size
    for epoch in (0, 1, 1000):
        labels = np.stack([batches[epoch * steps + step]["label"] for step in range(steps)])
        assert labels.shape == (steps, batch_size)
        assert len(np.unique(labels)) == labels.size
        assert set(labels.ravel()) <= set(range(n))


def epochs(seed, count, n=12, batch_size=4):
    batches = host_batches(np.arange(n), batch_size, seed)
    labels = [np.concatenate([batches[e * 3 + step] for step in range(3)]) for e in range(count)]
    return [tuple(epoch.tolist()) for epoch in labels]


def test_epochs_and_seeds_have_permutations_of_their_own():
    # Neighbouring seeds above all: seed + epoch must not be what counts.
    orders = [order for seed in range(5) for order in epochs(seed, 20)]
    assert len(set(orders)) == len(orders)
    assert epochs(3, 20) == epochs(3, 20)


def test_every_example_comes_to_every_place_and_is_dropped_alike():
    n, count = 10, 2_000
    batches = host_batches(np.arange(n), 4, seed=0)
    batches = np.asarray([[batches[2 * epoch + step] for step in range(2)] for epoch in range(count)])
    places = batches.reshape(count, 8)
    for place in range(8):
        assert stats.chisquare(np.bincount(places[:, place], minlength=n)).pvalue > 1e-4
    visits = np.bincount(places.ravel(), minlength=n)  # 2 of 10 dropped each epoch
    np.testing.assert_allclose(visits / count, 0.8, atol=5 * np.sqrt(0.8 * 0.2 / count))


def test_a_host_batch_depends_on_its_step_alone():
    source = examples(23)
    batches = host_batches(source, 5, seed=1)
    steps = [11, 0, 2**40, 3, 11]
    first = [batches[step] for step in steps]
    again = [host_batches(source, 5, seed=1)[step] for step in reversed(steps)][::-1]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    np.testing.assert_array_equal(first[0]["label"], first[4]["label"])
    for batch in first:
        assert batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"], source["image"][batch["label"]])


def test_a_transform_sees_whole_batches_and_iteration_has_the_same_order():
    double = lambda batch: {"label": 2 * batch["label"], "size": len(batch["label"])}  # noqa: E731
    batches = host_batches(examples(23), 5, seed=1, transform=double)
    plain = host_batches(examples(23), 5, seed=1)
    assert batches[7]["size"] == 5
    np.testing.assert_array_equal(batches[7]["label"], 2 * plain[7]["label"])
    read_ahead = iter(plain.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
    for step in range(6):
        np.testing.assert_array_equal(next(read_ahead)["label"], plain[step]["label"])


def test_a_memory_mapped_source_is_gathered_into_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20).reshape(10, 2))
    batches = host_batches(np.load(tmp_path / "x.npy", mmap_mode="r"), 3, seed=0)
    np.testing.assert_array_equal(batches[0][:, 1], batches[0][:, 0] + 1)


@pytest.mark.parametrize(
    ("source", "batch_size", "seed", "message"),
    [
        (np.zeros(5), 6, 0, "between 1 and the 5 examples, got 6"),
        (np.zeros(5), 0, 0, "got 0"),
        (np.zeros(5), 1, -1, "seed .* got -1"),
        ({"x": np.zeros(5), "y": np.zeros((4, 2))}, 1, 0, r"lengths \[4, 5\]"),
        ({}, 1, 0, r"lengths \[\]"),
    ],
)
def test_impossible_host_batches(source, batch_size, seed, message):
    with pytest.raises(ValueError, match=message):
        host_batches(source, batch_size, seed)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_several_processes_are_the_whole_batch(parts):
    source = {"x": np.arange(40), "y": np.arange(80).reshape(40, 2)}
    whole = host_batches(source, 8, seed=3)
    shares = [host_batches(source, 8, seed=3, part=(index, parts)) for index in range(parts)]
    for step in (0, 4, 5, 17):
        for name in source:
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, whole[step][name])
            assert len(shares[0][step][name]) == 8 // parts


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 3), (0, 0)])
def test_parts_that_do_not_fit_are_refused(part):
    with pytest.raises(ValueError, match=r"must be \(index, parts\)"):
        host_batches(np.arange(40), 8, seed=0, part=part)
