"""Koopman operators: least squares, rollouts, spectra, DMD, kernel regression on random features, LQR."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve, solve_triangular
from jaxtyping import Array, Complex, Float, Key

from jaxpapers.typing import AnyArray


def ridge_operator(
    z: Float[AnyArray, "batch time dim"],
    z_next: Float[AnyArray, "batch time dim"],
    ridge: float = 0.1,
    per_window: bool = False,
) -> Float[Array, "dim dim"]:
    """K of z_next = K z by ridge least squares; transposed to the authors' row convention z_next = z K (Sec. 5).

    Pooled over the batch, or, as the authors' code has it, the mean of one solution a window. Where there are
    fewer rows than dimensions the solve is of the rows' size: (Z^T Z + r I)^-1 Z^T = Z^T (Z Z^T + r I)^-1.

    Raises:
        ValueError: ridge <= 0.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    dtype = jnp.promote_types(jnp.result_type(z, z_next), jnp.float32)
    z, z_next = jnp.asarray(z, dtype), jnp.asarray(z_next, dtype)

    if per_window:
        return jnp.mean(jax.vmap(lambda rows, targets: _ridge(rows, targets, ridge))(z, z_next), axis=0).T
    dim = z.shape[-1]
    return _ridge(z.reshape(-1, dim), z_next.reshape(-1, dim), ridge).T


def _ridge(rows: Array, targets: Array, ridge: float) -> Array:
    count, dim = rows.shape
    with jax.default_matmul_precision("highest"):
        if count < dim:
            gram = rows @ rows.T + ridge * jnp.eye(count, dtype=rows.dtype)
            return rows.T @ solve(gram, targets, assume_a="pos")
        gram = rows.T @ rows + ridge * jnp.eye(dim, dtype=rows.dtype)
        return solve(gram, rows.T @ targets, assume_a="pos")


def rollout(
    K: Float[AnyArray, "dim dim"], z0: Float[AnyArray, "*batch dim"], steps: int
) -> Float[Array, "*batch time dim"]:
    """Latents K z0, K^2 z0, ..., K^steps z0 (Sec. 3).

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    transposed = jnp.asarray(K).T

    def body(z: Array, _: None) -> tuple[Array, Array]:
        z = jnp.matmul(z, transposed, precision="highest")
        return z, z

    return jnp.moveaxis(lax.scan(body, jnp.asarray(z0), length=steps)[1], 0, -2)


def graph_transition(
    K: Float[AnyArray, "dim dim"], adjacency: Float[AnyArray, "nodes nodes"], z: Float[AnyArray, "*batch nodes dim"]
) -> Float[Array, "*batch nodes dim"]:
    """One step of K(A) = A (x) K, an operator that the nodes of a graph share (Sec. 5): z_i <- sum_j A_ij K z_j."""
    return jnp.einsum("ij,...jd,ed->...ie", adjacency, z, K, precision="highest")


def spectrum(K: Float[AnyArray, "dim dim"]) -> Complex[np.ndarray, "dim"]:
    """Eigenvalues of K, largest modulus first (Fig. 2); on the host, in float64."""
    values = np.linalg.eigvals(np.asarray(K, np.float64)).astype(np.complex128)
    return values[np.argsort(-np.abs(values), kind="stable")]


def dmd(x: Float[AnyArray, "batch time dim"], rank: int) -> Float[Array, "dim dim"]:
    """Dynamic mode decomposition: the least-squares x_{t+1} = A x_t on the leading `rank` singular directions.

    Raises:
        ValueError: rank outside 1..min(rows, dim).
    """
    x = jnp.asarray(x)
    dim = x.shape[-1]
    past, future = x[:, :-1].reshape(-1, dim), x[:, 1:].reshape(-1, dim)
    if not 1 <= rank <= min(past.shape):
        raise ValueError(f"rank must lie in 1..{min(past.shape)}, got {rank}")
    u, s, vt = jnp.linalg.svd(past, full_matrices=False)
    return (future.T @ u[:, :rank] / s[:rank]) @ vt[:rank]


class KernelKoopman(NamedTuple):
    """Kernel Koopman regression on random Fourier features: x -> features -> K -> x.

    Attributes:
        frequencies: (dim, features).
        phases: (features,).
        K: (features, features).
        readout: (dim, features).
    """

    frequencies: Array
    phases: Array
    K: Array
    readout: Array


def fourier_features(model: KernelKoopman, x: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch features"]:
    """sqrt(2/D) cos(x w + b), whose scalar products estimate a Gaussian kernel (Rahimi and Recht 2007)."""
    count = model.phases.shape[0]
    return jnp.sqrt(2 / count) * jnp.cos(x @ model.frequencies + model.phases)


def fit_kernel_koopman(
    key: Key[Array, ""], x: Float[AnyArray, "batch time dim"], features: int, length_scale: float, ridge: float = 1e-6
) -> KernelKoopman:
    """The baseline KKR (kernel EDMD) of Table 2, for low-dimensional states.

    Raises:
        ValueError: features < 1, length_scale <= 0 or ridge <= 0.
    """
    if features < 1 or length_scale <= 0:
        raise ValueError(f"needs features >= 1 and length_scale > 0, got {features} and {length_scale}")
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    x = jnp.asarray(x)
    dim = x.shape[-1]
    key_w, key_b = jax.random.split(key)
    model = KernelKoopman(
        jax.random.normal(key_w, (dim, features), x.dtype) / length_scale,
        jax.random.uniform(key_b, (features,), x.dtype, 0, 2 * np.pi),
        jnp.zeros((features, features), x.dtype),
        jnp.zeros((dim, features), x.dtype),
    )
    phi = fourier_features(model, x)
    damping = np.sqrt(ridge) * jnp.eye(features, dtype=x.dtype)

    def least_squares(rows: Array, targets: Array) -> Array:
        # QR, not the normal equations: these square a condition number that float32 barely holds as it is.
        q, r = jnp.linalg.qr(jnp.concatenate([rows.reshape(-1, features), damping]))
        projected = q[:-features].T @ targets.reshape(-1, targets.shape[-1])
        return solve_triangular(r, projected).T

    with jax.default_matmul_precision("highest"):
        return model._replace(K=least_squares(phi[:, :-1], phi[:, 1:]), readout=least_squares(phi, x))


def forecast_kernel_koopman(
    model: KernelKoopman, x0: Float[AnyArray, "*batch dim"], steps: int
) -> Float[Array, "*batch time dim"]:
    """Forecast of steps 1..steps, in feature space throughout."""
    return rollout(model.K, fourier_features(model, x0), steps) @ model.readout.T


def lqr(
    K: Float[AnyArray, "dim dim"],
    B: Float[AnyArray, "dim control"],
    Q: Float[AnyArray, "dim dim"],
    R: Float[AnyArray, "control control"],
    horizon: int = 200,
) -> tuple[Float[Array, "control dim"], Float[Array, "dim dim"]]:
    """Gain G and cost-to-go P of a = -G (z - goal) after `horizon` Riccati steps (latent control, Sec. 5).

    Raises:
        ValueError: horizon < 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    K, B, Q, R = (jnp.asarray(matrix) for matrix in (K, B, Q, R))

    def gain(P: Array) -> Array:
        return jnp.linalg.solve(R + B.T @ P @ B, B.T @ P @ K)

    P = lax.fori_loop(0, horizon, lambda _, P: Q + K.T @ P @ (K - B @ gain(P)), Q)
    return gain(P), P


def latent_control(
    gain: Float[AnyArray, "control dim"], z: Float[AnyArray, "*batch dim"], goal: Float[AnyArray, "dim"]
) -> Float[Array, "*batch control"]:
    """Control a = -G (z - goal)."""
    return -(jnp.asarray(z) - goal) @ jnp.asarray(gain).T
