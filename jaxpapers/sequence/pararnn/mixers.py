"""Layers that mix a sequence over time: ParaGRU, ParaLSTM, the paper's mixer around them, and the rivals of its tables.

All of them are causal maps (batch, time, width) -> (batch, time, width). With `cache_length` a call continues where
the last one ended: what a layer remembers (last inputs of a convolution, last state of a recurrence, keys and values)
stays in the variable collection `cache`, whose zeros are the empty past. So one code serves training, a parallel
prefill and single steps.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpapers.nn.dense import Dense
from jaxpapers.nn.transformer import CausalSelfAttention
from jaxpapers.ops.scan import affine_scan
from jaxpapers.sequence.pararnn.cells import (
    DEFAULT_SOLVER,
    GRUParams,
    LSTMParams,
    Solver,
    initialisers,
    param_shapes,
    preactivations,
    solve,
)
from jaxpapers.typing import AnyArray

CONV_WIDTH = 4
NORM_EPSILON = 1e-5
SKIPS = ("inner", "outer")


def _remembered(module: nn.Module, name: str, empty: Array) -> tuple[Array, Callable[[Array], None]]:
    """What the last call left under this name (`empty` at first, and always without a cache), and how to leave more."""
    if module.cache_length is None:
        return empty, lambda value: None
    variable = module.variable("cache", name, lambda: empty)
    return variable.value, lambda value: setattr(variable, "value", value.astype(empty.dtype))


class _Recurrence(nn.Module):
    """What ParaGRU and ParaLSTM share; see there."""

    features: int
    num_heads: int = 4
    scheme: str = "paper"
    gates: tuple[str, ...] | None = None
    solver: Solver = DEFAULT_SOLVER
    dtype: DTypeLike | None = None
    cache_length: int | None = None

    def _run(self, kind: type[GRUParams] | type[LSTMParams], x: Array) -> Array:
        init = initialisers(self.scheme)._asdict()
        shapes = param_shapes(kind, x.shape[-1], self.features, self.num_heads)
        params = kind(**{name: self.param(name, init[name], shape) for name, shape in shapes.items()})
        x, B = promote_dtype(x, params.B, dtype=self.dtype)
        g = preactivations(x, B, params.b)
        block = (2,) if kind is LSTMParams else ()
        start, keep = _remembered(self, "state", jnp.zeros((x.shape[0], *block, self.features), g.dtype))
        # One step has nothing to iterate on.
        solver = self.solver._replace(method="sequential", mesh=None) if x.shape[1] == 1 else self.solver
        solution = solve(params, jnp.swapaxes(g, 0, 1), start, gates=self.gates, solver=solver)
        keep(solution.states[-1])
        if not self.is_initializing():
            last = solution.residuals[solution.iterations]
            self.sow("diagnostics", "residual", last, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))
        out = solution.states[..., 1, :] if kind is LSTMParams else solution.states
        return jnp.swapaxes(out, 0, 1).astype(x.dtype)


class ParaGRU(_Recurrence):
    """GRU with diagonal state matrices, all steps solved at once (Eq. 3.2). The solver works in float32 at least.

    Parameters A (3, features), B, b as in `cells.GRUParams`. Sows into `diagnostics` the `residual`: the largest
    |f(h_{t-1}, x_t) - h_t| that Newton's method left, 0 if the states were computed one after the other.

    Attributes:
        features: width of state and output.
        num_heads: blocks of the input map; they divide inputs and features.
        scheme: initialisation, "paper" or "released".
        gates: names of the nonlinearities of z, r, c; None: sigmoid, sigmoid, tanh.
        solver: how the recurrence is solved.
        dtype: of the input map and the output; None: that of inputs and parameters.
        cache_length: not None: keep the state between calls.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time features"]:
        """Runs the cell from the zero state (with a cache, from where the last call ended).

        Raises:
            ValueError: widths that the heads do not divide; unknown names; what `solve_recurrence` refuses.
        """
        return self._run(GRUParams, x)


class ParaLSTM(_Recurrence):
    """LSTM (CIFG with peepholes) with diagonal state matrices, all steps solved at once (Eq. 3.3).

    Parameters A (3, features), B, C (2, features), b as in `cells.LSTMParams`; the output is h. Attributes,
    diagnostics and errors are those of `ParaGRU`; `gates` names the nonlinearities of f, o, u and of the tanh of c.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time features"]:
        """Runs the cell from the zero state (with a cache, from where the last call ended)."""
        return self._run(LSTMParams, x)


class LinearRNN(nn.Module):
    """Selective diagonal linear RNN: the ParaGRU without its state in the gates, the baseline that cannot count.

        z_t = sigmoid(B_z x_t + b_z),    h_t = (1 - z_t).h_{t-1} + z_t.(B_c x_t + b_c)

    The decay 1 - z lies in (0, 1), as Mamba's does.

    Attributes:
        features: width of state and output.
        num_heads: blocks of the input map; they divide inputs and features.
        scheme: initialisation of the input map, "paper" or "released".
        method: of `affine_scan`.
        dtype: of the input map and the output; None: that of inputs and parameters.
        cache_length: not None: keep the state between calls.
    """

    features: int
    num_heads: int = 4
    scheme: str = "paper"
    method: str = "auto"
    dtype: DTypeLike | None = None
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time features"]:
        """Runs the recurrence from the zero state (with a cache, from where the last call ended).

        Raises:
            ValueError: widths that the heads do not divide; unknown names.
        """
        init = initialisers(self.scheme)
        heads, head_inputs, _, head_features = param_shapes(GRUParams, x.shape[-1], self.features, self.num_heads)["B"]
        B = self.param("B", init.B, (heads, head_inputs, 2, head_features))
        b = self.param("b", init.b, (2, self.features))
        x, B = promote_dtype(x, B, dtype=self.dtype)
        g = preactivations(x, B, b)
        start, keep = _remembered(self, "state", jnp.zeros((x.shape[0], self.features), g.dtype))
        z = jax.nn.sigmoid(g[..., 0, :])
        states = jnp.asarray(affine_scan(1 - z, z * g[..., 1, :], start, axis=1, method=self.method))
        keep(states[:, -1])
        return states.astype(x.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, with bias: y_t = bias + sum_k kernel_k . x_{t - CONV_WIDTH + 1 + k}.

    Attributes:
        dtype: of the computation; None: that of inputs and parameters.
        cache_length: not None: keep the last CONV_WIDTH - 1 inputs between calls.
    """

    dtype: DTypeLike | None = None
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Convolves."""
        batch, steps, width = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (CONV_WIDTH, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        past, keep = _remembered(self, "inputs", jnp.zeros((batch, CONV_WIDTH - 1, width), x.dtype))
        x = jnp.concatenate([past, x], axis=1)
        keep(x[:, steps:])
        # Four shifted products: XLA's grouped convolution is far slower in the backward pass on CPU.
        return bias + sum(kernel[k] * x[:, k : k + steps] for k in range(CONV_WIDTH))


CELLS: dict[str, type[nn.Module]] = {"gru": ParaGRU, "lstm": ParaLSTM, "linear": LinearRNN}


class ParaRNNMixer(nn.Module):
    """The paper's mixer around a cell (App. C.1, Fig. 9), in the manner of Mamba.

        u, gate = W_in x;    u = silu(conv(u));    y = cell(u) + skip.u;    out = W_out (w.RMSNorm(y . silu(gate)))

    Attributes:
        num_heads: of the cell.
        cell: "gru", "lstm", or "linear".
        skip: "inner": y = cell(u) + skip.u as above; "outer": y = cell(u), and the block scales its residual.
        scheme: initialisation of the cell, "paper" or "released".
        solver: of the cell ("linear" takes its method alone).
        dtype: of the computation; None: that of inputs and parameters.
        cache_length: not None: keep conv inputs and state between calls.
    """

    num_heads: int
    cell: str = "gru"
    skip: str = "inner"
    scheme: str = "paper"
    solver: Solver = DEFAULT_SOLVER
    dtype: DTypeLike | None = None
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Mixes.

        Raises:
            ValueError: an unknown cell or skip; a width that the heads do not divide.
        """
        if self.skip not in SKIPS:
            raise ValueError(f"skip {self.skip!r} is unknown, expected one of {SKIPS}")
        width = x.shape[-1]
        u, gate = jnp.split(Dense(2 * width, use_bias=False, dtype=self.dtype, name="in")(x), 2, axis=-1)
        u = nn.silu(CausalConv(self.dtype, self.cache_length, name="conv")(u))
        y = make_cell(self.cell, width, self.num_heads, self.scheme, self.solver, self.dtype, self.cache_length)(u)
        if self.skip == "inner":
            y = y + self.param("skip", nn.initializers.ones, (width,)).astype(y.dtype) * u
        y = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="norm")(y * nn.silu(gate))
        return Dense(width, use_bias=False, dtype=self.dtype, name="out")(y)


def make_cell(
    cell: str,
    features: int,
    num_heads: int,
    scheme: str = "paper",
    solver: Solver = DEFAULT_SOLVER,
    dtype: DTypeLike | None = None,
    cache_length: int | None = None,
) -> nn.Module:
    """A cell by its name, as a module called "cell".

    Raises:
        ValueError: an unknown name.
    """
    if cell not in CELLS:
        raise ValueError(f"cell {cell!r} is unknown, expected one of {tuple(CELLS)}")
    how = {"method": solver.method} if cell == "linear" else {"solver": solver}
    return CELLS[cell](features, num_heads, scheme=scheme, dtype=dtype, cache_length=cache_length, name="cell", **how)


def state_space_dual(
    x: Float[AnyArray, "batch time heads head_dim"],
    log_decay: Float[AnyArray, "batch time heads"],
    B: Float[AnyArray, "batch time state"],
    C: Float[AnyArray, "batch time state"],
    start: Float[AnyArray, "batch heads state head_dim"],
    *,
    chunk: int = 64,
    method: str = "auto",
) -> tuple[Float[Array, "batch time heads head_dim"], Float[Array, "batch heads state head_dim"]]:
    """Outputs and last state of the recurrence of Mamba2 (arXiv 2405.21060, Sec. 6), of every head.

        S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T,    y_t = C_t S_t

    Inside a chunk y is a masked attention of C to B; the states at the chunks' ends are an affine recurrence with a
    scalar matrix. So the states, `state` times as large as x, are kept once a chunk only.

    Args:
        x: inputs.
        log_decay: at most 0.
        B: input map of every step, shared by the heads.
        C: output map of every step, shared by the heads.
        start: the state before the first step.
        chunk: steps in a chunk.
        method: of `affine_scan`.

    Raises:
        ValueError: chunk below 1; an unknown method.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    batch, steps, heads, head_dim = x.shape
    chunk = min(chunk, steps)

    def chunked(array: AnyArray) -> Array:
        # Zeros behind the end neither decay nor enter the state.
        padded = jnp.pad(array, [(0, 0), (0, -steps % chunk)] + [(0, 0)] * (array.ndim - 2))
        return padded.reshape(batch, -1, chunk, *array.shape[2:])

    x, log_decay, B, C = map(chunked, (x, log_decay, B, C))
    total = jnp.cumsum(log_decay, axis=2)
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None]
    # The mask before the exponential: above the diagonal it would overflow, and NaN its gradient.
    weight = jnp.exp(jnp.where(causal, total[:, :, :, None] - total[:, :, None], -jnp.inf))
    inside = jnp.einsum("bctn,bcsn,bctsh,bcshp->bcthp", C, B, weight, x, optimize="optimal")
    to_end = jnp.exp(total[:, :, -1:] - total)
    ends = jnp.einsum("bcsn,bcsh,bcshp->bchnp", B, to_end, x, optimize="optimal")
    flat = ends.reshape(*ends.shape[:3], -1)
    decay = jnp.exp(total[:, :, -1, :, None])
    flat_states = affine_scan(decay, flat, start.reshape(batch, heads, -1), axis=1, method=method)
    states = jnp.asarray(flat_states).reshape(ends.shape)
    before = jnp.concatenate([jnp.asarray(start)[:, None], states[:, :-1]], axis=1)
    outside = jnp.einsum("bctn,bcth,bchnp->bcthp", C, jnp.exp(total), before, optimize="optimal")
    y = (inside + outside).reshape(batch, -1, heads, head_dim)
    return y[:, :steps], states[:, -1]


class Mamba2Mixer(nn.Module):
    """The mixer of Mamba2 (arXiv 2405.21060, Fig. 6), the paper's linear rival: one scalar decay per head and step.

        gate, (u, B, C), dt = W_in x;    u, B, C = silu(conv(u, B, C));    dt = softplus(dt + dt_bias)
        S_t = exp(-dt exp(A_log)) S_{t-1} + B_t (dt u_t)^T;    y_t = C_t S_t + D u_t
        out = W_out (w.RMSNorm(y . silu(gate)))

    Attributes:
        expand: inner width over the width.
        head_dim: channels of a head; they divide the inner width.
        state_size: N, rows of a head's state.
        chunk: of `state_space_dual`.
        method: of `affine_scan`.
        dtype: of the computation; None: that of inputs and parameters. The recurrence is in float32 at least.
        cache_length: not None: keep conv inputs and state between calls.
    """

    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    chunk: int = 64
    method: str = "auto"
    dtype: DTypeLike | None = None
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Mixes.

        Raises:
            ValueError: an inner width that head_dim does not divide.
        """
        batch, steps, width = x.shape
        inner, N = self.expand * width, self.state_size
        if inner % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide the inner width {inner}")
        heads = inner // self.head_dim
        projected = Dense(2 * inner + 2 * N + heads, use_bias=False, dtype=self.dtype, name="in")(x)
        gate, u, dt = jnp.split(projected, [inner, 2 * inner + 2 * N], axis=-1)
        u = nn.silu(CausalConv(self.dtype, self.cache_length, name="conv")(u))
        exact = jnp.promote_types(u.dtype, jnp.float32)
        u, B, C = jnp.split(u.astype(exact), [inner, inner + N], axis=-1)
        u = u.reshape(batch, steps, heads, self.head_dim)
        dt = nn.softplus(dt.astype(exact) + self.param("dt_bias", _dt_bias_init, (heads,)))
        log_decay = -dt * jnp.exp(self.param("A_log", _A_log_init, (heads,)))
        start, keep = _remembered(self, "state", jnp.zeros((batch, heads, N, self.head_dim), exact))
        driven = dt[..., None] * u
        y, last = state_space_dual(driven, log_decay, B, C, start, chunk=self.chunk, method=self.method)
        keep(last)
        y = y + self.param("D", nn.initializers.ones, (heads,))[:, None] * u
        y = y.reshape(batch, steps, inner).astype(gate.dtype) * nn.silu(gate)
        y = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="norm")(y)
        return Dense(width, use_bias=False, dtype=self.dtype, name="out")(y)


def _dt_bias_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """softplus(dt_bias) log-uniform in [1e-3, 1e-1], as Mamba2 has it."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, np.log(1e-3), np.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _A_log_init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Decay rates exp(A_log) uniform in [1, 16], as Mamba2 has it."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


AttentionMixer = CausalSelfAttention
