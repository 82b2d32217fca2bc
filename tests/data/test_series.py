"""Readers of series: the official files where they are at hand, and made-up ones for the refusals."""

import hashlib
import io

import numpy as np
import pytest

from jaxpapers.data import series as series_module
from jaxpapers.data.download import CorruptData, DataNotFound, OfficialFile, data_folder
from jaxpapers.data.series import ALRNN_SERIES, Series, alrnn_series


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Puts an array into a data folder of its own and into the table as `made_up`, shape (4, 2)."""
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))

    def register(array, allow_pickle=False):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=allow_pickle)
        content = buffer.getvalue()
        (tmp_path / "made_up.npy").write_bytes(content)
        file = OfficialFile("made_up.npy", None, hashlib.sha256(content).hexdigest(), len(content))
        monkeypatch.setitem(series_module.ALRNN_SERIES, "made_up", Series(file, (4, 2)))

    return register


@pytest.mark.parametrize("name", sorted(ALRNN_SERIES))
def test_official_series(name):
    file, shape = ALRNN_SERIES[name]
    if not (data_folder() / file.name).exists():
        pytest.skip(f"{file.name} is not in {data_folder()}")
    series = alrnn_series(name)
    assert series.shape == shape
    assert series.dtype == np.float32
    assert series.flags.c_contiguous
    # All are standardised by their authors; the tutorial's scale is not their own, ECG's std is 0.82.
    np.testing.assert_allclose(series.mean(axis=0, dtype=np.float64), 0, atol=0.12)
    np.testing.assert_allclose(series.std(axis=0, dtype=np.float64), 1, atol=0.2)


def test_addresses_are_one_per_series_and_end_in_the_files_name():
    assert len({series.file.url for series in ALRNN_SERIES.values()}) == len(ALRNN_SERIES) == 7
    for series in ALRNN_SERIES.values():
        assert f"{series.file.url}".rsplit("/")[-1] == series.file.name.removeprefix("alrnn/")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_stored_precision_and_order_is_read_as_float32(register, dtype, order):
    array = np.arange(8, dtype=dtype).reshape(4, 2) / 3
    register(np.asarray(array, dtype=dtype, order=order))
    series = alrnn_series("made_up")
    assert series.dtype == np.float32
    assert series.flags.c_contiguous
    np.testing.assert_array_equal(series, array.astype(np.float32))


def test_wrong_shape_is_refused(register):
    register(np.zeros((2, 4)))
    with pytest.raises(CorruptData, match=r"made_up.npy has shape \(2, 4\), expected \(4, 2\)"):
        alrnn_series("made_up")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(register, bad):
    array = np.zeros((4, 2))
    array[2, 1] = bad
    register(array)
    with pytest.raises(CorruptData, match="1 non-finite"):
        alrnn_series("made_up")


def test_pickled_objects_are_never_loaded(register):
    register(np.array([[{}] * 2] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        alrnn_series("made_up")


@pytest.mark.parametrize(
    ("name", "nearest"), [("lorenz", "lorenz63"), ("ECG", "ecg"), ("roessler", "rossler"), ("", "")]
)
def test_unknown_names_get_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown series '{name}', nearest is '{nearest}") as error:
        alrnn_series(name)
    assert all(known in str(error.value) for known in ALRNN_SERIES)


def test_a_missing_series_says_so(register, tmp_path):
    register(np.zeros((4, 2)))
    (tmp_path / "made_up.npy").unlink()
    with pytest.raises(DataNotFound, match=r"made_up\.npy"):
        alrnn_series("made_up")
