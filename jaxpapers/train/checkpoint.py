"""Checkpoints: orbax, kept small: the newest ones, each holding everything that an exact resume needs.

Orbax writes a checkpoint under a temporary name and renames it. After that a manifest (size and CRC-32 of every file)
is written beside it: a checkpoint that does not match its manifest was cut off, truncated or damaged, and the one
before is taken instead.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxpapers.train.files import write_whole
from jaxpapers.train.mesh import on_first, path_name

LOGGER = logging.getLogger(__name__)
WHOLE = "those before it are whole"


class CheckpointMismatch(ValueError):
    """The checkpoint on disk does not have the tree, shapes or dtypes of the state that asks for it."""


class Checkpoints:
    """The checkpoints of one stage of a run.

    What is damaged is set aside (`damaged-<step>`), with a warning, when the folder is opened. With several
    processes the folder is shared, and each of them opens it and calls the same methods in the same order.

    Args:
      directory: where they lie, one folder a step.
      keep: how many of the newest are kept.

    Raises:
      ValueError: fewer than 2 are to be kept: a damaged one needs one before it.
    """

    def __init__(self, directory: Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2, so that a damaged checkpoint has one before it")
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every save at INFO
        self._directory = Path(directory).absolute()
        self.keep = keep
        on_first(self._set_damaged_aside)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        handler = ocp.StandardCheckpointHandler()  # given, so that metadata can be read before anything is restored
        self._manager = ocp.CheckpointManager(self._directory, item_handlers=handler, options=options)

    def save(self, step: int, tree: PyTree) -> None:
        """Saves the tree as of `step`; a checkpoint of that step that exists already is kept as it is.

        Raises:
          OSError: it cannot be written (no room, a limit); the checkpoints before it are as they were.
        """
        if step in self._manager.all_steps():
            return
        on_first(lambda: self._require_free(nbytes(tree), f"checkpoint {step}", WHOLE))
        log = logging.getLogger("absl")
        log.setLevel(logging.CRITICAL)  # orbax logs with its traceback, from several threads, what it also raises
        try:
            self._manager.save(step, args=ocp.args.StandardSave(tree))
        except ValueError as error:
            if not (found := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            code = int(found[1])
            reason = f"checkpoint {step} cannot be written into {self._directory}: {os.strerror(code)}; {WHOLE}"
            raise OSError(code, reason) from error
        finally:
            log.setLevel(logging.WARNING)
        on_first(lambda: self._vouch_for(step))

    def require_room(self, size: int) -> None:
        """Refuses to start what cannot be kept: `keep` checkpoints of so many bytes, and one more while it is written.

        Raises:
          OSError: the disk has less room than that, beside the checkpoints that lie there already.
        """
        present = sum(path.stat().st_size for path in self._directory.rglob("*") if path.is_file())
        self._require_free(
            max(0, (self.keep + 1) * size - present), "the checkpoints of this run", "nothing was started"
        )

    def _require_free(self, needed: int, what: str, so: str) -> None:
        if (free := shutil.disk_usage(self._directory).free) < needed:
            sizes = f"needed {needed / 2**20:.1f} MiB, free {free / 2**20:.1f} MiB"
            raise OSError(errno.ENOSPC, f"no room for {what} in {self._directory}: {sizes}; {so}")

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """The newest checkpoint as `(step, tree)`, None where there is none.

        Args:
          like: a tree of arrays (or shape/dtype structs) of the same structure. Where its leaves have shardings, the
            restored arrays are laid out so, whatever mesh they were saved from.

        Raises:
          CheckpointMismatch: what lies on disk has another structure, shape or dtype.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            _require_same_arrays(abstract, self._manager.item_metadata(step))
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatch(f"checkpoint {step} in {self._directory} does not fit: {error}") from error
        return step, tree

    def close(self) -> None:
        """Releases orbax's threads; `contextlib.closing` does it."""
        self._manager.close()

    def _vouch_for(self, step: int) -> None:
        """Writes the manifest of a checkpoint, and drops those of checkpoints that are gone."""
        write_whole(self._manifest(step), json.dumps(_sums(self._directory / str(step))))
        for path in self._directory.glob("*.manifest"):
            if not (self._directory / path.stem).exists():
                path.unlink()

    def _manifest(self, step: int) -> Path:
        return self._directory / f"{step}.manifest"

    def _set_damaged_aside(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        sound, damaged = [], []
        for folder in sorted(
            (path for path in self._directory.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
        ):
            manifest = self._manifest(int(folder.name))
            if not manifest.exists():
                reason = "its save was cut off"
            elif not _agree(manifest, folder):
                reason = "its files are not those that were saved"
            else:
                sound.append(folder.name)
                continue
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            manifest.unlink(missing_ok=True)
            damaged.append(folder.name)
            LOGGER.warning("checkpoint %s is damaged (%s); it is set aside as %s", folder.name, reason, aside)
        if damaged:
            where = f"from checkpoint {sound[-1]}" if sound else "from the beginning: no checkpoint is left"
            LOGGER.warning("training goes on %s", where)


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, those on other processes included."""
    number = np.dtype(float)  # a leaf that is a Python number
    return sum(math.prod(np.shape(leaf)) * getattr(leaf, "dtype", number).itemsize for leaf in jax.tree.leaves(tree))


def _require_same_arrays(expected: PyTree, stored: PyTree) -> None:
    """Names what differs. Orbax names no array whose shape differs, and casts what has another dtype unasked."""
    arrays = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(stored)}
    for path, leaf in jax.tree.leaves_with_path(expected):
        found = arrays.get(path_name(path), leaf)
        if isinstance(leaf.dtype, np.dtype) and (tuple(found.shape), found.dtype) != (leaf.shape, leaf.dtype):
            wanted = f"{leaf.dtype}{list(leaf.shape)}"
            raise ValueError(f"{path_name(path)} is {found.dtype}{list(found.shape)} there, and {wanted} here")


def _agree(manifest: Path, folder: Path) -> bool:
    try:
        return json.loads(manifest.read_bytes()) == _sums(folder)
    except ValueError:  # the manifest itself is damaged
        return False


def _sums(folder: Path) -> dict[str, list[int]]:
    """File -> [size, CRC-32], of all files below the folder."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(2**22):
                crc = zlib.crc32(block, crc)
        sums[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return sums
