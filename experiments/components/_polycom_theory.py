"""What needs no training: exact squares and products, rates of approximation, what the fused backward pass keeps.

A part of `polycom`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.timing import least_seconds, residual_bytes, temporary_bytes
from jaxpapers.components.polycom import (
    exact_product,
    exact_square,
    init_coeffs,
    local_taylor_network,
    poly_norm,
    polycom,
    rms_normalise,
    sawtooth_square,
)
from jaxpapers.train import jit_once

FREQUENCY = 2 * math.pi
DERIVATIVES: tuple[Callable[[Array], Array], ...] = (  # f = sin(2 pi x) and its derivatives
    lambda x: jnp.sin(FREQUENCY * x),
    lambda x: FREQUENCY * jnp.cos(FREQUENCY * x),
    lambda x: -(FREQUENCY**2) * jnp.sin(FREQUENCY * x),
)
SMOOTHNESS = (2, 3)
METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "plain": partial(polycom, rho=rms_normalise, kind="II"),
    "remat": jax.checkpoint(partial(polycom, rho=rms_normalise, kind="II")),
    "fused": poly_norm,
}


def analyse_approximation(config: ConfigDict) -> dict[str, Any]:
    """Sup-errors on a grid of [0, 1], in float64 (Sec. 3).

    `approximation/n<n>` of the local Taylor network by `approximation/cells`; `sawtooth/error` of ReLU's x^2 by
    `sawtooth/levels`; `exact/square` and `exact/product` of the PolyReLU layers on [-2, 2], over the largest value.
    """
    settings = config.approximation
    metrics: dict[str, Any] = {
        "approximation/cells": np.array(settings.cells),
        "sawtooth/levels": np.array(settings.levels),
    }
    with jax.enable_x64(True):
        x = jnp.linspace(0, 1, settings.points + 1)
        truth = np.sin(FREQUENCY * np.asarray(x))
        for n in SMOOTHNESS:
            errors = [
                np.abs(jit_once(local_taylor_network(DERIVATIVES, n, N))(x) - truth).max() for N in settings.cells
            ]
            metrics[f"approximation/n{n}"] = np.array(errors)
        saw = jit_once(sawtooth_square, static_argnums=1)
        saws = [np.abs(saw(x, m) - np.square(x)).max() for m in settings.levels]
        metrics["sawtooth/error"] = np.array(saws)
        u, v = jax.random.uniform(jax.random.key(config.seed), (2, settings.points), minval=-2.0, maxval=2.0)
        for name, ours, exact in (
            ("square", jit_once(exact_square)(u), np.square(u)),
            ("product", jit_once(exact_product)(u, v), np.multiply(u, v)),
        ):
            metrics[f"exact/{name}"] = np.abs(ours - exact).max() / np.abs(exact).max()
    return metrics


def slopes(errors: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Log-log slopes, d log(error) / d log(N), from each number of cells to the next."""
    return np.diff(np.log(errors)) / np.diff(np.log(cells))


def analyse_overhead(config: ConfigDict) -> dict[str, Any]:
    """What PolyNorm's backward pass keeps and takes, by method: `overhead/<method>/<what>`.

    `residual_bytes` between the passes; `temporary_bytes` of the compiled gradient; `milliseconds`, the least of
    `repeats` runs of value and gradients; `overhead/gradient_difference`: of the fused and the plain gradients in
    float64, relative to the largest entry.
    """
    settings = config.overhead
    x = jax.random.normal(jax.random.key(config.seed), (settings.tokens, settings.width))
    coeffs = jnp.asarray(init_coeffs(settings.order), x.dtype)
    metrics: dict[str, Any] = {"overhead/input_bytes": x.nbytes, "overhead/tokens": settings.tokens}
    for name, method in METHODS.items():
        metrics[f"overhead/{name}/residual_bytes"] = residual_bytes(method, x, coeffs)

        def loss(x: Array, coeffs: Array, method: Callable = method) -> Array:
            return jnp.sum(jnp.square(method(x, coeffs)))

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, coeffs).compile()
        metrics[f"overhead/{name}/temporary_bytes"] = temporary_bytes(run)
        metrics[f"overhead/{name}/milliseconds"] = 1e3 * least_seconds(partial(run, x, coeffs), settings.repeats)
    with jax.enable_x64(True):
        exact = np.asarray(x[: settings.exact_tokens], np.float64)
        a = np.linspace(-0.5, 0.7, settings.order + 1)

        def gradients(method: Callable) -> tuple[Array, Array]:
            return jit_once(jax.grad(lambda x, a: jnp.sum(jnp.sin(method(x, a))), (0, 1)))(exact, a)

        pairs = zip(gradients(METHODS["plain"]), gradients(METHODS["fused"]), strict=True)
        differences = [np.abs(ours - plain).max() / np.abs(plain).max() for plain, ours in pairs]
    metrics["overhead/gradient_difference"] = np.max(differences)
    return metrics
