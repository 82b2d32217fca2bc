"""Texts: the official files where they are at hand, and small ones made here for everything else."""

import hashlib
import io
import lzma
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxpapers.data import text as text_module
from jaxpapers.data.download import CorruptData, DataNotFound, OfficialFile, find
from jaxpapers.data.text import (
    ENCODINGS,
    OWN_SOURCE,
    TEXT_FILES,
    TEXTS,
    Split,
    character_set,
    decode_bytes,
    decode_characters,
    encode_bytes,
    encode_characters,
    load_text,
    read_text,
    sample_text_windows,
    split_text,
    text_windows,
    tokenise,
    vocabulary_size,
)
from jaxpapers.data.windows import host_batches

# With an umlaut, a character of four bytes, and both line ends.
TEXT = "Wär's nicht so?\r\nZwei Wege: 𝄞 und … nichts.\n" * 3


def official(name):
    for file in (file for key, file in TEXT_FILES.items() if key.split(".")[0] == name):
        if find(file) is None:
            pytest.skip(f"{file.name} is not in the data folder")


def test_official_tinyshakespeare():
    official("tinyshakespeare")
    corpus = load_text("tinyshakespeare")
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert corpus.characters == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert corpus.vocab_size == vocabulary_size("tinyshakespeare") == 65
    assert decode_characters(corpus.train[:14], corpus.characters) == "First Citizen:"
    as_bytes = load_text("tinyshakespeare", "bytes")
    assert (as_bytes.vocab_size, as_bytes.characters) == (256, None)
    assert decode_bytes(as_bytes.validation) == decode_characters(corpus.validation, corpus.characters)


def test_official_wikitext():
    official("wiki")
    split = read_text("wikitext2_small")
    # The published counts, with one token for each end of a line.
    assert [len(part.split()) + part.count("\n") for part in split] == [217_646, 245_569]
    assert split.train.startswith(" \n = Homarus gammarus = \n")
    assert [len(part.encode()) for part in split] == [1_121_681, 1_256_449]
    corpus = tokenise(split)
    assert corpus.characters is not None
    assert corpus.vocab_size == vocabulary_size("wikitext2_small") == 137
    assert decode_characters(corpus.validation, corpus.characters) == split.validation


def test_official_movie_reviews():
    official("movie_reviews")
    split = read_text("movie_reviews")
    assert len(split.train) + len(split.validation) == 7_786_004
    assert split.train.startswith("plot : two teen couples go to a church party")  # neg/cv000
    assert len(tokenise(split, "bytes").train) == len(split.train)  # it is ASCII
    assert tokenise(split).vocab_size == vocabulary_size("movie_reviews") == 74


def test_files_have_their_addresses():
    assert len({file.url for file in TEXT_FILES.values()}) == len(TEXT_FILES) == 4
    for file in TEXT_FILES.values():
        assert f"{file.url}".startswith("https://raw.githubusercontent.com/")
        assert file.name.startswith("text/")
        assert all(form.name == f"{file.name}.xz" for form in file.alternates)


# ---- made-up files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    # No address: nothing here may go to the network.
    for key, file in TEXT_FILES.items():
        monkeypatch.setitem(text_module.TEXT_FILES, key, file._replace(url=None))
    return tmp_path


@pytest.fixture
def register(folder, monkeypatch):
    """Puts content into a data folder of its own, in the place of an official file."""

    def register(key, content, suffix=""):
        (folder / f"{key}{suffix}").write_bytes(content)
        file = OfficialFile(f"{key}{suffix}", None, hashlib.sha256(content).hexdigest(), len(content))
        monkeypatch.setitem(text_module.TEXT_FILES, key, file)

    return register


def test_a_text_is_read_as_it_is_and_split_at_nine_tenths(register):
    register("tinyshakespeare", lzma.compress(TEXT.encode()), ".xz")
    split = read_text("tinyshakespeare")
    assert split.train + split.validation == TEXT
    assert len(split.train) == int(0.9 * len(TEXT))
    corpus = load_text("tinyshakespeare")
    assert corpus.characters == "".join(sorted(set(TEXT)))
    assert corpus.vocab_size == len(set(TEXT))
    assert corpus.train.dtype == corpus.validation.dtype == np.int32
    assert decode_characters(corpus.train, corpus.characters) == split.train


def test_wikitext_trains_on_one_file_and_validates_on_the_other(register):
    register("wiki.valid", b"abc\n")
    register("wiki.test", b"xyz\n")
    assert read_text("wikitext2_small") == ("abc\n", "xyz\n")
    assert load_text("wikitext2_small").characters == "\nabcxyz"  # of both


def test_movie_reviews_are_split_by_their_folds(register):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("movie_reviews/README", "no review")
        for label in ("pos", "neg"):
            for number in reversed(range(1000)):
                archive.writestr(f"movie_reviews/{label}/cv{number:03}_{7919 * number % 1009}.txt", f"{label}{number} ")
    register("movie_reviews", buffer.getvalue())
    train, validation = read_text("movie_reviews")
    assert train.split() == [f"{label}{number}" for number in range(900) for label in ("neg", "pos")]
    assert validation.split() == [f"{label}{number}" for number in range(900, 1000) for label in ("neg", "pos")]


@pytest.mark.parametrize(("key", "name"), [("tinyshakespeare", "tinyshakespeare"), ("movie_reviews", "movie_reviews")])
def test_files_that_are_no_text_are_refused(register, key, name):
    register(key, b"\xff\xfe no text")
    with pytest.raises(CorruptData, match=f"{key} is no"):
        read_text(name)


@pytest.mark.parametrize("name", [name for name in TEXTS if name != OWN_SOURCE])
def test_a_missing_text_says_so(folder, name):
    with pytest.raises(DataNotFound, match=r"text/.* is not in"):
        read_text(name)


def test_one_text_needs_no_file(folder):
    split = read_text(OWN_SOURCE)
    assert "def split_text(" in split.train + split.validation
    for encoding in ENCODINGS:
        assert load_text(OWN_SOURCE, encoding).vocab_size == vocabulary_size(OWN_SOURCE, encoding)


@pytest.mark.parametrize("name", TEXTS)
def test_vocabularies_of_all_texts_are_known_without_their_files(folder, name):
    assert 1 < vocabulary_size(name) < vocabulary_size(name, "bytes") == 256


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("shakespeare", "tinyshakespeare"), ("WikiText2", "wikitext2_small"), ("movies", "movie_reviews")],
)
def test_unknown_texts_get_the_nearest(name, nearest):
    for read in (read_text, load_text, vocabulary_size):
        with pytest.raises(ValueError, match=f"unknown text '{name}', nearest is '{nearest}'; known are"):
            read(name)


# ---- tokens


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_both_encodings_are_undone(text):
    characters = character_set(text)
    tokens = encode_characters(text, characters)
    # The oracle looks characters up one by one.
    assert tokens.tolist() == [characters.index(character) for character in text]
    assert decode_characters(tokens, characters) == text
    assert encode_bytes(text).tolist() == list(text.encode())
    assert decode_bytes(encode_bytes(text)) == text


def test_decoding_takes_arrays_of_the_device_and_marks_what_was_cut():
    assert decode_characters(jnp.array([1, 0, 1]), "ab") == "bab"
    assert decode_bytes(encode_bytes("aä")[:2]) == "a\N{REPLACEMENT CHARACTER}"
    assert decode_characters(np.zeros(0, int), "") == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encode_characters("abcz", "abc"), "the text has 'z', which is not among the characters 'abc'"),
        (lambda: encode_characters("aAb", "abc"), "the text has 'A'"),
        (lambda: encode_characters("b", "ac"), "the text has 'b'"),
        (lambda: encode_characters("b", ""), "the text has 'b'"),
        (lambda: encode_characters("b", "ba"), "sorted and different, got 'ba'"),
        (lambda: encode_characters("b", "abb"), "sorted and different, got 'abb'"),
        (lambda: decode_characters(np.array([0, 3]), "abc"), r"token 3 is outside of 0\.\.2"),
        (lambda: decode_characters(np.array([-1]), "abc"), r"token -1 is outside of 0\.\.2"),
        (lambda: decode_bytes(np.array([256])), r"token 256 is outside of 0\.\.255"),
        (lambda: load_text("tinyshakespeare", "words"), "unknown encoding 'words', known are"),
        (lambda: vocabulary_size("tinyshakespeare", "words"), "unknown encoding 'words', known are"),
        (lambda: tokenise(Split("a", "b"), "words"), "unknown encoding 'words', known are"),
        (lambda: split_text("abc", 1.1), "train_part must be between 0 and 1, got 1.1"),
    ],
)
def test_impossible_tokens(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- windows

TOKENS = np.arange(60, dtype=np.int32)  # a token tells where it stood


@pytest.mark.parametrize("stride", [1, 7, 8, 100])
def test_windows_are_views_of_consecutive_tokens(stride):
    windows = text_windows(TOKENS, 8, stride)
    starts = [start for start in range(0, 60, stride) if start + 8 <= 60]
    assert windows.tolist() == [list(range(start, start + 8)) for start in starts]
    assert np.shares_memory(windows, TOKENS)


def test_windows_with_one_token_shared_make_each_token_a_target_once():
    windows = text_windows(TOKENS[:57], 8, stride=7)
    assert windows[:, 1:].ravel().tolist() == list(range(1, 57))


def test_windows_are_a_source_for_host_batches():
    batches = host_batches(text_windows(TOKENS, 8), 10, seed=2)
    epoch = np.concatenate([batches[step] for step in range(5)])
    assert len(set(epoch[:, 0].tolist())) == 50  # of the 53 starts, each once, without the last part of a batch
    np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(8))
    np.testing.assert_array_equal(host_batches(text_windows(TOKENS, 8), 10, seed=2)[1234], batches[1234])


def test_windows_are_drawn_on_the_device_by_key():
    sample = jax.jit(lambda key, tokens: sample_text_windows(key, tokens, 16, 8))
    keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(7), step))(jnp.arange(1_000))
    windows = np.asarray(jax.jit(jax.vmap(sample, in_axes=(0, None)))(keys, TOKENS))
    np.testing.assert_array_equal(windows, windows[..., :1] + np.arange(8))
    counts = np.bincount(windows[..., 0].ravel(), minlength=53)
    assert len(counts) == 53  # the last window that fits, and none beyond
    assert stats.chisquare(counts).pvalue > 1e-3  # a fixed key: it holds or it does not
    np.testing.assert_array_equal(sample(jax.random.fold_in(jax.random.key(7), 5), TOKENS), windows[5])
    assert sample_text_windows(keys[0], TOKENS, 2, 60).shape == (2, 60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: text_windows(TOKENS, 61), "windows of 61 tokens do not fit into a text of 60 tokens"),
        (lambda: text_windows(TOKENS, 0), "window_length must be at least 1, got 0"),
        (lambda: text_windows(TOKENS, 8, 0), "stride must be at least 1, got 0"),
        (lambda: sample_text_windows(jax.random.key(0), TOKENS, 4, 61), "windows of 61 tokens"),
        (lambda: sample_text_windows(jax.random.key(0), TOKENS, 4, 0), "window_length must be at least 1, got 0"),
        (lambda: sample_text_windows(jax.random.key(0), TOKENS, 0, 4), "batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_windows(make, message):
    with pytest.raises(ValueError, match=message):
        make()
