"""Files that are either whole or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name and renames it: no reader ever sees half of it.

    Args:
      path: where the file goes; an older one is replaced.
      content: text (UTF-8), bytes, or a function that writes into the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask (mkstemp makes private files; a result is meant to be read by others)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
