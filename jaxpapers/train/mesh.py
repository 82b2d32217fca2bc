"""Meshes, and where the arrays of a run lie on them: parameters by rules on their paths, batches by `data`.

    mesh = make_mesh(data=4, model=2)
    rules = (("mlp/up/kernel", P(None, "model")), ("mlp/down/kernel", P("model", None)))
    rules = fsdp(params, mesh, rules)               # optional: what is left whole is split over `data`
    fitted = fit(state, ..., mesh=mesh, rules=rules)

A path is the keys from the root to a leaf, joined by slashes: `params/encoder/layers_0/kernel` is a leaf of a
Flax model's variables.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxpapers.train.state import TrainState

AXES = ("data", "model", "seq")
Rules = Sequence[tuple[str, PartitionSpec]]  # (regular expression, searched in the path; placement of the leaf)
POPULATION_RULES: Rules = (("", PartitionSpec("data")),)  # every device trains its share of a population's models


def make_mesh(data: int = 0, model: int = 1, seq: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `model` and `seq`.

    Args:
      data: devices along `data`; 0 for all that the other axes leave.
      model: devices along `model`.
      seq: devices along `seq`.
      devices: default all devices of all processes.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = model * seq
    if data == 0 and rest > 0:
        data = len(devices) // rest
    if min(data, model, seq) < 1 or data * rest != len(devices):
        raise ValueError(f"a mesh of data={data} x model={model} x seq={seq} does not fit {len(devices)} devices")
    return jax.make_mesh((data, model, seq), AXES, (AxisType.Auto,) * 3, devices=devices)


def param_specs(params: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """The placement of every parameter by the rules; what no rule names lies whole on every device.

    Raises:
      ValueError: a rule that is no regular expression, or matches no parameter; two rules that place one parameter
        differently; a placement on axes that the mesh lacks, or that do not divide the parameter.
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the rule {pattern!r} is no regular expression: {error}") from None
    unused = {pattern for pattern, _ in rules}
    specs = []
    for path, leaf in leaves:
        name = path_name(path)
        matching = [(pattern, spec) for pattern, spec in rules if re.search(pattern, name)]
        unused -= {pattern for pattern, _ in matching}
        if len({_without_trailing_none(spec) for _, spec in matching}) > 1:
            fight = ", ".join(f"{pattern!r}: {spec}" for pattern, spec in matching)
            raise ValueError(f"rules fight over {name}: {fight}")
        spec = matching[0][1] if matching else PartitionSpec()
        _check_fits(name, leaf.shape, spec, mesh)
        specs.append(spec)
    if unused:
        names = [path_name(path) for path, _ in leaves]
        raise ValueError(f"rules that match no parameter: {sorted(unused)}; the parameters are {_shortened(names)}")
    return jax.tree.unflatten(tree, specs)


def _without_trailing_none(spec: PartitionSpec) -> tuple:
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a placement names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _check_fits(name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{name} of shape {tuple(shape)} has fewer axes than its placement {spec}")
    for size, entry in zip(shape, spec, strict=False):
        axes = _axes(entry)
        if unknown := [axis for axis in axes if axis not in mesh.shape]:
            raise ValueError(f"{name}: the mesh has the axes {tuple(mesh.shape)}, not {unknown[0]!r}")
        if size % math.prod(mesh.shape[axis] for axis in axes):
            raise ValueError(f"{name} of shape {tuple(shape)} does not divide into {spec} on {dict(mesh.shape)}")


def fsdp(params: PyTree, mesh: Mesh, rules: Rules = (), axis: str = "data", min_size: int = 2**12) -> Rules:
    """Rules that also split every large parameter over `axis`, so that no device holds the whole model.

    Args:
      params: arrays, or shape structs.
      mesh: the mesh.
      rules: those that hold already; a parameter keeps its split and gets `axis` beside it.
      axis: the mesh axis over which parameters are split; batches are, too.
      min_size: parameters with fewer numbers stay as the rules have them: gathering them would cost more than it saves.

    Returns:
      One rule a parameter: the largest axis that is free and divisible is split.

    Raises:
      ValueError: the mesh lacks the axis; as `param_specs`.
    """
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}, not {axis!r}")
    specs = param_specs(params, mesh, rules)
    whole = []
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        entries = [*spec, *[None] * (leaf.ndim - len(spec))]
        free = [i for i, entry in enumerate(entries) if entry is None and leaf.shape[i] % mesh.shape[axis] == 0]
        split_already = any(axis in _axes(entry) for entry in entries)
        if free and leaf.size >= min_size and not split_already:
            entries[max(free, key=lambda i: leaf.shape[i])] = axis
        whole.append((f"^{re.escape(path_name(path))}$", PartitionSpec(*entries)))
    return whole


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Where every leaf of a state lies: what the optimizer keeps for a parameter lies where the parameter does.

    Args:
      state: arrays, or shape structs.
      mesh: the mesh.
      rules: of the parameters.

    Returns:
      The state's tree with a NamedSharding in the place of every leaf. A leaf of `opt_state` or `extra` follows the
      parameter whose path its own path ends with, if their shapes agree (moments, averages); others lie whole
      on every device.

    Raises:
      ValueError: as `param_specs`.
    """
    specs = param_specs(state.params, mesh, rules)
    placed = {
        tuple(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(specs), strict=True)
    }

    def follow(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, spec = placed.get(tuple(path[start:]), (None, None))
            if spec is not None and shape == np.shape(leaf):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
        opt_state=jax.tree.map_with_path(follow, state.opt_state),
        extra=jax.tree.map_with_path(follow, state.extra),
    )


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """The arrays, whole on every process, laid out as `shardings` say (one for all, or a tree of them)."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, _for_each_leaf(shardings, tree))


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shape structs in the place of the arrays, laid out as `shardings` say (one for all, or a tree of them)."""

    def struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        array = jax.eval_shape(lambda x: x, leaf)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(struct, tree, _for_each_leaf(shardings, tree))


def _for_each_leaf(shardings: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, NamedSharding) else shardings


def to_host(tree: PyTree) -> PyTree:
    """The arrays as NumPy arrays on every process, wherever their parts lie."""

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


@functools.cache  # asked for every batch, and a pod has thousands of devices
def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(index, number of parts): which part of every batch this process reads; `host_batches` takes it.

    Processes whose devices differ along `data` read different parts, those that share a model's parts the same one.

    Raises:
      ValueError: the processes' devices overlap along `data` in part.
    """
    axis = list(mesh.axis_names).index("data")
    rows: dict[int, set[int]] = {}
    for place_, device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(place_[axis])
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != mesh.shape["data"]:
        raise ValueError(f"processes share some of their places along 'data', not all: {rows}; choose another mesh")
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """The batch, its leading axis split over `data`.

    With several processes each gives its `batch_part`, and the result is the whole batch.

    Raises:
      ValueError: rows that the devices along `data` do not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    devices = mesh.shape["data"]
    _, parts = batch_part(mesh)

    def put(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        if rows.ndim == 0 or (rows.shape[0] * parts) % devices:
            raise ValueError(f"a batch of shape {rows.shape} does not divide over {devices} devices along 'data'")
        return jax.make_array_from_process_local_data(sharding, rows, (rows.shape[0] * parts, *rows.shape[1:]))

    return jax.tree.map(put, batch)


def initialize_distributed(heartbeat_timeout_seconds: int = 60) -> bool:
    """Joins the other processes of the run, where the environment says that there are any.

    Under `srun` with several tasks, on TPU hosts (JAX_PLATFORMS=tpu, alone or of a slice), or with
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set, `jax.distributed.initialize()` finds the others;
    elsewhere nothing happens. To be called before any array is made.

    Args:
      heartbeat_timeout_seconds: when a process has been silent for so long, the others end, saying so (exit code 134).
        Without it they would wait in the next exchange for ever.

    Returns:
      Whether there are other processes.
    """
    environment = os.environ
    by_hand = environment.get("JAX_COORDINATOR_ADDRESS")
    on_tpu = "tpu" in environment.get("JAX_PLATFORMS", "").split(",")
    slurm = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if not by_hand and slurm < 2 and not on_tpu:
        return False
    timeout = heartbeat_timeout_seconds
    if by_hand:
        count, index = (int(environment[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(by_hand, count, index, heartbeat_timeout_seconds=timeout)
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
    return jax.process_count() > 1


def on_first(action: Callable[[], None]) -> None:
    """Does something on the first process while the others wait; where it fails there, it fails on all.

    Raises:
      OSError: with several processes, whatever OSError or ValueError the first one had; a lone process raises that.
    """
    several = jax.process_count() > 1
    failure = ""
    if jax.process_index() == 0:
        try:
            action()
        except (OSError, ValueError) as error:
            if not several:
                raise
            failure = str(error)
    if several:
        text = np.frombuffer(failure.encode()[:1024].ljust(1024), np.uint8)
        if failure := bytes(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)).decode().strip():
            raise OSError(failure)


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path as text, its keys joined by slashes."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
