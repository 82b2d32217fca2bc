"""Series for forecasting: the authors' golden figures, splits and windows by hand, files that must be refused."""

import datetime
import gzip
import hashlib
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.data import forecasting
from jaxpapers.data.download import CorruptData, DataNotFound, OfficialFile, data_folder, find
from jaxpapers.data.forecasting import (
    BENCHMARKS,
    FORECASTING_FILES,
    PARTS,
    SPLITS,
    Table,
    Windows,
    count_windows,
    cut_windows,
    fit_scaler,
    load_table,
    prepare,
    read_csv,
    read_pems,
    read_rows,
    split_of,
    split_rows,
    time_features,
    window_numbers,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer" / "data_pipeline.npz"
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order


def stored(name):
    files = ("ETTh1", "ETTh2") if name == "ETTh" else (name,)
    if not all(find(FORECASTING_FILES[file]) for file in files):
        pytest.skip(f"{name} is not in {data_folder()}")
    return load_table(name)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def test_the_authors_pipeline_on_etth1(golden):
    T, S = int(golden["seq_len"]), int(golden["pred_len"])
    data = prepare(stored("ETTh1"), "ett_hour", T)
    np.testing.assert_allclose(data.scaler.mean, golden["mean"], **EXACT)
    np.testing.assert_allclose(data.scaler.std, golden["std"], **EXACT)
    whole = Windows(data.series, data.marks, T, S)
    for part, name in zip(PARTS, ("train", "val", "test"), strict=True):
        windows = cut_windows(data, part, S)
        numbers = window_numbers(data.splits, part, T, S)
        assert windows.count == len(numbers) == golden[f"n_windows_{name}"]
        # A part's windows, and those of the same numbers of the whole series.
        for found, (first, last) in ((windows, (0, windows.count - 1)), (whole, (numbers[0], numbers[-1]))):
            batch = found.gather(np.array([first, last]))
            np.testing.assert_array_equal(batch.x[0], golden[f"first_x_{name}"])  # both rounded to float32 at the end
            np.testing.assert_array_equal(batch.y[1], golden[f"last_y_{name}"])


def test_the_authors_time_features(golden):
    features = time_features(golden["stamps"].astype("datetime64[s]"))
    np.testing.assert_allclose(features, golden["time_features"], **EXACT)


SHAPES = {
    "ETTh1": ("2016-07-01T00", "2018-06-26T19", 3600, "OT"),
    "ETTh2": ("2016-07-01T00", "2018-06-26T19", 3600, "OT"),
    "ETTh": ("2016-07-01T00", "2018-06-26T19", 3600, "h2 OT"),
    "ETTm1": ("2016-07-01T00", "2018-06-26T19:45", 900, "OT"),
    "ETTm2": ("2016-07-01T00", "2018-06-26T19:45", 900, "OT"),
    "exchange": ("1990-01-01", "2010-10-10", 86_400, "OT"),
    "illness": ("2002-01-01", "2020-06-30", 7 * 86_400, "OT"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_official_files(name):
    table = stored(name)
    benchmark = BENCHMARKS[name]
    first, last, seconds, column = SHAPES[name]
    assert (
        table.values.shape == (benchmark.num_rows, benchmark.num_variates) == (len(table.timestamps), len(table.names))
    )
    assert table.names[-1] == column
    assert (table.timestamps[0], table.timestamps[-1]) == (np.datetime64(first), np.datetime64(last))
    assert set(np.diff(table.timestamps).astype(int)) == {seconds}


def test_a_value_is_read_to_the_last_bit():
    table = stored("ETTh1")
    assert table.values[0, 0] == 5.827000141143799
    assert table.values[0, -1] == 30.5310001373291
    np.testing.assert_array_equal(stored("ETTh").values[:, :7], table.values)
    np.testing.assert_array_equal(stored("ETTh").values[:, 7:], stored("ETTh2").values)


def test_counts_of_the_card():
    splits = split_rows("ett_hour", 17_420, 96)
    assert splits == ((0, 8640), (8640 - 96, 11_520), (11_520 - 96, 14_400))
    assert [count_windows(stop - start, 96, 96) for start, stop in splits] == [8449, 2785, 2785]
    assert split_rows("ett_minute", 69_680, 96) == ((0, 34_560), (34_464, 46_080), (45_984, 57_600))
    # Rows of the paper's table of data sets: train, validation and test of S = 96.
    for name, counts in {"solar": (36_601, 5161, 10_417), "PEMS03": (15_617, 5135, 5135)}.items():
        horizon = 96 if name == "solar" else 12
        splits = split_rows(split_of(name), BENCHMARKS[name].num_rows, 96)
        assert tuple(count_windows(stop - start, 96, horizon) for start, stop in splits) == counts


@given(
    split=st.sampled_from([split for split in SPLITS if not split.startswith("ett")]),
    rows=st.integers(300, 5000),
    T=st.integers(1, 100),
    S=st.integers(1, 20),
)
def test_no_target_of_one_part_is_seen_in_another(split, rows, T, S):
    splits = split_rows(split, rows, T)
    train, validation, test = splits
    targets = [range(start + T, stop) for start, stop in splits]
    assert train[0] == 0
    assert test[1] == rows
    assert train[1] <= targets[1].start  # no target of validation or test is a training row
    assert validation[1] <= targets[2].start
    assert abs(len(targets[2]) - rows / 5) <= T + 1
    reach = 0 if split == "pems" else T
    assert validation[0] == train[1] - reach
    assert train[1] == int((0.6 if split == "pems" else 0.7) * rows)


def table_of(values, timestamps=None):
    return Table(np.asarray(values, float), tuple(map(str, range(np.shape(values)[1]))), timestamps)


def test_scaling_is_that_of_the_training_rows():
    values = np.random.default_rng(0).normal(3, 2, (1000, 3))
    values[:, 1] = 4.0  # constant
    values[700:] += 100  # what is no training row
    data = prepare(table_of(values), "custom", 10)
    train = data.series[:700].astype(float)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-6)  # float32
    np.testing.assert_allclose(train.std(axis=0), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(data.scaler.std, [values[:700, 0].std(), 1, values[:700, 2].std()], **EXACT)
    np.testing.assert_allclose(data.scaler.inverse(data.scaler.transform(values)), values, **EXACT)
    assert data.marks is None


def test_windows_are_rows_and_their_successors():
    series = np.arange(40, dtype=np.float32)[:, None] * [1, 100]
    marks = np.arange(40, dtype=np.float32)[:, None]
    windows = Windows(series.astype(np.float32), marks, look_back=5, horizon=3)
    assert windows.count == 33
    gather = jax.jit(lambda windows, index: windows.gather(index))  # the series an argument, not a constant
    index = np.array([[0, 7], [32, 1]])
    batch = gather(windows, index)
    for place, start in np.ndenumerate(index):
        np.testing.assert_array_equal(batch.x[place], series[start : start + 5])
        np.testing.assert_array_equal(batch.y[place], series[start + 5 : start + 8])
        np.testing.assert_array_equal(batch.marks[place], marks[start : start + 8])
    outside = gather(windows, np.array([[-1, 33], [32, 40]]))
    assert np.isnan(outside.x[0]).all()
    assert np.isnan(outside.y[1, 1]).all()
    assert np.isnan(outside.marks[1, 1]).all()
    np.testing.assert_array_equal(outside.y[1, 0], series[37:40])
    assert windows.replace(marks=None).gather(np.array([3])).marks is None


@given(st.datetimes(datetime.datetime(1980, 1, 1), datetime.datetime(2060, 12, 31)))
def test_time_features_against_the_calendar_of_python(stamp):
    stamp = stamp.replace(microsecond=0)
    minutes, hours, days = (time_features(np.array([stamp], "datetime64[s]"), freq)[0] for freq in "thd")
    doy = stamp.timetuple().tm_yday
    expected = [stamp.minute / 59, stamp.hour / 23, stamp.weekday() / 6, (stamp.day - 1) / 30, (doy - 1) / 365]
    np.testing.assert_allclose(minutes, np.array(expected) - 0.5, **EXACT)
    np.testing.assert_array_equal(hours, minutes[1:])
    np.testing.assert_array_equal(days, minutes[2:])
    assert np.abs(minutes).max() <= 0.5


def write(folder, text, name="table.csv"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_anyones_csv(tmp_path, name):
    text = '﻿Date,OT,"load, MW",b\r\n2020/1/2 3:00,1,2.5,-3e1\r\n2020-01-02T04:05:06Z, 4,5,6\r\n\r\n'
    table = read_csv(write(tmp_path, text, name))
    assert table.names == ("load, MW", "b", "OT")
    np.testing.assert_array_equal(table.values, [[2.5, -30, 1], [5, 6, 4]])
    assert [str(stamp) for stamp in table.timestamps] == ["2020-01-02T03:00:00", "2020-01-02T04:05:06"]
    plain = read_csv(write(tmp_path, "a,b\n1,2\n3,4\n"), target="a")
    assert (plain.names, plain.timestamps) == (("b", "a"), None)
    unnamed = read_csv(write(tmp_path, "when,b\n2020-02-29,2\n2020-03-01,4\n"))
    assert (unnamed.names, str(unnamed.timestamps[0])) == (("b",), "2020-02-29T00:00:00")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a header and rows, it has 0 lines"),
        ("a,b\n", "needs a header and rows, it has 1 lines"),
        ("1,2\n3,4\n", "has no header"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ("a,b\n1,2\n3\n", r"line 3 .* has 1 cells, those before it 2"),
        ("a,b\n1,2\n3,x\n", "'x' in line 3 .*, column 2, is no number"),
        ("a,b\n1,2\n,4\n", "'' in line 3 .*, column 1, is no number"),
        ("a,b\n1,2\n3,nan\n5,inf\n", "2 values that are not finite, the first in row 1 .* of column 'b'"),
        ("date,b\n2020-01-01,2\n01.02.2020,2\n", "'01.02.2020' in line 3 is no timestamp such as"),
        ("date,b\n2020-02-30,2\n", "table.csv"),
        ("date\n2020-01-01\n", "no column of numbers"),
    ],
)
def test_a_csv_that_must_be_refused(tmp_path, text, message):
    with pytest.raises(CorruptData, match=message):
        read_csv(write(tmp_path, text))


def test_files_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b\n\xff\xfe,2\n")
    with pytest.raises(CorruptData, match="not UTF-8"):
        read_csv(path)
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(b"a,b\n1,2\n")[:-5])
    with pytest.raises(CorruptData, match="cannot be unpacked"):
        read_csv(packed)
    with pytest.raises(FileNotFoundError):
        read_csv(tmp_path / "absent.csv")


def test_files_that_users_download(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    for name, benchmark in (("solar", BENCHMARKS["solar"]), ("PEMS08", BENCHMARKS["PEMS08"])):
        with pytest.raises(DataNotFound, match=f"{benchmark.path}.*is not fetched unasked.*Autoformer"):
            load_table(name)
        (tmp_path / benchmark.path).parent.mkdir()
    rows = np.arange(3 * 137).reshape(3, 137) / 8
    write(tmp_path, "\n".join(",".join(map(str, row)) for row in rows), "Solar/solar_AL.txt.gz")
    solar = load_table("solar")
    np.testing.assert_array_equal(solar.values, rows)
    assert solar.timestamps is None
    sensors = np.random.default_rng(0).random((5, 170, 3))
    np.savez(tmp_path / "PEMS" / "PEMS08.npz", data=sensors)
    np.testing.assert_array_equal(load_table("PEMS08").values, sensors[:, :, 0])
    np.savez(tmp_path / "PEMS" / "PEMS04.npz", data=sensors)
    with pytest.raises(CorruptData, match="PEMS04 has 170 variates, expected 307"):
        load_table("PEMS04")
    (tmp_path / "weather").mkdir()
    header = ",".join(["date", "OT", *map(str, range(20))])
    write(tmp_path, f"{header}\n2020-01-01 00:10:00,{','.join(map(str, range(21)))}\n", "weather/weather.csv")
    weather = load_table("weather")
    assert (weather.names[-1], weather.values[0, -1]) == ("OT", 0)


@pytest.mark.parametrize("content", [b"", b"PK nothing", "other", "flat", "objects"])
def test_an_npz_that_must_be_refused(tmp_path, content):
    path = tmp_path / "PEMS03.npz"
    buffer = io.BytesIO()
    arrays = {"other": {"x": np.zeros(3)}, "flat": {"data": np.zeros(3)}, "objects": {"data": np.array([[{}]], object)}}
    if isinstance(content, str):
        np.savez(buffer, **arrays[content])
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(CorruptData, match=r"PEMS03\.npz"):
        read_pems(path)


def test_rows_without_header(tmp_path):
    np.testing.assert_array_equal(read_rows(write(tmp_path, "1,2\n3,4\n")).values, [[1, 2], [3, 4]])
    with pytest.raises(CorruptData, match="not finite, the first in row 1"):
        read_rows(write(tmp_path, "1,2\nnan,4\n"))
    with pytest.raises(CorruptData, match=r"'x' in line 2 .*, column 1, is no number"):
        read_rows(write(tmp_path, "1,2\nx,4\n"))


def test_an_official_file_that_is_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    content = b"date,a,OT\n2020-01-01,1,2\n"
    file = OfficialFile("ett/ETTh1.csv", None, hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setitem(forecasting.FORECASTING_FILES, "ETTh1", file)
    with pytest.raises(DataNotFound, match="ETTh1"):
        load_table("ETTh1")
    (tmp_path / "ett").mkdir()
    (tmp_path / "ett" / "ETTh1.csv").write_bytes(content)
    with pytest.raises(CorruptData, match="ETTh1 has 2 variates, expected 7"):
        load_table("ETTh1")
    (tmp_path / "ett" / "ETTh1.csv").write_bytes(content.replace(b"1,2", b"1,3"))
    with pytest.raises(CorruptData, match="sha256"):
        load_table("ETTh1")


def test_addresses_are_one_per_file():
    urls = [file.url for file in FORECASTING_FILES.values()]
    assert len(set(urls)) == len(urls) == 6
    for file in FORECASTING_FILES.values():
        assert file.url.rsplit("/")[-1] == file.name.rsplit("/")[-1]
        assert file.alternates[0].name == f"{file.name}.gz"


def constant():
    return prepare(table_of(np.ones((100, 1))), "custom", 5)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: load_table("etth1"), "unknown data set 'etth1', nearest is 'ETTh1'"),
        (lambda: split_of("weathr"), "nearest is 'weather'"),
        (lambda: split_rows("random", 100, 5), "unknown split 'random'"),
        (lambda: split_rows("custom", 100, 0), "look_back must be at least 1, got 0"),
        (lambda: split_rows("custom", 100, 71), "look_back=71 is longer than the 70 training rows"),
        (lambda: split_rows("ett_minute", 17_420, 96), "ett_minute takes 57600 rows, the series has 17420"),
        (lambda: count_windows(100, 0, 5), "at least 1, got 0 and 5"),
        (lambda: count_windows(100, 60, 41), "100 rows have no window of look_back=60 and horizon=41"),
        (lambda: fit_scaler(np.zeros((0, 3))), "a scaler needs rows"),
        (lambda: prepare(table_of([[1.0], [np.nan]] * 9), "custom", 2), "9 values that are not finite"),
        (lambda: time_features(np.array(["2020-01-01"], "datetime64[s]"), "w"), "unknown frequency 'w'"),
        (lambda: time_features(np.arange(3)), "must be datetime64"),
        (lambda: cut_windows(constant(), "val", 5), "unknown part 'val'"),
        (lambda: cut_windows(constant(), "test", 21), "25 rows have no window"),
    ],
)
def test_bad_input_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def test_windows_go_into_a_vmap():
    windows = Windows(jnp.arange(20.0)[:, None], None, look_back=3, horizon=2)
    found = jax.vmap(lambda index: windows.gather(index).y)(jnp.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found[..., 0], np.arange(6).reshape(2, 3)[..., None] + [3, 4])
