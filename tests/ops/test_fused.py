"""The fused recurrence kernels, interpreted, against autodiff of lax.scan; compiled ahead of time for TPU and GPU."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.ops import fused
from jaxpapers.ops.fused import fused_cotangents, fused_states
from tests.marks import mostly_slow
from tests.tpu import needs_libtpu, run_program


def gru(h, x, a, scale):
    z, r = jax.nn.sigmoid(a[:2] * h + x[:2])
    c = jnp.tanh(a[2] * (h * r) + scale * x[..., 2, :])
    return (1 - z) * h + z * c


def lstm(state, x, a, scale):
    """State (2, n)."""
    c, h = state
    f = jax.nn.sigmoid(a[0] * h + a[1] * c + x[0])
    c = f * c + (1 - f) * jnp.tanh(a[2] * h + x[1])
    o = jax.nn.sigmoid(a[1] * h + a[0] * c + x[2])
    return jnp.stack([c, scale * o * jnp.tanh(c)])


def mixture(h, x, a, scale):
    """Many primitives: reductions over gates, selections, custom derivatives, powers."""
    gates = jax.nn.softmax(jnp.concatenate([x[:2], (a * h)[1:2]]), axis=0)
    bent = jnp.where(x[0] > 0, jax.nn.gelu(h), jax.nn.softplus(h) ** 2 / 4)
    return jnp.clip(scale * jnp.sum(gates * jnp.flip(a, 0), 0), -1, 1) + jnp.tanh(bent - h)


CELLS = {"gru": (gru, ()), "lstm": (lstm, (2,)), "mixture": (mixture, ())}
SHAPES = [(1, 1, 4), (5, 3, 130), (37, 3, 4), (37, 1, 130), (5, 2, 256)]  # the last folds channels into rows
CASES = [("gru", *shape, "tpu") for shape in SHAPES] + [("lstm", *shape, "tpu") for shape in SHAPES[1::2]]
CASES += [("mixture", 37, 3, 4, "tpu"), ("gru", 37, 3, 130, "gpu"), ("lstm", 37, 3, 4, "gpu")]
ALWAYS = [("gru", *SHAPES[0], "tpu"), ("gru", *SHAPES[-1], "tpu"), ("lstm", *SHAPES[1], "tpu"), *CASES[-3:-1]]


def problem(cell, length, batch, width, dtype, seed=0):
    rng = np.random.default_rng(seed)
    lead = CELLS[cell][1]
    constants = (jnp.asarray(0.7 * rng.normal(size=(3, width)), dtype), jnp.asarray(0.8, dtype))
    xs = jnp.asarray(rng.normal(size=(length, batch, 3, width)), dtype)
    h0 = jnp.asarray(rng.normal(size=(batch, *lead, width)), dtype)
    return constants, xs, h0, jnp.asarray(rng.normal(size=(length, *h0.shape)), dtype)


def loop(f, constants, xs, h0):
    def body(h, x):
        h = jax.vmap(lambda h, x: f(h, x, *constants))(h, x)
        return h, h

    return lax.scan(body, h0, xs)[1]


def both(cell, kind):
    """(states, cotangents) by the kernels and by autodiff of the loop."""
    f, lead = CELLS[cell]
    options = {"state_axes": 1 + len(lead), "kind": kind}

    @jax.jit
    def mine(constants, xs, h0, g):
        states = fused_states(f, constants, xs, h0, **options)
        return states, fused_cotangents(f, constants, xs, h0, states, g, **options)

    @jax.jit
    def expected(constants, xs, h0, g):
        states, pull = jax.vjp(partial(loop, f), constants, xs, h0)
        return states, pull(g)

    return mine, expected


def assert_close(mine, expected, tolerance):
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        scale = float(jnp.abs(other).max())
        assert scale > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("cell", "length", "batch", "width", "kind"), mostly_slow(CASES, ALWAYS))
def test_states_and_cotangents_are_those_of_the_loop(cell, length, batch, width, kind):
    arrays = problem(cell, length, batch, width, jnp.float32)
    mine, expected = both(cell, kind)
    # 37 steps, each rounded to 6e-8; sums over them and 130 channels for the scalar.
    assert_close(mine(*arrays), expected(*arrays), 1e-5)


@pytest.mark.parametrize(
    ("cell", "kind"),
    mostly_slow((("gru", "tpu"), ("lstm", "tpu"), ("mixture", "gpu")), (("lstm", "tpu"), ("mixture", "gpu"))),
)
def test_in_float64_to_its_rounding(cell, kind):
    with jax.enable_x64(True):
        arrays = problem(cell, 37, 3, 4, jnp.float64)
        mine, expected = both(cell, kind)
        assert_close(mine(*arrays), expected(*arrays), 1e-12)  # 37 steps of 1e-16, some amplified


@pytest.mark.parametrize("cell", mostly_slow(("gru", "lstm"), ("gru",)))
def test_tiles_and_blocks_that_do_not_divide(cell, monkeypatch):
    # 11 rows in tiles of 8, 300 channels in tiles of 128, 13 steps in blocks of 4: edges everywhere, which are NaN in
    # the interpreter until they are written.
    monkeypatch.setattr(fused, "WIDEST", 128)
    monkeypatch.setattr(fused, "TILE", 1024)
    monkeypatch.setattr(fused, "LONGEST", 4)
    arrays = problem(cell, 13, 11, 300, jnp.float32)
    mine, expected = both(cell, "tpu")
    assert_close(mine(*arrays), expected(*arrays), 1e-5)  # as above


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_bfloat16_is_computed_in_float32(kind):
    constants, xs, h0, g = problem("gru", 37, 3, 4, jnp.float32)
    xs = xs.astype(jnp.bfloat16)
    mine, expected = both("gru", kind)
    states, (dconstants, dxs, dh0) = mine(constants, xs, h0, g)
    wide_states, (wide_dconstants, wide_dxs, wide_dh0) = expected(constants, xs.astype(jnp.float32), h0, g)
    assert dxs.dtype == jnp.bfloat16
    assert_close((states, dconstants, dh0), (wide_states, wide_dconstants, wide_dh0), 1e-5)  # float32 throughout
    assert_close(dxs.astype(jnp.float32), wide_dxs, 2**-8)  # rounded once, when it is written
    half = h0.astype(jnp.bfloat16)
    states = mine(constants, xs, half, g.astype(jnp.bfloat16))[0]
    wide = loop(gru, constants, xs.astype(jnp.float32), half.astype(jnp.float32))
    assert states.dtype == jnp.bfloat16
    assert_close(states.astype(jnp.float32), wide, 2**-8)  # the carried state is not rounded, what is written is


def test_batch_axes_trees_of_inputs_and_closed_over_arrays():
    rng = np.random.default_rng(0)
    xs = {"a": jnp.float32(rng.normal(size=(5, 2, 3, 4))), "b": jnp.float32(rng.normal(size=(5, 2, 3, 2, 4)))}
    h0, hidden = jnp.float32(rng.normal(size=(2, 3, 4))), jnp.float32(rng.normal(size=4))

    def f(h, x):
        return jnp.tanh(hidden * h + x["a"]) + x["b"].prod(0)

    states = fused_states(f, (), xs, h0, state_axes=1)
    h = h0
    for t in range(5):
        h = f(h, jax.tree.map(lambda x, t=t: jnp.moveaxis(x[t], -2, 0) if x.ndim == 5 else x[t], xs))
        np.testing.assert_allclose(states[t], h, rtol=1e-5, atol=1e-6)  # five steps of float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": lambda h, x: jnp.flip(h) + x}, "not channelwise.*rev"),
        ({"f": lambda h, x: h.sum() + x}, "not channelwise.*reduce_sum"),
        ({"f": lambda h, x: jnp.cumsum(h) + x}, "not channelwise.*cumsum"),
        ({"f": lambda h, x: h * np.ones(1, np.float32) + x}, r"a constant \(1,\)"),
        ({"f": lambda h, x, c: c.sum() * h + x, "constants": (jnp.ones((4, 2)),)}, r"a constant \(4, 2\) of float32"),
        ({"f": lambda h, x, c: c * h + x, "constants": (jnp.ones(4, int),)}, r"a constant \(4,\) of int32"),
        ({"f": lambda h, x: h[:2]}, r"f maps a state \(4,\)"),
        ({"xs": jnp.ones((5, 3, 2))}, r"an input \(5, 3, 2\)"),
        ({"xs": jnp.ones((5, 3, 4), int)}, r"an input \(5, 3, 4\) of int32"),
        ({"xs": jnp.ones((0, 3, 4))}, "empty"),
        ({"kind": "cpu"}, "kind 'cpu' is unknown"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"f": lambda h, x: h + x, "xs": jnp.ones((5, 3, 4)), "constants": (), "kind": None} | change
    with pytest.raises(ValueError, match=message):
        fused_states(given["f"], given["constants"], given["xs"], jnp.ones((3, 4)), state_axes=1, kind=given["kind"])


def abstract(cell, length, batch, width, **place):
    arrays = problem(cell, length, batch, width, jnp.float32)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, **place), arrays)


def programs(cell):
    f, lead = CELLS[cell]
    axes = 1 + len(lead)

    def forward(constants, xs, h0, g):
        return fused_states(f, constants, xs, h0, state_axes=axes)

    def backward(constants, xs, h0, g):
        return fused_cotangents(f, constants, xs, h0, g, g, state_axes=axes)

    return jax.jit(forward), jax.jit(backward)


@pytest.mark.parametrize("cell", CELLS)
def test_the_triton_kernels_lower_without_a_gpu(cell):
    # The target carries no promise of compatibility, which is about programs that are kept; this one is not.
    target = "__gpu$xla.gpu.triton"
    check = jax.export.DisabledSafetyCheck.custom_call(target)
    for program in programs(cell):
        exported = jax.export.export(program, platforms=["cuda"], disabled_checks=[check])
        assert exported(*abstract(cell, 5, 3, 130)).mlir_module().count(f"@{target}(") == 1


TPU_PROGRAM = """
import json
import jax
from jax.sharding import SingleDeviceSharding
from experiments.plan import topology_devices
from test_fused import CELLS, abstract, programs
found = {}
for topology, shape in CASES:
    place = SingleDeviceSharding(topology_devices(topology)[0][0])
    for cell in CELLS:
        for name, program in zip(("forward", "backward"), programs(cell)):
            arguments = abstract(cell, *shape, sharding=place)
            text = program.lower(*arguments).compile().as_text()
            found[f"{topology} {shape} {cell} {name}"] = text.count('custom_call_target="tpu_custom_call"')
print(json.dumps(found))
"""


def kernels_compiled_for(*cases, timeout_s=200):
    done = run_program(TPU_PROGRAM.replace("CASES", repr(cases)), Path(__file__).parent, timeout_s)
    found = json.loads(done.stdout)
    assert len(found) == len(cases) * 2 * len(CELLS)
    return found


@needs_libtpu
def test_the_kernels_compile_for_tpus_ahead_of_time():
    found = kernels_compiled_for(("v5e:2x2", (70, 3, 130)), ("v5p:2x2x1", (70, 3, 130)))
    assert set(found.values()) == {1}, found


@needs_libtpu
@pytest.mark.slow
def test_the_kernels_compile_for_the_shapes_of_use():
    # Time, sequences, channels: the language models' on a chip, one sequence alone, channels that fold into rows.
    shapes = ((2048, 4, 1024), (2048, 8, 4096), (8192, 1, 2560), (1000, 64, 64), (301, 24, 16))
    found = kernels_compiled_for(*(("v5e:2x2", shape) for shape in shapes), timeout_s=1200)
    assert set(found.values()) == {1}, found
