"""ViT against numpy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from jaxpapers.nn.stack import stack_layers
from jaxpapers.nn.vit import ViT, ViTB16, ViTS16
from jaxpapers.train import run_once

X = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
HEADS = 2


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def reference(params, x, pool, patch=4):
    p = jax.tree.map(np.float64, params)
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    cut = [
        [
            x[b, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
            for i in range(rows)
            for j in range(columns)
        ]
        for b in range(len(x))
    ]
    tokens = dense(np.float64(cut), p["patches"])
    if pool == "class":
        tokens = np.concatenate([np.repeat(p["class_token"], len(x), axis=0), tokens], axis=1)
    tokens = tokens + p["positions"]
    for index in range(2):
        block = p["blocks"][f"layers_{index}"]
        normed = layer_norm(tokens, block["attention_norm"])
        q, k, v = (
            dense(normed, block["attention"][name]).reshape(*tokens.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(q)
        for b, h in np.ndindex(len(x), HEADS):
            weights = softmax(q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[-1]), axis=-1)
            mixed[b, :, h] = weights @ v[b, :, h]
        tokens = tokens + dense(mixed.reshape(tokens.shape), block["attention"]["out"])
        hidden = dense(layer_norm(tokens, block["mlp_norm"]), block["mlp"]["up"])
        tokens = tokens + dense(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, block["mlp"]["down"])
    tokens = layer_norm(tokens, p["norm"])
    return tokens[:, 0] if pool == "class" else tokens.mean(axis=1)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_features(pool):
    model = ViT(4, 8, 2, HEADS, 16, pool)
    params = run_once(model.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)  # so that norms, biases and the class token count
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
    # Tokens so small that the first norm's epsilon, the authors' 1e-6, counts as much as their variance.
    small = ("patches", "positions", "class_token")
    params |= {name: jax.tree.map(lambda leaf: leaf / 1000, params[name]) for name in small if name in params}
    z = jax.jit(model.apply)({"params": params}, X)
    np.testing.assert_allclose(z, reference(params, X, pool), rtol=1e-4, atol=1e-5)  # float32
    if pool == "mean":  # the options of a deep model change nothing
        scanned = {**params, "blocks": stack_layers(params["blocks"])}
        deep = jax.jit(model.clone(remat=True, scan=True).apply)({"params": scanned}, X)
        np.testing.assert_allclose(deep, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "parameters"), [(ViTS16, 22_050_664), (ViTB16, 86_567_656)])
def test_sizes_are_the_published_ones(make, parameters):
    model = make()
    shape = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), shape)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count + 1000 * (model.width + 1) == parameters  # with a classifier of 1000 classes


def test_patches_positions_and_class_token_start_as_they_should():
    params = run_once(ViT(2, 64, 1, 1, 8).init, jax.random.key(0), X)["params"]
    np.testing.assert_allclose(np.std(params["patches"]["kernel"]), 12**-0.5, rtol=0.1)  # 768 draws
    assert (params["patches"]["bias"] == 0).all()
    np.testing.assert_allclose(np.std(params["positions"]), 0.02, rtol=0.1)  # 1,600 draws
    assert (params["class_token"] == 0).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="pool 'cls' is unknown"):
        ViT(4, 8, 1, 2, 16, "cls").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"patches of \(5, 5\) do not fill a grid of \(8, 12\)"):
        ViT(5, 8, 1, 2, 16).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        ViT(4, 8, 1, 3, 16).init(jax.random.key(0), X)
