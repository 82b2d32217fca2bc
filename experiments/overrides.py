"""`--config.a.b=3`: any field of a config from the command line, with the type that the preset gives it."""

import ast
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.catalogue import UsageError, nearest

KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word", tuple: "a list"}


def override(config: ConfigDict, assignments: Sequence[str]) -> None:
    """Sets fields of a config in place.

    Args:
      config: what the preset returned.
      assignments: `a.b=3` each; lists are written `1,2,3`.

    Raises:
      UsageError: an unknown field (the nearest is suggested), or a value of another type.
    """
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        *parents, name = path.split(".")
        group = config
        for depth, parent in enumerate(parents):
            group = _field(group, parent, parents[:depth])
            if not isinstance(group, ConfigDict):
                raise UsageError(f"config.{'.'.join(parents[: depth + 1])} is a value, it has no fields")
        old = _field(group, name, parents)
        if isinstance(old, ConfigDict):
            raise UsageError(f"config.{path} is a group; set one of its fields: {', '.join(sorted(old))}")
        try:
            group[name] = _parse(text, old)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two: deeply nested text
            kind = KINDS.get(type(old), "a Python literal")
            raise UsageError(f"config.{path} takes {kind} such as {old!r}, not {_shown(text)}") from None


def _field(group: ConfigDict, name: str, parents: Sequence[str]) -> Any:
    if name not in group:
        raise UsageError(f"unknown field {'.'.join(['config', *parents, name])}{nearest(name, group)}")
    return group[name]


def _shown(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


def _parse(text: str, old: Any) -> Any:
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(old, int | float | str):
        value = type(old)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)  # no field means it, and config.json could not hold it
        return value
    if isinstance(old, tuple):
        words = [word.strip() for word in text.strip("()[]").split(",")]
        return tuple(_parse(word, old[0]) if old else word for word in words if word)
    return ast.literal_eval(text)
