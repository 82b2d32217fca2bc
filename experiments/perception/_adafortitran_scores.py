"""Test points, linear estimators in closed form, and the errors of all estimators.

A part of `adafortitran`. The 17 points are the paper's three sweeps; at each of them every estimator, trained or not,
sees the same slots. Errors are E|h - h^|^2 per point, in dB.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from ml_collections import ConfigDict

from experiments.perception._adafortitran_training import (
    conditions_of,
    grid_of,
    pilots_of,
    slots_at,
    slots_of,
)
from jaxpapers.data import tdl
from jaxpapers.perception.adafortitran import (
    apply_linear,
    bilinear_matrix,
    complex_mse,
    fit_sample_covariances,
    linear_error,
    lmmse_bound,
    lmmse_filter,
    lmmse_matrix,
)

# (SNR in dB, delay spread in ns, Doppler shift in Hz)
SWEEPS = {
    "snr": [(snr, 200, 500) for snr in range(0, 30, 5)],
    "delay_spread": [(10, spread, 600) for spread in range(50, 350, 50)],
    "doppler": [(10, 100, shift) for shift in range(200, 1200, 200)],
}
POINTS = np.float32([point for sweep in SWEEPS.values() for point in sweep])
CHECKED = (2, 12)  # of the points, whose closed forms are checked by simulation: 10 dB, and 200 Hz
CLOSED = ("bilinear", "pooled", "bound")


def rows_of(sweep: str) -> slice:
    """A sweep's rows of POINTS."""
    names = list(SWEEPS)
    first = sum(len(SWEEPS[name]) for name in names[: names.index(sweep)])
    return slice(first, first + len(SWEEPS[sweep]))


def decibels(values: Any) -> np.ndarray:
    """10 log10 in float64 on the host: `to_db` of the library is JAX's, and float32."""
    return 10 * np.log10(np.asarray(values, float))


class Linear(NamedTuple):
    """Linear estimators of a grid, and what they leave at the 17 points, in closed form.

    Attributes:
      bilinear: (cells, pilots).
      pooled: likewise, the LMMSE of the mean over the training conditions.
      matched: (points, cells, pilots), that of each point's own.
      errors: `bilinear`, `pooled` and `bound` (the matched one's), each (points,).
    """

    bilinear: np.ndarray
    pooled: np.ndarray
    matched: np.ndarray
    errors: dict[str, np.ndarray]


def linear_estimators(num_subcarriers: int, reference: str, config: ConfigDict) -> Linear:
    """All closed forms of a grid and an SNR reference on slots of TDL-A, in float64."""
    grid, pilots = grid_of(config, num_subcarriers), pilots_of(config, num_subcarriers)
    snrs, spreads, shifts = conditions_of(config)

    def covariance(spread: Array, shift: Array) -> tuple[Array, Array]:
        return tdl.channel_covariance("TDL-A", 1e-9 * spread, shift, grid)

    @jax.jit
    def pool() -> Array:
        # Independent delay spreads and Doppler shifts: the mean of the products is the product of the means.
        F = jnp.mean(jax.vmap(lambda spread: covariance(spread, jnp.zeros(()))[0])(jnp.asarray(spreads)), axis=0)
        J = jnp.mean(jax.vmap(lambda shift: covariance(jnp.zeros(()), shift)[1])(jnp.asarray(shifts)), axis=0)
        return lmmse_matrix(F, J, *pilots, jnp.mean(tdl.noise_variance(snrs, grid, pilots, reference)))

    with jax.enable_x64(True):
        bilinear = bilinear_matrix(*pilots, grid.num_subcarriers, grid.num_symbols)
        return _at_points(bilinear, jax.device_get(pool()), "TDL-A", grid, pilots, reference)


def on_profile(linear: Linear, profile: str, config: ConfigDict) -> Linear:
    """The closed forms of the models' grid on slots of another profile.

    Bilinear and pooled estimators stay those of TDL-A, which the training has; the matched one knows the profile.
    """
    place = grid_of(config), pilots_of(config), config.snr_reference
    with jax.enable_x64(True):
        return _at_points(linear.bilinear, linear.pooled, profile, *place)


def _at_points(
    bilinear: np.ndarray, pooled: np.ndarray, profile: str, grid: tdl.OfdmGrid, pilots: tdl.Pilots, reference: str
) -> Linear:
    """The matched estimators of the points, and what all leave there."""

    @jax.jit
    def at(matrices: tuple, points: Array) -> tuple[Array, dict[str, Array]]:
        def one(point: Array) -> tuple[Array, dict[str, Array]]:
            snr, spread, shift = point
            covariances = tdl.channel_covariance(profile, 1e-9 * spread, shift, grid)
            case = (*covariances, *pilots, tdl.noise_variance(snr, grid, pilots, reference))
            matched = lmmse_matrix(*case)
            estimators = dict(zip(CLOSED, (*matrices, matched), strict=True))
            return matched, {name: jnp.mean(linear_error(G, *case)) for name, G in estimators.items()}

        return lax.map(one, points)

    matched, errors = jax.device_get(at((bilinear, pooled), POINTS.astype(float)))
    return Linear(bilinear, pooled, matched, errors)


def training_bound(config: ConfigDict) -> float:
    """The bound in dB of slots in all conditions of the training, each as likely as another."""
    grid, pilots = grid_of(config), pilots_of(config)
    cases = np.stack(np.meshgrid(*conditions_of(config), indexing="ij"), axis=-1).reshape(-1, 3)

    def bound(case: Array) -> Array:
        snr, spread, shift = case
        covariances = tdl.channel_covariance("TDL-A", 1e-9 * spread, shift, grid)
        return lmmse_bound(*covariances, *pilots, tdl.noise_variance(snr, grid, pilots, config.snr_reference))

    with jax.enable_x64(True):
        return float(decibels(jax.jit(lambda cases: jnp.mean(lax.map(bound, cases)))(cases)))


def check_by_simulation(linear: Linear, num_subcarriers: int, reference: str, config: ConfigDict) -> dict[str, Any]:
    """What the estimators leave on simulated slots at two of the points, one number a point: `closed/.../simulated`."""
    grid, pilots = grid_of(config, num_subcarriers), pilots_of(config, num_subcarriers)
    size = (grid.num_subcarriers, grid.num_symbols)
    recipe = config.closed_forms

    @jax.jit
    def simulate(key: Array, point: Array, matrices: tuple) -> Array:
        def errors(key: Array) -> Array:
            conditions = jnp.tile(point, (recipe.chunk, 1))
            batch = tdl.simulate_batch(key, conditions, grid, pilots, reference, num_sinusoids=config.grid.sinusoids)
            return jnp.stack([complex_mse(batch.h, apply_linear(G, batch.ls, size)) for G in matrices])

        return jnp.mean(lax.map(errors, jax.random.split(key, recipe.slots // recipe.chunk)), axis=0)

    found = []
    for index in CHECKED:
        matrices = (linear.bilinear, linear.pooled, linear.matched[index])
        narrow = tuple(np.asarray(G, np.complex64) for G in matrices)
        found.append(simulate(jax.random.fold_in(jax.random.key(config.seed), index), POINTS[index], narrow))
    columns = decibels(found).T
    return {f"closed/{reference}/{name}/simulated": row for name, row in zip(CLOSED, columns, strict=True)}


def analyse_closed_forms(config: ConfigDict) -> dict[str, Any]:
    """`closed/<reference>/<estimator>/db` at the 17 points of the paper's grid, `/simulated` at two."""
    width = config.closed_forms.subcarriers
    metrics: dict[str, Any] = {"closed/checked": POINTS[list(CHECKED)]}
    for reference in tdl.SNR_REFERENCES:
        linear = linear_estimators(width, reference, config)
        metrics |= {f"closed/{reference}/{name}/db": decibels(values) for name, values in linear.errors.items()}
        metrics |= check_by_simulation(linear, width, reference, config)
    return metrics


def slots_program(
    stage: str, bank: tdl.ChannelBank, slots: int, config: ConfigDict, profile: str = "TDL-A"
) -> Callable[[Array | np.ndarray], tdl.Batch]:
    """Jitted `points -> test slots` of a stage, so many a point; axes (points, chunks, slots of a chunk)."""
    chunks = slots // config.test_chunk

    @jax.jit
    def draw(points: Array) -> tdl.Batch:
        def one(arguments: tuple[Array, Array]) -> tdl.Batch:
            key, point = arguments
            return slots_at(key, jnp.tile(point, (config.test_chunk, 1)), stage, bank, config, profile)

        keys = jax.random.split(jax.random.key(config.test_seed), (len(points), chunks))
        rows = lax.map(one, (keys.reshape(-1), jnp.repeat(points, chunks, axis=0)))
        return jax.tree.map(lambda part: part.reshape(len(points), chunks, *part.shape[1:]), rows)

    return draw


def draw_tests(stage: str, bank: tdl.ChannelBank, slots: int, config: ConfigDict, profile: str = "TDL-A") -> tdl.Batch:
    """Test slots of a stage at the 17 points, as `slots_program` has them; a profile is that of fresh ones."""
    return slots_program(stage, bank, slots, config, profile)(POINTS)


@cache
def errors_program(model: nn.Module) -> Callable[[Any, tdl.Batch], Array]:
    """Jitted `(params, a chunk of the test slots) -> (points,)`, E|h - h^|^2 of one set of parameters."""

    @jax.jit
    def errors(params: Any, chunk: tdl.Batch) -> Array:
        def point(batch: tdl.Batch) -> Array:
            return complex_mse(batch.h, model.apply({"params": params}, batch.ls, batch.conditions))

        return lax.map(point, chunk)

    return errors


def score_model(model: nn.Module, params: Any, tests: tdl.Batch) -> np.ndarray:
    """(seeds, points) in dB."""
    seeds, chunks = len(jax.tree.leaves(params)[0]), tests.h.shape[1]
    errors = errors_program(model)

    def mean_errors(index: int) -> Array:
        own = jax.tree.map(lambda leaf: leaf[index], params)
        return sum(errors(own, chunk_of(tests, at)) for at in range(chunks)) / chunks

    return decibels([mean_errors(index) for index in range(seeds)])


def chunk_of(tests: tdl.Batch, index: int) -> tdl.Batch:
    """Some of the test slots of every point, axes (points, slots of a chunk)."""
    return jax.tree.map(lambda part: part[:, index], tests)


@partial(jax.jit, static_argnums=2)
def _linear_errors(matrices: Array, tests: tdl.Batch, size: tuple[int, int]) -> Array:
    """(points,) of one estimator, or of one for each point."""

    def point(arguments: tuple[Array, tdl.Batch]) -> Array:
        matrix, batch = arguments
        return complex_mse(batch.h, apply_linear(matrix, batch.ls, size))

    return lax.map(point, (jnp.broadcast_to(matrices, (len(POINTS), *matrices.shape[-2:])), tests))


def fit_sample(stage: str, bank: tdl.ChannelBank, config: ConfigDict) -> np.ndarray:
    """The LMMSE of the stage's own training slots, as the authors fit it: (cells, pilots)."""

    @jax.jit
    def fit(key: Array) -> Array:
        def moments(keys: Array) -> tuple[Array, Array, Array]:
            slots = slots_of(keys, stage, bank, config)
            return *fit_sample_covariances(slots.ls, slots.h), jnp.mean(slots.noise_var)

        def add(total: tuple, keys: Array) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, moments(keys)), None

        keys = jax.random.split(key, (config.sample_slots // config.test_chunk, config.test_chunk))
        start = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(moments, keys[0]))
        total, _ = lax.scan(add, start, keys)
        return lmmse_filter(*(part / len(keys) for part in total))

    return jax.device_get(fit(jax.random.key(config.seed)))


def score_linear(linear: Linear, sample: np.ndarray, tests: tdl.Batch) -> dict[str, np.ndarray]:
    """(1, points) in dB of bilinear interpolation and of the pooled, the sample and the matched LMMSE."""
    estimators = {
        "bilinear": linear.bilinear,
        "pooled": linear.pooled,
        "sample": sample,
        "matched": linear.matched,
    }
    size = tests.h.shape[-2:]
    return {
        name: decibels(_linear_errors(jnp.asarray(G, jnp.complex64), tests, size))[None]
        for name, G in estimators.items()
    }
