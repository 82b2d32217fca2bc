"""Koopman VAE: Gaussians against scipy and Monte Carlo, the loss term by term, rollouts, the baseline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from jaxpapers.sequence import koopman
from jaxpapers.sequence.koopman import Gaussian


@pytest.fixture(scope="module")
def pair():
    """Two Gaussians over three dimensions, in batches of two."""
    means, log_variances = np.random.default_rng(0).normal(size=(2, 2, 2, 3))
    return [Gaussian(mean, log_variance) for mean, log_variance in zip(means, log_variances, strict=True)]


def test_gaussians_against_scipy(pair):
    with jax.enable_x64(True):
        p, q = pair
        z = np.random.default_rng(1).normal(size=p.mean.shape)
        density = scipy.stats.norm(p.mean, np.exp(p.log_variance / 2))
        np.testing.assert_allclose(koopman.gaussian_log_density(p, z), density.logpdf(z).sum(axis=-1), rtol=1e-12)
        np.testing.assert_allclose(koopman.gaussian_entropy(p), density.entropy().sum(axis=-1), rtol=1e-12)
        ratio = np.exp(p.log_variance - q.log_variance)
        shift = (p.mean - q.mean) ** 2 / np.exp(q.log_variance)
        np.testing.assert_allclose(
            koopman.gaussian_kl(p, q), np.sum(ratio + shift - 1 - np.log(ratio), -1) / 2, rtol=1e-12
        )
        np.testing.assert_array_equal(koopman.gaussian_kl(p, p), 0)


def test_kl_is_cross_entropy_less_entropy_by_monte_carlo(pair):
    p, q = (Gaussian(*(jnp.asarray(part, jnp.float32) for part in g)) for g in pair)
    wide = Gaussian(*(jnp.broadcast_to(part, (40_000, 2, 3)) for part in p))
    z = koopman.sample_gaussian(jax.random.key(0), wide)
    np.testing.assert_allclose(z.mean(axis=0), p.mean, atol=0.04)  # 4 sigma / 200
    np.testing.assert_allclose(z.std(axis=0), np.exp(p.log_variance / 2), rtol=0.02)
    costs = -np.asarray(koopman.gaussian_log_density(q, z), np.float64)
    estimate = costs.mean(axis=0) - np.asarray(koopman.gaussian_entropy(p))
    error = costs.std(axis=0) / 200  # 1 / sqrt(40,000)
    assert (np.abs(estimate - koopman.gaussian_kl(p, q)) < 4 * error).all()


def test_likelihoods():
    rng = np.random.default_rng(2)
    x, decoded = rng.uniform(size=(3, 4)), rng.normal(size=(3, 4))
    with jax.enable_x64(True):
        value = koopman.gaussian_log_likelihood(x, decoded, 0.3)
        np.testing.assert_allclose(value, scipy.stats.norm(decoded, 0.3).logpdf(x), rtol=1e-12)
        p = 1 / (1 + np.exp(-decoded))
        expected = x * np.log(p) + (1 - x) * np.log1p(-p)
        np.testing.assert_allclose(koopman.bernoulli_log_likelihood(x, decoded), expected, rtol=1e-9)


def build(kind=koopman.KoopmanVAE, latent_dim=2, control_dim=0, width=4, **more):
    if kind is koopman.LatentVAE:
        more.setdefault("dynamics", koopman.MLP((5, latent_dim)))
    return kind(koopman.MLP((width,)), koopman.MLP((3,)), latent_dim, control_dim, **more)


def drawn(model, x):
    """Parameters at random, K, B and Sigma included: initial ones would hide a transpose."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(4)
    return rng.normal(size=(2, 6, 3)).astype(np.float32), rng.normal(size=(2, 5, 1)).astype(np.float32)


def dense(layer, x):
    return x @ np.asarray(layer["kernel"], np.float64) + layer["bias"]


@pytest.mark.parametrize("control_dim", [0, 1])
def test_prior_of_the_koopman_vae(windows, control_dim):
    x, controls = windows
    model = build(control_dim=control_dim)
    params = drawn(model, x)
    assert ("B" in params) == bool(control_dim)
    z = np.random.default_rng(5).normal(size=(2, 5, 2)).astype(np.float32)
    prior = model.apply({"params": params}, z, controls if control_dim else None, method="transition")
    expected = np.stack([[params["K"] @ latent for latent in window] for window in z])
    if control_dim:
        expected += np.stack([[params["B"] @ a for a in window] for window in controls])
    np.testing.assert_allclose(prior.mean, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(prior.log_variance, np.broadcast_to(params["log_variance"], z.shape))


def test_start_of_the_koopman_vae(windows):
    params = jax.jit(build(control_dim=1).init)(jax.random.key(0), windows[0])["params"]
    np.testing.assert_allclose(params["K"], 0.95 * np.eye(2), atol=0.05)  # 5 standard deviations of its noise
    assert (np.asarray(params["log_variance"]) == 0).all()
    assert 0 < np.abs(params["B"]).max() < 0.05


WEIGHTS = {"alpha": 0.5, "beta": 2.0, "gamma": 0.3, "elbo_weight": 0.7, "standard_weight": 0.4}


@pytest.mark.parametrize("kind", [koopman.KoopmanVAE, koopman.LatentVAE])
def test_variational_loss_term_by_term(windows, kind):
    x, controls = windows
    model = build(kind, control_dim=1)
    params = drawn(model, x)
    key = jax.random.key(7)

    def objective(params):
        return koopman.variational_loss(key, x, model, params, controls, k=2, **WEIGHTS)

    (loss, terms), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))
    # The draws are the function's own, the rest is numpy, time by time.
    posterior_key, prior_key = jax.random.split(key)
    mean, log_variance = np.split(dense(params["encoder"]["Dense_0"], x), 2, axis=-1)
    z = mean + np.exp(log_variance / 2) * jax.random.normal(posterior_key, mean.shape)
    noise = np.exp(params["log_variance"] / 2) * jax.random.normal(prior_key, (2, 5, 2))
    expected = dict.fromkeys(("forecast", "reconstruction", "transition_kl", "standard_kl"), 0.0)
    normal = scipy.stats.norm
    for b in range(2):
        for n in range(6):
            decoded = dense(params["decoder"]["Dense_0"], z[b, n])
            expected["reconstruction"] -= normal(decoded).logpdf(x[b, n]).sum() / 12
            variance = np.exp(log_variance[b, n])
            expected["standard_kl"] += np.sum(variance + mean[b, n] ** 2 - 1 - log_variance[b, n]) / 2 / 12
            if n == 0:
                continue
            if kind is koopman.KoopmanVAE:
                ahead = params["K"] @ z[b, n - 1] + params["B"] @ controls[b, n - 1]
            else:
                hidden = dense(params["dynamics"]["Dense_0"], np.append(z[b, n - 1], controls[b, n - 1]))
                ahead = z[b, n - 1] + dense(params["dynamics"]["Dense_1"], hidden * normal.cdf(hidden))
            decoded = dense(params["decoder"]["Dense_0"], ahead + noise[b, n - 1])
            expected["forecast"] -= normal(decoded).logpdf(x[b, n]).sum() / 10
            spread = params["log_variance"]
            shift = (mean[b, n] - ahead) ** 2 / np.exp(spread)
            kl = variance / np.exp(spread) + shift - 1 + spread - log_variance[b, n]
            expected["transition_kl"] += kl.sum() / 2 / 10
    mean = jnp.asarray(mean, jnp.float32)
    expected["entropy"] = koopman.von_neumann_entropy(mean)
    expected["information"] = koopman.info_nce(mean, 2)
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)  # float32
    elbo = -expected["reconstruction"] - 0.4 * expected["standard_kl"]
    total = expected["forecast"] + 2 * expected["transition_kl"] - 0.5 * expected["information"]
    np.testing.assert_allclose(loss, total - 0.3 * expected["entropy"] - 0.7 * elbo, rtol=2e-5)


def test_weights_may_be_a_population(windows):
    x, _ = windows
    model = build()
    params = drawn(model, x)

    def loss(beta, alpha):
        return koopman.variational_loss(jax.random.key(0), x, model, params, alpha=alpha, beta=beta, k=1)

    values, terms = jax.jit(jax.vmap(loss))(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(values[1] - values[0], 2 * terms["transition_kl"][0], rtol=1e-4)
    plain = jax.eval_shape(lambda: koopman.variational_loss(jax.random.key(0), x, model, params)[1])
    assert "information" not in plain


@pytest.mark.parametrize("kind", [koopman.KoopmanVAE, koopman.LatentVAE])
@pytest.mark.parametrize("control_dim", [0, 1])
def test_forecast_step_by_step(windows, kind, control_dim):
    x, controls = windows
    model = build(kind, control_dim=control_dim)
    variables = {"params": drawn(model, x)}
    moves = controls if control_dim else None
    seen = jax.jit(lambda x0: koopman.forecast(model, variables["params"], x0, 5, moves))(x[:, 0])
    assert seen.shape == (2, 5, 3)
    z = model.apply(variables, x[:, 0], method="encode").mean
    for n in range(5):
        z = model.apply(variables, z, controls[:, n] if control_dim else None, method="transition").mean
        np.testing.assert_allclose(seen[:, n], model.apply(variables, z, method="decode"), rtol=1e-4, atol=1e-5)


def test_koopman_rollout_is_powers_of_K(windows):
    model = build()
    params = drawn(model, windows[0])
    z0 = np.random.default_rng(6).normal(size=2).astype(np.float32)
    z = koopman.latent_rollout(model, params, z0, 4)
    np.testing.assert_allclose(z[-1], np.linalg.matrix_power(params["K"], 4) @ z0, rtol=1e-4)


class Flat(nn.Module):
    """Images to features."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.reshape(*x.shape[:2], -1))


def test_images_pass_through(windows):
    model = koopman.KoopmanVAE(Flat(), nn.DenseGeneral((2, 2)), 2)
    x = jnp.ones((3, 4, 2, 2))
    params = drawn(model, x)
    loss, _ = jax.eval_shape(lambda: koopman.variational_loss(jax.random.key(0), x, model, params))
    assert loss.shape == ()


def loss_with(x=None, controls=None, control_dim=0, **weights):
    x = np.zeros((1, 8, 3), np.float32) if x is None else x
    model = build(control_dim=control_dim)
    params = drawn(model, np.zeros((1, 8, 3), np.float32))
    return jax.eval_shape(lambda: koopman.variational_loss(jax.random.key(0), x, model, params, controls, **weights))


def init(**options):
    return jax.eval_shape(build(**options).init, jax.random.key(0), jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init(latent_dim=0), "latent_dim >= 1"),
        (lambda: init(control_dim=-1), "control_dim >= 0"),
        (lambda: init(width=3), "2 latent_dim = 4"),
        (lambda: init(kind=koopman.LatentVAE, dynamics=koopman.MLP((3,))), "dynamics must return"),
        (lambda: loss_with(gamma=-1.0), "gamma"),
        (lambda: loss_with(standard_weight=-1.0), "standard_weight"),
        (lambda: loss_with(x=np.zeros((2, 1, 3), np.float32)), "2 times"),
        (lambda: loss_with(control_dim=1), "control_dim=1, got controls of width 0"),
        (lambda: loss_with(controls=np.zeros((1, 7, 2), np.float32)), "control_dim=0, got controls of width 2"),
        (lambda: loss_with(control_dim=1, controls=np.zeros((1, 8, 1), np.float32)), "7 moves, got 8"),
        (lambda: loss_with(alpha=1.0, k=4), "more than 2k"),
        (lambda: koopman.gaussian_log_likelihood(np.zeros(2), np.zeros(2), 0.0), "scale"),
        (lambda: koopman.latent_rollout(build(), {}, np.zeros(2), 0), "steps must be"),
        (lambda: koopman.latent_rollout(build(), {}, np.zeros(2), 3, np.zeros((2, 1))), "one control a step"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
