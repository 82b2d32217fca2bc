"""Programs for the TPU compiler, each in a process of its own: libtpu reads the environment once, and keeps threads."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e '.[plan]'"
)


def run_program(program: str, folder: Path, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """Runs a Python program that imports from the repository and from a folder of tests; it must end with 0."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, Path(__file__).parents[1])))},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
