"""PolyCom: golden figures of the authors' functions, closed forms, and independent routes."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.errors import ScopeParamShapeError
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.timing import residual_bytes
from jaxpapers.components import polycom
from jaxpapers.components.polycom import FeedForward, MoEFeedForward, PolyCom, PolyNorm, PolyReLU, TransformerLM
from jaxpapers.nn.language import language_loss
from jaxpapers.nn.stack import stack_layers
from jaxpapers.train import jit_once, make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "polycom"
COEFFS = np.array([0.16, 0.39, -0.2, 0.49])
FUNCTIONS = {"polynorm": polycom.poly_norm, "polyrelu": polycom.poly_relu}
PLAIN = {
    "polynorm": partial(polycom.polycom, rho=polycom.rms_normalise, kind="II"),
    "polyrelu": partial(polycom.polycom, rho=jax.nn.relu),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def norm(z):
    return z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True) + 1e-6)


def by_hand(x, a):
    """PolyNorm in numpy."""
    return a[0] + sum(a[i] * norm(x**i) for i in range(1, len(a)))


def trace(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def random_params(module, *args, seed=0):
    """Parameters of a module, every one drawn: an initialisation would have to be compiled."""
    shapes = trace(module, *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def pull_back(function):
    """Values and gradients for a cotangent, as one program."""

    def run(x, coeffs, g):
        y, pull = jax.vjp(function, x, coeffs)
        return y, *pull(g)

    return jit_once(run)


def assert_close(ours, expected, rtol):
    """Relative to the largest entry: sums of both signs may end near 0."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=rtol * np.abs(expected).max())


# The activations


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("tag", "rtol"), [("f64", 1e-10), ("f32", 2e-5)])  # the card's
def test_golden_activations(name, tag, rtol):
    golden = np.load(GOLDEN / "activations.npz")
    dtype = {"f64": np.float64, "f32": np.float32}[tag]
    with jax.enable_x64(tag == "f64"):
        run = pull_back(FUNCTIONS[name])
        coeffs = polycom.coeffs_from_reference(golden["weight"], golden["bias"]).astype(dtype)
        for case in ("unit", "tiny", "huge")[: 3 if name == "polynorm" else 2]:
            x, g = (golden[f"{case}.{part}"].astype(dtype) for part in ("x", "cotangent"))
            y, dx, da = run(x, coeffs, g)
            weight, bias = polycom.coeffs_to_reference(da)
            for part, ours in (("y", y), ("dx", dx), ("dweight", weight), ("dbias", bias)):
                assert ours.dtype == dtype
                assert_close(ours, golden[f"{name}.{case}.{tag}.{part}"], rtol)
            if name == "polynorm":
                third = polycom.init_coeffs(3).astype(np.float32)  # there made in float32, whatever x is
                start = run(x, third.astype(dtype), g)[0]
                assert_close(start, golden[f"polynorm_init.{case}.{tag}.y"], rtol)


@pytest.mark.parametrize(("name", "order"), [("polynorm", 1), ("polynorm", 3), ("polynorm", 4), ("polyrelu", 3)])
def test_derivatives_are_those_of_the_plain_formula(name, order):
    with jax.enable_x64(True):
        x, g, a, v, w = draw(0, 3, 7), draw(1, 3, 7), draw(2, order + 1), draw(3, 3, 7), draw(4, order + 1)

        def both(function):
            def loss(x, a):
                return jnp.sum(g * jnp.sin(function(x, a)))  # not linear: the cotangent depends on x, too

            grads = jax.grad(loss, (0, 1))
            forward = jax.jvp(grads, (x, a), (v, w))  # a Hessian times a vector, forward over reverse
            reverse = jax.grad(lambda x, a: jnp.sum(v * grads(x, a)[0]), (0, 1))(x, a)  # and reverse over reverse
            return forward, reverse

        ours, plain = (jit_once(partial(both, table[name]))() for table in (FUNCTIONS, PLAIN))
        for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert_close(mine, expected, 1e-10)


def test_forward_mode_is_refused_by_the_fused_functions_alone():
    x, a = jnp.ones((2, 3)), jnp.ones(4)
    for function in FUNCTIONS.values():
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(function, (x, a), (x, a))
    jax.eval_shape(lambda x, a: jax.jvp(PLAIN["polynorm"], (x, a), (x, a)), x, a)


@pytest.mark.parametrize(
    ("shape", "axis", "order"), [((5,), 0, 1), ((3, 1, 4), 0, 2), ((2, 3, 4), -2, 3), ((1, 6), 1, 5), ((0, 4), -1, 3)]
)
def test_any_shape_axis_and_order(shape, axis, order):
    x, a = draw(0, *shape), draw(1, order + 1)
    with jax.enable_x64(True):
        ours = jit_once(partial(polycom.poly_norm, axis=axis))(x, a)
        np.testing.assert_allclose(np.moveaxis(ours, axis, -1), by_hand(np.moveaxis(x, axis, -1), a), rtol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_over_another_axis(axis):
    with jax.enable_x64(True):
        x, g, a = draw(0, 3, 5, 2), draw(1, 3, 5, 2), draw(2, 4)

        def plain(x, a):
            return jnp.moveaxis(PLAIN["polynorm"](jnp.moveaxis(x, axis, -1), a), -1, axis)

        ours = pull_back(partial(polycom.poly_norm, axis=axis))(x, a, g)
        for mine, expected in zip(ours, pull_back(plain)(x, a, g), strict=True):
            assert_close(mine, expected, 1e-10)


def test_polynorm_at_large_and_small_scale():
    x = np.float32(draw(0, 5, 64))
    run = jit_once(polycom.poly_norm)
    y = run(x, COEFFS)
    for scale in (1, 3, 100):  # rms 1 and more: eps is 1e-6 of every mean at most
        np.testing.assert_allclose(run(np.float32(scale) * x, COEFFS), y, rtol=1e-5, atol=1e-5)
    # rms(x^3) far below sqrt(eps) = 1e-3: the cubic term fades, at 0.01 the square one as well, the linear stays.
    cube, square = np.float32([0, 0, 0, 1]), np.float32([0, 0, 1, 0])
    linear = np.float32([0, 1, 0, 0])
    sizes = [np.sqrt(np.mean(run(0.01 * x, a) ** 2)) for a in (cube, square, linear)]
    assert sizes[0] < 0.02 < 0.1 < sizes[1] < 0.3 < 0.9 < sizes[2]
    assert np.sqrt(np.mean(run(x, cube) ** 2)) > 0.99


def test_polynorm_at_zero():
    y, dx, _ = pull_back(polycom.poly_norm)(
        np.zeros((2, 8), np.float32), np.float32(COEFFS), np.ones((2, 8), np.float32)
    )
    np.testing.assert_allclose(y, COEFFS[0], rtol=1e-6)
    np.testing.assert_allclose(dx, 1000 * COEFFS[1], rtol=1e-6)  # a_1 / sqrt(eps)


def test_polynorm_symmetries_and_bounds():
    with jax.enable_x64(True):
        x, a = 0.7 * draw(0, 4, 33), COEFFS
        run = jit_once(polycom.poly_norm)
        even = 2 * (a[0] + a[2] * norm(x**2))
        np.testing.assert_allclose(run(x, a) + run(-x, a), even, atol=1e-12)
        order = np.random.default_rng(1).permutation(33)
        np.testing.assert_allclose(run(x[:, order], a), run(x, a)[:, order], atol=1e-12)
        for z in (x, x**2, x**3):
            assert np.all(np.mean(np.square(jit_once(polycom.rms_normalise)(z)), -1) <= 1)
        spike = np.zeros((1, 33))
        spike[0, 4] = 1e6  # where the bound is reached
        for inputs in (x, spike):
            assert np.abs(run(inputs, a) - a[0]).max() <= np.sqrt(33) * np.abs(a[1:]).sum()
        np.testing.assert_allclose(run(spike, np.abs(a)).max() - a[0], np.sqrt(33) * np.abs(a[1:]).sum(), rtol=1e-5)


def test_polyrelu_is_relu_and_its_square_to_the_bit_and_still_below_zero():
    x = np.float32(draw(0, 6, 50))
    run = jit_once(polycom.poly_relu)
    np.testing.assert_array_equal(run(x, np.float32([0, 1, 0, 0])), jax.nn.relu(x))
    np.testing.assert_array_equal(run(x, np.float32([0, 0, 1, 0])), jnp.square(jax.nn.relu(x)))
    y, dx, _ = pull_back(polycom.poly_relu)(x, np.float32(COEFFS), np.ones_like(x))
    np.testing.assert_array_equal(y[x <= 0], np.float32(COEFFS[0]))
    np.testing.assert_array_equal(dx[x <= 0], 0)
    near, slope, _ = pull_back(polycom.poly_relu)(np.float32([1e-6, -1e-6]), np.float32(COEFFS), np.ones(2, np.float32))
    np.testing.assert_allclose(near, COEFFS[0], rtol=1e-5)  # continuous
    np.testing.assert_allclose(slope, [COEFFS[1], 0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_statistics_of_half_precision_inputs_are_in_float32(dtype):
    x = jnp.asarray(60 * draw(0, 4, 64), dtype)  # x^3 is above float16's largest number, 65504
    y, dx, da = pull_back(polycom.poly_norm)(x, np.float32(COEFFS), jnp.ones_like(x))
    assert (y.dtype, dx.dtype, da.dtype) == (dtype, dtype, jnp.float32)
    expected = by_hand(np.float64(x), COEFFS)
    np.testing.assert_allclose(np.float64(y), expected, rtol=0, atol=4 * float(jnp.finfo(dtype).eps))
    assert jnp.isfinite(dx).all()
    assert jnp.isfinite(da).all()
    cubed = polycom.poly_relu(x, np.float32([0, 0, 0, 1e-4]))  # the result fits, x^3 would not
    np.testing.assert_allclose(np.float64(cubed), 1e-4 * np.maximum(np.float64(x), 0) ** 3, rtol=0.01)


def test_the_general_form():
    with jax.enable_x64(True):
        x, a = draw(0, 3, 5), draw(1, 4)
        first = sum(a[i] * np.tanh(x) ** i for i in range(4))
        run = jit_once(polycom.polycom, static_argnums=(2, 3))
        np.testing.assert_allclose(run(x, a, jnp.tanh, "I"), first, rtol=1e-12)
        second = a[0] + sum(a[i] * np.tanh(x**i) for i in range(1, 4))
        np.testing.assert_allclose(run(x, a, jnp.tanh, "II"), second, rtol=1e-12)


def test_coefficients_are_converted_both_ways():
    weight, bias = np.array([3.0, 2.0, 1.0]), np.array([0.5])
    coeffs = polycom.coeffs_from_reference(weight, bias)
    np.testing.assert_array_equal(coeffs, [0.5, 1, 2, 3])
    for ours, theirs in zip(polycom.coeffs_to_reference(coeffs), (weight, bias), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_split_width_gives_the_whole_ones_values_and_gradients(check_vma):
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    x, g, a = np.float32(draw(0, 4, 16)), np.float32(draw(1, 4, 16)), np.float32(COEFFS)
    split = P("data", "model")

    def run(axis_name):
        def local(x, a, g):
            y, pull = jax.vjp(partial(polycom.poly_norm, axis_name=axis_name), x, a)
            return (y, *pull(g)) if check_vma else y

        # Inside, what is summed over the axes is the coefficients' cotangent; outside, shard_map's transpose sums.
        specs = (split, split, P()) if check_vma else split
        shard = jax.shard_map(local, mesh=mesh, in_specs=(split, P(), split), out_specs=specs, check_vma=check_vma)
        if check_vma:
            return jit_once(shard)(x, a, g)
        return pull_back(lambda x, a: shard(x, a, g))(x, a, g)

    expected = pull_back(polycom.poly_norm)(x, a, g)
    for ours, whole in zip(run("model"), expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-6, atol=2e-6)  # float32, sums in another order
    assert np.abs(run(None)[0] - expected[0]).max() > 1e-2


def test_a_width_that_jit_splits_gives_the_whole_ones_values_and_gradients():
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    x, g, a = np.float32(draw(0, 4, 16)), np.float32(draw(1, 4, 16)), np.float32(COEFFS)
    split = NamedSharding(mesh, P("data", "model"))
    run = pull_back(polycom.poly_norm)
    inputs = jax.device_put(x, split), a, jax.device_put(g, split)
    program = run.lower(*inputs).compile()
    assert "all-reduce" in program.as_text()
    for ours, whole in zip(program(*inputs), run(x, a, g), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-6, atol=2e-6)  # float32, sums in another order


def test_the_backward_pass_keeps_the_input_and_a_few_numbers_a_token():
    x, a = jnp.zeros((2048, 512)), jnp.zeros(4)
    assert residual_bytes(polycom.poly_norm, x, a) == x.nbytes + 3 * 4 * 2048 + a.nbytes
    assert residual_bytes(polycom.poly_relu, x, a) == x.nbytes + a.nbytes
    assert residual_bytes(PLAIN["polynorm"], x, a) >= 2.5 * x.nbytes
    module = PolyCom("gelu")
    params = module.init(jax.random.key(0), x)
    assert residual_bytes(lambda x: module.apply(params, x), x) <= x.nbytes + 100


# The feed-forward block

BLOCK_COEFFS = np.array([0.1, 0.5, -0.3, 0.2])
OTHERS = {
    "polyprelu": lambda x: np.where(x > 0, x, 0.25 * x),
    "polygelu": lambda x: x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))),
    "polysilu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize(
    ("activation", "key"),
    [(name, name) for name in ("relu", "relu2", "swiglu", "polynorm", "polyrelu")] + [("gelu", "gelu_erf")],
)
def test_golden_blocks(activation, key):
    golden = np.load(GOLDEN / "ffn_blocks.npz")
    gated = activation == "swiglu"
    state_dict = {
        "dense_h_to_4h.weight": golden["w_gate_up_swiglu" if gated else "w_up"],
        "dense_4h_to_h.weight": golden["w_down_swiglu" if gated else "w_down"],
    }
    if activation.startswith("poly"):
        state_dict |= {f"activation_func.{part}": golden[part] for part in ("weight", "bias")}
    with jax.enable_x64(True):
        params = polycom.params_from_torch(state_dict)
        block = FeedForward(8 if gated else 12, activation)
        x = jnp.asarray(golden["x"])
        ours = jit_once(block.apply)({"params": params}, x)
        np.testing.assert_allclose(ours, golden[f"ffn_{key}"], rtol=0, atol=1e-10)  # the card's
        shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("activation", [*OTHERS, "polyrelunorm"])
def test_the_ablations_blocks(activation):
    with jax.enable_x64(True):
        x = jnp.asarray(draw(0, 4, 6))
        block = FeedForward(10, activation)
        params = random_params(block, x)
        if "slope" in params["activation"]:
            params["activation"]["slope"] = jnp.asarray(0.25)
        params["activation"]["coeffs"] = jnp.asarray(BLOCK_COEFFS)
        hidden = np.asarray(x) @ np.asarray(params["up"]["kernel"], float)
        if activation == "polyrelunorm":
            hidden = by_hand(np.maximum(hidden, 0), BLOCK_COEFFS)
        else:
            rho = OTHERS[activation](hidden)
            hidden = sum(BLOCK_COEFFS[i] * rho**i for i in range(4))
        ours = jit_once(block.apply)({"params": params}, x)
        np.testing.assert_allclose(ours, hidden @ np.asarray(params["down"]["kernel"], float), rtol=1e-9)


def test_the_slope_of_prelu_is_learned():
    module = PolyCom("prelu", order=2)
    x = -jnp.ones((1, 3))
    params = module.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(params["coeffs"], [0, 0.5, 0.5])
    assert params["slope"] == 0.25
    slope = jit_once(jax.grad(lambda p: module.apply({"params": p}, x).sum()))(params)["slope"]
    # d/ds of 3 (a_1 s x + a_2 s^2 x^2), a = (0, 1/2, 1/2), s = 1/4, x = -1
    np.testing.assert_allclose(slope, 3 * (-0.5 + 0.25), rtol=1e-6)


def test_blocks_of_equal_parameters():
    assert [polycom.matched_hidden(n, m) for n, m in ((8256, 128), (1536, 512), (192, 1))] == [5504, 1024, 128]
    sizes = {}
    for name, hidden in (("polynorm", 192), ("relu", 192), ("swiglu", 128)):
        shapes = jax.eval_shape(FeedForward(hidden, name).init, jax.random.key(0), jnp.zeros((1, 48)))
        sizes[name] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert sizes == {"polynorm": 2 * 48 * 192 + 4, "relu": 2 * 48 * 192, "swiglu": 2 * 48 * 192}


@pytest.mark.parametrize("activation", ["polynorm", "polyrelunorm", "swiglu"])
def test_a_block_whose_units_are_split_is_the_whole_one(activation):
    mesh = make_mesh(data=1, model=2, devices=jax.devices()[:2])
    x = jnp.asarray(draw(0, 4, 6), jnp.float32)
    params = random_params(FeedForward(8, activation), x)
    specs = {name: {"kernel": P(None, "model")} for name in params} | {"down": {"kernel": P("model")}}
    specs |= {"activation": P()} if "activation" in params else {}

    def run(block, params, x):
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(block.apply({"params": params}, x))))(params)

    local = partial(run, FeedForward(4, activation, axis_name="model"))
    split = jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=(P(), specs))
    ours, expected = jit_once(split)(params, x), jit_once(partial(run, FeedForward(8, activation)))(params, x)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_close(mine, other, 1e-5)  # float32, sums in another order


# The language models

VOCAB, WIDTH, STEPS, BATCH = 11, 16, 9, 2
TOKENS = jax.random.randint(jax.random.key(0), (BATCH, STEPS), 0, VOCAB)
EXPERTS = {"num_experts": 4, "top_k": 2, "qk_norm": True}


def language_model(**options):
    return TransformerLM(
        **{"width": WIDTH, "num_layers": 2, "num_heads": 2, "hidden": 24, "vocab_size": VOCAB, **options}
    )


def test_parameters_of_the_cards_small_models():
    counts = {}
    for activation in ("polynorm", "swiglu", "relu"):
        model = TransformerLM(48, 2, 3, 192, 65, activation)
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        counts[activation] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert counts == {"polynorm": 61_784, "swiglu": 61_776, "relu": 61_776}


@pytest.mark.parametrize(("name", "activation", "billions"), [("1B", "polynorm", 1.3454), ("1B-7B", "swiglu", 6.9192)])
def test_the_papers_sizes(name, activation, billions):
    """24 (4 + 2 * 8256 / 2048) 2048^2 + 2 * 32,000 * 2048 matrices; 16 * 64 experts of 3 * 2048 * 1024."""
    size = polycom.SIZES[name]
    model = polycom.language_model(size, activation, scan=True, remat=True, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(billions, abs=1e-4)
    assert size.steps * size.batch_size * polycom.CONTEXT == pytest.approx({"1B": 1e11, "1B-7B": 2e11}[name], rel=1e-4)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", polycom.SIZES)
def test_the_papers_sizes_have_equal_parameters_whatever_the_activation(name):
    counts = {}
    for activation in ("polynorm", "swiglu", "relu"):
        model = polycom.language_model(polycom.SIZES[name], activation, scan=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        counts[activation] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert counts["polynorm"] - counts["relu"] == 4 * polycom.SIZES[name].num_layers  # the coefficients
    assert counts["swiglu"] == pytest.approx(counts["polynorm"], rel=1e-3)  # the card's


def test_initialisation_is_the_papers():
    model = language_model(width=64, num_layers=1, hidden=300, vocab_size=200, activation="swiglu", num_heads=4)
    params = jit_once(model.init)(jax.random.key(0, impl="rbg"), TOKENS)["params"]
    std, out = math.sqrt(2 / (5 * 64)), math.sqrt(2 / (5 * 64)) / math.sqrt(2)
    block = params["blocks"]["layers_0"]
    found = {
        std: [
            params["embed"]["embedding"],
            params["head"]["kernel"],
            *(block["mlp"][n]["kernel"] for n in ("up", "gate")),
        ]
        + [block["attention"][n]["kernel"] for n in ("query", "key", "value")],
        out: [block["attention"]["out"]["kernel"], block["mlp"]["down"]["kernel"]],
    }
    for expected, leaves in found.items():
        for leaf in leaves:  # 4096 numbers and more: the standard error of a deviation is 1.1 % at most
            assert np.std(leaf) == pytest.approx(expected, rel=0.05)
    assert polycom.language_model(polycom.SIZES["1B-7B"]).kernel_init is polycom.truncated_init
    leaf = np.asarray(jit_once(polycom.truncated_init, static_argnums=1)(jax.random.key(0), (4, 64, 64)))
    assert np.abs(leaf).max() < 0.06  # 3 standard deviations
    assert np.std(leaf) == pytest.approx(0.02 * 0.9866, rel=0.02)  # of a Gaussian cut there


@pytest.fixture(scope="module", params=[{}, EXPERTS | {"block": 4}], ids=["dense", "experts"])
def network(request):
    """A model with random weights, and its logits."""
    model = language_model(**request.param)
    params = random_params(model, TOKENS)
    run = jit_once(model.apply)
    return model, params, run, run({"params": params}, TOKENS)


def test_logits_of_the_past_do_not_see_the_future(network):
    _, params, run, logits = network
    assert logits.dtype == jnp.float32
    for position in (0, 5, STEPS - 1):
        other = run({"params": params}, TOKENS.at[:, position].set((TOKENS[:, position] + 1) % VOCAB))
        np.testing.assert_allclose(other[:, :position], logits[:, :position], rtol=1e-5, atol=1e-5)  # float32
        assert jnp.abs(other[:, position] - logits[:, position]).max() > 1e-3


def rms_norm(x, scale, axes=(-1,)):
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 1e-5) * scale


def turn(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def attention_by_hand(p, x, qk_norm):
    q, k, v = (np.einsum("btw,whd->bthd", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    if qk_norm:
        q, k = (rms_norm(z, p[f"{name}_norm"]["scale"], (-2, -1)) for z, name in ((q, "query"), (k, "key")))
    scores = np.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((x.shape[1],) * 2, bool)), scores, -np.inf)
    weights = scipy.special.softmax(scores, axis=-1)
    return np.einsum("bhqk,bkhd,hdw->bqw", weights, v, p["out"]["kernel"])


def mlp_by_hand(p, x):
    if "router" not in p:
        return by_hand(x @ p["up"]["kernel"], p["activation"]["coeffs"]) @ p["down"]["kernel"]
    probabilities = scipy.special.softmax(x @ p["router"]["kernel"], axis=-1)
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):  # token by token, expert by expert
        for expert in np.argsort(-probabilities[place])[:2]:
            hidden = by_hand(x[place] @ p["up"][expert], p["activation"]["coeffs"])
            out[place] += probabilities[place][expert] * (hidden @ p["down"][expert])
    return out


def test_logits_are_those_of_the_blocks_written_out(network):
    model, params, _, logits = network
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["embedding"][np.asarray(TOKENS)]
    for block in p["blocks"].values():
        normed = rms_norm(x, block["attention_norm"]["scale"])
        x = x + attention_by_hand(block["attention"], normed, model.qk_norm)
        x = x + mlp_by_hand(block["mlp"], rms_norm(x, block["mlp_norm"]["scale"]))
    expected = rms_norm(x, p["norm"]["scale"]) @ p["head"]["kernel"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())  # float32


def test_states_and_head_are_the_model(network):
    model, params, _, logits = network
    variables = {"params": params}

    def apart(tokens):
        states = model.apply(variables, tokens, method="states")
        return states, model.apply(variables, states, method="logits")

    states, ours = jit_once(apart)(TOKENS)
    assert states.shape == (BATCH, STEPS, WIDTH)
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)  # float32


def test_remat_scan_and_chunks_change_nothing():
    model = language_model(**EXPERTS)
    params = random_params(model, TOKENS)
    deep = model.clone(scan=True, remat=True, attention_chunk=4)
    stacked = {**params, "blocks": stack_layers(params["blocks"])}

    def loss(model, params):
        logits, sown = model.apply({"params": params}, TOKENS, mutable="diagnostics")
        losses = polycom.router_losses(sown.get("diagnostics", {}))
        return language_loss(logits, TOKENS)[0] + losses.load_balance + losses.z_loss

    value, grads = jit_once(jax.value_and_grad(partial(loss, model)))(params)
    other, others = jit_once(jax.value_and_grad(partial(loss, deep)))(stacked)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    expected = {**grads, "blocks": stack_layers(grads["blocks"])}
    for ours, leaf in zip(jax.tree.leaves(others), jax.tree.leaves(expected), strict=True):
        assert_close(ours, leaf, 1e-4)  # float32: recomputed in another order


def test_decay_masks():
    params = jax.eval_shape(language_model(**EXPERTS).init, jax.random.key(0), TOKENS)["params"]

    def decayed(**options):
        mask = polycom.weight_decay_mask(params, **options)
        return {jax.tree_util.keystr(path[-2:], simple=True) for path, yes in jax.tree.leaves_with_path(mask) if yes}

    everything = {jax.tree_util.keystr(path[-2:], simple=True) for path, _ in jax.tree.leaves_with_path(params)}
    small = {name for name in everything if name.endswith(("scale", "embedding"))}
    coeffs = {name for name in everything if name.endswith("coeffs")}
    assert len(small) == 6  # four norms of a block, the last one, the embedding
    norms = {name for name in small if name.endswith("scale")}
    assert decayed(decay=polycom.DECAYS) == everything
    assert decayed() == everything - norms
    assert decayed(decay=("matrices", "embeddings")) == everything - norms - coeffs
    assert decayed(decay=("matrices", "coefficients")) == everything - small
    assert decayed(decay=()) == set()


# Experts


def moe(**options):
    return MoEFeedForward(**{"hidden": 12, "num_experts": 4, "top_k": 2, **options})


X = jnp.asarray(draw(5, 2, 6, 8), jnp.float32)


@pytest.mark.parametrize("block", [1, 5])
def test_no_token_is_dropped_where_all_go_to_one_expert(block):
    layer = moe(activation="swiglu", top_k=1, block=block)
    params = random_params(layer, X)
    params["router"]["kernel"] = jnp.zeros((8, 4))  # ties: the first expert
    ours, sown = jit_once(partial(layer.apply, mutable="diagnostics"))({"params": params}, X)
    up, gate, down = (np.asarray(params[name][0]) for name in ("up", "gate", "down"))
    pre = np.asarray(X) @ gate
    expected = 0.25 * (pre / (1 + np.exp(-pre)) * (np.asarray(X) @ up)) @ down
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sown["diagnostics"]["load"], [1, 0, 0, 0])


@pytest.mark.parametrize("block", [1, 4])
def test_padding_is_not_routed_and_gives_zeros(block):
    layer = moe(block=block)
    params = random_params(layer, X)
    params["activation"]["coeffs"] = jnp.array([0.5, 1.0, 1.0, 1.0])  # a_0 would leak
    mask = jnp.ones((2, 6), bool).at[1, 2:].set(False)
    run = jit_once(partial(layer.apply, mutable="diagnostics"))
    ours, sown = run({"params": params}, X, mask)
    np.testing.assert_array_equal(ours[1, 2:], 0)
    whole, _ = run({"params": params}, X, jnp.ones_like(mask))
    np.testing.assert_allclose(ours[mask], whole[mask], rtol=1e-5, atol=1e-6)
    other, others = run({"params": params}, jnp.where(mask[..., None], X, 100.0), mask)
    np.testing.assert_array_equal(other, ours)  # whatever stands in the padding
    jax.tree.map(np.testing.assert_array_equal, others, sown)
    grads = jit_once(jax.grad(lambda x: jnp.sum(layer.apply({"params": params}, x, mask))))(X)
    np.testing.assert_array_equal(grads[1, 2:], 0)


def test_experts_over_devices_are_those_of_one_in_blocks_or_not():
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    layer = moe(block=4)
    params = random_params(layer, X)

    def loss(layer, params):
        out, sown = layer.apply({"params": params}, X, mutable="diagnostics")
        return jnp.sum(jnp.sin(out)) + polycom.router_losses(sown["diagnostics"]).load_balance

    value, grads = jit_once(jax.value_and_grad(partial(loss, layer)))(params)
    other, others = jit_once(jax.value_and_grad(partial(loss, layer.clone(mesh=mesh, block=1))))(params)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for ours, leaf in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
        assert_close(ours, leaf, 1e-5)  # float32


def test_a_population_of_experts_is_each_by_itself():
    layer = moe(block=4)
    rows = [random_params(layer, X, seed=seed) for seed in (0, 1)]

    def run(params):
        return layer.apply({"params": params}, X)

    together = jit_once(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
    for ours, params in zip(together, rows, strict=True):
        np.testing.assert_allclose(ours, jit_once(run)(params), rtol=1e-5, atol=1e-6)


def test_golden_block_layout():
    golden = np.load(GOLDEN / "moe_block_layout.npz")
    with jax.enable_x64(True):
        coeffs = polycom.coeffs_from_reference(golden["weight"], golden["bias"])

        def run(blocks):
            rows = polycom.rows_from_blocks(blocks, int(golden["ffn_hidden"]))
            return polycom.blocks_from_rows(polycom.poly_norm(rows, coeffs), 4)

        ours = jit_once(run)(golden["x_blocks"])
        np.testing.assert_allclose(ours, golden["y_blocks"], rtol=0, atol=1e-10)  # the card's
        tiled = by_hand(golden["x_blocks"], coeffs)  # the norm over a part of the vector
        assert np.abs(tiled - golden["y_blocks"]).max() > 0.1


# Theory and analysis

DERIVATIVES = (
    lambda x: jnp.sin(2 * math.pi * x),
    lambda x: 2 * math.pi * jnp.cos(2 * math.pi * x),
    lambda x: -((2 * math.pi) ** 2) * jnp.sin(2 * math.pi * x),
)


def test_squares_products_and_powers_are_exact():
    with jax.enable_x64(True):
        u, v = draw(0, 1000), draw(1, 1000)
        run = jit_once(lambda u, v: (polycom.exact_square(u), polycom.exact_product(u, v)))
        for ours, expected in zip(run(u, v), (u**2, u * v), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
        powers = jit_once(lambda u: [polycom.exact_power(u, exponent) for exponent in (1, 3, 4)])(u)
        for ours, exponent in zip(powers, (1, 3, 4), strict=True):
            np.testing.assert_allclose(ours, u**exponent, rtol=1e-12)


def test_local_taylor_networks_have_the_optimal_rate():
    with jax.enable_x64(True):
        x = np.linspace(0, 1, 2049)
        for n, tolerance in ((2, 0.1), (3, 0.05)):  # the card's
            errors = [
                np.abs(jit_once(polycom.local_taylor_network(DERIVATIVES, n, N))(x) - np.sin(2 * np.pi * x)).max()
                for N in (16, 32)
            ]
            assert np.log2(errors[1] / errors[0]) == pytest.approx(-n, abs=tolerance)
        # A polynomial of a lower degree is met to the last bits, as hats sum to 1 and products are exact.
        line = polycom.local_taylor_network((lambda x: 3 - 2 * x, lambda x: -2 + 0 * x), 2, 5)
        np.testing.assert_allclose(line(x), 3 - 2 * x, atol=1e-12)


def test_the_sawtooths_error():
    with jax.enable_x64(True):
        x = np.linspace(0, 1, 2**9 + 1)
        for levels in (1, 4, 7):
            error = np.abs(jit_once(polycom.sawtooth_square, static_argnums=1)(x, levels) - x**2).max()
            assert error == pytest.approx(2.0 ** (-2 * levels - 2), abs=1e-9)


def test_layer_similarity():
    states = np.stack([draw(0, 5, 3), -2 * draw(0, 5, 3)])
    with jax.enable_x64(True):
        np.testing.assert_allclose(jit_once(polycom.layer_similarity)(states), [[1, -1], [-1, 1]], atol=1e-12)


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: polycom.poly_norm(jnp.ones((2, 3)), jnp.ones(1)), r"order r of at least 1, got the shape \(1,\)"),
        (lambda: polycom.poly_relu(jnp.ones(3), jnp.ones(1)), "order r of at least 1"),
        (lambda: polycom.polycom(jnp.ones(3), jnp.ones(1), jnp.tanh), "order r of at least 1"),
        (lambda: polycom.polycom(jnp.ones(3), jnp.ones(4), jnp.tanh, "III"), "kind 'III' is unknown"),
        (lambda: polycom.poly_norm(jnp.ones(3), jnp.ones(4), eps=0.0), "eps must be above 0, got 0.0"),
        (lambda: polycom.poly_norm(jnp.ones(3), jnp.ones(4), eps=-1e-6), "eps must be above 0"),
        (lambda: polycom.poly_norm(jnp.ones(3), jnp.ones(4), axis=1), "axis 1 is outside of the 1 axes"),
        (lambda: polycom.init_coeffs(0), "order must be at least 1, got 0"),
        (lambda: trace(PolyNorm(order=0), jnp.ones(3)), "order must be at least 1"),
        (lambda: trace(PolyReLU(order=-1), jnp.ones(3)), "order must be at least 1"),
        (lambda: trace(PolyCom("tanh"), jnp.ones(3)), "rho 'tanh' is unknown"),
        (lambda: polycom.coeffs_from_reference(np.ones(3), np.ones(2)), "a bias of 1, got 3 and 2"),
        (lambda: polycom.coeffs_to_reference(np.ones(1)), "order r of at least 1"),
        (lambda: polycom.matched_hidden(100), "no gated block matches 100 units"),
        (lambda: polycom.matched_hidden(192, 256), "no gated block matches 192 units in multiples of 256"),
        (lambda: trace(FeedForward(8, "swish"), jnp.ones((1, 4))), "activation 'swish' is unknown"),
        (lambda: trace(FeedForward(8, order=0), jnp.ones((1, 4))), "order must be at least 1"),
        (
            lambda: polycom.params_from_torch(
                {"dense_h_to_4h.weight": np.ones((12, 8)), "dense_4h_to_h.weight": np.ones((8, 5))}
            ),
            "does not fit",
        ),
        (lambda: trace(language_model(hidden=25, activation="swiglu"), TOKENS), "no gated block"),
        (lambda: trace(language_model(num_heads=3), TOKENS), "3 heads do not divide the width 16"),
        (lambda: trace(language_model(num_heads=16), TOKENS), "even head_dim"),
        (lambda: trace(language_model(attention_chunk=0), TOKENS), "attention's chunk must be at least 1, got 0"),
        (lambda: polycom.weight_decay_mask({}, ("norm",)), r"nothing to decay is called \['norm'\]"),
        (lambda: trace(moe(top_k=0), X), "top_k must be between"),
        (lambda: trace(moe(block=0), X), "block must be at least 1, got 0"),
        (lambda: trace(moe(activation="x"), X), "activation 'x' is unknown"),
        (lambda: polycom.rows_from_blocks(np.ones((5, 4, 4)), 12), "5 blocks of side 4 do not fill"),
        (lambda: polycom.blocks_from_rows(np.ones((8, 10)), 4), "blocks of side 4 do not fill"),
        (lambda: polycom.exact_power(np.ones(2), 0), "exponent must be at least 1"),
        (lambda: polycom.sawtooth_square(np.ones(2), 0), "levels must be at least 1"),
        (lambda: polycom.local_taylor_network(DERIVATIVES, 4, 8), "needs as many derivatives"),
        (lambda: polycom.local_taylor_network(DERIVATIVES, 0, 8), "n and N must be at least 1"),
    ],
)
def test_what_a_caller_can_get_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_coefficients_of_another_order_are_refused():
    x = jnp.ones((2, 3))
    params = PolyNorm(order=2).init(jax.random.key(0), x)
    with pytest.raises(ScopeParamShapeError, match="coeffs"):
        PolyNorm(order=3).apply(params, x)
