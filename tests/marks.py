"""Marks that several tests give their parameters."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """The cases as parameters, slow but for those of every run; a tuple is several arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in always else pytest.mark.slow)
        for case in cases
    ]
