"""Optimizers and learning-rate schedules by the names that optax gives them, as configs spell them."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import optax

SCHEDULES = {
    name: getattr(optax.schedules, name) for name in dir(optax.schedules) if name.endswith(("schedule", "decay"))
}


def _call(kind: str, name: str, functions: Mapping[str, Any], *args: Any, **arguments: Any) -> Any:
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(functions))}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    function = functions[name]
    try:
        inspect.signature(function).bind(*args, **arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r}: {error}; it takes {inspect.signature(function)}") from None
    return function(*args, **arguments)


def make_schedule(name: str, **arguments: Any) -> optax.Schedule:
    """A schedule of `optax.schedules` by name, such as `cosine_decay_schedule`, with its own arguments.

    Raises:
      ValueError: no such schedule (the nearest name is suggested), or arguments that it does not take.
    """
    return _call("schedule", name, SCHEDULES, **arguments)


def exponential_per_epoch(start: float, end: float, num_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Exponential decay from `start` to `end` that changes once an epoch, as loops over epochs do it.

    Args:
      start: learning rate of the first epoch.
      end: learning rate that would be reached after `num_steps` updates.
      num_steps: updates in all.
      steps_per_epoch: updates between two changes.
    """
    epochs = max(num_steps / steps_per_epoch, 1.0)
    return optax.exponential_decay(start, steps_per_epoch, (end / start) ** (1.0 / epochs), staircase=True)


def make_optimizer(name: str, schedule: optax.ScalarOrSchedule, **arguments: Any) -> optax.GradientTransformation:
    """An optimizer of optax by name (`"adam"`, `"radam"`, `"adamw"`, ...) with a rate or schedule.

    Raises:
      ValueError: no such optimizer (the nearest name is suggested), or arguments that it does not take.
    """
    optimizers = {
        key: value
        for key, value in vars(optax).items()
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
    }
    return _call("optimizer", name, optimizers, schedule, **arguments)
