"""Data and training of the Koopman autoencoders: Lorenz-63 and travelling waves.

A part of `koopman`. A stage is what trains together: the variants of the loss (KAE: alpha = gamma = 0; entropy;
information; full), all seeds, one kind of operator. Variants of one seed share initial weights and windows. Small
networks of a stage are one population under `vmap`; convolutional ones are trained one by one, their batches split
over the mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.harness import Run
from jaxpapers.data.dynamics import simulate_lorenz63, standardise
from jaxpapers.data.waves import noisy_wave_fields, simulate_amplitudes
from jaxpapers.data.windows import host_batches
from jaxpapers.sequence.koopman import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    KoopmanAutoencoder,
    koopman_loss,
    ridge_operator,
)
from jaxpapers.train import (
    LossFn,
    OnDevice,
    TrainState,
    TrainStep,
    batch_part,
    create_population,
    create_state,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    member,
    member_keys,
    to_host,
    vmap_step,
)

VARIANTS = ("kae", "entropy", "information", "full")
STARTS = ("identity", "random")  # of a learned K


class Data(NamedTuple):
    """A system's trajectories, standardised with the training set's statistics.

    Attributes:
      train: (trajectories, time, *shape).
      validation: likewise.
      test: (trajectories, 1 + horizon, *shape), row 0 the state from which is forecast.
      transient: test from the first frames of the trajectories, away from the attractor; None for Lorenz-63.
      long: (trajectories, 1 + long horizon, *shape), for spectra and histograms.
      probe: (trajectories, time, *shape) whose latents are looked at.
      extent: (test trajectories,) largest minus smallest value of each true trajectory.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    transient: np.ndarray | None
    long: np.ndarray
    probe: np.ndarray
    extent: np.ndarray


def load_data(name: str, config: ConfigDict) -> Data:
    """Simulates a system."""
    return _lorenz(config) if name == "lorenz" else _waves(config)


def _lorenz(config: ConfigDict) -> Data:
    recipe, horizon = config.lorenz, max(config.horizons)

    @jax.jit
    def simulate(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 3)
        train, mean, std = standardise(simulate_lorenz63(keys[0], recipe.rows))
        return train, *((simulate_lorenz63(key, recipe.test_rows) - mean) / std for key in keys[1:])

    train, validation, test = (np.asarray(part) for part in simulate(jax.random.key(config.seed)))

    def cut(count: int, length: int) -> np.ndarray:
        starts = np.linspace(0, len(test) - length, count).astype(int)
        return np.stack([test[start : start + length] for start in starts])

    return Data(
        train=train[None],
        validation=validation[None],
        test=cut(recipe.test_trajectories, horizon + 1),
        transient=None,
        long=cut(recipe.long_trajectories, config.long_steps + 1),
        probe=test[None],
        extent=np.full(recipe.test_trajectories, np.ptp(test)),
    )


def _waves(config: ConfigDict) -> Data:
    recipe, horizon = config.waves, max(config.horizons)
    sizes = (
        (recipe.trajectories, recipe.frames),
        (recipe.validation_trajectories, recipe.frames),
        (recipe.test_trajectories, recipe.test_frames),
        (recipe.long_trajectories, recipe.start + config.long_steps + 1),
    )

    counts, frames = zip(*sizes, strict=True)

    @jax.jit
    def simulate(key: Array) -> list[Array]:
        key, *noise_keys = jax.random.split(key, 1 + len(sizes))
        groups = jnp.split(simulate_amplitudes(key, sum(counts), max(frames)), np.cumsum(counts)[:-1])
        parts = [
            noisy_wave_fields(noise_key, group[:, :length], recipe.size, channels=recipe.channels)
            for noise_key, group, length in zip(noise_keys, groups, frames, strict=True)
        ]
        mean, std = parts[0].mean(axis=(0, 1, 2, 3)), parts[0].std(axis=(0, 1, 2, 3))
        return [(part - mean) / std for part in parts]

    shape = state_shape("waves", config)
    fields = simulate(jax.random.key(config.seed + 1))
    train, validation, test, long = (np.asarray(part).reshape(*part.shape[:2], *shape) for part in fields)
    return Data(
        train=train,
        validation=validation,
        test=test[:, recipe.start : recipe.start + horizon + 1],
        transient=test[:, : horizon + 1],
        long=long[:, recipe.start :],
        probe=test,
        extent=np.ptp(test, axis=tuple(range(1, test.ndim))),
    )


def state_shape(name: str, config: ConfigDict) -> tuple[int, ...]:
    """Shape of one state as the encoder takes it."""
    if name == "lorenz":
        return (3,)
    recipe = config.waves
    shape = (recipe.size, recipe.size, recipe.channels)
    return shape if recipe.encoder == "conv" else (int(np.prod(shape)),)


def train_shape(name: str, config: ConfigDict) -> tuple[int, ...]:
    """Shape of the training trajectories, without simulating them."""
    rows = (1, config.lorenz.rows) if name == "lorenz" else (config.waves.trajectories, config.waves.frames)
    return (*rows, *state_shape(name, config))


def networks(name: str, features: int, config: ConfigDict) -> tuple[MLP | ConvEncoder, MLP | ConvDecoder]:
    """Encoder from states of a system to so many features, and decoder."""
    recipe, shape = config[name], state_shape(name, config)
    if recipe.encoder == "conv":
        return ConvEncoder(features), ConvDecoder((shape[0], shape[1], shape[2]))
    hidden = tuple(recipe.hidden)
    return MLP((*hidden, features)), MLP((*hidden[::-1], *shape))


def autoencoder(name: str, config: ConfigDict) -> KoopmanAutoencoder:
    """The model of a stage."""
    stage = config.stages[name]
    dim = config[stage.data].latent_dim
    return KoopmanAutoencoder(*networks(stage.data, dim, config), dim, stage.operator)


def weights_of(name: str, config: ConfigDict) -> list[tuple[float, float]]:
    """(alpha, gamma) of the stage's variants."""
    stage = config.stages[name]
    alpha, gamma = float(stage.alpha), float(stage.gamma)
    known = dict(zip(VARIANTS, ((0.0, 0.0), (0.0, gamma), (alpha, 0.0), (alpha, gamma)), strict=True))
    return [known[variant] for variant in stage.variants]


def initialiser(name: str, config: ConfigDict) -> Callable[[Array], Any]:
    """`key -> params`; a random start of K is that of a PyTorch layer without bias, its eigenvalues within 0.58."""
    stage = config.stages[name]
    model, shape = autoencoder(name, config), state_shape(stage.data, config)

    def init(key: Array) -> Any:
        key, key_K = jax.random.split(key)
        params = model.init(key, jnp.zeros((1, *shape)))["params"]
        if stage.operator == "learned" and stage.start == "random":
            bound = model.latent_dim**-0.5
            params = {**params, "K": jax.random.uniform(key_K, params["K"].shape, minval=-bound, maxval=bound)}
        return params

    return init


def loss_of(name: str, config: ConfigDict) -> LossFn:
    """Eq. 9 on windows (batch, time, *shape), alpha and gamma in `extra`; a least-squares K is detached."""
    stage = config.stages[name]
    recipe, model = config[stage.data], autoencoder(name, config)
    informed = any(alpha > 0 for alpha, _ in weights_of(name, config))

    def loss_fn(params: Any, extra: Any, x: Array, key: Array | None) -> tuple:
        # Dropout of the convolutional networks is on where there is a key.
        rngs = {"dropout": key} if key is not None and recipe.encoder == "conv" else {}
        z = model.apply({"params": params}, x, rngs=rngs, method="encode")
        K = params["K"] if stage.operator == "learned" else jax.lax.stop_gradient(least_squares(z, stage))
        loss, terms = koopman_loss(
            x,
            z,
            K,
            lambda z: model.apply({"params": params}, z, rngs=rngs, method="decode"),
            alpha=extra["alpha"] if informed else 0.0,
            beta=stage.beta,
            gamma=extra["gamma"],
            k=recipe.neighbours,
            temperature=recipe.temperature,
            negatives=stage.negatives,
        )
        return loss, (extra, terms)

    return loss_fn


def least_squares(z: Array, stage: ConfigDict) -> Array:
    """K of windows of latents (batch, time, dim)."""
    return ridge_operator(z[:, :-1], z[:, 1:], stage.ridge, stage.per_window)


def optimizer_of(recipe: ConfigDict) -> optax.GradientTransformation:
    """The recipe's optimizer on its schedule, gradients clipped where it says so."""
    schedule = make_schedule(
        recipe.schedule,
        recipe.rate,
        recipe.last_rate,
        recipe.updates,
        steps_per_change=min(recipe.updates_per_change, recipe.updates),
    )
    return make_optimizer(recipe.optimizer, schedule, clip_norm=recipe.clip_norm or None)


def draw_windows(key: Array, trajectories: Any, batch_size: int, window: int) -> Array:
    """(batch, window, *shape), trajectories and first rows drawn uniformly."""
    which, start = jax.random.split(key)
    trajectories = jnp.asarray(trajectories)
    count, rows = trajectories.shape[:2]
    row = jax.random.randint(start, (batch_size, 1), 0, rows - window + 1) + jnp.arange(window)
    return trajectories[jax.random.randint(which, (batch_size, 1), 0, count), row]


class Population(NamedTuple):
    """What trains models together, variant by variant, each with all its seeds.

    Attributes:
      state: before the first update.
      train_step: of the population.
      batches: windows; each seed has its own, its variants the same.
      keys: one a model.
    """

    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array


def population(
    name: str,
    trajectories: np.ndarray,
    init: Callable[[Array], Any],
    loss_fn: LossFn,
    config: ConfigDict,
    variants: int = 1,
    extra: Any = None,
    jit: Callable[..., Callable] = jit_once,
) -> Population:
    """State, update and batches of small networks on a system; all populations of a seed see the same windows."""
    recipe = config[name]
    optimizer = optimizer_of(recipe)
    seeds = jnp.tile(jax.random.split(jax.random.key(config.seed), recipe.num_seeds), variants)
    init_keys, data_keys, keys = member_keys(seeds, 3)

    def windows(key: Array, step: Array, trajectories: Array) -> Array:
        return draw_windows(jax.random.fold_in(key, step), trajectories, recipe.batch_size, recipe.window)

    return Population(
        create_population(init, optimizer, init_keys, extra, jit),
        vmap_step(make_train_step(loss_fn, optimizer)),
        OnDevice(lambda step, data: jax.vmap(windows, (0, None, None))(data_keys, step, data), trajectories),
        keys,
    )


def set_up_population(
    name: str, trajectories: np.ndarray, config: ConfigDict, jit: Callable[..., Callable] = jit_once
) -> Population:
    """The population of a stage."""
    stage = config.stages[name]
    alphas, gammas = np.repeat(np.float32(weights_of(name, config)), config[stage.data].num_seeds, axis=0).T
    weights = {"alpha": alphas, "gamma": gammas}
    parts = initialiser(name, config), loss_of(name, config)
    return population(stage.data, trajectories, *parts, config, len(stage.variants), weights, jit)


def fit_population(name: str, setup: Population, updates: int, config: ConfigDict, run: Run) -> Any:
    """Trained parameters on the host, a row a model."""
    fitted = run.fit(
        name,
        setup.state,
        setup.train_step,
        setup.batches,
        updates,
        key=setup.keys,
        steps_per_call=config.updates_per_call,
        log_every=2 * config.updates_per_call,
    )
    return to_host(fitted.state.params)


def single_state(name: str, weights: tuple[float, float], seed: int, config: ConfigDict) -> TrainState:
    """One convolutional model before its first update; (alpha, gamma) are its weights."""
    params = initialiser(name, config)(jax.random.fold_in(jax.random.key(config.seed), seed))
    alpha, gamma = (jnp.float32(weight) for weight in weights)
    return create_state(params, optimizer_of(config[config.stages[name].data]), {"alpha": alpha, "gamma": gamma})


def single_step(name: str, config: ConfigDict) -> TrainStep:
    """The update of one model, of windows (batch, time, *shape)."""
    return make_train_step(loss_of(name, config), optimizer_of(config[config.stages[name].data]))


class Trained(NamedTuple):
    """The models of a stage.

    Attributes:
      stage: its name.
      model: the network, without a K of its own.
      variants: of the loss.
      params: leading axis models: the variants in their order, each with all its seeds.
      K: (models, dim, dim).
      refitted: (models, dim, dim) K by least squares on the same latents; K itself where that is the operator.
    """

    stage: str
    model: KoopmanAutoencoder
    variants: tuple[str, ...]
    params: Any
    K: np.ndarray
    refitted: np.ndarray

    def models(self, variant: str) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """(params, K, refitted K) of every seed of a variant."""
        seeds = len(self.K) // len(self.variants)
        first = self.variants.index(variant) * seeds
        rows = range(first, first + seeds)
        return [(member(self.params, row), self.K[row], self.refitted[row]) for row in rows]


def train(name: str, data: Data, config: ConfigDict, run: Run) -> Trained:
    """Trains a stage; a least-squares K is then that of all training windows."""
    stage = config.stages[name]
    recipe = config[stage.data]
    run.say(f"{name}: {', '.join(stage.variants)} x {recipe.num_seeds} seeds, {recipe.updates:,} updates")
    fit_models = _train_singles if recipe.encoder == "conv" else _train_together
    params = fit_models(name, data, config, run)
    model = autoencoder(name, config).clone(operator="least_squares")  # one for all stages of a system: compiled once
    windows = whole_windows(data.train, recipe.window)  # the mean of their operators is the authors' over an epoch
    solve = jax.jit(partial(least_squares, stage=stage))
    count = len(jax.tree.leaves(params)[0])
    operators = [np.asarray(solve(encode(model, member(params, row), windows))) for row in range(count)]
    refitted = np.stack(operators)
    K = params["K"] if stage.operator == "learned" else refitted
    return Trained(name, model, tuple(stage.variants), params, K, refitted)


@partial(jax.jit, static_argnums=0)
def encode(model: KoopmanAutoencoder, params: Any, x: Array | np.ndarray) -> Array:
    """Latents (trajectories, time, dim), a trajectory at a time."""
    return jax.lax.map(lambda row: model.apply({"params": params}, row, method="encode"), jnp.asarray(x))


def _train_together(name: str, data: Data, config: ConfigDict, run: Run) -> Any:
    setup = set_up_population(name, data.train, config)
    return fit_population(name, setup, config[config.stages[name].data].updates, config, run)


def _train_singles(name: str, data: Data, config: ConfigDict, run: Run) -> Any:
    """One model after the other, each at its best epoch by the validation loss."""
    stage = config.stages[name]
    recipe, loss_fn = config[stage.data], loss_of(name, config)
    weights = [pair for pair in weights_of(name, config) for _ in range(recipe.num_seeds)]
    validation = whole_windows(data.validation, recipe.window)

    @jax.jit
    def evaluate(state: TrainState) -> dict[str, Array]:
        loss, (_, terms) = loss_fn(state.params, state.extra, validation, None)
        return {"loss": loss, **terms}

    train_step, found = single_step(name, config), []
    for index, pair in enumerate(weights):
        variant, seed = stage.variants[index // recipe.num_seeds], index % recipe.num_seeds
        fitted = run.fit(
            f"{name}_{variant}_{seed}",
            single_state(name, pair, seed, config),
            train_step,
            shuffled_windows(data.train, recipe, config.seed + seed, run.mesh),
            recipe.updates,
            key=jax.random.key(config.seed + seed),
            evaluate=evaluate,
            evaluate_every=epoch_length(recipe),
            minimize="loss",
            patience=recipe.patience * epoch_length(recipe),
        )
        found.append(to_host(fitted.best.params))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def whole_windows(trajectories: np.ndarray, window: int) -> np.ndarray:
    """(windows, window, *shape), one after the other; what is left at a trajectory's end is dropped."""
    rows = trajectories.shape[1] // window * window
    return trajectories[:, :rows].reshape(-1, window, *trajectories.shape[2:])


def shuffled_windows(trajectories: np.ndarray, recipe: ConfigDict, seed: int, mesh: Mesh | None) -> Any:
    """Epochs of all windows in an order of their own, each process reading its rows."""
    count, rows = trajectories.shape[:2]
    starts = np.stack(np.meshgrid(np.arange(count), np.arange(rows - recipe.window + 1), indexing="ij"), -1)

    def cut(rows: np.ndarray) -> np.ndarray:
        return trajectories[rows[:, :1], rows[:, 1:] + np.arange(recipe.window)]

    part = batch_part(mesh) if mesh else (0, 1)
    return host_batches(starts.reshape(-1, 2), recipe.batch_size, seed, cut, part)


def epoch_length(recipe: ConfigDict) -> int:
    """Updates in which every window is seen once."""
    return recipe.trajectories * (recipe.frames - recipe.window + 1) // recipe.batch_size
