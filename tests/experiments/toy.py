"""A toy experiment that trains one number: what the tests of the harness run."""

import types

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Claim, Paper
from jaxpapers.train import OnDevice, create_state, make_train_step


def toy_config(preset="small"):
    return ConfigDict(
        {
            "seed": 0,
            "rate": 0.5,
            "name": "sgd",
            "fast": True,
            "sizes": (1, 2),
            "model": {"width": 4},
            "crash": False,
        }
    )


def toy_run(config, run):
    """Walks w from 1 to 0; the last evaluation crashes where the config says so."""

    def loss(params, extra, batch, key):
        return params["w"] ** 2 / 2, (extra, {})

    def evaluate(state):
        if config.crash and CRASH["on"] and int(state.step) == 6:
            raise KeyboardInterrupt
        return {"w": state.params["w"]}

    optimizer = optax.sgd(config.rate)
    fitted = run.fit(
        "toy",
        create_state({"w": jax.numpy.ones(())}, optimizer),
        make_train_step(loss, optimizer),
        OnDevice(lambda step: None),
        6,
        key=jax.random.key(config.seed),
        log_every=1,
        evaluate=evaluate,
        evaluate_every=2,
    )
    figure, (ax,) = figures.panels(1)
    ax.plot([0, 1])
    run.figure("line", figure)
    return {
        "w": np.float32(fitted.state.params["w"]),
        "lost": float("nan"),
        "list": np.arange(3),
        "word": "yes",
    }


CRASH = {"on": True}
TOY = types.SimpleNamespace(
    PAPER=Paper("Toy", "A. Nobody", 2026, ""),
    COVER="line",
    get_config=toy_config,
    run=toy_run,
    CLAIMS=(
        Claim("small", "Eq. 1", "w is small", "0", lambda m: f"{m['w']:.3f}", lambda m: m["w"] < 0.1),
        Claim("large", "Eq. 2", "w is large", "9", lambda m: f"{m['w']:.3f}", lambda m: m["w"] > 9),
        Claim("other", "Eq. 3", "v is small", "0", lambda m: f"{m['v']:.3f}", lambda m: m["v"] < 9),
    ),
)
