"""AdaFortiTran: the authors' networks on golden figures, closed forms against independent routes, the symmetries."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate

from experiments.timing import temporary_bytes
from jaxpapers.nn.patches import patchify, unpatchify
from jaxpapers.perception import adafortitran as ada
from jaxpapers.perception.adafortitran import convolution
from jaxpapers.perception.adafortitran.rivals import BidirectionalGRU

GOLDEN = Path(__file__).parents[1] / "golden" / "adafortitran"
SIZE, PILOTS, PATCH = (12, 14), (4, 2), (3, 2)
OPTIONS = {"size": SIZE, "pilot_shape": PILOTS, "patch": PATCH, "width": 16, "num_layers": 2, "max_tokens": 33}


def load(name):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    weights = {key.removeprefix("w."): value for key, value in golden.items() if key.startswith("w.")}
    return golden, weights


def conditions_of(golden):
    columns = (golden[name].reshape(-1) for name in ("snr_db", "delay_spread_ns", "doppler_hz"))
    return np.stack([*columns], axis=1)


@pytest.fixture(scope="module")
def adaptive():
    """The golden model, its parameters and a jitted estimate that shows what each layer returns."""
    golden, weights = load("adafortitran_forward")
    model = ada.AdaFortiTran(**OPTIONS, adapter_sizes=(7, 10, 56))
    apply = jax.jit(lambda params, ls, conditions: model.apply(params, ls, conditions, capture_intermediates=True))
    return golden, model, {"params": ada.params_from_torch(weights)}, apply


def real_part(values):
    """Of each slot; the imaginary parts lie between."""
    return np.asarray(values)[0::2]


def test_golden_adafortitran(adaptive):
    golden, model, params, apply = adaptive
    estimate, stored = apply(params, golden["pilots_ls"], conditions_of(golden))
    stages = {name: value["__call__"][0] for name, value in stored["intermediates"].items() if name != "__call__"}
    tolerance = {"atol": 2e-5}  # float32, values of order 1: the card's
    np.testing.assert_allclose(real_part(stages["upsampler"]).reshape(3, *SIZE), golden["upsampled_real"], **tolerance)
    np.testing.assert_allclose(real_part(stages["enhancer"]), golden["conv_enhanced_real"], **tolerance)
    np.testing.assert_allclose(
        patchify(golden["conv_enhanced_real"][..., None], PATCH), golden["patches_real"], **tolerance
    )
    np.testing.assert_allclose(stages["adapter"], golden["channel_tokens"], **tolerance)
    np.testing.assert_allclose(real_part(stages["encoder"]), golden["encoder_out_real"], **tolerance)
    np.testing.assert_allclose(
        unpatchify(golden["encoder_out_real"], SIZE, PATCH)[..., 0], golden["reconstructed_real"], **tolerance
    )
    np.testing.assert_allclose(estimate, golden["estimate"], **tolerance)
    loss = ada.estimation_loss(golden["target"], estimate)
    np.testing.assert_allclose(loss, golden["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(ada.complex_mse(golden["target"], estimate), golden["reported_mse"], rtol=1e-5)
    np.testing.assert_allclose(ada.to_db(2 * loss), golden["reported_mse_db"], atol=1e-4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), golden["pilots_ls"], conditions_of(golden))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)  # every weight has its place


def test_golden_fortitran_and_linear():
    golden, weights = load("fortitran_forward")
    params = {"params": ada.params_from_torch(weights)}
    estimate = jax.jit(ada.FortiTran(**OPTIONS).apply)(params, golden["pilots_ls"])
    np.testing.assert_allclose(estimate, golden["estimate"], atol=2e-5)
    linear = {"linear.weight": golden["linear.linear.weight"], "linear.bias": golden["linear.linear.bias"]}
    model = ada.LinearEstimator(SIZE, PILOTS)
    estimate = model.apply({"params": ada.params_from_torch(linear)}, golden["pilots_ls"])
    np.testing.assert_allclose(estimate.real, golden["linear_real"], atol=2e-5)


def test_golden_cevit():
    golden, weights = load("cevit_forward")
    model = ada.CEViT((20, 4), (0, 10), (0, 2), width=16)
    params = {"params": ada.params_from_torch(weights)}
    estimate = jax.jit(lambda *inputs: model.apply(params, *inputs, method="refine"))(
        golden["dense_ls"], conditions_of(golden)
    )
    np.testing.assert_allclose(estimate, golden["estimate"], atol=2e-5)
    # From pilots it interpolates first.
    ls = golden["dense_ls"][:, ::10, ::2]
    dense = ada.bilinear_interpolate(ls, (0, 10), (0, 2), 20, 4)
    np.testing.assert_allclose(
        model.apply(params, ls, conditions_of(golden)),
        model.apply(params, dense, conditions_of(golden), method="refine"),
        atol=1e-6,
    )


def test_golden_closed_forms():
    golden = dict(np.load(GOLDEN / "channel_and_lmmse.npz"))
    rows, columns, noise = golden["pilot_rows"], golden["pilot_cols"], golden["noise_var"]
    F, J, ls = golden["cov_freq"], golden["cov_time"], golden["ls_pilots"]
    with jax.enable_x64(True):
        for s2, expected in zip(noise, golden["lmmse_mse_map"], strict=True):
            matrix = ada.lmmse_matrix(F, J, rows, columns, s2)
            np.testing.assert_allclose(ada.linear_error(matrix, F, J, rows, columns, s2), expected, atol=1e-9)
            np.testing.assert_allclose(ada.lmmse_bound(F, J, rows, columns, s2), expected.mean(), atol=1e-9)
        estimate = ada.apply_linear(ada.lmmse_matrix(F, J, rows, columns, noise[0]), ls, (24, 14))
        np.testing.assert_allclose(estimate, golden["lmmse_estimate"], atol=1e-9)
        bilinear = ada.bilinear_interpolate(ls, rows, columns, 24, 14)
        np.testing.assert_allclose(bilinear, golden["bilinear_estimate"], atol=1e-9)
        matrix = ada.bilinear_matrix(rows, columns, 24, 14)
        np.testing.assert_allclose(ada.apply_linear(matrix, ls, (24, 14)), bilinear, atol=1e-12)
        cross, pilots = ada.fit_sample_covariances(ls, golden["H"])
        np.testing.assert_allclose(pilots, golden["sample_R_pp"], atol=1e-9)
        sample = ada.apply_linear(ada.lmmse_filter(cross, pilots, noise[0]), ls[:1], (24, 14))
        np.testing.assert_allclose(sample[0], golden["sample_lmmse_first"], atol=1e-9)


def toeplitz(size, step, rng):
    """A covariance with unit diagonal: of random exponentials."""
    phases, weights = rng.uniform(-np.pi, np.pi, 6), rng.dirichlet(np.ones(6))
    x = step * np.arange(size)
    return np.einsum("p,kp,lp->kl", weights, *(np.exp(sign * 1j * np.outer(x, phases)) for sign in (1, -1)))


def test_error_of_a_linear_estimator_is_that_of_samples():
    # 40,000 Gaussian channels: errors of means of squares of about 1 / 200, four of them.
    rng = np.random.default_rng(0)
    F, J, rows, columns, s2 = toeplitz(4, 1.0, rng), toeplitz(3, 0.5, rng).real, [0, 2], [0, 2], 0.2
    np.fill_diagonal(J, 1 + 1e-9)
    root = np.linalg.cholesky(np.kron(F, J) + 1e-9 * np.eye(12))
    normal = lambda *shape: (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / np.sqrt(2)  # noqa: E731
    h = (normal(40_000, 12) @ root.T).reshape(-1, 4, 3)
    ls = h[:, rows][..., columns] + np.sqrt(s2) * normal(40_000, 2, 2)
    for matrix in (normal(12, 4), ada.lmmse_matrix(F, J, rows, columns, s2)):
        found = np.mean(np.abs(h - ada.apply_linear(matrix, ls, (4, 3))) ** 2, axis=0)
        np.testing.assert_allclose(ada.linear_error(matrix, F, J, rows, columns, s2), found, rtol=0.03)


def covariance(spread, shift, size=(24, 14)):
    """Of one exponential decay of delays, and Jakes' spectrum by its integral."""
    k = 15e3 * np.arange(size[0])
    t = 71.4e-6 * np.arange(size[1])
    angle = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    F = 1 / (1 + 2j * np.pi * spread * (k[:, None] - k))
    return F, np.mean(np.cos(2 * np.pi * shift * (t[:, None] - t)[..., None] * angle), axis=-1)


def test_the_bound_moves_as_it_should():
    rows, columns = np.arange(1, 24, 3), (2, 11)
    with jax.enable_x64(True):

        @jax.jit
        def bound(F, J, s2):
            return ada.lmmse_bound(F, J, rows, columns, s2)

        def along(cases):
            return np.array([bound(*covariance(spread, shift), s2) for spread, shift, s2 in cases])

        noise = along([(2e-7, 500.0, s2) for s2 in (1e-3, 1e-2, 1e-1, 1e0)])
        spread = along([(s, 500.0, 1e-2) for s in (5e-8, 1e-7, 2e-7, 4e-7)])
        shift = along([(2e-7, f, 1e-2) for f in (0.0, 200.0, 500.0, 1000.0)])
        for values in (noise, spread, shift):
            assert (np.diff(values) > 0).all()
            assert values.min() > 0
            assert values.max() <= 1
        np.testing.assert_allclose(along([(2e-7, 500.0, 1e9)]), 1, atol=1e-6)
        everywhere = (np.arange(6), np.arange(4))
        F, J = covariance(2e-6, 2_000.0, (6, 4))
        assert ada.lmmse_bound(F, J, *everywhere, 1e-10) < 1e-9
        # All cells are pilots, no noise: the input comes back (F (x) J is regular here; its condition takes digits).
        ls = np.random.default_rng(1).normal(size=(2, 6, 4)) + 0j
        returned = ada.apply_linear(ada.lmmse_matrix(F, J, *everywhere, 0.0), ls, (6, 4))
        np.testing.assert_allclose(returned, ls, atol=1e-6)
        # One channel everywhere has one direction with power: the others must not blow up.
        F, J = covariance(0.0, 0.0, (6, 4))
        returned = ada.apply_linear(ada.lmmse_matrix(F, J, *everywhere, 0.0), np.full((1, 6, 4), 2 + 1j), (6, 4))
        np.testing.assert_allclose(returned, 2 + 1j, atol=1e-9)


def test_bilinear_interpolation_is_exact_on_planes_and_keeps_the_pilots():
    rows, columns = np.array([1, 4, 5, 9]), np.array([2, 7, 8])
    k, l = np.arange(12)[:, None], np.arange(14)
    with jax.enable_x64(True):
        plane = (1 + 2j) + (0.3 - 1j) * k + 0.7j * l + (0.1 + 0.2j) * k * l
        found = ada.bilinear_interpolate(plane[rows[:, None], columns], rows, columns, 12, 14)
        np.testing.assert_allclose(found, plane, atol=1e-12)
        ls = np.random.default_rng(2).normal(size=(3, 4, 3)) + 1j
        found = ada.bilinear_interpolate(ls, rows, columns, 12, 14)
        np.testing.assert_allclose(found[:, rows[:, None], columns], ls, atol=1e-14)
        along = scipy.interpolate.interp1d(columns, ls, axis=-1, fill_value="extrapolate")(np.arange(14))
        expected = scipy.interpolate.interp1d(rows, along, axis=-2, fill_value="extrapolate")(np.arange(12))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_convolutions_by_shifts_are_convolutions():
    keys = iter(jax.random.split(jax.random.key(3), 9))
    sizes = ((1, 4), (4, 6), (6, 6), (6, 2))  # inputs and then products are shifted
    x = jax.random.normal(next(keys), (2, 5, 4))
    layers = [(jax.random.normal(next(keys), (3, 3, *size)), jax.random.normal(next(keys), size[1:])) for size in sizes]

    def value_and_gradients(function):
        def loss(x, layers):
            found = function(x, layers)
            return jnp.sum(jnp.sin(found / 100)), found

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, layers)

    found, expected = (value_and_gradients(f) for f in (convolution.by_shifts, convolution.by_convolutions))
    # float32, values up to 1e4.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), found, expected)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1)))
    kernel, bias = (np.asarray(part) for part in layers[0])
    cell = np.einsum("bij,ijo->bo", padded[:, 2:5, 1:4], kernel[:, :, 0]) + bias
    np.testing.assert_allclose(convolution.by_shifts(x, layers[:1])[:, 2, 1], cell, atol=1e-5)


def pilots(seed, count=5):
    parts = np.random.default_rng(seed).normal(size=(2, count, *PILOTS)).astype(np.float32)
    return parts[0] + 1j * parts[1]


def test_real_and_imaginary_part_go_separately(adaptive):
    golden, _, params, apply = adaptive
    ls, conditions = golden["pilots_ls"], conditions_of(golden)
    estimate = np.asarray(apply(params, ls, conditions)[0])
    # Not h^(conj ls) = conj h^(ls): F has biases, F(-x) is not -F(x). Exchanging the parts, i conj(ls), is exact.
    exchanged = apply(params, 1j * ls.conj(), conditions)[0]
    np.testing.assert_allclose(exchanged, 1j * estimate.conj(), atol=1e-5)  # float32
    nothing = np.asarray(apply(params, 0 * ls, conditions)[0])
    real = np.asarray(apply(params, ls.real + 0j, conditions)[0])
    np.testing.assert_allclose(real.imag, nothing.imag, atol=1e-5)
    np.testing.assert_allclose(real.real, estimate.real, atol=1e-5)
    turned = np.asarray(apply(params, np.complex64(np.exp(0.7j)) * ls, conditions)[0])
    assert np.abs(turned - np.exp(0.7j) * estimate).max() > 1e-2  # a phase is not passed on


def test_half_precision_stays_inside_the_encoder(adaptive):
    golden, model, params, apply = adaptive
    ls, conditions = golden["pilots_ls"], conditions_of(golden)
    whole, stored = apply(params, ls, conditions)
    half = model.clone(dtype=jnp.bfloat16)
    show = jax.jit(lambda params: half.apply(params, ls, conditions, capture_intermediates=True))
    found, halves = show(params)
    assert found.dtype == jnp.complex64
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype(jnp.float32)}
    for stages, inside in ((stored, jnp.float32), (halves, jnp.bfloat16)):
        parts = stages["intermediates"]
        outside = (parts[name]["__call__"][0] for name in ("upsampler", "enhancer", "encoder", "refiner"))
        assert {part.dtype for part in outside} == {jnp.dtype(jnp.float32)}
        assert parts["encoder"]["embed"]["__call__"][0].dtype == inside
    np.testing.assert_array_equal(*(each["intermediates"]["enhancer"]["__call__"][0] for each in (stored, halves)))
    error = np.abs(found - whole).max()
    assert 1e-5 < error < 0.05  # values of order 1, 8 bits; whole numbers agree to 2e-5 with the authors'
    rival = ada.CEViT(SIZE, (0, 5), (2, 11), (6, 4), 8, dtype=jnp.bfloat16)
    show = lambda params: rival.apply({"params": params}, ls[:, :2], conditions, capture_intermediates=True)  # noqa: E731
    found, stored = jax.eval_shape(show, shapes_of(rival, (2, 2)))
    encoder = stored["intermediates"]["encoder"]
    assert (found.dtype, encoder["embed"]["__call__"][0].dtype) == (jnp.complex64, jnp.bfloat16)


def test_slots_do_not_see_each_other(adaptive):
    golden, _, params, apply = adaptive
    order = np.array([2, 0, 1])
    ls, conditions = golden["pilots_ls"], conditions_of(golden)
    found = apply(params, ls[order], conditions[order])[0]
    np.testing.assert_allclose(found, golden["estimate"][order], atol=2e-5)


def test_without_its_code_the_adaptive_model_is_fortitran(adaptive):
    golden, _, params, apply = adaptive
    params = jax.tree.map(np.array, params["params"])
    for name in ("snr2", "delay_spread2", "doppler2"):
        params["adapter"][name] = jax.tree.map(np.zeros_like, params["adapter"][name])
    silent = apply({"params": params}, golden["pilots_ls"], conditions_of(golden))[0]
    del params["adapter"]
    params["encoder"]["embed"]["kernel"] = params["encoder"]["embed"]["kernel"][:6]
    plain = jax.jit(ada.FortiTran(**OPTIONS).apply)({"params": params}, golden["pilots_ls"])
    np.testing.assert_allclose(silent, plain, atol=1e-5)


def test_the_code_standardises_where_it_is_asked_to():
    conditions = np.float32([[10, 200, 500], [0, 25, 50]])
    scale = ((12.5, 160.0, 525.0), (8.5, 86.0, 288.0))
    plain, scaled = ada.ChannelAdapter((3, 8), 4), ada.ChannelAdapter((3, 8), 4, scale)
    params = plain.init(jax.random.key(0), conditions)
    standard = (conditions - np.float32(scale[0])) / np.float32(scale[1])
    np.testing.assert_allclose(scaled.apply(params, conditions), plain.apply(params, standard), atol=1e-6)


def shapes_of(model, size=PILOTS, conditions=True):
    inputs = (jnp.zeros((1, *size), jnp.complex64), jnp.zeros((1, 3)) if conditions else None)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_parameters_of_the_paper():
    adaptive, plain = (shapes_of(model(), (40, 2)) for model in (ada.AdaFortiTran, ada.FortiTran))
    assert (count(adaptive), count(plain)) == (287_234, 213_752)
    assert count(adaptive["upsampler"]) == 136_080
    assert count(adaptive["enhancer"]) == count(adaptive["refiner"]) == 4_801
    assert count(adaptive["encoder"]["layers"]) == 6 * 8_544
    assert count(adaptive["adapter"]) == 3 * 24_430
    assert "adapter" not in plain


def test_layers_start_as_copies_of_one_and_drop_differently():
    model = ada.PatchEncoder(3, 8, 2, 2, 5, dropout_rate=0.5)
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 4))
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    for leaf in jax.tree.leaves(params["params"]["layers"]):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    assert 0.01 < np.std(params["params"]["positions"]) < 0.03
    apply = jax.jit(lambda key: model.apply(params, tokens, False, rngs={"dropout": key}))
    first, again, other = (np.asarray(apply(jax.random.key(seed))) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    recomputed = model.clone(remat=True).apply(params, tokens, False, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_allclose(recomputed, first, atol=1e-5)


def test_recomputed_layers_are_not_kept():
    tokens = jnp.zeros((8, 32, 4))

    def bytes_of(remat):
        model = ada.PatchEncoder(3, 16, 2, 6, 32, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(1), tokens)
        gradient = jax.jit(jax.grad(lambda params: model.apply(params, tokens).sum()))
        return temporary_bytes(gradient.lower(params).compile())

    assert bytes_of(remat=True) < 0.6 * bytes_of(remat=False)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_by_a_loop(params, x):
    """States of both directions, (batch, time, 2 width), in float64."""
    width = params["state_bias"].shape[1] // 3
    states = np.zeros((*x.shape[:2], 2 * width))
    for direction, order in enumerate((range(x.shape[1]), range(x.shape[1] - 1, -1, -1))):
        names = ("input_kernel", "input_bias", "state_kernel", "state_bias")
        W, b, U, c = (np.asarray(params[name], float)[direction] for name in names)
        h = np.zeros((len(x), width))
        for time in order:
            (r, z, n), (r_h, z_h, n_h) = np.split(x[:, time] @ W + b, 3, -1), np.split(h @ U + c, 3, -1)
            r, z = sigmoid(r + r_h), sigmoid(z + z_h)
            h = (1 - z) * np.tanh(n + r * n_h) + z * h
            states[:, time, direction * width : (direction + 1) * width] = h
    return states


def test_gru_is_pytorchs_by_a_loop():
    model = BidirectionalGRU(3)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 4)))
    params = model.init(jax.random.key(1), x)["params"]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(params)) <= 3**-0.5
    np.testing.assert_allclose(model.apply({"params": params}, x), gru_by_a_loop(params, x), atol=1e-6)


def convolved_by_a_loop(x, layer):
    """A 3x3 convolution of (batch, rows, columns, inputs) with a border of zeros, in float64."""
    kernel, bias = (np.asarray(layer[name], float) for name in ("kernel", "bias"))
    batch, rows, columns, _ = x.shape
    out = np.tile(bias, (batch, rows, columns, 1))
    for i, j in np.ndindex(rows, columns):
        for k, l in np.ndindex(3, 3):
            if 0 <= (row := i + k - 1) < rows and 0 <= (column := j + l - 1) < columns:
                out[:, i, j] += x[:, row, column] @ kernel[k, l]
    return out


def test_sisrafnet_is_that_of_a_loop():
    K, T, r, c, channels = 6, 4, 3, 2, 5  # all different: an axis in another's place would show
    model = ada.SisRafNet((K, T), (r, c), channels, 7)
    draw = np.random.default_rng(8).normal
    parts = draw(size=(2, 2, r, c)).astype(np.float32)
    params = jax.tree.map(lambda leaf: draw(0, 0.5, leaf.shape).astype(np.float32), shapes_of(model, (r, c)))
    found = jax.jit(model.apply)({"params": params}, parts[0] + 1j * parts[1])
    for part, ours in zip(parts, (found.real, found.imag), strict=True):
        x = part[..., None].astype(float)
        for name in ("conv0", "conv1"):
            x = np.maximum(convolved_by_a_loop(x, params["convolutions"][name]), 0)
        features = np.zeros((2, r, c * channels))  # of a pilot row: pilot after pilot, the channels of each
        for row, column, channel in np.ndindex(r, c, channels):
            features[:, row, column * channels + channel] = x[:, row, column, channel]
        states = gru_by_a_loop(params["gru1"], gru_by_a_loop(params["gru0"], features))
        kernel, bias = (np.asarray(params["dense"][name], float) for name in ("kernel", "bias"))
        for k, l in np.ndindex(K, T):  # a pilot row writes the K / r rows of the grid behind its place
            output = k % (K // r) * T + l
            cell = states[:, k // (K // r)] @ kernel[:, output] + bias[output]
            np.testing.assert_allclose(ours[:, k, l], cell, atol=1e-5)


def test_sisrafnet_sees_the_parts_separately_and_every_row():
    model = ada.SisRafNet(SIZE, PILOTS, 4, 8)
    ls = pilots(4)
    params = jax.jit(model.init)(jax.random.key(0), ls)
    apply = jax.jit(model.apply)
    estimate = np.asarray(apply(params, ls))
    assert estimate.shape == (5, *SIZE)
    np.testing.assert_allclose(apply(params, 1j * ls.conj()), 1j * estimate.conj(), atol=1e-5)
    moved = ls.copy()
    moved[:, 0, 0] += 1
    assert np.abs(np.asarray(apply(params, moved)) - estimate)[:, -1].max() > 1e-6  # through the recurrences


def test_loss_is_half_of_what_is_reported():
    h, estimate = pilots(5), pilots(6)
    entries = np.mean(np.concatenate([(h - estimate).real, (h - estimate).imag]) ** 2)
    np.testing.assert_allclose(ada.estimation_loss(h, estimate), entries, rtol=1e-5)
    np.testing.assert_allclose(ada.complex_mse(h, estimate), 2 * entries, rtol=1e-5)
    np.testing.assert_allclose(ada.to_db(0.001), -30, atol=1e-4)


LS = np.zeros((1, *PILOTS), np.complex64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes_of(ada.FortiTran(**OPTIONS | {"size": (13, 14)})), r"do not fill a grid of \(13, 14\)"),
        (lambda: shapes_of(ada.FortiTran(**OPTIONS | {"size": (12, 13)})), "do not fill"),
        (lambda: shapes_of(ada.AdaFortiTran(**OPTIONS, adapter_sizes=(7, 42))), "2 x 28 tokens = 56, got sizes"),
        (lambda: shapes_of(ada.AdaFortiTran(**OPTIONS, adapter_sizes=(56,)), conditions=False), "needs conditions"),
        (lambda: shapes_of(ada.FortiTran(**OPTIONS | {"max_tokens": 27})), "28 tokens need as many positions"),
        (lambda: shapes_of(ada.FortiTran(**OPTIONS | {"num_heads": 3})), "3 heads do not divide"),
        (lambda: shapes_of(ada.FortiTran(**OPTIONS | {"num_layers": 0})), "num_layers"),
        (lambda: shapes_of(ada.FortiTran(**OPTIONS), (2, 4)), r"pilots of shape \(4, 2\), got \(2, 4\)"),
        (lambda: shapes_of(ada.LinearEstimator(SIZE, PILOTS), (4, 3)), "expected pilots"),
        (lambda: shapes_of(ada.SisRafNet(SIZE, PILOTS), (4, 3)), "expected pilots"),
        (lambda: shapes_of(ada.SisRafNet((14, 14), PILOTS)), "4 pilot rows do not divide 14"),
        (lambda: shapes_of(ada.CEViT(SIZE, (0, 5), (2, 11), (6, 4)), (2, 2), False), "needs conditions"),
        (lambda: shapes_of(ada.CEViT(SIZE, (0, 5), (2, 11), (5, 4)), (2, 2)), "do not fill"),
        (lambda: shapes_of(ada.CEViT(SIZE, (0, 12), (2, 11), (6, 4)), (2, 2)), "ascend within 0 to 11"),
        (lambda: shapes_of(ada.CEViT(SIZE, (0, 5), (2, 11), (6, 4)), (4, 2)), "expected pilots"),
        (lambda: ada.bilinear_interpolate(LS[:, :1], (1,), (2, 11), 12, 14), "at least 2 pilot rows and columns"),
        (lambda: ada.bilinear_interpolate(LS[..., :1], range(4), (2,), 12, 14), "at least 2"),
        (lambda: ada.bilinear_interpolate(LS, range(4), (2, 14), 12, 14), "ascend within 0 to 13"),
        (lambda: ada.bilinear_interpolate(LS, range(3), (2, 11), 12, 14), "expected pilots of shape"),
        (lambda: ada.lmmse_matrix(np.eye(4), np.eye(3), [0, 4], [0], 0.1), "ascend within 0 to 3"),
        (lambda: ada.linear_error(np.eye(4), np.eye(4), np.eye(3), [0, 2], [0, 3], 0.1), "ascend within 0 to 2"),
        (lambda: ada.apply_linear(np.zeros((9, 8)), LS, SIZE), "expected a matrix of shape"),
        (lambda: ada.params_from_torch({"head.weight": np.zeros((2, 2))}), r"called head\.\*"),
        (lambda: ada.params_from_torch({"linear.gain": np.zeros(2)}), r"called \*\.gain"),
        (lambda: ada.params_from_torch({"encoder.transformer.norm3.bias": np.zeros(2)}), "norm3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
