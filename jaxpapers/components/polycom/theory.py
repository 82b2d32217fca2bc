"""What PolyReLU networks can represent and approximate (Sec. 3), and ReLU networks for comparison.

Every ReLU network is a PolyReLU network of the same size (a = 0, 1, 0, 0). A PolyReLU network squares and multiplies
exactly, and so evaluates local Taylor polynomials under a partition of unity exactly: with h cells per axis an f in
W^{n,inf} of d variables is approximated to O(h^-n) by O(h^d) weights, the optimal rate O(eps^(-d/n)). A ReLU network
pays ln(1/eps) layers for every square (Yarotsky, arXiv 1610.01145).
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.components.polycom.activations import poly_relu
from jaxpapers.typing import AnyArray


def exact_power(z: Float[AnyArray, "*shape"], exponent: int) -> Float[Array, "*shape"]:
    """z^k = ReLU(z)^k + (-1)^k ReLU(-z)^k: two PolyReLU units, so polynomials are PolyReLU networks.

    Raises:
        ValueError: an exponent below 1.
    """
    if exponent < 1:
        raise ValueError(f"exponent must be at least 1, got {exponent}")
    z = jnp.asarray(z)
    unit = jnp.zeros(exponent + 1, z.dtype).at[exponent].set(1)
    return poly_relu(z, unit) + (-1) ** exponent * poly_relu(-z, unit)


def exact_square(z: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """z^2 by one layer of two PolyReLU units."""
    return exact_power(z, 2)


def exact_product(u: Float[AnyArray, "*shape"], v: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """The product u v = ((u + v)^2 - (u - v)^2) / 4 by one layer of four PolyReLU units."""
    u, v = jnp.asarray(u), jnp.asarray(v)
    return (exact_square(u + v) - exact_square(u - v)) / 4


def local_taylor_network(
    f_derivs: Sequence[Callable[[Array], Array]], n: int, N: int
) -> Callable[[Float[AnyArray, "points"]], Float[Array, "points"]]:
    """The network of the proof: local Taylor polynomials under hats, every product exact; its error is O(N^-n).

        f(x) ~ sum_k hat_k(x) sum_{j < n} f^(j)(k/N) / j! (x - k/N)^j,   k = 0..N

    Hats are three ReLU units each, their sum is 1 on [0, 1], and two of them at most differ from 0 at any x.

    Args:
        f_derivs: f and its derivatives, n of them, of arrays.
        n: terms of a Taylor polynomial: the smoothness that is used.
        N: cells of [0, 1].

    Returns:
        The network, of points in [0, 1].

    Raises:
        ValueError: n or N below 1, fewer than n functions.
    """
    if n < 1 or N < 1:
        raise ValueError(f"n and N must be at least 1, got {n} and {N}")
    if len(f_derivs) < n:
        raise ValueError(f"n = {n} needs as many derivatives, f among them, got {len(f_derivs)}")

    def network(x: Float[AnyArray, "points"]) -> Float[Array, "points"]:
        x = jnp.asarray(x)
        nodes = jnp.arange(N + 1, dtype=x.dtype) / N
        distance = x[:, None] - nodes
        relu = jnp.array([0, 1, 0, 0], x.dtype)
        left, middle, right = (poly_relu(N * distance + shift, relu) for shift in (1, 0, -1))
        hats = left - 2 * middle + right
        taylor = jnp.broadcast_to(f_derivs[0](nodes), distance.shape)
        power = distance
        for j in range(1, n):
            taylor = taylor + f_derivs[j](nodes) / math.factorial(j) * power
            power = exact_product(power, distance)
        return exact_product(hats, taylor).sum(axis=1)

    return network


def sawtooth_square(x: Float[AnyArray, "*shape"], levels: int) -> Float[Array, "*shape"]:
    """x^2 on [0, 1] by a ReLU network of so many levels, to 2^(-2 levels - 2) (Yarotsky, Prop. 2).

        x - sum_{s = 1..levels} T(T(...T(x))) / 4^s,   T(x) = 2 ReLU(x) - 4 ReLU(x - 1/2) + 2 ReLU(x - 1)

    Raises:
        ValueError: levels below 1.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    x = jnp.asarray(x)
    relu = jnp.array([0, 1], x.dtype)
    square, tooth = x, x
    for level in range(1, levels + 1):
        low, middle, high = (poly_relu(tooth - start, relu) for start in (0.0, 0.5, 1.0))
        tooth = 2 * low - 4 * middle + 2 * high
        square = square - tooth / 4**level
    return square


def layer_similarity(states: Float[AnyArray, "layers *batch width"]) -> Float[Array, "layers layers"]:
    """Cosine similarity of every token's states after two layers, mean over tokens (the paper's analysis)."""
    states = jnp.asarray(states)
    unit = states / jnp.linalg.norm(states, axis=-1, keepdims=True)
    unit = unit.reshape(len(states), -1, states.shape[-1])
    return jnp.einsum("itw,jtw->ij", unit, unit) / unit.shape[1]
