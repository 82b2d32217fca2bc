"""Control from images: the Koopman VAE and the Koopman autoencoder, an LQR in their latent spaces, closed loops.

A part of `koopman`. The variants of the loss (all of it; alpha, beta or gamma at 0) train together under `vmap`, the
autoencoder beside them with the same networks, first parameters, batches and number of updates.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import figures
from experiments.harness import Metrics, Run
from jaxpapers.data.control import (
    CARTPOLE,
    DT,
    PENDULUM,
    PLANAR,
    disturbed_step,
    observe,
    simulate_control,
)
from jaxpapers.sequence.koopman import (
    MLP,
    KoopmanVAE,
    bernoulli_log_likelihood,
    effective_dimension,
    lqr,
    variational_loss,
)
from jaxpapers.train import (
    OnDevice,
    TrainState,
    TrainStep,
    create_population,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    member,
    run_once,
    to_host,
    vmap_step,
)

SYSTEMS = {"planar": PLANAR, "pendulum": PENDULUM, "cartpole": CARTPOLE}
NAMES = {
    "full": "full loss",
    "no_information": r"$\alpha = 0$",
    "no_transition": r"$\beta = 0$",
    "no_entropy": r"$\gamma = 0$",
    "kae": "KAE",
    "random": "random",
}
VARIANTS = tuple(name for name in NAMES if name != "random")
SWITCHED_OFF = {"no_information": "alpha", "no_transition": "beta", "no_entropy": "gamma"}
AUTOENCODER = "kae"

_SYSTEM: dict[str, Any] = {
    "num_seeds": 1,
    "latent_dim": 4,
    "width": 128,
    "window": 6,  # short, so that a batch shows many places; the paper's neighbourhood of 5 wants 11 and more
    "batch_size": 16,
    "updates": 2_500,
    "rate": 2e-3,
    "variants": ("full", "kae"),
    "alpha": 3.0,
    "beta": 2.0,
    "gamma": 0.5,
    "elbo_weight": 1.0,
    "standard_weight": 1.0,
    "neighbourhood": 2,
    "horizon": 40,  # control steps of a task (PCC)
    "plan": 10,  # steps that the LQR looks ahead (PCC)
    "state_cost": 10.0,
    "control_cost": 1.0,
    "max_control": 3.0,
}
_PENDULUM = _SYSTEM | {"updates": 1_200, "horizon": 100, "state_cost": 50.0, "max_control": 0.65}
_CARTPOLE = _SYSTEM | {"latent_dim": 8, "horizon": 50, "plan": 5, "state_cost": 100.0, "max_control": 10.0}
_SMOKE = {"latent_dim": 3, "width": 8, "window": 5, "batch_size": 2, "updates": 4, "horizon": 5}
_PAPER = {
    "num_seeds": 10,
    "width": 500,
    "window": 16,
    "neighbourhood": 5,
    "batch_size": 64,
    "updates": 200_000,
    "rate": 5e-4,
}
# Whether the training data are those of the noisy task; the others of the noiseless one.
_SHARED: dict[str, Any] = {"updates_per_call": 50, "tasks": 30, "train_noise": False}
CONTROL: dict[str, dict[str, Any]] = {
    "smoke": _SHARED | {"updates_per_call": 2, "tasks": 3, "systems": {"pendulum": _PENDULUM | _SMOKE}},
    "small": _SHARED | {"systems": {"planar": _SYSTEM, "pendulum": _PENDULUM}},
    "paper": _SHARED
    | {
        "tasks": 100,
        "systems": {
            "planar": _SYSTEM | _PAPER | {"width": 300},
            "pendulum": _PENDULUM | _PAPER | {"variants": ("full", *SWITCHED_OFF, AUTOENCODER)},
            "cartpole": _CARTPOLE | _PAPER,
        },
    },
}


class ControlSetup(NamedTuple):
    """What trains the variants of one system that share a loss function.

    Attributes:
      variants: their names; a row of the population is a variant and a seed, seeds running faster.
      state: before the first update.
      train_step: of the population.
      batches: fresh windows of every step; seeds have their own, variants the same.
      keys: one a row.
    """

    variants: tuple[str, ...]
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array


class PixelEncoder(nn.Module):
    """An MLP on pixels less their mean, over one standard deviation of all.

    An agent is 9 of 1600 pixels: unscaled, it moves the latents of an untrained network by a thousandth.
    """

    mean: np.ndarray
    deviation: float
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Means and log-variances."""
        return MLP(self.features)((x - self.mean) / self.deviation)


@cache
def pixel_statistics(name: str) -> tuple[np.ndarray, float]:
    """Mean image of a system's random observations, and the root mean square deviation from it."""
    images = run_once(lambda key: simulate_control(SYSTEMS[name], key, 1000, 1).images, jax.random.key(0))
    pixels = to_host(images).reshape(1000, -1)
    return pixels.mean(axis=0), float(np.sqrt(pixels.var(axis=0).mean()))


def control_model(name: str, config: ConfigDict) -> KoopmanVAE:
    """Networks of two hidden layers from the pixels of an observation and back to their logits."""
    recipe, system = config.control.systems[name], SYSTEMS[name]
    encoder = PixelEncoder(*pixel_statistics(name), (recipe.width, recipe.width, 2 * recipe.latent_dim))
    decoder = MLP((recipe.width, recipe.width, system.frames * system.size**2))
    return KoopmanVAE(encoder, decoder, recipe.latent_dim, system.control_dim)


def losses_of(name: str, autoencoder: bool, config: ConfigDict) -> tuple[str, ...]:
    """The variants on a system that are, or are not, the autoencoder."""
    variants = config.control.systems[name].variants
    return tuple(variant for variant in variants if (variant == AUTOENCODER) == autoencoder)


def first_params(name: str, config: ConfigDict, jit: Callable[..., Callable] = jit_once) -> Any:
    """Parameters before the first update, a row a seed; all variants start from them."""
    model, system = control_model(name, config), SYSTEMS[name]
    pixels = jnp.zeros((1, system.frames * system.size**2))
    keys = jax.random.split(jax.random.key(config.seed), config.control.systems[name].num_seeds)
    return jit(jax.vmap(lambda key: model.init(key, pixels)["params"]))(keys)


def set_up_control(
    name: str, autoencoder: bool, params: Any, config: ConfigDict, jit: Callable[..., Callable] = jax.jit
) -> ControlSetup:
    """Model, loss and batches of the autoencoder, or of all variants of the variational loss, on a system."""
    recipe, system, model = config.control.systems[name], SYSTEMS[name], control_model(name, config)
    variants, seeds = losses_of(name, autoencoder, config), config.control.systems[name].num_seeds
    optimizer = make_optimizer("adam", make_schedule("cosine_decay_schedule", recipe.rate, 0.0, recipe.updates))
    data_keys, keys = jax.random.split(jax.random.key(config.seed + 1), (2, seeds))
    noise = system.noise if config.control.train_noise else 0.0

    def draw(key: Array) -> dict[str, Array]:
        data = simulate_control(system, key, recipe.batch_size, recipe.window, noise)
        return {"x": data.images.reshape(*data.images.shape[:2], -1), "controls": data.controls}

    def batch_at(step: Array) -> dict[str, Array]:
        batch = jax.vmap(lambda key: draw(jax.random.fold_in(key, step)))(data_keys)
        return jax.tree.map(lambda part: jnp.concatenate([part] * len(variants)), batch)

    def autoencoder_loss(params: Any, weights: Any, batch: dict[str, Array], key: Array) -> tuple:
        x, variables = batch["x"], {"params": params}
        z = model.apply(variables, x, method="encode").mean
        predicted = model.apply(variables, z[:, :-1], batch["controls"], method="transition").mean
        decoded = model.apply(variables, jnp.concatenate([z, predicted], axis=1), method="decode")
        log_likelihood = jnp.sum(bernoulli_log_likelihood(jnp.concatenate([x, x[:, 1:]], axis=1), decoded), axis=-1)
        terms = {
            "reconstruction": -jnp.mean(log_likelihood[:, : x.shape[1]]),
            "forecast": -jnp.mean(log_likelihood[:, x.shape[1] :]),
            "consistency": jnp.mean(jnp.sum(jnp.square(z[:, 1:] - predicted), axis=-1)),
        }
        loss = terms["reconstruction"] + terms["forecast"] + weights["beta"] * terms["consistency"]
        return loss, (weights, terms)

    def loss(params: Any, weights: Any, batch: dict[str, Array], key: Array) -> tuple:
        options = {name: recipe[name] for name in ("elbo_weight", "standard_weight")}
        options |= {"k": recipe.neighbourhood, "log_likelihood": bernoulli_log_likelihood}
        loss, terms = variational_loss(key, batch["x"], model, params, batch["controls"], **weights, **options)
        return loss, (weights, terms)

    weights = {
        weight: jnp.repeat(
            jnp.array([0.0 if SWITCHED_OFF.get(variant) == weight else recipe[weight] for variant in variants]), seeds
        )
        for weight in ("alpha", "beta", "gamma")
    }
    rows = jnp.concatenate([jnp.arange(seeds)] * len(variants))
    return ControlSetup(
        variants,
        create_population(lambda row: member(params, row), optimizer, rows, weights, jit),
        vmap_step(make_train_step(autoencoder_loss if autoencoder else loss, optimizer)),
        OnDevice(batch_at),
        jnp.concatenate([keys] * len(variants)),
    )


def tracking_gain(K: Array, B: Array, goal: Array, config: ConfigDict) -> Array:
    """Gain G of a = -G (z - goal, 1) that minimises the cost of the steps that are planned.

    The distance to the goal follows K, B and a drift K goal - goal, which is zero only where the goal is at rest: a
    constant beside the latents carries it.
    """
    dim, width = B.shape
    drift = (K @ goal - goal)[:, None]
    moved = jnp.block([[K, drift], [jnp.zeros((1, dim)), jnp.ones((1, 1))]])
    Q = config.state_cost * jnp.diag(jnp.append(jnp.ones(dim), 0.0))
    return lqr(moved, jnp.pad(B, ((0, 1), (0, 0))), Q, config.control_cost * jnp.eye(width), config.plan)[0]


def make_score(name: str, config: ConfigDict) -> Callable[[Any, bool], dict[str, Array]]:
    """`(params, at_random) -> ` what `study_control` says of one model, jitted; random controls in the LQR's place."""
    recipe, system, model = config.control.systems[name], SYSTEMS[name], control_model(name, config)
    tasks, limit = config.control.tasks, recipe.max_control
    goals = jnp.asarray(system.goals)[jnp.arange(tasks) % len(system.goals)]

    def encode(params: Any, observations: Array) -> Array:
        pixels = observations.reshape(*observations.shape[:-3], -1)
        return model.apply({"params": params}, pixels, method="encode").mean

    def score(params: Any, at_random: Any) -> dict[str, Array]:
        start_key, control_key, noise_key, test_key = jax.random.split(jax.random.key(config.seed + 2), 4)
        start = jax.vmap(system.draw_start)(jax.random.split(start_key, tasks))
        shape = (recipe.horizon, tasks)
        random = jax.random.uniform(control_key, (*shape, system.control_dim), minval=-limit, maxval=limit)
        shocks = system.noise * jax.random.normal(noise_key, (*shape, start.shape[-1]))
        targets = encode(params, observe(system, goals, goals))
        gain_to = partial(tracking_gain, params["K"], params["B"], config=recipe)
        gains = jax.vmap(gain_to)(targets)

        def closed_loop(level: Array) -> Array:
            def advance(carry: tuple[Array, Array], given: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
                before, state = carry
                away = encode(params, observe(system, before, state)) - targets
                planned = -jnp.einsum("tcd,td->tc", gains, jnp.concatenate([away, jnp.ones_like(away[:, :1])], axis=1))
                control = jnp.clip(jnp.where(at_random, given[0], planned), -limit, limit)
                after = disturbed_step(system, state, control, level * given[1])
                return (state, after), jax.vmap(system.in_goal)(after, goals)

            return 100 * jnp.mean(lax.scan(advance, (start, start), (random, shocks))[1])

        noiseless, noisy = jax.vmap(closed_loop)(jnp.array([0.0, 1.0]))
        latents = encode(params, simulate_control(system, test_key, 40, recipe.window).images)
        return {"noiseless": noiseless, "noisy": noisy, "effective_dimension": effective_dimension(latents)}

    return jax.jit(score)


def phase_space(count: int = 24) -> tuple[Array, Array]:
    """The pendulum's observations on a grid of angles and velocities, and these states."""
    angles, speeds = np.linspace(-np.pi, np.pi, count, endpoint=False), np.linspace(-2 * np.pi, 2 * np.pi, count)
    states = jnp.asarray(np.stack(np.meshgrid(angles, speeds, indexing="ij"), axis=-1).reshape(-1, 2), jnp.float32)
    before = states.at[:, 0].add(-DT * states[:, 1])
    return observe(PENDULUM, before, states).reshape(len(states), -1), states


def explained(latents: np.ndarray, targets: np.ndarray) -> float:
    """Share of the targets' variance that an affine map of the latents explains, 0 to 1."""
    rows = np.column_stack([latents, np.ones(len(latents))]).astype(np.float64)
    error = targets - rows @ np.linalg.lstsq(rows, targets, rcond=None)[0]
    return float(1 - np.sum(error**2) / np.sum((targets - targets.mean(axis=0)) ** 2))


def stage_of(name: str, autoencoder: bool) -> str:
    """The stage in which the autoencoder, or the variants of the variational loss, train on a system."""
    return f"control_{name}_{'autoencoder' if autoencoder else 'variational'}"


def train_control(name: str, autoencoder: bool, params: Any, config: ConfigDict, run: Run) -> dict[str, list[Any]]:
    """Trained parameters of every variant, one a seed."""
    if not losses_of(name, autoencoder, config):
        return {}
    setup, seeds = set_up_control(name, autoencoder, params, config), config.control.systems[name].num_seeds
    fitted = run.fit(
        stage_of(name, autoencoder),
        setup.state,
        setup.train_step,
        setup.batches,
        config.control.systems[name].updates,
        key=setup.keys,
        steps_per_call=config.control.updates_per_call,
        log_every=2 * config.control.updates_per_call,
    )
    rows = [member(fitted.state.params, index) for index in range(len(setup.keys))]
    return {variant: rows[index * seeds : (index + 1) * seeds] for index, variant in enumerate(setup.variants)}


def study_control(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains every variant on every system and lets an LQR control it.

    `control/<system>/<variant>/noiseless` and `/noisy`: percentage of the steps in the goal region, one number a seed
    (`random`: one number), `/effective_dimension` of the latents; for the pendulum also `/angle` and `/velocity`, the
    share of (cos, sin) of the angle and of the velocity that an affine map reads off the latents, and the figure
    `phase_portrait` of the first seed.
    """
    metrics: dict[str, Any] = {}
    for name in config.control.systems:
        score, params = make_score(name, config), first_params(name, config)
        at_random = to_host(score(member(params, 0), True))
        metrics |= {f"control/{name}/random/{kind}": at_random[kind] for kind in ("noiseless", "noisy")}
        trained = {}
        for autoencoder in (False, True):
            trained |= train_control(name, autoencoder, params, config, run)
        for variant, rows in trained.items():
            found = [to_host(score(params, False)) for params in rows]
            for what in found[0]:
                metrics[f"control/{name}/{variant}/{what}"] = np.array([scores[what] for scores in found])
        if name == "pendulum":
            seen, states = phase_space()
            model = control_model(name, config)
            encode = jax.jit(lambda params, x, model=model: model.apply({"params": params}, x, method="encode").mean)
            angle, velocity = np.asarray(states).T
            latents = {variant: [to_host(encode(p, seen)) for p in rows] for variant, rows in trained.items()}
            targets = {"angle": np.stack([np.cos(angle), np.sin(angle)], axis=1), "velocity": velocity[:, None]}
            for variant, rows in latents.items():
                for what, target in targets.items():
                    metrics[f"control/{name}/{variant}/{what}"] = np.array([explained(z, target) for z in rows])
            portraits = {variant: rows[0] for variant, rows in latents.items()}
            run.figure("phase_portrait", draw_portrait(portraits, angle, velocity))
    return metrics


def draw_portrait(latents: dict[str, np.ndarray], angle: np.ndarray, velocity: np.ndarray) -> Figure:
    """The first three principal components of a pendulum's latents, coloured by angle and by velocity (Fig. 6)."""
    size = (2.4 * len(latents), 4.8)
    figure, grid = figures.grid(2, len(latents), size, subplot_kw={"projection": "3d"})
    for column, (variant, z) in zip(grid.T, latents.items(), strict=True):
        centred = z - z.mean(axis=0)
        components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
        components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
        for ax, colour, colours in zip(column, (angle, velocity), ("twilight", "viridis"), strict=True):
            ax.scatter(*components.T, c=colour, cmap=colours, s=3, rasterized=True)
            ax.set(xticklabels=[], yticklabels=[], zticklabels=[])
        column[0].set(title=NAMES[variant])
    for row, label in zip(grid, ("colour: angle", "colour: velocity"), strict=True):
        row[0].text2D(-0.05, 0.5, label, transform=row[0].transAxes, rotation=90, va="center", fontsize=8)
    return figure


def draw_control(metrics: Metrics, config: ConfigDict) -> Figure:
    """Percentage of steps in the goal region, a dot a seed; filled without noise, open with noise (Table 2)."""
    systems = list(config.control.systems)
    figure, axes = figures.panels(len(systems), sharey=True)
    for ax, name in zip(axes, systems, strict=True):
        variants: Sequence[str] = (*config.control.systems[name].variants, "random")
        for index, variant in enumerate(variants):
            for kind, shift, fill in (("noiseless", -0.12, "full"), ("noisy", 0.12, "none")):
                values = metrics[f"control/{name}/{variant}/{kind}"]
                figures.dots(ax, index + shift, values, color=figures.COLOURS[index], fillstyle=fill)
        figures.names_below(ax, [NAMES[variant] for variant in variants])
        ax.set(title=name, ylim=(-3, 103))
    axes[0].set(ylabel="steps in the goal region (%)")
    axes[0].plot([], [], "o", color=figures.GREY, label="noiseless")
    axes[0].plot([], [], "o", color=figures.GREY, fillstyle="none", label="noisy")
    axes[0].legend(fontsize=8)
    return figure
