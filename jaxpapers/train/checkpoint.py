"""Checkpoints: orbax, kept small: the newest ones, each holding everything that an exact resume needs."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


class CheckpointMismatch(ValueError):
    """The checkpoint on disk does not have the tree, shapes or dtypes of the state that asks for it."""


class Checkpoints:
    """The checkpoints of one stage of a run.

    Orbax writes each under a temporary name and renames it, so a killed save leaves none behind.

    Args:
      directory: where they lie, one folder a step.
      keep: how many of the newest are kept.
    """

    def __init__(self, directory: Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every save at INFO
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step: int, tree: PyTree) -> None:
        """Saves the tree as of `step`; a checkpoint of that step that exists already is kept as it is."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(tree))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """The newest checkpoint as `(step, tree)`, None where there is none.

        Args:
          like: a tree of arrays (or shape/dtype structs) of the same structure.

        Raises:
          CheckpointMismatch: what lies on disk has another structure, shape or dtype.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatch(f"checkpoint {step} in {self._manager.directory} does not fit: {error}") from error
        return step, tree

    def close(self) -> None:
        """Releases orbax's threads; `contextlib.closing` does it."""
        self._manager.close()
