"""Where PolyCom's language models get their tokens: texts by characters or bytes, and files of token ids.

A part of `polycom`. The text `tokens/<folder>` is a folder below the data folder with `train` and `validation`, each
either `.npy` (one axis, any integer type) or `.bin` (nothing but uint16, little-endian): the ids that a tokenizer
made beforehand. Files are mapped into memory, not read, and every batch is checked as it is drawn.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpapers.data.download import CorruptData, DataNotFound, data_folder
from jaxpapers.data.text import NUM_BYTES, TEXTS, load_text, split_text, tokenise

OWN_SOURCE = "own_source"  # a file of this experiment: a text that needs no download, for `smoke`
FILES = "tokens/"  # what the name of a folder with files of token ids begins with
CHARACTERS = {"tinyshakespeare": 65, "wikitext2_small": 137, "movie_reviews": 74}  # different ones


class Tokens(NamedTuple):
    """A text in two, as token ids.

    Attributes:
      train: of the training text (time,), perhaps mapped from a file.
      validation: of the validation text.
      vocab_size: the ids are below it; -1 where it is not known.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int


def is_text(name: str) -> bool:
    """Whether `load_tokens` knows such a text."""
    return name in (*TEXTS, OWN_SOURCE) or (name.startswith(FILES) and len(name) > len(FILES))


def text_of(stage: str, config: ConfigDict) -> str:
    """The text that a stage reads."""
    return config.stages[stage].text or config.lm.text


def vocabulary(name: str, encoding: str, vocab_size: int) -> int:
    """Tokens of a text, without a look at its files; arguments as of `load_tokens`."""
    if name.startswith(FILES):
        return vocab_size
    if name == OWN_SOURCE:
        return load_tokens(name, encoding, vocab_size).vocab_size
    return NUM_BYTES if encoding == "bytes" else CHARACTERS[name]


def load_tokens(name: str, encoding: str, vocab_size: int) -> Tokens:
    """A text by its name.

    Args:
      name: one of TEXTS, OWN_SOURCE, or a folder of token ids.
      encoding: of texts; files of ids have none.
      vocab_size: of files of ids; -1: not known.

    Raises:
      DataNotFound: a file is missing and cannot be downloaded.
      CorruptData: a file that holds no token ids.
    """
    if name.startswith(FILES):
        return Tokens(*(map_tokens(data_folder() / name, part) for part in ("train", "validation")), vocab_size)
    if name == OWN_SOURCE:
        corpus = tokenise(split_text(Path(__file__).read_text(encoding="utf8")), encoding)
    else:
        corpus = load_text(name, encoding)
    return Tokens(corpus.train, corpus.validation, corpus.vocab_size)


def map_tokens(folder: Path, part: str) -> np.ndarray:
    """The token ids of a file, mapped into memory.

    Raises:
      DataNotFound: there is no such file.
      CorruptData: it is cut off, or holds something else.
    """
    array, binary = folder / f"{part}.npy", folder / f"{part}.bin"
    if array.is_file():
        try:
            tokens = np.load(array, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise CorruptData(f"{array} cannot be read: {error}") from error
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise CorruptData(f"{array} must be token ids of one axis, it has {tokens.dtype} of shape {tokens.shape}")
        return tokens
    if binary.is_file():
        size = binary.stat().st_size
        if size == 0 or size % 2:
            raise CorruptData(f"{binary} has {size} bytes, which are no uint16 token ids")
        return np.memmap(binary, "<u2", mode="r")
    raise DataNotFound(
        f"{folder} has no {part}.npy and no {part}.bin. No reader here downloads it: tokenize a text and write its "
        "ids, as an array of integers (.npy) or as bare uint16 (.bin)"
    )


@dataclass(frozen=True)
class WindowBatches:
    """Windows of consecutive tokens drawn uniformly, on the host: `batches[step]` depends on seed and step alone.

    Attributes:
      tokens: of one text, perhaps mapped from a file.
      batch_size: windows of a batch, of all processes together.
      length: tokens of a window.
      vocab_size: ids are below it.
      seed: of the draws.
      part: (index, number of parts): the rows of each batch that this process reads.
    """

    tokens: np.ndarray
    batch_size: int
    length: int
    vocab_size: int
    seed: int
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.length > len(self.tokens):
            raise ValueError(f"windows of {self.length} tokens do not fit into a text of {len(self.tokens)} tokens")

    def __getitem__(self, step: int) -> np.ndarray:
        """The batch of a step, int32 (rows, length).

        Raises:
          CorruptData: an id that the vocabulary does not have.
        """
        index, parts = self.part
        rows = self.batch_size // parts
        places = len(self.tokens) - self.length + 1
        starts = np.random.default_rng((self.seed, step)).integers(places, size=self.batch_size)
        windows = [self.tokens[start : start + self.length] for start in starts[index * rows : (index + 1) * rows]]
        return known_tokens(np.stack(windows), self.vocab_size)


def known_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as int32.

    Raises:
      CorruptData: an id that the vocabulary does not have: the embedding would make it NaN.
    """
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise CorruptData(f"token ids from {low} to {high} do not fit a vocabulary of {vocab_size}")
    return np.ascontiguousarray(tokens, np.int32)
