"""The one training loop of all papers.

    state = create_state(params, optimizer)
    train_step = make_train_step(loss_fn, optimizer)
    fitted = fit(state, train_step, batches, num_steps, key=key, checkpoints=..., metrics=..., evaluate=...)

state       what a run carries; populations of models that train together
step        one update, for one model or under `vmap` for a population
loop        `fit`
mesh        meshes, placement of parameters by rules, batches by `data`, several processes
stopping    SIGTERM
optimizers  optimizers and schedules by their optax names
checkpoint  save, resume
metrics     metrics.jsonl and TensorBoard
progress    the bar
files       files that are whole or absent
"""

from jaxpapers.train.checkpoint import CheckpointMismatch, Checkpoints, nbytes
from jaxpapers.train.files import write_whole
from jaxpapers.train.loop import Best, Fitted, NonFiniteLoss, OnDevice, fit, update_program
from jaxpapers.train.mesh import (
    POPULATION_RULES,
    Rules,
    abstract,
    batch_part,
    fsdp,
    initialize_distributed,
    make_mesh,
    on_first,
    param_specs,
    place,
    place_batch,
    state_shardings,
    to_host,
)
from jaxpapers.train.metrics import MetricsWriter, json_value, read_metrics
from jaxpapers.train.optimizers import averaged_params, make_optimizer, make_schedule
from jaxpapers.train.state import (
    TrainState,
    abstractly,
    create_population,
    create_state,
    eagerly,
    jit_once,
    member,
    member_keys,
    run_once,
)
from jaxpapers.train.step import LossFn, TrainStep, make_train_step, scan_steps, vmap_step
from jaxpapers.train.stopping import Terminated, sigterm_noted, sigterm_raises

__all__ = [
    "POPULATION_RULES",
    "Best",
    "CheckpointMismatch",
    "Checkpoints",
    "Fitted",
    "LossFn",
    "MetricsWriter",
    "NonFiniteLoss",
    "OnDevice",
    "Rules",
    "Terminated",
    "TrainState",
    "TrainStep",
    "abstract",
    "abstractly",
    "averaged_params",
    "batch_part",
    "create_population",
    "create_state",
    "eagerly",
    "fit",
    "fsdp",
    "initialize_distributed",
    "jit_once",
    "json_value",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "member",
    "member_keys",
    "nbytes",
    "on_first",
    "param_specs",
    "place",
    "place_batch",
    "read_metrics",
    "run_once",
    "scan_steps",
    "sigterm_noted",
    "sigterm_raises",
    "state_shardings",
    "to_host",
    "update_program",
    "vmap_step",
    "write_whole",
]
