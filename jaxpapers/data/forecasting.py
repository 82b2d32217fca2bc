"""Multivariate series for forecasting: the field's data sets, their splits and scaling, windows cut on the device.

| name | rows x variates | step | split | file |
| --- | --- | --- | --- | --- |
| `ETTh1`, `ETTh2` | 17,420 x 7 | 1 h | 12, 4, 4 months | official csv (Zhou et al. 2021) |
| `ETTh` | 17,420 x 14 | 1 h | 12, 4, 4 months | ETTh1 and ETTh2 side by side: they have the same timestamps |
| `ETTm1`, `ETTm2` | 69,680 x 7 | 15 min | 12, 4, 4 months | official csv |
| `exchange` | 7,588 x 8 | 1 day | 70, 10, 20 % | csv of the Autoformer data folder (Lai et al. 2018) |
| `illness` | 966 x 7 | 1 week | 70, 10, 20 % | csv of the Autoformer data folder (US CDC) |
| `electricity`, `traffic`, `weather` | 321, 862, 21 variates | 1 h, 1 h, 10 min | 70, 10, 20 % | `<name>/<name>.csv` |
| `solar` | 137 variates | 10 min | 70, 10, 20 % | `Solar/solar_AL.txt`, neither header nor dates |
| `PEMS03`, `04`, `07`, `08` | 358, 307, 883, 170 | 5 min | 60, 20, 20 % | `PEMS/<name>.npz`, the first feature |

The last three rows are too large to be fetched unasked and have no published checksum: they are read where they lie
in the data folder, as iTransformer's authors pack them (plain, or as .gz), and only their variates are counted.
The csv of `exchange` has dates that somebody made up (consecutive days), and its last two columns the other way round
than the text of its authors.

    table = load_table("ETTh1")
    data = prepare(table, split_of("ETTh1"), look_back=96)
    train = cut_windows(data, "train", horizon=96)              # 8449 of them
    batch = jax.jit(lambda index: train.gather(index))(index)   # x (batch, 96, 7), y (batch, 96, 7), marks

Errors of forecasts are those of standardised values, averaged over all windows, steps and variates.
"""

import csv
import difflib
import gzip
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Float32, Float64, Int, Shaped

from jaxpapers.data.download import CorruptData, DataNotFound, OfficialFile, StoredForm, data_folder, open_data
from jaxpapers.typing import AnyArray

# Pinned to commits, so that an update there is no checksum error here.
GITHUB = "https://raw.githubusercontent.com"
ETT = f"{GITHUB}/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
EXCHANGE = f"{GITHUB}/XiongxiaoXu/SST/54de0639345bfbe5d8c1502581a748f12faa5769/dataset/exchange_rate"
ILLNESS = f"{GITHUB}/junwoopark92/Self-Supervised-Contrastive-Forecsating/e20c108114cf68d451c938712ad28dac5f83ef6e"
AUTOFORMER = (
    "the data folder of Autoformer (github.com/thuml/Autoformer) or iTransformer (github.com/thuml/iTransformer)"
)


def _official(name: str, url: str, sha256: str, size: int, packed_sha256: str, packed_size: int) -> OfficialFile:
    packed = StoredForm(f"{name}.gz", packed_sha256, packed_size)
    return OfficialFile(name, f"{url}/{name.rsplit('/')[-1]}", sha256, size, (packed,))


FORECASTING_FILES = {
    "ETTh1": _official(
        "ett/ETTh1.csv",
        ETT,
        "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        2_589_657,
        "3c56c865b8f6fc9b760a07f055ff8a993d3cf2a747235dc382b98821ed35f029",
        405_540,
    ),
    "ETTh2": _official(
        "ett/ETTh2.csv",
        ETT,
        "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
        2_417_960,
        "a549927e8cd45bd1c20a8ec51529cd037bf6da38fe37c2ba3dc0e9c8446d6cb5",
        428_740,
    ),
    "ETTm1": _official(
        "ett/ETTm1.csv",
        ETT,
        "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
        10_360_719,
        "ca45123028f1acad120b5f971ca64594746aa9b881d56cdff589ee9aa6cdbd8f",
        1_551_162,
    ),
    "ETTm2": _official(
        "ett/ETTm2.csv",
        ETT,
        "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
        9_677_236,
        "40da2dc79c8f7140eab4f3456debdf85fe8baca5d626280f1ba50181be8ae4ed",
        1_520_942,
    ),
    "exchange": _official(
        "exchange/exchange_rate.csv",
        EXCHANGE,
        "48b4d9d3d508f5104162e85b9a6042e3557fde11aa9f2944eba8c0d0efc89842",
        637_800,
        "a62d2ee3092d4b0eb2547092a7d066f32a35ab7a3ee26b14f90c2dc430d1a802",
        190_562,
    ),
    "illness": _official(
        "illness/national_illness.csv",
        f"{ILLNESS}/dataset/illness",
        "8594cecb98c6f2f9dc014eca11c4d5d1e38ad5ce6ed0592d4abe65b146fce395",
        66_653,
        "32b1603da924c60312c3b2e35c4ccff2e183f1ce33b217f7b6ae148ba0b45545",
        25_537,
    ),
}


class Benchmark(NamedTuple):
    """A data set of the field.

    Attributes:
        num_rows: as the papers have it.
        num_variates: likewise; a file with others is refused.
        split: one of `SPLITS`.
        path: below the data folder, of those that users download themselves.
    """

    num_rows: int
    num_variates: int
    split: str
    path: str = ""


BENCHMARKS = {
    "ETTh1": Benchmark(17_420, 7, "ett_hour"),
    "ETTh2": Benchmark(17_420, 7, "ett_hour"),
    "ETTh": Benchmark(17_420, 14, "ett_hour"),
    "ETTm1": Benchmark(69_680, 7, "ett_minute"),
    "ETTm2": Benchmark(69_680, 7, "ett_minute"),
    "exchange": Benchmark(7_588, 8, "custom"),
    "illness": Benchmark(966, 7, "custom"),
    "electricity": Benchmark(26_304, 321, "custom", "electricity/electricity.csv"),
    "traffic": Benchmark(17_544, 862, "custom", "traffic/traffic.csv"),
    "weather": Benchmark(52_696, 21, "custom", "weather/weather.csv"),
    "solar": Benchmark(52_560, 137, "solar", "Solar/solar_AL.txt"),
    "PEMS03": Benchmark(26_208, 358, "pems", "PEMS/PEMS03.npz"),
    "PEMS04": Benchmark(16_992, 307, "pems", "PEMS/PEMS04.npz"),
    "PEMS07": Benchmark(28_224, 883, "pems", "PEMS/PEMS07.npz"),
    "PEMS08": Benchmark(17_856, 170, "pems", "PEMS/PEMS08.npz"),
}
SPLITS = ("ett_hour", "ett_minute", "custom", "solar", "pems")
PARTS = ("train", "validation", "test")
TARGET = "OT"  # the column that univariate papers forecast; it stands last


class Table(NamedTuple):
    """A multivariate series as its file has it.

    Attributes:
        values: one row a time step.
        names: of the columns.
        timestamps: datetime64[s] of the rows; None where the file has none.
    """

    values: Float64[np.ndarray, "time variates"]
    names: tuple[str, ...]
    timestamps: Shaped[np.ndarray, "time"] | None


def load_table(name: str) -> Table:
    """A data set by the names of the table above, nothing rescaled and no row dropped.

    Raises:
        ValueError: the name is unknown.
        DataNotFound: the file is missing and cannot be downloaded, or is one that users download themselves.
        CorruptData: the file is not the official one, has other variates, or something else than finite numbers.
    """
    benchmark = _benchmark(name)
    if name == "ETTh":
        first, second = load_table("ETTh1"), load_table("ETTh2")
        if not np.array_equal(np.asarray(first.timestamps), np.asarray(second.timestamps)):
            raise CorruptData("ETTh1.csv and ETTh2.csv have different timestamps and cannot be joined")
        names = (*(f"h1 {column}" for column in first.names), *(f"h2 {column}" for column in second.names))
        return Table(np.concatenate([first.values, second.values], axis=1), names, first.timestamps)
    if name in FORECASTING_FILES:
        file = FORECASTING_FILES[name]
        with open_data(file) as stream:
            table = _parsed_csv(stream.read(), f"{file.name} in {data_folder()}")
    else:
        path = _users_file(benchmark.path)
        read = {".csv": read_csv, ".txt": read_rows, ".npz": read_pems}[Path(benchmark.path).suffix]
        table = read(path)
    if len(table.names) != benchmark.num_variates:
        raise CorruptData(f"{name} has {len(table.names)} variates, expected {benchmark.num_variates}")
    return table


def split_of(name: str) -> str:
    """The split of a data set, one of `SPLITS`.

    Raises:
        ValueError: the name is unknown.
    """
    return _benchmark(name).split


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        known = {known.lower(): known for known in BENCHMARKS}
        nearest = known[difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]]
        raise ValueError(f"unknown data set {name!r}, nearest is {nearest!r}; known are {[*BENCHMARKS]}")
    return BENCHMARKS[name]


def _users_file(name: str) -> Path:
    for path in (data_folder() / name, data_folder() / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataNotFound(
        f"{name} is not in {data_folder()}, and it is not fetched unasked. Take it from {AUTOFORMER} and put it into "
        f"{(data_folder() / name).parent} as {Path(name).name}, or set $JAXPAPERS_DATA to the folder that has {name}."
    )


def read_csv(path: Path, target: str = TARGET) -> Table:
    """A csv with a header, of anyone: timestamps in a column `date` (or in a first one that is no number), numbers.

    Timestamps are written year first, 2016-07-01 00:15:00 or 1990/1/1 0:00, the time of day where there is one.

    Args:
        path: plain, or gzip where the name ends in .gz.
        target: this column, where there is one, is moved to the end.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptData: no header, no row or no number column, rows of different lengths, something that is neither a
            finite number nor, in the column of dates, a timestamp.
    """
    return _parsed_csv(_content(path), str(path), target)


def read_rows(path: Path) -> Table:
    """Comma-separated numbers, one row a time step, with neither header nor timestamps (Solar, LSTNet's files).

    Raises:
        FileNotFoundError: there is no such file.
        CorruptData: something else than finite numbers, or rows of different lengths.
    """
    values = _numbers(_lines(_content(path), str(path)), None, str(path), first_line=1)
    names = tuple(map(str, range(values.shape[1])))
    return _finite(Table(values, names, None), str(path))


def read_pems(path: Path) -> Table:
    """Traffic sensors as PEMS03, 04, 07 and 08 come: the array `data` (time, sensors, features), the first feature.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptData: no such array, or numbers that are not finite.
    """
    try:
        with np.load(io.BytesIO(_content(path)), allow_pickle=False) as archive:
            data = archive["data"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptData(f"{path} is no npz with an array `data` ({error})") from error
    if data.ndim != 3 or not data.size or not np.issubdtype(data.dtype, np.number):
        raise CorruptData(f"{path}: `data` has shape {data.shape} and {data.dtype}, expected (time, sensors, features)")
    values = np.asarray(data[:, :, 0], np.float64)
    return _finite(Table(values, tuple(map(str, range(values.shape[1]))), None), str(path))


def _content(path: Path) -> bytes:
    content = Path(path).read_bytes()
    if Path(path).suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise CorruptData(f"{path} cannot be unpacked ({error})") from error


def _lines(content: bytes, what: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptData(f"{what} is not UTF-8 ({error})") from error
    return [line for line in text.splitlines() if line.strip()]


def _parsed_csv(content: bytes, what: str, target: str = TARGET) -> Table:
    lines = _lines(content, what)
    if len(lines) < 2:
        raise CorruptData(f"{what} needs a header and rows, it has {len(lines)} lines")
    header, first = ([cell.strip() for cell in row] for row in csv.reader(lines[:2]))
    if all(map(_is_number, header)):
        raise CorruptData(f"{what} has no header: its first line holds numbers alone")
    if len(first) != len(header):
        raise CorruptData(f"{what}: line 2 has {len(first)} cells, the header {len(header)}")
    dates = [column for column, name in enumerate(header) if name.lower() == "date"][:1]
    if not dates and not _is_number(first[0]):
        dates = [0]
    columns = [column for column in range(len(header)) if column not in dates]
    columns.sort(key=lambda column: header[column] == target)  # stable: the others keep their order
    if not columns:
        raise CorruptData(f"{what} has no column of numbers")
    values = _numbers(lines[1:], columns, what, first_line=2)
    timestamps = None
    if dates:
        timestamps = _timestamps([row[dates[0]].strip() for row in csv.reader(lines[1:])], what)
    return _finite(Table(values, tuple(header[column] for column in columns), timestamps), what)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(
    lines: Sequence[str], columns: Sequence[int] | None, what: str, first_line: int
) -> Float64[np.ndarray, "time columns"]:
    try:
        return np.loadtxt(lines, delimiter=",", usecols=columns, ndmin=2, comments=None, quotechar='"')
    except ValueError as error:  # NumPy counts rows from 0 or from 1, as the error may be
        raise CorruptData(f"{what}: {_first_bad_cell(lines, columns, first_line) or error}") from error


def _first_bad_cell(lines: Sequence[str], columns: Sequence[int] | None, first_line: int) -> str:
    width = None
    for line, row in enumerate(csv.reader(lines), start=first_line):
        width = width or len(row)
        if len(row) != width:
            return f"line {line} (empty ones not counted) has {len(row)} cells, those before it {width}"
        for column in range(width) if columns is None else columns:
            if not _is_number(row[column]):
                return f"{row[column]!r} in line {line} (empty ones not counted), column {column + 1}, is no number"
    return ""


STAMP = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?:[ T](\d{1,2}):(\d{2})(?::(\d{2})(?:\.\d*)?)?)?Z?")


def _timestamps(texts: Sequence[str], what: str) -> Shaped[np.ndarray, "time"]:
    written = []
    for line, text in enumerate(texts, start=2):
        if not (found := STAMP.fullmatch(text)):
            raise CorruptData(f"{what}: {text!r} in line {line} is no timestamp such as 2016-07-01 00:15:00")
        year, month, day, hour, minute, second = (int(part or 0) for part in found.groups())
        written.append(f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
    try:
        return np.array(written, "datetime64[s]")
    except ValueError as error:
        raise CorruptData(f"{what}: {error}") from error


def _finite(table: Table, what: str) -> Table:
    bad = ~np.isfinite(table.values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise CorruptData(
            f"{what} has {np.count_nonzero(bad)} values that are not finite, the first in row {row} (from 0) of "
            f"column {table.names[column]!r}; fill or drop them first"
        )
    return table


class Splits(NamedTuple):
    """First row, and the row after the last one, of the parts of a series; each starts T rows before its first target.

    Attributes:
        train: from row 0.
        validation: with the T training rows before it (`pems`: without).
        test: with the T rows before it (`pems`: without).
    """

    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]


def split_rows(split: str, num_rows: int, look_back: int) -> Splits:
    """The rows of training, validation and test as the field cuts them.

    `ett_hour` takes 12, 4 and 4 months of 30 days and leaves the other rows unused, `ett_minute` the same of quarter
    hours. `custom` is int(70 %) for training, int(20 %) for the test and the rest between them; `solar` has int(10 %)
    there; `pems` is 60, 20 and 20 %, each part by itself.

    Args:
        split: one of `SPLITS`.
        num_rows: of the series.
        look_back: T: rows that validation and test reach back.

    Raises:
        ValueError: an unknown split, a series too short for it, T below 1 or beyond the training rows.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, known are {SPLITS}")
    if look_back < 1:
        raise ValueError(f"look_back must be at least 1, got {look_back}")
    if split.startswith("ett"):
        month = 30 * 24 * (4 if split == "ett_minute" else 1)
        ends = (12 * month, 16 * month, 20 * month)
        if num_rows < ends[2]:
            raise ValueError(f"{split} takes {ends[2]} rows, the series has {num_rows}")
        starts = (ends[0], ends[1])
    elif split == "pems":
        ends = (int(0.6 * num_rows), int(0.8 * num_rows), num_rows)
        starts = (ends[0] + look_back, ends[1] + look_back)
    else:
        train, test = int(0.7 * num_rows), int(0.2 * num_rows)
        between = int(0.1 * num_rows) if split == "solar" else num_rows - train - test
        ends = (train, train + between, num_rows)
        starts = (train, num_rows - test)
    if look_back > ends[0]:
        raise ValueError(f"look_back={look_back} is longer than the {ends[0]} training rows")
    return Splits((0, ends[0]), (starts[0] - look_back, ends[1]), (starts[1] - look_back, ends[2]))


class Scaler(NamedTuple):
    """Mean and standard deviation of each variate; where the latter is 0 it is taken as 1.

    Attributes:
        mean: of each variate.
        std: biased, over n.
    """

    mean: Float64[np.ndarray, "variates"]
    std: Float64[np.ndarray, "variates"]

    def transform(self, values: Float[AnyArray, "*batch variates"]) -> Float[AnyArray, "*batch variates"]:
        """(values - mean) / std."""
        return (values - self.mean) / self.std

    def inverse(self, values: Float[AnyArray, "*batch variates"]) -> Float[AnyArray, "*batch variates"]:
        """Values times std, plus mean."""
        return values * self.std + self.mean


def fit_scaler(values: Float[np.ndarray, "time variates"]) -> Scaler:
    """The scaler of these rows, which are to be those of the training set alone.

    Raises:
        ValueError: no rows.
    """
    if not len(values):
        raise ValueError("a scaler needs rows, got none")
    std = values.std(axis=0, dtype=np.float64)
    return Scaler(values.mean(axis=0, dtype=np.float64), np.where(std == 0, 1.0, std))


FREQUENCIES = ("t", "h", "d")


def time_features(timestamps: Shaped[np.ndarray, "time"], freq: str = "h") -> Float64[np.ndarray, "time features"]:
    """Calendar features in [-1/2, 1/2] (`timeF` of Informer and its successors).

    Hourly: hour / 23, weekday / 6 (Monday is 0), (day - 1) / 30, (day of the year - 1) / 365, each less 1/2. Minutes
    have minute / 59 before these, days leave the hour out.

    Args:
        timestamps: datetime64.
        freq: "h", "t" (minutes) or "d". The authors' scripts take "h" for data of 10 and 15 minutes and of days, too.

    Raises:
        ValueError: an unknown frequency, or no datetime64.
    """
    if freq not in FREQUENCIES:
        raise ValueError(f"unknown frequency {freq!r}, known are {FREQUENCIES}")
    if not np.issubdtype(timestamps.dtype, np.datetime64):
        raise ValueError(f"timestamps must be datetime64, got {timestamps.dtype}")
    days = timestamps.astype("datetime64[D]")
    minutes = (timestamps.astype("datetime64[m]") - days).astype(int)
    features = [
        ("t", minutes % 60 / 59),
        ("th", minutes // 60 / 23),
        ("thd", (days.astype(int) + 3) % 7 / 6),  # 1970-01-01 was a Thursday
        ("thd", (days - days.astype("datetime64[M]")).astype(int) / 30),
        ("thd", (days - days.astype("datetime64[Y]")).astype(int) / 365),
    ]
    return np.stack([values for frequencies, values in features if freq in frequencies], axis=1) - 0.5


class ForecastData(NamedTuple):
    """A series ready for training.

    Attributes:
        series: all rows, standardised with mean and std of the training rows.
        marks: calendar features of all rows; None where there are no timestamps.
        scaler: of the training rows.
        look_back: T, rows that validation and test reach back.
        splits: which rows are which.
    """

    series: Float32[np.ndarray, "time variates"]
    marks: Float32[np.ndarray, "time features"] | None
    scaler: Scaler
    look_back: int
    splits: Splits


def prepare(table: Table, split: str, look_back: int, freq: str = "h") -> ForecastData:
    """Standardises a table and splits its rows.

    Raises:
        ValueError: values that are not finite; as `split_rows` and `time_features`.
    """
    if not np.isfinite(table.values).all():
        raise ValueError(f"the series has {np.count_nonzero(~np.isfinite(table.values))} values that are not finite")
    splits = split_rows(split, len(table.values), look_back)
    scaler = fit_scaler(table.values[slice(*splits.train)])
    marks = None if table.timestamps is None else time_features(table.timestamps, freq).astype(np.float32)
    series = np.asarray(scaler.transform(table.values), np.float32)
    return ForecastData(series, marks, scaler, look_back, splits)


def count_windows(num_rows: int, look_back: int, horizon: int) -> int:
    """Windows of T + S rows in so many rows, stride 1.

    Raises:
        ValueError: T or S below 1, or not one window.
    """
    if look_back < 1 or horizon < 1:
        raise ValueError(f"look_back and horizon must be at least 1, got {look_back} and {horizon}")
    count = num_rows - look_back - horizon + 1
    if count < 1:
        raise ValueError(f"{num_rows} rows have no window of look_back={look_back} and horizon={horizon}")
    return count


class Batch(NamedTuple):
    """Windows of a series.

    Attributes:
        x: what is known.
        y: what follows.
        marks: calendar features of both, known beforehand; None where there are no timestamps.
    """

    x: Float[Array, "*batch look_back variates"]
    y: Float[Array, "*batch horizon variates"]
    marks: Float[Array, "*batch look_back+horizon features"] | None


class Windows(struct.PyTreeNode):
    """All windows of consecutive rows, stride 1: window i is x = rows [i, i + T), y = rows [i + T, i + T + S).

    A pytree, so that it can be an argument of a jitted function (a large series should not be a constant of one).

    Attributes:
        series: standardised rows.
        marks: calendar features of the rows, or None.
        look_back: T.
        horizon: S.
    """

    series: Float[AnyArray, "time variates"]
    marks: Float[AnyArray, "time features"] | None
    look_back: int = struct.field(pytree_node=False)
    horizon: int = struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """Number of windows."""
        return count_windows(self.series.shape[0], self.look_back, self.horizon)

    def gather(self, index: Int[AnyArray, "*batch"]) -> Batch:
        """The windows of these numbers; a number outside of 0..count - 1 gives NaN."""
        length = self.look_back + self.horizon
        inside = (index >= 0) & (index < self.count)
        flat = jnp.ravel(jnp.where(inside, index, 0))

        def cut(rows: Float[AnyArray, "time columns"]) -> Float[Array, "*batch length columns"]:
            # Slices, not rows one by one: XLA's gather takes a turn for each.
            found = jax.vmap(lambda start: lax.dynamic_slice_in_dim(jnp.asarray(rows), start, length))(flat)
            return jnp.where(inside[..., None, None], found.reshape(*index.shape, length, -1), jnp.nan)

        rows = cut(self.series)
        marks = None if self.marks is None else cut(self.marks)
        return Batch(rows[..., : self.look_back, :], rows[..., self.look_back :, :], marks)


def window_numbers(splits: Splits, part: str, look_back: int, horizon: int) -> range:
    """Which of the whole series' windows are those of a part.

    Args:
        splits: of the same look_back.
        part: "train", "validation" or "test".
        look_back: T.
        horizon: S.

    Raises:
        ValueError: an unknown part, T or S below 1, a part too short for one window.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}, known are {PARTS}")
    start, stop = getattr(splits, part)
    return range(start, start + count_windows(stop - start, look_back, horizon))


def cut_windows(data: ForecastData, part: str, horizon: int) -> Windows:
    """The windows of a part of the data, of the look-back that it was prepared with.

    Args:
        data: the series.
        part: "train", "validation" or "test".
        horizon: S.

    Raises:
        ValueError: an unknown part, S below 1, a part too short for one window.
    """
    numbers = window_numbers(data.splits, part, data.look_back, horizon)
    rows = slice(numbers.start, numbers.stop - 1 + data.look_back + horizon)
    return Windows(data.series[rows], None if data.marks is None else data.marks[rows], data.look_back, horizon)
