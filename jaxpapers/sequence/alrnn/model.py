"""The almost-linear RNN itself: parameters, step, linear regions, free run, observation models.

A state z is (..., M) with any leading axes. Its first N entries are the readouts, its last P the
piecewise-linear units.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxpapers.typing import AnyArray

NumPWL = int | np.integer | Int[Array, ""]


class ALRNNParams(NamedTuple):
    """Parameters of an AL-RNN with M units, N of them readouts (Eqs. 4, 5).

    Attributes:
        a: (M,), the diagonal of A.
        W: (M, M), rows are outputs.
        h: (M,).
        L: (M - N, N), the hidden units' first guess from an observation.
        slopes: (M,), slopes of the piecewise-linear units for z <= 0: the trainable, leaky variant of the
            appendix. None: ReLU units, slope 0.
    """

    a: AnyArray
    W: AnyArray
    h: AnyArray
    L: AnyArray
    slopes: AnyArray | None = None


def known_number(value: float | int | np.number | Shaped[AnyArray, ""]) -> Any:
    """The value as a Python number, which can be checked; None if it is traced, and only known when the program runs.

    A concrete array inside a traced function must leave jax first: comparing it there would trace the comparison.
    """
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value).item()


def check_num_pwl(num_pwl: NumPWL, latent_dim: int, observed_dim: int = 0) -> None:
    """Refuse a number of piecewise-linear units that does not fit; a traced number passes unchecked.

    P = M is accepted whatever N is: that is the PLRNN, the paper's baseline.

    Raises:
        ValueError: if P < 0, P > M, or M - N < P < M (some readouts would be rectified).
    """
    known = known_number(num_pwl)
    if known is None:
        return
    if not 0 <= known <= latent_dim:
        raise ValueError(f"num_pwl must lie in 0..{latent_dim} (the latent dimension), got {num_pwl}")
    if latent_dim - observed_dim < known < latent_dim:
        raise ValueError(
            f"num_pwl={num_pwl} of {latent_dim} units would rectify some of the {observed_dim} readouts: "
            f"accepted are 0..{latent_dim - observed_dim}, and {latent_dim} for the PLRNN"
        )


def init_params(
    key: Key[Array, ""],
    latent_dim: int,
    observed_dim: int,
    *,
    slope: float | int | None = None,
    dtype: Any = jnp.float32,
) -> ALRNNParams:
    """Draw parameters as the authors do.

    a = diagonal of K / lambda_max(K) with K = R^T R / M + I, R_ij ~ N(0, 1); W ~ N(0, 0.01^2); h = 0;
    L ~ U(+-1/sqrt(N)).

    Args:
        key: random key.
        latent_dim: M.
        observed_dim: N.
        slope: start value of trainable slopes; None for plain ReLU units.
        dtype: of all parameters.

    Raises:
        ValueError: unless 1 <= N <= M.
    """
    if not 1 <= observed_dim <= latent_dim:
        raise ValueError(f"needs 1 <= observed_dim <= latent_dim, got {observed_dim} and {latent_dim}")
    key_a, key_w, key_l = jax.random.split(key, 3)
    root = jax.random.normal(key_a, (latent_dim, latent_dim), dtype)
    gram = root.T @ root / latent_dim + jnp.eye(latent_dim, dtype=dtype)
    bound = observed_dim**-0.5
    return ALRNNParams(
        a=jnp.diag(gram) / jnp.linalg.eigvalsh(gram)[-1],
        W=0.01 * jax.random.normal(key_w, (latent_dim, latent_dim), dtype),
        h=jnp.zeros(latent_dim, dtype),
        L=jax.random.uniform(key_l, (latent_dim - observed_dim, observed_dim), dtype, -bound, bound),
        slopes=None if slope is None else jnp.full(latent_dim, slope, dtype),
    )


def negative_slopes(
    num_pwl: NumPWL,
    latent_dim: int,
    slopes: Float[AnyArray, "latent"] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "latent"]:
    """Slope of every unit's activation for z <= 0: 1 on the M - P linear units, 0 (or `slopes`) on the last P.

    This vector is all that P does to the model. A mask and not the slice z[-P:], which means "all units" at
    P = 0; and under a mask P may be traced, so that models of several P train in one `vmap`.
    """
    linear = jnp.arange(latent_dim) < latent_dim - num_pwl
    return jnp.where(linear, 1, 0 if slopes is None else slopes).astype(dtype)


def activation_slopes(
    z: Float[AnyArray, "*batch latent"],
    num_pwl: NumPWL,
    slopes: Float[AnyArray, "latent"] | None = None,
) -> Float[Array, "*batch latent"]:
    """phi'(z), the diagonal of D in Eq. 5. At z = 0 it is the slope of the negative side (the strict ">").

    Raises:
        ValueError: if P < 0 or P > M.
    """
    z = jnp.asarray(z)
    check_num_pwl(num_pwl, z.shape[-1])
    return jnp.where(z > 0, 1, negative_slopes(num_pwl, z.shape[-1], slopes, z.dtype))


def activation(
    z: Float[AnyArray, "*batch latent"],
    num_pwl: NumPWL,
    slopes: Float[AnyArray, "latent"] | None = None,
) -> Float[Array, "*batch latent"]:
    """phi(z): the identity on the first M - P units, max(z, 0) on the last P (Eq. 5).

    With `slopes` the last P units are leaky, max(z, 0) + s min(z, 0).

    Raises:
        ValueError: if P < 0 or P > M.
    """
    return activation_slopes(z, num_pwl, slopes) * jnp.asarray(z)


def step(params: ALRNNParams, z: Float[AnyArray, "*batch latent"], num_pwl: NumPWL) -> Float[Array, "*batch latent"]:
    """One step, z_t = A z_{t-1} + W phi(z_{t-1}) + h (Eq. 4).

    Raises:
        ValueError: if P < 0 or P > M.
    """
    # Full precision: accelerators would round the factors, and a chaotic orbit amplifies that.
    coupled = jnp.matmul(activation(z, num_pwl, params.slopes), params.W.T, precision=lax.Precision.HIGHEST)
    return jnp.asarray(params.a) * z + coupled + params.h


def region_bits(z: Float[AnyArray, "*batch latent"], num_pwl: int | np.integer) -> Bool[AnyArray, "*batch pwl"]:
    """The linear region of z: d = 1[z > 0] of the last P units (Sec. 3).

    A non-finite state silently reads as "not positive" here; `symbolic_code` refuses such orbits.

    Raises:
        ValueError: if P < 0 or P > M.
    """
    check_num_pwl(num_pwl, z.shape[-1])
    return z[..., z.shape[-1] - num_pwl :] > 0


def region_matrix(params: ALRNNParams, bits: Shaped[AnyArray, "*batch pwl"]) -> Float[Array, "*batch latent latent"]:
    """W_D = A + W D: in the region with bits d (P of them, bool or 0/1) a step is z -> W_D z + h (Sec. 3).

    Raises:
        ValueError: if there are more bits than units.
    """
    latent_dim, num_pwl = params.a.shape[0], bits.shape[-1]
    check_num_pwl(num_pwl, latent_dim)
    # Linear units have the same slope on both sides, so that any bit will do for them.
    linear = jnp.zeros((*bits.shape[:-1], latent_dim - num_pwl), bool)
    positive = jnp.concatenate([linear, bits > 0], axis=-1)
    negative = negative_slopes(num_pwl, latent_dim, params.slopes, jnp.asarray(params.a).dtype)
    return _affine_matrix(params, jnp.where(positive, 1, negative))


def jacobian(
    params: ALRNNParams, z: Float[AnyArray, "*batch latent"], num_pwl: NumPWL
) -> Float[Array, "*batch latent latent"]:
    """Exact Jacobian of `step` at z: the W_D of the region that z lies in.

    Raises:
        ValueError: if P < 0 or P > M.
    """
    return _affine_matrix(params, activation_slopes(z, num_pwl, params.slopes))


def _affine_matrix(params: ALRNNParams, slopes: Float[Array, "*batch latent"]) -> Float[Array, "*batch latent latent"]:
    return jnp.diag(jnp.asarray(params.a)) + params.W * slopes[..., None, :]


def init_state(params: ALRNNParams, x: Float[AnyArray, "*batch observed"]) -> Float[Array, "*batch latent"]:
    """State from an observation, z = [x; L x] (Sec. 3)."""
    return jnp.concatenate([x, x @ params.L.T], axis=-1)


def observe(params: ALRNNParams, z: Float[AnyArray, "*batch latent"]) -> Float[Array, "*batch observed"]:
    """The identity observation model, x = z_{1..N}: nothing is trained, there is no bias (Sec. 3)."""
    return jnp.asarray(z)[..., : params.L.shape[1]]


def free_run(
    params: ALRNNParams, z0: Float[AnyArray, "*batch latent"], steps: int, num_pwl: NumPWL
) -> Float[Array, "*batch time latent"]:
    """States of steps 1..steps after the state z0, without any data.

    Raises:
        ValueError: if P < 0 or P > M, or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")

    def body(z, _):
        z = step(params, z, num_pwl)
        return z, z

    _, states = lax.scan(body, jnp.asarray(z0), length=steps)
    return jnp.moveaxis(states, 0, -2)


def generate(
    params: ALRNNParams, x0: Float[AnyArray, "*batch observed"], steps: int, num_pwl: NumPWL
) -> tuple[Float[Array, "*batch time observed"], Float[Array, "*batch time latent"]]:
    """Free run from one observation: what the model is judged by (Sec. 3).

    Returns:
        Observations and states of steps 1..steps; the initial state is not among them.

    Raises:
        ValueError: if P does not fit (see `check_num_pwl`) or steps < 1.
    """
    check_num_pwl(num_pwl, params.a.shape[0], params.L.shape[1])
    states = free_run(params, init_state(params, x0), steps, num_pwl)
    return observe(params, states), states


class DecoderParams(NamedTuple):
    """Categorical observation model: softmax of an affine map of the states (or of the readouts alone).

    Attributes:
        kernel: (input, classes).
        bias: (classes,).
    """

    kernel: Array
    bias: Array


def init_decoder(key: Key[Array, ""], input_dim: int, num_classes: int, dtype: Any = jnp.float32) -> DecoderParams:
    """Decoder with kernel ~ U(+-1/sqrt(input_dim)) and zero bias.

    Raises:
        ValueError: unless input_dim >= 1 and num_classes >= 2.
    """
    if input_dim < 1 or num_classes < 2:
        raise ValueError(f"needs input_dim >= 1 and num_classes >= 2, got {input_dim} and {num_classes}")
    bound = input_dim**-0.5
    kernel = jax.random.uniform(key, (input_dim, num_classes), dtype, -bound, bound)
    return DecoderParams(kernel, jnp.zeros(num_classes, dtype))


def class_log_probabilities(
    decoder: DecoderParams, z: Float[AnyArray, "*batch input"]
) -> Float[Array, "*batch classes"]:
    """Logarithm of softmax(z kernel + bias): how likely each class is (the task stage, in the fMRI experiment)."""
    return jax.nn.log_softmax(z @ decoder.kernel + decoder.bias, axis=-1)


def class_log_likelihood(
    decoder: DecoderParams, z: Float[AnyArray, "*batch input"], labels: Int[AnyArray, "*batch"]
) -> Float[Array, ""]:
    """Mean log-likelihood of integer labels under the categorical decoder; its negative is a loss."""
    log_p = class_log_probabilities(decoder, z)
    return jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(labels)[..., None], axis=-1))


def params_from_torch(state_dict: Mapping[str, Any]) -> ALRNNParams:
    """Parameters from the state dict of the authors' PyTorch tutorial, dtype kept.

    Its "B" (N, M) maps an observation to a whole state, of which the first N entries are then overwritten by
    the observation: L is the transpose of the other columns. A dict with "L" (M - N, N) is read too.

    Raises:
        ValueError: if a weight is missing or the shapes do not fit together.
    """
    missing = [name for name in ("A", "W", "h") if name not in state_dict]
    if missing or not ("B" in state_dict or "L" in state_dict):
        raise ValueError(f"needs A, W, h and B (or L), got {sorted(state_dict)}")
    arrays = {name: np.array(value) for name, value in state_dict.items()}
    if "L" in arrays:
        guess = arrays["L"]
    else:
        observed_dim = arrays["B"].shape[0]
        guess = arrays["B"][:, observed_dim:].T
    params = ALRNNParams(*(jnp.asarray(v) for v in (arrays["A"], arrays["W"], arrays["h"], guess)))
    (latent_dim,) = params.a.shape
    fits = params.W.shape == (latent_dim, latent_dim) and params.h.shape == (latent_dim,)
    if not fits or params.L.ndim != 2 or sum(params.L.shape) != latent_dim:
        raise ValueError(f"shapes do not fit together: {[getattr(params, k).shape for k in 'aWhL']}")
    return params
