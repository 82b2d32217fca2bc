"""Files of token ids: what is refused, and that windows are a function of the step."""

import numpy as np
import pytest

from jaxpapers.data.download import CorruptData, DataNotFound
from jaxpapers.data.tokens import TokenWindows, known_tokens, map_tokens


def test_windows_depend_on_the_step_alone_and_processes_share_them(tmp_path):
    (np.arange(3_000) % 11).astype("<u2").tofile(tmp_path / "train.bin")
    ids = map_tokens(tmp_path, "train")
    assert isinstance(ids, np.memmap)
    whole = TokenWindows(ids, 6, 5, 11, seed=3)
    parts = [TokenWindows(ids, 6, 5, 11, 3, (index, 2))[7] for index in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[7])
    assert (whole[8] != whole[7]).any()
    assert (np.diff(whole[7], axis=1) % 11 == 1).all()  # consecutive tokens
    with pytest.raises(CorruptData, match="token ids from 0 to 10 do not fit a vocabulary of 10"):
        TokenWindows(ids, 600, 5, 10, 3)[0]
    with pytest.raises(ValueError, match="windows of 3001 tokens do not fit into a text of 3000"):
        TokenWindows(ids, 6, 3_001, 11, 3)


def test_every_place_of_a_text_is_drawn_as_often():
    starts = TokenWindows(np.arange(12), 60_000, 3, 12, seed=0)[0][:, 0]
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10  # places 0 to 9
    np.testing.assert_allclose(counts, 6_000, atol=5 * np.sqrt(6_000))


def test_both_forms_hold_the_same_ids(tmp_path):
    ids = np.random.default_rng(0).integers(50_000, size=100)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "validation.npy", ids)
    np.testing.assert_array_equal(map_tokens(tmp_path, "train"), map_tokens(tmp_path, "validation"))


def test_ids_outside_the_vocabulary_are_refused():
    assert known_tokens(np.array([[0, 9]], np.uint16), 10).dtype == np.int32
    for strange in (-1, 10):
        with pytest.raises(CorruptData, match="do not fit a vocabulary of 10"):
            known_tokens(np.array([3, strange]), 10)


def test_files_that_hold_no_token_ids_are_refused(tmp_path):
    with pytest.raises(DataNotFound, match=r"has no train\.npy and no train\.bin\. No reader here downloads it"):
        map_tokens(tmp_path, "train")
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(CorruptData, match="has 3 bytes, which are no uint16 token ids"):
        map_tokens(tmp_path, "train")
    for array in (np.zeros((2, 3), np.int32), np.zeros(3)):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(CorruptData, match="must be token ids of one axis"):
            map_tokens(tmp_path, "train")
    np.save(tmp_path / "train.npy", np.zeros(100, np.int32))
    (tmp_path / "train.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:-4])
    with pytest.raises(CorruptData, match=r"train\.npy cannot be read"):
        map_tokens(tmp_path, "train")
