"""ParaRNN's cells: GRU and LSTM whose state matrices are diagonal (Eq. 3.1 with A = diag(a), Eq. 3.3).

All functions act on single steps, elementwise over any leading axes, except for `solve`, which runs a sequence.
The pre-activations g = B x + b of the three gates do not depend on the state and are computed once a layer.

Layouts are those of the reference, so that its checkpoints fit: rows of A, b and g are [z, r, c] for the GRU and
[f, o, u] for the LSTM (o before u), rows of C are [f, o]; B is (heads, inputs / heads, gate, features / heads).
An LSTM state is (2, features), rows [c, h]: one block of two numbers per channel.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from jaxpapers.ops.newton import Number, Solution, solve_recurrence
from jaxpapers.typing import AnyArray

NONLINEARITIES: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # the tanh form
    "selu": jax.nn.selu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "half_sigmoid": lambda x: 0.5 * jax.nn.sigmoid(x),
    "exp": jnp.exp,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
}
GRU_GATES = ("sigmoid", "sigmoid", "tanh")  # z, r, c
LSTM_GATES = ("sigmoid", "sigmoid", "tanh", "tanh")  # f, o, u, and tanh(c) in the output


class GRUParams(NamedTuple):
    """Parameters of a ParaGRU.

    Attributes:
        A: (3, features), diagonals of the state matrices, rows [z, r, c].
        B: (heads, inputs / heads, 3, features / heads), the block-diagonal input maps.
        b: (3, features).
    """

    A: Float[AnyArray, "3 features"]
    B: Float[AnyArray, "heads inputs 3 outputs"]
    b: Float[AnyArray, "3 features"]


class LSTMParams(NamedTuple):
    """Parameters of a ParaLSTM.

    Attributes:
        A: (3, features), diagonals of the state matrices, rows [f, o, u].
        B: (heads, inputs / heads, 3, features / heads), the block-diagonal input maps.
        C: (2, features), peepholes, rows [f, o].
        b: (3, features).
    """

    A: Float[AnyArray, "3 features"]
    B: Float[AnyArray, "heads inputs 3 outputs"]
    C: Float[AnyArray, "2 features"]
    b: Float[AnyArray, "3 features"]


class Solver(NamedTuple):
    """How a cell is run over a sequence: arguments of `ops.newton.solve_recurrence`.

    Attributes:
        method: "auto", "sequential", "parallel", "chunked", and whatever else `solve_recurrence` knows.
        max_iterations: Newton iterations; the paper takes three everywhere.
        tolerance: stop when the largest residual is at most this; 0: never stop early (the reference's `abs_tol`).
        relative_tolerance: stop when it is at most this share of the guess's (the reference's `rel_tol`).
        damping: of the steps (the reference's `omega_sor`).
        trust: weight of the term that holds steps back (ELK), for the GRU.
        clip_iterates: clip iterates to +- this (DEER); 0: off.
        segment: solve as many steps at a time, as the fused kernels of the paper do on long sequences; 0: all at once.
        fallback: "sequential": compute the states one after the other where the iteration has not converged.
        mesh: split the time axis over the mesh axis `seq`.
    """

    method: str = "auto"
    max_iterations: int = 3
    tolerance: Number = 0.0
    relative_tolerance: Number = 0.0
    damping: Number = 1.0
    trust: Number = 0.0
    clip_iterates: Number = 0.0
    segment: int = 0
    fallback: str | None = None
    mesh: Mesh | None = None


DEFAULT_SOLVER = Solver()


def preactivations(
    x: Float[AnyArray, "*batch inputs"],
    B: Float[AnyArray, "heads head_inputs gates head_features"],
    b: Float[AnyArray, "gates features"],
) -> Float[Array, "*batch gates features"]:
    """Pre-activations g = B x + b of all gates, B block-diagonal over heads (Sec. 3.2); float32 at least.

    Raises:
        ValueError: inputs that do not fit B.
    """
    heads, head_inputs, gates, head_features = B.shape
    if x.shape[-1] != heads * head_inputs:
        raise ValueError(f"inputs of width {x.shape[-1]} do not fit B {B.shape}: expected {heads} x {head_inputs}")
    split = jnp.reshape(x, (*x.shape[:-1], heads, head_inputs))
    dtype = functools.reduce(jnp.promote_types, (x.dtype, B.dtype, b.dtype, jnp.float32))
    # Half-precision factors are summed in float32: the solver's own precision starts here.
    g = jnp.einsum("...hi,higo->...gho", split, B, preferred_element_type=dtype)
    return g.reshape(*x.shape[:-1], gates, heads * head_features) + jnp.asarray(b, dtype)


def gru_cell(
    h: Float[AnyArray, "*#batch features"],
    g: Float[AnyArray, "*#batch 3 features"],
    A: Float[AnyArray, "3 features"],
    gates: tuple[str, str, str] = GRU_GATES,
) -> Float[Array, "*#batch features"]:
    """One step of the ParaGRU (Eq. 3.2); products are elementwise.

        z = s(a_z.h' + g_z),    r = s(a_r.h' + g_r),    c = tanh(a_c.(h'.r) + g_c),    h = (1 - z).h' + z.c

    Args:
        h: previous state h'.
        g: pre-activations, rows [z, r, c].
        A: diagonals of the state matrices, rows [z, r, c].
        gates: names of the nonlinearities of z, r and c.

    Raises:
        ValueError: an unknown nonlinearity.
    """
    return _gru_cell(h, _rows(g), A, gates)


def gru_jacobian(
    h: Float[AnyArray, "*#batch features"],
    g: Float[AnyArray, "*#batch 3 features"],
    A: Float[AnyArray, "3 features"],
    gates: tuple[str, str, str] = GRU_GATES,
) -> Float[Array, "*#batch features"]:
    """The diagonal of dh/dh' of `gru_cell` (App. B); z', r', c' are the derivatives of the nonlinearities.

        J = (1 - z) + (c - h') z' a_z + z c' a_c (r + h' r' a_r)

    Args and errors as for `gru_cell`.
    """
    return _gru_jacobian(h, _rows(g), A, gates)


def lstm_cell(
    state: Float[AnyArray, "*#batch 2 features"],
    g: Float[AnyArray, "*#batch 3 features"],
    A: Float[AnyArray, "3 features"],
    C: Float[AnyArray, "2 features"],
    gates: tuple[str, str, str, str] = LSTM_GATES,
) -> Float[Array, "*#batch 2 features"]:
    """One step of the ParaLSTM, a CIFG with peepholes (Eq. 3.3); the output gate peeps at the new c.

        f = s(a_f.h' + C_f.c' + g_f),    u = tanh(a_u.h' + g_u),    c = f.c' + (1 - f).u,
        o = s(a_o.h' + C_o.c + g_o),     h = o.tanh(c)

    Args:
        state: previous state, rows [c', h'].
        g: pre-activations, rows [f, o, u].
        A: diagonals of the state matrices, rows [f, o, u].
        C: peepholes, rows [f, o].
        gates: names of the nonlinearities of f, o, u, and of the tanh of the output.

    Raises:
        ValueError: an unknown nonlinearity.
    """
    return _lstm_cell(state, _rows(g), A, C, gates)


def lstm_jacobian(
    state: Float[AnyArray, "*#batch 2 features"],
    g: Float[AnyArray, "*#batch 3 features"],
    A: Float[AnyArray, "3 features"],
    C: Float[AnyArray, "2 features"],
    gates: tuple[str, str, str, str] = LSTM_GATES,
) -> Float[Array, "*#batch 2 2 features"]:
    """The blocks of d(c, h)/d(c', h') of `lstm_cell`, (out, in, channel) (App. B).

        J_cc = f + (c' - u) f' C_f,           J_ch = (c' - u) f' a_f + (1 - f) u' a_u,
        kappa = tanh(c) o' C_o + o tanh'(c),  J_hc = kappa J_cc,    J_hh = tanh(c) o' a_o + kappa J_ch

    Args and errors as for `lstm_cell`.
    """
    return _lstm_jacobian(state, _rows(g), A, C, gates)


def lstm_jacobian_reference(
    state: Float[AnyArray, "*#batch 2 features"],
    current: Float[AnyArray, "*#batch 2 features"],
    g: Float[AnyArray, "*#batch 3 features"],
    A: Float[AnyArray, "3 features"],
    C: Float[AnyArray, "2 features"],
    gates: tuple[str, str, str, str] = LSTM_GATES,
) -> Float[Array, "*#batch 2 2 features"]:
    """The Jacobian that the authors' package iterates with: o and tanh(c) at the c of the iterate itself.

    It equals `lstm_jacobian` at the solution, where the iterate's c is f.c' + (1 - f).u, and differs before.

    Args:
        state: the iterate's previous state, rows [c', h'].
        current: the iterate's state of this step, of which c is taken.
        g: as for `lstm_cell`.
        A: as for `lstm_cell`.
        C: as for `lstm_cell`.
        gates: as for `lstm_cell`.

    Raises:
        ValueError: an unknown nonlinearity.
    """
    return _lstm_jacobian(state, _rows(g), A, C, gates, current[..., 0, :])


# The same, of pre-activations row by row: as one array, XLA's loops on CPU would not be vectorised, six times slower.


def _rows(g: AnyArray) -> tuple[Array, ...]:
    return jnp.unstack(jnp.asarray(g), axis=-2)


def _gru_cell(h: AnyArray, g: tuple[Array, ...], A: AnyArray, gates: tuple[str, ...]) -> Array:
    z = _function(gates[0])(A[0] * h + g[0])
    r = _function(gates[1])(A[1] * h + g[1])
    c = _function(gates[2])(A[2] * (h * r) + g[2])
    return (1 - z) * h + z * c


def _gru_jacobian(h: AnyArray, g: tuple[Array, ...], A: AnyArray, gates: tuple[str, ...]) -> Array:
    z, dz = _with_slope(gates[0], A[0] * h + g[0])
    r, dr = _with_slope(gates[1], A[1] * h + g[1])
    c, dc = _with_slope(gates[2], A[2] * (h * r) + g[2])
    return (1 - z) + (c - h) * dz * A[0] + z * dc * A[2] * (r + h * dr * A[1])


def _lstm_cell(state: AnyArray, g: tuple[Array, ...], A: AnyArray, C: AnyArray, gates: tuple[str, ...]) -> Array:
    c, h = jnp.unstack(jnp.asarray(state), axis=-2)
    f = _function(gates[0])(A[0] * h + C[0] * c + g[0])
    u = _function(gates[2])(A[2] * h + g[2])
    new_c = f * c + (1 - f) * u
    o = _function(gates[1])(A[1] * h + C[1] * new_c + g[1])
    return jnp.stack([new_c, o * _function(gates[3])(new_c)], axis=-2)


def _lstm_jacobian(
    state: AnyArray,
    g: tuple[Array, ...],
    A: AnyArray,
    C: AnyArray,
    gates: tuple[str, ...],
    new_c: AnyArray | None = None,
) -> Array:
    c, h = jnp.unstack(jnp.asarray(state), axis=-2)
    f, df = _with_slope(gates[0], A[0] * h + C[0] * c + g[0])
    u, du = _with_slope(gates[2], A[2] * h + g[2])
    if new_c is None:
        new_c = f * c + (1 - f) * u
    o, do = _with_slope(gates[1], A[1] * h + C[1] * new_c + g[1])
    t, dt = _with_slope(gates[3], new_c)
    J_cc = f + (c - u) * df * C[0]
    J_ch = (c - u) * df * A[0] + (1 - f) * du * A[2]
    kappa = t * do * C[1] + o * dt
    rows = [jnp.stack([J_cc, J_ch], axis=-2), jnp.stack([kappa * J_cc, t * do * A[1] + kappa * J_ch], axis=-2)]
    return jnp.stack(rows, axis=-3)


def solve(
    params: GRUParams | LSTMParams,
    g: Float[AnyArray, "time *batch 3 features"],
    state: Float[AnyArray, "..."] | None = None,
    *,
    gates: Sequence[str] | None = None,
    solver: Solver = DEFAULT_SOLVER,
) -> Solution:
    """All states of a cell over a sequence, by Newton's method or one after the other (Sec. 2, Alg. 1).

    Computed in float32 at least.

    Args:
        params: their type says which cell it is.
        g: pre-activations of all steps, time first.
        state: before the first step, (*batch, features) or (*batch, 2, features); None: zeros.
        gates: names of the nonlinearities; None: the cell's own.
        solver: how to solve.

    Returns:
        The solution; its states are (time, *batch, features) for the GRU, (time, *batch, 2, features) for the LSTM.

    Raises:
        ValueError: an unknown nonlinearity, another number of them than of gates, a state of another shape, and
            what `solve_recurrence` refuses.
    """
    lstm = isinstance(params, LSTMParams)
    own = LSTM_GATES if lstm else GRU_GATES
    names = own if gates is None else tuple(gates)
    if len(names) != len(own):
        raise ValueError(f"gates {names} must name {len(own)} nonlinearities, as in {own}")
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(g.dtype, jnp.float32))
    A = jnp.asarray(params.A, dtype)
    shape = (*g.shape[1:-2], 2, g.shape[-1]) if lstm else (*g.shape[1:-2], g.shape[-1])
    if state is not None and state.shape != shape:
        raise ValueError(f"the state before the first step has shape {state.shape}, expected {shape}")
    start = jnp.zeros(shape, dtype) if state is None else jnp.asarray(state, dtype)
    if isinstance(params, LSTMParams):
        constants: dict[str, Any] = {"A": A, "C": jnp.asarray(params.C, dtype), "gates": names}
        step, jacobian = functools.partial(_lstm_cell, **constants), functools.partial(_lstm_jacobian, **constants)
    else:
        constants = {"A": A, "gates": names}
        step, jacobian = functools.partial(_gru_cell, **constants), functools.partial(_gru_jacobian, **constants)
    structure = "block" if lstm else "diagonal"
    rows = _rows(jnp.asarray(g, dtype))
    return solve_recurrence(step, rows, start, structure=structure, jacobian=jacobian, **solver._asdict())


class Initialisers(NamedTuple):
    """Initialisers `(key, shape, dtype) -> array` of a cell's parameters in the layouts above."""

    A: Callable[..., Array]
    B: Callable[..., Array]
    C: Callable[..., Array]
    b: Callable[..., Array]


def initialisers(scheme: str) -> Initialisers:
    """How a cell's parameters are drawn.

    "paper" (App. C.1): A, C truncated normal of std 1 / sqrt(features), cut at +-0.9; B Kaiming-uniform,
    U(+-sqrt(3 / fan_in)) with the inputs of one head as fan_in; b = 0.
    "released" (defaults of the authors' package): A, C normal of std 2 / sqrt(5 features); B Xavier-uniform with the
    inputs and features of one head as fans; b = 0 but for its first row (z or f), -linspace(0, 1).

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown, expected one of {tuple(SCHEMES)}")
    return SCHEMES[scheme]


def _paper_recurrent(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    root = math.sqrt(shape[-1])
    return jax.random.truncated_normal(key, -0.9 * root, 0.9 * root, shape, dtype) / root


def _paper_input(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    bound = math.sqrt(3 / shape[1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _released_recurrent(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    return 2 / math.sqrt(5 * shape[-1]) * jax.random.normal(key, shape, dtype)


def _released_input(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    bound = math.sqrt(6 / (shape[1] + shape[3]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _released_bias(key: PRNGKeyArray, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.zeros(shape, dtype).at[0].set(-jnp.linspace(0, 1, shape[-1], dtype=dtype))


SCHEMES = {
    "paper": Initialisers(_paper_recurrent, _paper_input, _paper_recurrent, jax.nn.initializers.zeros),
    "released": Initialisers(_released_recurrent, _released_input, _released_recurrent, _released_bias),
}


def param_shapes(
    params: type[GRUParams] | type[LSTMParams], input_dim: int, features: int, num_heads: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of a cell's parameters by name.

    Raises:
        ValueError: widths that the number of heads does not divide.
    """
    if num_heads < 1 or input_dim % num_heads or features % num_heads:
        raise ValueError(f"{num_heads} heads must divide the inputs ({input_dim}) and the features ({features})")
    shapes = {
        "A": (3, features),
        "B": (num_heads, input_dim // num_heads, 3, features // num_heads),
        "C": (2, features),
        "b": (3, features),
    }
    return {name: shapes[name] for name in params._fields}


def init_gru(key: PRNGKeyArray, input_dim: int, features: int, num_heads: int, scheme: str = "paper") -> GRUParams:
    """Draws the parameters of a ParaGRU; see `initialisers`.

    Raises:
        ValueError: an unknown scheme; widths that the number of heads does not divide.
    """
    return GRUParams(**_draw(key, param_shapes(GRUParams, input_dim, features, num_heads), scheme))


def init_lstm(key: PRNGKeyArray, input_dim: int, features: int, num_heads: int, scheme: str = "paper") -> LSTMParams:
    """Draws the parameters of a ParaLSTM; see `initialisers`.

    Raises:
        ValueError: an unknown scheme; widths that the number of heads does not divide.
    """
    return LSTMParams(**_draw(key, param_shapes(LSTMParams, input_dim, features, num_heads), scheme))


def _draw(key: PRNGKeyArray, shapes: Mapping[str, tuple[int, ...]], scheme: str) -> dict[str, Array]:
    init = initialisers(scheme)._asdict()
    keys = jax.random.split(key, len(shapes))
    return {name: init[name](k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def params_from_torch(state_dict: Mapping[str, Shaped[AnyArray, "..."]]) -> GRUParams | LSTMParams:
    """Parameters from the arrays A, B, b, and C for the LSTM, of a cell of the authors' package: its layouts are ours.

    Args:
        state_dict: name to array; tensors are to be given as numpy arrays.

    Raises:
        ValueError: other names than these; shapes that do not fit.
    """
    kind = LSTMParams if "C" in state_dict else GRUParams
    if set(state_dict) != set(kind._fields):
        raise ValueError(f"expected the arrays A, B, b, and C for the LSTM, got {sorted(state_dict)}")
    arrays = {name: jnp.asarray(array) for name, array in state_dict.items()}
    heads, inputs, _, outputs = arrays["B"].shape if arrays["B"].ndim == 4 else (1, 0, 0, 0)
    expected = param_shapes(kind, heads * inputs, heads * outputs, heads)
    if found := {name: arrays[name].shape for name in expected if arrays[name].shape != expected[name]}:
        raise ValueError(f"the shapes {found} do not fit, expected {expected}")
    return kind(**arrays)


def _function(name: str) -> Callable[[Array], Array]:
    if name not in NONLINEARITIES:
        raise ValueError(f"nonlinearity {name!r} is unknown, expected one of {tuple(NONLINEARITIES)}")
    return NONLINEARITIES[name]


def _with_slope(name: str, x: AnyArray) -> tuple[Array, Array]:
    """A nonlinearity's value and derivative; those of the paper's gates share the one transcendental."""
    function, x = _function(name), jnp.asarray(x)
    if name in ("sigmoid", "tanh"):
        y = function(x)
        return y, (y * (1 - y) if name == "sigmoid" else 1 - jnp.square(y))
    return jax.jvp(function, (x,), (jnp.ones_like(x),))
