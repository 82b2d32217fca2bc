"""The house's own rules: every module imports, every public function is documented, imports point one way."""

import collections.abc
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

import jaxpapers
from experiments.catalogue import ROOMS

REPOSITORY = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for package in ("jaxpapers", "experiments", "benchmarks")
    for module in pkgutil.walk_packages([str(REPOSITORY / package)], f"{package}.")
    if not module.name.endswith("__main__")
)
ROOMS_WITH_A_MAP = ("jaxpapers.data", "jaxpapers.nn", "jaxpapers.ops")
ROOMS_WITHOUT_SHAPES = (
    "jaxpapers.train",
    "jaxpapers.data.download",
)  # files, trees and loops: no arrays of one shape


def public(module):
    """The public functions and classes that a module defines itself."""
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        if ours and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def functions(module):
    """The public functions and methods that a module defines itself, generated ones (`replace`) left out."""
    for name, value in public(module):
        members = {name: value} if inspect.isfunction(value) else vars(value)
        for member_name, function in members.items():
            written = inspect.isfunction(function) and function.__code__.co_filename == module.__file__
            if written and not member_name.startswith("_") and member_name != "setup":
                yield f"{name}.{member_name}", function


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is_for(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    if name.startswith("benchmarks"):
        return  # scripts: their functions are steps of a story that the module's docstring tells
    documented = [*public(module), *functions(module)]
    undocumented = [what for what, value in documented if not (value.__doc__ or "").strip()]
    assert not undocumented


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("jaxpapers.")])
def test_arrays_have_their_shapes_in_the_signature(name):
    if name.startswith(ROOMS_WITHOUT_SHAPES):
        pytest.skip("this room handles files and trees, not arrays of one shape")
    unsaid = []
    for what, function in functions(importlib.import_module(name)):
        annotations = inspect.get_annotations(function)
        arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
        for argument in [*arguments, "return"]:
            if "key" not in argument and says_no_shape(annotations.get(argument, Any)):
                unsaid.append(f"{name}.{what}({argument})")
    assert not unsaid, f"arrays or anything, their shapes unsaid: {unsaid}"


def says_no_shape(annotation):
    """Whether it admits a bare array, or anything at all, itself or inside a union or container."""
    # The parts of a function's type and of a tree are what the docstring says; a jaxtyping array has no parts.
    if typing.get_origin(annotation) is collections.abc.Callable or annotation is jaxtyping.PyTree:
        return False
    return annotation in (jax.Array, np.ndarray, jaxtyping.Array, Any) or any(
        says_no_shape(part) for part in typing.get_args(annotation)
    )


@pytest.mark.parametrize("room", ROOMS_WITH_A_MAP)
def test_a_rooms_map_names_its_modules_and_no_others(room):
    entries = re.findall(r"^- (`\w+`(?:, `\w+`)*):", importlib.import_module(room).__doc__, re.MULTILINE)
    named = [f"{room}.{name}" for entry in entries for name in re.findall(r"\w+", entry)]
    assert sorted(named) == [name for name in MODULES if re.fullmatch(rf"{room}\.[a-z]\w*", name)]


def test_imports_point_one_way():
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([script, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_stands_in_the_contracts():
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf8"))["tool"]["importlinter"]
    layers, papers, substrate, independence = contracts["contracts"]
    rooms = {f"jaxpapers.{room}" for room in ROOMS if (REPOSITORY / "jaxpapers" / room).exists()}
    assert rooms <= {room for layer in layers["layers"] for room in layer.split(" | ")}
    assert rooms <= set(papers["source_modules"])
    assert rooms <= set(substrate["forbidden_modules"])
    assert {f"{room}.*" for room in rooms} <= set(independence["modules"])
    others = {"nn", "ops", "data", "train"}
    folders = {path.name for path in (REPOSITORY / "jaxpapers").iterdir() if (path / "__init__.py").exists()}
    assert folders - others <= set(ROOMS)


def test_dense_layers_are_the_librarys():
    library = REPOSITORY / "jaxpapers"
    own = library / "nn" / "dense.py"
    for path in sorted(library.rglob("*.py")):
        assert path == own or not re.search(r"\bnn\.Dense(General)?\(", path.read_text()), path


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert jaxpapers.__version__ == version("jaxpapers")
