"""One update: loss, gradient, optimizer; for one model, or for a population under `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxpapers.train.state import TrainState

Metrics = dict[str, Array]
LossFn = Callable[[PyTree, PyTree, PyTree, Array], tuple[Float[Array, ""], tuple[PyTree, Metrics]]]
TrainStep = Callable[[TrainState, PyTree, Array], tuple[TrainState, Metrics]]


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """Turns a loss into an update `(state, batch, key) -> (state, metrics)`.

    Args:
      loss_fn: `(params, extra, batch, key) -> (loss, (extra, metrics))`, metrics a dict of scalars.
      optimizer: any optax transformation; clipping and accumulation are part of it.

    Returns:
      A pure function, not jitted: `fit` (or the caller) jits, scans or vmaps it. `key` is the run's key: the
      step's own key is `fold_in(key, state.step)`, so that a resumed run draws what it would have drawn. The
      metrics gain `loss` and `grad_norm`.
    """

    def train_step(state: TrainState, batch: PyTree, key: Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        (loss, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.extra, batch, step_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return train_step


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
