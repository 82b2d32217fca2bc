"""What the Koopman paper says without training: water-filling (Props. 4, 5) and Gaussian mutual information (Eq. 7).

A part of `koopman`. Each figure of the library stands beside one of another route, in NumPy and float64.
"""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy.optimize import brentq

from jaxpapers.sequence.koopman import gaussian_mutual_information, water_filling


def analyse_water(config: ConfigDict) -> dict[str, Any]:
    """Variances of the modes for every entropy weight: `water/allocations`, `/dimensions`, `/residuals`.

    A residual is the distance from the stationary point: without entropy from p = max(0, 1/(2 mu) - 1/g) with mu by
    root finding, with entropy the spread of g/(2 (1 + g p)) - (gamma/c) (log(p/c) + 1) over the modes (Prop. 5).
    """
    recipe = config.water
    gains, budget = np.asarray(recipe.gains, np.float64), recipe.budget
    with jax.enable_x64(True):
        fill = jax.jit(water_filling, static_argnums=(1, 2))
        solutions = [np.asarray(fill(gains, budget, weight)) for weight in recipe.weights]
    residuals = []
    for p, weight in zip(solutions, recipe.weights, strict=True):
        if weight:
            with np.errstate(divide="ignore"):
                slopes = gains / (2 * (1 + gains * p)) - weight / budget * (np.log(p / budget) + 1)
            residuals.append(np.ptp(slopes))
        else:
            residuals.append(np.max(np.abs(p - _filled(gains, budget))))
    shares = [p[p > 0] / budget for p in solutions]
    return {
        "water/weights": recipe.weights,
        "water/allocations": solutions,
        "water/totals": [p.sum() / budget for p in solutions],
        "water/residuals": residuals,
        "water/dimensions": [np.exp(-np.sum(share * np.log(share))) for share in shares],
    }


def _filled(gains: np.ndarray, budget: float) -> np.ndarray:
    """Prop. 4 by a root of the water level 1/(2 mu)."""

    def filled(level: float) -> np.ndarray:
        return np.maximum(level - 1 / gains, 0)

    level = brentq(lambda level: filled(level).sum() - budget, 0, budget + 1 / gains.min(), xtol=1e-14)
    return filled(level)


def analyse_information(config: ConfigDict) -> dict[str, Any]:
    """Eq. 7 for random stable K: `information/n<n>/closed`, `/joint`, `/sampled`, one number a draw.

    `joint` is from the determinants of the covariance of (z_{t-n}, z_t), which a recursion gives step by step,
    `sampled` from the covariance of simulated pairs.
    """
    recipe = config.information
    information = jax.jit(gaussian_mutual_information, static_argnums=3)
    metrics: dict[str, list[float]] = {}
    for draw in range(recipe.draws):
        rng = np.random.default_rng([config.seed, draw])
        K, C, Sigma = _random_system(rng, recipe.dim)
        for n in recipe.steps:
            with jax.enable_x64(True):
                closed = float(information(K, C, Sigma, n))
            figures = {
                "closed": closed,
                "joint": _joint_information(_pair_covariance(K, C, Sigma, n)),
                "sampled": _joint_information(_sampled_covariance(rng, K, C, Sigma, n, recipe.samples)),
            }
            for name, value in figures.items():
                metrics.setdefault(f"information/n{n}/{name}", []).append(value)
    return {"information/steps": recipe.steps, **metrics}


def _random_system(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K of spectral radius 0.95; covariances C of the latents, about I, and Sigma of the noise, about I/10."""
    K, c, s = rng.normal(size=(3, dim, dim))
    K *= 0.95 / np.max(np.abs(np.linalg.eigvals(K)))
    return K, c @ c.T / dim + 0.2 * np.eye(dim), 0.1 * (s @ s.T / dim + 0.2 * np.eye(dim))


def _pair_covariance(K: np.ndarray, C: np.ndarray, Sigma: np.ndarray, n: int) -> np.ndarray:
    """Covariance of (z_{t-n}, z_t) by n steps of z <- K z + noise."""
    later, cross = C, C
    for _ in range(n):
        later, cross = K @ later @ K.T + Sigma, K @ cross
    return np.block([[C, cross.T], [cross, later]])


def _sampled_covariance(
    rng: np.random.Generator, K: np.ndarray, C: np.ndarray, Sigma: np.ndarray, n: int, samples: int
) -> np.ndarray:
    root = np.linalg.cholesky(Sigma)
    start = rng.normal(size=(samples, len(K))) @ np.linalg.cholesky(C).T
    z = start
    for _ in range(n):
        z = z @ K.T + rng.normal(size=z.shape) @ root.T
    return np.cov(np.concatenate([start, z], axis=1), rowvar=False)


def _joint_information(covariance: np.ndarray) -> float:
    """I(a; b) of a Gaussian pair: (log det Cov a + log det Cov b - log det Cov (a, b)) / 2."""
    dim = len(covariance) // 2
    parts = (covariance[:dim, :dim], covariance[dim:, dim:], covariance)
    first, second, both = (np.linalg.slogdet(part)[1] for part in parts)
    return float(first + second - both) / 2
