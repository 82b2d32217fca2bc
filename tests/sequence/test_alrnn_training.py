"""Teacher forcing and its scans: values against numpy loops, gradients against autodiff of a plain loop."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.data.dynamics import simulate_lorenz63, standardise
from jaxpapers.sequence import alrnn

GOLDEN = Path(__file__).parents[1] / "golden" / "alrnn"
M, N, T = 6, 2, 12
METHODS = ("sequential", "newton", "symbols")


def random_params(seed, latent=M, observed=N, slopes=False):
    """Float64 weights whose orbits stay bounded and cross regions."""
    rng = np.random.default_rng(seed)
    return alrnn.ALRNNParams(
        a=rng.uniform(-0.5, 0.5, latent),
        W=rng.normal(0, 0.5 / np.sqrt(latent), (latent, latent)),
        h=rng.normal(0, 0.5, latent),
        L=rng.normal(0, 0.5, (latent - observed, observed)),
        slopes=rng.uniform(-0.5, 1.5, latent) if slopes else None,
    )


def random_windows(seed, *batch, steps=T):
    return np.random.default_rng(seed).normal(size=(*batch, steps + 1, N))


def loop(p, x, tau, alpha, num_pwl, forced="readouts", xp=np):
    """The card's recurrence step by step: states before forcing, and the states steps started from."""
    latent = p.a.shape[0]
    observed = p.L.shape[1]
    guess = lambda x: xp.concatenate([x, p.L @ x])  # noqa: E731
    pwl = np.arange(latent) >= latent - num_pwl
    z, states, starts = guess(x[0]), [], []
    for t in range(1, len(x)):
        starts.append(z)
        negative = 0 if p.slopes is None else p.slopes * z
        z = p.a * z + p.W @ xp.where(pwl & (z <= 0), negative, z) + p.h
        states.append(z)
        if t % tau == 0:
            if forced == "state":
                z = alpha * guess(x[t]) + (1 - alpha) * z
            else:
                z = xp.concatenate([alpha * x[t] + (1 - alpha) * z[:observed], z[observed:]])
    return xp.stack(states), xp.stack(starts)


@partial(jax.jit, static_argnames=("num_pwl", "forced", "method", "max_iterations"))
def run(p, xs, tau, alpha, num_pwl, forced="readouts", method="sequential", symbols=None, max_iterations=None):
    arguments = {"forced": forced, "method": method, "symbols": symbols, "max_iterations": max_iterations}
    return alrnn.teacher_forced(p, xs, tau, alpha, num_pwl=num_pwl, **arguments)


@partial(jax.jit, static_argnames="forced")
def run_any_p(p, xs, tau, alpha, num_pwl, forced):
    return alrnn.teacher_forced(p, xs, tau, alpha, num_pwl=num_pwl, forced=forced)


# ---- values


@given(
    seed=st.integers(0, 10**6),
    tau=st.integers(1, T + 3),
    alpha=st.sampled_from([1.0, 0.3, 0.0]),
    num_pwl=st.sampled_from([0, 3, M]),
    forced=st.sampled_from(["readouts", "state"]),
)
def test_forced_orbits_are_the_loop(seed, tau, alpha, num_pwl, forced):
    p, xs = random_params(seed), random_windows(seed + 1, 2)
    with jax.enable_x64(True):
        predictions, states, info = run_any_p(p, xs, tau, alpha, num_pwl, forced)
    expected = np.stack([loop(p, x, tau, alpha, num_pwl, forced)[0] for x in xs])
    # Float64, 12 steps: only the order of summation differs.
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_array_equal(predictions, states[..., :N])
    assert np.all(info.converged)
    assert not np.any(info.iterations)


@pytest.mark.parametrize(("batch", "steps"), [((), 5), ((2, 3), 1)])
@pytest.mark.parametrize("method", METHODS)
def test_batch_axes_and_short_windows(batch, steps, method):
    p, xs = random_params(0), random_windows(1, *batch, steps=steps)
    flat = [loop(p, x, 2, 0.7, 3) for x in xs.reshape(-1, steps + 1, N)]
    symbols = np.reshape([starts[:, -3:] > 0 for _, starts in flat], (*batch, steps, 3))
    with jax.enable_x64(True):
        given_symbols = symbols if method == "symbols" else None
        predictions, states, info = run(p, xs, 2, 0.7, 3, method=method, symbols=given_symbols)
    assert predictions.shape == (*batch, steps, N)
    assert info.iterations.shape == info.converged.shape == batch
    assert np.all(info.converged)
    expected = np.reshape([states for states, _ in flat], (*batch, steps, M))
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)


def test_forcing_starts_after_the_prediction_of_x_tau():
    p, xs = random_params(2), random_windows(3)
    with jax.enable_x64(True):
        _, free = jax.jit(alrnn.generate, static_argnums=(2, 3))(p, xs[0], T, 3)
        _, forced, _ = run(p, xs, 4, 1.0, 3)
        _, never, _ = run(p, xs, T + 1, 1.0, 3)
    np.testing.assert_allclose(never, free, rtol=1e-12)
    np.testing.assert_allclose(forced[:4], free[:4], rtol=1e-12)
    assert np.all(np.abs(forced[4] - free[4]) > 1e-6)


def test_forcing_at_every_step_predicts_from_data_while_hidden_units_run_on():
    p, xs = random_params(4), random_windows(5)
    with jax.enable_x64(True):
        _, states, _ = run(p, xs, 1, 1.0, 3)
        starts = np.concatenate([xs[1:-1], np.asarray(states)[:-1, N:]], axis=1)
        np.testing.assert_allclose(states[1:], alrnn.step(p, starts, 3), rtol=1e-12)


def test_generation_with_resets_is_identity_forcing():
    p, xs = random_params(6), random_windows(7)
    with jax.enable_x64(True):
        predictions, states = jax.jit(partial(alrnn.generate_with_resets, tau=5, num_pwl=3))(p, xs)
    np.testing.assert_allclose(states, loop(p, xs, 5, 1.0, 3)[0], rtol=1e-11)
    np.testing.assert_array_equal(predictions, states[:, :N])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_compute_dtype_is_that_of_the_weights(dtype):
    p = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), random_params(8))
    forced = jax.eval_shape(partial(alrnn.teacher_forced, tau=3, num_pwl=3), p, jnp.ones((2, T + 1, N), dtype))
    free = jax.eval_shape(partial(alrnn.generate, steps=3, num_pwl=3), p, jnp.ones(N, dtype))
    assert {leaf.dtype for leaf in (*forced[:2], *free)} == {jnp.dtype(dtype)}


# ---- gradients


def derivatives(f, point):
    """Value, gradient and a Hessian-vector product, in one program."""
    direction = jax.tree.map(lambda leaf: np.cos(7.0 * np.arange(leaf.size).reshape(leaf.shape)), point)

    def slope(*point):
        gradient = jax.grad(f, argnums=(0, 1, 2))(*point)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        return sum(jnp.sum(g * d) for g, d in pairs), gradient

    def everything(*point):
        product, gradient = jax.grad(slope, argnums=(0, 1, 2), has_aux=True)(*point)
        return f(*point), gradient, product

    return jax.jit(everything)(*point)


def gradient_case(forced, slopes, num_pwl=3, tau=2, steps=5):
    """A point, the symbols there, and the derivatives of a loss of all states by autodiff of the plain loop."""
    p, x = random_params(9, slopes=slopes), random_windows(10, steps=steps)
    # Data half let in, so that nothing is hidden behind a zero.
    point = (p, x, np.asarray(0.4))
    symbols = loop(p, x, tau, 0.4, num_pwl, forced)[1][:, -num_pwl:] > 0

    def loss(states, x):
        return jnp.sum(jnp.sin(states)) + jnp.mean(jnp.square(states[:, :N] - x[1:]))

    plain = derivatives(lambda p, x, alpha: loss(loop(p, x, tau, alpha, num_pwl, forced, xp=jnp)[0], x), point)

    def ours(p, x, alpha, method):
        given_symbols = symbols if method == "symbols" else None
        forcing = {"num_pwl": num_pwl, "forced": forced, "method": method, "symbols": given_symbols}
        return loss(alrnn.teacher_forced(p, x, tau, alpha, **forcing)[1], x)

    return point, ours, plain


@pytest.mark.parametrize(("forced", "slopes"), [("readouts", True), ("state", False)])
def test_gradients_of_first_and_second_order_are_autodiffs(forced, slopes):
    with jax.enable_x64(True):
        point, ours, expected = gradient_case(forced, slopes)
        for method in METHODS:
            found = derivatives(partial(ours, method=method), point)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10, err_msg=method)


def test_loss_gradient_is_the_difference_quotient():
    p, xs = random_params(11), random_windows(12, 4)
    rng = np.random.default_rng(13)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), p)
    with jax.enable_x64(True):
        loss = jax.jit(lambda p: alrnn.forcing_loss(p, xs, 3, num_pwl=3))
        gradient = jax.jit(jax.grad(loss))(p)
        slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradient[:4], direction[:4], strict=True))
        shifted = [float(loss(jax.tree.map(lambda q, d, h=h: q + h * d, p, direction))) for h in (1e-6, -1e-6)]
    # Central differences: error h^2 and rounding / h, both about 1e-10.
    np.testing.assert_allclose((shifted[0] - shifted[1]) / 2e-6, slope, rtol=1e-7)


def test_the_loss_is_the_mean_over_everything():
    p, xs = random_params(14), random_windows(15, 3)
    with jax.enable_x64(True):
        loss = jax.jit(partial(alrnn.forcing_loss, tau=5, num_pwl=3))(p, xs)
    errors = [loop(p, x, 5, 1.0, 3)[0][:, :N] - x[1:] for x in xs]
    np.testing.assert_allclose(loss, np.mean(np.square(errors)), rtol=1e-12)


def test_no_gradient_passes_replaced_readouts():
    # With readouts alone and tau = 1 nothing of x_0 is left after the first step.
    p, x = random_params(16, latent=N), random_windows(17)
    with jax.enable_x64(True):
        last = jax.jit(jax.grad(lambda x: alrnn.teacher_forced(p, x, 1, num_pwl=0)[0][-1].sum()))(x)
    last = np.asarray(last)
    assert not np.any(last[: T - 1])
    assert np.all(last[T - 1] != 0)


def test_models_of_several_p_train_under_one_vmap():
    p = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *map(random_params, range(5)))
    xs = random_windows(18, 2).astype(np.float32)
    grad = jax.value_and_grad(lambda p, num_pwl: alrnn.forcing_loss(p, xs, 3, num_pwl=num_pwl))
    together = jax.jit(jax.vmap(grad))(p, jnp.arange(5))
    for num_pwl in (0, 3):
        alone = jax.jit(partial(grad, num_pwl=num_pwl))(jax.tree.map(lambda leaf, row=num_pwl: leaf[row], p))
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            # Two programs of the same float32 sums.
            np.testing.assert_allclose(one[num_pwl], other, rtol=2e-5, atol=1e-6)


# ---- golden figures


@pytest.fixture(scope="module", params=["model_lorenz_p2", "model_rossler_p1_gtf"])
def golden(request):
    return dict(np.load(GOLDEN / f"{request.param}.npz"))


def golden_params(golden):
    return alrnn.ALRNNParams(*(golden[name].astype(np.float64) for name in ("A", "W", "h", "L")))


@pytest.mark.parametrize("method", ["sequential", "newton"])
def test_golden_predictions_loss_and_gradients(golden, method):
    p, xs = golden_params(golden), golden["x"].astype(float)
    forcing: dict[str, Any] = {"tau": int(golden["tau"]), "alpha": float(golden["alpha"]), "num_pwl": int(golden["P"])}
    with jax.enable_x64(True):
        _, states, info = jax.jit(lambda p: alrnn.teacher_forced(p, xs, method=method, **forcing))(p)
        loss = partial(alrnn.forcing_loss, xs=xs, method=method, **forcing)
        value, gradient = jax.jit(jax.value_and_grad(loss))(p)
    assert np.all(info.converged)
    np.testing.assert_allclose(states, golden["z_pred"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(value, golden["loss"], rtol=0, atol=1e-9)
    for name in ("a", "W", "h", "L"):
        expected = golden[f"grad_{name.upper() if name == 'a' else name}"]
        np.testing.assert_allclose(getattr(gradient, name), expected, rtol=0, atol=1e-9)


# ---- the scans


@pytest.fixture(scope="module")
def lorenz():
    """The golden Lorenz model, and three windows of 1024 steps of the system."""
    golden = dict(np.load(GOLDEN / "model_lorenz_p2.npz"))
    with jax.enable_x64(True):
        series = np.asarray(standardise(simulate_lorenz63(jax.random.key(0), 6000))[0])
    return golden_params(golden), np.stack([series[start : start + 1025] for start in (0, 2000, 4000)])


def test_three_methods_agree_over_200_steps(lorenz):
    p, xs = lorenz[0], lorenz[1][:, :201]
    results = {}
    with jax.enable_x64(True):
        _, states, _ = run(p, xs, 16, 1.0, 2)
        starts = np.array(states[:, :-1])
        starts[:, 15::16, :3] = xs[:, 16:-1:16]
        bits = np.concatenate([alrnn.init_state(p, xs[:, :1]), starts], axis=1)[..., -2:] > 0

        def loss(p, method):
            symbols = jnp.asarray(bits) if method == "symbols" else None
            predictions, states, info = alrnn.teacher_forced(p, xs, 16, num_pwl=2, method=method, symbols=symbols)
            return jnp.mean(jnp.square(predictions - xs[:, 1:])), (states, info)

        for method in METHODS:
            results[method] = jax.jit(jax.value_and_grad(partial(loss, method=method), has_aux=True))(p)
    (_, (expected, _)), gradient = results["sequential"]
    for method in ("newton", "symbols"):
        (_, (states, info)), other = results[method]
        assert np.all(info.converged)
        assert np.all(info.iterations == 1 if method == "symbols" else info.iterations > 1)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-9)
        for one, two in zip(other[:4], gradient[:4], strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-9)


def test_newton_makes_one_more_step_exact_at_each_iteration():
    p, xs = random_params(19), random_windows(20, 2)
    expected = np.stack([loop(p, x, 4, 1.0, 4)[0] for x in xs])
    # A bad guess: every bit wrong, so that nothing is right by luck.
    wrong = np.stack([loop(p, x, 4, 1.0, 4)[1][:, -4:] <= 0 for x in xs])
    with jax.enable_x64(True):
        _, _, info = run(p, xs, 4, 1.0, 4, method="newton", symbols=wrong)
        assert np.all(info.converged)
        assert 2 < info.iterations.max() <= T
        for limit in (1, 2, 5, T):
            _, states, partial_info = run(p, xs, 4, 1.0, 4, method="newton", symbols=wrong, max_iterations=limit)
            np.testing.assert_allclose(states[:, :limit], expected[:, :limit], rtol=0, atol=1e-12)
            np.testing.assert_array_equal(partial_info.converged, info.iterations <= limit)
            np.testing.assert_array_equal(partial_info.iterations, np.minimum(info.iterations, limit))
        # Sequences of a batch are counted as if each had been alone.
        alone = [run(p, xs[row], 4, 1.0, 4, method="newton", symbols=wrong[row])[2] for row in range(2)]
        np.testing.assert_array_equal(info.iterations, [each.iterations for each in alone])


def test_newton_needs_one_iteration_without_pwl_units_and_from_the_right_symbols():
    p, xs = random_params(21), random_windows(22, 2)
    right = np.stack([loop(p, x, 4, 1.0, 4)[1][:, -4:] > 0 for x in xs])
    with jax.enable_x64(True):
        _, _, linear = run(p, xs, 4, 1.0, 0, method="newton")
        _, _, warm = run(p, xs, 4, 1.0, 4, method="newton", symbols=right)
        _, _, traced = jax.jit(lambda n: alrnn.teacher_forced(p, xs, 4, num_pwl=n, method="newton"))(0)
    for info in (linear, warm, traced):
        assert np.all(info.converged)
        np.testing.assert_array_equal(info.iterations, 1)


def test_wrong_symbols_are_told():
    p, xs = random_params(23), random_windows(24, 2)
    symbols = np.stack([loop(p, x, 4, 1.0, 4)[1][:, -4:] > 0 for x in xs])
    symbols[1, 7, 2] ^= True
    with jax.enable_x64(True):
        _, _, info = run(p, xs, 4, 1.0, 4, method="symbols", symbols=symbols)
    np.testing.assert_array_equal(info.converged, [True, False])


def test_newton_on_a_trained_model_ends_on_unchanged_bits(lorenz):
    p, xs = lorenz
    with jax.enable_x64(True):
        for tau, alpha, forced, limit in ((16, 1.0, "readouts", 1024 // 8), (1, 0.2, "state", 8)):
            _, expected, _ = run(p, xs, tau, alpha, 2, forced)
            _, states, info = run(p, xs, tau, alpha, 2, forced, method="newton")
            assert np.all(info.converged)
            assert np.all(info.iterations <= limit)
            np.testing.assert_allclose(states, expected, rtol=0, atol=1e-10)


def test_the_linearisation_is_the_recurrence_and_its_jacobian():
    p, xs = random_params(25), random_windows(26, 2)
    starts = np.stack([loop(p, x, 3, 0.6, 4)[1] for x in xs])  # z~_0..z~_{T-1}
    with jax.enable_x64(True):
        pwl, z0, forcing = jax.jit(partial(alrnn.forced_problem, tau=3, alpha=0.6, num_pwl=4))(p, xs)
        np.testing.assert_allclose(z0.T, starts[:, 0], rtol=1e-14)
        matrices, offsets = jax.jit(alrnn.linearise)(pwl, forcing, np.moveaxis(starts, 0, -1) > 0)
        following = np.einsum("tbij,btj->bti", matrices, starts) + np.moveaxis(np.asarray(offsets), 0, 1)
        np.testing.assert_allclose(following[:, :-1], starts[:, 1:], rtol=0, atol=1e-12)
        keep, inject = np.asarray(forcing.keep[2]), np.asarray(forcing.inject[2, :, 0])
        autodiff = jax.jit(jax.jacfwd(lambda z: keep * alrnn.step(p, z, 4) + inject))(starts[0, 2])
        np.testing.assert_allclose(matrices[2, 0], autodiff, rtol=1e-12, atol=1e-14)


def test_prefix_products_are_the_loop():
    matrices = np.random.default_rng(27).normal(size=(7, 2, 3, 3))
    with jax.enable_x64(True):
        products = jax.jit(alrnn.prefix_products)(matrices)
    expected = np.eye(3)
    for t in range(7):
        expected = matrices[t] @ expected
        np.testing.assert_allclose(products[t], expected, rtol=1e-12, atol=1e-12)


# ---- regularisers and the rest


def test_regularisers_are_their_formulas():
    p = random_params(28, slopes=True)
    with jax.enable_x64(True):
        latent, alternative, guess, penalty = jax.jit(
            lambda p: (
                alrnn.latent_regulariser(p),
                alrnn.alternative_regulariser(p),
                alrnn.guess_regulariser(p),
                alrnn.slope_penalty(p, 4),
            )
        )(p)
    excess = np.maximum(p.a + np.diag(p.W) - 0.05, 0)
    np.testing.assert_allclose(latent, np.sqrt(np.sum(excess**2)), rtol=1e-13)
    np.testing.assert_allclose(alternative, sum(np.abs(leaf).sum() for leaf in (1 - p.a, p.W, p.h)), rtol=1e-13)
    np.testing.assert_allclose(guess, np.sum(p.L**2), rtol=1e-13)
    np.testing.assert_allclose(penalty, np.abs(1 - p.slopes[2:]).sum(), rtol=1e-13)
    slopes = np.array([9.0, 9.0, 1.05, 0.95, 0.85, 0.0])
    assert alrnn.count_nonlinear(p._replace(slopes=slopes), 4) == 2
    assert alrnn.count_nonlinear(p._replace(slopes=slopes), 4, threshold=0.2) == 1


def test_a_model_without_excess_has_no_latent_gradient():
    p = random_params(29)._replace(a=np.full(M, -2.0))
    value, gradient = jax.jit(jax.value_and_grad(alrnn.latent_regulariser))(p)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_noise_covers_the_whole_window_afresh():
    xs = np.ones((50, 41, N), np.float32)
    first, second = (alrnn.add_noise(jax.random.key(seed), xs, 0.05) for seed in (0, 1))
    assert not np.any(np.asarray(first) == np.asarray(second))
    # 4100 draws: standard errors 8e-4 and 6e-4.
    np.testing.assert_allclose([np.mean(first - xs), np.std(first - xs)], [0, 0.05], atol=3e-3)
    np.testing.assert_array_equal(alrnn.add_noise(jax.random.key(0), xs, 0.0), xs)


def test_predictability_time_of_lorenz():
    assert int(alrnn.predictability_time(0.00906)) == 76
    for exponent in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="positive Lyapunov exponent"):
            alrnn.predictability_time(exponent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0}, "tau must be at least 1, got 0"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"num_pwl": -1}, "num_pwl must lie in"),
        ({"num_pwl": M + 1}, "num_pwl must lie in"),
        ({"num_pwl": jnp.int32(M + 1)}, "num_pwl must lie in"),  # a concrete array is looked at, a traced one is not
        ({"tau": jnp.int32(0)}, "tau must be at least 1"),
        ({"alpha": jnp.float32(1.5)}, "alpha must lie in"),
        ({"num_pwl": 5}, "rectify some of the 2 readouts"),
        ({"forced": "hidden"}, "forced must be one of .* got 'hidden'"),
        ({"method": "deer"}, "method must be one of .* got 'deer'"),
        ({"method": "symbols"}, "needs symbols"),
        ({"symbols": np.ones((2, T, 3), bool)}, "takes no symbols"),
        ({"method": "newton", "symbols": np.ones((2, T, 2), bool)}, r"symbols must be \(2, 12, 3\)"),
        ({"method": "newton", "max_iterations": 0}, "max_iterations must be at least 1"),
        ({"xs": np.ones((2, 1, N))}, r"windows must be \(\.\.\., T \+ 1 >= 2, 2\)"),
        ({"xs": np.ones((2, T + 1, N + 1))}, r"windows must be \(\.\.\., T \+ 1 >= 2, 2\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"params": random_params(0), "xs": random_windows(0, 2), "tau": 3, "num_pwl": 3} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: alrnn.teacher_forced(**arguments))  # at trace time, before anything is computed


def test_other_bad_input_is_refused():
    p, xs = random_params(0), random_windows(0)
    with pytest.raises(ValueError, match="static num_pwl"):
        jax.jit(lambda n: alrnn.teacher_forced(p, xs, 3, num_pwl=n, method="symbols", symbols=np.ones((T, 3), bool)))(3)
    with pytest.raises(ValueError, match="sigma must not be negative"):
        alrnn.add_noise(jax.random.key(0), xs, -0.1)
    with pytest.raises(ValueError, match="no slopes"):
        alrnn.slope_penalty(p, 3)
    with pytest.raises(ValueError, match="no slopes"):
        alrnn.count_nonlinear(p, 3)
