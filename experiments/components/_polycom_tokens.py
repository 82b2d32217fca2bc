"""Where PolyCom's language models get their tokens: texts by characters or bytes, and files of token ids.

A part of `polycom`. The text `tokens/<folder>` is a folder below the data folder with token ids as of
`jaxpapers.data.tokens`.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpapers.data.download import data_folder
from jaxpapers.data.text import TEXTS, load_text, vocabulary_size
from jaxpapers.data.tokens import map_tokens

FILES = "tokens/"  # what the name of a folder with files of token ids begins with


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
    return name in TEXTS or (name.startswith(FILES) and len(name) > len(FILES))


def text_of(stage: str, config: ConfigDict) -> str:
    """The text that a stage reads."""
    return config.stages[stage].text or config.lm.text


def vocabulary(name: str, encoding: str, vocab_size: int) -> int:
    """Tokens of a text, without a look at its files; arguments as of `load_tokens`."""
    return vocab_size if name.startswith(FILES) else vocabulary_size(name, encoding)


def load_tokens(name: str, encoding: str, vocab_size: int) -> Tokens:
    """A text by its name.

    Args:
      name: one of TEXTS, or a folder of token ids.
      encoding: of texts; files of ids have none.
      vocab_size: of files of ids; -1: not known.

    Raises:
      DataNotFound: a file is missing and cannot be downloaded.
      CorruptData: a file that holds no token ids.
    """
    if name.startswith(FILES):
        return Tokens(*(map_tokens(data_folder() / name, part) for part in ("train", "validation")), vocab_size)
    corpus = load_text(name, encoding)
    return Tokens(corpus.train, corpus.validation, corpus.vocab_size)
