"""Types that all rooms share."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray
Initializer = Callable[..., Array]  # (key, shape, dtype) -> array, as Flax's
