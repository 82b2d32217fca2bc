"""Information measures of a latent space: von Neumann entropy, InfoNCE, Gaussian mutual information, water-filling."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxpapers.typing import AnyArray

FLOOR = 1e-8  # of an eigenvalue: rounding makes small ones negative


@jax.custom_vjp
def _spectral_entropy(rho: Array) -> Array:
    return _entropy(jnp.linalg.eigvalsh(rho))


def _entropy(eigenvalues: Array) -> Array:
    positive = jnp.maximum(eigenvalues, FLOOR)
    return -jnp.sum(positive * jnp.log(positive))


def _spectral_entropy_forward(rho: Array) -> tuple[Array, tuple[Array, Array]]:
    values, vectors = jnp.linalg.eigh(rho)
    return _entropy(values), (values, vectors)


def _spectral_entropy_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    # dS/drho = -(log rho + I): no derivative of an eigenvector, which would be infinite at equal eigenvalues. And no
    # zero below the floor, so that a dead mode can come back.
    values, vectors = residuals
    slopes = -(jnp.log(jnp.maximum(values, FLOOR)) + 1)
    return (cotangent * (vectors * slopes) @ vectors.T,)


_spectral_entropy.defvjp(_spectral_entropy_forward, _spectral_entropy_backward)


def von_neumann_entropy(z: Float[AnyArray, "*samples dim"], center: bool = True, eps: float = 1e-8) -> Float[Array, ""]:
    """S(rho) = -tr rho log rho of the latents' normalised covariance rho = (C + eps I) / tr(C + eps I) (Eq. 8).

    Between 0 (one mode) and log dim (isotropic). With fewer samples than dimensions the spectrum comes from the
    Gram matrix of the samples, which has the same nonzero part.

    Args:
        z: latents; all leading axes are samples.
        center: subtract the mean first.
        eps: added to every eigenvalue of C, so that the gradient of a dead mode is large but finite. It is not scaled
            with z: S is free of the scale of z only while all variances in use are far above eps, and grows below.

    Raises:
        ValueError: fewer than two samples, or eps <= 0.
    """
    z = jnp.asarray(z)
    dim = z.shape[-1]
    z = z.reshape(-1, dim).astype(jnp.promote_types(z.dtype, jnp.float32))
    if z.shape[0] < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {z.shape[0]}")
    if eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if center:
        z = z - z.mean(axis=0)
    count = z.shape[0]
    rows = z.T if count < dim else z
    gram = jnp.matmul(rows.T, rows, precision="highest") / (count - 1)
    total = jnp.trace(gram) + dim * eps
    entropy = _spectral_entropy((gram + eps * jnp.eye(gram.shape[0], dtype=z.dtype)) / total)
    dead = eps / total  # each of the eigenvalues that the Gram matrix of few samples has not
    return entropy - max(dim - count, 0) * dead * jnp.log(dead)


def effective_dimension(z: Float[AnyArray, "*samples dim"], center: bool = True) -> Float[Array, ""]:
    """Effective dimension exp S(rho), the modes in use, 1 to dim (Sec. 4). Raises as `von_neumann_entropy`."""
    return jnp.exp(von_neumann_entropy(z, center))


def info_nce(
    z: Float[AnyArray, "batch window dim"],
    k: int,
    temperature: float = 0.1,
    negatives: str = "batch",
    cosine: bool = True,
) -> Float[Array, ""]:
    """InfoNCE estimate of the latent mutual information, to be maximised (Eq. 9); the authors' loss is its negative.

    "batch" (the paper): mean over the anchors and over their neighbours p (1 <= |p - n| <= k, same window) of
    log exp(s_np) / sum_j exp(s_nj), j over the minibatch without n. "window" (the authors' code): anchors that
    have all 2k neighbours, log of the neighbours' summed share among the other positions of the window.

    Args:
        z: latents of windows.
        k: reach of the neighbourhood.
        temperature: s = similarity / temperature.
        negatives: "batch" or "window".
        cosine: similarity of the latents' directions, otherwise their scalar product.

    Raises:
        ValueError: k < 1, window <= 2k, temperature <= 0, or an unknown kind of negatives.
    """
    batch, window, dim = z.shape
    if k < 1 or window <= 2 * k:
        raise ValueError(f"needs k >= 1 and a window of more than 2k = {2 * k} positions, got {k=} and {window=}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if negatives not in ("batch", "window"):
        raise ValueError(f"negatives must be 'batch' or 'window', got {negatives!r}")
    z = jnp.asarray(z)
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    if cosine:
        # The floor stands inside the root: outside of it a latent at zero would have the gradient 0 * inf.
        z = z * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-24))
    position = np.arange(window)
    distance = np.abs(position[:, None] - position)
    neighbours = (distance >= 1) & (distance <= k)
    if negatives == "window":
        scores = jnp.einsum("btd,bsd->bts", z, z)[:, k : window - k] / temperature
        near, others = neighbours[k : window - k], distance[k : window - k] >= 1
        positive = jax.nn.logsumexp(jnp.where(near, scores, -jnp.inf), axis=-1)
        total = jax.nn.logsumexp(jnp.where(others, scores, -jnp.inf), axis=-1)
        return jnp.mean(positive - total)
    flat = z.reshape(batch * window, dim)
    scores = flat @ flat.T / temperature
    total = jax.nn.logsumexp(jnp.where(jnp.eye(batch * window, dtype=bool), -jnp.inf, scores), axis=-1)
    same = jnp.einsum("btd,bsd->bts", z, z) / temperature
    positive = jnp.sum(jnp.where(neighbours, same, 0), axis=-1) / neighbours.sum(axis=-1)
    return jnp.mean(positive - total.reshape(batch, window))


def noise_covariance(
    K: Float[AnyArray, "dim dim"], Sigma: Float[AnyArray, "dim dim"], n: int
) -> tuple[Float[Array, "dim dim"], Float[Array, "dim dim"]]:
    """K^n and M_n = sum_{i<n} K^i Sigma K^iT, the noise that n steps gather (Eq. 7).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    dtype = jnp.result_type(K, Sigma)
    K, Sigma = jnp.asarray(K, dtype), jnp.asarray(Sigma, dtype)

    def body(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, total = carry
        return power @ K, total + power @ Sigma @ power.T

    with jax.default_matmul_precision("highest"):
        return lax.fori_loop(0, n, body, (jnp.eye(K.shape[0], dtype=dtype), jnp.zeros_like(Sigma)))


def gaussian_mutual_information(
    K: Float[AnyArray, "dim dim"],
    C: Float[AnyArray, "dim dim"],
    Sigma: Float[AnyArray, "dim dim"],
    n: int = 1,
) -> Float[Array, ""]:
    """I(z_{t-n}; z_t) of z_t = K z_{t-1} + N(0, Sigma) with C = Cov(z_{t-n}) (Eq. 7), in nats.

    1/2 [log det(K^n C K^nT + M_n) - log det M_n]; never grows with n.

    Raises:
        ValueError: n < 1.
    """
    power, noise = noise_covariance(K, Sigma, n)
    with jax.default_matmul_precision("highest"):
        signal = power @ jnp.asarray(C) @ power.T
    return (jnp.linalg.slogdet(signal + noise)[1] - jnp.linalg.slogdet(noise)[1]) / 2


def transition_gains(
    K: Float[AnyArray, "dim dim"], Sigma: Float[AnyArray, "dim dim"], n: int = 1
) -> tuple[Float[Array, "dim"], Float[Array, "dim dim"]]:
    """Gains g, largest first, and directions V of M_n^{-1/2} K^n = U diag(sqrt g) V^T (Prop. 4).

    With C = V diag(p) V^T, Eq. 7 is sum 1/2 log(1 + g p): what `water_filling` maximises over p.

    Raises:
        ValueError: n < 1.
    """
    power, noise = noise_covariance(K, Sigma, n)
    # A Cholesky factor for M_n^{1/2}: the two differ by a rotation, which is U's.
    scaled = solve_triangular(jnp.linalg.cholesky(noise), power, lower=True)
    _, roots, directions = jnp.linalg.svd(scaled)
    return jnp.square(roots), directions.T


def conditional_information(
    covariance: Float[AnyArray, "dim dim"], first: Sequence[int], second: Sequence[int], given: Sequence[int] = ()
) -> Float[Array, ""]:
    """I(a; b | c) of jointly Gaussian variables, in nats, from the covariance of all of them.

    What Props. 1 and 3 speak of, for linear-Gaussian systems: the chain I(x_{n-1}; x_n) >= I(z_{n-1}; x_n) >=
    I(z_{n-1}; z_n), and the parts of I(z_t; x_t).

    Args:
        covariance: of all variables.
        first: rows of a.
        second: rows of b.
        given: rows of c; none: I(a; b).

    Raises:
        ValueError: an empty a or b, or rows that occur twice.
    """
    a, b, c = list(first), list(second), list(given)
    if not a or not b or len({*a, *b, *c}) != len(a) + len(b) + len(c):
        raise ValueError(f"first and second need rows, and no row may occur twice, got {a}, {b} and {c}")
    covariance = jnp.asarray(covariance)

    def log_det(rows: list[int]) -> Array:
        return jnp.linalg.slogdet(covariance[jnp.ix_(np.array(rows), np.array(rows))])[1] if rows else jnp.zeros(())

    return (log_det(a + c) + log_det(b + c) - log_det(a + b + c) - log_det(c)) / 2


def water_filling(
    gains: Float[AnyArray, "modes"], budget: float | int = 1.0, entropy_weight: float | int = 0.0
) -> Float[Array, "modes"]:
    """Variances p that maximise sum 1/2 log(1 + g p) + gamma S(p / c) under sum p = c (Props. 4 and 5).

    gamma = 0: p_i = max(0, 1/(2 mu) - 1/g_i), exact zeros for small gains. gamma > 0: bisection on mu, inside of
    it on log p_i of g/(2 (1 + g p)) - gamma/c (log(p/c) + 1) = mu; every p_i > 0.

    Args:
        gains: g >= 0, at least one positive.
        budget: c.
        entropy_weight: gamma.

    Raises:
        ValueError: a budget that is not positive, or a negative weight.
    """
    if budget <= 0:
        raise ValueError(f"budget must be above 0, got {budget}")
    if entropy_weight < 0:
        raise ValueError(f"entropy_weight must be at least 0, got {entropy_weight}")
    g = jnp.asarray(gains)
    if entropy_weight == 0:
        floor = 1 / jnp.sort(g)[::-1]
        levels = (budget + jnp.cumsum(floor)) / jnp.arange(1, g.shape[0] + 1)
        active = jnp.sum(levels > floor)
        return jnp.maximum(levels[active - 1] - 1 / g, 0)
    ratio = entropy_weight / budget

    def slope(log_share: Array) -> Array:
        return g / (2 * (1 + g * budget * jnp.exp(log_share))) - ratio * (log_share + 1)

    lowest = jnp.full_like(g, float(np.log(np.finfo(g.dtype).tiny)))

    def log_shares(mu: Array) -> Array:
        def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (bounds[0] + bounds[1]) / 2
            above = slope(middle) > mu
            return jnp.where(above, middle, bounds[0]), jnp.where(above, bounds[1], middle)

        low, high = lax.fori_loop(0, 70, halve, (lowest, jnp.zeros_like(g)))
        return (low + high) / 2

    def halve_level(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (bounds[0] + bounds[1]) / 2
        too_much = jnp.sum(jnp.exp(log_shares(middle))) > 1
        return jnp.where(too_much, middle, bounds[0]), jnp.where(too_much, bounds[1], middle)

    even = jnp.full_like(g, -float(np.log(g.shape[0])))
    start = (jnp.min(slope(jnp.zeros_like(g))), jnp.max(slope(even)))
    low, high = lax.fori_loop(0, 70, halve_level, start)
    return budget * jnp.exp(log_shares((low + high) / 2))
