"""Data, models and training of iTransformer's experiment. A part of `itransformer`.

A stage is a model on a data set, all its seeds trained together under `vmap`: epochs of shuffled windows, one epoch a
scan, Adam at a rate that is halved every epoch from the third on, the best epoch by the validation error. Stages of one
data set and seed see the same windows in the same order.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.sequence._itransformer_linear import Bounds, linear_bounds
from jaxpapers.data.forecasting import (
    BENCHMARKS,
    PARTS,
    Batch,
    Splits,
    Table,
    Windows,
    load_table,
    prepare,
    split_rows,
    time_features,
    window_numbers,
)
from jaxpapers.data.oscillators import delayed_oscillators, draw_mixture, oscillators
from jaxpapers.nn.attention import probsparse_attention
from jaxpapers.sequence.itransformer import (
    DLinear,
    ITransformer,
    PatchTST,
    RLinear,
    VanillaTransformer,
    random_variate_subset,
)
from jaxpapers.train import (
    OnDevice,
    TrainState,
    TrainStep,
    create_population,
    eagerly,
    jit_once,
    make_optimizer,
    make_train_step,
    member_keys,
    place,
    read_metrics,
    to_host,
    vmap_step,
)

MODELS = ("itransformer", "vanilla", "dlinear", "rlinear", "patchtst")
SYNTHETIC = "synthetic"
# Where parameters lie on a mesh with an axis `model`: heads and hidden units are split; axis 0 is that of the seeds.
MODEL_RULES = (
    (r"(query|key|value|query_key|up)/kernel$", PartitionSpec(None, None, "model")),
    (r"(out|down)/kernel$", PartitionSpec(None, "model", None)),
)


def load(name: str, config: ConfigDict) -> Table:
    """A data set by its name, or the oscillators of the config.

    Raises:
      DataNotFound: its file is missing and cannot be downloaded.
    """
    return _synthetic(config) if name == SYNTHETIC else load_table(name)


def _synthetic(config: ConfigDict) -> Table:
    recipe = config.synthetic
    draw = partial(
        delayed_oscillators,
        num_steps=recipe.rows,
        radius=recipe.radius,
        periods=tuple(recipe.periods),
        noise=recipe.noise,
        **_mixture(recipe),
    )
    values = np.asarray(jit_once(draw)(jax.random.key(config.seed)), np.float64)
    return Table(values, tuple(map(str, range(recipe.variates))), _hours(recipe.rows))


def _mixture(recipe: ConfigDict) -> dict[str, Any]:
    fields = {"variates": "num_variates", "latents": "num_latents"}
    return {fields.get(name, name): recipe[name] for name in (*fields, "amplitude", "spread", "max_delay")}


def synthetic_bounds(stage: ConfigDict, config: ConfigDict) -> Bounds:
    """Errors of the best linear forecasts of the oscillators, with the look-back and horizon of a stage."""
    recipe = config.synthetic
    weights, delays = map(np.asarray, draw_mixture(jax.random.key(config.seed), **_mixture(recipe)))
    latents = oscillators(recipe.latents, recipe.radius, tuple(recipe.periods))
    return linear_bounds(weights, delays, latents, recipe.noise, stage.look_back, stage.horizon)


def shape_of(name: str, config: ConfigDict) -> tuple[int, int]:
    """Rows and variates of a data set, without its file."""
    if name == SYNTHETIC:
        return config.synthetic.rows, config.synthetic.variates
    return BENCHMARKS[name].num_rows, BENCHMARKS[name].num_variates


def _hours(rows: int) -> np.ndarray:
    return np.datetime64("2020-01-01T00:00:00") + np.arange(rows) * np.timedelta64(3600, "s")


class Task(NamedTuple):
    """The windows of a stage.

    Attributes:
      windows: of the whole series.
      parts: numbers of the windows of training, validation and test.
      std: of each variate in the training rows, in its own unit.
      mean: likewise.
    """

    windows: Windows
    parts: dict[str, range]
    std: np.ndarray
    mean: np.ndarray


def split_name(name: str) -> str:
    """How a data set is split, one of `forecasting.SPLITS`."""
    return "custom" if name == SYNTHETIC else BENCHMARKS[name].split


def task_of(table: Table, stage: ConfigDict) -> Task:
    """Standardises a table and numbers the windows of its parts.

    Raises:
      ValueError: look-back and horizon that a part is too short for; calendar features without timestamps.
    """
    data = prepare(table, split_name(stage.data), stage.look_back)
    if stage.marks and data.marks is None:
        raise ValueError(f"{stage.data} has no timestamps: stages on it take marks=False")
    windows = Windows(data.series, data.marks if stage.marks else None, stage.look_back, stage.horizon)
    return Task(windows, parts_of(data.splits, stage), data.scaler.std, data.scaler.mean)


def blank_task(stage: ConfigDict, config: ConfigDict) -> Task:
    """A stage's windows of zeros that take no memory: what a plan needs, without a file."""
    rows, variates = shape_of(stage.data, config)

    def zeros(*shape: int) -> np.ndarray:
        return np.broadcast_to(np.float32(0), shape)

    marks = zeros(rows, time_features(_hours(1)).shape[1]) if stage.marks else None
    windows = Windows(zeros(rows, variates), marks, stage.look_back, stage.horizon)
    splits = split_rows(split_name(stage.data), rows, stage.look_back)
    return Task(windows, parts_of(splits, stage), zeros(variates), zeros(variates))


def parts_of(splits: Splits, stage: ConfigDict) -> dict[str, range]:
    """The windows that a stage trains on, validates and is tested on, as numbers of those of the whole series.

    Args:
      splits: of the stage's look-back.
      stage: its strides, look-back and horizon.

    Raises:
      ValueError: as `window_numbers`.
    """
    numbers = {part: window_numbers(splits, part, stage.look_back, stage.horizon) for part in PARTS}
    return {part: every[:: stage.train_stride if part == "train" else stage.stride] for part, every in numbers.items()}


class NaiveErrors(NamedTuple):
    """Mean squared errors of forecasts that nothing was learnt for.

    Attributes:
      repeated: of the last value of the window, for all steps.
      climatology: of the variate's mean in the training rows.
    """

    repeated: float
    climatology: float


def naive_errors(task: Task, part: str = "test") -> NaiveErrors:
    """What forecasts of the windows of a part are to be held against."""
    series, horizon = task.windows.series, task.windows.horizon
    first = np.asarray(task.parts[part]) + task.windows.look_back
    last = series[first - 1]

    def errors(step: int) -> tuple[np.floating, np.floating]:  # all steps at once would be gigabytes of the large sets
        values = series[first + step]
        return np.mean(np.square(values - last), dtype=np.float64), np.mean(np.square(values), dtype=np.float64)

    return NaiveErrors(*np.mean([errors(step) for step in range(horizon)], axis=0).tolist())


def model_of(stage: ConfigDict) -> nn.Module:
    """The network of a stage."""
    if stage.model == "dlinear":
        return DLinear(stage.horizon)
    if stage.model == "rlinear":
        return RLinear(stage.horizon)
    sizes = {"d_model": stage.width, "d_ff": stage.hidden, "num_layers": stage.num_layers}
    sizes |= {"num_heads": stage.num_heads, "dropout_rate": stage.dropout, "dtype": jnp.dtype(stage.dtype)}
    if stage.model == "patchtst":
        return PatchTST(stage.horizon, **sizes)
    if stage.model == "itransformer":
        attention: Any = stage.attention
        if attention == "probsparse":
            attention = partial(probsparse_attention, factor=stage.factor)
        variate, temporal = stage.components
        return ITransformer(
            stage.horizon, attention=attention, variate=variate, temporal=temporal, use_norm=stage.use_norm, **sizes
        )
    return VanillaTransformer(
        stage.horizon,
        label_len=min(stage.label_len, stage.look_back),
        attention=stage.attention,
        factor=stage.factor,
        distil=stage.distil,
        use_norm=stage.use_norm,
        channel_independent=stage.channel_independent,
        **sizes,
    )


def forecast(
    model: nn.Module,
    variables: Any,
    x: Array,
    marks: Array | None,
    key: Array | None = None,
    keep: Callable[[nn.Module, str], bool] | None = None,
) -> tuple[Array, Any]:
    """The forecast of windows, and what changes with it.

    Args:
      model: the network.
      variables: its collections.
      x: (batch, T, N).
      marks: (batch, T + S, M), or None.
      key: of the dropout, in training; None: nothing is dropped.
      keep: which modules' outputs are kept, as of Flax's `capture_intermediates`.

    Returns:
      y (batch, S, N), and the new batch statistics (in training) or what was kept; None where there are neither.
    """
    time = x.shape[1]
    arguments = [x, None if marks is None else marks[:, :time]]
    if isinstance(model, VanillaTransformer):
        arguments.append(None if marks is None else marks[:, time:])
    if keep is not None:
        y, kept = model.apply(variables, *arguments, capture_intermediates=keep, mutable="intermediates")
        return y, kept["intermediates"]
    if key is None:
        return model.apply(variables, *arguments), None
    options = {"deterministic": False, "rngs": {"dropout": key}}
    if "batch_stats" not in variables:
        return model.apply(variables, *arguments, **options), None
    y, changed = model.apply(variables, *arguments, mutable="batch_stats", **options)
    return y, changed["batch_stats"]


def epoch_order(count: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """(epochs * steps, batch) window numbers: every epoch a permutation of its own, its incomplete batch left out."""
    steps = count // batch_size
    rows = []
    for epoch in range(epochs):
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        rows.append(generator.permutation(count)[: steps * batch_size].reshape(steps, batch_size))
    return np.concatenate(rows).astype(np.int32)


def halving(rate: float, epoch: int) -> optax.Schedule:
    """The authors' "type1": epochs 1 and 2 at the rate, then half of it, a quarter, ..."""
    return lambda step: rate * 0.5 ** jnp.maximum(step // epoch - 1, 0)


class Rows(NamedTuple):
    """The arrays of `Windows`, without its static fields.

    Attributes:
      series: standardised rows.
      marks: their calendar features, or None.
    """

    series: Array
    marks: Array | None


def rows_of(windows: Windows) -> Rows:
    """The arrays of windows."""
    return Rows(windows.series, windows.marks)


class Setup(NamedTuple):
    """What trains the population of a stage.

    Attributes:
      model: the network.
      epoch: updates.
      state: before the first update, a row a seed. Its `params` are all the variables of the model.
      train_step: of the population.
      batches: windows. The seeds are the second axis: the first, which `fit` splits over a mesh, is that of windows.
      keys: one a seed.
    """

    model: nn.Module
    epoch: int
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array


def set_up(task: Task, stage: ConfigDict, config: ConfigDict, jit: Callable[..., Callable] = eagerly) -> Setup:
    """Model, loss, optimizer and batches of a stage."""
    model = model_of(stage)
    train = task.parts["train"]
    epoch = len(train) // stage.batch_size
    variates = task.windows.series.shape[1]
    trained = stage.train_variates or variates

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def init(key: Array) -> Any:
        arguments = [rows(stage.look_back, stage.subset or trained)]
        if (marks := task.windows.marks) is not None:
            arguments.append(rows(stage.look_back, marks.shape[1]))
            if isinstance(model, VanillaTransformer):
                arguments.append(rows(stage.horizon, marks.shape[1]))
        return dict(model.lazy_init(key, *arguments))

    def loss_fn(variables: Any, statistics: Any, batch: Batch, key: Array) -> tuple:
        dropout_key, subset_key = jax.random.split(key)
        x, y, marks = batch
        x, y = x[..., :trained], y[..., :trained]
        if stage.subset:  # the same for the whole batch
            chosen = random_variate_subset(subset_key, trained, stage.subset)
            x, y = x[..., chosen], y[..., chosen]
        found, statistics = forecast(model, variables, x, marks, dropout_key)
        return jnp.mean(jnp.square(found - y)), (statistics, {})

    seeds = [config.seed + seed for seed in range(stage.num_seeds)]
    init_keys, keys = member_keys(jnp.stack([jax.random.key(seed) for seed in seeds]), 2)
    shapes = jax.eval_shape(init, init_keys[0])
    normalised = "batch_stats" in shapes
    frozen = ("^batch_stats/",) if normalised else ()
    rate = halving(stage.rate, epoch) if stage.halving else stage.rate
    optimizer = make_optimizer(config.optimizer, rate, frozen=frozen)
    one_step = vmap_step(make_train_step(loss_fn, optimizer))

    def train_step(state: TrainState, batch: Batch, keys: Array) -> tuple:
        state, metrics = one_step(state, jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), batch), keys)
        if normalised:  # among the parameters, so that the best ones come with their statistics
            state = state.replace(params={**state.params, "batch_stats": state.extra})
        return state, metrics

    def batch_at(step: Array, data: tuple[Array, Rows]) -> Batch:
        order, rows = data
        return jax.vmap(Windows(*rows, stage.look_back, stage.horizon).gather, 1, 1)(order[step])

    order = np.stack([epoch_order(len(train), stage.batch_size, stage.epochs, seed) for seed in seeds], axis=-1)
    order = train.start + train.step * order
    state = create_population(init, optimizer, init_keys, jit=jit)
    # Arrays of their own: an update gives up those of its state.
    statistics = jit(partial(jax.tree.map, jnp.copy))(state.params["batch_stats"]) if normalised else None
    return Setup(
        model,
        epoch,
        state.replace(extra=statistics),
        train_step,
        OnDevice(batch_at, (order, rows_of(task.windows))),
        keys,
    )


@cache
def errors_program(model: nn.Module, look_back: int, trained: int | None, mesh: Mesh | None) -> Callable:
    """`(variables, rows, index, weights) -> (seeds, 2, N)`: squared and absolute errors, summed up."""

    def errors(variables: Any, rows: Rows, index: Array, weights: Array) -> Array:
        windows = Windows(rows.series, rows.marks, look_back, model.pred_len)
        if mesh is not None:
            index = jax.lax.with_sharding_constraint(index, NamedSharding(mesh, PartitionSpec("data")))
        x, y, marks = windows.gather(index)
        found, _ = forecast(model, variables, x[..., :trained], marks)
        wrong = found - y[..., :trained]
        both = jnp.stack([jnp.square(wrong), jnp.abs(wrong)])
        return jnp.einsum("ebsn,b->en", both, weights)

    return jax.jit(jax.vmap(errors, (0, None, None, None)))


def errors_of(
    model: nn.Module,
    variables: Any,
    task: Task,
    part: str,
    chunk: int,
    trained: int | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """(seeds, 2, N): mean squared and absolute error of each variate, over all windows and steps of a part.

    Args:
      model: the network.
      variables: of all seeds.
      task: the windows.
      part: "validation" or "test".
      chunk: windows that are forecast together.
      trained: only the first so many variates; None: all.
      mesh: whose axis `data` shares a chunk; None for one device.
    """
    program = errors_program(model, task.windows.look_back, trained, mesh)
    numbers = np.asarray(task.parts[part], np.int32)
    rows = rows_of(task.windows)
    rows = jax.device_put(rows) if mesh is None else place(rows, NamedSharding(mesh, PartitionSpec()))
    total: Any = 0.0
    for start in range(0, len(numbers), chunk):
        index = numbers[start : start + chunk]
        weights = np.pad(np.ones(len(index), np.float32), (0, chunk - len(index)))
        # One shape for all chunks: the last one is filled up with windows that count nothing.
        sums = program(variables, rows, np.resize(index, chunk), weights)
        total = total + np.asarray(to_host(sums), np.float64)
    return total / (len(numbers) * task.windows.horizon)


def given_up(scores: Sequence[np.ndarray], patience: int) -> np.ndarray:
    """Which models had given up before the last of these evaluations: `patience` of them without a better score.

    Args:
      scores: (models,) of each evaluation, in order.
      patience: evaluations.
    """
    rows = np.nan_to_num(scores, nan=np.inf)  # NaN counts as worst
    stopped = np.zeros(rows.shape[1], bool)
    for end in range(1, len(rows)):
        stopped |= end - 1 - np.argmin(rows[:end], axis=0) >= patience
    return stopped


class Trained(NamedTuple):
    """The models of a stage, each at its best epoch.

    Attributes:
      stage: its fields of the config.
      task: its windows.
      model: the network.
      variables: a row a seed.
      metrics: `mse`, `mae`, `best_epoch`, ... of every seed; `updates` and `epochs`, which patience may have cut short;
        `repeated_mse` and `climatology_mse`, of `NaiveErrors` on the same windows.
    """

    stage: ConfigDict
    task: Task
    model: nn.Module
    variables: Any
    metrics: dict[str, Any]


def chunk_of(stage: ConfigDict, variates: int, config: ConfigDict, mesh: Mesh | None) -> int:
    """Windows that are forecast together; channel-independent models make a sample of each variate."""
    alone = stage.channel_independent or stage.model == "patchtst"
    devices = mesh.shape["data"] if mesh else 1
    return -(-max(config.evaluate_batch // (variates if alone else 1), 1) // devices) * devices


def rules_of(stage: ConfigDict, mesh: Mesh | None) -> tuple:
    """How a stage's parameters lie on a mesh."""
    attends = stage.model in ("itransformer", "vanilla", "patchtst")
    split = mesh is not None and mesh.shape["model"] > 1 and attends
    return MODEL_RULES if split else ()


def calls_of(epoch: int, updates_per_call: int) -> int:
    """Updates of one program: the divisor of an epoch whose ratio to `updates_per_call` is nearest to 1.

    `fit` evaluates between programs of one length, so that an epoch is a number of whole ones; where it has no divisor
    near, a long program costs less than many of one or two updates.
    """
    divisors = [updates for updates in range(1, epoch + 1) if epoch % updates == 0]
    return min(divisors, key=lambda updates: max(updates / updates_per_call, updates_per_call / updates))


def train(name: str, table: Table, config: ConfigDict, run: Run) -> Trained:
    """Trains a stage and scores it on the test windows."""
    stage = config.stages[name]
    task = task_of(table, stage)
    setup = set_up(task, stage, config)
    variates = task.windows.series.shape[1]
    chunk = chunk_of(stage, variates, config, run.mesh)
    # Validation sees what training sees: the variates that are trained on.
    trained = stage.train_variates or None
    past: list[np.ndarray] = []

    def evaluate(state: TrainState) -> dict[str, Any]:
        if not past:  # of a run that was stopped and resumed
            lines = read_metrics(run.workdir, name)
            before = [line["eval/mse"] for line in lines if "eval/mse" in line and line["step"] < int(state.step)]
            past.extend(np.asarray(row, float) for row in before)
        mse = errors_of(setup.model, state.params, task, "validation", chunk, trained, run.mesh)[:, 0].mean(axis=-1)
        past.append(mse)
        # A model that would have stopped by itself does not profit from the others' going on.
        return {"mse": mse, "score": np.where(given_up(past, stage.patience), np.inf, mse)}

    run.say(f"{name}: {stage.model} x {stage.num_seeds} seeds on {stage.data}, {stage.epochs} x {setup.epoch} updates")
    updates_per_call = calls_of(setup.epoch, config.updates_per_call)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params["params"])) // stage.num_seeds
    fitted = run.fit(
        name,
        setup.state,
        setup.train_step,
        setup.batches,
        stage.epochs * setup.epoch,
        key=setup.keys,
        steps_per_call=updates_per_call,
        log_every=setup.epoch,
        evaluate=evaluate,
        evaluate_every=setup.epoch,
        minimize="score",
        patience=stage.patience * setup.epoch,
        checkpoint_every=config.checkpoint_epochs * setup.epoch,
        rules=rules_of(stage, run.mesh),
    )
    errors = errors_of(setup.model, fitted.best.params, task, "test", chunk, None, run.mesh)
    mse, mae = errors.mean(axis=-1).T
    naive = naive_errors(task)
    metrics = {
        "mse": mse,
        "mae": mae,
        "validation_mse": to_host(fitted.best.score),
        "best_epoch": to_host(fitted.best.step) // setup.epoch,
        "epochs": stage.epochs,
        "updates": stage.epochs * setup.epoch,
        "parameters": parameters,
        "repeated_mse": naive.repeated,
        "climatology_mse": naive.climatology,
    }
    if stage.train_variates:
        metrics |= {"mse_seen": errors[:, 0, : stage.train_variates].mean(axis=-1)}
        metrics |= {"mse_unseen": errors[:, 0, stage.train_variates :].mean(axis=-1)}
    run.say(f"{name}: MSE {', '.join(f'{value:.3f}' for value in mse)}")
    return Trained(stage, task, setup.model, fitted.best.params, metrics)
