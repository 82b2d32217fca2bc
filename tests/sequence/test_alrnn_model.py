"""The AL-RNN's map, regions, free run and observation models, against numpy loops and the golden figures."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.sequence import alrnn

GOLDEN = Path(__file__).parents[1] / "golden" / "alrnn"
M, N = 6, 2


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


def loop_step(p, z, num_pwl):
    """Eq. 4 unit by unit."""
    size = len(z)
    active = [
        z[i] if i < size - num_pwl or z[i] > 0 else (0.0 if p.slopes is None else p.slopes[i] * z[i])
        for i in range(size)
    ]
    return np.array([p.a[i] * z[i] + sum(p.W[i, j] * active[j] for j in range(size)) + p.h[i] for i in range(size)])


@pytest.fixture(scope="module", params=["model_lorenz_p2", "model_rossler_p1_gtf"])
def golden(request):
    return dict(np.load(GOLDEN / f"{request.param}.npz"))


def golden_params(golden):
    return alrnn.ALRNNParams(*(golden[name].astype(np.float64) for name in ("A", "W", "h", "L")))


@given(seed=st.integers(0, 10**6), num_pwl=st.sampled_from([0, 4, M]), slopes=st.booleans())
def test_step_is_the_loop_over_units(seed, num_pwl, slopes):
    p = random_params(seed, slopes=slopes)
    z = np.random.default_rng(seed + 1).normal(size=(3, M))
    with jax.enable_x64(True):
        ours = alrnn.step(p, z, num_pwl)
    # Two orders of summation in float64.
    np.testing.assert_allclose(ours, [loop_step(p, row, num_pwl) for row in z], rtol=1e-12, atol=1e-13)


@given(seed=st.integers(0, 10**6), num_pwl=st.sampled_from([0, 4, M]))
def test_regions_are_affine_and_the_jacobian_is_their_matrix(seed, num_pwl):
    p = random_params(seed, slopes=True)
    z = np.random.default_rng(seed + 1).normal(size=M)
    with jax.enable_x64(True):
        bits, matrix, jacobian, following, autodiff = map(np.asarray, views_of_a_region(p, z, num_pwl))
    assert bits.shape == (num_pwl,)
    np.testing.assert_array_equal(bits, z[M - num_pwl :] > 0)
    np.testing.assert_allclose(matrix @ z + p.h, following, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(matrix, jacobian)
    np.testing.assert_allclose(matrix, autodiff, rtol=1e-12, atol=1e-14)


@partial(jax.jit, static_argnums=2)
def views_of_a_region(p, z, num_pwl):
    bits = alrnn.region_bits(z, num_pwl)
    step = partial(alrnn.step, p, num_pwl=num_pwl)
    return bits, alrnn.region_matrix(p, bits), alrnn.jacobian(p, z, num_pwl), step(z), jax.jacfwd(step)(z)


def test_the_derivative_at_zero_is_that_of_the_negative_side():
    z = np.zeros(3, np.float32)
    np.testing.assert_array_equal(alrnn.activation_slopes(z, 2), [1, 0, 0])
    np.testing.assert_array_equal(alrnn.activation_slopes(z, 3, np.full(3, 0.25, np.float32)), [0.25] * 3)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda z: alrnn.activation(z, 2).sum()))(z), [1, 0, 0])
    assert not alrnn.region_bits(z, 2).any()


def test_without_pwl_units_the_model_is_linear_and_with_all_it_is_the_plrnn():
    p = random_params(0)
    z0 = np.random.default_rng(1).normal(size=M)
    matrix = np.diag(p.a) + p.W
    with jax.enable_x64(True):
        linear, plrnn = (alrnn.free_run(p, z0, 20, num_pwl) for num_pwl in (0, M))
    for t in range(1, 21):
        closed = np.linalg.matrix_power(matrix, t) @ z0
        closed += sum(np.linalg.matrix_power(matrix, i) @ p.h for i in range(t))
        np.testing.assert_allclose(linear[t - 1], closed, rtol=1e-11, atol=1e-12)
    z = z0
    for t in range(20):
        z = p.a * z + p.W @ np.maximum(z, 0) + p.h
        np.testing.assert_allclose(plrnn[t], z, rtol=1e-11, atol=1e-12)


def test_a_relu_that_never_switches_changes_nothing():
    p = random_params(2)._replace(h=np.r_[np.zeros(M - 1), 20.0], a=np.full(M, 0.3))
    z0 = np.full(M, 5.0)
    with jax.enable_x64(True):
        linear, relu = (alrnn.free_run(p, z0, 30, num_pwl) for num_pwl in (0, 1))
    assert np.all(np.asarray(linear)[:, -1] > 0)
    np.testing.assert_array_equal(linear, relu)


@pytest.mark.parametrize(("slope", "same_as"), [(0.0, 3), (1.0, 0)])
def test_leaky_units_span_relu_and_linear_units(slope, same_as):
    p = random_params(3)
    z = np.random.default_rng(4).normal(size=(5, M))
    with jax.enable_x64(True):
        leaky = alrnn.step(p._replace(slopes=np.full(M, slope)), z, 3)
        np.testing.assert_allclose(leaky, alrnn.step(p, z, same_as), rtol=1e-13)


def test_models_of_several_p_run_under_one_vmap():
    p = jax.tree.map(lambda leaf: leaf.astype(np.float32), random_params(5))
    x0 = np.ones((3, N), np.float32)
    together = jax.jit(jax.vmap(lambda num_pwl: alrnn.generate(p, x0, 12, num_pwl)[1]))(np.arange(5))
    for num_pwl in (0, 3):
        observations, states = jax.jit(alrnn.generate, static_argnums=(2, 3))(p, x0, 12, num_pwl)
        assert observations.shape == (3, 12, N)
        assert states.shape == (3, 12, M)
        # Two programs of the same float32 arithmetic over 12 contracting steps.
        np.testing.assert_allclose(together[num_pwl], states, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(observations, states[..., :N])


def test_golden_free_run_and_jacobians(golden):
    p, num_pwl = golden_params(golden), int(golden["P"])
    with jax.enable_x64(True):
        run = jax.jit(alrnn.generate, static_argnums=(2, 3))
        observations, states = run(p, golden["x"][:, 0].astype(float), 60, num_pwl)
        np.testing.assert_allclose(states, golden["z_free"], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(observations, states[..., :3])
        jacobians = alrnn.jacobian(p, golden["z_free"][0, :8], num_pwl)
    np.testing.assert_allclose(jacobians, golden["jacobian_free0"], rtol=0, atol=1e-9)


def test_initialisation_is_the_authors():
    p = jax.jit(alrnn.init_params, static_argnums=(1, 2))(jax.random.key(0), 200, 4)
    assert p.slopes is None
    assert [leaf.shape for leaf in p[:4]] == [(200,), (200, 200), (200,), (196, 4)]
    # K = R^T R / M + I has diagonal 2 on average and, by Marchenko-Pastur, largest eigenvalue near 5.
    assert 0 < p.a.min() < p.a.max() < 1
    assert abs(float(p.a.mean()) - 0.4) < 0.02
    assert abs(float(p.W.std()) - 0.01) < 2e-4  # 40,000 draws: standard error 4e-5
    assert not p.h.any()
    assert 0.49 < float(jnp.abs(p.L).max()) <= 0.5


def test_torch_weights():
    p = random_params(6)
    state_dict = {"A": p.a, "W": p.W, "h": p.h, "B": np.concatenate([np.full((N, N), 7.0), p.L.T], axis=1)}
    with jax.enable_x64(True):
        loaded = alrnn.params_from_torch(state_dict)
        x = np.array([[0.3, -0.4]])
        start = x @ state_dict["B"]  # the tutorial's own rule: map, then overwrite the readouts
        start[:, :N] = x
        np.testing.assert_allclose(alrnn.init_state(loaded, x), start, rtol=1e-14)
        same = alrnn.params_from_torch({"A": p.a, "W": p.W, "h": p.h, "L": p.L})
    for one, other in zip(loaded[:4], same[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="needs A, W, h and B"):
        alrnn.params_from_torch({"A": p.a, "W": p.W, "B": p.L})
    with pytest.raises(ValueError, match="do not fit"):
        alrnn.params_from_torch({**state_dict, "h": p.h[:-1]})


def test_categorical_decoder():
    decoder = alrnn.init_decoder(jax.random.key(0), M, 4)
    assert float(jnp.abs(decoder.kernel).max()) <= M**-0.5
    z = np.random.default_rng(7).normal(size=(5, 3, M)).astype(np.float32)
    labels = np.random.default_rng(8).integers(4, size=(5, 3))
    decoder = decoder._replace(bias=jnp.array([0.5, 0.0, -0.5, 1.0]))
    logits = z @ np.asarray(decoder.kernel) + np.asarray(decoder.bias)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_p = alrnn.class_log_probabilities(decoder, z)
    np.testing.assert_allclose(np.exp(log_p), probabilities, rtol=1e-5)
    expected = np.mean([np.log(probabilities[i][labels[i]]) for i in np.ndindex(labels.shape)])
    np.testing.assert_allclose(alrnn.class_log_likelihood(decoder, z, labels), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="num_classes >= 2"):
        alrnn.init_decoder(jax.random.key(0), M, 1)


def test_flax_module_is_the_functions():
    module = alrnn.ALRNN(latent_dim=M, observed_dim=N, num_pwl=3, slope=0.2)
    xs = np.random.default_rng(0).normal(size=(4, 9, N)).astype(np.float32)
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(1), xs, 2)
    p = variables["params"]["alrnn"]
    np.testing.assert_allclose(p.slopes, 0.2, rtol=1e-6)

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        return jnp.mean(jnp.square(jnp.asarray(module.apply(variables, xs, 2, 0.5)) - xs[:, 1:]))

    value, gradient = loss(variables)
    expected, of_functions = jax.jit(jax.value_and_grad(lambda p: alrnn.forcing_loss(p, xs, 2, 0.5, num_pwl=3)))(p)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, other in zip(gradient["params"]["alrnn"], of_functions, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)  # float32
    ours, theirs = jax.jit(
        lambda v: (module.apply(v, xs[:, 0], 5, method="generate"), alrnn.generate(p, xs[:, 0], 5, 3))
    )(variables)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
    dense = jax.jit(lambda v: module.apply(v, xs, 1, 0.3, "newton", forced="state", max_iterations=9))(variables)
    options = {"num_pwl": 3, "forced": "state"}
    np.testing.assert_allclose(
        dense, alrnn.teacher_forced(p, xs, 1, 0.3, **options)[0], rtol=1e-4, atol=1e-5
    )  # float32


@pytest.mark.parametrize("num_pwl", [-1, M + 1])
@pytest.mark.parametrize(
    "function",
    [
        lambda p, z, num_pwl: alrnn.step(p, z, num_pwl),
        lambda p, z, num_pwl: alrnn.jacobian(p, z, num_pwl),
        lambda p, z, num_pwl: alrnn.region_bits(z, num_pwl),
        lambda p, z, num_pwl: alrnn.activation(z, num_pwl),
        lambda p, z, num_pwl: alrnn.generate(p, z[..., :N], 3, num_pwl),
        lambda p, z, num_pwl: alrnn.fixed_points(p, num_pwl),
        lambda p, z, num_pwl: alrnn.symbolic_code(z[None], num_pwl),
    ],
)
def test_a_number_of_units_that_does_not_exist_is_refused(function, num_pwl):
    with pytest.raises(ValueError, match=rf"0\.\.{M}"):
        function(random_params(0), np.ones(M), num_pwl)


def test_other_bad_input_is_refused():
    p = random_params(0)
    x = np.ones(N)
    with pytest.raises(ValueError, match=r"rectify some of the 2 readouts.*0\.\.4, and 6"):
        alrnn.generate(p, x, 3, 5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        alrnn.generate(p, x, 0, 2)
    with pytest.raises(ValueError, match="observed_dim <= latent_dim"):
        alrnn.init_params(jax.random.key(0), 3, 4)
    with pytest.raises(ValueError, match=rf"0\.\.{M}"):
        alrnn.region_matrix(p, np.ones(M + 1))
