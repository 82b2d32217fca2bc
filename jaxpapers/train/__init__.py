"""The one training loop of all papers.

    state = create_state(params, optimizer)
    train_step = make_train_step(loss_fn, optimizer)
    fitted = fit(state, train_step, batches, num_steps, key=key, checkpoints=..., metrics=..., evaluate=...)

state       what a run carries; populations of models that train together
step        one update, for one model or under `vmap` for a population
loop        `fit`
optimizers  optimizers and schedules by their optax names
checkpoint  save, resume
metrics     metrics.jsonl and TensorBoard
progress    the bar
files       files that are whole or absent
"""

from jaxpapers.train.checkpoint import CheckpointMismatch, Checkpoints
from jaxpapers.train.files import write_whole
from jaxpapers.train.loop import Best, Fitted, NonFiniteLoss, OnDevice, fit
from jaxpapers.train.metrics import MetricsWriter, json_value, read_metrics
from jaxpapers.train.optimizers import make_optimizer, make_schedule
from jaxpapers.train.state import TrainState, create_population, create_state, member
from jaxpapers.train.step import LossFn, TrainStep, make_train_step, scan_steps, vmap_step

__all__ = [
    "Best",
    "CheckpointMismatch",
    "Checkpoints",
    "Fitted",
    "LossFn",
    "MetricsWriter",
    "NonFiniteLoss",
    "OnDevice",
    "TrainState",
    "TrainStep",
    "create_population",
    "create_state",
    "fit",
    "json_value",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "member",
    "read_metrics",
    "scan_steps",
    "vmap_step",
    "write_whole",
]
