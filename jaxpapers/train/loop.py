"""`fit`: the one training loop of all papers."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from jaxpapers.train.checkpoint import Checkpoints
from jaxpapers.train.mesh import Rules, place, place_batch, state_shardings, to_host
from jaxpapers.train.metrics import MetricsWriter
from jaxpapers.train.progress import progress_bar
from jaxpapers.train.state import TrainState
from jaxpapers.train.step import TrainStep, scan_steps
from jaxpapers.train.stopping import Terminated, sigterm_noted

# A finite loss with a gradient that is not has spoilt the parameters just now, so both are looked at, of every step.
WATCHED = ("loss", "grad_norm")


class NonFiniteLoss(FloatingPointError):
    """Training was stopped because a metric was NaN or infinite."""


@runtime_checkable
class Batches(Protocol):
    """Random access to batches: `batches[step]` is a pure function of the step (a grain `MapDataset`)."""

    def __getitem__(self, step: int, /) -> Any: ...


class OnDevice(NamedTuple):
    """Batches that the device makes itself.

    Attributes:
      batch_at: `step -> batch`, with data `(step, data) -> batch`; traced, with the step as an int32 scalar.
      data: None, or a pytree of arrays that batches are taken from, such as a text. It is an argument of the program,
        whole on every device of a mesh, and in no checkpoint. What `batch_at` closes over is compiled into the program.
    """

    batch_at: Callable[..., PyTree]
    data: PyTree = None


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
    patience: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    metrics: MetricsWriter | None = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    title: str = "train",
) -> Fitted:
    """Trains up to `num_steps` updates, from the newest checkpoint if there is one.

    Everything happens at steps that are multiples of `steps_per_call`, counted from 0, and every random draw
    depends on the step alone: a run that was stopped and resumed ends with the bits of one that was not. SIGTERM is
    held back until the call in progress has ended and its state is saved.

    Args:
      state: the state before the first update; of one model or of a population. Its buffers are donated: use
        the returned state after, not this one.
      train_step: `(state, batch, key) -> (state, metrics)`, see `make_train_step` and `vmap_step`.
      batches: `batches[step]`, or `OnDevice(batch_at, data)`; a resumed run takes the data that it is given.
      num_steps: updates in all, those before a resume included.
      key: the run's key, or keys of shape (models,) for a population.
      steps_per_call: updates in one compiled program (`lax.scan`); logged values are means over them.
      log_every: steps between two lines of training metrics.
      evaluate: `state -> metrics`, called every `evaluate_every` steps and after the last.
      evaluate_every: see above.
      minimize: name of the evaluation metric by which the best parameters are kept; NaN counts as worst.
      patience: end early where an evaluation comes so many steps after the best one (of a population: of any model's).
      checkpoints: where to save, every `checkpoint_every` steps and at the end.
      checkpoint_every: see above; default `evaluate_every`.
      metrics: where to write what was measured.
      mesh: where to train; None for one device. Batches are split over its axis `data` (`OnDevice` ones are made
        there; of others each process gives its own rows).
      rules: how parameters are placed on the mesh, see `jaxpapers.train.mesh`.
      title: what the progress bar says.

    Raises:
      ValueError: intervals below 1 or not multiples of `steps_per_call`, or a metric to minimise that the
        evaluation does not return; rules and batches that do not fit the mesh.
      Terminated: SIGTERM came; the state is in the checkpoints.
      NonFiniteLoss: loss or gradient of a step, or, before a save, parameters or optimizer state of the model (of a
        population: of all its models) are not finite. Nothing is saved after that: the newest checkpoint is a good one.
    """
    intervals = {"log_every": log_every, "evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, steps in ({"num_steps": num_steps, "steps_per_call": steps_per_call} | intervals).items():
        if steps is not None and steps < 1:
            raise ValueError(f"{name}={steps} must be at least 1")
    for name, every in intervals.items():
        if every is not None and every % steps_per_call and every < num_steps:
            raise ValueError(f"{name}={every} must be a multiple of steps_per_call={steps_per_call}")
    checkpoint_every = checkpoint_every or evaluate_every or num_steps
    if minimize and evaluate is None:
        raise ValueError(f"minimize={minimize!r} needs an `evaluate` function")
    if patience is not None and (minimize is None or patience < 1):
        raise ValueError(f"patience={patience} must be at least 1, and needs a metric to minimise, got {minimize!r}")

    def waited_enough(step: int, best: Best | None) -> bool:
        return best is not None and patience is not None and step - int(jnp.max(best.step)) >= patience

    shardings = None
    if mesh is not None:
        shardings = state_shardings(state, mesh, rules)
        state, key = place((state, key), (shardings, _whole(mesh)))
    best = _no_best(state, key.shape, mesh) if minimize else None
    if checkpoints and (restored := checkpoints.restore((state, best))):
        _, (state, best) = restored
    step = int(state.step)
    ended = waited_enough(step, best)  # before it was resumed
    advancing = _advancing(train_step, batches, range(step, num_steps), shardings)
    with progress_bar(title, num_steps, step) as show, sigterm_noted() as stops_now, advancing as advance:
        unseen: list[tuple[range, Mapping[str, Any]]] = []  # watched values of the calls since the last look
        while step < num_steps and not ended:
            length = min(steps_per_call, num_steps - step)
            state, measured = advance(state, key, length)
            watched = {name: measured[name] for name in WATCHED if name in measured}
            unseen.append((range(step + 1, step + length + 1), watched))
            step += length
            last = step == num_steps
            stops = stops_now()  # after the last step, too: what follows `fit` can wait for the resume
            logs = step % log_every == 0 or last
            evaluates = evaluate is not None and (last or bool(evaluate_every and step % evaluate_every == 0))
            saves = checkpoints is not None and (last or stops or step % checkpoint_every == 0)
            if logs or evaluates or saves:
                seen, values = jax.device_get((unseen, measured))
                unseen.clear()
                for steps, watched in seen:
                    _require_finite(steps, watched)
                show(step, f"loss {np.nanmean(values['loss']):.3g}")
                if metrics and logs:
                    metrics.write(step, {f"train/{name}": value for name, value in values.items()})
            if evaluate is not None and evaluates:
                scores = to_host(dict(evaluate(state)))
                if metrics:
                    metrics.write(step, {f"eval/{name}": value for name, value in scores.items()})
                if best is not None:
                    if minimize not in scores:
                        raise ValueError(
                            f"evaluate returned {sorted(scores)}, not {minimize!r}, which is to be minimised"
                        )
                    best = _better(best, np.asarray(scores[minimize], np.float32), state)
                stops = stops_now() or stops  # an evaluation may take minutes
                ended = waited_enough(step, best)
                saves = saves or (checkpoints is not None and (stops or ended))
            if checkpoints is not None and saves:
                for part, tree in (("parameters are", state.params), ("optimizer's state is", state.opt_state)):
                    if not _sound(tree, key.ndim):
                        raise NonFiniteLoss(
                            f"the {part} not finite after step {step}; the newest checkpoint is from before"
                        )
                checkpoints.save(step, (state, best))
            if stops:
                raise Terminated(f"{title}: stopped by SIGTERM after step {step}{', which is saved' if saves else ''}")
    return Fitted(state, best)


def update_program(
    train_step: TrainStep, batches: Batches | OnDevice, steps_per_call: int = 1, shardings: TrainState | None = None
) -> Callable:
    """The jitted program that `fit` calls again and again, for those who plan or time it.

    Args:
      train_step: as of `fit`.
      batches: as of `fit`.
      steps_per_call: as of `fit`; matters for `OnDevice` batches alone.
      shardings: what `state_shardings` returned; None for one device.

    Returns:
      `(state, key, data) -> (state, metrics)` for `OnDevice` batches, the data being theirs (left out where there are
      none); `(state, batch, key) -> (state, metrics)` for others. The state is donated.
    """
    options: dict[str, Any] = {"donate_argnums": 0}
    if shardings is not None:
        options["out_shardings"] = (shardings, _whole(shardings.step.mesh))
    if not isinstance(batches, OnDevice):
        return jax.jit(train_step, **options)
    split = None if shardings is None else NamedSharding(shardings.step.mesh, PartitionSpec("data"))

    def updates(state: TrainState, key: Array, data: PyTree = None) -> tuple[TrainState, Any]:
        def batch_at(step: Array) -> PyTree:
            batch = batches.batch_at(step) if data is None else batches.batch_at(step, data)
            return batch if split is None else jax.lax.with_sharding_constraint(batch, split)

        return scan_steps(train_step, batch_at, steps_per_call)(state, key)

    return jax.jit(updates, **options)


def _whole(mesh: Mesh) -> NamedSharding:
    """Of what lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


@contextmanager
def _advancing(
    train_step: TrainStep, batches: Batches | OnDevice, steps: range, shardings: TrainState | None
) -> Iterator[Callable]:
    """Yields `(state, key, length) -> (state, metrics)`, which does the next `length` of these steps."""
    if isinstance(batches, OnDevice):
        program = cache(lambda length: update_program(train_step, batches, length, shardings))
        data = jax.device_put(batches.data) if shardings is None else place(batches.data, _whole(shardings.step.mesh))
        yield lambda state, key, length: program(length)(state, key, data)
        return
    one_step = update_program(train_step, batches, 1, shardings)
    with closing(_prefetched(batches, steps, None if shardings is None else shardings.step.mesh)) as ahead:

        def advance(state: TrainState, key: Array, length: int) -> tuple[TrainState, Any]:
            history = []
            for _ in range(length):
                state, measured = one_step(state, next(ahead), key)
                history.append(measured)
            if length == 1:
                return state, history[0]
            return state, jax.tree.map(lambda *values: jnp.mean(jnp.stack(values), 0), *history)

        yield advance


def _prefetched(batches: Batches, steps: range, mesh: Mesh | None, depth: int = 2) -> Generator[PyTree, None, None]:
    """The batches of these steps on the device; `depth` of them are read and sent while the device works."""

    def load(step: int) -> PyTree:
        return jax.device_put(batches[step]) if mesh is None else place_batch(batches[step], mesh)

    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(load, step) for step in steps[:depth])
        for step in steps:
            batch = pending.popleft().result()
            if step + depth < steps.stop:
                pending.append(pool.submit(load, step + depth))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _require_finite(steps: range, watched: Mapping[str, Any]) -> None:
    # One diverged model of a population must not stop the others: its NaNs stay in its own row.
    for name in WATCHED:
        if name in watched and not np.isfinite(watched[name]).any():
            value = np.asarray(watched[name]).tolist()
            where = f"at step {steps[0]}" if len(steps) == 1 else f"in steps {steps[0]} to {steps[-1]}"
            raise NonFiniteLoss(f"{name} is {value} {where}; the newest checkpoint is from before")


@partial(jax.jit, static_argnums=1)
def _sound(tree: PyTree, population_axes: int) -> Array:
    """Whether all numbers are finite; in a population, those of any model.

    A step too long spoils the parameters alone, a gradient that is large, but finite, Adam's second moment.
    """
    finite = [
        jnp.isfinite(leaf).all(tuple(range(population_axes, leaf.ndim)))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return reduce(jnp.logical_and, finite, jnp.array(True)).any()


def _no_best(state: TrainState, models: tuple[int, ...], mesh: Mesh | None) -> Best:
    params = jax.tree.map(jnp.copy, state.params)  # the state's own buffers are donated to the first call
    score, step = np.full(models, np.inf, np.float32), np.zeros(models, np.int32)
    if mesh is None:
        return Best(jnp.asarray(score), jnp.asarray(step), params)
    score, step = place((score, step), _whole(mesh))
    return Best(score, step, params)


@jax.jit
def _better(best: Best, score: Array, state: TrainState) -> Best:
    improved = score < best.score  # False for NaN

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(improved.reshape(improved.shape + (1,) * (new.ndim - improved.ndim)), new, old)

    return Best(pick(score, best.score), pick(state.step, best.step), jax.tree.map(pick, state.params, best.params))
