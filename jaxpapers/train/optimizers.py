"""Optimizers and learning-rate schedules by the names that optax gives them, as configs spell them."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jaxpapers.train.mesh import path_name

# Name in optax -> a schedule from `start` to `end` in `num_steps` updates.
SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "constant_schedule": lambda start, end, num_steps: optax.constant_schedule(start),
    "linear_schedule": optax.linear_schedule,
    "cosine_decay_schedule": lambda start, end, num_steps: optax.cosine_decay_schedule(start, num_steps, end / start),
    "exponential_decay": lambda start, end, num_steps: optax.exponential_decay(start, num_steps, end / start),
}


def _lookup(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return known[name]


def make_schedule(
    name: str, start: float, end: float, num_steps: int, *, warmup_steps: int = 0, steps_per_change: int = 1
) -> optax.Schedule:
    """A learning-rate schedule by its optax name, described by what all schedules have in common.

    Args:
      name: one of `SCHEDULES`: "constant_schedule" (which has no end), "linear_schedule", "cosine_decay_schedule",
        "exponential_decay".
      start: the largest rate, that of the first update unless there is a warm-up.
      end: the rate after `num_steps` updates, and from then on (the exponential decay goes on).
      num_steps: updates in all, the warm-up included.
      warmup_steps: updates in which the rate rises linearly from 0 to `start`.
      steps_per_change: the rate stays as it is for so many updates: 1, or an epoch's, as loops over epochs do.

    Raises:
      ValueError: no such schedule (the nearest name is suggested); rates that are not positive (`end` may be 0, but
        not in an exponential decay); a warm-up that leaves no updates; intervals below 1.
    """
    shape = _lookup("schedule", name, SCHEDULES)
    if not start > 0 or not end >= 0 or (end == 0 and name == "exponential_decay"):
        raise ValueError(f"{name} cannot go from a rate of {start} to one of {end}")
    if not 0 <= warmup_steps < num_steps or steps_per_change < 1:
        raise ValueError(
            f"{name}: warmup_steps={warmup_steps} of num_steps={num_steps}, steps_per_change={steps_per_change}"
        )
    decay = shape(start, end, num_steps - warmup_steps)
    warmup = optax.linear_schedule(0.0, start, warmup_steps)
    schedule = optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay
    return lambda step: schedule(step // steps_per_change * steps_per_change)


def make_optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    frozen: Sequence[str] = (),
    **arguments: Any,
) -> optax.GradientTransformation:
    """An optimizer of optax by name (`"adam"`, `"radam"`, `"adamw"`, ...) with a rate or schedule, and what runs share.

    Args:
      name: a function of optax that takes a learning rate.
      schedule: the rate; it counts the optimizer's updates, not the batches.
      clip_norm: gradients are scaled down to this global norm (of the parameters that are not frozen).
      accumulate: batches whose gradients are averaged into one update; as one batch so many times larger, if the loss
        is a mean over examples and nothing else links them.
      ema_decay: also keeps an exponential moving average of the parameters, see `averaged_params`.
      frozen: regular expressions; parameters whose path (such as `encoder/layers_0/kernel`) one of them is found in
        are not trained, and the optimizer keeps nothing for them.
      **arguments: of the optimizer.

    Raises:
      ValueError: no such optimizer (the nearest name is suggested), or arguments that it does not take; an optimizer
        that needs more than gradients and parameters (a line search), or a plain rate; a clipping norm
        or a number of batches that is not positive, a decay outside [0, 1). At `init`: a pattern that matches nothing.
    """
    optimizers = {
        key: value
        for key, value in vars(optax).items()
        if not key.startswith("_")
        and inspect.isfunction(value)
        and "learning_rate" in inspect.signature(value).parameters
    }
    function = _lookup("optimizer", name, optimizers)
    try:
        inspect.signature(function).bind(schedule, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer {name!r}: {error}; it takes {inspect.signature(function)}") from None
    if not (clip_norm is None or clip_norm > 0) or accumulate < 1 or not (ema_decay is None or 0 <= ema_decay < 1):
        raise ValueError(
            f"expected clip_norm > 0, accumulate >= 1, 0 <= ema_decay < 1; got {clip_norm}, {accumulate}, {ema_decay}"
        )
    try:
        optimizer = function(schedule, **arguments)
        if not arguments:  # some of them (masks) are made for the model's parameters, not for this probe
            jax.eval_shape(lambda probe: optimizer.update(probe, optimizer.init(probe), probe), jnp.zeros(1))
    except TypeError as error:
        raise ValueError(f"optimizer {name!r} needs more than gradients, or takes no schedule: {error}") from None
    if clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    if frozen:
        parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, functools.partial(_labels, frozen))
    if ema_decay is not None:
        optimizer = optax.chain(optimizer, _average_params(ema_decay))
    if accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, accumulate).gradient_transformation()
    return optimizer


def _labels(frozen: Sequence[str], params: PyTree) -> PyTree:
    """Every parameter's label, "frozen" or "trained"."""
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    if unused := [pattern for pattern in frozen if not any(re.search(pattern, name) for name in names)]:
        raise ValueError(f"nothing to freeze for {unused}; the parameters are {', '.join(names)}")
    return jax.tree.map_with_path(
        lambda path, _: "frozen" if any(re.search(pattern, path_name(path)) for pattern in frozen) else "trained",
        params,
    )


class AverageState(NamedTuple):
    """Moving average of the parameters, a leaf a parameter."""

    average: PyTree


def _average_params(decay: float) -> optax.GradientTransformation:
    """Changes no update; keeps e <- decay e + (1 - decay) p of the parameters p after each, from e = p at the start."""

    def init(params: PyTree) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))  # a copy: the state's buffers are donated one by one

    def update(updates: PyTree, state: AverageState, params: PyTree = None) -> tuple[PyTree, AverageState]:
        moved = optax.apply_updates(params, updates)
        return updates, AverageState(optax.incremental_update(moved, state.average, 1 - decay))

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: PyTree) -> PyTree:
    """The moving average of the parameters in the state of an optimizer made with `ema_decay`.

    Raises:
      ValueError: the optimizer keeps none.
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_average) if _is_average(node)]
    if not found:
        raise ValueError("the optimizer keeps no average of the parameters: make it with ema_decay")
    return found[0].average


def _is_average(node: Any) -> bool:
    return isinstance(node, AverageState)
