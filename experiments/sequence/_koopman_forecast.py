"""Forecasts of the Koopman autoencoders and of the baselines, and their measures (Table 2, Figs. 2 and 20).

A part of `koopman`. Errors are RMSE / (max - min) of the true trajectory, mean over test trajectories; spectra and
histograms come from long forecasts in latent space throughout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.sequence._koopman_training import Data, Trained, encode
from jaxpapers.sequence.koopman import (
    KoopmanAutoencoder,
    dmd,
    fit_kernel_koopman,
    forecast_kernel_koopman,
    histogram_kl,
    nrmse,
    rollout,
    spectral_distribution_error,
    spectrum,
    ssim,
)

Forecaster = Callable[[np.ndarray, int], Any]  # (states (trajectories, *shape), steps) -> (trajectories, steps, *shape)
LARGEST = 1e3  # standard deviations: what a forecast that blows up is cut to, so that its squares stay finite


class Score(NamedTuple):
    """How well one model forecasts.

    Attributes:
      errors: (steps,) normalised error after each step.
      transient: (steps,) the same from the first frames, away from the attractor; None for Lorenz-63.
      spectral: distance of the power spectra of long forecasts (SDE).
      histogram: KL divergence of the histograms of long forecasts.
      ssim: similarity of the fields after each of the horizons; None for Lorenz-63.
      forecast: (steps, *shape) of the first test trajectory.
    """

    errors: np.ndarray
    transient: np.ndarray | None
    spectral: float
    histogram: float
    ssim: list[float] | None
    forecast: np.ndarray


def score(forecast: Forecaster, data: Data, config: ConfigDict) -> Score:
    """Measures a forecaster."""

    def run_from(start: np.ndarray, steps: int) -> np.ndarray:
        found = np.nan_to_num(np.asarray(forecast(start, steps)), nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
        return np.clip(found, -LARGEST, LARGEST)

    horizon = data.test.shape[1] - 1
    found = run_from(data.test[:, 0], horizon)
    long = run_from(data.long[:, 0], data.long.shape[1] - 1)
    true_long, long = (part.reshape(*part.shape[:2], -1) for part in (data.long[:, 1:], long))
    distances = np.mean([_distances(a, b) for a, b in zip(true_long, long, strict=True)], axis=0)
    transient = similarity = None
    if data.transient is not None:
        transient = normalised_errors(data.transient[:, 1:], run_from(data.transient[:, 0], horizon), data.extent)
        similarity = [_similarity(data.test[:, step], found[:, step - 1], config) for step in config.horizons]
    errors = normalised_errors(data.test[:, 1:], found, data.extent)
    return Score(errors, transient, float(distances[0]), float(distances[1]), similarity, found[0])


def normalised_errors(true: np.ndarray, forecast: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(steps,) `nrmse` at each step, over the extent of the whole trajectory (of Lorenz-63: of the test series)."""
    return np.asarray(_errors(true, forecast, extent))


_errors = jax.jit(jax.vmap(nrmse, (1, 1, None)))


@jax.jit
def _distances(true: Array, forecast: Array) -> Array:
    return jnp.stack([spectral_distribution_error(true, forecast), histogram_kl(true, forecast)])


def _similarity(true: np.ndarray, forecast: np.ndarray, config: ConfigDict) -> float:
    """Mean over trajectories and channels."""
    shape = (-1, config.waves.size, config.waves.size, config.waves.channels)
    pairs = [np.moveaxis(part.reshape(shape), -1, 1).reshape(-1, *shape[1:3]) for part in (true, forecast)]
    return float(np.mean([ssim(a, b) for a, b in zip(*pairs, strict=True)]))


def score_baselines(name: str, data: Data, config: ConfigDict) -> dict[str, list[Score]]:
    """DMD, and on Lorenz-63 kernel Koopman regression, one score a seed (DMD has no seeds)."""
    recipe, shape = config[name], data.train.shape[2:]
    flat = data.train.reshape(*data.train.shape[:2], -1)
    matrix = jax.jit(dmd, static_argnums=1)(flat, min(recipe.rank, flat.shape[-1]))

    def linear(start: np.ndarray, steps: int) -> np.ndarray:
        found = _rollout(matrix, start.reshape(len(start), -1), steps)
        return np.asarray(found).reshape(len(start), steps, *shape)

    found = {"dmd": [score(linear, data, config)]}
    if name == "lorenz":
        fit = jax.jit(fit_kernel_koopman, static_argnums=(2, 3, 4))
        models = [
            fit(key, data.train[:, : recipe.kernel_rows], recipe.features, recipe.length_scale, recipe.kernel_ridge)
            for key in jax.random.split(jax.random.key(config.seed), recipe.num_seeds)
        ]
        found["kkr"] = [score(partial(_forecast_kernel, model), data, config) for model in models]
    return found


_rollout = jax.jit(rollout, static_argnums=2)
_forecast_kernel = jax.jit(forecast_kernel_koopman, static_argnums=2)


@partial(jax.jit, static_argnums=(0, 4))
def _forecast(model: KoopmanAutoencoder, params: Any, K: Array, start: Array, steps: int) -> Array:
    z = rollout(K, model.apply({"params": params}, start, method="encode"), steps)
    return jax.lax.map(lambda row: model.apply({"params": params}, row, method="decode"), z)


def forecaster(model: KoopmanAutoencoder, params: Any, K: np.ndarray) -> Forecaster:
    """x_n = g(K^n f(x_0)) of a trained model."""
    return lambda start, steps: _forecast(model, params, K, start, steps)


def score_stage(trained: Trained, data: Data, config: ConfigDict) -> dict[str, list[Score]]:
    """Every variant's score, one a seed."""
    return {
        variant: [score(forecaster(trained.model, params, K), data, config) for params, K, _ in trained.models(variant)]
        for variant in trained.variants
    }


def refitted_errors(trained: Trained, data: Data, config: ConfigDict) -> dict[str, Any]:
    """`<stage>/<variant>/refitted_error/<steps>`: encoder and decoder as they are, K by least squares."""
    steps = max(config.horizons)
    metrics = {}
    for variant in trained.variants:
        models = trained.models(variant)
        found = [np.asarray(forecaster(trained.model, params, K)(data.test[:, 0], steps)) for params, _, K in models]
        errors = [normalised_errors(data.test[:, 1:], forecast, data.extent)[-1] for forecast in found]
        metrics[f"{trained.stage}/{variant}/refitted_error/{steps}"] = errors
    return metrics


def measures(prefix: str, scores: dict[str, list[Score]], config: ConfigDict) -> dict[str, Any]:
    """What results.json keeps: `<prefix>/<method>/<measure>`, one number a seed."""
    metrics: dict[str, Any] = {}
    for method, seeds in scores.items():
        for index, step in enumerate(config.horizons):
            metrics[f"{prefix}/{method}/error/{step}"] = [one.errors[step - 1] for one in seeds]
            if seeds[0].transient is not None:
                metrics[f"{prefix}/{method}/transient_error/{step}"] = [one.transient[step - 1] for one in seeds]
            if seeds[0].ssim is not None:
                metrics[f"{prefix}/{method}/ssim/{step}"] = [one.ssim[index] for one in seeds]
        metrics[f"{prefix}/{method}/spectral_error"] = [one.spectral for one in seeds]
        metrics[f"{prefix}/{method}/histogram_kl"] = [one.histogram for one in seeds]
    return metrics


class Spectra(NamedTuple):
    """What a latent space looks like.

    Attributes:
      shares: (seeds, dim) eigenvalues of the covariance over its trace, largest first.
      eigenvalues: (seeds, dim) of K, largest modulus first.
    """

    shares: np.ndarray
    eigenvalues: np.ndarray


def spectra_of(trained: Trained, data: Data) -> dict[str, Spectra]:
    """Every variant's spectra, latents over the test trajectories."""
    found = {}
    for variant in trained.variants:
        models = trained.models(variant)
        shares = [_covariance_shares(encode(trained.model, params, data.probe)) for params, *_ in models]
        found[variant] = Spectra(np.stack(shares), np.stack([spectrum(K) for _, K, _ in models]))
    return found


def _covariance_shares(z: Array) -> np.ndarray:
    rows = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    values = np.maximum(np.linalg.eigvalsh(np.cov(rows, rowvar=False)), 0)[::-1]
    return values / values.sum()


def spectral_measures(stage: str, spectra: dict[str, Spectra]) -> dict[str, Any]:
    """Effective dimension exp S, modulus of the leading eigenvalue of K, and how many lie within 1/2."""
    metrics: dict[str, Any] = {}
    for variant, found in spectra.items():
        moduli = np.abs(found.eigenvalues)
        logs = np.log(np.where(found.shares > 0, found.shares, 1))
        metrics |= {
            f"{stage}/{variant}/effective_dimension": np.exp(-np.sum(found.shares * logs, axis=1)),
            f"{stage}/{variant}/leading_modulus": moduli[:, 0],
            f"{stage}/{variant}/within_half": np.sum(moduli < 0.5, axis=1),
        }
    return metrics
