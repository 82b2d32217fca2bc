"""Kinds of attention: golden figures of the authors' code, loops over tokens in numpy, and full attention."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from scipy.special import expit, logsumexp, softmax

from jaxpapers.nn.attention import (
    LSHSelfAttention,
    attention_weights,
    causal_attention,
    flash_attention,
    flow_attention,
    full_attention,
    lsh_attention,
    probsparse_attention,
    weights_of,
)
from jaxpapers.nn.dropout import keep_mask
from jaxpapers.train import jit_once

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer"
ATOL = 2e-5  # of the card: float32 on both sides

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 11, 14, 4, 4
full, flow, weights = jax.jit(full_attention), jax.jit(flow_attention), jax.jit(attention_weights)
flash = jax.jit(flash_attention, static_argnames=("block_size", "causal"))
probsparse = jax.jit(probsparse_attention, static_argnames=("factor", "reference_layout"))
lsh = jax.jit(lsh_attention, static_argnames=("bucket_size", "num_rounds"))


@pytest.fixture(scope="module")
def kernels():
    return dict(np.load(GOLDEN / "attention_kernels.npz"))


def draw(seed, queries=QUERIES, keys=KEYS, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, length, HEADS, DIM) for length in (queries, keys, keys)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def test_golden_full_and_flash(kernels):
    q, k, v = (kernels[name] for name in "qkv")
    mask = np.tri(QUERIES, dtype=bool)
    np.testing.assert_allclose(full(q, k, v), kernels["full"], atol=ATOL)
    np.testing.assert_allclose(full(q, k, v, mask=mask), kernels["full_causal"], atol=ATOL)
    np.testing.assert_allclose(flash(q, k, v, block_size=5, causal=True), kernels["full_causal"], atol=ATOL)
    cross = kernels["k_cross"], kernels["v_cross"]
    np.testing.assert_allclose(full(q, *cross), kernels["full_cross"], atol=ATOL)
    np.testing.assert_allclose(flash(q, *cross, block_size=5), kernels["full_cross"], atol=ATOL)


def test_golden_flow(kernels):
    q, k, v = (kernels[name] for name in "qkv")
    np.testing.assert_allclose(flow(q, k, v), kernels["flow"], atol=ATOL)
    np.testing.assert_allclose(flow(q, kernels["k_cross"], kernels["v_cross"]), kernels["flow_cross"], atol=ATOL)


def test_golden_probsparse_and_its_layout(kernels):
    q, k, v = (kernels[name] for name in "qkv")
    ours = partial(probsparse, factor=int(kernels["prob_factor"]), sampled=kernels["prob_index_sample"])
    np.testing.assert_allclose(ours(q, k, v), kernels["prob"].swapaxes(1, 2), atol=ATOL)
    misread = kernels["prob"].reshape(BATCH, QUERIES, HEADS, DIM)
    np.testing.assert_allclose(ours(q, k, v, reference_layout=True), misread, atol=ATOL)
    # Values that are the unit vectors show the weights.
    units = np.broadcast_to(np.eye(QUERIES, dtype=np.float32)[None, :, None], (BATCH, QUERIES, HEADS, QUERIES))
    np.testing.assert_allclose(ours(q, k, units), kernels["prob_attn"].swapaxes(1, 2), atol=ATOL)


def test_golden_lsh_layer():
    golden = np.load(GOLDEN / "lsh_layer.npz")
    layer = LSHSelfAttention(int(golden["n_heads"]))
    params = {
        "query_key": {"kernel": golden["w.attn.toqk.weight"].T},
        "value": {"kernel": golden["w.attn.tov.weight"].T},
        "out": {"kernel": golden["w.attn.to_out.weight"].T, "bias": golden["w.attn.to_out.bias"]},
    }
    x = jnp.asarray(golden["x"])
    apply = jax.jit(partial(layer.apply, rotations=golden["rotations"][0]))
    np.testing.assert_allclose(apply({"params": params}, x), golden["y"], atol=ATOL)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def test_full_attention_is_the_loop():
    q, k, v = draw(0)
    expected = np.zeros((BATCH, QUERIES, HEADS, DIM))
    for b, t, h in np.ndindex(BATCH, QUERIES, HEADS):
        expected[b, t, h] = softmax(k[b, :, h] @ np.float64(q[b, t, h]) / np.sqrt(DIM)) @ v[b, :, h]
    np.testing.assert_allclose(full(q, k, v), expected, atol=1e-6)  # float32
    np.testing.assert_allclose(weights(q, k).sum(axis=-1), 1, atol=1e-6)


def test_dropout_of_the_weights():
    q, k, _ = draw(1)
    v = np.broadcast_to(np.eye(KEYS, dtype=np.float32)[None, :, None], (BATCH, KEYS, HEADS, KEYS))
    dropped = jax.jit(partial(full_attention, dropout_rate=0.25))
    plain = np.asarray(full(q, k, v))
    np.testing.assert_array_equal(dropped(q, k, v), plain)  # no key, no dropout
    once = np.asarray(dropped(q, k, v, key=jax.random.key(0)))
    kept = once > 0
    np.testing.assert_allclose(once[kept], plain[kept] / 0.75, rtol=1e-6)
    # A share of n = 1232 draws: four standard deviations.
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)


def test_gradients_are_those_of_the_plain_formula_whatever_is_dropped_or_masked():
    q, k, v = (x.astype(np.float64) for x in draw(2))
    mask = np.arange(KEYS) <= np.arange(QUERIES)[:, None] + 2
    key = jax.random.key(3)

    def plain(q, k, v):
        kept = keep_mask(key, 0.25, (BATCH * HEADS, QUERIES, KEYS)).reshape(BATCH, HEADS, QUERIES, KEYS)
        dropped = jnp.where(kept, attention_weights(q, k, mask) / 0.75, 0)
        return jnp.einsum("bhqk,bkhd->bqhd", dropped, v)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2)))(q, k, v)

    with jax.enable_x64(True):
        ours = partial(full_attention, key=key, mask=mask, dropout_rate=0.25)
        for found, expected in zip(gradients(ours), gradients(plain), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_flash_is_full(block_size):
    q, k, v = draw(2)
    # The sums run in another order.
    np.testing.assert_allclose(flash(q, k, v, block_size=block_size), full(q, k, v), atol=1e-6)


def test_flash_has_the_derivatives_of_full_attention():
    with jax.enable_x64(True):
        q, k, v = draw(3, dtype=np.float64)
        weight = np.random.default_rng(4).normal(size=(BATCH, QUERIES, HEADS, DIM))

        def loss(attention, *qkv):
            return jnp.sum(weight * attention(*qkv) ** 2)

        ours = jax.jit(jax.grad(partial(loss, partial(flash_attention, block_size=5)), (0, 1, 2)))(q, k, v)
        expected = jax.jit(jax.grad(partial(loss, full_attention), (0, 1, 2)))(q, k, v)
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


@given(
    tokens=st.sampled_from([1, 2, 7, 11]),
    block_size=st.sampled_from([1, 3, 4, 32]),
    sizes=st.sampled_from([(1, 1, 3, 5), (2, 3, 4, 2)]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=7)
def test_causal_flash_is_full_attention_with_a_mask_and_so_are_its_derivatives(tokens, block_size, sizes, seed):
    batch, heads, head_dim, value_dim = sizes
    rng = np.random.default_rng(seed)
    q, k, v, g = (rng.normal(size=(batch, tokens, heads, d)) for d in (head_dim, head_dim, value_dim, value_dim))

    def both(q, k, v, g):
        found = []
        for attention in (
            partial(flash_attention, causal=True, block_size=block_size),
            partial(full_attention, mask=np.tri(tokens, dtype=bool)),
        ):
            out, pull = jax.vjp(attention, q, k, v)
            found.append((out, *pull(g)))
        return found

    with jax.enable_x64(True):
        ours, expected = jit_once(both)(q, k, v, g)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), ours, expected)


def test_a_mask_and_causality_hide_what_either_hides():
    q, k, v = draw(20, 6, 6)
    mask = np.random.default_rng(21).uniform(size=(BATCH, HEADS, 6, 6)) > 0.5
    mask[..., 0] = True  # each query needs a key
    ours = jit_once(partial(full_attention, causal=True))(q, k, v, mask=mask)
    np.testing.assert_array_equal(ours, full(q, k, v, mask=mask & np.tri(6, dtype=bool)))
    shares = jit_once(partial(attention_weights, causal=True))(q, k, mask)
    assert (np.asarray(shares)[~(mask & np.tri(6, dtype=bool))] == 0).all()
    np.testing.assert_allclose(np.einsum("bhqk,bkhd->bqhd", shares, v), ours, atol=1e-6)  # float32


@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
def test_causal_attention_by_chunks_of_queries_is_full_attention(chunk):
    with jax.enable_x64(True):
        q, k, v, g = (np.random.default_rng(seed).normal(size=(2, 7, 3, 4)) for seed in range(4))

        def both(attention):
            y, pull = jax.vjp(attention, q, k, v)
            return y, *pull(g)

        ours, whole, expected = (
            jit_once(partial(both, attention))()
            for attention in (
                partial(causal_attention, chunk=chunk),
                causal_attention,
                partial(full_attention, causal=True),
            )
        )
        for found in (ours, whole):
            jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), found, expected)


def test_causal_attention_by_chunks_never_holds_all_weights():
    q = jnp.zeros((1, 64, 2, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda q: causal_attention(q, q, q, chunk=8).sum()))(q))
    assert ",8,64]" in text
    assert ",64,64]" not in text


@pytest.mark.parametrize(
    "attention",
    [
        full_attention,
        partial(full_attention, mask=np.tri(6, k=1, dtype=bool), dropout_rate=0.5),
        partial(full_attention, mask=np.tri(6, k=1, dtype=bool)[::-1, ::-1], causal=True),
        partial(flash_attention, causal=True, block_size=4),
        partial(causal_attention, chunk=4),
    ],
    ids=["full", "masked", "masked and causal", "flash", "causal"],
)
def test_weights_are_those_that_the_function_applies(attention):
    q, k, _ = draw(22, 6, 6)
    # Values that are the unit vectors show the weights.
    units = np.broadcast_to(np.eye(6, dtype=np.float32)[None, :, None], (BATCH, 6, HEADS, 6))
    if isinstance(attention, partial) and attention.func is causal_attention:  # its heads' widths are equal
        q, k = (np.pad(each, ((0, 0), (0, 0), (0, 0), (0, 2))) * (6 / 4) ** 0.25 for each in (q, k))
    applied = jnp.moveaxis(jit_once(attention)(q, k, units), 2, 1)
    np.testing.assert_allclose(jit_once(weights_of(attention))(q, k), applied, atol=1e-6)  # float32


def test_other_functions_have_no_such_weights():
    for attention in (flow_attention, partial(probsparse_attention, causal=True), lambda q, k, v, key=None: v):
        assert weights_of(attention) is None


def test_flash_survives_logits_beyond_the_range_of_exp():
    q, k, v = draw(5)
    # The largest block comes last, so that the running maximum has to give way.
    k = k * np.linspace(1, 300, KEYS, dtype=np.float32)[:, None, None]
    np.testing.assert_allclose(flash(q, k, v, block_size=5), full(q, k, v), atol=1e-5)


def largest_array(function, *arguments):
    """Elements of the largest array that the program holds, inner programs included."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.mark.parametrize(
    ("attention", "linear"),
    [
        (full_attention, False),
        (flash_attention, True),
        (partial(flash_attention, causal=True), True),
        (flow_attention, True),
        (lsh_attention, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(getattr(value, "keywords", ""))),
)
def test_memory_grows_with_tokens_or_with_their_square(attention, linear):
    def derivative(*arguments):
        return jax.grad(lambda *a: attention(*a).sum(), tuple(range(len(arguments))))(*arguments)

    few, many = (draw(6, length, length)[attention is lsh_attention :] for length in (256, 512))
    ratio = largest_array(derivative, *many) / largest_array(derivative, *few)
    # LSH attention has as many hash values for a token as there are buckets.
    assert ratio == (2 if linear else 4)


def test_flow_attention_is_the_card_line_by_line():
    q, k, v = draw(7, dtype=np.float64)
    expected, epsilon = np.zeros((BATCH, QUERIES, HEADS, DIM)), 1e-6
    for b, h in np.ndindex(BATCH, HEADS):
        Q, K, V = expit(q[b, :, h]), expit(k[b, :, h]), v[b, :, h]
        I = 1 / ((Q + epsilon) @ (K.sum(axis=0) + epsilon))
        O = 1 / ((K + epsilon) @ (Q.sum(axis=0) + epsilon))
        I_hat = (Q + epsilon) @ ((K * O[:, None]).sum(axis=0) + epsilon)
        O_hat = (K + epsilon) @ ((Q * I[:, None]).sum(axis=0) + epsilon)
        allocation, competition = expit(I_hat * QUERIES / KEYS), softmax(O_hat) * KEYS
        expected[b, :, h] = (Q @ (K.T @ (V * competition[:, None]))) * (I * allocation)[:, None]
    with jax.enable_x64(True):
        np.testing.assert_allclose(flow(q, k, v), expected, atol=1e-12)
        u = draw(8, dtype=np.float64)[2]
        np.testing.assert_allclose(flow(q, k, 2 * v - 3 * u), 2 * flow(q, k, v) - 3 * flow(q, k, u), atol=1e-12)


def test_probsparse_is_the_loop_over_queries():
    q, k, v = draw(9)
    sampled = np.random.default_rng(10).integers(0, KEYS, (QUERIES, 5))
    ours = probsparse(q, k, v, factor=2, sampled=sampled)
    kept = 2 * int(np.ceil(np.log(QUERIES)))
    for b, h in np.ndindex(BATCH, HEADS):
        measure = []
        for t in range(QUERIES):
            products = [q[b, t, h] @ k[b, index, h] for index in sampled[t]]
            measure.append(max(products) - sum(products) / KEYS)
        picked = np.argsort(measure)[-kept:]
        for t in range(QUERIES):
            shares = softmax(k[b, :, h] @ q[b, t, h] / np.sqrt(DIM)) if t in picked else np.full(KEYS, 1 / KEYS)
            np.testing.assert_allclose(ours[b, t, h], shares @ v[b, :, h], atol=1e-6)  # float32


def test_probsparse_with_all_queries_is_full():
    q, k, v = draw(11)
    np.testing.assert_allclose(probsparse(q, k, v, factor=99), full(q, k, v), atol=1e-6)
    one = (each[:, :1] for each in (q, k, v))
    np.testing.assert_allclose(probsparse(*one), v[:, :1], atol=1e-6)  # ln 1 = 0, but one query there must be


def test_probsparse_draws_from_its_key():
    q, k, v = draw(12)
    ours = partial(probsparse, factor=1, reference_layout=False, sampled=None)
    np.testing.assert_array_equal(ours(q, k, v), ours(q, k, v))
    one, again, other = (ours(q, k, v, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2


def lsh_by_hand(qk, v, rotations, bucket_size):
    """Reformer token by token: hash, sort, cut, look at the own chunk and the one before, average the rounds."""
    tokens, rounds = len(qk), rotations.shape[1]
    directions = qk / np.maximum(np.linalg.norm(qk, axis=-1, keepdims=True), 1e-12)
    order = []
    for r in range(rounds):
        turned = qk @ rotations[:, r]
        hashes = np.argmax(np.concatenate([turned, -turned], axis=-1), axis=-1)
        order += [(r, t) for _, t in sorted(zip(hashes, range(tokens), strict=True))]
    outs, totals = np.zeros((rounds, tokens, v.shape[-1])), np.zeros((rounds, tokens))
    for place, (r, t) in enumerate(order):
        start = place // bucket_size * bucket_size
        seen = [order[i][1] for i in [*range(start, start + bucket_size), *range(start - bucket_size, start)]]
        logits = np.array([-5e4 if s == t else qk[t] @ directions[s] / np.sqrt(len(qk[t])) for s in seen])
        outs[r, t], totals[r, t] = softmax(logits) @ v[seen], logsumexp(logits)
    return np.einsum("rt,rtd->td", softmax(totals, axis=0), outs)


def test_lsh_attention_is_the_loop_over_tokens_and_its_derivative_the_difference():
    tokens = 24
    rng = np.random.default_rng(13)
    qk, v, along_qk, along_v = rng.normal(size=(4, BATCH, tokens, HEADS, DIM))
    qk[:, -3:] = along_qk[:, -3:] = 0  # tokens of padding, whose direction is not defined
    rotations = rng.normal(size=(DIM, 4, tokens // 4 // 2))
    with jax.enable_x64(True):
        ours = lsh(qk, v, rotations=rotations)
        for b, h in np.ndindex(BATCH, HEADS):
            expected = lsh_by_hand(qk[b, :, h], v[b, :, h], rotations, 4)
            np.testing.assert_allclose(ours[b, :, h], expected, atol=1e-12)
        np.testing.assert_allclose(lsh(qk, np.ones_like(v), rotations=rotations), 1, atol=1e-12)
        weight = rng.normal(size=v.shape)
        loss = lambda qk, v: jnp.sum(weight * lsh_attention(qk, v, rotations=rotations))  # noqa: E731
        grads = jax.jit(jax.grad(loss, (0, 1)))(qk, v)
        assert all(np.isfinite(grad).all() for grad in grads)
        step = 1e-5
        ends = [lsh(qk + s * along_qk, v + s * along_v, rotations=rotations) for s in (step, -step)]
        difference = np.sum(weight * (ends[0] - ends[1])) / (2 * step)
        slope = np.sum(grads[0] * along_qk) + np.sum(grads[1] * along_v)
        np.testing.assert_allclose(slope, difference, rtol=1e-7)  # step^2 and rounding / step


def test_lsh_attention_of_few_tokens_is_full_without_hashing():
    _, qk, v = draw(15, 3, 3)
    out = np.asarray(lsh(qk, v))
    for b, t, h in np.ndindex(BATCH, 3, HEADS):
        others = [s for s in range(3) if s != t]
        directions = qk[b, others, h] / np.linalg.norm(qk[b, others, h], axis=-1, keepdims=True)
        expected = softmax(directions @ qk[b, t, h] / np.sqrt(DIM)) @ v[b, others, h]
        np.testing.assert_allclose(out[b, t, h], expected, atol=1e-6)  # float32
    np.testing.assert_allclose(lsh(qk[:, :1], v[:, :1]), v[:, :1], atol=1e-6)


def test_lsh_layer_draws_rotations_in_training():
    layer = LSHSelfAttention(HEADS)
    x = jax.random.normal(jax.random.key(0), (BATCH, 21, 16))
    # A generator that compiles fast.
    variables = jax.jit(layer.init)(jax.random.key(1, impl="unsafe_rbg"), x)
    train = jax.jit(lambda key: layer.apply(variables, x, deterministic=False, rngs={"dropout": key}))
    first, again, other = (train(jax.random.key(seed)) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4
    assert set(variables["params"]["query_key"]) == set(variables["params"]["value"]) == {"kernel"}
    bound = 16**-0.5
    assert bound * 0.95 < np.abs(variables["params"]["query_key"]["kernel"]).max() <= bound * (1 + 1e-6)


def test_half_precision_stays_close():
    q, k, v = draw(18, 16, 16)
    halves = [jnp.asarray(each, jnp.bfloat16) for each in (q, k, v)]
    for attention in (full, flash, flow, probsparse, lambda q, k, v: lsh_attention(k, v)):
        assert jax.eval_shape(attention, *halves).dtype == jnp.bfloat16
    exact = flash(*(np.float32(each) for each in halves), block_size=5)
    np.testing.assert_allclose(flash(*halves, block_size=5).astype(jnp.float32), exact, atol=0.03)  # 8 bits of 2


def test_logits_of_halves_have_the_digits_of_float32():
    q, k = (jnp.asarray(8 * x, jnp.bfloat16) for x in np.random.default_rng(0).normal(size=(2, 1, 16, 1, 24)))
    v = jnp.asarray(np.eye(16)[None, :, None], jnp.bfloat16)  # the result are the weights
    exact = attention_weights(q.astype(jnp.float32), k.astype(jnp.float32))[0, 0]
    found = full(q, k, v)[0, :, 0].astype(jnp.float32)
    # Weights lose digits once more where they multiply v; logits of up to 80 would lose .2 themselves.
    np.testing.assert_allclose(found, exact, rtol=2**-7, atol=1e-6)


def test_bad_input_is_refused():
    q, k, v = draw(19)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        flash_attention(q, k, v, block_size=0)
    for attention in (full_attention, flash_attention, probsparse_attention):
        with pytest.raises(ValueError, match="tokens to themselves, got 11 queries and 14 keys"):
            attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="attention's chunk must be at least 1, got 0"):
        causal_attention(k, k, v, chunk=0)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        probsparse_attention(q, k, v, factor=0)
    with pytest.raises(ValueError, match="a row for each of the 11 queries, got 3"):
        probsparse_attention(q, k, v, sampled=np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        lsh_attention(k, v, bucket_size=0)
    with pytest.raises(ValueError, match="14 tokens are not a multiple of 2 bucket_size = 8"):
        lsh_attention(k, v)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\), got \(4, 4, 2\)"):
        lsh_attention(k[:, :8], v[:, :8], rotations=np.zeros((4, 4, 2)))
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        LSHSelfAttention(3).init(jax.random.key(0), jnp.zeros((1, 8, 16)))


@pytest.mark.parametrize("factor", [1, 9], ids=["some", "all"])
def test_causal_probsparse_attention_is_its_formula(factor):
    rng = np.random.default_rng(8)
    q, k, v = rng.normal(size=(3, 2, 11, 3, 4)).astype(np.float32)
    count = min(3 * factor, 11)  # ln(11) is 2.4
    sampled = rng.integers(0, 11, (11, count))
    attend = jax.jit(partial(probsparse_attention, causal=True, factor=factor))
    found = attend(q, k, v, sampled=sampled)
    for b, h in np.ndindex(2, 3):
        logits = np.float64(q[b, :, h]) @ np.float64(k[b, :, h]).T
        met = np.take_along_axis(logits, sampled, axis=1)
        picked = np.argsort(met.max(axis=1) - met.sum(axis=1) / 11)[-count:]
        for t in range(11):
            past = np.float64(v[b, : t + 1, h])
            weights = softmax(logits[t, : t + 1] / 2) if t in picked else np.ones(t + 1)
            np.testing.assert_allclose(found[b, t, h], weights @ past, atol=ATOL)
    if factor == 9:
        causal = full_attention(q, k, v, mask=np.tri(11, dtype=bool))
        np.testing.assert_allclose(attend(q, k, v), causal, atol=ATOL)  # whatever keys are drawn
