"""`fit`: the one training loop of all papers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxpapers.train.checkpoint import Checkpoints
from jaxpapers.train.metrics import MetricsWriter
from jaxpapers.train.progress import progress_bar
from jaxpapers.train.state import TrainState
from jaxpapers.train.step import TrainStep, scan_steps


class NonFiniteLoss(FloatingPointError):
    """Training was stopped because a metric was NaN or infinite."""


@runtime_checkable
class Batches(Protocol):
    """Random access to batches: `batches[step]` is a pure function of the step (a grain `MapDataset`)."""

    def __getitem__(self, step: int, /) -> Any: ...


class OnDevice(NamedTuple):
    """Batches that the device makes itself: `batch_at` is traced, with the step as an int32 scalar."""

    batch_at: Callable[[Array], PyTree]


class Best(NamedTuple):
    """The best parameters so far, by the evaluation metric that `fit` minimises.

    For a population each model has its own best: score and step have shape (models,).
    """

    score: Float[Array, "*models"]
    step: Int[Array, "*models"]
    params: PyTree


class Fitted(NamedTuple):
    """What `fit` returns: the last state, and the best parameters (None where nothing was minimised)."""

    state: TrainState
    best: Best | None


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Batches | OnDevice,
    num_steps: int,
    *,
    key: Array,
    steps_per_call: int = 1,
    log_every: int = 100,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    minimize: str | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    metrics: MetricsWriter | None = None,
    title: str = "train",
) -> Fitted:
    """Trains up to `num_steps` updates, from the newest checkpoint if there is one.

    Everything happens at steps that are multiples of `steps_per_call`, counted from 0, and every random draw
    depends on the step alone: a run that was stopped and resumed ends with the bits of one that was not.

    Args:
      state: the state before the first update; of one model or of a population. Its buffers are donated: use
        the returned state after, not this one.
      train_step: `(state, batch, key) -> (state, metrics)`, see `make_train_step` and `vmap_step`.
      batches: `batches[step]`, or `OnDevice(batch_at)`.
      num_steps: updates in all, those before a resume included.
      key: the run's key, or keys of shape (models,) for a population.
      steps_per_call: updates in one compiled program (`lax.scan`); logged values are means over them.
      log_every: steps between two lines of training metrics.
      evaluate: `state -> metrics`, called every `evaluate_every` steps and after the last.
      evaluate_every: see above.
      minimize: name of the evaluation metric by which the best parameters are kept; NaN counts as worst.
      checkpoints: where to save, every `checkpoint_every` steps and at the end.
      checkpoint_every: see above; default `evaluate_every`.
      metrics: where to write what was measured.
      title: what the progress bar says.

    Raises:
      ValueError: intervals that are not multiples of `steps_per_call`, or a metric to minimise that the
        evaluation does not return.
      NonFiniteLoss: loss or gradient of the model (of a population: of all its models) is not finite. Nothing is
        saved after that, so that the newest checkpoint is a good one.
    """
    checkpoint_every = checkpoint_every or evaluate_every or num_steps
    for name, every in {
        "log_every": log_every,
        "evaluate_every": evaluate_every,
        "checkpoint_every": checkpoint_every,
    }.items():
        if every is not None and every % steps_per_call and every < num_steps:
            raise ValueError(f"{name}={every} must be a multiple of steps_per_call={steps_per_call}")
    if minimize and evaluate is None:
        raise ValueError(f"minimize={minimize!r} needs an `evaluate` function")

    best = _no_best(state, key.shape) if minimize else None
    if checkpoints and (restored := checkpoints.restore((state, best))):
        _, (state, best) = restored
    call = _compiled_call(train_step, batches)
    step = int(state.step)
    with progress_bar(title, num_steps, step) as show:
        while step < num_steps:
            length = min(steps_per_call, num_steps - step)
            state, measured = call(state, step, length, key)
            step += length
            last = step == num_steps
            logs = step % log_every == 0 or last
            evaluates = evaluate is not None and (last or bool(evaluate_every and step % evaluate_every == 0))
            saves = checkpoints is not None and (last or step % checkpoint_every == 0)
            if logs or evaluates or saves:
                values = jax.device_get(measured)
                _require_finite(step, values)
                show(step, f"loss {np.nanmean(values['loss']):.3g}")
                if metrics and logs:
                    metrics.write(step, {f"train/{name}": value for name, value in values.items()})
            if evaluate is not None and evaluates:
                scores = jax.device_get(dict(evaluate(state)))
                if metrics:
                    metrics.write(step, {f"eval/{name}": value for name, value in scores.items()})
                if best is not None:
                    if minimize not in scores:
                        raise ValueError(
                            f"evaluate returned {sorted(scores)}, not {minimize!r}, which is to be minimised"
                        )
                    best = _better(best, jnp.asarray(scores[minimize], jnp.float32), state)
            if checkpoints is not None and saves:
                checkpoints.save(step, (state, best))
    return Fitted(state, best)


def _compiled_call(train_step: TrainStep, batches: Batches | OnDevice) -> Callable:
    """`(state, step, length, key) -> (state, metrics)`; the state's buffers are donated."""
    if isinstance(batches, OnDevice):
        programs: dict[int, Callable] = {}

        def scanned(state: TrainState, step: int, length: int, key: Array) -> tuple[TrainState, Any]:
            if length not in programs:
                programs[length] = jax.jit(scan_steps(train_step, batches.batch_at, length), donate_argnums=0)
            return programs[length](state, key)

        return scanned

    one_step = jax.jit(train_step, donate_argnums=0)

    def stepped(state: TrainState, step: int, length: int, key: Array) -> tuple[TrainState, Any]:
        history = []
        for index in range(step, step + length):
            state, measured = one_step(state, batches[index], key)
            history.append(measured)
        return state, history[0] if length == 1 else jax.tree.map(
            lambda *values: jnp.mean(jnp.stack(values), 0), *history
        )

    return stepped


def _require_finite(step: int, metrics: Mapping[str, Any]) -> None:
    # A finite loss with a gradient that is not has spoilt the parameters just now, so both are looked at. One diverged
    # model of a population must not stop the others: its NaNs stay in its own row.
    for name in ("loss", "grad_norm"):
        if name in metrics and not np.isfinite(metrics[name]).any():
            value = np.asarray(metrics[name]).tolist()
            raise NonFiniteLoss(f"{name} is {value} at step {step}; the newest checkpoint is from before")


def _no_best(state: TrainState, models: tuple[int, ...]) -> Best:
    params = jax.tree.map(jnp.copy, state.params)  # the state's own buffers are donated to the first call
    return Best(jnp.full(models, jnp.inf), jnp.zeros(models, jnp.int32), params)


@jax.jit
def _better(best: Best, score: Array, state: TrainState) -> Best:
    improved = score < best.score  # False for NaN

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(improved.reshape(improved.shape + (1,) * (new.ndim - improved.ndim)), new, old)

    return Best(pick(score, best.score), pick(state.step, best.step), jax.tree.map(pick, state.params, best.params))
