"""What test_survival.py kills: a two-layer transformer on generated tokens, trained through the public API.

    python victim.py WORKDIR [--steps=N] [--nan-from=STEP]

It exits with 0 when it has finished or was asked to stop, with 2 after an error, of which it prints one line.
"""

import argparse
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

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
from tests.train.tiny import Tokens, init_params, make_loss

CHECKPOINT_EVERY, EVALUATE_EVERY = 3, 6


class WeightedTokens(Tokens):
    """Tokens with a weight for their loss: 1, or NaN from a step on."""

    def __init__(self, nan_from=None):
        super().__init__()
        self.nan_from = nan_from

    def __getitem__(self, step):
        bad = self.nan_from is not None and step >= self.nan_from
        return super().__getitem__(step), np.float32(np.nan if bad else 1.0)


def train(workdir, steps, nan_from=None):
    """One run in its folder, from the newest checkpoint."""
    language_loss = make_loss(scan=True)

    def loss_fn(params, extra, batch, key):
        tokens, weight = batch
        loss, measured = language_loss(params, extra, tokens, key)
        return weight * loss, measured

    @jax.jit
    def evaluate(state):
        loss, _ = loss_fn(state.params, None, held_out, jax.random.key(1))
        return {"loss": loss}

    held_out = WeightedTokens()[10**6]
    optimizer = make_optimizer("adamw", make_schedule("cosine_decay_schedule", 3e-3, 1e-4, steps), clip_norm=1.0)
    with (
        closing(Checkpoints(workdir / "checkpoints")) as checkpoints,
        closing(MetricsWriter(workdir, "main", checkpoints.latest_step() or 0)) as metrics,
    ):
        return fit(
            create_state(init_params(scan=True), optimizer),
            make_train_step(loss_fn, optimizer),
            WeightedTokens(nan_from),
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
