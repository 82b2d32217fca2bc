"""Koopman: golden figures of the reference functions, closed forms, and independent routes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from scipy.ndimage import map_coordinates
from scipy.signal import correlate2d
from scipy.special import logsumexp

from jaxpapers.sequence import koopman
from jaxpapers.sequence.koopman import information, operators

GOLDEN = Path(__file__).parents[1] / "golden" / "koopman"


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_golden_latents(name):
    golden = np.load(GOLDEN / f"latents_{name}.npz")
    with jax.enable_x64(True):
        z, after = (jnp.asarray(golden["z"][:, part], jnp.float64) for part in (slice(-1), slice(1, None)))
        k, temperature = int(golden["k"]), float(golden["temperature"])

        def loss(z):
            return -information.info_nce(z, k, temperature, "window")

        value, grad = jax.jit(jax.value_and_grad(loss))(z)
        # The reference adds 1e-8 to the denominator: the card's tolerance.
        np.testing.assert_allclose(value, golden["infonce_loss"], atol=1e-8)
        np.testing.assert_allclose(grad, golden["infonce_grad"], atol=1e-8)
        value, grad = jax.jit(jax.value_and_grad(information.von_neumann_entropy))(z)
        np.testing.assert_allclose(value, golden["vn_entropy"], atol=1e-9)
        np.testing.assert_allclose(grad, golden["vn_entropy_grad"], atol=1e-9)
        np.testing.assert_allclose(information.effective_dimension(z), golden["effective_dimension"], atol=1e-9)
        solve = jax.jit(lambda z, after: operators.ridge_operator(z, after, float(golden["ridge"]), per_window=True))
        K = solve(z, after)
        np.testing.assert_allclose(K.T, golden["koopman_batch_mean"], atol=1e-9)
        np.testing.assert_allclose(z @ K.T, golden["z_next_pred"], atol=1e-9)


def test_golden_gaussian_information():
    golden = np.load(GOLDEN / "gaussian_mi.npz")
    with jax.enable_x64(True):
        K, C, Sigma = golden["K"], golden["C"], golden["Sigma"]
        _, noise = information.noise_covariance(K, Sigma, int(golden["n"]))
        np.testing.assert_allclose(noise, golden["M_n"], atol=1e-9)
        value = information.gaussian_mutual_information(K, C, Sigma, int(golden["n"]))
        np.testing.assert_allclose(value, golden["mutual_information"], atol=1e-9)
        np.testing.assert_allclose(value, golden["check_eq7"], atol=1e-9)


def test_water_filling_has_the_cards_allocations():
    gains = np.array([8, 3, 1.2, 0.5, 0.1])
    with jax.enable_x64(True):
        plain = np.asarray(information.water_filling(gains))
        np.testing.assert_allclose(plain, [0.60417, 0.39583, 0, 0, 0], atol=5e-6)  # printed digits
        assert (plain[2:] == 0).all()
        p = np.asarray(information.water_filling(gains, 1.0, 0.2))
        np.testing.assert_allclose(p, [0.49382, 0.34550, 0.11974, 0.02978, 0.01116], atol=5e-6)
        slopes = gains / (2 * (1 + gains * p)) - 0.2 * (np.log(p) + 1)
        assert np.ptp(slopes) < 1e-6
        np.testing.assert_allclose(p.sum(), 1, atol=1e-12)


def test_entropy_bounds_and_repeated_eigenvalues():
    with jax.enable_x64(True):
        isotropic = jnp.concatenate([jnp.eye(4), -jnp.eye(4)])
        value, grad = jax.jit(jax.value_and_grad(information.von_neumann_entropy))(isotropic)
        np.testing.assert_allclose(value, np.log(4), atol=1e-6)  # eps
        assert np.isfinite(grad).all()
        line = jnp.outer(jnp.arange(5.0), jnp.arange(1.0, 4.0))
        assert abs(information.von_neumann_entropy(line)) < 1e-6  # eps log eps twice


def test_lqr_solves_the_riccati_equation():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        K, B, Q, R = 0.4 * rng.normal(size=(4, 4)), rng.normal(size=(4, 2)), np.eye(4), np.eye(2)
        _, P = operators.lqr(K, B, Q, R)
        np.testing.assert_allclose(P, scipy.linalg.solve_discrete_are(K, B, Q, R), rtol=1e-9)


def test_least_squares_and_rollout():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        K = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        z = operators.rollout(K, rng.normal(size=(5, 3)), 6)
        np.testing.assert_allclose(operators.ridge_operator(z[:, :-1], z[:, 1:], 1e-12), K, atol=1e-9)
        np.testing.assert_allclose(operators.dmd(z, 3), K, atol=1e-9)
        start = rng.normal(size=3)
        np.testing.assert_allclose(operators.rollout(K, start, 6)[-1], np.linalg.matrix_power(K, 6) @ start, atol=1e-12)


def test_entropy_invariances():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        z = rng.normal(size=(20, 4)) * [3, 1, 0.5, 0.1]
        entropy = jax.jit(koopman.von_neumann_entropy)
        shares = np.linalg.eigvalsh(np.cov(z.T)) / np.trace(np.cov(z.T))
        expected = -np.sum(shares * np.log(shares))
        rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        # eps = 1e-8 is not scaled with z: relative to the smallest eigenvalue, 0.01, it is 1e-6.
        for changed in (z, z @ rotation, z + 5, 7 * z):
            np.testing.assert_allclose(entropy(changed), expected, atol=1e-6)
        assert 1 <= koopman.effective_dimension(z) <= 4
        moments = np.linalg.eigvalsh((z + 5).T @ (z + 5))
        moments /= moments.sum()
        value = jax.jit(lambda z: koopman.von_neumann_entropy(z, center=False))(z + 5)
        np.testing.assert_allclose(value, -np.sum(moments * np.log(moments)), atol=1e-6)


def numpy_info_nce(z, k, temperature, cosine):
    """Sec. 3, term by term."""
    batch, window, dim = z.shape
    if cosine:
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    flat, terms = z.reshape(-1, dim), []
    for b in range(batch):
        for n in range(window):
            scores = flat @ z[b, n] / temperature
            total = logsumexp(np.delete(scores, b * window + n))
            near = [p for p in range(max(n - k, 0), min(n + k, window - 1) + 1) if p != n]
            terms.append(np.mean([scores[b * window + p] for p in near]) - total)
    return np.mean(terms)


@pytest.mark.parametrize("cosine", [True, False])
def test_batch_info_nce_term_by_term(cosine):
    with jax.enable_x64(True):
        z = np.random.default_rng(3).normal(size=(2, 5, 3))
        estimate = jax.jit(lambda z: koopman.info_nce(z, 2, 0.5, "batch", cosine))
        value = float(estimate(z))
        np.testing.assert_allclose(value, numpy_info_nce(z, 2, 0.5, cosine), rtol=1e-12)
        np.testing.assert_allclose(estimate(z[::-1]), value, rtol=1e-12)
        # Scales of their own for every latent, which only directions do not see.
        scaled = z * np.random.default_rng(4).uniform(0.5, 2, size=(2, 5, 1))
        assert np.isclose(float(estimate(scaled)), value, rtol=1e-12) == cosine


def test_info_nce_by_hand_on_two_windows():
    # Two windows, each at one corner: an anchor sees 2 others of its own at score 1 / tau = 2, 3 others at 0.
    z = jnp.repeat(jnp.eye(2)[:, None], 3, axis=1)
    expected = 2 - np.log(2 * np.exp(2) + 3)
    batch, window = jax.jit(lambda z: [koopman.info_nce(z, 1, 0.5, kind) for kind in ("batch", "window")])(z)
    np.testing.assert_allclose(batch, expected, rtol=1e-6)
    # Within a window all positions are equal, k = 1: both neighbours are all the others, share 1.
    np.testing.assert_allclose(window, 0, atol=1e-6)


def test_info_nce_of_dead_and_of_half_precision_latents():
    z = np.random.default_rng(5).normal(size=(2, 5, 3)).astype(np.float32)
    z[0, 2] = 0
    assert np.isfinite(jax.jit(jax.grad(lambda z: koopman.info_nce(z, 2)))(z)).all()
    value = koopman.info_nce(jnp.asarray(z, jnp.bfloat16), 2)
    assert value.dtype == jnp.float32
    # Directions rounded to 2^-9, scores at a temperature of 0.1.
    np.testing.assert_allclose(value, koopman.info_nce(z, 2), atol=0.05)


def random_system(rng, radius):
    K = rng.normal(size=(3, 3))
    K *= radius / np.abs(np.linalg.eigvals(K)).max()
    roots = rng.normal(size=(2, 3, 3))
    C, Sigma = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(3)
    return K, C, Sigma


@pytest.mark.parametrize("radius", [0.8, 1.2])
def test_gaussian_information_falls_with_the_lag(radius):
    with jax.enable_x64(True):
        K, C, Sigma = random_system(np.random.default_rng(6), radius)
        information_at = jax.jit(koopman.gaussian_mutual_information)
        P = np.random.default_rng(7).normal(size=(3, 3))
        changed = (P @ K @ np.linalg.inv(P), P @ C @ P.T, P @ Sigma @ P.T)
        np.testing.assert_allclose(information_at(*changed), information_at(K, C, Sigma), rtol=1e-9)
        values = np.array([koopman.gaussian_mutual_information(K, C, Sigma, n) for n in (1, 2, 4, 8, 40)])
        assert (np.diff(values) < 0).all()
        assert (values[-1] < 1e-6) == (radius < 1)
        assert float(information_at(np.zeros((3, 3)), C, Sigma)) == 0


def test_gaussian_information_is_the_joint_log_determinant():
    with jax.enable_x64(True):
        K, C, Sigma = random_system(np.random.default_rng(8), 0.9)
        power, noise = (
            np.linalg.matrix_power(K, 3),
            sum(np.linalg.matrix_power(K, i) @ Sigma @ np.linalg.matrix_power(K, i).T for i in range(3)),
        )
        after = power @ C @ power.T + noise
        joint = np.block([[C, C @ power.T], [power @ C, after]])
        determinants = [np.linalg.slogdet(matrix)[1] for matrix in (C, after, joint)]
        expected = (determinants[0] + determinants[1] - determinants[2]) / 2
        np.testing.assert_allclose(koopman.gaussian_mutual_information(K, C, Sigma, 3), expected, rtol=1e-10)


def test_gaussian_information_closed_forms():
    with jax.enable_x64(True):
        # One unstable mode, k = 1.5, C = 2, Sigma = 0.5: the limit is 1/2 log(1 + C (k^2 - 1) / Sigma) = 1/2 log 6.
        value = koopman.gaussian_mutual_information(np.array([[1.5]]), np.array([[2.0]]), np.array([[0.5]]), 60)
        np.testing.assert_allclose(value, np.log(6) / 2, rtol=1e-9)
        modes, variances, noise = np.array([0.9, 0.5, -0.3]), np.array([1.0, 2.0, 0.5]), np.array([0.1, 0.2, 0.4])
        gathered = noise * (1 + modes**2)
        expected = np.sum(np.log1p(modes**4 / gathered * variances)) / 2
        value = koopman.gaussian_mutual_information(np.diag(modes), np.diag(variances), np.diag(noise), 2)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_water_filling_properties():
    with jax.enable_x64(True):
        gains = np.array([8, 3, 1.2, 0.5, 0.1])
        for weight in (0.0, 0.2):
            np.testing.assert_allclose(koopman.water_filling(np.full(5, 2.0), 3.0, weight), 0.6, rtol=1e-9)
            p = np.asarray(koopman.water_filling(gains, 2.0, weight))
            np.testing.assert_allclose(p.sum(), 2, rtol=1e-9)
            assert (np.diff(p) <= 0).all()
        plain = np.array(koopman.water_filling(gains, 2.0))
        levels = plain + 1 / gains  # equal where water stands, and no higher than the dry ground
        np.testing.assert_allclose(levels[plain > 0], levels[plain > 0][0], rtol=1e-12)
        assert (levels[plain == 0] >= levels[0]).all()
        shares = [np.asarray(koopman.water_filling(gains, 1.0, weight)) for weight in (0.0, 0.2, 1.0)]
        dimensions = [np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))) for p in shares]
        np.testing.assert_allclose(dimensions, [1.957, 3.08, 4.64], rtol=2e-3)  # the card's printed digits
        assert (shares[1] > 0).all()
        no_gain = np.asarray(koopman.water_filling(np.array([2.0, 0.0]), 1.0))
        np.testing.assert_allclose(no_gain, [1, 0], atol=1e-12)


def test_spectrum_largest_first():
    K = np.diag([0.5, -2.0, 0, 0]).astype(np.float32)
    K[2:, 2:] = [[0, -1], [1, 0]]
    values = koopman.spectrum(K)
    np.testing.assert_allclose(values[[0, 3]], [-2, 0.5], atol=1e-7)
    np.testing.assert_allclose(sorted(values[1:3].imag), [-1, 1], atol=1e-7)


def test_ridge_branches_agree():
    with jax.enable_x64(True):
        z = np.random.default_rng(9).normal(size=(1, 5, 8))
        rows, after = z[0, :4], z[0, 1:]
        tall = np.linalg.solve(rows.T @ rows + 0.1 * np.eye(8), rows.T @ after).T
        np.testing.assert_allclose(koopman.ridge_operator(z[:, :-1], z[:, 1:], 0.1), tall, atol=1e-12)


@pytest.mark.parametrize("x64", [False, True])
def test_kernel_koopman_forecasts_a_rotation(x64):
    # In float32 as well, where normal equations with a ridge of 1e-6 gave eigenvalues of modulus 22 on Lorenz-63.
    with jax.enable_x64(x64):
        angle = 0.2 * np.arange(80) + np.array([[0.0], [1.0]])
        x = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=-1))
        model = jax.jit(lambda x: koopman.fit_kernel_koopman(jax.random.key(0), x, 40, 1.0))(x[:, :60])
        assert abs(koopman.spectrum(model.K)[0]) < 1.001
        # Bias of the ridge and float32: one hundredth of the circle's radius over 20 steps.
        forecast = jax.jit(lambda model, x: koopman.forecast_kernel_koopman(model, x, 20))(model, x[:, 59])
        np.testing.assert_allclose(forecast, x[:, 60:], atol=1e-2)


def test_fourier_features_estimate_the_gaussian_kernel():
    rng = np.random.default_rng(10)
    frequencies, phases = rng.normal(size=(2, 20000)) / 1.5, rng.uniform(0, 2 * np.pi, size=20000)
    model = koopman.KernelKoopman(*(jnp.asarray(a) for a in (frequencies, phases, np.eye(2), np.eye(2))))
    x = rng.normal(size=(4, 2))
    phi = koopman.fourier_features(model, x)
    kernel = np.exp(-np.sum((x[:, None] - x) ** 2, axis=-1) / (2 * 1.5**2))
    np.testing.assert_allclose(phi @ phi.T, kernel, atol=0.03)  # Monte Carlo, 4 of 1 / sqrt(20000)


def test_latent_control_reaches_the_goal():
    with jax.enable_x64(True):
        K, B = np.array([[1.1, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
        gain, _ = koopman.lqr(K, B, np.eye(2), 0.1 * np.eye(1), 500)
        goal, z = np.zeros(2), np.array([[1.0, 0.0], [0.0, -1.0]])
        np.testing.assert_allclose(koopman.latent_control(gain, z + 3, goal + 3), -z @ np.asarray(gain).T, atol=1e-9)
        for _ in range(200):
            z = z @ K.T + np.asarray(koopman.latent_control(gain, z, goal)) @ B.T
        np.testing.assert_allclose(z, 0, atol=1e-4)


def test_mlp_and_autoencoder():
    x = np.random.default_rng(11).normal(size=(2, 7, 3)).astype(np.float32)
    model = koopman.KoopmanAutoencoder(koopman.MLP((8, 4)), koopman.MLP((8, 3)), 4)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    # Start of K: 0.95 I + N(0, 0.01^2), of which 5 standard deviations.
    np.testing.assert_allclose(params["K"], 0.95 * np.eye(4), atol=0.05)
    assert np.std(params["K"] - 0.95 * np.eye(4)) > 0.003
    layers = params["encoder"]
    first, second = ({k: np.asarray(v, np.float64) for k, v in layers[name].items()} for name in ("Dense_0", "Dense_1"))
    hidden = x @ first["kernel"] + first["bias"]
    hidden = hidden * scipy.stats.norm.cdf(hidden)
    z = np.asarray(model.apply({"params": params}, x, method="encode"))
    np.testing.assert_allclose(z, hidden @ second["kernel"] + second["bias"], atol=1e-5)
    assert np.abs(first["kernel"]).max() <= 1 / np.sqrt(3)  # PyTorch's bound, 1 / sqrt(fan_in)
    decoded = np.asarray(model.apply({"params": params}, z, method="decode"))
    np.testing.assert_allclose(np.asarray(model.apply({"params": params}, x)), decoded, atol=1e-6)
    free = koopman.KoopmanAutoencoder(koopman.MLP((4,)), koopman.MLP((3,)), 4, "least_squares")
    assert set(jax.eval_shape(free.init, jax.random.key(0), x)["params"]) == {"encoder", "decoder"}


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(12)
    x, z = rng.normal(size=(2, 7, 3)).astype(np.float32), rng.normal(size=(2, 7, 4)).astype(np.float32)
    return x, z, rng.normal(size=(4, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)


def test_koopman_loss_term_by_term(windows):
    x, z, K, G = windows

    def objective(z, K):
        return koopman.koopman_loss(
            x, z, K, lambda z: jnp.tanh(z @ G), alpha=0.5, beta=2, gamma=0.3, k=2, forecast_weight=0.7
        )

    loss, terms = jax.jit(objective)(z, K)
    predicted = np.stack([[K @ latent for latent in window[:-1]] for window in z])
    expected = {
        "reconstruction": np.mean((np.tanh(z @ G) - x) ** 2),
        "forecast": np.mean((np.tanh(predicted @ G) - x[:, 1:]) ** 2),
        "consistency": np.mean((predicted - z[:, 1:]) ** 2),
        "information": numpy_info_nce(z.astype(np.float64), 2, 0.1, True),
    }
    shares = np.linalg.eigvalsh(np.cov(z.reshape(-1, 4).T))
    shares /= shares.sum()
    expected["entropy"] = -np.sum(shares * np.log(shares))
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-5, err_msg=name)  # float32 sums
    total = 0.1 * expected["reconstruction"] + 0.7 * expected["forecast"] + 2 * expected["consistency"]
    total -= 0.5 * expected["information"] + 0.3 * expected["entropy"]
    np.testing.assert_allclose(loss, total, rtol=2e-5)


def test_koopman_loss_over_a_population_of_gammas(windows):
    x, z, K, G = windows

    def loss(gamma):
        return koopman.koopman_loss(x, z, K, lambda z: z @ G, gamma=gamma)

    values, terms = jax.jit(jax.vmap(loss))(jnp.array([0.0, 2.0]))
    assert "information" not in terms
    np.testing.assert_allclose(values[0] - values[1], 2 * terms["entropy"][0], rtol=1e-5)


def test_entropy_weight_opens_a_collapsed_latent(windows):
    # The paper's sign: a descent step on the loss raises the effective dimension.
    x, z, K, G = windows
    flat = jnp.asarray(z * np.array([1, 0.1, 0.1, 0.1], np.float32))
    slope = jax.jit(jax.grad(lambda z: koopman.koopman_loss(0 * x, z, 0 * K, lambda z: 0 * z @ G, beta=0, gamma=1)[0]))
    dimension = jax.jit(koopman.effective_dimension)
    assert dimension(flat - 0.1 * slope(flat)) > dimension(flat)


def test_convolutional_autoencoder():
    model = koopman.KoopmanAutoencoder(koopman.ConvEncoder(8), koopman.ConvDecoder(), 8)
    x = jnp.zeros((2, 3, 64, 64, 2))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert jax.eval_shape(model.apply, {"params": params}, x).shape == x.shape
    latents = jax.eval_shape(lambda params, x: model.apply({"params": params}, x, method="encode"), params, x)
    assert latents.shape == (2, 3, 8)
    assert params["encoder"]["latent"]["kernel"].shape == (4096, 8)
    kernels = {name: layer["kernel"].shape for name, layer in params["decoder"].items()}
    assert kernels["expand"] == (8, 4096)
    assert [kernels[f"up{i}"] for i in range(5)] == [
        (3, 3, 256, 128),
        (3, 3, 128, 64),
        (3, 3, 64, 32),
        (5, 5, 32, 16),
        (7, 7, 16, 2),
    ]
    assert [kernels[f"mix{i}"][2:] for i in range(3)] == [(2, 64), (64, 32), (32, 2)]
    with pytest.raises(ValueError, match="multiples of 16"):
        jax.eval_shape(model.init, jax.random.key(0), x[:, :, :40])


def by_scipy(x, layer):
    """A convolution with zeros beyond the edges, (height, width, channels), channel by channel."""
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    planes = [
        sum(correlate2d(x[..., i], kernel[..., i, o], mode="same") for i in range(kernel.shape[2]))
        for o in range(kernel.shape[3])
    ]
    return np.stack(planes, axis=-1) + bias


def relu(x):
    return np.maximum(x, 0)


def halved(x):
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).mean(axis=(1, 3))


def doubled(x):
    size = x.shape[0]
    places = np.linspace(0, size - 1, 2 * size)
    grid = np.stack(np.meshgrid(places, places, indexing="ij"))
    return np.stack([map_coordinates(x[..., c], grid, order=1) for c in range(x.shape[-1])], axis=-1)


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)  # kernels so large that what a ReLU cuts off is seen at the end
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5), shapes)


def test_the_convolutions_are_those_of_the_card():
    x = np.random.default_rng(17).normal(size=(16, 16, 2)).astype(np.float32)
    encoder, decoder = koopman.ConvEncoder(4), koopman.ConvDecoder((16, 16, 2))
    p = drawn(jax.eval_shape(encoder.init, jax.random.key(0), x)["params"], 1)
    y = relu(halved(by_scipy(x, p["conv0"])))
    y = halved(relu(by_scipy(y, p["conv1"])))
    y = relu(halved(by_scipy(y, p["conv2"])))
    y = relu(halved(by_scipy(y, p["conv3"])))
    y = relu(by_scipy(y, p["conv4"]))
    z = y.reshape(-1) @ p["latent"]["kernel"] + p["latent"]["bias"]
    np.testing.assert_allclose(encoder.apply({"params": p}, x), z, rtol=1e-4, atol=1e-4)  # float32
    p = drawn(jax.eval_shape(decoder.init, jax.random.key(0), z)["params"], 2)
    y = relu(z @ p["expand"]["kernel"] + p["expand"]["bias"]).reshape(1, 1, 256)
    y = relu(by_scipy(y, p["up0"]))
    for layer in ("up1", "up2", "up3"):
        y = relu(by_scipy(doubled(y), p[layer]))
    y = by_scipy(doubled(y), p["up4"])
    y = by_scipy(relu(by_scipy(relu(by_scipy(y, p["mix0"])), p["mix1"])), p["mix2"])
    field = decoder.apply({"params": p}, np.float32(z))
    np.testing.assert_allclose(field, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())  # float32 through nine layers


def test_dropout_follows_the_key():
    encoder, x = koopman.ConvEncoder(4), np.random.default_rng(17).normal(size=(1, 16, 16, 2)).astype(np.float32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), x)  # to draw so many kernels would compile for seconds
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
    apply = jax.jit(lambda params, x, keys: encoder.apply(params, x, rngs=keys))
    plain, dropped = apply(params, x, {}), apply(params, x, {"dropout": jax.random.key(1)})
    assert np.isfinite(plain).all()
    assert not np.allclose(plain, dropped)


def test_upsampling_keeps_the_corners_and_lines():
    field = np.add.outer(np.arange(4.0), 10 * np.arange(3.0))[..., None].astype(np.float32)
    expected = np.add.outer(np.linspace(0, 3, 8), 10 * np.linspace(0, 2, 6))[..., None]
    np.testing.assert_allclose(koopman.upsample(field), expected, atol=1e-5)


def test_nrmse_per_trajectory():
    rng = np.random.default_rng(13)
    x_true = rng.normal(size=(2, 3, 4, 5)) * np.array([1, 10]).reshape(2, 1, 1, 1)
    x = x_true + rng.normal(size=x_true.shape)
    expected = np.mean([np.sqrt(np.mean((a - b) ** 2)) / np.ptp(a) for a, b in zip(x_true, x, strict=True)])
    np.testing.assert_allclose(koopman.nrmse(x_true, x), expected, rtol=1e-5)  # float32


@pytest.mark.parametrize("window", [3, 4, 7])
def test_ssim_window_by_window(window):
    rng = np.random.default_rng(14)
    x_true = rng.normal(size=(9, 8))
    x = x_true + 0.3 * rng.normal(size=(9, 8))
    c1, c2 = (0.01 * np.ptp(x_true)) ** 2, (0.03 * np.ptp(x_true)) ** 2
    values = []
    for i in range(9 - window + 1):
        for j in range(8 - window + 1):
            a, b = (field[i : i + window, j : j + window].ravel() for field in (x_true, x))
            (va, cov), (_, vb) = np.cov(a, b)
            structure = (2 * cov + c2) / (va + vb + c2)
            values.append((2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1) * structure)
    np.testing.assert_allclose(koopman.ssim(x_true, x, window), np.mean(values), rtol=1e-10)
    np.testing.assert_allclose(koopman.ssim(x_true, x_true, window), 1, rtol=1e-10)


def test_spectral_distribution_error():
    rng = np.random.default_rng(15)
    a, b = rng.normal(size=(2, 30, 2))
    t = np.arange(30)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(1, 16), t) / 30)
    p, q = (np.abs(dft @ series) ** 2 for series in (a, b))
    p, q = p / p.sum(axis=0), q / q.sum(axis=0)
    expected = np.mean(np.sqrt(1 - np.sum(np.sqrt(p * q), axis=0)))
    distance = jax.jit(koopman.spectral_distribution_error)
    np.testing.assert_allclose(distance(a, b), expected, rtol=1e-5)  # float32
    np.testing.assert_allclose(distance(a, 3 * a + 1), 0, atol=1e-3)  # root of float32 rounding
    for dead in (0.0, 0.1):  # the mean of the second is not its value: rounding would be its spectrum
        np.testing.assert_allclose(distance(a, np.full_like(a, dead)), 1, rtol=1e-5)
    waves = [np.stack([np.sin(2 * np.pi * m * t / 30)] * 2, axis=1) for m in (3, 5)]
    np.testing.assert_allclose(distance(*waves), 1, atol=1e-3)


def test_histogram_kl():
    rng = np.random.default_rng(16)
    a, b = rng.normal(size=(200, 2)), 1.5 * rng.normal(size=(300, 2))
    terms = []
    for i in range(2):
        edges = np.linspace(a[:, i].min(), a[:, i].max(), 11)
        p, q = (np.histogram(np.clip(s[:, i], edges[0], edges[-1]), edges)[0] + 1e-6 for s in (a, b))
        p, q = p / p.sum(), q / q.sum()
        terms.append(np.sum(p * np.log(p / q)))
    divergence = jax.jit(lambda a, b: koopman.histogram_kl(a, b, 10))
    with jax.enable_x64(True):  # no sample changes its bin by rounding
        np.testing.assert_allclose(divergence(a, b), np.mean(terms), rtol=1e-6)
        np.testing.assert_allclose(divergence(a, a), 0, atol=1e-12)
        assert divergence(a, np.full((300, 2), np.nan)) > 10


def loss_with(**weights):
    return koopman.koopman_loss(np.zeros((1, 8, 2)), np.zeros((1, 8, 2)), np.eye(2), lambda z: z, **weights)


def autoencoder(latent_dim, operator="learned"):
    model = koopman.KoopmanAutoencoder(koopman.MLP((2,)), koopman.MLP((3,)), latent_dim, operator)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information.info_nce(np.zeros((2, 6, 3)), 3), "more than 2k"),
        (lambda: information.info_nce(np.zeros((2, 6, 3)), 0), "k >= 1"),
        (lambda: information.info_nce(np.zeros((2, 6, 3)), 2, 0.0), "temperature"),
        (lambda: information.info_nce(np.zeros((2, 6, 3)), 2, 0.1, "all"), "negatives"),
        (lambda: information.von_neumann_entropy(np.zeros((1, 3))), "2 samples"),
        (lambda: information.water_filling(np.ones(2), 1.0, -0.1), "entropy_weight"),
        (lambda: information.water_filling(np.ones(2), 0.0), "budget"),
        (lambda: information.von_neumann_entropy(np.zeros((4, 3)), eps=0.0), "eps"),
        (lambda: information.gaussian_mutual_information(np.eye(2), np.eye(2), np.eye(2), 0), "n must be"),
        (lambda: operators.rollout(np.eye(2), np.ones(2), 0), "steps"),
        (lambda: operators.dmd(np.zeros((1, 4, 2)), 3), "rank"),
        (lambda: operators.lqr(np.eye(2), np.eye(2), np.eye(2), np.eye(2), 0), "horizon"),
        (lambda: koopman.fit_kernel_koopman(jax.random.key(0), np.zeros((1, 4, 2)), 0, 1.0), "features"),
        (lambda: koopman.fit_kernel_koopman(jax.random.key(0), np.zeros((1, 4, 2)), 3, 1.0, 0.0), "ridge"),
        (lambda: koopman.ssim(np.eye(5), np.eye(5), 6), "window"),
        (lambda: koopman.ssim(np.ones((8, 8)), np.ones((8, 8))), "constant"),
        (lambda: koopman.histogram_kl(np.ones((3, 1)), np.ones((3, 1)), 1), "bins"),
        (lambda: loss_with(gamma=-0.1), "gamma"),
        (lambda: loss_with(alpha=-0.1), "alpha"),
        (lambda: autoencoder(0), "latent_dim must be"),
        (lambda: autoencoder(5), "latent_dim=5"),
        (lambda: autoencoder(2, "dmd"), "operator"),
        (lambda: operators.ridge_operator(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), 0.0), "ridge"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def linear_gaussian_system(rng, dim=3, latent=2):
    """Covariance and rows of (x_{n-1}, z_{n-1}, x_n, z_n): x_n = A x_{n-1} + noise, z = E x + noise."""
    A, E = 0.7 * rng.normal(size=(dim, dim)), rng.normal(size=(latent, dim))
    root = rng.normal(size=(dim, dim))
    x, z = np.eye(dim), np.eye(latent)
    # Each variable as a linear map of independent ones: x_{n-1}, and the noises of z_{n-1}, x_n and z_n.
    maps = [[x, 0 * E.T, 0 * x, 0 * E.T], [E, z, 0 * E, 0 * z], [A, 0 * E.T, x, 0 * E.T], [E @ A, 0 * z, E, z]]
    covariance = scipy.linalg.block_diag(root @ root.T + x, z, x, z)
    rows = np.split(np.arange(2 * (dim + latent)), [dim, dim + latent, 2 * dim + latent])
    return np.block(maps) @ covariance @ np.block(maps).T, [part.tolist() for part in rows]


def test_encoding_loses_information():
    # Prop. 1: I(x_{n-1}; x_n) >= I(z_{n-1}; x_n) >= I(z_{n-1}; z_n).
    with jax.enable_x64(True):
        for seed in range(5):
            covariance, (x0, z0, x1, z1) = linear_gaussian_system(np.random.default_rng(seed))
            chain = [
                float(information.conditional_information(covariance, *pair)) for pair in ((x0, x1), (z0, x1), (z0, z1))
            ]
            assert chain[0] > chain[1] > chain[2] > 0


def test_the_information_of_a_latent_has_three_parts():
    # Prop. 3: I(z_t; x_t) = I(z_{t-1}; z_t) + I(z_t; x_{t-1} | z_{t-1}) + I(z_t; x_t | x_{t-1}).
    with jax.enable_x64(True):
        covariance, (x0, z0, x1, z1) = linear_gaussian_system(np.random.default_rng(0))
        whole = information.conditional_information(covariance, z1, x1)
        parts = [
            information.conditional_information(covariance, z0, z1),
            information.conditional_information(covariance, z1, x0, z0),
            information.conditional_information(covariance, z1, x1, x0),
        ]
        assert min(parts) > 0
        np.testing.assert_allclose(sum(parts), whole, rtol=1e-12)


def test_conditional_information_is_that_of_a_pair_and_of_equation_7():
    with jax.enable_x64(True):
        pair = np.array([[2.0, 0.6], [0.6, 1.0]])
        np.testing.assert_allclose(
            information.conditional_information(pair, [0], [1]), -np.log(1 - 0.36 / 2) / 2, rtol=1e-12
        )
        rng = np.random.default_rng(1)
        K, C, Sigma = 0.4 * rng.normal(size=(3, 3)), np.diag([1.0, 2.0, 0.5]), 0.1 * np.eye(3)
        joint = np.block([[C, C @ K.T], [K @ C, K @ C @ K.T + Sigma]])
        expected = information.gaussian_mutual_information(K, C, Sigma)
        np.testing.assert_allclose(
            information.conditional_information(joint, [0, 1, 2], [3, 4, 5]), expected, rtol=1e-12
        )
    with pytest.raises(ValueError, match="no row may occur twice"):
        information.conditional_information(pair, [0], [0])


@pytest.mark.parametrize("n", [1, 4])
def test_water_filled_along_the_gains_is_the_best_covariance(n):
    rng = np.random.default_rng(2)
    K, root = 0.5 * rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    with jax.enable_x64(True):
        Sigma = jnp.asarray(root @ root.T / 4 + 0.1 * np.eye(4))
        gains, V = information.transition_gains(K, Sigma, n)
        p = information.water_filling(gains, 2.0)
        best = float(information.gaussian_mutual_information(K, (V * p) @ V.T, Sigma, n))
        np.testing.assert_allclose(best, np.sum(np.log1p(gains * p)) / 2, rtol=1e-10)
        for _ in range(20):  # others of the same trace
            other = (lambda r: r @ r.T)(rng.normal(size=(4, 4)))
            assert float(information.gaussian_mutual_information(K, 2 * other / np.trace(other), Sigma, n)) < best


def test_a_shared_operator_on_a_graph_is_the_kronecker_product():
    rng = np.random.default_rng(3)
    K, A, z = rng.normal(size=(2, 2)), rng.normal(size=(3, 3)), rng.normal(size=(5, 3, 2))
    with jax.enable_x64(True):
        stepped = operators.graph_transition(K, A, z)
    np.testing.assert_allclose(stepped.reshape(5, 6), z.reshape(5, 6) @ np.kron(A, K).T, rtol=1e-12)
