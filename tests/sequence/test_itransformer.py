"""iTransformer and its baselines: golden figures of the authors' code, numpy, and the paper's invariances."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jaxpapers.nn.attention import flash_attention, full_attention, probsparse_attention
from jaxpapers.sequence import itransformer
from jaxpapers.sequence.itransformer import (
    ATTENTIONS,
    DLinear,
    ITransformer,
    PatchTST,
    RLinear,
    VanillaTransformer,
    baselines,
    params_from_torch,
)
from jaxpapers.sequence.itransformer.model import Block

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer"
ATOL = 2e-5  # of the card: float32 on both sides
BATCH, TIME, HORIZON, VARIATES, MARKS = 2, 24, 12, 7, 4
MODEL = ITransformer(HORIZON, d_model=16, d_ff=24, num_layers=2, num_heads=4)
SHALLOW = MODEL.clone(num_layers=1)
VANILLA = VanillaTransformer(HORIZON, d_model=16, d_ff=24, num_layers=2, num_heads=4, label_len=12)
PATCHES = PatchTST(HORIZON, patch_len=6, stride=3, d_model=16, d_ff=24, num_layers=1, num_heads=4)


@cache
def compiled(model):
    return jax.jit(model.apply, static_argnames=("deterministic", "mutable"))


analyse = jax.jit(partial(itransformer.analyse, MODEL))


@cache
def initial(model, variates=VARIATES, marks=False):
    """Variables as at the start, drawn by numpy: compiling jax's generator for every leaf takes longer than a test."""
    x, calendar = jnp.zeros((BATCH, TIME, variates)), jnp.zeros((BATCH, TIME, MARKS))
    extra = (calendar, calendar[:, :HORIZON])[: 2 if isinstance(model, VanillaTransformer) else 1] if marks else ()
    return drawn(jax.eval_shape(model.init, jax.random.key(0), x, *extra))


def drawn(shapes):
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.ones(shape.shape)
        if name == "mean":
            return jnp.zeros(shape.shape)
        bound = 0.02 if name == "positions" else np.prod(shape.shape[:-1] or (16,)) ** -0.5
        return jnp.asarray(rng.uniform(-bound, bound, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def load(name):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    weights = {key[2:]: golden.pop(key) for key in list(golden) if key.startswith("w.")}
    return golden, params_from_torch(weights)


@pytest.fixture(scope="module")
def forward():
    return load("itransformer_forward")


@pytest.fixture(scope="module")
def window(forward):
    return forward[0]["x"]


def test_golden_forecasts(forward):
    golden, params = forward
    x, variables = golden["x"], {"params": params}
    assert golden["meta"].tolist() == [BATCH, TIME, HORIZON, VARIATES, MARKS, 16, 4, 24, 2]
    apply = compiled(MODEL)
    np.testing.assert_allclose(apply(variables, x), golden["y_no_mark"], atol=ATOL)
    np.testing.assert_allclose(apply(variables, x[..., :3]), golden["y_first_half_variates"], atol=ATOL)
    bare = compiled(MODEL.clone(use_norm=False))
    np.testing.assert_allclose(bare(variables, x), golden["y_no_mark_no_norm"], atol=ATOL)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial(MODEL)["params"])


def test_golden_attention_maps(forward):
    golden, params = forward
    analysis = analyse(params, golden["x"], golden["mark"])
    np.testing.assert_allclose(analysis.attention, golden["attn_with_mark"], atol=ATOL)
    np.testing.assert_allclose(analysis.forecast, golden["y_with_mark"], atol=ATOL)
    assert analysis.features.shape == (2, BATCH, VARIATES + MARKS, 16)
    # The last block's output is what the final norm and the projection make the forecast of.
    last = layer_norm(params["encoder"]["norm"], np.float64(analysis.features[-1]))[:, :VARIATES]
    y = dense(params["projection"], last).swapaxes(1, 2)
    mean, std = (golden["x"].mean(axis=1, keepdims=True), np.sqrt(golden["x"].var(axis=1, keepdims=True) + 1e-5))
    np.testing.assert_allclose(y * std + mean, golden["y_with_mark"], atol=ATOL)


def test_attention_maps_of_functions(forward):
    golden, params = forward
    expected = analyse(params, golden["x"]).attention
    for attention in (full_attention, partial(flash_attention, block_size=4)):
        found = jax.jit(partial(itransformer.analyse, MODEL.clone(attention=attention)))(params, golden["x"])
        np.testing.assert_allclose(found.attention, expected, atol=1e-6)


def test_golden_number_of_picked_queries():
    kernels = np.load(GOLDEN / "attention_kernels.npz")
    q, k, v = (kernels[name] for name in "qkv")
    options = {"factor": int(kernels["prob_factor"]), "sampled": kernels["prob_index_sample"]}
    out = jax.jit(partial(probsparse_attention, **options))(q, k, v)
    picked = np.abs(out - v.mean(axis=1, keepdims=True)).max(axis=-1) > 1e-5  # the others have the mean
    assert (picked.sum(axis=1) == kernels["prob_n_top"]).all()


def test_golden_forecast_in_float64(forward):
    golden, params = forward
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        y = compiled(MODEL)({"params": doubles}, np.float64(golden["x"]), np.float64(golden["mark"]))
        np.testing.assert_allclose(y, golden["y_with_mark_f64"], atol=1e-12)


@pytest.mark.parametrize("attention", ["flash", "flow", "probsparse", "lsh"])
def test_every_attention_forecasts_and_its_checkpoint_is_read(attention, window):
    model = SHALLOW.clone(attention=attention)
    params = initial(model)["params"]
    y = compiled(model)({"params": params}, window)
    assert y.shape == (BATCH, HORIZON, VARIATES)
    assert np.isfinite(y).all()
    back = params_from_torch(dict(as_torch(params)))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if attention == "flash":
        np.testing.assert_allclose(y, compiled(SHALLOW)({"params": params}, window), atol=1e-5)


def as_torch(params):
    """Names and layouts of the authors' state dict."""
    names = {"query_key": "attn.toqk", "value": "attn.tov", "out": "attn.to_out"}
    yield "enc_embedding.value_embedding.weight", params["embedding"]["kernel"].T
    yield "enc_embedding.value_embedding.bias", params["embedding"]["bias"]
    yield "projector.weight", params["projection"]["kernel"].T
    yield "projector.bias", params["projection"]["bias"]
    for layer, block in params["encoder"].items():
        prefix = f"encoder.attn_layers.{layer[-1]}."
        if layer == "norm":
            yield from (("encoder.norm.weight", block["scale"]), ("encoder.norm.bias", block["bias"]))
            continue
        for name, leaves in block["tokens"].items():
            ours = names[name] if "query_key" in block["tokens"] else f"{name}_projection"
            for kind, leaf in leaves.items():
                yield f"{prefix}attention.{ours}.{'weight' if kind == 'kernel' else kind}", leaf.T
        for name, theirs in (("up", "conv1"), ("down", "conv2")):
            yield f"{prefix}{theirs}.weight", block["features"][name]["kernel"].T[..., None]
            yield f"{prefix}{theirs}.bias", block["features"][name]["bias"]
        for name, theirs in (("tokens_norm", "norm1"), ("features_norm", "norm2")):
            yield f"{prefix}{theirs}.weight", block[name]["scale"]
            yield f"{prefix}{theirs}.bias", block[name]["bias"]


ORDER = np.array([3, 0, 6, 5, 1, 4, 2])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_variates_have_no_order(attention, window):
    model = SHALLOW.clone(attention=attention)
    variables, apply = initial(model), compiled(model)
    y = apply(variables, window)
    difference = np.abs(apply(variables, window[..., ORDER]) - y[..., ORDER]).max()
    # Drawn keys and buckets are of places, not of variates.
    assert difference > 1e-4 if attention in ("probsparse", "lsh") else difference < 1e-5
    # Samples have none either, but drawn keys and rotations are those of the batch.
    np.testing.assert_allclose(apply(variables, window[::-1]), y[::-1], atol=1e-5)


def test_parameters_do_not_know_the_number_of_variates():
    few, many = (jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, TIME, variates))) for variates in (7, 321))
    assert few == many
    y = jax.eval_shape(MODEL.apply, few, jnp.ones((1, TIME, 321)))
    assert y.shape == (1, HORIZON, 321)


def without_values(params):
    """Attention that says nothing."""
    blocks = {
        layer: {**block, "tokens": {**block["tokens"], "value": jax.tree.map(jnp.zeros_like, block["tokens"]["value"])}}
        for layer, block in params["encoder"].items()
        if layer != "norm"
    }
    return {**params, "encoder": {**params["encoder"], **blocks}}


def test_variates_and_covariates_meet_in_attention_alone(forward):
    golden, params = forward
    x, mark, apply = golden["x"], golden["mark"], compiled(MODEL)
    assert np.abs(golden["y_with_mark"] - golden["y_no_mark"]).max() > 1e-3
    assert np.abs(golden["y_first_half_variates"] - golden["y_no_mark"][..., :3]).max() > 1e-3
    silent = {"params": without_values(params)}
    y = apply(silent, x)
    np.testing.assert_allclose(apply(silent, x[..., :3]), y[..., :3], atol=1e-5)
    np.testing.assert_allclose(analyse(silent["params"], x, mark).forecast, y, atol=1e-5)
    assert np.abs(y - golden["y_no_mark"]).max() > 1e-3


def test_forecasts_follow_scale_and_shift(forward):
    params = {"params": forward[1]}
    x = np.random.default_rng(0).normal(size=(BATCH, TIME, VARIATES)).astype(np.float32)
    y = compiled(MODEL)(params, x)
    scaled = compiled(MODEL)(params, 3 * x - 5)
    np.testing.assert_allclose(scaled, 3 * y - 5, atol=1e-3 * float(np.abs(3 * y).max()))  # the 1e-5 in the root
    assert np.abs(compiled(MODEL.clone(use_norm=False))(params, 3 * x - 5) - 3 * y + 5).max() > 0.1


def test_a_constant_window_is_forecast_to_stay(forward):
    params = {"params": forward[1]}
    levels = np.linspace(-3, 3, VARIATES, dtype=np.float32)
    x = np.broadcast_to(levels, (BATCH, TIME, VARIATES))
    raw = compiled(MODEL.clone(use_norm=False))(params, np.zeros_like(x))
    np.testing.assert_allclose(compiled(MODEL)(params, x), levels + np.sqrt(1e-5) * raw, atol=2e-6)  # float32 at 3


def test_instance_norm_and_back():
    x = np.random.default_rng(1).normal(2, 5, (BATCH, TIME, 3)).astype(np.float32)
    x[0, :, 0] = 4
    z, stats = jax.jit(itransformer.instance_norm)(x)
    np.testing.assert_allclose(stats.mean, x.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(stats.std, np.sqrt(np.float64(x).var(axis=1) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(itransformer.instance_denorm(z, stats), x, atol=1e-5)
    half, _ = itransformer.instance_norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_training_on_all_variates_in_another_order_is_ordinary_training(window):
    target = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, HORIZON, VARIATES)), jnp.float32)
    variables, x = initial(SHALLOW), jnp.asarray(window)

    @jax.jit
    def step(params, chosen):
        loss = lambda p: jnp.mean((SHALLOW.apply(p, x[..., chosen]) - target[..., chosen]) ** 2)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    subset = itransformer.random_variate_subset(jax.random.key(5), VARIATES, VARIATES)
    assert sorted(subset.tolist()) == list(range(VARIATES))
    assert subset.tolist() != list(range(VARIATES))
    one, other = step(variables, np.arange(VARIATES)), step(variables, subset)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other)  # sums in another order


def test_random_subsets_have_no_repetition_and_miss_none():
    draws = jax.jit(jax.vmap(lambda key: itransformer.random_variate_subset(key, 6, 4)))(
        jax.random.split(jax.random.key(0), 600)
    )
    assert all(len(set(row)) == 4 for row in draws.tolist())
    counts = np.bincount(np.ravel(draws), minlength=6)
    np.testing.assert_allclose(counts, 400, atol=5 * np.sqrt(600 * 2 / 9))  # five standard deviations


def dense(params, x):
    return x @ np.float64(params["kernel"]) + np.float64(params.get("bias", 0))


def layer_norm(params, x):
    scaled = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return scaled * np.float64(params["scale"]) + np.float64(params["bias"])


def feed_forward(params, x):
    hidden = dense(params["up"], x)
    return dense(params["down"], hidden * (1 + erf(hidden / np.sqrt(2))) / 2)


def attend(params, x, heads=4):
    q, k, v = (
        dense(params[name], x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for name in ("query", "key", "value")
    )
    out = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), axis=-1) @ v
    return dense(params["out"], out.swapaxes(1, 2).reshape(x.shape))


# Every component on every axis.
@pytest.mark.parametrize("components", [("ffn", "attention"), ("attention", "none"), ("none", "ffn")], ids="-".join)
def test_ablations_are_their_formulas(components):
    block = Block(4, 24, *components)
    x = np.random.default_rng(4).normal(size=(BATCH, 5, 16)).astype(np.float32)
    params = drawn(jax.eval_shape(block.init, jax.random.key(1), x)["params"])
    h = np.float64(x)
    if components[0] == "attention":
        h = layer_norm(params["tokens_norm"], h + attend(params["tokens"], h))
    elif components[0] == "ffn":
        h = layer_norm(params["tokens_norm"], h + feed_forward(params["tokens"], h.swapaxes(1, 2)).swapaxes(1, 2))
    if components[1] == "ffn":
        h = layer_norm(params["features_norm"], h + feed_forward(params["features"], h))
    elif components[1] == "attention":
        mixed = dense(params["lower"], attend(params["features"], dense(params["lift"], h.swapaxes(1, 2))))
        h = layer_norm(params["features_norm"], h + mixed.swapaxes(1, 2))
    np.testing.assert_allclose(compiled(block)({"params": params}, jnp.asarray(x)), h, atol=ATOL)
    used = {
        f"{axis}_norm"
        for axis, component in zip(("tokens", "features"), components, strict=True)
        if component != "none"
    }
    assert {name for name in params if name.endswith("norm")} == used


@pytest.mark.parametrize("components", [("attention", "attention"), ("ffn", "ffn")], ids="-".join)
def test_mixed_ablations_forecast(components, window):
    model = MODEL.clone(variate=components[0], temporal=components[1])
    assert jax.eval_shape(partial(model.apply, initial(model)), window).shape == (BATCH, HORIZON, VARIATES)


def test_without_attention_every_variate_is_alone(window):
    model = SHALLOW.clone(variate="none")
    variables, apply = initial(model), compiled(model)
    other = np.concatenate([window[..., :3], window[..., 3:] ** 2], axis=-1)
    y = apply(variables, window)
    np.testing.assert_allclose(apply(variables, other)[..., :3], y[..., :3], atol=1e-5)
    assert np.abs(compiled(SHALLOW)(initial(SHALLOW), other)[..., :3] - y[..., :3]).max() > 1e-3


def test_initialisation_is_pytorchs():
    model = ITransformer(96, d_model=64, d_ff=48, num_layers=1)
    params = jax.jit(model.init)(jax.random.key(3, impl="unsafe_rbg"), jnp.zeros((1, 80, 2)))["params"]  # compiles fast
    block = params["encoder"]["layers_0"]
    for layer, inputs in (
        (params["embedding"], 80),
        (block["tokens"]["query"], 64),
        (block["tokens"]["out"], 64),
        (block["features"]["up"], 64),
        (block["features"]["down"], 48),
        (params["projection"], 64),
    ):
        bound = inputs**-0.5
        for leaf in layer.values():
            assert 0.9 * bound < np.abs(leaf).max() <= bound * (1 + 1e-6)
    assert (block["tokens_norm"]["scale"] == 1).all()


def test_dropout_and_dtype(window):
    variables = initial(SHALLOW)
    first, again, other = (
        compiled(SHALLOW)(variables, window, deterministic=False, rngs={"dropout": jax.random.key(k)})
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    for model in (MODEL, VANILLA.clone(use_norm=True), PATCHES):
        half = jax.eval_shape(model.clone(dtype=jnp.bfloat16).apply, initial(model), window)
        assert half.dtype == jnp.float32  # normalised back in the window's own precision
    assert jax.eval_shape(VANILLA.clone(dtype=jnp.bfloat16).apply, initial(VANILLA), window).dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def original():
    return load("vanilla_transformer")


def test_golden_vanilla_transformer(original):
    golden, params = original
    x, mark, dec, mark_dec = (jnp.asarray(golden[name]) for name in ("x", "mark", "dec", "mark_dec"))
    # The figures' decoder has a calendar of its own, where a forecast's goes on from the encoder's.
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": int(golden["n_heads"])}
    encoder, decoder = baselines.TimeEncoder(num_layers=2, **sizes), baselines.TimeDecoder(num_layers=1, **sizes)

    @jax.jit
    def run(params, x, mark, dec, mark_dec):
        embedded = baselines.TimeEmbedding(16).apply({"params": params["encoder"]["embedding"]}, x, mark)
        memory = encoder.apply({"params": params["encoder"]}, x, mark)
        return embedded, decoder.apply({"params": params["decoder"]}, dec, mark_dec, memory)

    embedded, y = run(params, x, mark, dec, mark_dec)
    np.testing.assert_allclose(embedded, golden["enc_embedding"], atol=ATOL)
    np.testing.assert_allclose(y[:, int(golden["label_len"]) :], golden["y"], atol=ATOL)
    # The whole model is these two parts.
    future = mark_dec[:, HORIZON:]
    calendar = jnp.concatenate([mark[:, -12:], future], axis=1)
    whole = compiled(VANILLA)({"params": params}, x, mark, future)
    np.testing.assert_allclose(whole, run(params, x, mark, dec, calendar)[1][:, 12:], atol=1e-6)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial(VANILLA, marks=True)["params"])


def test_the_decoder_sees_no_future(original):
    golden, params = original
    x, mark = jnp.asarray(golden["x"]), jnp.asarray(golden["mark"])
    future = jnp.asarray(golden["mark_dec"][:, HORIZON:])
    one, other = (compiled(VANILLA)({"params": params}, x, mark, each) for each in (future, future.at[:, -2:].add(1)))
    # A circular convolution embeds values, not the calendar: only steps from the changed one on may differ.
    np.testing.assert_allclose(one[:, :-2], other[:, :-2], atol=1e-6)
    assert np.abs(one[:, -2:] - other[:, -2:]).max() > 1e-3


def test_sown_maps_of_masked_attention_see_no_future(window):
    _, sown = jax.jit(partial(VANILLA.apply, mutable="intermediates"))(initial(VANILLA), window)
    block = sown["intermediates"]["decoder"]["layers_0"]
    (own,), (cross,) = (block[f"{name}_attention"]["attention_weights"] for name in ("self", "cross"))
    steps = VANILLA.label_len + HORIZON
    assert own.shape == (BATCH, 4, steps, steps)
    assert (np.triu(own, 1) == 0).all()
    np.testing.assert_allclose(own.sum(axis=-1), 1, atol=1e-6)
    assert cross.shape == (BATCH, 4, steps, TIME)
    assert (cross > 0).all()


def test_informers_decoder_is_probsparse(window):
    # With so large a factor all queries are picked, and it is the decoder of full attention; with a small one not.
    calendar = np.zeros((BATCH, TIME, MARKS), np.float32)
    memory, variables = window @ np.ones((VARIATES, 16), np.float32), None
    outputs = []
    for factor in (None, 99, 1):
        decoder = baselines.TimeDecoder(16, 24, 1, 4, probsparse_factor=factor)
        variables = variables or drawn(jax.eval_shape(decoder.init, jax.random.key(0), window, calendar, memory))
        outputs.append(compiled(decoder)(variables, window, calendar, memory))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-3
    # And the model has such a decoder.
    informer = VANILLA.clone(attention="probsparse", num_layers=1)
    params = initial(informer)["params"]
    encoder = baselines.TimeEncoder(16, 24, 1, 4, attention="probsparse")
    memory = compiled(encoder)({"params": params["encoder"]}, window, None)
    shown = np.concatenate([window[:, -12:], np.zeros((BATCH, HORIZON, VARIATES), np.float32)], axis=1)
    y = compiled(decoder)({"params": params["decoder"]}, shown, None, memory)[:, 12:]
    np.testing.assert_allclose(compiled(informer)({"params": params}, window), y, atol=1e-6)


def test_reformer_is_an_encoder_of_the_window_and_zeros(window):
    model = VANILLA.clone(attention="lsh")
    variables = initial(model, marks=True)
    mark = np.random.default_rng(9).normal(size=(BATCH, TIME + HORIZON, MARKS)).astype(np.float32)
    y = compiled(model)(variables, window, mark[:, :TIME], mark[:, TIME:])
    params = variables["params"]
    assert set(params) == {"encoder", "projection"}
    encoder = baselines.TimeEncoder(16, 24, 2, 4, attention="lsh")
    padded = np.concatenate([window, np.zeros((BATCH, HORIZON, VARIATES), np.float32)], axis=1)
    h = compiled(encoder)({"params": params["encoder"]}, padded, mark)
    np.testing.assert_allclose(y, dense(params["projection"], np.float64(h))[:, TIME:], atol=ATOL)
    with pytest.raises(ValueError, match="distil leaves no token for each step"):
        model.clone(distil=True).init(jax.random.key(0), window)
    read = params_from_torch({"projection.weight": np.zeros((VARIATES, 16), np.float32)})
    assert read["projection"]["kernel"].shape == params["projection"]["kernel"].shape


@pytest.mark.parametrize("attention", ["flash", "flow", "probsparse", "lsh"])
def test_every_attention_serves_the_vanilla_transformer(attention, window):
    model = VANILLA.clone(attention=attention)
    assert jax.eval_shape(partial(model.apply, initial(model)), window).shape == (BATCH, HORIZON, VARIATES)


def test_channel_independence_and_instance_norm(window):
    model = VANILLA.clone(channel_independent=True, use_norm=True, num_layers=1)
    variables, apply = initial(model, variates=1, marks=True), compiled(model)
    mark = np.random.default_rng(5).normal(size=(BATCH, TIME + HORIZON, MARKS)).astype(np.float32)
    past, future = mark[:, :TIME], mark[:, TIME:]
    y = apply(variables, window, past, future)
    # Each variate of each sample by the plain model of one variate.
    single = compiled(model.clone(channel_independent=False))
    for n in (0, 4):
        alone = single(variables, window[..., n : n + 1], past, future)
        np.testing.assert_allclose(alone[..., 0], y[..., n], atol=1e-5)
    x = np.random.default_rng(6).normal(size=(BATCH, TIME, VARIATES)).astype(np.float32)
    y = apply(variables, x, past, future)
    scaled = apply(variables, 3 * x - 5, past, future)
    np.testing.assert_allclose(scaled, 3 * y - 5, atol=1e-3 * float(np.abs(3 * y).max()))  # the 1e-5 in the root


def test_distilling_halves_the_tokens(window):
    encoder = baselines.TimeEncoder(16, 24, 3, 4, attention="probsparse", distil=True)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), window, None)
    memory = jax.eval_shape(partial(encoder.apply, deterministic=True), variables, jnp.asarray(window), None)
    assert memory.shape == (BATCH, TIME // 4, 16)
    # One layer against numpy: a circular convolution, batch statistics, ELU, maximum of three.
    layer = baselines.Distil()
    x = np.random.default_rng(7).normal(size=(BATCH, 9, 16)).astype(np.float32)
    variables = drawn(jax.eval_shape(layer.init, jax.random.key(0), x))
    y, changed = compiled(layer)(variables, x, deterministic=False, mutable="batch_stats")
    kernel, bias = (np.float64(variables["params"]["conv"][name]) for name in ("kernel", "bias"))
    h = sum(np.roll(np.float64(x), 1 - tap, axis=1) @ kernel[tap] for tap in range(3)) + bias
    mean, variance = h.mean(axis=(0, 1)), h.var(axis=(0, 1))
    h = (h - mean) / np.sqrt(variance + 1e-5) + np.float64(variables["params"]["norm"]["bias"])
    h = np.where(h > 0, h, np.expm1(np.minimum(h, 0)))
    expected = [h[:, max(2 * i - 1, 0) : 2 * i + 2].max(axis=1) for i in range(5)]
    np.testing.assert_allclose(y, np.stack(expected, axis=1), atol=ATOL)
    np.testing.assert_allclose(changed["batch_stats"]["norm"]["mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["norm"]["var"], 0.9 + 0.1 * variance, rtol=1e-5)


def test_informer_trains(window):
    model = VANILLA.clone(attention="probsparse", factor=3, distil=True)
    variables = initial(model)
    options = {"deterministic": False, "mutable": "batch_stats", "rngs": {"dropout": jax.random.key(0)}}
    y, changed = jax.eval_shape(partial(model.apply, variables, **options), window)
    assert y.shape == (BATCH, HORIZON, VARIATES)
    assert jax.tree.structure(changed["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_dlinear_is_two_linear_maps(window):
    model = DLinear(HORIZON, kernel=5)
    start = jax.jit(model.init)(jax.random.key(0, impl="unsafe_rbg"), window)["params"]  # compiles fast
    for part in ("trend", "remainder"):
        np.testing.assert_allclose(start[part]["kernel"], 1 / TIME, rtol=1e-6)
        assert 0.5 * TIME**-0.5 < np.abs(start[part]["bias"]).max() <= TIME**-0.5
    params = initial(model)["params"]
    trend = np.empty_like(window)
    for t in range(TIME):
        trend[:, t] = np.mean([window[:, min(max(s, 0), TIME - 1)] for s in range(t - 2, t + 3)], axis=0)
    expected = dense(params["trend"], trend.swapaxes(1, 2)) + dense(
        params["remainder"], (window - trend).swapaxes(1, 2)
    )
    np.testing.assert_allclose(compiled(model)({"params": params}, window), expected.swapaxes(1, 2), atol=5e-5)


def test_rlinear_is_one_linear_map(window):
    model = RLinear(HORIZON)
    variables = initial(model)
    x = np.float64(window)
    mean, std = x.mean(axis=1, keepdims=True), np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    y = dense(variables["params"]["projection"], ((x - mean) / std).swapaxes(1, 2)).swapaxes(1, 2)
    np.testing.assert_allclose(compiled(model)(variables, window), y * std + mean, atol=ATOL)


def test_patches_overlap_and_repeat_the_last_value():
    series = np.arange(96, dtype=np.float32)[None]
    cut = np.asarray(baselines.patches(series, 16, 8))
    assert cut.shape == (1, 12, 16)  # the card: 12 patches of T = 96
    for p, s in np.ndindex(12, 16):
        assert cut[0, p, s] == min(8 * p + s, 95)


def test_patchtst_is_its_formula(window):
    variables, apply = initial(PATCHES), compiled(PATCHES)
    params, block = variables["params"], variables["params"]["layers_0"]
    assert np.abs(params["positions"]).max() <= 0.02
    x = np.float64(window)
    mean, std = x.mean(axis=1, keepdims=True), np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    series = ((x - mean) / std).swapaxes(1, 2).reshape(-1, TIME)
    h = dense(params["embedding"], np.asarray(baselines.patches(np.float32(series), 6, 3)))
    h = h + np.float64(params["positions"])
    # Running statistics begin as mean 0 and variance 1.
    h = (h + attend(block["tokens"], h)) / np.sqrt(1 + 1e-5) + np.float64(block["tokens_norm"]["bias"])
    h = (h + feed_forward(block["features"], h)) / np.sqrt(1 + 1e-5) + np.float64(block["features_norm"]["bias"])
    y = dense(params["projection"], h.reshape(len(h), -1)).reshape(BATCH, VARIATES, HORIZON).swapaxes(1, 2)
    np.testing.assert_allclose(apply(variables, window), y * std + mean, atol=ATOL)


def test_patchtst_is_channel_independent_and_gathers_statistics(window):
    variables, apply = initial(PATCHES), compiled(PATCHES)
    other = np.concatenate([window[..., :3], window[..., 3:] ** 2], axis=-1)
    np.testing.assert_allclose(apply(variables, other)[..., :3], apply(variables, window)[..., :3], atol=1e-5)
    options = {"deterministic": False, "mutable": "batch_stats", "rngs": {"dropout": jax.random.key(0)}}
    _, changed = jax.eval_shape(partial(PATCHES.apply, variables, **options), window)
    assert set(changed["batch_stats"]["layers_0"]) == {"tokens_norm", "features_norm"}


MODELS = (MODEL, VANILLA, DLinear(HORIZON), RLinear(HORIZON), PATCHES)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_bad_windows_are_refused(model):
    def check(message, x, *marks, model=model):
        with pytest.raises(ValueError, match=message):
            model.init(jax.random.key(0), x, *marks)

    x = np.zeros((BATCH, TIME, VARIATES), np.float32)
    check("window and pred_len need at least 1 step, got 24 and 0", x, model=model.clone(pred_len=0))
    check("window and pred_len need at least 1 step, got 0 and 12", x[:, :0])
    check(r"batch and time \(2, 24\), got \(2, 23\)", x, np.zeros((BATCH, TIME - 1, MARKS), np.float32))
    x[1, 3, 2] = np.nan
    check("x contains NaN", x)


def test_bad_input_is_refused(window):
    key, mark = jax.random.key(0), np.zeros((BATCH, TIME, MARKS), np.float32)
    for message, model in (
        ("5 heads do not divide the width 16", MODEL.clone(num_heads=5)),
        ("5 heads do not divide the width 16", MODEL.clone(num_heads=5, attention="lsh")),
        ("attention 'linear' is unknown", MODEL.clone(attention="linear")),
        ("component 'mlp' is unknown", MODEL.clone(temporal="mlp")),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, key, window)
    _, stats = itransformer.instance_norm(window)
    with pytest.raises(ValueError, match="stats are of 7 variates, got 6"):
        itransformer.instance_denorm(window[..., :6], stats)
    for size in (0, 8):
        with pytest.raises(ValueError, match=f"1 to 7 of them, got {size}"):
            itransformer.random_variate_subset(key, 7, size)
    with pytest.raises(ValueError, match="label_len must be between 0 and the window's 24 steps, got 25"):
        VANILLA.clone(label_len=25).init(key, window)
    for marks in ((mark,), (None, mark[:, :HORIZON]), (mark, mark[:, : HORIZON - 1])):
        with pytest.raises(ValueError, match=r"go together, the latter of batch and time \(2, 12\)"):
            VANILLA.init(key, window, *marks)
    for kernel in (0, 4):
        with pytest.raises(ValueError, match=f"kernel must be odd and at least 1, got {kernel}"):
            DLinear(HORIZON, kernel=kernel).init(key, window)
    with pytest.raises(ValueError, match="patch_len <= 27 = time"):
        PATCHES.clone(patch_len=28).init(key, window)
    for model in (MODEL.clone(attention="flow"), MODEL.clone(variate="none")):
        with pytest.raises(ValueError, match="only full and flash attention"):
            itransformer.analyse(model, {}, window)
    with pytest.raises(ValueError, match=r"'encoder\.attn_layers\.0\.norm4\.weight' is no parameter"):
        params_from_torch({"encoder.attn_layers.0.norm4.weight": np.zeros(3)})
