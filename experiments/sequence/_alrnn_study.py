"""AL-RNN's experiment, first part: data sets and recipes, training of a population, analysis of what it learned."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from experiments.catalogue import UsageError, nearest, require
from experiments.harness import Run
from jaxpapers.data.dynamics import simulate_lorenz63, simulate_lorenz96, simulate_rossler, standardise
from jaxpapers.data.series import ALRNN_SERIES, alrnn_series
from jaxpapers.data.windows import sample_windows
from jaxpapers.ops.dsr_metrics import (
    lyapunov_spectrum,
    power_spectrum_hellinger,
    prediction_error,
    state_space_divergence_binned,
    state_space_divergence_gmm,
)
from jaxpapers.sequence import alrnn
from jaxpapers.train import (
    POPULATION_RULES,
    OnDevice,
    TrainState,
    TrainStep,
    create_population,
    make_optimizer,
    make_schedule,
    make_train_step,
    member,
    member_keys,
    read_metrics,
    to_host,
    vmap_step,
)

EPOCH = 50  # updates


class Recipe(NamedTuple):
    """How the authors train on a data set (table of hyper-parameters, appendix), and how the result is measured.

    Attributes:
      latent_dim: M.
      num_pwl: the P of the sweep; P = M is the PLRNN.
      tau: forcing interval.
      window: T, steps that a training window predicts.
      rate, last_rate: learning rate of the first epoch, and that to which it decays.
      updates: in all.
      noise: standard deviation of the noise on the windows.
      smoothing: of the spectra in D_H, in frequency bins.
      dt: time between two rows, in units of the system.
      bins: per axis in D_stsp; 0 for the Gaussian mixture, where the dimension is too large for histograms.
      gmm_variance: of the Gaussian mixture.
      reset: readouts are reset to the data every so many steps in generation too (fMRI), which is then no free run.
      penalty: weight of the latent regulariser.
    """

    latent_dim: int
    num_pwl: tuple[int, ...]
    tau: int
    window: int
    rate: float
    last_rate: float
    updates: int
    noise: float
    smoothing: float
    dt: float = 1.0
    bins: int = 0
    gmm_variance: float = 1.0
    reset: int = 0
    penalty: float = 0.0


UP_TO_FIVE = (0, 1, 2, 3, 4, 5)
RECIPES = {
    "lorenz63": Recipe(20, (*UP_TO_FIVE, 20), 16, 200, 1e-3, 1e-5, 2000 * EPOCH, 0.05, 20.0, dt=0.01, bins=30),
    "rossler": Recipe(20, (*UP_TO_FIVE, 20), 8, 300, 5e-3, 1e-5, 3000 * EPOCH, 0.05, 20.0, dt=0.08, bins=30),
    "ecg": Recipe(100, UP_TO_FIVE, 10, 50, 2e-3, 1e-5, 4000 * EPOCH, 0.01, 20.0, bins=8),
    "fmri": Recipe(50, UP_TO_FIVE, 7, 72, 5e-3, 1e-5, 2000 * EPOCH, 0.0, 1.0, reset=7),
    "eeg": Recipe(133, (60,), 10, 100, 1e-3, 1e-5, 2000 * EPOCH, 0.0, 20.0, penalty=0.1),
    "lorenz96": Recipe(100, (50,), 20, 50, 1e-3, 1e-5, 3000 * EPOCH, 0.05, 20.0, dt=0.01),
}
SIMULATORS = {"lorenz63": simulate_lorenz63, "rossler": simulate_rossler, "lorenz96": simulate_lorenz96}
MINIMAL_P = {"lorenz63": 2, "rossler": 1, "ecg": 2, "fmri": 2}  # the P that the paper settles on (Fig. 3)
WORD_LENGTH = 8  # of the words whose growth estimates the entropy; longer ones would need longer orbits
PREDICTION_STEPS = 20


AT_LEAST_1 = ("num_seeds", "batch_size", "updates_per_call", "evaluate_every", "lyapunov_steps")
LARGEST = 2**31 - 1  # of whole numbers: they become int32
# Of a recipe: field -> (its smallest value, whether that value itself is refused).
LIMITS = {
    "latent_dim": (1, False),
    "tau": (1, False),
    "window": (1, False),
    "rate": (0, True),
    "last_rate": (0, False),
    "updates": (1, False),
    "noise": (0, False),
    "smoothing": (0, False),
    "dt": (0, True),
    "bins": (0, False),
    "gmm_variance": (0, True),
    "reset": (0, False),
    "penalty": (0, False),
}


def check_config(config: ConfigDict) -> None:
    """Refuses what cannot be trained or analysed, before anything is.

    Raises:
      UsageError: the field with its value, and what it takes.
    """
    require(config.systems, "systems", config.systems, "at least one system")
    for name in config.systems:
        if name not in RECIPES:
            raise UsageError(f"unknown system {name!r}{nearest(name, RECIPES)}")
    for field in AT_LEAST_1:
        require(1 <= config[field] <= LARGEST, field, config[field], f"at least 1 and at most {LARGEST}")
    require(config.get("pad_models", 1) >= 1, "pad_models", config.get("pad_models"), "at least 1")
    for field in ("transient", "min_evaluations"):
        require(config[field] >= 0, field, config[field], "at least 0")
    require(abs(config.seed) < 2**31 - 1, "seed", config.seed, "a 32-bit integer")
    require(config.slope_penalties, "slope_penalties", config.slope_penalties, "at least one penalty")
    require(min(config.slope_penalties) >= 0, "slope_penalties", config.slope_penalties, "at least 0 each")
    shortest = 2 * WORD_LENGTH  # a quarter of the free run may be dropped as its transient
    require(config.free_run >= shortest, "free_run", config.free_run, f"at least {shortest}")
    for name in config.systems:
        _check_recipe(name, config)
    every, call = config.evaluate_every, config.updates_per_call
    once = every >= max(config[name].updates for name in config.systems)
    require(once or every % call == 0, "evaluate_every", every, f"a multiple of updates_per_call={call}")


def _check_recipe(name: str, config: ConfigDict) -> None:
    recipe = config[name]
    for field, (low, open_) in LIMITS.items():
        value = recipe[field]
        require(value > low or (value == low and not open_), f"{name}.{field}", value, _bound(low, open_))
        require(value <= LARGEST, f"{name}.{field}", value, f"at most {LARGEST}")
    rows, dim = series_shape(name, config)
    require(recipe.smoothing <= rows, f"{name}.smoothing", recipe.smoothing, f"at most the {rows} rows of {name}")
    longest = {f"{name}.window": recipe.window, "the horizon of PE": PREDICTION_STEPS}
    if name == "lorenz63":
        longest |= {"newton_lengths": max(config.newton_lengths, default=1)}
        require(min(config.newton_lengths, default=1) >= 1, "newton_lengths", config.newton_lengths, "at least 1 each")
    for field, steps in longest.items():
        require(steps < rows, field, steps, f"less than the {rows} rows of {name}")
    require(recipe.latent_dim >= dim, f"{name}.latent_dim", recipe.latent_dim, f"at least the {dim} observables")
    require(recipe.bins**dim < 2**31, f"{name}.bins", recipe.bins, f"so few that bins^{dim} stays below 2^31")
    require(recipe.num_pwl, f"{name}.num_pwl", recipe.num_pwl, "at least one P")
    for num_pwl in recipe.num_pwl:
        try:
            alrnn.check_num_pwl(num_pwl, recipe.latent_dim, dim)
        except ValueError as error:
            raise UsageError(f"config.{name}.num_pwl: {error}") from None


def _bound(low: int, open_: bool) -> str:
    return f"above {low}" if open_ else f"at least {low}"


def series_shape(name: str, config: ConfigDict) -> tuple[int, int]:
    """(time, N) of a system's series, without its file."""
    if name in SIMULATORS and (config.simulate or name == "lorenz96"):
        return config.num_rows, 20 if name == "lorenz96" else 3
    return ALRNN_SERIES[name].shape


def load_series(name: str, config: ConfigDict) -> np.ndarray:
    """The system's series (time, N); simulated ones are standardised.

    Raises:
      DataNotFound: the file of a recorded system is missing and cannot be downloaded.
    """
    if name in SIMULATORS and (config.simulate or name == "lorenz96"):
        series, _, _ = standardise(SIMULATORS[name](jax.random.key(config.seed), config.num_rows))
        return np.asarray(series)
    return alrnn_series(name)


class Population(NamedTuple):
    """The models of one system that train together, one row each; rows of one seed share keys.

    Attributes:
      num_pwl: (models,) P.
      seed: (models,).
      lambda_lin: (models,) weight of the penalty on trained slopes; None for plain ReLUs.
    """

    num_pwl: np.ndarray
    seed: np.ndarray
    lambda_lin: np.ndarray | None = None


def p_sweep(recipe: ConfigDict, num_seeds: int) -> Population:
    """All pairs of P and seed (Fig. 3)."""
    num_pwl, seed = np.meshgrid(np.array(recipe.num_pwl), np.arange(num_seeds), indexing="ij")
    return Population(num_pwl.ravel(), seed.ravel())


def slope_sweep(recipe: ConfigDict, penalties: tuple[float, ...], num_seeds: int, dim: int) -> Population:
    """All pairs of lambda_lin and seed; every unit that is no readout is leaky, its slope trained (appendix)."""
    lambda_lin, seed = np.meshgrid(np.array(penalties), np.arange(num_seeds), indexing="ij")
    return Population(np.full(seed.size, recipe.latent_dim - dim), seed.ravel(), lambda_lin.ravel())


def padded(population: Population, pad_models: int, mesh: Mesh | None) -> Population:
    """Repeats the last model until the devices of a mesh can share the models evenly; the copies are dropped after.

    Checkpoints hold the copies: they restore onto all numbers of devices that divide `pad_models`.
    """
    multiple = math.lcm(pad_models, mesh.shape["data"] if mesh else 1)
    rows = np.minimum(np.arange(-(-len(population.seed) // multiple) * multiple), len(population.seed) - 1)
    return Population(*(None if column is None else column[rows] for column in population))


class Setup(NamedTuple):
    """A population ready to be trained: what `fit` takes, and the evaluation of all its models."""

    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array
    free_runs: Callable[[PyTree, Array], Array]
    measures: Callable[[np.ndarray, Array], dict[str, Array]]


def set_up(
    series: np.ndarray,
    recipe: ConfigDict,
    config: ConfigDict,
    population: Population,
    jit: Callable[..., Callable] = jax.jit,
) -> Setup:
    """Loss, optimizer, batches and measures of a population on one series."""
    dim = series.shape[1]
    leaky = population.lambda_lin is not None
    extra = {"num_pwl": jnp.asarray(population.num_pwl)}
    if leaky:
        extra["lambda_lin"] = jnp.asarray(population.lambda_lin, jnp.float32)

    def init(key: Array) -> alrnn.ALRNNParams:
        return alrnn.init_params(key, recipe.latent_dim, dim, slope=0.0 if leaky else None)

    def loss_fn(params: alrnn.ALRNNParams, extra: PyTree, windows: Array, key: Array) -> tuple:
        windows = alrnn.add_noise(key, windows, recipe.noise)
        error = alrnn.forcing_loss(params, windows, recipe.tau, num_pwl=extra["num_pwl"])
        loss = error + recipe.penalty * alrnn.latent_regulariser(params)
        if leaky:
            loss += extra["lambda_lin"] * alrnn.slope_penalty(params, extra["num_pwl"])
        return loss, (extra, {"forcing_error": error})

    def windows(key: Array, step: Array, series: Array) -> Array:
        return sample_windows(jax.random.fold_in(key, step), series, config.batch_size, recipe.window + 1)

    steps = min(config.free_run, len(series))
    transient = min(config.transient, steps // 4)

    def free_run(params: alrnn.ALRNNParams, num_pwl: Array) -> Array:
        if recipe.reset:  # fMRI: the readouts are reset to the data in generation too, so this is no free run
            _, states = alrnn.generate_with_resets(params, series, recipe.reset, num_pwl)
        else:
            _, states = alrnn.generate(params, series[0], steps, num_pwl)
        return states[transient:]

    def measure(series: Array, states: Array) -> dict[str, Array]:
        orbit = states[:, :dim]
        if recipe.bins:
            d_stsp = state_space_divergence_binned(series, orbit, recipe.bins)
        else:
            d_stsp = state_space_divergence_gmm(jax.random.key(0), series, orbit, recipe.gmm_variance)
        d_h = power_spectrum_hellinger(series[: len(orbit)], orbit, recipe.smoothing, padding="reflect")
        return {"d_stsp": d_stsp, "d_h": d_h}

    schedule = make_schedule(
        config.schedule, recipe.rate, recipe.last_rate, recipe.updates, steps_per_change=min(EPOCH, recipe.updates)
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    seeds = jax.random.split(jax.random.key(config.seed + 1), config.num_seeds)[population.seed]
    init_keys, window_keys, noise_keys = member_keys(seeds, 3)
    return Setup(
        state=create_population(init, optimizer, init_keys, extra, jit),
        train_step=vmap_step(make_train_step(loss_fn, optimizer)),
        batches=OnDevice(lambda step, data: jax.vmap(windows, (0, None, None))(window_keys, step, data), series),
        keys=noise_keys,
        free_runs=jax.jit(jax.vmap(free_run)),
        # The series is an argument: as a constant, XLA would fold its histogram while compiling, and complain.
        measures=jax.jit(jax.vmap(measure, (None, 0))),
    )


class Study(NamedTuple):
    """A system and the models that were trained on it, each at its best checkpoint.

    A model has failed that never gave a finite D_stsp, or whose parameters stopped being finite before the authors
    would count it. Nothing of it is a result: its parameters, orbit and scores are NaN, its D_H is 1.

    Attributes:
      name: of the system.
      series: (time, N).
      recipe: the system's fields of the config.
      population: which model is which.
      transient: first rows of the free runs, dropped.
      params: leading axis models.
      last_params: the same after the last update.
      orbits: (models, time, M), free runs without their transient.
      scores: measure -> (models,), of these orbits.
    """

    name: str
    series: np.ndarray
    recipe: ConfigDict
    population: Population
    transient: int
    params: alrnn.ALRNNParams
    last_params: alrnn.ALRNNParams
    orbits: np.ndarray
    scores: dict[str, np.ndarray]

    def best(self, num_pwl: int) -> int:
        """Row of the model with the smallest D_stsp among those with this P; a failed one counts as worst."""
        rows = np.flatnonzero(self.population.num_pwl == num_pwl)
        if not rows.size:
            raise ValueError(f"no model of {self.name} has P = {num_pwl}; there are {sorted(set(self.recipe.num_pwl))}")
        return int(rows[np.argmin(np.nan_to_num(self.scores["d_stsp"][rows], nan=np.inf))])

    def best_is_finite(self, num_pwl: int) -> bool:
        """Whether the orbit of that model is finite, as symbols and spectra need it."""
        return bool(np.isfinite(self.orbits[self.best(num_pwl)]).all())


def study(name: str, stage: str, series: np.ndarray, population: Population, config: ConfigDict, run: Run) -> Study:
    """Trains a population, keeps each model's checkpoint with the smallest D_stsp, and lets it run freely."""
    recipe = config[name]
    models = len(population.seed)
    setup = set_up(series, recipe, config, padded(population, config.get("pad_models", 1), run.mesh))

    def evaluate(state: TrainState) -> dict[str, Array]:
        orbits = setup.free_runs(state.params, state.extra["num_pwl"])
        return {**setup.measures(series, orbits), "finite": jnp.isfinite(state.params.W).all((1, 2))}

    run.say(f"{stage}: {models} models, {recipe.updates:,} updates")
    last, best = run.fit(
        stage,
        setup.state,
        setup.train_step,
        setup.batches,
        recipe.updates,
        key=setup.keys,
        steps_per_call=config.updates_per_call,
        log_every=10 * config.updates_per_call,
        evaluate=evaluate,
        evaluate_every=config.evaluate_every,
        minimize="d_stsp",
        rules=POPULATION_RULES,
    )
    num_pwl = last.extra["num_pwl"]
    orbits = setup.free_runs(best.params, num_pwl)
    scores = setup.measures(series, orbits)
    scores["pe_20"] = prediction_errors(best.params, num_pwl, series)
    evaluations = [line["eval/finite"] for line in read_metrics(run.workdir, stage) if "eval/finite" in line]
    score, found = to_host((best.score, (best.params, last.params, orbits, scores)))
    failed = ~np.isfinite(score) | (np.sum(evaluations, axis=0) < config.min_evaluations)
    found = jax.tree.map(lambda leaf: np.where(failed.reshape(-1, *[1] * (leaf.ndim - 1)), np.nan, leaf), found)
    found[-1]["d_h"][failed] = 1.0
    transient = min(config.free_run, len(series)) - orbits.shape[1]
    return Study(name, series, recipe, population, transient, *member(found, slice(models)))


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def prediction_errors(params: alrnn.ALRNNParams, num_pwl: Array, series: Array) -> Array:
    """PE_20 of each model."""
    return prediction_error(
        lambda z: alrnn.step(params, z, num_pwl),
        lambda x: alrnn.init_state(params, x),
        lambda z: alrnn.observe(params, z),
        series,
        PREDICTION_STEPS,
    )


def scores_by_p(study: Study) -> dict[str, Any]:
    """Every measure of every P, one number a seed: `lorenz63/P2/d_stsp: [..]`."""
    return {
        f"{study.name}/P{num_pwl}/{measure}": values[study.population.num_pwl == num_pwl]
        for num_pwl in study.recipe.num_pwl
        for measure, values in study.scores.items()
    }


def analyse_minimal(study: Study, config: ConfigDict) -> dict[str, Any]:
    """Regions, fixed points, entropies and exponents of the models with the paper's P, one entry a seed.

    A failed model's entries are NaN (no regions: 0).
    """
    num_pwl = MINIMAL_P[study.name]
    rows = np.flatnonzero(study.population.num_pwl == num_pwl)
    exponents = largest_exponents(member(study.params, rows), study.orbits[rows, 0], num_pwl, config.lyapunov_steps)
    fixed_points = [real_fixed_points(member(study.params, row), num_pwl) for row in rows]
    symbolic = [symbolic_measures(study.orbits[row], num_pwl) for row in rows]
    measured = {
        "fixed_points": [points[:, : study.series.shape[1]] for points, _ in fixed_points],
        "radii": [radii for _, radii in fixed_points],
        "exponent": exponents,
        **{name: [measures[name] for measures in symbolic] for name in symbolic[0]},
    }
    return {f"{study.name}/minimal/{name}": values for name, values in measured.items()}


def real_fixed_points(params: alrnn.ALRNNParams, num_pwl: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed points (points, M) that lie in their own region, and their spectral radii; a failed model has none."""
    if not np.isfinite(params.W).all():
        return np.empty((0, len(params.h))), np.empty(0)
    found = alrnn.fixed_points(params, num_pwl)
    return found.points[found.real], found.spectral_radius[found.real]


def symbolic_measures(orbit: np.ndarray, num_pwl: int) -> dict[str, Any]:
    """Regions in use, their occupation, and both entropies of an orbit (time, M); of a diverged one there are none."""
    if not np.isfinite(orbit).all():
        return {"regions": 0, "occupation": [], "graph_entropy": np.nan, "word_entropy": np.nan}
    code = alrnn.symbolic_code(orbit, num_pwl)
    graph = alrnn.admissibility_graph(alrnn.transition_counts(code.symbols, len(code.counts)))
    return {
        "regions": len(code.counts),
        "occupation": code.occupation,
        "graph_entropy": alrnn.topological_entropy(graph),
        "word_entropy": alrnn.word_entropy(code.symbols, WORD_LENGTH)[-1],
    }


@partial(jax.jit, static_argnames=("num_pwl", "steps"))
def largest_exponents(params: alrnn.ALRNNParams, starts: Array, num_pwl: int, steps: int) -> Array:
    """lambda_max per step of each model (appendix), from a state on its own orbit."""

    def exponent(params: alrnn.ALRNNParams, start: Array) -> Array:
        return lyapunov_spectrum(lambda z: alrnn.step(params, z, num_pwl), start, steps, num_exponents=1)[0]

    return jax.vmap(exponent)(params, starts)


def minimal_model(study: Study) -> dict[str, Any]:
    """The best minimal model written out: one affine map a region, with its fixed point (Figs. 4, 5)."""
    num_pwl = MINIMAL_P[study.name]
    row = study.best(num_pwl)
    params = member(study.params, row)
    code = alrnn.symbolic_code(study.orbits[row], num_pwl)
    occupation = {region_name(bits): share for bits, share in zip(code.bits, code.occupation, strict=True)}
    points = alrnn.fixed_points(params, num_pwl)
    regions = [
        {
            "region": region_name(bits),
            "occupation": occupation.get(region_name(bits), 0.0),
            "fixed_point": point,
            "real": real,
            "spectral_radius": radius,
            "eigenvalues": [[value.real, value.imag] for value in eigenvalues],
            "matrix": np.asarray(alrnn.region_matrix(params, bits)),
        }
        for bits, point, real, eigenvalues, radius in zip(*points, strict=True)
    ]
    return {"system": study.name, "num_pwl": num_pwl, "offset": params.h, "L": params.L, "regions": regions}


def analyse_newton(study: Study, config: ConfigDict) -> dict[str, Any]:
    """Newton's iterations and errors on the best minimal model, in float64 (the kernels' claim)."""
    num_pwl = MINIMAL_P[study.name]
    forcings = {"tau": {"tau": study.recipe.tau}, "gtf": {"tau": 1, "alpha": 0.2, "forced": "state"}}
    metrics: dict[str, Any] = {}
    with jax.enable_x64(True):
        params = member(study.params, study.best(num_pwl))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        for length in config.newton_lengths:
            starts = np.linspace(0, len(study.series) - length - 1, 3, dtype=int)
            windows = np.stack([study.series[start : start + length + 1] for start in starts]).astype(float)
            for name, forcing in forcings.items():
                forced = partial(alrnn.teacher_forced, num_pwl=num_pwl, **forcing)
                _, states, info = jax.jit(partial(forced, method="newton"))(params, windows)
                _, expected, _ = jax.jit(partial(forced, method="sequential"))(params, windows)
                metrics |= {
                    f"newton/{name}/T{length}/iterations": info.iterations,
                    f"newton/{name}/T{length}/converged": info.converged,
                    f"newton/{name}/T{length}/error": jnp.max(jnp.abs(states - expected)),
                }
        return jax.device_get(metrics)


def study_slopes(series: np.ndarray, config: ConfigDict, run: Run) -> tuple[Study, dict[str, Any]]:
    """The other way to choose P: leaky units whose trained slopes are pushed to 1, and how many resist (appendix)."""
    recipe = config.lorenz63
    population = slope_sweep(recipe, config.slope_penalties, config.num_seeds, series.shape[1])
    found = study("lorenz63", "lorenz63_slopes", series, population, config, run)
    num_leaky = int(population.num_pwl[0])
    # Of the last parameters: the best ones may be early, their slopes still on the way.
    found.scores["nonlinear"] = np.array(
        [alrnn.count_nonlinear(member(found.last_params, row), num_leaky) for row in range(len(population.seed))]
    )
    return found, {
        f"lorenz63/slopes/{penalty:g}/{measure}": found.scores[measure][population.lambda_lin == penalty]
        for penalty in config.slope_penalties
        for measure in ("nonlinear", "d_stsp")
    }


def region_name(bits: np.ndarray) -> str:
    """The region's bits as text, such as 01."""
    return "".join(map(str, np.asarray(bits).astype(int)))
