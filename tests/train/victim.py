"""What test_survival.py kills: a two-layer transformer on generated tokens, trained through the public API.

    python victim.py WORKDIR [--steps=N] [--nan-from=STEP]

It exits with 0 when it has finished or was asked to stop, with 2 after an error, of which it prints one line.
"""

import argparse
import sys
from contextlib import closing
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.nn.stack import Stack
from jaxpapers.train import (
    Checkpoints,
    MetricsWriter,
    NonFiniteLoss,
    Terminated,
    create_state,
    fit,
    make_optimizer,
    make_schedule,
    make_train_step,
)

VOCABULARY, WIDTH, LENGTH, BATCH = 32, 32, 12, 8
CHECKPOINT_EVERY, EVALUATE_EVERY = 3, 6


class Block(nn.Module):
    """Attention and an MLP, each on the normalised stream and added to it."""

    width: int

    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """Logits of the next token."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = Stack(Block, 2, {"width": WIDTH}, scan=True)(x, nn.make_causal_mask(tokens))
        return nn.Dense(VOCABULARY)(x)


class Tokens:
    """Rows that count upwards by a stride of their own; pure functions of the step."""

    def __init__(self, nan_from=None):
        self.nan_from = nan_from

    def __getitem__(self, step):
        rng = np.random.default_rng(step)
        start, stride = rng.integers(VOCABULARY, size=(2, BATCH, 1))
        bad = self.nan_from is not None and step >= self.nan_from
        tokens = (start + stride * np.arange(LENGTH + 1)) % VOCABULARY
        return tokens, np.float32(np.nan if bad else 1.0)


def train(workdir, steps, nan_from=None):
    """One run in its folder, from the newest checkpoint."""
    model = Transformer()

    def loss_fn(params, extra, batch, key):
        tokens, weight = batch
        inputs = jnp.where(jax.random.bernoulli(key, 0.1, tokens.shape), 0, tokens)  # so that the keys matter
        logits = jnp.asarray(model.apply(params, inputs[:, :-1]))
        chosen = jnp.take_along_axis(nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -weight * jnp.mean(chosen), (extra, {})

    @jax.jit
    def evaluate(state):
        loss, _ = loss_fn(state.params, None, held_out, jax.random.key(1))
        return {"loss": loss}

    held_out = Tokens()[10**6]
    optimizer = make_optimizer("adamw", make_schedule("cosine_decay_schedule", 3e-3, 1e-4, steps), clip_norm=1.0)
    params = jax.jit(model.init)(jax.random.key(0), held_out[0][:, :-1])
    with (
        closing(Checkpoints(workdir / "checkpoints")) as checkpoints,
        closing(MetricsWriter(workdir, "main", checkpoints.latest_step() or 0)) as metrics,
    ):
        return fit(
            create_state(params, optimizer),
            make_train_step(loss_fn, optimizer),
            Tokens(nan_from),
            steps,
            key=jax.random.key(2),
            log_every=1,
            evaluate=evaluate,
            evaluate_every=EVALUATE_EVERY,
            minimize="loss",
            checkpoints=checkpoints,
            checkpoint_every=CHECKPOINT_EVERY,
            metrics=metrics,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--nan-from", type=int)
    options = parser.parse_args()
    try:
        options.workdir.mkdir(parents=True, exist_ok=True)
        train(**vars(options))
    except Terminated as stopped:
        print(stopped, file=sys.stderr)
    except (NonFiniteLoss, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
