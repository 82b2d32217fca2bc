"""AL-RNN through the general Newton solver of `ops.newton`: the numbers of the iteration on the symbols."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.data.dynamics import simulate_lorenz63, standardise
from jaxpapers.ops.newton import check_structure, solve_recurrence
from jaxpapers.sequence import alrnn
from jaxpapers.sequence.alrnn.kernels import Forcing, PWLMap, forced_orbit

GOLDEN = Path(__file__).parents[1] / "golden" / "alrnn" / "model_lorenz_p2.npz"
M, N, P, T = 6, 2, 4, 12
FORCINGS = {"tau": (16, 1.0, "readouts"), "gtf": (1, 0.2, "state")}


@partial(jax.jit, static_argnames=("num_pwl", "forced", "method", "max_iterations"))
def run(p, xs, tau, alpha, forced, method, num_pwl=P, symbols=None, max_iterations=None):
    options = {"forced": forced, "method": method, "symbols": symbols, "max_iterations": max_iterations}
    return alrnn.teacher_forced(p, xs, tau, alpha, num_pwl=num_pwl, **options)


def random_problem(seed, *batch):
    """Float64 weights whose orbits stay bounded and cross regions, and windows."""
    rng = np.random.default_rng(seed)
    params = alrnn.ALRNNParams(
        a=rng.uniform(-0.5, 0.5, M),
        W=rng.normal(0, 0.5 / np.sqrt(M), (M, M)),
        h=rng.normal(0, 0.5, M),
        L=rng.normal(0, 0.5, (M - N, N)),
        slopes=rng.uniform(-0.5, 1.5, M) if seed % 2 else None,
    )
    return params, rng.normal(size=(*batch, T + 1, N))


@pytest.fixture(scope="module")
def lorenz():
    """The golden Lorenz model, and three windows of 1024 steps of the system."""
    golden = dict(np.load(GOLDEN))
    params = alrnn.ALRNNParams(*(golden[name].astype(np.float64) for name in ("A", "W", "h", "L")))
    with jax.enable_x64(True):
        series = np.asarray(standardise(simulate_lorenz63(jax.random.key(0), 6000))[0])
    return params, np.stack([series[start : start + 1025] for start in (0, 2000, 4000)])


@pytest.mark.parametrize("forcing", FORCINGS)
def test_a_trained_model_takes_the_iterations_of_the_symbols(lorenz, forcing):
    with jax.enable_x64(True):
        _, expected, _ = run(*lorenz, *FORCINGS[forcing], "sequential", 2)
        _, one, symbols = run(*lorenz, *FORCINGS[forcing], "newton", 2)
        _, other, solver = run(*lorenz, *FORCINGS[forcing], "solver", 2)
    assert np.all(solver.converged)
    np.testing.assert_array_equal(solver.iterations, symbols.iterations)
    # Rounding at 1e-16, times what the dynamics makes of it between two forcings.
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)
    np.testing.assert_allclose(other, expected, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6), tau=st.integers(1, T + 3), alpha=st.sampled_from([1.0, 0.3, 0.0]))
def test_iterations_and_states_from_any_guess(seed, tau, alpha):
    p, xs = random_problem(seed, 2)
    guess = np.random.default_rng(seed).integers(0, 2, (2, T, P)).astype(bool)
    with jax.enable_x64(True):
        _, one, symbols = run(p, xs, tau, alpha, "readouts", "newton", symbols=guess)
        _, other, solver = run(p, xs, tau, alpha, "readouts", "solver", symbols=guess)
    np.testing.assert_array_equal(solver.iterations, symbols.iterations)
    np.testing.assert_array_equal(solver.converged, symbols.converged)
    np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-12)


def test_each_iteration_makes_one_more_step_exact_and_each_sequence_counts_its_own():
    p, xs = random_problem(20, 2)
    with jax.enable_x64(True):
        _, expected, _ = run(p, xs, 4, 1.0, "readouts", "sequential")
        columns = np.concatenate([xs[:, :-1], xs[:, :-1] @ p.L.T], axis=-1)
        guess = columns[..., -P:] <= 0  # the wrong way round
        _, _, info = run(p, xs, 4, 1.0, "readouts", "solver", symbols=guess)
        assert np.all(info.converged)
        assert info.iterations.max() > 2
        for limit in (1, 2, T):
            _, states, partial_info = run(p, xs, 4, 1.0, "readouts", "solver", symbols=guess, max_iterations=limit)
            np.testing.assert_allclose(states[:, :limit], expected[:, :limit], rtol=0, atol=1e-12)
            np.testing.assert_array_equal(partial_info.converged, info.iterations <= limit)
            np.testing.assert_array_equal(partial_info.iterations, np.minimum(info.iterations, limit))
        alone = [run(p, xs[row], 4, 1.0, "readouts", "solver", symbols=guess[row])[2] for row in range(2)]
        np.testing.assert_array_equal(info.iterations, [each.iterations for each in alone])
        _, _, linear = run(p, xs, 4, 1.0, "readouts", "solver", 0)
        np.testing.assert_array_equal(linear.iterations, 1)


def test_gradients_are_those_of_the_sequential_method():
    p, xs = random_problem(8, 2)
    with jax.enable_x64(True):
        gradients = [
            jax.jit(jax.grad(partial(alrnn.forcing_loss, xs=xs, tau=3, alpha=0.7, num_pwl=P, method=method)))(p)
            for method in ("sequential", "solver")
        ]
    for one, other in zip(*(gradient[:4] for gradient in gradients), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-13)


def test_the_solvers_own_derivatives_agree_with_the_kernels():
    # The recurrence given to `solve_recurrence` straight away, its Jacobian by differentiation: no code of the
    # kernels but `forced_problem`.
    p, xs = random_problem(10)

    def solved(p):
        pwl, z0, forcing = alrnn.forced_problem(p, xs, 3, 0.6, num_pwl=P)

        def step(z, x):
            keep, inject = x
            return keep * (pwl.a * z + pwl.W @ jnp.where(z > 0, z, pwl.slopes * z) + pwl.h) + inject

        inputs = (forcing.keep, forcing.inject[..., 0])
        check_structure(step, jax.tree.map(lambda leaf: leaf[0], inputs), z0[:, 0], "dense")
        states = solve_recurrence(
            step, inputs, z0[:, 0], structure="dense", max_iterations=T, tolerance=1e-12, method="parallel"
        ).states
        return jnp.sum(jnp.square(states))

    def kernels(p):
        pwl, z0, forcing = alrnn.forced_problem(p, xs, 3, 0.6, num_pwl=P)
        states, _, _ = forced_orbit("newton", None, pwl, z0, forcing, jnp.zeros(forcing.inject.shape, bool))
        return jnp.sum(jnp.square(forcing.keep[..., None] * states + forcing.inject))

    with jax.enable_x64(True):
        one, other = (jax.jit(jax.value_and_grad(loss))(p) for loss in (kernels, solved))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-12)
    for name in ("a", "W", "h", "L"):
        np.testing.assert_allclose(getattr(other[1], name), getattr(one[1], name), rtol=1e-10, atol=1e-12)


def test_an_overflow_ends_the_solver_but_not_the_symbols():
    # z -> 3 z + 0.5 below 0 and 0.5 - z above: from 0.3 the orbit never leaves the right side. Guessed on the left it
    # grows like 3^t, beyond float64 before t = 1024. The signs of such an orbit are right all the same.
    steps = 1024
    with jax.enable_x64(True):
        pwl = PWLMap(*map(jnp.array, ([3.0], [[-4.0]], [0.5], [0.0])))
        forcing = Forcing(jnp.ones((steps, 1)), jnp.zeros((steps, 1, 1)))
        arguments = (pwl, jnp.array([[0.3]]), forcing, jnp.zeros((steps, 1, 1), bool))  # all guessed on the left
        _, _, solver = jax.jit(partial(forced_orbit, "solver", None))(*arguments)
        states, _, symbols = jax.jit(partial(forced_orbit, "newton", None))(*arguments)
    assert not solver.converged[0]  # and it says so
    assert symbols.converged[0]
    assert symbols.iterations[0] == 2
    np.testing.assert_allclose(states[:, 0, 0], np.tile([0.2, 0.3], steps // 2), atol=1e-12)
