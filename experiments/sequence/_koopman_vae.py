"""The baseline VAE of Table 2: a latent space whose step in time is a network, on the windows of the autoencoders.

A part of `koopman`. It has their widths, windows, updates and seeds; the likelihood's standard deviation is the one
setting of its own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.sequence._koopman_forecast import Forecaster, Score, score
from experiments.sequence._koopman_training import Data, Population, draw_windows, optimizer_of, state_shape
from jaxpapers.sequence.koopman import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    LatentVAE,
    forecast,
    gaussian_log_likelihood,
    variational_loss,
)
from jaxpapers.train import OnDevice, create_population, make_train_step, member, run_once, to_host, vmap_step


def latent_vae(system: str, config: ConfigDict) -> LatentVAE:
    """Networks as wide as the autoencoder's, and an MLP for the step."""
    recipe, shape = config[system], state_shape(system, config)
    hidden = tuple(recipe.hidden)
    encoder: MLP | ConvEncoder
    decoder: MLP | ConvDecoder
    if recipe.encoder == "conv":
        encoder, decoder = ConvEncoder(2 * recipe.latent_dim), ConvDecoder((shape[0], shape[1], shape[2]))
    else:
        encoder, decoder = MLP((*hidden, 2 * recipe.latent_dim)), MLP((*hidden[::-1], *shape))
    return LatentVAE(encoder, decoder, recipe.latent_dim, dynamics=MLP((*hidden, recipe.latent_dim)))


def set_up_vae(system: str, trajectories: np.ndarray, config: ConfigDict) -> Population:
    """State, update and batches of all seeds; their windows are those of the autoencoders."""
    recipe, model, optimizer = config[system], latent_vae(system, config), optimizer_of(config[system])
    log_likelihood = partial(gaussian_log_likelihood, scale=config.vae.deviation)
    seeds = jax.random.split(jax.random.key(config.seed), recipe.num_seeds)
    init_keys, data_keys, keys = jnp.moveaxis(jax.vmap(lambda seed: jax.random.split(seed, 3))(seeds), 1, 0)

    def init(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, *state_shape(system, config))))["params"]

    def loss_fn(params: Any, extra: Any, x: Array, key: Array) -> tuple:
        options = {"k": recipe.neighbours, "beta": config.vae.beta, "log_likelihood": log_likelihood}
        loss, terms = variational_loss(key, x, model, params, **options)
        return loss, (extra, terms)

    def windows(key: Array, step: Array) -> Array:
        return draw_windows(jax.random.fold_in(key, step), trajectories, recipe.batch_size, recipe.window)

    params = run_once(jax.vmap(init), init_keys)
    return Population(
        create_population(partial(member, params), optimizer, jnp.arange(recipe.num_seeds)),
        vmap_step(make_train_step(loss_fn, optimizer)),
        OnDevice(lambda step: jax.vmap(windows, (0, None))(data_keys, step)),
        keys,
    )


def score_vae(system: str, data: Data, config: ConfigDict, run: Run) -> list[Score]:
    """Trains the VAE of a system; one score a seed."""
    setup, model = set_up_vae(system, data.train, config), latent_vae(system, config)
    fitted = run.fit(
        f"vae_{system}",
        setup.state,
        setup.train_step,
        setup.batches,
        config[system].updates,
        key=setup.keys,
        steps_per_call=config.updates_per_call,
        log_every=2 * config.updates_per_call,
    )
    params = to_host(fitted.state.params)
    return [score(_forecaster(model, member(params, row)), data, config) for row in range(config[system].num_seeds)]


def _forecaster(model: LatentVAE, params: Any) -> Forecaster:
    return lambda start, steps: _forecast(model, params, start, steps)


_forecast = jax.jit(forecast, static_argnums=(0, 3))
