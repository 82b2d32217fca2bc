"""Batches as pure functions of the step, so that a run resumed from step N continues bit for bit.

Two routes:

- `window_batches`, on the device: uniformly drawn windows of one long trajectory. Nothing leaves the
  accelerator, and several seeds train together under `vmap`, each with the windows of its own key.
- `host_batches`, on the host: shuffled epochs of arrays in host memory (or memory-mapped), for grain.

Neither has a state that matters: batch 1000 is the same whether the 999 before it were asked for or not.
"""

import sys
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped


def sample_windows(
    key: PRNGKeyArray, series: Shaped[Array | np.ndarray, "time *dims"], batch_size: int, window_length: int
) -> Shaped[Array, "batch window *dims"]:
    """Windows of consecutive rows whose first rows are drawn uniformly, with replacement, from all that fit.

    Args:
        key: draws the first rows.
        series: one trajectory.
        batch_size: number of windows.
        window_length: rows of a window (a model that predicts T steps from a start needs T + 1).

    Raises:
        ValueError: batch_size or window_length below 1, or windows longer than the series.
    """
    num_starts = _count_starts(series.shape[0], batch_size, window_length)
    series = jnp.asarray(series)
    starts = jax.random.randint(key, (batch_size,), 0, num_starts)
    return jax.vmap(lambda start: lax.dynamic_slice_in_dim(series, start, window_length))(starts)


def _count_starts(num_rows: int, batch_size: int, window_length: int) -> int:
    """Number of windows in a series, or the error of a caller who asks for impossible ones."""
    if batch_size < 1 or window_length < 1:
        raise ValueError(f"batch_size and window_length must be at least 1, got {batch_size} and {window_length}")
    if window_length > num_rows:
        raise ValueError(f"windows of {window_length} rows do not fit into a series of {num_rows} rows")
    return num_rows - window_length + 1


def window_batches(
    series: Float[Array | np.ndarray, "time dim"], batch_size: int, window_length: int, key: PRNGKeyArray
) -> Callable[[Int[ArrayLike, ""]], Float[Array, "batch window dim"]]:
    """Random windows as a function of the step: `batch(step)` is `sample_windows` with fold_in(key, step).

    `batch` composes under `jit` and `vmap`; seeds that train together take
    `jax.vmap(lambda key: window_batches(series, batch_size, window_length, key)(step))(keys)`.
    A jitted function that calls `batch` holds the series as a constant: make the series an argument of that
    function (and call `window_batches` or `sample_windows` inside it) where it is large.

    Args:
        series: one trajectory.
        batch_size: windows per batch.
        window_length: rows of a window.
        key: the run's key of the data; different keys give independent windows.

    Raises:
        ValueError: batch_size or window_length below 1, or windows longer than the series.
    """
    _count_starts(series.shape[0], batch_size, window_length)  # wrong sizes fail here, not at the first step

    def batch(step: Int[ArrayLike, ""]) -> Float[Array, "batch window dim"]:
        return sample_windows(jax.random.fold_in(key, step), series, batch_size, window_length)

    return batch


def host_batches(
    source: PyTree[Shaped[np.ndarray, "_ ..."]],
    batch_size: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    part: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """Endless shuffled batches of the examples in host arrays, by random access: `batches[step]`.

    Of n examples an epoch has S = n // batch_size steps: epoch e is steps e S to (e + 1) S - 1. It visits the
    examples in a permutation of its own, which depends on the seed and the epoch alone. Batches do not cross
    epochs: the last n mod batch_size examples of an epoch's permutation are dropped (others in each epoch),
    so that every batch is full and holds no example twice, as with shuffle=True, drop_last=True in PyTorch.

    The result is a grain dataset: `batches.to_iter_dataset()` iterates over it with threads that read ahead.

    Args:
        source: an array or a pytree (a dict, say) of arrays, whose axis 0 counts the examples.
        batch_size: examples per batch.
        seed: run's seed of the data, 0 or more.
        transform: applied to each batch on the host; must be a pure function of it (random augmentation
            belongs to the training step, which has a key).
        part: (index, number of parts): the rows of each batch that this process reads, where several share it;
            `(jax.process_index(), jax.process_count())`. The parts in their order are the whole batch.

    Returns:
        A dataset whose element `step` has the structure of `source`, with batch_size / parts rows in each array.

    Raises:
        ValueError: no arrays, arrays of different lengths, a batch_size below 1 or above the number of
            examples, a negative seed, or parts that do not divide the batch.
    """
    lengths = sorted({len(leaf) for leaf in jax.tree.leaves(source)})
    if len(lengths) != 1:
        raise ValueError(f"source must hold arrays of one common length, got lengths {lengths}")
    if not 1 <= batch_size <= lengths[0]:
        raise ValueError(f"batch_size must be between 1 and the {lengths[0]} examples, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    index, parts = part
    if not 0 <= index < parts or batch_size % parts:
        raise ValueError(f"part={part} must be (index, parts) with index < parts and parts dividing {batch_size} rows")
    size = batch_size // parts
    rows = slice(index * size, (index + 1) * size)
    batches = grain.MapDataset.source(_ShuffledBatches(source, lengths[0], batch_size, seed, rows))
    return batches if transform is None else batches.map(transform)


class _ShuffledBatches:
    """Random access to the batches of all epochs, as grain asks it of a data source.

    Not grain's own shuffle and batch, which take 14 microseconds for every example (a millisecond where there
    are few); this takes 20 for a batch of 128. And grain shuffles epoch e by seed + e, so that run 1 would
    repeat the epochs of run 0, one epoch early.
    """

    def __init__(self, source: Any, num_examples: int, batch_size: int, seed: int, rows: slice):
        self._source = source
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._rows = rows
        self._latest = (0, self._draw(0))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Any:
        epoch, index = divmod(step, self._num_examples // self._batch_size)
        rows = self._permutation(epoch)[index * self._batch_size : (index + 1) * self._batch_size]
        return jax.tree.map(lambda leaf: leaf[rows[self._rows]], self._source)

    def _permutation(self, epoch: int) -> np.ndarray:
        latest, permutation = self._latest  # read and written as one: threads may be in different epochs
        if epoch != latest:
            permutation = self._draw(epoch)
            self._latest = (epoch, permutation)
        return permutation

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).permutation(
            self._num_examples
        )
