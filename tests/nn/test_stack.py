"""A stack with remat and scan is the loop without them, with less kept and less to compile."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers.nn.stack import Stack, stack_layers, unstack_layers
from jaxpapers.train import make_mesh

X = jax.random.normal(jax.random.key(0), (4, 16))
LAYERS = 5


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, shift):
        hidden = nn.tanh(nn.Dense(self.width)(x) + shift)
        return x + nn.Dense(x.shape[-1])(nn.tanh(hidden) ** 2)


def stack(**options):
    return Stack(Block, LAYERS, {"width": 32}, **options)


@pytest.fixture(scope="module")
def params():
    return stack().init(jax.random.key(1), X, jnp.float32(0.5))["params"]


def loss(model, params, x=X):
    return jnp.sum(model.apply({"params": params}, x, jnp.float32(0.5)) ** 2)


def by_hand(params):
    x = np.asarray(X, np.float64)
    for layer in range(LAYERS):
        first, second = (params[f"layers_{layer}"][f"Dense_{i}"] for i in range(2))
        hidden = np.tanh(np.tanh(x @ np.float64(first["kernel"]) + first["bias"] + 0.5)) ** 2
        x = x + hidden @ np.float64(second["kernel"]) + second["bias"]
    return np.sum(x**2)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_values_and_gradients_agree_with_the_loop(params, remat, scan):
    np.testing.assert_allclose(loss(stack(), params), by_hand(params), rtol=1e-5)  # float32 against float64
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: loss(stack(), p)))(params)
    mine = stack_layers(params) if scan else params
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(stack(remat=remat, scan=scan), p)))(mine)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    grads = unstack_layers(grads) if scan else grads
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), grads, expected_grads)


def test_scan_initialises_every_layer_by_itself():
    params = stack(scan=True).init(jax.random.key(1), X, jnp.float32(0.5))["params"]
    kernels = params["layers"]["Dense_0"]["kernel"]
    assert kernels.shape == (LAYERS, 16, 32)
    assert len({float(kernel[0, 0]) for kernel in kernels}) == LAYERS


def test_scan_makes_the_program_no_longer_with_the_depth():
    def size(scan, layers):
        model = Stack(Block, layers, {"width": 32}, scan=scan)
        params = jax.eval_shape(lambda: model.init(jax.random.key(1), X, jnp.float32(0.5)))["params"]
        return len(jax.jit(jax.grad(lambda p: loss(model, p))).lower(params).as_text())

    assert size(True, 12) < 1.05 * size(True, 6)
    assert size(False, 12) > 1.8 * size(False, 6)


def test_remat_keeps_less_for_the_backward_pass(params):
    def kept(remat):
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(stack(remat=remat), p), p)[1], params)
        sizes = [leaf.size for leaf in jax.tree.leaves(residuals)]
        return sum(sizes) - sum(leaf.size for leaf in jax.tree.leaves(params))

    # The input of every block and the shared argument, against three activations twice as wide.
    assert kept(True) <= LAYERS * (X.size + 1) + X.size
    assert kept(False) > 3 * kept(True)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_are_held_where_they_should_lie(params, scan):
    mesh = make_mesh(data=4, model=2)
    placed = NamedSharding(mesh, PartitionSpec("data"))
    model = stack(scan=scan, remat=True, sharding=placed)
    mine = stack_layers(params) if scan else params
    # The parameters are split over the batch's devices: without the constraint the compiler may gather the batch.
    specs = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "data")), mine)
    run = jax.jit(lambda p: model.apply({"params": p}, X, jnp.float32(0.5)), in_shardings=(specs,))
    found = run(mine)
    assert found.sharding.is_equivalent_to(placed, 2)
    np.testing.assert_allclose(found, stack().apply({"params": params}, X, jnp.float32(0.5)), rtol=1e-5, atol=1e-5)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(x.shape[-1])(x)
        self.sow("diagnostics", "size", jnp.abs(x).max(), reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))
        return x


def test_what_layers_sow_survives_the_scan():
    looped, scanned = (Stack(Sowing, 3, {}, scan=scan) for scan in (False, True))
    params = looped.init(jax.random.key(1), X)["params"]
    _, rows = looped.apply({"params": params}, X, mutable="diagnostics")
    _, stacked = scanned.apply({"params": stack_layers(params)}, X, mutable="diagnostics")
    expected = [rows["diagnostics"][f"layers_{layer}"]["size"] for layer in range(3)]
    np.testing.assert_allclose(stacked["diagnostics"]["layers"]["size"], expected, rtol=1e-6)


def test_layers_of_other_names_are_refused():
    with pytest.raises(ValueError, match="expected layers_0 to layers_1, got"):
        stack_layers({"layers_0": {}, "head": {}})
