"""Encoder and decoder blocks against numpy in float64, PyTorch's two ways to initialise, dropout."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jaxpapers.nn.attention import flash_attention, flow_attention, full_attention, probsparse_attention
from jaxpapers.nn.encoder import DecoderBlock, EncoderBlock, EncoderMLP, MultiHeadAttention, sinusoidal_positions

BATCH, TOKENS, OTHERS, WIDTH, HEADS, HIDDEN = 2, 6, 9, 16, 4, 24
X = np.random.default_rng(0).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
MEMORY = np.random.default_rng(1).normal(size=(BATCH, OTHERS, WIDTH)).astype(np.float32)


@cache
def compiled(module):
    return jax.jit(module.apply, static_argnames=("deterministic", "mutable"))


def init(module, *arguments):
    """Parameters of which none is 0 or 1, so that each of them shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, shapes)


def dense(params, x):
    return x @ np.float64(params["kernel"]) + np.float64(params["bias"])


def attention_by_hand(params, x, memory, causal=False):
    q, k, v = (dense(params[name], each) for name, each in (("query", x), ("key", memory), ("value", memory)))
    out, size = np.zeros_like(q), WIDTH // HEADS
    for b, t, h in np.ndindex(*x.shape[:2], HEADS):
        head = slice(h * size, (h + 1) * size)
        seen = slice(t + 1 if causal else None)
        out[b, t, head] = softmax(k[b, seen, head] @ q[b, t, head] / np.sqrt(size)) @ v[b, seen, head]
    return dense(params["out"], out)


def mlp_by_hand(params, x):
    hidden = dense(params["up"], x)
    return dense(params["down"], hidden * (1 + erf(hidden / np.sqrt(2))) / 2)


def norm_by_hand(params, x, epsilon=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return scaled * np.float64(params["scale"]) + np.float64(params["bias"])


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["self", "cross"])
def test_attention_is_the_loop_over_tokens(memory):
    module = MultiHeadAttention(HEADS)
    params = init(module, X)
    arguments = (X,) if memory is None else (X, memory)
    expected = attention_by_hand(params, np.float64(X), np.float64(arguments[-1]))
    np.testing.assert_allclose(compiled(module)({"params": params}, *map(jnp.asarray, arguments)), expected, atol=2e-5)


@pytest.mark.parametrize(("norm", "epsilon"), [("post", 1e-5), ("pre", 0.5)])
def test_block_is_its_formula(norm, epsilon):
    module = EncoderBlock(HEADS, HIDDEN, norm=norm, epsilon=epsilon)
    params = init(module, X)
    x = np.float64(X)
    attention = lambda x: attention_by_hand(params["attention"], x, x)  # noqa: E731
    mlp = lambda x: mlp_by_hand(params["mlp"], x)  # noqa: E731
    first, second = (
        lambda x, name=name: norm_by_hand(params[name], x, epsilon) for name in ("attention_norm", "mlp_norm")
    )
    if norm == "post":
        x = first(x + attention(x))
        expected = second(x + mlp(x))
    else:
        x = x + attention(first(x))
        expected = x + mlp(second(x))
    np.testing.assert_allclose(compiled(module)({"params": params}, jnp.asarray(X)), expected, atol=2e-5)  # float32


@pytest.mark.parametrize("attention", [full_attention, partial(flash_attention, block_size=4)], ids=["full", "flash"])
def test_decoder_block_is_its_formula(attention):
    module = DecoderBlock(HEADS, HIDDEN, attention=attention, epsilon=1e-3)
    params = init(module, X, MEMORY)
    norm = lambda name, x: norm_by_hand(params[name], x, 1e-3)  # noqa: E731
    x, memory = np.float64(X), np.float64(MEMORY)
    x = norm("self_norm", x + attention_by_hand(params["self_attention"], x, x, causal=True))
    x = norm("cross_norm", x + attention_by_hand(params["cross_attention"], x, memory))
    expected = norm("mlp_norm", x + mlp_by_hand(params["mlp"], x))
    ours = compiled(module)({"params": params}, jnp.asarray(X), jnp.asarray(MEMORY))
    np.testing.assert_allclose(ours, expected, atol=3e-5)  # float32


def test_decoder_block_drops_all_branches():
    module = DecoderBlock(HEADS, HIDDEN, dropout_rate=0.5)
    params = init(module, X, MEMORY)
    drop, tokens = partial(compiled(module), deterministic=False), (jnp.asarray(X), jnp.asarray(MEMORY))
    branches = ("self_attention", "cross_attention", "mlp")
    for branch in branches:
        zeros = {other: jax.tree.map(np.zeros_like, params[other]) for other in branches if other != branch}
        alone = {"params": {**params, **zeros}}
        one, other = (drop(alone, *tokens, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
        assert np.abs(one - other).max() > 1e-2


def test_sinusoidal_positions():
    table = sinusoidal_positions(10, 6)
    for t, i in np.ndindex(10, 3):
        angle = t / 10_000 ** (2 * i / 6)
        np.testing.assert_allclose(table[t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-12)
    assert sinusoidal_positions(4, 5).shape == (4, 5)


@pytest.mark.parametrize("attention", [flow_attention, probsparse_attention, partial(probsparse_attention, factor=9)])
def test_no_maps_are_sown_where_none_were_used(attention):
    module = MultiHeadAttention(HEADS, attention)
    apply = partial(module.apply, mutable="intermediates")
    _, sown = jax.eval_shape(apply, {"params": init(module, X)}, jnp.asarray(X))
    assert not sown


def test_maps_of_a_decoder_see_the_past_alone_and_the_whole_memory():
    module = DecoderBlock(HEADS, HIDDEN, attention=flash_attention)
    params = init(module, X, MEMORY)
    _, sown = compiled(module)({"params": params}, jnp.asarray(X), jnp.asarray(MEMORY), mutable="intermediates")
    (own,), (cross,) = (sown["intermediates"][f"{name}_attention"]["attention_weights"] for name in ("self", "cross"))
    assert (np.triu(own, 1) == 0).all()
    assert (own.shape, cross.shape) == ((BATCH, HEADS, TOKENS, TOKENS), (BATCH, HEADS, TOKENS, OTHERS))
    assert (cross > 0).all()
    for maps in (own, cross):
        np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)


def test_maps_are_sown_where_they_are_wanted():
    module = MultiHeadAttention(HEADS)
    params = init(module, X)
    x = jnp.asarray(X)
    out, sown = compiled(module)({"params": params}, x, mutable="intermediates")
    (maps,) = sown["intermediates"]["attention_weights"]
    np.testing.assert_allclose(out, compiled(module)({"params": params}, x), atol=1e-6)
    assert maps.shape == (BATCH, HEADS, TOKENS, TOKENS)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    v = dense(params["value"], np.float64(X)).reshape(BATCH, TOKENS, HEADS, -1)
    rebuilt = dense(params["out"], np.einsum("bhqk,bkhd->bqhd", maps, v).reshape(X.shape))
    np.testing.assert_allclose(out, rebuilt, atol=2e-5)  # float32
    assert set(jax.eval_shape(module.init, jax.random.key(0), x)) == {"params"}


def test_attention_takes_any_function():
    module = MultiHeadAttention(HEADS, flow_attention)
    params = init(module, X)
    q, k, v = (
        np.float32(dense(params[name], X)).reshape(BATCH, TOKENS, HEADS, -1) for name in ("query", "key", "value")
    )
    expected = dense(params["out"], np.asarray(jax.jit(flow_attention)(q, k, v)).reshape(X.shape))
    np.testing.assert_allclose(compiled(module)({"params": params}, jnp.asarray(X)), expected, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["four layers", "packed"])
def test_initialisation_is_pytorchs(packed):
    width = 64
    module = EncoderBlock(8, 128, packed=packed)
    params = jax.jit(module.init)(jax.random.key(0, impl="unsafe_rbg"), jnp.zeros((1, 3, width)))[
        "params"
    ]  # compiles fast
    # Xavier-uniform of a matrix (3 width, width), or U(+-1/sqrt(fan_in)).
    inputs = np.sqrt(6 / (3 * width + width)) if packed else width**-0.5
    bounds = {"query": inputs, "key": inputs, "value": inputs, "out": width**-0.5}
    for name, bound in bounds.items():
        check_uniform(params["attention"][name]["kernel"], bound)
        biases = np.asarray(params["attention"][name]["bias"])
        assert (biases == 0).all() if packed else 0 < np.abs(biases).max() <= width**-0.5
    check_uniform(params["mlp"]["up"]["kernel"], width**-0.5)
    check_uniform(params["mlp"]["down"]["kernel"], 128**-0.5)
    assert 0 < np.abs(params["mlp"]["down"]["bias"]).max() <= 128**-0.5


def check_uniform(kernel, bound):
    draws = np.asarray(kernel, np.float64).ravel()
    assert np.abs(draws).max() <= bound * (1 + 1e-6)  # the bound itself is rounded to float32
    # Variance bound^2 / 3; that of a uniform's sample variance is 4/5 of its square, over n: five deviations.
    np.testing.assert_allclose(draws.var(), bound**2 / 3, rtol=5 * np.sqrt(0.8 / draws.size))


def test_dropout_comes_from_the_stream_and_keeps_the_mean():
    x = jnp.ones((64, 8, WIDTH))
    module = EncoderMLP(512, activation=lambda x: x, dropout_rate=0.25)
    params = init(module, x)
    plain = compiled(module)({"params": params}, x)
    np.testing.assert_array_equal(plain, compiled(module)({"params": params}, x, deterministic=True))
    drop = compiled(module)
    first, again, other = (
        drop({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # A unit h kept with probability 3/4 at h / 0.75 has the variance h^2 / 3. 512 equal rows: five deviations.
    hidden = dense(params["up"], np.ones(WIDTH))
    deviation = np.sqrt(np.sum((hidden[:, None] * np.float64(params["down"]["kernel"])) ** 2, axis=0) / 3 / 512)
    assert (np.abs(np.mean(first, axis=(0, 1)) - np.asarray(plain)[0, 0]) < 5 * deviation).all()


def test_block_drops_both_branches():
    module = EncoderBlock(HEADS, HIDDEN, norm="pre", dropout_rate=0.5)
    params = init(module, X)
    apply, x = compiled(module), jnp.asarray(X)
    without = dict(params, mlp=jax.tree.map(np.zeros_like, params["mlp"]))
    change = np.asarray(apply({"params": without}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})) - X
    kept = change != 0
    whole = np.asarray(apply({"params": without}, x)) - X
    np.testing.assert_allclose(change[kept], 2 * whole[kept], rtol=1e-3, atol=1e-5)  # a difference of float32 numbers
    assert abs(kept.mean() - 0.5) < 5 * np.sqrt(0.25 / kept.size)
    without = dict(params, attention=jax.tree.map(np.zeros_like, params["attention"]))
    change = np.asarray(apply({"params": without}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})) - X
    assert abs((change != 0).mean() - 0.5) < 5 * np.sqrt(0.25 / change.size)


def test_half_precision_keeps_its_type():
    module = EncoderBlock(HEADS, HIDDEN, dtype=jnp.bfloat16)
    params = init(module, X)
    out = compiled(module)({"params": params}, jnp.asarray(X))
    assert out.dtype == jnp.bfloat16
    exact = compiled(module.clone(dtype=None))({"params": params}, jnp.asarray(X))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1)  # 8 bits through two branches


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        jax.eval_shape(MultiHeadAttention(3).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        jax.eval_shape(DecoderBlock(3, HIDDEN).init, jax.random.key(0), X, MEMORY)
    with pytest.raises(ValueError, match="norm 'both' is unknown"):
        EncoderBlock(HEADS, HIDDEN, norm="both").init(jax.random.key(0), jnp.asarray(X))
