"""Rotary positions, causal attention with and without a cache, SwiGLU, against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nn.transformer import CausalSelfAttention, SwiGLU, rotary, swiglu_width

BATCH, STEPS, WIDTH, HEADS = 2, 7, 16, 2
X = jax.random.normal(jax.random.key(0), (BATCH, STEPS, WIDTH))


def turn(x, positions):
    """The rotation of every pair as a complex multiplication."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.fixture(scope="module", params=[True, False], ids=["rotary", "plain"])
def layer(request):
    module = CausalSelfAttention(HEADS, rotary=request.param)
    return module, jax.jit(module.init)(jax.random.key(1), X)["params"]


def by_hand(module, params, x):
    x = np.float64(x)
    q, k, v = (np.einsum("btw,whd->bthd", x, np.float64(params[name]["kernel"])) for name in ("query", "key", "value"))
    if module.rotary:
        q, k = (turn(each, np.arange(x.shape[1])) for each in (q, k))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = np.exp(k[b, : t + 1, h] @ q[b, t, h] / np.sqrt(q.shape[-1]))
        out[b, t, h] = scores @ v[b, : t + 1, h] / scores.sum()
    return np.einsum("bthd,hdw->btw", out, np.float64(params["out"]["kernel"]))


def test_attention_is_the_loop_over_positions(layer):
    module, params = layer
    ours = jax.jit(module.apply)({"params": params}, X)
    np.testing.assert_allclose(ours, by_hand(module, params, X), rtol=1e-4, atol=1e-5)  # float32


def test_a_cache_continues_the_sequence(layer):
    module, params = layer
    expected = module.apply({"params": params}, X)
    cached = module.clone(cache_length=STEPS + 1)
    cache = empty_cache(cached)
    step = jax.jit(partial(cached.apply, mutable="cache"))
    pieces = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out, changed = step({"params": params, "cache": cache}, X[:, start:stop])
        cache = changed["cache"]
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, rtol=1e-5, atol=1e-6)  # float32
    last, changed = step({"params": params, "cache": cache}, X[:, :1])
    assert jnp.isfinite(last).all()
    assert changed["cache"]["index"] == STEPS + 1
    beyond, _ = step({"params": params, "cache": changed["cache"]}, X[:, :1])
    assert jnp.isnan(beyond).all()


def empty_cache(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X[:, :1])["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def test_rotary_products_depend_on_the_distance_alone():
    x = np.float32(np.random.default_rng(0).normal(size=(1, 2, 1, 8)))
    np.testing.assert_allclose(rotary(x, np.array([3, 11])), turn(x, np.array([3, 11])), rtol=1e-5, atol=1e-6)
    near, far = (rotary(x, np.array([start, start + 5])) for start in (0, 100))
    product = lambda pair: jnp.sum(pair[0, 0] * pair[0, 1])  # noqa: E731
    np.testing.assert_allclose(product(near), product(far), rtol=1e-4)  # angles of 100 radians in float32


def test_half_precision_keeps_its_type(layer):
    module, params = layer
    out = module.clone(dtype=jnp.bfloat16).apply({"params": params}, X)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), module.apply({"params": params}, X), atol=0.05)  # 8 bits


def test_swiglu():
    module = SwiGLU(hidden=24)
    params = module.init(jax.random.key(0), X)["params"]
    gate, up, down = (np.float64(params[name]["kernel"]) for name in ("gate", "up", "down"))
    x = np.float64(X)
    expected = ((x @ gate) / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(module.apply({"params": params}, X), expected, rtol=1e-4, atol=1e-5)  # float32
    shapes = jax.eval_shape(SwiGLU().init, jax.random.key(0), X)["params"]
    assert shapes["up"]["kernel"].shape == (WIDTH, 256)


@pytest.mark.parametrize(("width", "hidden"), [(96, 256), (97, 512), (1024, 2816), (2048, 5632), (4096, 11008)])
def test_swiglu_width(width, hidden):
    assert swiglu_width(width) == hidden


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        CausalSelfAttention(3).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="even head_dim, got 1"):
        CausalSelfAttention(WIDTH).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="7 tokens are more than the cache of length 4"):
        CausalSelfAttention(HEADS, cache_length=4).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="chunk=2 has no meaning with a cache"):
        CausalSelfAttention(HEADS, cache_length=8, chunk=2).init(jax.random.key(0), X)
