"""PyTorch's default initialisation: bounds and moments of U(+-1/sqrt(fan_in)) for the layouts of flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpapers.nn.initializers import torch_default_bias_init, torch_default_kernel_init

# (layer, input shape, fan_in counted by hand: the inputs that one output unit sums over)
LAYERS = [
    (nn.Dense(400), (1, 50), 50),
    (nn.Conv(96, (3, 3), feature_group_count=4), (1, 5, 5, 16), 3 * 3 * 4),
]


@pytest.mark.parametrize(("layer", "shape", "fan_in"), LAYERS, ids=["dense", "grouped conv"])
def test_flax_layers_are_drawn_from_torchs_uniform(layer, shape, fan_in):
    layer = layer.clone(kernel_init=torch_default_kernel_init, bias_init=torch_default_bias_init(fan_in))
    params = jax.jit(layer.init)(jax.random.key(0), jnp.ones(shape))["params"]
    bound = fan_in**-0.5
    for name, draws in params.items():
        draws = np.asarray(draws, np.float64).ravel()
        assert np.abs(draws).max() <= bound * (1 + 1e-6)  # the bound itself is rounded to float32
        # A fixed key: 1e-3 is not a rate of false alarms but how far the draws may stray.
        assert stats.kstest(draws, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3, name
    kernel = np.asarray(params["kernel"], np.float64)
    # Variance bound^2 / 3; the variance of a uniform's sample variance is 4/5 of its square, over n.
    relative = 5 * np.sqrt(0.8 / kernel.size)
    np.testing.assert_allclose(kernel.var(), 1 / (3 * fan_in), rtol=relative)


def test_kernel_and_bias_are_independent_functions_of_the_key():
    first, again, other = (torch_default_kernel_init(jax.random.key(k), (3, 4)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first, other).any()
    init = torch_default_bias_init(3)
    np.testing.assert_array_equal(init(jax.random.key(0), (4,)), init(jax.random.key(0), (4,)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_dtype_is_the_callers(dtype):
    with jax.enable_x64(True):
        assert torch_default_kernel_init(jax.random.key(0), (3, 4), dtype).dtype == dtype
        assert torch_default_bias_init(3)(jax.random.key(0), (4,), dtype).dtype == dtype


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (3, 0, 5)])
def test_kernels_without_inputs_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least one input, got shape \("):
        torch_default_kernel_init(jax.random.key(0), shape)


def test_biases_without_inputs_are_refused():
    with pytest.raises(ValueError, match="fan_in must be at least 1, got 0"):
        torch_default_bias_init(0)
