"""Readers of measured and simulated time series, as their authors ship them.

`alrnn_series` reads the benchmark series of the AL-RNN paper (Brenner, Hemmer, Monfared, Durstewitz, NeurIPS
2024, arXiv 2410.14240) from `DurstewitzLab/ALRNN-DSR` (GPL-3.0; the files are read, never redistributed):

| name | shape | what it is |
| --- | --- | --- |
| `lorenz63` | (100000, 3) | Lorenz-63, dt = 0.01, standardised |
| `rossler` | (100000, 3) | Roessler, a = b = 0.2, c = 5.7, dt = 0.08, standardised |
| `ecg` | (10000, 5) | human heart signal of PPG-DaLiA, delay-embedded |
| `eeg` | (9640, 64) | motor-imagery EEG of PhysioNet, standardised |
| `fmri` | (360, 20) | task fMRI of one subject (Koppe et al. 2019), standardised |
| `lorenz63_train`, `lorenz63_test` | (100000, 3) | Lorenz-63 of the authors' Python tutorial |

The tutorial's two series are scaled by constants of their own (standard deviations 0.998, 1.012, 1.055 in
training), and the tutorial discards their first 500 rows as transient; the reader keeps all rows. Of the five
columns of `ecg`, 4 and 1 are column 0 read one and two rows later; 2 and 3 are no plain shifts of it.
"""

import difflib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxpapers.data.download import CorruptData, OfficialFile, data_folder, open_data

# Pinned to a commit: a moving branch would turn an update by the authors into a checksum error here.
REPOSITORY = "https://raw.githubusercontent.com/DurstewitzLab/ALRNN-DSR/0bdca245a24ddabff691c7fe2e368afb6d24ccba"


class Series(NamedTuple):
    """A stored series: its official file and the shape (time, dim) that the file must have."""

    file: OfficialFile
    shape: tuple[int, int]


def _series(path: str, size: int, sha256: str, shape: tuple[int, int]) -> Series:
    file = OfficialFile(f"alrnn/{path.rsplit('/')[-1]}", f"{REPOSITORY}/{path}", sha256, size)
    return Series(file, shape)


ALRNN_SERIES = {
    "lorenz63": _series(
        "example_data/lorenz63.npy",
        1_200_128,
        "3854fe18069d24addfbfaf836df77699490d0082d751333af658e834b9132a81",
        (100_000, 3),
    ),
    "rossler": _series(
        "example_data/rossler.npy",
        1_200_080,
        "3d9c0142bfff866df6482aaa5614d73a205f006bab95232d8924aa7f45bb615a",
        (100_000, 3),
    ),
    "ecg": _series(
        "example_data/ECG.npy",
        200_080,
        "5b8796eb52ece6aeb830b59f5b8ee5e04872df079ef8335a4a64286b2105fb91",
        (10_000, 5),
    ),
    "eeg": _series(
        "example_data/EEG.npy",
        2_467_968,
        "7cc56e3b648ce492e1ac3d4284c46ccd1092e4abbc4c45f020b8c4a0b2a994bf",
        (9_640, 64),
    ),
    "fmri": _series(
        "example_data/fmri.npy",
        57_728,
        "eb4132c0f0e3b2d8ca7ce496ec4b28fc7249cd3c87d2c2af4cff5adfaf33592d",
        (360, 20),
    ),
    "lorenz63_train": _series(
        "alrnn_python/lorenz63_train.npy",
        2_400_080,
        "c469dcb4596f7d667c2462f7673fe236c2ef5d52f17b3e6095a77da796743cce",
        (100_000, 3),
    ),
    "lorenz63_test": _series(
        "alrnn_python/lorenz63_test.npy",
        2_400_080,
        "503df86fa9c023bf49cf6b874d4d31ee9fc336684ad085e1a2a768cecf1c72a8",
        (100_000, 3),
    ),
}


def alrnn_series(name: str) -> Float32[np.ndarray, "time dim"]:
    """One benchmark series of the AL-RNN paper, by the names of the table above.

    Three of the files (`fmri` and the two of the tutorial) are float64; all series are returned as
    contiguous float32, the precision in which the models train.

    Args:
        name: key of `ALRNN_SERIES`.

    Returns:
        The series as shipped, nothing rescaled and no row dropped.

    Raises:
        ValueError: the name is unknown.
        DataNotFound: the file is missing and cannot be downloaded.
        CorruptData: the file is not the official one, or holds another shape, another kind of values or
            non-finite ones.
    """
    if name not in ALRNN_SERIES:
        nearest = difflib.get_close_matches(name.lower(), ALRNN_SERIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown series {name!r}, nearest is {nearest!r}; known are {sorted(ALRNN_SERIES)}")
    file, shape = ALRNN_SERIES[name]
    origin = f"; it lies in {data_folder()} and comes from {file.url}"
    with open_data(file) as stream:
        try:
            series = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorruptData(f"{file.name} is no array that NumPy can read ({error}){origin}") from error
    if series.shape != shape:
        raise CorruptData(f"{file.name} has shape {series.shape}, expected {shape}{origin}")
    if not np.issubdtype(series.dtype, np.floating):
        raise CorruptData(f"{file.name} holds {series.dtype}, expected floating-point numbers{origin}")
    if not np.isfinite(series).all():
        raise CorruptData(f"{file.name} has {np.count_nonzero(~np.isfinite(series))} non-finite values{origin}")
    return np.ascontiguousarray(series, dtype=np.float32)
