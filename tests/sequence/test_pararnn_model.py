"""ParaRNN's layers, language models and generation: counts, causality, decoding against the parallel forward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.components.polycom import MoEFeedForward, router_losses
from jaxpapers.nn.stack import stack_layers
from jaxpapers.sequence import pararnn
from jaxpapers.sequence.pararnn import Solver

VOCAB, WIDTH, STEPS, BATCH = 11, 16, 9, 2
TOKENS = jax.random.randint(jax.random.key(0), (BATCH, STEPS), 0, VOCAB)
CHUNKED = {"solver": Solver(method="chunked", max_iterations=4)}
OPTIONS = {"mamba2": {"head_dim": 8, "state_size": 4, "chunk": 4}, "attention": {}, "gru": CHUNKED, "lstm": CHUNKED}


def language_model(mixer, **options):
    settings = {"vocab_size": VOCAB, "mixer": mixer, "mixer_options": OPTIONS.get(mixer, {})}
    return pararnn.ParaRNNLM(**{"width": WIDTH, "num_layers": 1, "num_heads": 2, **settings, **options})


@pytest.fixture(scope="module", params=pararnn.MIXERS)
def trained(request):
    """A model whose every weight is random, and its logits."""
    model = language_model(request.param, num_layers=2 if request.param == "gru" else 1)
    params = jax.jit(model.init)(jax.random.key(1), TOKENS)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )
    return model, params, jax.jit(model.apply)({"params": params}, TOKENS)


def test_logits_of_the_past_do_not_see_the_future(trained):
    model, params, logits = trained
    for position in (0, 5, STEPS - 1):
        changed = TOKENS.at[:, position].set((TOKENS[:, position] + 1) % VOCAB)
        other = jax.jit(model.apply)({"params": params}, changed)
        # Float32: the parallel solver sums in an order of its own, Newton's residual is of that size.
        np.testing.assert_allclose(other[:, :position], logits[:, :position], rtol=1e-5, atol=1e-5)
        assert jnp.abs(other[:, position] - logits[:, position]).max() > 1e-3


def test_sequential_logits_are_the_parallel_ones_and_causal_to_the_bit():
    model = language_model("gru", mixer_options={"solver": Solver(method="sequential")})
    params = model.init(jax.random.key(1), TOKENS)["params"]
    run = jax.jit(model.apply)
    logits = run({"params": params}, TOKENS)
    changed = run({"params": params}, TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % VOCAB))
    np.testing.assert_array_equal(changed[:, :5], logits[:, :5])
    parallel = jax.jit(language_model("gru").apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(parallel, logits, rtol=1e-5, atol=1e-5)


def test_decoding_token_by_token_is_the_parallel_forward(trained):
    model, params, logits = trained
    decoder, params = pararnn.decoder(model, params, STEPS)
    step = jax.jit(partial(pararnn.decode_step, decoder))
    state = pararnn.init_state(decoder, params, BATCH)
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    for position in range(3):
        ours, state = step(params, state, TOKENS[:, position])
        np.testing.assert_allclose(ours, logits[:, position], rtol=1e-5, atol=1e-5)  # float32
    # The rest in two pieces: the first shorter than the convolution, so that its tail spans calls.
    for start, stop in ((3, 5), (5, 8)):
        ours, state = jax.jit(partial(pararnn.extend, decoder))(params, state, TOKENS[:, start:stop])
        np.testing.assert_allclose(ours, logits[:, stop - 1], rtol=1e-5, atol=1e-5)
    prefilled, filled = jax.jit(partial(pararnn.prefill, decoder))(params, TOKENS[:, :8])
    np.testing.assert_allclose(prefilled, ours, rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), filled, state)
    ours, state = step(params, filled, TOKENS[:, 8])
    np.testing.assert_allclose(ours, logits[:, 8], rtol=1e-5, atol=1e-5)
    assert [leaf.size for leaf in jax.tree.leaves(state)] == sizes


def test_a_recurrent_model_remembers_three_inputs_and_a_state():
    for mixer, state_size in (("gru", WIDTH), ("lstm", 2 * WIDTH)):
        model, _ = pararnn.decoder(language_model(mixer, num_layers=2), {}, 10_000)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        state = jax.eval_shape(lambda p, m=model: pararnn.init_state(m, p, 1), params)
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (3 * WIDTH + state_size)


def test_greedy_generation_follows_the_likeliest_token(trained):
    model, params, _ = trained
    prompt = TOKENS[:, :4]
    ours = jax.jit(lambda p: pararnn.generate(jax.random.key(0), model, p, prompt, 5, temperature=0))(params)
    run, tokens = jax.jit(model.apply), TOKENS
    for position in range(4, STEPS):  # causal: what stands behind does not matter
        likeliest = run({"params": params}, tokens)[:, position - 1].argmax(-1)
        tokens = tokens.at[:, position].set(likeliest)
    np.testing.assert_array_equal(ours, tokens[:, 4:])


def test_generation_draws_from_the_softmax():
    model = language_model("gru", num_layers=2, scan=True)
    params = model.init(jax.random.key(1), TOKENS)["params"]
    many = jnp.broadcast_to(TOKENS[:1, :3], (4000, 3))
    drawn = jax.jit(lambda p: pararnn.generate(jax.random.key(3), model, p, many, 1, temperature=0.5))(params)
    expected = jax.nn.softmax(model.apply({"params": params}, TOKENS[:1, :3])[0, -1] / 0.5)
    found = np.bincount(drawn[:, 0], minlength=VOCAB) / 4000
    np.testing.assert_allclose(found, expected, atol=0.03)  # standard error 0.008 at most


def test_scan_and_remat_change_nothing():
    plain, deep = language_model("lstm", num_layers=2), language_model("lstm", num_layers=2, scan=True, remat=True)
    params = plain.init(jax.random.key(1), TOKENS)["params"]
    stacked = {**params, "blocks": stack_layers(params["blocks"])}

    def loss(model, params):
        return pararnn.language_loss(model.apply({"params": params}, TOKENS), TOKENS)[0]

    value, grads = jax.jit(jax.value_and_grad(partial(loss, plain)))(params)
    other, others = jax.jit(jax.value_and_grad(partial(loss, deep)))(stacked)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    expected = {**grads, "blocks": stack_layers(grads["blocks"])}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), others, expected)  # float32


def count(module, tokens=TOKENS):
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("scale", "millions", "decimals"), [("400M", 406, 0), ("1B", 1420, -1), ("2.9B", 2900, -1), ("7B", 6760, -1)]
)
@pytest.mark.parametrize("mixer", ["gru", "lstm"])
def test_parameter_counts_of_the_language_models(scale, millions, decimals, mixer):
    # Table 3; scan, because tracing one layer is enough to count them all.
    size = pararnn.SIZES[scale][mixer]
    counts = {skip: count(pararnn.language_model(size, skip=skip, scan=True)) for skip in ("inner", "outer")}
    assert round(counts["inner"] / 1e6, decimals) == millions
    assert counts["inner"] == counts["outer"]


@pytest.mark.parametrize("scale", ["400M", "1B", "2.9B", "7B"])
def test_rivals_are_of_the_same_size(scale):
    ours = count(pararnn.language_model(pararnn.SIZES[scale]["gru"], scan=True))
    for rival in ("mamba2", "attention"):
        size = pararnn.SIZES[scale][rival]
        assert abs(count(pararnn.language_model(size, scan=True)) / ours - 1) < 0.05
        assert size.width == pararnn.SIZES[scale]["gru"].width
        if rival == "mamba2":
            assert size.num_heads == 2 * size.width // pararnn.Mamba2Mixer().head_dim


@pytest.mark.parametrize(
    ("vocab_size", "bare", "gru", "lstm"),
    [(2, True, 3840, 3968), (10, False, 17600, 17728), (5, False, 16960, 17088), (128, False, 32704, 32832)],
    ids=["parity", "one-hop", "two-hop", "mqar"],
)
def test_parameter_counts_of_the_synthetic_models(vocab_size, bare, gru, lstm):
    for mixer, expected in (("gru", gru), ("lstm", lstm)):
        for skip in ("inner", "outer"):
            assert count(pararnn.SyntheticModel(vocab_size, mixer=mixer, bare=bare, skip=skip)) == expected
    assert count(pararnn.SyntheticModel(vocab_size, bare=bare, max_length=100)) == gru + 6400


@pytest.mark.parametrize("mixer", pararnn.MIXERS)
def test_synthetic_models_are_causal(mixer):
    options = OPTIONS["mamba2"] if mixer == "mamba2" else {}
    model = pararnn.SyntheticModel(VOCAB, WIDTH, 2, mixer, bare=True, max_length=STEPS, mixer_options=options)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    run = jax.jit(model.apply)
    difference = run({"params": params}, TOKENS.at[:, 4].add(1) % VOCAB) - run({"params": params}, TOKENS)
    assert jnp.abs(difference[:, :4]).max() < 1e-6
    assert jnp.abs(difference[:, 4]).max() > 1e-4


def test_mixer_is_what_its_docstring_says():
    x = jax.random.normal(jax.random.key(5), (BATCH, STEPS, WIDTH))
    for cell, skip in (("gru", "inner"), ("lstm", "outer")):
        module = pararnn.ParaRNNMixer(2, cell=cell, skip=skip)
        params = module.init(jax.random.key(6), x)["params"]
        if skip == "inner":
            params = {**params, "skip": jnp.linspace(-1, 1, WIDTH)}
        w = jax.tree.map(np.float64, params)
        silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
        u, gate = np.split(np.float64(x) @ w["in"]["kernel"], 2, axis=-1)
        padded = np.pad(u, ((0, 0), (3, 0), (0, 0)))
        u = silu(w["conv"]["bias"] + sum(w["conv"]["kernel"][k] * padded[:, k : k + STEPS] for k in range(4)))
        kind = pararnn.GRUParams if cell == "gru" else pararnn.LSTMParams
        y = run_cell(kind(**w["cell"]), u)
        y = (y + w["skip"] * u if skip == "inner" else y) * silu(gate)
        y = w["norm"]["scale"] * y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)
        expected = y @ w["out"]["kernel"]
        np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)  # float32


def run_cell(params, x):
    """Step by step in float64."""
    lstm = isinstance(params, pararnn.LSTMParams)
    with jax.enable_x64(True):
        g = pararnn.preactivations(x, params.B, params.b)
        states = np.zeros((BATCH, 2, WIDTH) if lstm else (BATCH, WIDTH))
        out = []
        for t in range(x.shape[1]):
            args = (params.A, params.C) if lstm else (params.A,)
            states = (pararnn.lstm_cell if lstm else pararnn.gru_cell)(states, g[:, t], *args)
            out.append(states[:, 1] if lstm else states)
        return np.stack(out, axis=1)


def test_linear_rnn_is_the_gru_without_its_state_in_the_gates():
    x = jax.random.normal(jax.random.key(5), (BATCH, STEPS, WIDTH))
    module = pararnn.LinearRNN(WIDTH, 2)
    params = module.init(jax.random.key(6), x)["params"]
    B = jnp.insert(params["B"], 1, 0.0, axis=2)
    b = jnp.insert(params["b"], 1, 0.0, axis=0)
    g = jnp.swapaxes(pararnn.preactivations(x, B, b), 0, 1)
    cell = pararnn.GRUParams(jnp.zeros((3, WIDTH)), B, b)
    expected = pararnn.solve(cell, g, gates=("sigmoid", "sigmoid", "identity")).states
    np.testing.assert_allclose(module.apply({"params": params}, x), jnp.swapaxes(expected, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "chunk"), [(1, 4), (9, 4), (9, 64)])
def test_state_space_dual_is_the_recurrence(steps, chunk):
    rng = np.random.default_rng(0)
    batch, heads, size, head_dim = 2, 3, 4, 5
    x = rng.normal(size=(batch, steps, heads, head_dim))
    log_decay = -rng.exponential(size=(batch, steps, heads))
    B, C = rng.normal(size=(2, batch, steps, size))
    state = start = rng.normal(size=(batch, heads, size, head_dim))
    expected = np.zeros_like(x)
    for t in range(steps):
        state = np.exp(log_decay[:, t])[..., None, None] * state + B[:, t, None, :, None] * x[:, t, :, None, :]
        expected[:, t] = np.einsum("bn,bhnp->bhp", C[:, t], state)
    with jax.enable_x64(True):
        y, last = pararnn.state_space_dual(x, log_decay, B, C, start, chunk=chunk)
        gradient = jax.grad(lambda d: pararnn.state_space_dual(x, d, B, C, start, chunk=chunk)[0].sum())(
            500 * log_decay
        )
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last, state, rtol=1e-10, atol=1e-12)
    assert np.isfinite(gradient).all()


def test_half_precision_activations_keep_the_solver_in_float32():
    model = language_model("gru", dtype=jnp.bfloat16)
    params = model.init(jax.random.key(1), TOKENS)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    logits, sown = jax.jit(partial(model.apply, mutable="diagnostics"))({"params": params}, TOKENS)
    assert logits.dtype == jnp.float32
    assert pararnn.newton_residual(sown["diagnostics"]) < 1e-6  # of bfloat16 it would be 4e-3
    exact = language_model("gru").apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, exact, atol=0.1)  # bfloat16 has 8 bits


def test_diagnostics_tell_when_newton_has_not_converged():
    def residuals(iterations, mixer="gru"):
        options = {"solver": Solver(method="chunked", max_iterations=iterations)} if mixer == "gru" else {}
        model = language_model(mixer, num_layers=2, mixer_options=options)
        variables = model.init(jax.random.key(1), TOKENS)
        assert set(variables) == {"params"}
        return model.apply(variables, TOKENS, mutable="diagnostics")[1].get("diagnostics", {})

    assert len(jax.tree.leaves(residuals(1))) == 2  # one a layer
    assert pararnn.newton_residual(residuals(1)) > 1e-4
    assert pararnn.newton_residual(residuals(4)) < 1e-6
    assert pararnn.newton_residual(residuals(1, "linear")) == 0


@pytest.mark.parametrize(("num_layers", "scan"), [(1, False), (2, True)])
def test_experts_take_the_swiglus_place(num_layers, scan):
    experts = partial(MoEFeedForward, hidden=12, num_experts=4, top_k=2, block=4)
    model = language_model("gru", num_layers=num_layers, feed_forward=experts, scan=scan)
    drawn = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert set(drawn) == {"params"}
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(-0.4, 0.4, leaf.shape), leaf.dtype), drawn["params"])
    logits, sown = jax.jit(partial(model.apply, mutable="diagnostics"))({"params": params}, TOKENS)
    assert jnp.isfinite(logits).all()
    sown = sown["diagnostics"]
    (layers,) = sown["blocks"].values()  # in one row, or only one
    cells, balance = layers["mixer"]["cell"]["residual"], layers["mlp"]["load_balance"]
    assert cells.size == balance.size == num_layers
    assert pararnn.newton_residual(sown) == cells.max()
    assert pararnn.newton_residual(sown) < 1e-5  # a router's figures are of the order of 1
    np.testing.assert_allclose(router_losses(sown).load_balance, balance.mean(), rtol=1e-6)
    assert (balance > 0.9).all()


def test_projection_clips_recurrent_weights_alone():
    for mixer, bounded in (("gru", {"A"}), ("lstm", {"A", "C"}), ("mamba2", set())):
        model = language_model(mixer, scan=True)
        params = jax.tree.map(lambda leaf: 3 * jnp.ones(leaf.shape), shapes(model))
        projected = pararnn.project_recurrent(params, 0.5)
        for path, leaf in jax.tree.leaves_with_path(projected):
            assert (leaf == (0.5 if path[-1].key in bounded else 3.0)).all(), path
    cell = pararnn.GRUParams(*(jnp.full(2, -1.0),) * 3)
    np.testing.assert_array_equal(pararnn.project_recurrent(cell, 0.5).A, [-0.5, -0.5])
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        pararnn.project_recurrent(params, 0)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]


def test_weight_decay_is_for_matrices():
    for mixer in pararnn.MIXERS:
        mask = pararnn.weight_decay_mask(shapes(language_model(mixer)))
        for path, decays in jax.tree.leaves_with_path(mask):
            assert decays == (path[-1].key in ("kernel", "embedding", "B")), path
    experts = partial(MoEFeedForward, hidden=12, num_experts=4, top_k=2)
    mask = pararnn.weight_decay_mask(shapes(language_model("gru", feed_forward=experts)))["blocks"]["layers_0"]["mlp"]
    assert mask == {"router": {"kernel": True}, "up": True, "down": True, "activation": {"coeffs": False}}


def test_gradients_of_a_model_do_not_depend_on_the_method():
    def gradient(method):
        model = language_model("lstm", mixer_options={"solver": Solver(method=method, max_iterations=8)})
        params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), TOKENS)["params"])
        return jax.jit(jax.grad(lambda p: pararnn.language_loss(model.apply({"params": p}, TOKENS), TOKENS)[0]))(params)

    with jax.enable_x64(True):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), *map(gradient, ("sequential", "chunked"))
        )


def test_time_split_over_devices_changes_nothing():
    mesh = jax.make_mesh((2,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    tokens = jnp.tile(TOKENS[:, :4], 2)
    params = language_model("gru").init(jax.random.key(1), tokens)["params"]
    whole, split = (
        jax.jit(language_model("gru", mixer_options={"solver": CHUNKED["solver"]._replace(mesh=where)}).apply)(
            {"params": params}, tokens
        )
        for where in (None, mesh)
    )
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)  # float32


def test_bad_input_is_refused():
    def init(model, tokens=TOKENS):
        jax.eval_shape(model.init, jax.random.key(0), tokens)

    for options, message in [
        ({"mixer": "rwkv"}, "mixer 'rwkv' is unknown"),
        ({"skip": "none"}, "skip 'none' does not fit 'gru'"),
        ({"mixer": "attention", "skip": "outer"}, "skip 'outer' does not fit 'attention'"),
        ({"num_heads": 3}, r"3 heads must divide the inputs \(16\)"),
        ({"mixer": "mamba2", "mixer_options": {"head_dim": 7}}, "head_dim 7 does not divide the inner width 32"),
        ({"mixer": "mamba2", "mixer_options": {"head_dim": 8, "chunk": 0}}, "chunk must be at least 1, got 0"),
        ({"mixer_options": {"scheme": "mine"}}, "scheme 'mine' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            init(language_model(options.pop("mixer", "gru"), **options))
    with pytest.raises(ValueError, match="9 steps are more than the 4 positions"):
        init(pararnn.SyntheticModel(VOCAB, max_length=4))
    x = jnp.ones((1, 2, 8))
    with pytest.raises(ValueError, match="cell 'rnn' is unknown"):
        pararnn.ParaRNNMixer(2, cell="rnn").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="skip 'none' is unknown"):
        pararnn.ParaRNNMixer(2, skip="none").init(jax.random.key(0), x)
    model = language_model("gru")
    with pytest.raises(ValueError, match="cache_length must be at least 1, got 0"):
        pararnn.decoder(model, {}, 0)
    with pytest.raises(ValueError, match="the model keeps no state"):
        pararnn.prefill(model, {}, TOKENS)
    with pytest.raises(ValueError, match="num_tokens >= 1 and temperature >= 0, got 0 and 1"):
        pararnn.generate(jax.random.key(0), model, {}, TOKENS, 0, 1.0)
    with pytest.raises(ValueError, match="at least one token"):
        pararnn.extend(model, {}, {}, TOKENS[:, :0])
