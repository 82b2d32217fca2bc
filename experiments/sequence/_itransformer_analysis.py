"""What trained forecasters show: representations, attention, forecasts, costs (Sec. 4.3). A part of `itransformer`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from experiments.sequence._itransformer_training import Trained, forecast, set_up, task_of
from experiments.timing import seconds_in_turns, temporary_bytes
from jaxpapers.data.forecasting import Batch, Table, Windows
from jaxpapers.sequence.itransformer import Block, ITransformer, VanillaTransformer, analyse, linear_cka
from jaxpapers.train import TrainState, jit_once, member, update_program


def sample(trained: Trained, count: int) -> Batch:
    """So many test windows, evenly spread."""
    numbers = np.asarray(trained.task.parts["test"])
    chosen = numbers[np.linspace(0, len(numbers) - 1, count).astype(int)]
    return jit_once(Windows.gather)(trained.task.windows, chosen)


def has_representation(trained: Trained) -> bool:
    """Whether there are a first and a last block on the same tokens to be compared."""
    model = trained.model
    if not isinstance(model, ITransformer | VanillaTransformer) or model.num_layers < 2:
        return False
    return isinstance(model, ITransformer) or not model.distil


def representation_similarity(trained: Trained, windows: int) -> np.ndarray:
    """CKA between the outputs of the encoder's first and last block, tokens as samples, one number a seed (Fig. 7)."""
    x, _, marks = sample(trained, windows)
    model = trained.model
    last = model.num_layers - 1

    def similarity(variables: Any) -> Array:
        _, kept = forecast(model, variables, x, marks, keep=lambda module, _: isinstance(module, Block))
        blocks = kept["encoder"]
        features = [blocks[f"layers_{layer}"]["__call__"][0] for layer in (0, last)]
        return linear_cka(*(part.reshape(-1, part.shape[-1]) for part in features))

    return np.asarray(jit_once(jax.vmap(similarity))(trained.variables))


class AttentionMaps(NamedTuple):
    """Whom variates attend to, and whom they follow.

    Attributes:
      maps: (layers, N, N) weights, row i those of variate i, mean over heads and windows.
      past: (N, N) correlations within the windows that are known, see `lagged_correlations`.
      future: (N, N) those within the windows to come.
    """

    maps: np.ndarray
    past: np.ndarray
    future: np.ndarray


def lagged_correlations(x: np.ndarray, max_lag: int) -> np.ndarray:
    """(N, N): the largest |correlation| of x_i(t) with x_j(t - lag), lag 0..max_lag, mean over windows (B, T, N)."""
    found = []
    for lag in range(max_lag + 1):
        ends, starts = x[:, lag:], x[:, : x.shape[1] - lag]
        ends, starts = ((part - part.mean(axis=1, keepdims=True)) for part in (ends, starts))
        scale = np.einsum("bn,bm->bnm", *(np.linalg.norm(part, axis=1) for part in (ends, starts)))
        found.append(np.abs(np.einsum("btn,btm->bnm", ends, starts)) / np.maximum(scale, 1e-12))
    return np.max(found, axis=0).mean(axis=0)


def attention_maps(trained: Trained, windows: int, max_lag: int) -> tuple[AttentionMaps, dict[str, Any]]:
    """Maps of the first seed, and how far all seeds' maps resemble the correlations (Figs. 7, 11).

    Returns:
      The maps, and `<first|last>_<past|future>`: correlation over all pairs of different variates between a layer's
      weights and the lagged correlations, one number a seed.
    """
    x, y, marks = sample(trained, windows)
    variates = x.shape[2]
    known = None if marks is None else marks[:, : x.shape[1]]

    @jax.jit
    @jax.vmap
    def weights(variables: Any) -> Array:
        found = analyse(trained.model, variables["params"], x, known).attention
        return jnp.mean(found, axis=(1, 2))[:, :variates, :variates]

    maps = np.asarray(weights(trained.variables))
    past, future = (lagged_correlations(np.asarray(part), max_lag) for part in (x, y))
    pairs = ~np.eye(variates, dtype=bool)
    measures = {}
    for layer, place in ((0, "first"), (-1, "last")):
        for when, correlations in (("past", past), ("future", future)):
            rows = [np.corrcoef(row[layer][pairs], correlations[pairs])[0, 1] for row in maps]
            measures[f"{place}_{when}"] = np.array(rows)
    return AttentionMaps(maps[0], past, future), measures


def forecasts(trained: Trained, windows: int) -> np.ndarray:
    """(windows, S, N) of the first seed, standardised."""
    x, _, marks = sample(trained, windows)
    found = jit_once(lambda variables: forecast(trained.model, variables, x, marks)[0])(member(trained.variables, 0))
    return np.asarray(found)


def update_costs(names: tuple[str, ...], tables: dict[str, Table], config: ConfigDict) -> dict[str, Any]:
    """`<stage>/update_ms` and `/update_bytes`: what an update of all seeds takes, time and temporary memory.

    Times are medians of calls in turns.
    """
    metrics: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        stage = config.stages[name]
        setup = set_up(task_of(tables[stage.data], stage), stage, config)
        data = jax.device_put(setup.batches.data)
        program = update_program(setup.train_step, setup.batches, 1).lower(setup.state, setup.keys, data).compile()
        metrics[f"{name}/update_bytes"] = temporary_bytes(program)
        calls[name] = _repeated(program, setup.state, setup.keys, data)
    seconds = seconds_in_turns(calls, config.cost_repeats)
    return metrics | {f"{name}/update_ms": 1e3 * np.median(taken) for name, taken in seconds.items()}


def _repeated(program: Callable, state: TrainState, *rest: Any) -> Callable[[], TrainState]:
    """One update after the other: each call takes the state of the last one, which the program donates."""

    def update() -> TrainState:
        nonlocal state
        state, _ = program(state, *rest)
        return state

    return update
