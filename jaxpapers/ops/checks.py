"""Refusals of what is no label and no size, for all that takes labels or parts of vectors."""

import jax
import numpy as np
from jaxtyping import Int

from jaxpapers.typing import AnyArray


def check_labels(labels: Int[AnyArray, "*batch"], num_classes: int) -> None:
    """Refuses labels outside of 0..num_classes - 1, where they are no traced values.

    Raises:
        ValueError: the first such label.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    strange = values[(values < 0) | (values >= num_classes)]
    if strange.size:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {strange[0]}")


def check_size(m: int, width: int) -> int:
    """m, a size of a prefix.

    Raises:
        ValueError: outside of 1..width.
    """
    if not 1 <= m <= width:
        raise ValueError(f"a prefix of an embedding of width {width} has 1 to {width} coordinates, not {m}")
    return m
