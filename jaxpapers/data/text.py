"""Text corpora: the official files, their splits, and tokens that are characters or bytes.

| name | official files | training text | validation text |
| --- | --- | --- | --- |
| `tinyshakespeare` | Karpathy's char-rnn | first 90 % of the characters | the rest |
| `wikitext2_small` | WikiText-2 (Merity et al. 2016), v1, with `<unk>` | its validation file | its test file |
| `movie_reviews` | polarity dataset v2.0 (Pang and Lee 2004), as NLTK packs it | folds 0 to 8 | fold 9 |
| `own_source` | this file, which no program has to download | first 90 % of the characters | the rest |

`wikitext2_small` has no part of WikiText-2's training file (10.8 MB): a result on it is no WikiText-2 result, and
should say so. The folds of `movie_reviews` are the official ones, by the file names; its text here is the running text
of the reviews, positive and negative in turns, without their labels.

    corpus = load_text("tinyshakespeare")                           # 65 characters
    windows = text_windows(corpus.train, length + 1)                # on the host: a source for `windows.host_batches`
    batch = sample_text_windows(key, corpus.train, batch_size, length + 1)  # on the device
    inputs, targets = batch[:, :-1], batch[:, 1:]
"""

import difflib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from jaxpapers.data.download import CorruptData, OfficialFile, StoredForm, data_folder, open_data
from jaxpapers.data.windows import sample_windows

# Pinned to commits, so that an update there is no checksum error here.
GITHUB = "https://raw.githubusercontent.com"
CHAR_RNN = f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
WIKITEXT = f"{GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/wikitext-2"
NLTK = f"{GITHUB}/nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28"

TEXT_FILES = {
    "tinyshakespeare": OfficialFile(
        name="text/tinyshakespeare.txt",
        url=f"{CHAR_RNN}/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
        alternates=(
            StoredForm(
                "text/tinyshakespeare.txt.xz",
                "21b40ccf4999c004256d116655824719001352dbc22636354d9cd0c645d03a4a",
                364_404,
            ),
        ),
    ),
    "wiki.valid": OfficialFile(
        name="text/wiki.valid.tokens",
        url=f"{WIKITEXT}/valid.txt",
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        size=1_121_681,
        alternates=(
            StoredForm(
                "text/wiki.valid.tokens.xz",
                "1322771e23310248961e17b3c55df138cd3e5c57f2e36ac1d131e9c6158ccd74",
                305_992,
            ),
        ),
    ),
    "wiki.test": OfficialFile(
        name="text/wiki.test.tokens",
        url=f"{WIKITEXT}/test.txt",
        sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        size=1_256_449,
        alternates=(
            StoredForm(
                "text/wiki.test.tokens.xz",
                "306c08b989e77ca6d5587c58d90bf8f8fa3be85671b0eda75315de9f68584fbe",
                336_552,
            ),
        ),
    ),
    "movie_reviews": OfficialFile(
        name="text/movie_reviews.zip",
        url=f"{NLTK}/packages/corpora/movie_reviews.zip",
        sha256="a41211ae685019137410268134db6a1a14428c89b671eb83056151a878539008",
        size=4_004_848,
    ),
}

OWN_SOURCE = "own_source"  # a text that is always at hand, for programs that only have to run
CHARACTERS = {"tinyshakespeare": 65, "wikitext2_small": 137, "movie_reviews": 74}  # different ones, of both parts
TEXTS = (*CHARACTERS, OWN_SOURCE)
ENCODINGS = ("characters", "bytes")
NUM_BYTES = 256
TRAIN_PART = 0.9
FOLD_SIZE = 100  # reviews of each class: cv000 to cv099 are fold 0


class Split(NamedTuple):
    """A text in two."""

    train: str
    validation: str


class Corpus(NamedTuple):
    """A text in two, as tokens.

    Attributes:
        train: tokens of the training text.
        validation: tokens of the validation text.
        characters: the character of each token, in their order; None where tokens are bytes.
        vocab_size: number of different tokens: of the characters, or 256.
    """

    train: Int32[np.ndarray, "train_time"]
    validation: Int32[np.ndarray, "validation_time"]
    characters: str | None
    vocab_size: int


def load_text(name: str, encoding: str = "characters") -> Corpus:
    """A corpus by the names of the table above, as tokens.

    Args:
        name: one of `TEXTS`.
        encoding: "characters": those of both parts, in the order of their code points (65 in Tiny Shakespeare);
            "bytes": of UTF-8.

    Raises:
        ValueError: the name or the encoding is unknown.
        DataNotFound: a file is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    _check_encoding(encoding)
    return tokenise(read_text(name), encoding)


def vocabulary_size(name: str, encoding: str = "characters") -> int:
    """Number of different tokens of a corpus, as `load_text` has them, without a look at its files.

    Args:
        name: one of `TEXTS`.
        encoding: as of `load_text`.

    Raises:
        ValueError: the name or the encoding is unknown.
    """
    _check_encoding(encoding)
    _check_name(name)
    if encoding == "bytes":
        return NUM_BYTES
    return load_text(name).vocab_size if name == OWN_SOURCE else CHARACTERS[name]


def read_text(name: str) -> Split:
    """Training and validation text of a corpus, as shipped: no line end, no case, no token is changed.

    Raises:
        ValueError: the name is unknown.
        DataNotFound: a file is missing and cannot be downloaded.
        CorruptData: a file is not the official one.
    """
    _check_name(name)
    if name == OWN_SOURCE:
        return split_text(Path(__file__).read_text(encoding="utf8"))
    if name == "tinyshakespeare":
        return split_text(_decoded(TEXT_FILES["tinyshakespeare"]))
    if name == "wikitext2_small":
        return Split(_decoded(TEXT_FILES["wiki.valid"]), _decoded(TEXT_FILES["wiki.test"]))
    reviews = _reviews(TEXT_FILES["movie_reviews"])
    first_of_last_fold = len(reviews) - 2 * FOLD_SIZE
    return Split("".join(reviews[:first_of_last_fold]), "".join(reviews[first_of_last_fold:]))


def split_text(text: str, train_part: float = TRAIN_PART) -> Split:
    """The first floor(train_part * length) characters, and the rest.

    Raises:
        ValueError: train_part not between 0 and 1.
    """
    if not 0 <= train_part <= 1:
        raise ValueError(f"train_part must be between 0 and 1, got {train_part}")
    cut = int(train_part * len(text))
    return Split(text[:cut], text[cut:])


def tokenise(split: Split, encoding: str = "characters") -> Corpus:
    """Both parts of a text as tokens; the characters are those of both together.

    Raises:
        ValueError: the encoding is unknown.
    """
    _check_encoding(encoding)
    if encoding == "bytes":
        return Corpus(encode_bytes(split.train), encode_bytes(split.validation), None, NUM_BYTES)
    characters = character_set(split.train + split.validation)
    train, validation = (encode_characters(text, characters) for text in split)
    return Corpus(train, validation, characters, len(characters))


def character_set(text: str) -> str:
    """The different characters of a text in the order of their code points: the vocabulary."""
    return "".join(sorted(set(text)))


def encode_characters(text: str, characters: str) -> Int32[np.ndarray, "time"]:
    """Each character's place in `characters`.

    Args:
        text: anything.
        characters: sorted and different, as `character_set` gives them.

    Raises:
        ValueError: the text has a character that `characters` lacks, or they are not sorted and different.
    """
    if characters != character_set(characters):
        raise ValueError(f"characters must be sorted and different, got {characters!r}")
    points, known = _code_points(text), _code_points(characters)
    tokens = np.searchsorted(known, points)
    # A point beyond the last one gets the place after the end; one before it is no match where it lands.
    found = np.append(known, -1)[tokens] == points
    if not found.all():
        raise ValueError(f"the text has {text[np.argmin(found)]!r}, which is not among the characters {characters!r}")
    return tokens.astype(np.int32)


def decode_characters(tokens: Int[np.ndarray | Array, "time"], characters: str) -> str:
    """The text of tokens: the inverse of `encode_characters`.

    Raises:
        ValueError: a token outside of `characters`.
    """
    tokens = _known_tokens(tokens, len(characters))
    return "".join(characters[token] for token in tokens.tolist())


def encode_bytes(text: str) -> Int32[np.ndarray, "time"]:
    """The bytes of a text in UTF-8."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode_bytes(tokens: Int[np.ndarray | Array, "time"]) -> str:
    """The text of bytes in UTF-8; what is no UTF-8, such as a character cut in two, becomes U+FFFD.

    Raises:
        ValueError: a token outside of 0..255.
    """
    return bytes(_known_tokens(tokens, NUM_BYTES).tolist()).decode(errors="replace")


def text_windows(
    tokens: Int[np.ndarray, "time"], window_length: int, stride: int = 1
) -> Int[np.ndarray, "windows window"]:
    """All windows of consecutive tokens that start at multiples of `stride`: a view, no token is copied.

    An array of examples for `windows.host_batches`, which shuffles them in epochs. A model that predicts the next
    token takes T + 1 tokens for T targets; then stride T makes every token but the first a target once, as an
    evaluation wants it (a last part shorter than a window is left out).

    Args:
        tokens: of one text.
        window_length: tokens of a window.
        stride: between the first tokens of neighbouring windows.

    Raises:
        ValueError: window_length or stride below 1, or windows longer than the text.
    """
    check_window(len(tokens), window_length)
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    return np.lib.stride_tricks.sliding_window_view(tokens, window_length)[::stride]


def sample_text_windows(
    key: PRNGKeyArray, tokens: Int[Array | np.ndarray, "time"], batch_size: int, window_length: int
) -> Int[Array, "batch window"]:
    """Windows whose first tokens are drawn uniformly, with replacement, from all that fit: on the device.

    With fold_in(key, step) for the key, batches are a pure function of the step (see `windows`). Composes under `jit`
    and `vmap`; make the tokens an argument of the jitted function, not a constant of it.

    Args:
        key: draws the first tokens.
        tokens: of one text.
        batch_size: number of windows.
        window_length: tokens of a window (T + 1 for T targets).

    Raises:
        ValueError: batch_size or window_length below 1, or windows longer than the text.
    """
    check_window(tokens.shape[0], window_length)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return sample_windows(key, tokens, batch_size, window_length)


def check_window(length: int, window_length: int) -> None:
    """Refuses windows that a text does not hold.

    Raises:
        ValueError: window_length below 1, or windows longer than the text.
    """
    if window_length < 1:
        raise ValueError(f"window_length must be at least 1, got {window_length}")
    if window_length > length:
        raise ValueError(f"windows of {window_length} tokens do not fit into a text of {length} tokens")


def _check_name(name: str) -> None:
    if name not in TEXTS:
        nearest = difflib.get_close_matches(name.lower(), TEXTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown text {name!r}, nearest is {nearest!r}; known are {TEXTS}")


def _check_encoding(encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}, known are {ENCODINGS}")


def _known_tokens(tokens: Int[np.ndarray | Array, "time"], vocab_size: int) -> Int[np.ndarray, "time"]:
    tokens = np.asarray(tokens)
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if strange.size:
        raise ValueError(f"token {strange[0]} is outside of 0..{vocab_size - 1}")
    return tokens


def _code_points(text: str) -> Int32[np.ndarray, "time"]:
    return np.frombuffer(text.encode("utf-32-le"), np.int32)


def _decoded(file: OfficialFile) -> str:
    with open_data(file) as stream:
        try:
            return stream.read().decode()
        except UnicodeDecodeError as error:
            raise _corrupt(file, f"is not UTF-8 ({error})") from error


def _reviews(file: OfficialFile) -> list[str]:
    """All reviews in the order of their numbers cv000..cv999, the negative one of a number first."""
    with open_data(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                names = [name for name in archive.namelist() if name.endswith(".txt")]
                # movie_reviews/neg/cv000_29416.txt
                names.sort(key=lambda name: (name.rsplit("/")[-1][:5], name))
                return [archive.read(name).decode() for name in names]
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise _corrupt(file, f"is no archive of UTF-8 texts ({error})") from error


def _corrupt(file: OfficialFile, what: str) -> CorruptData:
    return CorruptData(f"{file.name} {what}; it lies in {data_folder()} and comes from {file.url}")
