"""Slots, networks and training of AdaFortiTran and its rivals.

A part of `adafortitran`. A stage is a kind of data: "fixed" (one channel for each pair of delay spread and Doppler
shift, as in the paper's data) or "fresh". All models of a stage see the same slots in the same order; the seeds of a
model are one population under `vmap`, or are trained one by one. On a mesh the slots of a batch are split over `data`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from jaxpapers.data import tdl
from jaxpapers.perception.adafortitran import (
    AdaFortiTran,
    CEViT,
    FortiTran,
    LinearEstimator,
    SisRafNet,
    complex_mse,
    estimation_loss,
)
from jaxpapers.train import (
    OnDevice,
    TrainState,
    TrainStep,
    create_population,
    create_state,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    member_keys,
    to_host,
    vmap_step,
)

STAGES = ("fixed", "fresh")
OTHERS = ("cevit", "sisrafnet", "linear")  # networks of one depth, which `config.layers` does not have


def grid_of(config: ConfigDict, num_subcarriers: int = 0) -> tdl.OfdmGrid:
    """The slot: that of the models, or one of another width."""
    return tdl.OfdmGrid(num_subcarriers or config.grid.subcarriers)


def pilots_of(config: ConfigDict, num_subcarriers: int = 0) -> tdl.Pilots:
    """The pilots of a slot."""
    recipe, grid = config.grid, grid_of(config, num_subcarriers)
    offset = "symmetric" if recipe.offset < 0 else recipe.offset
    return tdl.pilot_indices(grid.num_subcarriers, recipe.spacing, offset, recipe.columns)


def conditions_of(config: ConfigDict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SNRs in dB, delay spreads in ns and Doppler shifts in Hz of the training."""
    values = config.conditions
    return tuple(np.asarray(values[name], float) for name in ("snrs_db", "delay_spreads_ns", "dopplers_hz"))


def condition_scale(config: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Means and standard deviations of the training's conditions, where adapters take them standardised."""
    if not config.model.standardise:
        return None
    values = conditions_of(config)
    return tuple(float(row.mean()) for row in values), tuple(float(row.std()) or 1.0 for row in values)


def bank_of(config: ConfigDict) -> tdl.ChannelBank:
    """The channels of the "fixed" slots: drawn once, for training and tests, whatever the seed."""
    _, spreads, shifts = (np.float32(values) for values in conditions_of(config))
    options = {"num_sinusoids": config.grid.sinusoids, "shared_phases": config.shared_phases}
    draw = partial(tdl.draw_bank, grid=grid_of(config), **options)
    return jax.device_get(jax.jit(draw)(jax.random.key(config.bank_seed), spreads, shifts))


def empty_bank(config: ConfigDict) -> tdl.ChannelBank:
    """One of zeros in its place, for plans."""
    _, spreads, shifts = (np.float32(values) for values in conditions_of(config))
    grid = grid_of(config)
    size = (len(spreads), len(shifts), grid.num_subcarriers, grid.num_symbols)
    return tdl.ChannelBank(spreads, shifts, np.zeros(size, np.complex64))


def slots_at(
    key: Array,
    conditions: Array | np.ndarray,
    stage: str,
    bank: tdl.ChannelBank,
    config: ConfigDict,
    profile: str = "TDL-A",
) -> tdl.Batch:
    """Slots of a stage in these conditions (slots, 3); a profile is that of fresh ones."""
    return tdl.simulate_batch(
        key,
        conditions,
        grid_of(config),
        pilots_of(config),
        config.snr_reference,
        stage,
        bank if stage == "fixed" else None,
        profile,
        num_sinusoids=config.grid.sinusoids,
    )


def slots_of(keys: Array, stage: str, bank: tdl.ChannelBank, config: ConfigDict) -> tdl.Batch:
    """Slots of a stage in conditions drawn from the lists, a key a slot."""

    def slot(key: Array) -> tdl.Batch:
        condition_key, slot_key = jax.random.split(key)
        conditions = tdl.draw_conditions(condition_key, 1, *(values.tolist() for values in conditions_of(config)))
        return jax.tree.map(lambda part: part[0], slots_at(slot_key, conditions, stage, bank, config))

    return jax.vmap(slot)(keys)


def draw_slots(key: Array, step: Array | int, stage: str, bank: tdl.ChannelBank, config: ConfigDict) -> tdl.Batch:
    """The batch of an update: of new slots or, where `training.slots` is not 0, of a set of so many.

    The set is gone through in a new order every epoch, without what is left over behind the last whole batch. Slot i is
    a function of i: the set needs no memory.
    """
    recipe = config.training
    if not recipe.slots:
        return slots_of(jax.random.split(jax.random.fold_in(key, step), recipe.batch_size), stage, bank, config)
    set_key, order_key = jax.random.split(key)
    epoch, place = jnp.divmod(step, epoch_length(config))
    order = jax.random.permutation(jax.random.fold_in(order_key, epoch), recipe.slots)
    chosen = lax.dynamic_slice_in_dim(order, place * recipe.batch_size, recipe.batch_size)
    return slots_of(jax.vmap(partial(jax.random.fold_in, set_key))(chosen), stage, bank, config)


def network(name: str, config: ConfigDict) -> nn.Module:
    """The model of a name: of `OTHERS`, or of `config.layers`, which are (Ada)FortiTrans."""
    recipe, grid, pilots = config.model, grid_of(config), pilots_of(config)
    size = (grid.num_subcarriers, grid.num_symbols)
    shape = (len(pilots.rows), len(pilots.columns))
    encoder = {"dropout_rate": recipe.dropout, "dtype": jnp.dtype(recipe.dtype)}
    match name:
        case "linear":
            return LinearEstimator(size, shape)
        case "sisrafnet":
            return SisRafNet(size, shape, recipe.sisrafnet_channels, recipe.sisrafnet_width)
        case "cevit":
            places = (tuple(pilots.rows.tolist()), tuple(pilots.columns.tolist()))
            scale = condition_scale(config)
            return CEViT(size, *places, tuple(recipe.cevit_patch), recipe.cevit_width, condition_scale=scale, **encoder)
    options = {
        **encoder,
        "width": recipe.width,
        "num_heads": recipe.num_heads,
        "num_layers": config.layers[name],
        "remat": recipe.remat,
    }
    patch = tuple(recipe.patch)
    if name == "fortitran":
        return FortiTran(size, shape, patch, **options)
    tokens = size[0] * size[1] // (patch[0] * patch[1])
    sizes = (*recipe.adapter, 2 * tokens)
    return AdaFortiTran(size, shape, patch, **options, adapter_sizes=sizes, condition_scale=condition_scale(config))


def epoch_length(config: ConfigDict) -> int:
    """Whole batches of the set; 1 without a set."""
    return max(1, config.training.slots // config.training.batch_size)


def optimizer_of(stage: str, config: ConfigDict) -> optax.GradientTransformation:
    """Adam on the schedule of a stage, whose rate changes once an epoch."""
    recipe, updates = config.training, config.training.updates[stage]
    every = min(epoch_length(config), updates)
    schedule = make_schedule(recipe.schedule, recipe.rate, recipe.last_rate, updates, steps_per_change=every)
    return make_optimizer("adam", schedule)


class Setup(NamedTuple):
    """What trains a model on a stage, all its seeds or one of them.

    Attributes:
      model: the network.
      state: before the first update.
      train_step: its update.
      batches: slots; each seed has its own, models the same. The seeds of a population are the second axis: the first,
        which `fit` splits over a mesh, is that of the slots.
      keys: of the dropout, one a seed.
    """

    model: nn.Module
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array


def set_up(
    stage: str,
    name: str,
    seed: int | None,
    bank: tdl.ChannelBank,
    config: ConfigDict,
    jit: Callable[..., Callable] = jit_once,
) -> Setup:
    """State, update and batches of a model on a stage: of one seed, or (None) of the population of all."""
    model, optimizer = network(name, config), optimizer_of(stage, config)
    pilots = pilots_of(config)
    ls = jax.ShapeDtypeStruct((1, len(pilots.rows), len(pilots.columns)), jnp.complex64)
    probe = (ls, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    seeds = jax.random.split(jax.random.key(config.seed), config.num_seeds[stage])
    init_keys, data_keys, keys = member_keys(seeds, 3)

    def init(key: Array) -> Any:
        return model.lazy_init(key, *probe)["params"]

    def loss_fn(params: Any, extra: Any, batch: tdl.Batch, key: Array) -> tuple:
        estimate = model.apply(
            {"params": params}, batch.ls, batch.conditions, deterministic=False, rngs={"dropout": key}
        )
        return estimation_loss(batch.h, estimate), (extra, {})

    step = make_train_step(loss_fn, optimizer)

    def batch(key: Array, at: Array, bank: tdl.ChannelBank) -> tdl.Batch:
        return draw_slots(key, at, stage, bank, config)

    if seed is None:
        state = create_population(init, optimizer, init_keys, jit=jit)
        together = OnDevice(lambda at, bank: jax.vmap(batch, (0, None, None), 1)(data_keys, at, bank), bank)
        population = vmap_step(step)

        def population_step(state: TrainState, batch: tdl.Batch, keys: Array) -> tuple[TrainState, Any]:
            return population(state, jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), batch), keys)

        return Setup(model, state, population_step, together, keys)
    state = jit(lambda key: create_state(init(key), optimizer))(init_keys[seed])
    return Setup(model, state, step, OnDevice(partial(batch, data_keys[seed]), bank), keys[seed])


def validation_program(
    stage: str, model: nn.Module, bank: tdl.ChannelBank, config: ConfigDict, mesh: Mesh | None
) -> Callable[[Any], Array]:
    """Jitted `params -> E|h - h^|^2` on slots of their own, the same at every call."""
    recipe = config.training
    key = jax.random.fold_in(jax.random.key(config.seed), config.num_seeds[stage])
    chunks = jax.random.split(key, (recipe.validation_slots // recipe.validation_chunk, recipe.validation_chunk))

    def error(params: Any, keys: Array) -> Array:
        batch = slots_of(keys, stage, bank, config)
        if mesh is not None:
            batch = lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))
        return complex_mse(batch.h, model.apply({"params": params}, batch.ls, batch.conditions))

    return jax.jit(lambda params: jnp.mean(lax.map(partial(error, params), chunks)))


def train(
    stage: str, name: str, bank: tdl.ChannelBank, config: ConfigDict, run: Run, title: str = ""
) -> tuple[nn.Module, Any]:
    """Trains a model on a stage: the network, and its parameters on the host, a row a seed.

    Args:
      stage: one of `STAGES`.
      name: of the model.
      bank: of the fixed slots.
      config: of the experiment.
      run: what keeps the training's files.
      title: under which they stand; "": stage and name.
    """
    recipe, updates = config.training, config.training.updates[stage]
    title = title or f"{stage}_{name}"
    every = {"steps_per_call": recipe.updates_per_call, "log_every": recipe.log_every}
    if config.together:
        setup = set_up(stage, name, None, bank, config)
        parts = (setup.state, setup.train_step, setup.batches)
        fitted = run.fit(title, *parts, updates, key=setup.keys, **every)
        return setup.model, to_host(fitted.state.params)
    found = []
    for seed in range(config.num_seeds[stage]):
        setup = set_up(stage, name, seed, bank, config)
        validate = validation_program(stage, setup.model, bank, config, run.mesh)
        best = run.fit(
            f"{title}_{seed}",
            setup.state,
            setup.train_step,
            setup.batches,
            updates,
            key=setup.keys,
            **every,
            evaluate=lambda state, validate=validate: {"mse": validate(state.params)},
            evaluate_every=epoch_length(config),
            minimize="mse",
            patience=recipe.patience * epoch_length(config),
        ).best
        found.append(to_host(best.params))
    return setup.model, jax.tree.map(lambda *leaves: np.stack(leaves), *found)
