"""ParaRNN's cells against the authors' golden figures, numpy loops and automatic derivatives."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops.newton import check_structure, solve_recurrence
from jaxpapers.sequence.pararnn import cells
from jaxpapers.sequence.pararnn.cells import GRUParams, LSTMParams, Solver

GOLDEN = Path(__file__).parents[1] / "golden" / "pararnn"
NAMES = ("A", "B", "C", "b")
TOLERANCE = {"f32": 2e-6, "f64": 1e-10}  # of the golden figures, relative to the largest entry
RANDOM = {GRUParams: cells.init_gru, LSTMParams: cells.init_lstm}
KINDS = [pytest.param(GRUParams, id="gru"), pytest.param(LSTMParams, id="lstm")]


@pytest.fixture(scope="module", params=["gru_f32", "gru_f64", "lstm_f32", "lstm_f64"])
def golden(request):
    kind, precision = request.param.split("_")
    arrays = dict(np.load(GOLDEN / f"{request.param}.npz"))
    dtype = arrays["state_seq"].dtype
    weights = {name: arrays[name].astype(dtype) for name in NAMES if name in arrays}
    with jax.enable_x64(precision == "f64"):
        params = cells.params_from_torch(weights)
    iterations = len(arrays["newton_residual_max"]) - 1
    return kind, precision, params, arrays["x"].astype(dtype), iterations, arrays


def close(ours, theirs, precision):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[precision] * max(1, np.abs(theirs).max()))


def as_golden(kind, states):
    """(time, batch, ...) as the goldens lay it out: (batch, time, ...), the LSTM's [c, h] on one axis."""
    states = np.swapaxes(np.asarray(states), 0, 1)
    return states.reshape(*states.shape[:2], -1) if kind == "lstm" else states


def preactivations(params, x):
    return jnp.swapaxes(cells.preactivations(x, params.B, params.b), 0, 1)


def test_golden_states_by_every_method(golden):
    kind, precision, params, x, iterations, arrays = golden
    with jax.enable_x64(precision == "f64"):
        for method in ("sequential", "parallel", "chunked"):
            solver = Solver(method=method, max_iterations=iterations)
            solution = jax.jit(lambda p, s=solver: cells.solve(p, preactivations(p, x), solver=s))(params)
            close(as_golden(kind, solution.states), arrays["state_seq"], precision)
            output = solution.states if kind == "gru" else solution.states[..., 1, :]
            close(np.swapaxes(output, 0, 1), arrays["y_seq"], precision)
            close(np.swapaxes(output, 0, 1), arrays["y_par"], precision)


def test_golden_iterates_and_residuals(golden):
    kind, _, params, *_ = golden
    jacobian = cells.lstm_jacobian if kind == "lstm" else cells.gru_jacobian
    constants = {name: getattr(params, name) for name in params._fields if name in "AC"}

    def jacobian_of_iterate(state, inputs):
        return jacobian(state, inputs[0], **constants)

    check_iterates(golden, jacobian_of_iterate, "newton")


@pytest.mark.parametrize("golden", ["lstm_f32", "lstm_f64"], indirect=True)
def test_golden_iterates_of_the_reference_jacobian(golden):
    params = golden[2]

    def jacobian_of_iterate(state, inputs):
        return cells.lstm_jacobian_reference(state, inputs[1], inputs[0], params.A, params.C)

    check_iterates(golden, jacobian_of_iterate, "newton_variant")


def check_iterates(golden, jacobian, prefix):
    """Single iterations, the Jacobian at (previous state, (pre-activations, iterate of this step))."""
    kind, precision, params, x, iterations, arrays = golden
    step = one_step(params)
    with jax.enable_x64(precision == "f64"):
        g = preactivations(params, x)
        zero = jnp.zeros((2, 2, 8) if kind == "lstm" else (2, 8), g.dtype)

        @jax.jit
        def iterate(states):
            return solve_recurrence(
                lambda state, inputs: step(state, inputs[0]),
                (g, states),
                zero,
                structure="block" if kind == "lstm" else "diagonal",
                jacobian=jacobian,
                guess=states,
                max_iterations=1,
                method="parallel",
            )

        states = step(zero, g)
        close(as_golden(kind, states), arrays["newton_h0"], precision)
        residuals = []
        for count in range(1, iterations + 1):
            solution = iterate(states)
            states = solution.states
            residuals.append(solution.residuals[0])
            close(as_golden(kind, states), arrays[f"{prefix}_h{count}"], precision)
        # Of the last residuals only rounding is left: an ulp or two of states below 1. They are kept in float32.
        expected = arrays[f"{prefix}_residual_max"]
        np.testing.assert_allclose([*residuals, solution.residuals[1]], expected, rtol=1e-5, atol=4e-7)


def test_golden_jacobian(golden):
    kind, precision, params, x, _, arrays = golden
    with jax.enable_x64(precision == "f64"):
        states = arrays["state_seq"]
        if kind == "lstm":
            states = states.reshape(*states.shape[:2], 2, -1)
        prev = np.concatenate([np.zeros_like(states[:, :1]), states[:, :-1]], axis=1)
        g = cells.preactivations(x, params.B, params.b)
        if kind == "gru":
            close(cells.gru_jacobian(prev, g, params.A), arrays["jacobian"], precision)
            return
        for ours in (
            cells.lstm_jacobian(prev, g, params.A, params.C),
            cells.lstm_jacobian_reference(prev, states, g, params.A, params.C),
        ):
            rows = np.moveaxis(ours, -2, -1)  # (batch, time, out, channel, in)
            close(rows.reshape(*rows.shape[:2], -1, 2), arrays["jacobian"], precision)


@pytest.mark.parametrize("suffix", ["", "_par"])
def test_golden_gradients(golden, suffix):
    kind, precision, params, x, iterations, arrays = golden

    def loss(params, x):
        solver = Solver(method="chunked", max_iterations=iterations) if suffix else Solver(method="sequential")
        states = cells.solve(params, preactivations(params, x), solver=solver).states
        output = states if kind == "gru" else states[..., 1, :]
        return jnp.sum(jnp.swapaxes(output, 0, 1) * arrays["cotangent"])

    with jax.enable_x64(precision == "f64"):
        of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    close(of_x, arrays[f"grad_x{suffix}"], precision)
    for name in params._fields:
        close(getattr(of_params, name), arrays[f"grad_{name}{suffix}"], precision)


def one_step(params):
    if isinstance(params, LSTMParams):
        return partial(cells.lstm_cell, A=params.A, C=params.C)
    return partial(cells.gru_cell, A=params.A)


def random_problem(kind, seed, amplitude=0.9, steps=24, features=4):
    """Weights, pre-activations and a state, in float64."""
    rng = np.random.default_rng(seed)
    shapes = cells.param_shapes(kind, 6, features, 2)
    params = kind(**{name: rng.uniform(-amplitude, amplitude, shape) for name, shape in shapes.items()})
    state = rng.uniform(-1, 1, (2, features) if kind is LSTMParams else features)
    return params, rng.normal(size=(steps, 3, features)), state


def loop(params, g, state):
    """The recurrence, channel by channel, in numpy."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    A, out = params.A, []
    for row in g:
        new = np.empty_like(state)
        for i in range(g.shape[-1]):
            if isinstance(params, LSTMParams):
                c, h = state[:, i]
                f = sigmoid(A[0, i] * h + params.C[0, i] * c + row[0, i])
                new[0, i] = f * c + (1 - f) * np.tanh(A[2, i] * h + row[2, i])
                o = sigmoid(A[1, i] * h + params.C[1, i] * new[0, i] + row[1, i])
                new[1, i] = o * np.tanh(new[0, i])
            else:
                z, r = (sigmoid(A[gate, i] * state[i] + row[gate, i]) for gate in (0, 1))
                new[i] = (1 - z) * state[i] + z * np.tanh(A[2, i] * state[i] * r + row[2, i])
        state = new
        out.append(state)
    return np.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_loop(kind):
    params, g, state = random_problem(kind, 0)
    with jax.enable_x64(True):
        for method in ("sequential", "chunked"):
            solution = cells.solve(params, g, state, solver=Solver(method=method, max_iterations=8))
            np.testing.assert_allclose(solution.states, loop(params, g, state), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(cells.NONLINEARITIES))
def test_analytic_jacobian_is_the_automatic_one(kind, name):
    params, g, state = random_problem(kind, 1)
    others = tuple(cells.NONLINEARITIES)  # each gate another one
    start = others.index(name)
    gates = tuple(others[(start + 5 * i) % len(others)] for i in range(4 if kind is LSTMParams else 3))
    default = cells.LSTM_GATES if kind is LSTMParams else cells.GRU_GATES
    with jax.enable_x64(True):
        for which in (gates, default):
            step = partial(one_step(params), gates=which)
            full = jax.jacfwd(step)(state, g[0])
            if kind is LSTMParams:
                ours = cells.lstm_jacobian(state, g[0], params.A, params.C, which)
                automatic = jnp.diagonal(full, axis1=1, axis2=3)
            else:
                ours, automatic = cells.gru_jacobian(state, g[0], params.A, which), jnp.diagonal(full)
            np.testing.assert_allclose(ours, automatic, rtol=1e-12, atol=1e-13)
            check_structure(step, g[0], state, "block" if kind is LSTMParams else "diagonal")


def test_half_sigmoid_and_the_other_gates_are_what_their_names_say():
    x = np.linspace(-2, 2, 9)
    table = {name: function(x) for name, function in cells.NONLINEARITIES.items()}
    np.testing.assert_allclose(table["half_sigmoid"], 0.5 / (1 + np.exp(-x)), rtol=1e-6)
    np.testing.assert_allclose(table["leaky_relu"], np.where(x > 0, x, 0.01 * x), rtol=1e-6)
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(table["gelu"], gelu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["elu"], np.where(x > 0, x, np.expm1(x)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_without_recurrent_weights_one_iteration_is_exact(kind):
    # The GRU and the LSTM's c are then linear in the state; the LSTM's h follows from c without feedback, in one more.
    params, g, state = random_problem(kind, 2)
    params = params._replace(
        **{name: np.zeros_like(getattr(params, name)) for name in ("A", "C") if name in params._fields}
    )
    with jax.enable_x64(True):
        solution = cells.solve(params, g, state, solver=Solver(method="parallel", max_iterations=1))
    states, expected = np.asarray(solution.states), loop(params, g, state)
    if kind is LSTMParams:
        states, expected = states[:, 0], expected[:, 0]
    np.testing.assert_allclose(states, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_bounded(kind):
    params, g, _ = random_problem(kind, 3, amplitude=3.0, steps=200)
    states = np.asarray(cells.solve(params, 5 * g, solver=Solver(method="sequential")).states)
    if kind is GRUParams:
        assert np.abs(states).max() <= 1
        assert np.abs(states).max() > 0.9  # the bound is reached: large inputs
    else:
        assert np.abs(states[:, 0]).max() <= 1
        assert np.abs(states[:, 1]).max() <= np.tanh(np.float32(1))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_can_be_permuted(kind):
    params, g, state = random_problem(kind, 4)
    order = np.array([2, 0, 3, 1])
    moved = params._replace(**{name: getattr(params, name)[..., order] for name in params._fields if name != "B"})
    run = partial(cells.solve, solver=Solver(method="chunked"))
    np.testing.assert_array_equal(
        run(moved, g[..., order], state[..., order]).states, run(params, g, state).states[..., order]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_gradients_are_those_of_backpropagation_through_time(kind):
    params, g, state = random_problem(kind, 5)

    def loss(method, params, g, state):
        states = cells.solve(params, g, state, solver=Solver(method=method, max_iterations=8)).states
        return jnp.sum(jnp.square(states)) + jnp.sum(states[-1])

    with jax.enable_x64(True):
        # Through a plain scan of the cell, with none of the solver.
        def by_scan(params, g, state):
            states = jax.lax.scan(lambda h, row: (one_step(params)(h, row),) * 2, state, g)[1]
            return jnp.sum(jnp.square(states)) + jnp.sum(states[-1])

        expected = jax.jit(jax.grad(by_scan, argnums=(0, 1, 2)))(params, g, state)
        for method in ("sequential", "parallel", "chunked"):
            ours = jax.jit(jax.grad(partial(loss, method), argnums=(0, 1, 2)))(params, g, state)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_time_split_over_devices_changes_nothing(kind):
    params, g, state = random_problem(kind, 6)
    mesh = jax.make_mesh((2,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def loss(solver, params, g):
        return jnp.sum(jnp.square(cells.solve(params, g, state, solver=solver).states))

    solver = Solver(method="chunked", max_iterations=6)
    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(partial(loss, solver)))(params, g)
        split = jax.jit(jax.value_and_grad(partial(loss, solver._replace(mesh=mesh))))(params, g)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), split, expected)


def test_input_maps_are_block_diagonal():
    rng = np.random.default_rng(0)
    x, B, b = rng.normal(size=(5, 6)), rng.normal(size=(2, 3, 3, 4)), rng.normal(size=(3, 8))
    with jax.enable_x64(True):
        g = cells.preactivations(x, B, b)
    for gate in range(3):
        full = np.zeros((6, 8))
        full[:3, :4], full[3:, 4:] = B[0, :, gate], B[1, :, gate]
        np.testing.assert_allclose(g[:, gate], x @ full + b[gate], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_solved_in_float32(kind):
    params = RANDOM[kind](jax.random.key(0), 8, 8, 2)
    x = jax.random.normal(jax.random.key(1), (2, 12, 8), jnp.bfloat16)
    g = preactivations(params._replace(B=params.B.astype(jnp.bfloat16)), x)
    solution = cells.solve(params, g, solver=Solver(method="chunked"))
    assert g.dtype == solution.states.dtype == jnp.float32
    assert solution.residuals[-1] < 1e-5
    assert cells.solve(params, g.astype(jnp.bfloat16), solver=Solver(method="chunked")).residuals[-1] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_of_the_paper_and_of_the_released_code(kind):
    paper = RANDOM[kind](jax.random.key(0), 64, 4096, 4)
    assert abs(paper.A.std() - 1 / 64) < 5e-4  # 12,288 draws: standard error 1e-4
    bound = np.sqrt(3 / 16)
    assert 0.999 * bound < np.abs(paper.B).max() <= bound
    assert not paper.b.any()
    narrow = RANDOM[kind](jax.random.key(1), 4, 4, 1)
    wide = jnp.concatenate([RANDOM[kind](jax.random.key(seed), 1, 1, 1).A.ravel() for seed in range(30)])
    assert np.abs(narrow.A).max() <= 0.9
    assert 0.6 < np.abs(wide).max() <= 0.9  # std 1, cut
    released = RANDOM[kind](jax.random.key(0), 64, 4096, 4, "released")
    assert abs(released.A.std() - 2 / np.sqrt(5 * 4096)) < 5e-4
    bound = np.sqrt(6 / (16 + 1024))
    assert 0.999 * bound < np.abs(released.B).max() <= bound
    np.testing.assert_allclose(released.b[0], -np.linspace(0, 1, 4096), rtol=1e-6, atol=1e-6)
    assert not released.b[1:].any()
    if kind is LSTMParams:
        assert abs(paper.C.std() - 1 / 64) < 5e-4


def test_three_iterations_reach_rounding_at_initialisation():
    # The card's claim newton3 at its smallest: D = 64, L = 256.
    for kind in (GRUParams, LSTMParams):
        params = RANDOM[kind](jax.random.key(0), 64, 64, 4)
        x = jax.random.normal(jax.random.key(1), (256, 2, 64))
        g = cells.preactivations(x, params.B, params.b)
        residuals = jax.jit(partial(cells.solve, solver=Solver(method="chunked")))(params, g).residuals
        assert residuals[1] > 1e-3
        assert residuals[3] < 5e-6


def test_bad_input_is_refused():
    params, g, state = random_problem(GRUParams, 0)
    lstm = random_problem(LSTMParams, 0)[0]
    with pytest.raises(ValueError, match="width 5 do not fit"):
        cells.preactivations(np.ones((2, 5)), params.B, params.b)
    with pytest.raises(ValueError, match=r"3 heads must divide the inputs \(6\) and the features \(4\)"):
        cells.init_gru(jax.random.key(0), 6, 4, 3)
    with pytest.raises(ValueError, match="0 heads"):
        cells.init_lstm(jax.random.key(0), 6, 4, 0)
    with pytest.raises(ValueError, match="scheme 'torch' is unknown"):
        cells.init_gru(jax.random.key(0), 6, 4, 2, "torch")
    with pytest.raises(ValueError, match="nonlinearity 'cubic' is unknown"):
        cells.solve(params, g, gates=("sigmoid", "cubic", "tanh"))
    with pytest.raises(ValueError, match="must name 4 nonlinearities"):
        cells.solve(lstm, g, gates=cells.GRU_GATES)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(2, 4\)"):
        cells.solve(lstm, g, state)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        cells.solve(params, g, solver=Solver(max_iterations=0))
    with pytest.raises(ValueError, match="method 'quick' is unknown"):
        cells.solve(params, g, solver=Solver(method="quick"))
    with pytest.raises(ValueError, match=r"expected the arrays A, B, b, and C for the LSTM, got \['A', 'B'\]"):
        cells.params_from_torch({"A": params.A, "B": params.B})
    with pytest.raises(ValueError, match="do not fit"):
        cells.params_from_torch({**params._asdict(), "A": params.A[:, :3]})
