"""A two-layer transformer on generated tokens: what the training tests train."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers.nn.stack import Stack

VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 32, 16, 32, 2, 16


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, dtype=self.dtype, name="attention")(h, mask=mask)
        h = nn.Dense(4 * WIDTH, dtype=self.dtype, name="up")(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(WIDTH, dtype=self.dtype, name="down")(nn.gelu(h))


class TinyTransformer(nn.Module):
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="embed")
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.1), (LENGTH, WIDTH)).astype(self.dtype)
        mask = nn.make_causal_mask(tokens)
        x = Stack(Block, 2, {"dtype": self.dtype}, remat=self.remat, scan=self.scan, name="blocks")(x, mask)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x)).astype(jnp.float32)


def init_params(seed=0, **options):
    model = TinyTransformer(**options)
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32))["params"]


def make_loss(**options):
    """Next-token cross-entropy; the key drops some tokens, so that a resumed run must draw the same ones."""
    model = TinyTransformer(**options)

    def loss_fn(params, extra, tokens, key):
        weight = jax.random.bernoulli(key, 0.9, (tokens.shape[0], LENGTH - 1))
        logits = model.apply({"params": params}, tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        accuracy = jnp.mean(logits.argmax(-1) == tokens[:, 1:])
        return jnp.sum(losses * weight) / jnp.sum(weight), (extra, {"accuracy": accuracy})

    return loss_fn


class Tokens:
    """Walks x, x + s, x + 2 s, ... modulo the vocabulary; batch `step` is a function of the step.

    `part` is this process's share of the rows: (its index, number of processes).
    """

    def __init__(self, part=(0, 1), batch=BATCH):
        self.rows = slice(part[0] * batch // part[1], (part[0] + 1) * batch // part[1])
        self.batch = batch

    def __getitem__(self, step):
        random = np.random.default_rng(step)
        start, stride = random.integers(0, VOCABULARY, (2, self.batch, 1))
        return ((start + stride * np.arange(LENGTH)) % VOCABULARY).astype(np.int32)[self.rows]
