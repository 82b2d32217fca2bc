"""The parallel solver on ParaRNN's cells: iterations, exactness, what the clip is for, time against length.

A part of `pararnn`. Nothing is trained here: cells are drawn as the paper draws them and run on white noise. Seeds run
one after the other through one program: what takes the time is compiling, and `vmap` makes these programs much longer.
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

from experiments.timing import least_seconds
from jaxpapers.sequence.pararnn import GRUParams, LSTMParams, Solver, init_gru, init_lstm, preactivations, solve
from jaxpapers.train import jit_once

CELLS: dict[str, Callable[..., GRUParams | LSTMParams]] = {"gru": init_gru, "lstm": init_lstm}
CONVERGED = 1e-5  # largest residual of a state that counts as found (the card)
NUM_HEADS = 4


def draw(key: Array, cell: str, width: int, length: int, batch_size: int) -> tuple[GRUParams | LSTMParams, Array]:
    """A cell of the paper's initialisation, and the pre-activations (time, batch, 3, width) of white noise."""
    key_params, key_x = jax.random.split(key)
    params = CELLS[cell](key_params, width, width, NUM_HEADS)
    x = jax.random.normal(key_x, (length, batch_size, width))
    return params, preactivations(x, params.B, params.b)


@partial(jax.jit, static_argnums=2)
def residuals(params: GRUParams | LSTMParams, g: Array, iterations: int) -> Array:
    """(iterations + 1,) largest residual of the guess and after each Newton iteration."""
    return solve(params, g, solver=Solver(method="chunked", max_iterations=iterations)).residuals


def analyse_convergence(config: ConfigDict) -> dict[str, Any]:
    """Residuals of every cell, width and length (App. A, Fig. 4): `newton/<cell>/D<width>/L<length>`, (seeds, k)."""
    settings = config.newton
    return {
        f"newton/{cell}/D{width}/L{length}": np.stack(
            [residuals(*draw(key, cell, width, length, settings.batch_size), 4) for key in seed_keys(config)]
        )
        for cell in CELLS
        for width in settings.widths
        for length in settings.lengths
    }


def seed_keys(config: ConfigDict) -> Array:
    """One key a seed."""
    return jax.random.split(jax.random.key(config.seed), config.num_seeds)


def analyse_exactness(config: ConfigDict) -> dict[str, Any]:
    """Parallel against sequential states, and gradients of sum h^2: `exact/<cell>/<float>/<what>`, the largest of all.

    Differences are relative to the largest entry of the sequential route's array. Float32 takes the paper's three
    iterations, float64 five (the paper's three end at float32's precision) and the first width and length alone.
    """
    settings = config.newton
    metrics: dict[str, Any] = {}
    for bits, iterations, count in ((32, 3, None), (64, 5, 1)):
        for cell in CELLS:
            found = [
                differences(*draw(key, cell, width, length, settings.batch_size), iterations, bits)
                for width in settings.widths[:count]
                for length in settings.lengths[:count]
                for key in seed_keys(config)
            ]
            for what in found[0]:
                metrics[f"exact/{cell}/float{bits}/{what}"] = np.max([each[what] for each in found])
    return metrics


def differences(params: GRUParams | LSTMParams, g: Array, iterations: int, bits: int) -> dict[str, float]:
    """Relative differences of the states, and of the gradients with respect to g and A."""
    with jax.enable_x64(bits == 64):
        params, g = jax.tree.map(lambda leaf: leaf.astype(f"float{bits}"), (params, g))
        return {what: float(value) for what, value in _differences(params, g, iterations).items()}


@partial(jit_once, static_argnums=2)
def _differences(params: GRUParams | LSTMParams, g: Array, iterations: int) -> dict[str, Array]:
    def energy(A: Array, g: Array, method: str) -> tuple[Array, Array]:
        found = solve(params._replace(A=A), g, solver=Solver(method=method, max_iterations=iterations)).states
        h = found[..., 1, :] if isinstance(params, LSTMParams) else found
        return jnp.sum(jnp.square(h)), h

    (grads, expected), (ours, h) = (
        jax.grad(energy, argnums=(0, 1), has_aux=True)(params.A, g, method) for method in ("sequential", "chunked")
    )
    pairs = {"states": (h, expected), "grad_A": (ours[0], grads[0]), "grad_g": (ours[1], grads[1])}
    return {what: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for what, (a, b) in pairs.items()}


def analyse_clip(config: ConfigDict) -> dict[str, Any]:
    """Iterations until the residual is below 1e-5, by the size of a and c (App. C.1): `clip/<cell>/<amplitude>`.

    Entries (seeds,); inf where that many iterations were not enough.
    """
    settings = config.clip
    metrics = {}
    for cell in CELLS:
        for amplitude in settings.amplitudes:
            cells = [clipped(key, cell, amplitude, settings) for key in seed_keys(config)]
            below = np.stack([residuals(*each, settings.iterations) for each in cells]) < CONVERGED
            metrics[f"clip/{cell}/{amplitude:g}"] = np.where(below.any(1), below.argmax(1), np.inf)
    return metrics


def clipped(key: Array, cell: str, amplitude: float, settings: ConfigDict) -> tuple[GRUParams | LSTMParams, Array]:
    """A cell with a, c ~ U(+-amplitude), and its pre-activations, as `draw`."""
    key_draw, key_a, key_c = jax.random.split(key, 3)
    params, g = draw(key_draw, cell, settings.width, settings.length, settings.batch_size)
    params = params._replace(A=jax.random.uniform(key_a, params.A.shape, minval=-amplitude, maxval=amplitude))
    if isinstance(params, LSTMParams):
        params = params._replace(C=jax.random.uniform(key_c, params.C.shape, minval=-amplitude, maxval=amplitude))
    return params, g


def analyse_speed(config: ConfigDict) -> dict[str, Any]:
    """Time of the forward pass by method and length (Figs. 1, 2, 5): `speed/<cell>/<method>`, seconds per length.

    The least of `repeats` runs, as in the paper; batch and width are not printed there. `speed_up/<cell>` is the
    sequential time over the best of Newton's; on an accelerator it is also kept as `accelerator/speed_up/<cell>`, which
    is what the claim is checked on. The kernel runs through time as the loop does: its times are reported alone.
    """
    settings = config.speed
    metrics: dict[str, Any] = {"speed/lengths": np.array(settings.lengths)}
    methods = ("sequential", "parallel", "chunked") + (() if jax.default_backend() == "cpu" else ("fused",))
    for cell in CELLS:
        times: dict[str, list[float]] = {method: [] for method in methods}
        for length in settings.lengths:
            params, g = draw(jax.random.key(config.seed), cell, settings.width, length, settings.batch_size)
            for method in methods:
                times[method].append(forward_seconds(params, g, method, settings.repeats))
        metrics |= {f"speed/{cell}/{method}": np.array(seconds) for method, seconds in times.items()}
        best = np.minimum(times["parallel"], times["chunked"])
        metrics[f"speed_up/{cell}"] = np.array(times["sequential"]) / best
        if jax.default_backend() != "cpu":
            metrics[f"accelerator/speed_up/{cell}"] = metrics[f"speed_up/{cell}"]
    metrics["depth/newton"] = np.array([3 * 2 * math.ceil(math.log2(length)) for length in settings.lengths])
    return metrics


def forward_seconds(params: GRUParams | LSTMParams, g: Array, method: str, repeats: int) -> float:
    """Of one forward pass, the least of so many."""
    forward = jax.jit(lambda params, g: solve(params, g, solver=Solver(method=method)).states)
    return least_seconds(partial(forward, params, g), repeats)
