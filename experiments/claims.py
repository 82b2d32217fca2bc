"""What the claims of several papers share: the numbers they compare, and how these are written out."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.harness import Metrics


def measured(metrics: Metrics, key: str, failed: float = np.nan) -> np.ndarray:
    """A measure as floats, one a seed, or more axes.

    Args:
      metrics: of a run, or as results.json has them ("nan" is NaN).
      key: of the measure.
      failed: what a number that is not finite counts as. NaN fails every comparison, so that no claim holds because
        something diverged, a rival included; inf is for a claim that counts a diverged seed as the worst of all.

    Raises:
      KeyError: there is no such measure, which makes a claim `not run`.
    """
    values = np.atleast_1d(np.asarray(metrics[key], float))
    return np.where(np.isfinite(values), values, failed)


def mean(metrics: Metrics, key: str) -> float:
    """Of all numbers of a measure; NaN where one is not finite."""
    return float(measured(metrics, key).mean())


def each(values: Iterable[Any], form: str = ".3f") -> str:
    """Numbers with commas between them, those that are not finite as "failed"."""
    return ", ".join(format(value, form) if np.isfinite(value) else "failed" for value in map(float, values))


def mean_and_each(values: np.ndarray, form: str = ".3f") -> str:
    """The mean of the seeds and, where there are several, each of them: `0.200 (0.100, 0.300)`."""
    seeds = each(values, form)
    return f"{each([values.mean()], form)} ({seeds})" if len(values) > 1 else seeds
