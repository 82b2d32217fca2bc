"""One update: loss, gradient, optimizer; for one model, or for a population under `vmap`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxpapers.train.state import TrainState

Metrics = dict[str, Array]
LossFn = Callable[[PyTree, PyTree, PyTree, Array], tuple[Float[Array, ""], tuple[PyTree, Metrics]]]
TrainStep = Callable[[TrainState, PyTree, Array], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    shardings: TrainState | None = None,
) -> TrainStep:
    """Turns a loss into an update `(state, batch, key) -> (state, metrics)`.

    Args:
      loss_fn: `(params, extra, batch, key) -> (loss, (extra, metrics))`, metrics a dict of scalars.
      optimizer: any optax transformation; clipping is part of it.
      microbatches: parts of a batch that go through the model one after another, so that the activations of one are in
        memory at a time. Loss, metrics and gradient are means over the parts, each with a key of its own; `extra` goes
        from part to part.
      shardings: with microbatches on a mesh, where the state lies (see `state_shardings`): sums of gradients lie there
        too, and every part has rows of every device, so that none moves to another one.

    Returns:
      A pure function, not jitted: `fit` (or the caller) jits, scans or vmaps it. `key` is the run's key: the
      step's own key is `fold_in(key, state.step)`, so that a resumed run draws what it would have drawn. The
      metrics gain `loss` and `grad_norm`.

    Raises:
      ValueError: microbatches below 1; from the update, a batch that they do not divide.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    mesh = None if shardings is None else shardings.step.mesh

    def measure(params: PyTree, extra: PyTree, batch: PyTree, key: Array) -> tuple[tuple[PyTree, Metrics], PyTree]:
        (loss, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, extra, batch, key)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        return (grads, {"loss": loss, **metrics}), extra

    def measure_parts(state: TrainState, batch: PyTree, key: Array) -> tuple[tuple[PyTree, Metrics], PyTree]:
        parts = jax.tree.map(partial(_split, count=microbatches, mesh=mesh), batch)

        def add(carry: tuple, part: tuple[Array, PyTree]) -> tuple[tuple, None]:
            total, extra = carry
            index, batch = part
            batch = jax.tree.map(partial(_over_data, mesh=mesh, axis=0), batch)
            found, extra = measure(state.params, extra, batch, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, found), extra), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes, _ = jax.eval_shape(measure, state.params, state.extra, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (total, extra), _ = jax.lax.scan(add, (zeros, state.extra), (jnp.arange(microbatches), parts))
        return jax.tree.map(lambda leaf: leaf / microbatches, total), extra

    def train_step(state: TrainState, batch: PyTree, key: Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        if microbatches == 1:
            (grads, metrics), extra = measure(state.params, state.extra, batch, step_key)
        else:
            (grads, metrics), extra = measure_parts(state, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, extra), {"grad_norm": optax.tree.norm(grads), **metrics}

    return train_step


def _split(leaf: Array | np.ndarray, count: int, mesh: Mesh | None) -> Array:
    """(count, rows, ...) of a batch: some rows of every device in each part."""
    if len(leaf) % count:
        raise ValueError(f"{count} microbatches do not divide a batch of {len(leaf)}")
    return _over_data(jnp.swapaxes(jnp.asarray(leaf).reshape(-1, count, *leaf.shape[1:]), 0, 1), mesh, axis=1)


def _over_data(leaf: Array, mesh: Mesh | None, axis: int) -> Array:
    if mesh is None:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")))


def vmap_step(train_step: TrainStep, *, shared_batch: bool = False) -> TrainStep:
    """The same update for a population of models (see `create_population`), each with its own key.

    Args:
      train_step: an update of one model.
      shared_batch: all models see one batch; otherwise the batch has a leading axis `models`.

    Returns:
      `(state, batch, keys) -> (state, metrics)` with keys and metrics of shape (models,).
    """
    axes = TrainState(step=None, params=0, opt_state=0, extra=0)
    return jax.vmap(train_step, in_axes=(axes, None if shared_batch else 0, 0), out_axes=(axes, 0))


def scan_steps(train_step: TrainStep, batch_at: Callable[[Any], PyTree], num_steps: int) -> Callable:
    """`num_steps` updates as one program: small models spend their time on the device, not in Python.

    Args:
      train_step: the update.
      batch_at: `step -> batch`, traced; see `OnDevice`.
      num_steps: length of the scan.

    Returns:
      `(state, key) -> (state, metrics)`, the metrics being means over the scanned steps.
    """

    def run(state: TrainState, key: Array) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            return train_step(state, batch_at(state.step), key)

        state, metrics = jax.lax.scan(body, state, None, length=num_steps)
        return state, jax.tree.map(lambda value: jnp.mean(value, axis=0), metrics)

    return run
