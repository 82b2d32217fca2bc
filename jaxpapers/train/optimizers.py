"""Optimizers and learning-rate schedules by the names that optax gives them, as configs spell them."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

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
    optimizer = _lookup("optimizer", name, optimizers)
    try:
        inspect.signature(optimizer).bind(schedule, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer {name!r}: {error}; it takes {inspect.signature(optimizer)}") from None
    return optimizer(schedule, **arguments)
