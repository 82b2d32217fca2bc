"""Where PolyCom's language models get their tokens: texts by characters or bytes, and files of token ids.

A part of `polycom`. The text `tokens/<folder>` is a folder below the data folder with token ids as of
`jaxpapers.data.tokens`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpapers.data.download import data_folder
from jaxpapers.data.text import NUM_BYTES, TEXTS, load_text, split_text, tokenise
from jaxpapers.data.tokens import map_tokens

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
