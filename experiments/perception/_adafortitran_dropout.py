"""Random bits for dropout alone, a tenth of the cost of JAX's own.

A part of `adafortitran`. Threefry is made to be strong: on a CPU the masks of AdaFortiTran's dropout take a third of an
update and most of its compilation. A mask needs no more than bits without a pattern: here those of a mixed counter (the
multiply-and-xorshift steps of MurmurHash3's kind), keyed by two words that threefry has made.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import define_prng_impl

THREEFRY = "threefry2x32"


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words in which every bit depends on all (C. Wellons' `lowbias32`)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if bit_width != 32:
        raise ValueError(f"these keys draw 32 bits, not {bit_width}")
    counter = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mix(_mix(counter + key[0]) ^ key[1])


def _threefry(key: Array) -> Array:
    return jax.random.wrap_key_data(key, impl=THREEFRY)


MASKS = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl=THREEFRY)),
    split=lambda key, shape: jax.random.key_data(jax.random.split(_threefry(key), shape)),
    random_bits=_bits,
    fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(_threefry(key), data)),
    name="masks",
    tag="masks",
)


def mask_key(key: Array) -> Array:
    """A key, or an array of them, for dropout: splits and folds as it did, its bits are cheap."""
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=MASKS)
