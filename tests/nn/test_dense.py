"""Dense layers against flax's own, values and derivatives, and what XLA makes of them for a mesh of a TPU."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxpapers.nn.dense import Dense, DenseGeneral, matrix_product
from jaxpapers.train import jit_once
from tests.tpu import needs_libtpu, run_program

sizes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@given(batch=sizes, inputs=sizes.filter(bool), features=sizes, seed=st.integers(0, 2**32 - 1))
def test_any_axes_are_those_of_dot_general_and_so_are_the_derivatives(batch, inputs, features, seed):
    rng = np.random.default_rng(seed)
    x, kernel, g = (rng.normal(size=shape) for shape in (batch + inputs, inputs + features, batch + features))
    contracted = tuple(range(len(batch), x.ndim)), tuple(range(len(inputs)))
    with jax.enable_x64(True):

        def both(product):
            y, pull = jax.vjp(lambda x, kernel: product(x, kernel, (contracted, ((), ()))), x, kernel)
            return y, *pull(g)

        for ours, expected in zip(both(matrix_product), both(lax.dot_general), strict=True):
            assert ours.shape == expected.shape
            np.testing.assert_allclose(ours, expected, atol=1e-13)


@pytest.mark.parametrize(
    "dimension_numbers",
    [(((0,), (0,)), ((), ())), (((1, 2), (1, 0)), ((), ())), (((2,), (1,)), ((0,), (0,)))],
    ids=["first axis", "other order", "batched"],
)
def test_other_contractions_are_dot_generals(dimension_numbers):
    x, kernel = (np.random.default_rng(seed).normal(size=(3, 3, 3)).astype(np.float32) for seed in range(2))
    expected = lax.dot_general(x, kernel, dimension_numbers)
    np.testing.assert_array_equal(matrix_product(jnp.asarray(x), jnp.asarray(kernel), dimension_numbers), expected)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [("Dense", {"features": 5}), ("DenseGeneral", {"features": (2, 5), "axis": (-2, -1), "dtype": jnp.bfloat16})],
)
def test_the_layers_are_flaxs_and_multiply_two_matrices_in_the_backward_pass_too(make, arguments):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    ours, expected = {"Dense": Dense, "DenseGeneral": DenseGeneral}[make](**arguments), getattr(nn, make)(**arguments)
    variables = jit_once(ours.init)(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(jax.eval_shape(expected.init, jax.random.key(1), x))
    np.testing.assert_allclose(ours.apply(variables, x), expected.apply(variables, x), rtol=1e-5)

    jaxpr = str(jax.make_jaxpr(jax.grad(lambda variables, x: ours.apply(variables, x).sum(), (0, 1)))(variables, x))
    contracted = re.findall(r"dimension_numbers=\(\(\[([\d, ]*)\], \[([\d, ]*)\]\), \(\[\], \[\]\)\)", jaxpr)
    assert len(contracted) == 3  # forward, and for both arguments
    assert all("," not in axes for pair in contracted for axes in pair)


@needs_libtpu
def test_batch_and_time_that_are_split_over_tpus_stay_split(tmp_path):
    run_program(
        """
import re
import flax.linen as nn, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from jaxpapers.nn.dense import Dense

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "seq"))
x = jax.ShapeDtypeStruct((4, 256, 128), jnp.float32, sharding=NamedSharding(mesh, P("data", "seq")))
programs = []
for make in (Dense, nn.Dense):
    model = nn.Sequential([make(256), nn.gelu, make(128)])
    whole = NamedSharding(mesh, P())
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    step = jax.jit(jax.value_and_grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2)))
    text = step.lower(params, x).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
    programs.append(sorted(re.findall(r"= (\\S+) (?:fusion|convolution|copy)\\(", text)))
assert programs[0] == programs[1], programs
""",
        tmp_path,
    )
