"""One of several processes that train the tiny transformer together.

    python pair.py WORKDIR STEPS [SECONDS_A_STEP [MODEL [no-manifests]]]

Who is who stands in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them it trains alone.
"""

import sys
import time
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import jax
import optax

from jaxpapers.train import (
    Checkpoints,
    MetricsWriter,
    Terminated,
    batch_part,
    create_state,
    fit,
    fsdp,
    initialize_distributed,
    make_mesh,
    make_train_step,
)
from tests.train.tiny import Tokens, init_params, make_loss


class SlowTokens(Tokens):
    pause = 0.0

    def __getitem__(self, step):
        time.sleep(self.pause)
        return super().__getitem__(step)


def main(workdir, num_steps, pause, model):
    initialize_distributed(heartbeat_timeout_seconds=10)
    optimizer = optax.adam(1e-2)
    mesh = make_mesh(model=model)
    params = init_params()
    batches = SlowTokens(part=batch_part(mesh))
    batches.pause = pause
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        first = jax.process_index() == 0
        metrics = MetricsWriter(workdir, "train", checkpoints.latest_step() or 0) if first else None
        with closing(metrics) if metrics else nullcontext():
            fitted = fit(
                create_state(params, optimizer),
                make_train_step(make_loss(), optimizer),
                batches,
                num_steps,
                key=jax.random.key(0),
                log_every=1,
                checkpoints=checkpoints,
                checkpoint_every=2,
                metrics=metrics,
                mesh=mesh,
                rules=fsdp(params, mesh, min_size=64),
            )
    print(f"step {int(fitted.state.step)} on {jax.device_count()} devices of {jax.process_count()} processes")


def refuse(checkpoints, step):
    raise OSError(f"no manifest for checkpoint {step}")


if __name__ == "__main__":
    if sys.argv[5:] == ["no-manifests"]:
        Checkpoints._vouch_for = refuse
    with suppress(Terminated):
        main(
            Path(sys.argv[1]),
            int(sys.argv[2]),
            float(sys.argv[3]) if len(sys.argv) > 3 else 0.0,
            int(sys.argv[4]) if len(sys.argv) > 4 else 1,
        )
