"""PolyReLU, PolyNorm and their general form, with backward passes that keep x alone (Sec. 2).

Coefficients are ascending, (a_0, ..., a_r); the authors' code has them descending (`coeffs_from_reference`). Powers and
sums are in float32 at least, whatever x is: in float16 x^3 overflows from 40 on and x^6 from 6.4.

The two fused functions have derivatives of their own: reverse mode, reverse over reverse and forward over reverse
(`jax.hessian`, Hessian-vector products) work; forward mode of the function itself (`jax.jvp`, `jax.jacfwd`) is refused
by JAX with a TypeError. `polycom` has all of them.
"""

from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpapers.nn.encoder import gelu
from jaxpapers.typing import AnyArray

EPSILON = 1e-6
KINDS = ("I", "II")


RHOS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "gelu": gelu, "silu": jax.nn.silu}


def init_coeffs(order: int) -> Float[np.ndarray, "terms"]:
    """The coefficients that training starts from: a_0 = 0, a_i = 1 / r.

    Raises:
        ValueError: an order below 1.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    return np.array([0.0] + [1 / order] * order)


def coeffs_from_reference(weight: Float[AnyArray, "order"], bias: Float[AnyArray, "one"]) -> Float[np.ndarray, "terms"]:
    """Ascending coefficients of the authors' parameters: weight (a_r, ..., a_1), bias (a_0,).

    Raises:
        ValueError: no weight, or a bias of another length than 1.
    """
    if len(weight) < 1 or len(bias) != 1:
        raise ValueError(f"expected a weight of 1 or more and a bias of 1, got {len(weight)} and {len(bias)}")
    return np.concatenate([np.asarray(bias), np.asarray(weight)[::-1]])


def coeffs_to_reference(
    coeffs: Float[AnyArray, "terms"],
) -> tuple[Float[np.ndarray, "order"], Float[np.ndarray, "one"]]:
    """The inverse of `coeffs_from_reference`: (weight, bias).

    Raises:
        ValueError: fewer than two coefficients.
    """
    coeffs = np.asarray(coeffs)
    _check_coeffs(coeffs)
    return coeffs[:0:-1], coeffs[:1]


def rms_normalise(z: Float[AnyArray, "*shape"], eps: float = EPSILON, axis: int = -1) -> Float[Array, "*shape"]:
    """N(z) = z / sqrt(mean(z^2) + eps), in float32 at least.

    The paper writes z / ||z||_2; the authors' code, and every figure here, has the mean, sqrt(n) times as large.
    """
    z = jnp.asarray(z, jnp.promote_types(z.dtype, jnp.float32))
    return z * lax.rsqrt(jnp.mean(jnp.square(z), axis=axis, keepdims=True) + eps)


def polycom(
    x: Float[AnyArray, "*shape"],
    coeffs: Float[AnyArray, "terms"],
    rho: Callable[[Array], Array],
    kind: str = "I",
) -> Float[Array, "*shape"]:
    """The general form, type I: sum_i a_i rho(x)^i, or II: a_0 + sum_i a_i rho(x^i), i = 1..r.

    Plain JAX: backward it keeps every power. `jax.checkpoint` around it keeps x alone.

    Args:
        x: inputs.
        coeffs: (a_0, ..., a_r).
        rho: of arrays of the shape of x, in float32 at least.
        kind: "I" or "II"; in "II" a_0 stands outside of rho, as in the authors' PolyNorm.

    Raises:
        ValueError: fewer than two coefficients; an unknown kind.
    """
    _check_coeffs(coeffs)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown, expected one of {KINDS}")
    z, a = _exact(x, coeffs)
    if kind == "I":
        return _horner(a, rho(z)).astype(x.dtype)
    terms = [a[i] * rho(lax.integer_pow(z, i)) for i in range(1, len(a))]
    return reduce(jnp.add, terms, a[0]).astype(x.dtype)


def poly_norm(
    x: Float[AnyArray, "*shape"],
    coeffs: Float[AnyArray, "terms"],
    *,
    eps: float = EPSILON,
    axis: int = -1,
    axis_name: str | None = None,
) -> Float[Array, "*shape"]:
    """PolyNorm: a_0 + sum_i a_i N(x^i), i = 1..r, N as in `rms_normalise` (Sec. 2).

    With m_i = mean(x^2i), s_i = (m_i + eps)^-1/2 and q_i = mean(g x^i) for a cotangent g:

        dx = sum_i a_i i x^(i-1) s_i (g - x^i q_i s_i^2),   da_i = sum over tokens of n q_i s_i,   da_0 = sum g

    Kept for it are x and the r numbers s_i of every token.

    Args:
        x: inputs.
        coeffs: (a_0, ..., a_r).
        eps: below the root, the same for every power: N(x^3) fades once rms(x^3) < sqrt(eps).
        axis: the width n that the means run over.
        axis_name: inside `jax.shard_map`, the mesh axis over which the width is split: means are those of the whole
            width. (Under `jax.jit` with sharded arrays the compiler sees to that.)

    Raises:
        ValueError: fewer than two coefficients; an eps that is not above 0; no such axis.
    """
    _check_coeffs(coeffs)
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is outside of the {x.ndim} axes of x")
    x = jnp.asarray(x)
    return _poly_norm(x, _varying_as(x, coeffs), eps, axis, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _poly_norm(x: Array, coeffs: Array, eps: float, axis: int, axis_name: str | None) -> Array:
    return _poly_norm_forward(x, coeffs, eps, axis, axis_name)[0]


def _poly_norm_forward(
    x: Array, coeffs: Array, eps: float, axis: int, axis_name: str | None
) -> tuple[Array, tuple[Array, tuple[Array, ...], Array]]:
    z, a = _exact(x, coeffs)
    squares = [jnp.square(lax.integer_pow(z, i)) for i in range(1, len(a))]
    s = tuple(lax.rsqrt(m + eps) for m in _whole_means(squares, axis, axis_name))
    y = _horner([a[0], *(a_i * s_i for a_i, s_i in zip(a[1:], s, strict=True))], z)
    return y.astype(x.dtype), (x, s, coeffs)


def _poly_norm_backward(
    eps: float, axis: int, axis_name: str | None, residuals: tuple[Array, tuple[Array, ...], Array], g: Array
) -> tuple[Array, Array]:
    x, s, coeffs = residuals
    z, a = _exact(x, coeffs)
    g = g.astype(z.dtype)
    products = [g * lax.integer_pow(z, i) for i in range(1, len(a))]
    q = _whole_means(products, axis, axis_name)
    slopes = [i * a[i] * s_i for i, s_i in enumerate(s, 1)]
    # The second sum is x times a polynomial of x^2. q s is of the size of g: multiplied first, nothing underflows.
    pulls = [slope * (q_i * s_i) * s_i for slope, q_i, s_i in zip(slopes, q, s, strict=True)]
    dx = g * _horner(slopes, z) - z * _horner(pulls, jnp.square(z))
    # Of this shard's width alone: what the other shards contribute is added where the coefficients became varying.
    da = [jnp.sum(g)] + [
        jnp.sum(jnp.sum(product, axis, keepdims=True) * s_i) for product, s_i in zip(products, s, strict=True)
    ]
    return dx.astype(x.dtype), jnp.stack(da).astype(coeffs.dtype)


_poly_norm.defvjp(_poly_norm_forward, _poly_norm_backward)


def poly_relu(x: Float[AnyArray, "*shape"], coeffs: Float[AnyArray, "terms"]) -> Float[Array, "*shape"]:
    """PolyReLU: sum_i a_i ReLU(x)^i, i = 0..r (Sec. 2), keeping x alone for the backward pass.

    (0, 1, 0, 0) is ReLU and (0, 0, 1, 0) ReLU^2, to the bit.

    Args:
        x: inputs.
        coeffs: (a_0, ..., a_r).

    Raises:
        ValueError: fewer than two coefficients.
    """
    _check_coeffs(coeffs)
    x = jnp.asarray(x)
    return _poly_relu(x, _varying_as(x, coeffs))


@jax.custom_vjp
def _poly_relu(x: Array, coeffs: Array) -> Array:
    return _poly_relu_forward(x, coeffs)[0]


def _poly_relu_forward(x: Array, coeffs: Array) -> tuple[Array, tuple[Array, Array]]:
    z, a = _exact(x, coeffs)
    return _horner(a, jax.nn.relu(z)).astype(x.dtype), (x, coeffs)


def _poly_relu_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, coeffs = residuals
    z, a = _exact(x, coeffs)
    r, g = jax.nn.relu(z), g.astype(z.dtype)
    dx = jnp.where(z > 0, g * _horner([i * a_i for i, a_i in enumerate(a)][1:], r), 0)
    da = [jnp.sum(g)] + [jnp.sum(g * lax.integer_pow(r, i)) for i in range(1, len(a))]
    return dx.astype(x.dtype), jnp.stack(da).astype(coeffs.dtype)


_poly_relu.defvjp(_poly_relu_forward, _poly_relu_backward)


def _check_coeffs(coeffs: AnyArray) -> None:
    if coeffs.ndim != 1 or len(coeffs) < 2:
        raise ValueError(f"coeffs must be (a_0, ..., a_r) with an order r of at least 1, got the shape {coeffs.shape}")


def _exact(x: AnyArray, coeffs: AnyArray) -> tuple[Array, list[Array]]:
    """Inputs and the coefficients one by one, in float32 at least."""
    z = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    return z, list(jnp.asarray(coeffs, z.dtype))


def _horner(coeffs: list[Array], z: Array) -> Array:
    """coeffs_0 + coeffs_1 z + ..."""
    return reduce(lambda y, c: y * z + c, coeffs[-2::-1], jnp.broadcast_to(coeffs[-1], z.shape))


def _whole_means(arrays: list[Array], axis: int, axis_name: str | None) -> list[Array]:
    """Means over the axis, kept with length 1, of all shards together."""
    count = arrays[0].shape[axis]
    sums = [jnp.sum(array, axis, keepdims=True) for array in arrays]
    if axis_name is not None:
        count *= lax.axis_size(axis_name)
        sums = lax.psum(sums, axis_name)
    return [total / count for total in sums]


def _varying_as(x: Array, coeffs: AnyArray) -> Array:
    """Inside `shard_map`: the coefficients as varying over every axis that x varies over.

    A cotangent must vary as what it belongs to does; the transpose of this cast sums it over the axes.
    """
    coeffs = jnp.asarray(coeffs)
    axes = jax.typeof(x).mat.varying - jax.typeof(coeffs).mat.varying
    return lax.pcast(coeffs, tuple(sorted(axes)), to="varying") if axes else coeffs


def _coeffs_param(module: nn.Module, order: int, param_dtype: DTypeLike) -> AnyArray:
    start = init_coeffs(order)

    def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jnp.asarray(start, dtype)

    return module.param("coeffs", init, start.shape, param_dtype)


class PolyNorm(nn.Module):
    """`poly_norm` over the last axis with learned coefficients, r + 1 of them whatever the width.

    Attributes:
        order: r.
        eps: below the root.
        axis_name: mesh axis over which the width is split, inside `jax.shard_map` (see `poly_norm`).
        dtype: of the result; None: that of the input. The computation is in float32 at least.
        param_dtype: of the coefficients.
    """

    order: int = 3
    eps: float = EPSILON
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Applies the activation.

        Raises:
            ValueError: an order below 1; an eps that is not above 0.
        """
        coeffs = _coeffs_param(self, self.order, self.param_dtype)
        return poly_norm(x, coeffs, eps=self.eps, axis_name=self.axis_name).astype(self.dtype or x.dtype)


class PolyReLU(nn.Module):
    """`poly_relu` with learned coefficients.

    Attributes:
        order: r.
        dtype: of the result; None: that of the input. The computation is in float32 at least.
        param_dtype: of the coefficients.
    """

    order: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation.

        Raises:
            ValueError: an order below 1.
        """
        return poly_relu(x, _coeffs_param(self, self.order, self.param_dtype)).astype(self.dtype or x.dtype)


class PolyCom(nn.Module):
    """Type I with another rho: sum_i a_i rho(x)^i (the paper's ablation). Backward, everything is computed again.

    Attributes:
        rho: "prelu" (with a learned slope, 0.25 at first), or one of `RHOS`.
        order: r.
        dtype: of the result; None: that of the input. The computation is in float32 at least.
        param_dtype: of coefficients and slope.
    """

    rho: str
    order: int = 3
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation.

        Raises:
            ValueError: an unknown rho; an order below 1.
        """
        if self.rho not in (*RHOS, "prelu"):
            raise ValueError(f"rho {self.rho!r} is unknown, expected one of {(*RHOS, 'prelu')}")
        coeffs = _coeffs_param(self, self.order, self.param_dtype)
        if self.rho == "prelu":
            slope = self.param("slope", nn.initializers.constant(0.25), (), self.param_dtype)

            def compose(x: Array, coeffs: Array, slope: Array) -> Array:
                return polycom(x, coeffs, lambda z: jnp.where(z > 0, z, slope.astype(z.dtype) * z))

            y = jax.checkpoint(compose)(jnp.asarray(x), coeffs, slope)
        else:
            y = jax.checkpoint(partial(polycom, rho=RHOS[self.rho]))(jnp.asarray(x), coeffs)
        return y.astype(self.dtype or x.dtype)


class PolyReLUNorm(nn.Module):
    """a_0 + sum_i a_i N(ReLU(x)^i) (the paper's ablation; its exact form is not printed).

    Attributes:
        order: r.
        eps: below the root.
        axis_name: as of `PolyNorm`.
        dtype: of the result; None: that of the input. The computation is in float32 at least.
        param_dtype: of the coefficients.
    """

    order: int = 3
    eps: float = EPSILON
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Applies the activation.

        Raises:
            ValueError: an order below 1; an eps that is not above 0.
        """
        coeffs = _coeffs_param(self, self.order, self.param_dtype)
        y = poly_norm(jax.nn.relu(x), coeffs, eps=self.eps, axis_name=self.axis_name)
        return y.astype(self.dtype or x.dtype)
