"""Forecasts of a user's own csv by iTransformer. A part of `itransformer`.

python -m experiments.sequence.itransformer forecast data.csv --horizon 96 --out forecast.csv

writes forecast.csv and forecast.png.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from experiments import figures
from experiments.harness import use_figure_style
from experiments.sequence._itransformer_training import Task, epoch_order, errors_of, forecast, halving, naive_errors
from jaxpapers.data.forecasting import Batch, Table, Windows, count_windows, fit_scaler, read_csv, time_features
from jaxpapers.sequence.itransformer import ITransformer
from jaxpapers.train import (
    OnDevice,
    TrainState,
    create_state,
    fit,
    make_optimizer,
    make_train_step,
    run_once,
    write_whole,
)

TRAIN_PART = 0.8  # of the rows; the rest chooses the epoch
EPOCH = 100  # updates at least: a few hundred rows are a few updates a pass, and the rate falls from epoch to epoch
EXPECTED = (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError)


class CsvForecast(NamedTuple):
    """A forecast in the units of the csv.

    Attributes:
      table: the csv.
      values: (horizon, N) of the steps behind its last row.
      timestamps: of these steps; None where the csv has none.
      mse: of standardised values on the last fifth of the rows, all windows: the rows that chose the epoch, so that it
        is somewhat too good.
      naive_mse: there, of repeating the last row.
      epoch: the best one, from 1.
    """

    table: Table
    values: np.ndarray
    timestamps: np.ndarray | None
    mse: float
    naive_mse: float
    epoch: int


def forecast_csv(
    path: Path,
    horizon: int,
    *,
    look_back: int = 96,
    width: int = 128,
    num_layers: int = 2,
    epochs: int = 10,
    patience: int = 3,
    rate: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
) -> CsvForecast:
    """Trains iTransformer on all columns of a csv and forecasts what comes after its last row.

    The first 80 % of the rows are trained on, the rest chooses the best epoch and never trains the model that makes the
    forecast; settings are the authors' of small data sets. An epoch passes over the training windows as often as 100
    updates take, once where one pass has more. Calendar features are tokens where there are timestamps.

    Args:
      path: as of `forecasting.read_csv`.
      horizon: S, steps to forecast.
      look_back: T, steps that a forecast sees.
      width: D, of the tokens and the feed-forward layers; a multiple of 8.
      num_layers: blocks.
      epochs: at most; of 100 updates at least.
      patience: epochs without a better error that end the training.
      rate: of Adam; halved every epoch from the third on.
      batch_size: windows of an update; fewer where there are fewer.
      seed: of initialisation, order and dropout.

    Raises:
      FileNotFoundError: there is no such file.
      CorruptData: it is no csv of finite numbers.
      ValueError: settings out of range, too few rows, timestamps that do not rise.
    """
    sizes = {"horizon": horizon, "look_back": look_back, "width": width, "num_layers": num_layers}
    for name, value in (sizes | {"epochs": epochs, "patience": patience, "batch_size": batch_size}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % 8:
        raise ValueError(f"width must be a multiple of the 8 heads, got {width}")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate}")
    table = read_csv(path)
    rows, split = len(table.values), int(TRAIN_PART * len(table.values))
    needed = look_back + horizon
    while int(TRAIN_PART * needed) < look_back + horizon or needed - int(TRAIN_PART * needed) < horizon:
        needed += 1
    if rows < needed:
        raise ValueError(
            f"{path} has {rows} rows; look_back={look_back} and horizon={horizon} need {needed}: shorten one of them"
        )
    ahead = None if table.timestamps is None else continued(table.timestamps, horizon)
    scaler = fit_scaler(table.values[:split])
    series = np.float32(scaler.transform(table.values))
    marks = None
    if table.timestamps is not None:
        marks = np.float32(time_features(table.timestamps, frequency(table.timestamps)))
    windows = Windows(series, marks, look_back, horizon)
    trained_on = range(count_windows(split, look_back, horizon))
    parts = {"train": trained_on, "validation": range(split - look_back, windows.count)}
    task = Task(windows, parts, std=scaler.std, mean=scaler.mean)
    model = ITransformer(horizon, d_model=width, d_ff=width, num_layers=num_layers)
    batch_size = min(batch_size, len(trained_on))
    steps = len(trained_on) // batch_size
    passes = -(-EPOCH // steps)
    epoch = passes * steps
    optimizer = make_optimizer("adam", halving(rate, epoch))
    order = epoch_order(len(trained_on), batch_size, passes * epochs, seed)

    def init(key: Array) -> TrainState:
        x = jnp.zeros((1, look_back, series.shape[1]))
        known = None if marks is None else jnp.zeros((1, look_back, marks.shape[1]))
        return create_state(model.init(key, x, known)["params"], optimizer)

    def batch_at(step: Array, data: tuple[Array, Windows]) -> Batch:
        order, windows = data
        return windows.gather(order[step])

    def loss_fn(params: Any, extra: None, batch: Batch, key: Array) -> tuple:
        x, y, known = batch
        found, _ = forecast(model, {"params": params}, x, known, key)
        return jnp.mean(jnp.square(found - y)), (extra, {})

    def evaluate(state: TrainState) -> dict[str, Any]:
        variables = jax.tree.map(lambda leaf: leaf[None], {"params": state.params})  # of one seed
        return {"mse": errors_of(model, variables, task, "validation", 128)[0, 0].mean()}

    init_key, train_key = jax.random.split(jax.random.key(seed))
    fitted = fit(
        run_once(init, init_key),
        make_train_step(loss_fn, optimizer),
        OnDevice(batch_at, (order, windows)),
        epochs * epoch,
        key=train_key,
        steps_per_call=epoch,
        log_every=epoch,
        evaluate=evaluate,
        evaluate_every=epoch,
        minimize="mse",
        patience=patience * epoch,
        title=str(path),
    )
    last = jnp.asarray(series[-look_back:])[None]
    known = None if marks is None else jnp.asarray(marks[-look_back:])[None]
    values, _ = jax.jit(partial(forecast, model))({"params": fitted.best.params}, last, known)
    return CsvForecast(
        table,
        scaler.inverse(np.asarray(values[0], np.float64)),
        ahead,
        float(fitted.best.score),
        naive_errors(task, "validation").repeated,
        int(fitted.best.step) // epoch,
    )


def frequency(timestamps: np.ndarray) -> str:
    """The calendar features that go with the steps of these timestamps: of minutes, hours or days."""
    seconds = np.median(np.diff(timestamps).astype("timedelta64[s]").astype(float))
    return "t" if seconds < 3600 else "h" if seconds < 86_400 else "d"


def continued(timestamps: np.ndarray, steps: int) -> np.ndarray:
    """The next timestamps: whole months where all steps are months, else the most frequent step.

    Raises:
      ValueError: timestamps that do not rise.
    """
    gaps = np.diff(timestamps)
    if (gaps <= np.timedelta64(0, "s")).any():
        row = int(np.argmax(gaps <= np.timedelta64(0, "s"))) + 1
        raise ValueError(f"timestamps must rise from row to row; {timestamps[row]} follows {timestamps[row - 1]}")
    ahead = np.arange(1, steps + 1)
    months = timestamps.astype("datetime64[M]")
    within = timestamps - months
    strides = np.unique(np.diff(months).astype(int))
    if len(strides) == 1 and strides[0] > 0 and (within == within[0]).all():
        return (months[-1] + strides[0] * ahead).astype("datetime64[s]") + within[-1]
    lengths, counts = np.unique(gaps, return_counts=True)
    return timestamps[-1] + lengths[np.argmax(counts)] * ahead


def csv_text(found: CsvForecast) -> str:
    """The forecast as a csv with the columns of the input, dates first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    dated = found.timestamps is not None
    writer.writerow([*(["date"] if dated else []), *found.table.names])
    for row, values in enumerate(found.values):
        date = [str(found.timestamps[row]).replace("T", " ")] if dated else []
        writer.writerow([*date, *(f"{value:.8g}" for value in values)])
    return text.getvalue()


def draw(found: CsvForecast, shown: int = 8) -> Figure:
    """The last rows and the forecast, a panel a variate, the first `shown` of them."""
    names = found.table.names[:shown]
    steps = len(found.values)
    past = found.table.values[-3 * steps :]
    figure, grid = figures.grid(len(names), 1, (8.0, 1.0 + 1.5 * len(names)), sharex=True)
    if found.timestamps is None:
        before, after, label = np.arange(-len(past) + 1, 1), np.arange(1, steps + 1), "steps from the last row"
    else:
        before, after, label = found.table.timestamps[-len(past) :], found.timestamps, ""
    for variate, (ax, name) in enumerate(zip(grid[:, 0], names, strict=True)):
        ax.plot(before, past[:, variate], color=figures.GREY, label="data")
        ax.plot(after, found.values[:, variate], color=figures.COLOURS[0], label="forecast")
        ax.set(ylabel=name)
    grid[0, 0].legend(fontsize=8, loc="upper left")
    grid[-1, 0].set(xlabel=label)
    if found.timestamps is not None:
        figure.autofmt_xdate()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.sequence.itransformer forecast ...`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sequence.itransformer", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="forecast")
    command = commands.add_parser("forecast", help="train on a csv and forecast what follows", allow_abbrev=False)
    command.add_argument("csv", type=Path, help="a header, then one row a time step; dates in a column `date`")
    command.add_argument("--horizon", type=int, required=True, help="steps to forecast")
    command.add_argument("--out", type=Path, required=True, help="csv to write")
    command.add_argument("--plot", type=Path, help="png to write; default: OUT with the suffix .png")
    options: dict[str, tuple[Callable[[str], Any], Any]] = {
        "look-back": (int, 96),
        "width": (int, 128),
        "num-layers": (int, 2),
        "epochs": (int, 10),
        "patience": (int, 3),
        "rate": (float, 1e-4),
        "batch-size": (int, 32),
        "seed": (int, 0),
    }
    for option, (kind, default) in options.items():
        command.add_argument(f"--{option}", type=kind, default=default, help=f"default {default}")
    arguments = parser.parse_args(argv)
    plot = arguments.plot or arguments.out.with_suffix(".png")
    written = [arguments.out, plot]
    try:
        if plot.resolve() == arguments.out.resolve():
            raise ValueError(f"{plot} cannot be both the csv and the plot; give --plot another name")
        for path in written:  # before the training, not after
            if path.resolve() == arguments.csv.resolve():
                raise ValueError(f"{path} is the csv that is read; write to another file")
            if path.is_dir():
                raise ValueError(f"{path} is a folder, and a file is needed")
        settings = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in options}
        found = forecast_csv(arguments.csv, arguments.horizon, **settings)
        write_whole(arguments.out, csv_text(found))
        use_figure_style()
        figure = draw(found)
        write_whole(plot, lambda file: figure.savefig(file, format="png", dpi=150))
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(
        f"{', '.join(map(str, written))}: {len(found.values)} steps of {len(found.table.names)} columns; on the last "
        f"fifth of the rows, which chose the epoch and trained nothing, MSE {found.mse:.3f}, of repeating the last row "
        f"{found.naive_mse:.3f} (standardised values)"
    )
    if not found.mse < found.naive_mse:
        print(
            "warning: this forecast is no better than repeating the last row; more rows, a shorter horizon, or another "
            "rate, width or look-back may help",
            file=sys.stderr,
        )
    return 0
