"""The baseline VAE of Table 2: a latent space whose step in time is a network, on the windows of the autoencoders.

A part of `koopman`. It has their widths, windows, updates and seeds; the likelihood's standard deviation is the one
setting of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.sequence._koopman_forecast import Forecaster, Score, score
from experiments.sequence._koopman_training import Data, Population, fit_population, networks, population, state_shape
from jaxpapers.sequence.koopman import MLP, LatentVAE, forecast, gaussian_log_likelihood, variational_loss
from jaxpapers.train import jit_once, member


def latent_vae(system: str, config: ConfigDict) -> LatentVAE:
    """Networks as wide as the autoencoder's, and an MLP for the step."""
    recipe = config[system]
    dynamics = MLP((*recipe.hidden, recipe.latent_dim))
    return LatentVAE(*networks(system, 2 * recipe.latent_dim, config), recipe.latent_dim, dynamics=dynamics)


def set_up_vae(
    system: str, trajectories: np.ndarray, config: ConfigDict, jit: Callable[..., Callable] = jit_once
) -> Population:
    """State, update and batches of all seeds; their windows are those of the autoencoders."""
    model = latent_vae(system, config)
    log_likelihood = partial(gaussian_log_likelihood, scale=config.vae.deviation)

    def init(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, *state_shape(system, config))))["params"]

    def loss_fn(params: Any, extra: Any, x: Array, key: Array) -> tuple:
        options = {"k": config[system].neighbours, "beta": config.vae.beta, "log_likelihood": log_likelihood}
        loss, terms = variational_loss(key, x, model, params, **options)
        return loss, (extra, terms)

    return population(system, trajectories, init, loss_fn, config, jit=jit)


def score_vae(system: str, data: Data, config: ConfigDict, run: Run) -> list[Score]:
    """Trains the VAE of a system; one score a seed."""
    setup, model = set_up_vae(system, data.train, config), latent_vae(system, config)
    params = fit_population(f"vae_{system}", setup, config[system].updates, config, run)
    return [score(_forecaster(model, member(params, row)), data, config) for row in range(config[system].num_seeds)]


def _forecaster(model: LatentVAE, params: Any) -> Forecaster:
    return lambda start, steps: _forecast(model, params, start, steps)


_forecast = jax.jit(forecast, static_argnums=(0, 3))
