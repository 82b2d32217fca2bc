"""The best linear forecasts of the synthetic series, in closed form: what its claims are measured against.

Everything there is Gaussian, so that no forecaster of the same knowledge is better than the best linear one. The
figures are expected squared errors of standardised values, means over variates and horizon:

own     from the variate's own window, with its weights known: the bound of all that leave other variates aside
alike   from the variate's window and the mean of all windows, by the same two maps for every variate: what attention
        that weighs all variates alike can do, without knowing who is who
all     from the windows of all variates, with all weights and delays known: the bound of everything

The recipe of `get_config` was chosen by these (S = T = 96, N = 64, J = 8, delays 0..12, noise 0.1, draws of seed 0):

| periods | r | amplitude | spread | own | alike | all | alike / own | all / own |
|---|---|---|---|---|---|---|---|---|
| 48..96 (taken) | 0.9999 | 0.3 | 0.0 | 0.459 | 0.362 | 0.113 | 0.79 | 0.25 |
| 48..96 | 0.99995 | 0.3 | 0.0 | 0.450 | 0.337 | 0.107 | 0.75 | 0.24 |
| 24..96 | 0.9999 | 0.3 | 0.0 | 0.589 | 0.509 | 0.113 | 0.87 | 0.19 |
| 12..48 | 0.9999 | 0.3 | 0.0 | 0.277 | 0.216 | 0.111 | 0.78 | 0.40 |
| 48..96 | 0.9995 | 0.3 | 0.0 | 0.512 | 0.446 | 0.151 | 0.87 | 0.29 |
| 48..96 | 0.9995 | 0.3 | 0.3 | 0.499 | 0.449 | 0.150 | 0.90 | 0.30 |
| 48..96 | 0.9995 | 0.1 | 0.0 | 0.798 | 0.722 | 0.539 | 0.90 | 0.67 |
| 48..96 | 0.998 | 0.3 | 0.0 | 0.617 | 0.561 | 0.265 | 0.91 | 0.43 |
| 48..96 | 0.998 | 0.3 | 0.3 | 0.607 | 0.564 | 0.263 | 0.93 | 0.43 |
| 24..96 | 0.9995 | 0.3 | 0.0 | 0.630 | 0.573 | 0.150 | 0.91 | 0.24 |
| 12..48 | 0.9995 | 0.3 | 0.0 | 0.347 | 0.303 | 0.147 | 0.87 | 0.42 |

In the taken one other variates are worth much: they take three quarters off the error, the mean window alone is a help,
no period is longer than the window, and of 64,000 rows the training still sees the oscillators forget their phase four
times (after 10,000 rows each; at r = 0.99995 twice). At r = 0.9995, before, the MSE was .404 with attention and .503
without after 3,716 updates of 16 windows (ratio .80, means of 2 seeds), .393 and .509 after 5,576 (1 seed).

Who hears what how late is the same in training and test, but tokens carry no names: a Transformer has to find it in the
windows, so that `all` is out of its reach, and nothing says how near to it attention comes.
"""

from typing import NamedTuple

import numpy as np

from jaxpapers.data.oscillators import Oscillators


class Bounds(NamedTuple):
    """Expected errors of the best linear forecasts, see the module."""

    own: float
    alike: float
    all: float


def autocovariance(latents: Oscillators, lags: int) -> np.ndarray:
    """(J, lags) of the oscillators at lags 0, 1, ..."""
    found = np.ones((len(latents.first), max(lags, 2)))
    found[:, 1] = latents.first / (1 - latents.second)
    for lag in range(2, lags):
        found[:, lag] = latents.first * found[:, lag - 1] + latents.second * found[:, lag - 2]
    return found[:, :lags]


def linear_bounds(
    weights: np.ndarray, delays: np.ndarray, latents: Oscillators, noise: float, look_back: int, horizon: int
) -> Bounds:
    """The three bounds.

    Args:
      weights: (N, J).
      delays: (N, J) of steps.
      latents: of unit variance.
      noise: its standard deviation, above 0.
      look_back: T.
      horizon: S.
    """
    weights = np.asarray(weights, np.float64)
    std = np.sqrt(np.sum(np.square(weights), axis=1) + noise**2)
    weights, noises = weights / std[:, None], np.square(noise / std)  # of standardised variates
    count, farthest = len(weights), int(delays.max())
    lags = autocovariance(latents, look_back + horizon + farthest)

    alone = np.square(weights) @ lags[:, : look_back + horizon]
    own = np.mean([_forecast_error(row, level, look_back) for row, level in zip(alone, noises, strict=True)])

    # The mean hears oscillator j with the summed weights of each delay.
    heard = np.zeros((len(latents.first), farthest + 1))
    np.add.at(heard, (np.arange(weights.shape[1]), delays), weights / count)
    steps = np.arange(farthest + 1)
    apart = np.abs(np.arange(look_back + horizon)[:, None, None] + steps[:, None] - steps)
    mean = sum(np.einsum("tde,d,e->t", lag[apart], row, row) for lag, row in zip(lags, heard, strict=True))
    # A variate is the mean and what it has apart from it; on average over the variates the two are uncorrelated.
    level = noises.mean() / count
    alike = _forecast_error(mean, level, look_back)
    alike += _forecast_error(alone.mean(axis=0) - mean, noises.mean() - level, look_back)
    return Bounds(float(own), float(alike), _kalman_error(weights, delays, latents, noises, look_back, horizon))


def _forecast_error(covariance: np.ndarray, noise: float, look_back: int) -> float:
    """Of a noisy series' next steps from its last `look_back`, by its autocovariance at all lags that occur."""
    if not noise:
        return 0.0  # of a single variate: it is the mean
    times = np.arange(len(covariance))
    past, future = times[:look_back], times[look_back:]
    known = covariance[np.abs(past[:, None] - past)] + noise * np.eye(look_back)
    cross = covariance[future[:, None] - past]
    explained = np.einsum("st,ts->s", cross, np.linalg.solve(known, cross.T))
    return float(np.mean(covariance[0] + noise - explained))


def _kalman_error(
    weights: np.ndarray, delays: np.ndarray, latents: Oscillators, noises: np.ndarray, look_back: int, horizon: int
) -> float:
    """Of all variates from all windows. The state holds each oscillator's last values, as many as delays reach back."""
    count, num_latents = weights.shape
    length = max(int(delays.max()) + 1, 2)
    size = num_latents * length
    lags = autocovariance(latents, length)
    transition, drive, covariance = (np.zeros((size, size)) for _ in range(3))
    readout = np.zeros((count, size))
    for j in range(num_latents):
        start = j * length
        transition[start, start : start + 2] = latents.first[j], latents.second[j]
        transition[range(start + 1, start + length), range(start, start + length - 1)] = 1
        drive[start, start] = latents.innovation[j]
        block = slice(start, start + length)
        covariance[block, block] = lags[j][np.abs(np.subtract.outer(np.arange(length), np.arange(length)))]
        readout[np.arange(count), start + delays[:, j]] = weights[:, j]
    for step in range(look_back):
        if step:
            covariance = transition @ covariance @ transition.T + drive
        heard = readout @ covariance
        covariance = covariance - heard.T @ np.linalg.solve(heard @ readout.T + np.diag(noises), heard)
        covariance = (covariance + covariance.T) / 2
    errors = []
    for _ in range(horizon):
        covariance = transition @ covariance @ transition.T + drive
        errors.append(np.mean(np.einsum("ns,st,nt->n", readout, covariance, readout) + noises))
    return float(np.mean(errors))
