"""Dropout with half the random words: its masks are where a small Transformer spends a third of an update on a CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

LEVELS = 2**16


def keep_mask(key: PRNGKeyArray, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """True with probability 1 - rate, to 8e-6: an entry is half of a random word of 32 bits.

    Args:
        key: randomness.
        rate: share of False.
        shape: of the mask.

    Raises:
        ValueError: a rate outside of [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout must be in [0, 1), got {rate}")
    if not shape:
        return jax.random.bernoulli(key, 1 - rate)
    *leading, last = shape
    words = jax.random.bits(key, (*leading, -(-last // 2)), jnp.uint32)  # leading axes may be split over devices
    halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, 2 * words.shape[-1])[..., :last]
    return halves >= jnp.uint16(round(rate * LEVELS))


class Dropout(nn.Module):
    """Sets a share of the entries to zero; the others grow accordingly. The stream is `dropout`, as in Flax.

    Attributes:
        rate: share.
        deterministic: True: nothing is dropped.
    """

    rate: float
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies it.

        Raises:
            ValueError: a rate outside of [0, 1).
        """
        if self.deterministic or self.rate == 0:
            return x
        kept = keep_mask(self.make_rng("dropout"), self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))
