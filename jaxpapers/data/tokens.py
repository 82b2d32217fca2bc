"""Files of token ids, which a tokenizer made beforehand, and windows of them.

A text is a folder with `train` and `validation`, each either `.npy` (one axis, any integer type) or `.bin` (nothing but
uint16, little-endian). Files are mapped into memory, not read: a corpus may be larger than the memory of a host. Ids
are checked as windows of them are drawn, since looking at all of them would read the whole file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from jaxpapers.data.download import CorruptData, DataNotFound
from jaxpapers.data.text import check_window


def map_tokens(folder: Path, part: str) -> Integer[np.ndarray, "time"]:
    """The token ids of a file, mapped into memory.

    Args:
        folder: of the text.
        part: name of the file without its ending, such as "train".

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


def known_tokens(tokens: Integer[np.ndarray, "*shape"], vocab_size: int) -> Int32[np.ndarray, "*shape"]:
    """The ids as int32.

    Raises:
        CorruptData: an id that the vocabulary does not have: an embedding would make it NaN.
    """
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= vocab_size:
        raise CorruptData(f"token ids from {low} to {high} do not fit a vocabulary of {vocab_size}")
    return np.ascontiguousarray(tokens, np.int32)


@dataclass(frozen=True)
class TokenWindows:
    """Windows of consecutive tokens drawn uniformly, on the host: `windows[step]` depends on seed and step alone.

    Attributes:
        tokens: of one text, perhaps mapped from a file.
        batch_size: windows of a batch, of all processes together.
        length: tokens of a window (T + 1 for T targets).
        vocab_size: ids are below it.
        seed: of the draws.
        part: (index, number of parts): the rows of each batch that this process reads.

    Raises:
        ValueError: length below 1, or windows longer than the text.
    """

    tokens: Integer[np.ndarray, "time"]
    batch_size: int
    length: int
    vocab_size: int
    seed: int
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_window(len(self.tokens), self.length)

    def __getitem__(self, step: int) -> Int32[np.ndarray, "rows length"]:
        """The batch of a step.

        Raises:
            CorruptData: an id that the vocabulary does not have.
        """
        index, parts = self.part
        rows = self.batch_size // parts
        places = len(self.tokens) - self.length + 1
        starts = np.random.default_rng((self.seed, step)).integers(places, size=self.batch_size)
        windows = [self.tokens[start : start + self.length] for start in starts[index * rows : (index + 1) * rows]]
        return known_tokens(np.stack(windows), self.vocab_size)
