"""Plans a run before the machine is booked: compiles every program of an experiment for a topology that is not here.

The real compiler does it (libtpu needs no TPU to compile for one), and per device the plan says what the compiler
found: memory against the chip's, FLOPs, traffic, collectives, and the roofline time. The roofline is a lower bound:
every unit at its public peak (bf16 for FLOPs, all links for collectives), each part perfectly overlapped with the
others, torus links that wrap around.
"""

import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments._hlo import Traffic, program_cost
from experiments.catalogue import UsageError, load, parse_target
from experiments.launch import configure, mesh_of

ACCEPTED = "v5e:16x16, v6e:16x16 (two sides), v5p:4x4x4 (three sides), or cpu:8 (virtual devices)"


class Chip(NamedTuple):
    """Public figures of a TPU chip.

    Attributes:
      sides: of a slice's topology.
      pod: chips of the largest slice's pod.
      hbm: bytes.
      flops: per second, bf16.
      hbm_bandwidth: bytes per second.
      network: bytes per second that leave a chip, over all its links in total.
    """

    sides: int
    pod: int
    hbm: float
    flops: float
    hbm_bandwidth: float
    network: float


# cloud.google.com/tpu/docs/v5e, /v5p, /v6e: memory in GB, the network as Gbit/s a chip (1,600, 4,800, 3,584).
# The page of v6e has rounded to 1,600 GB/s of HBM and 3,200 Gbit/s since.
CHIPS = {
    "v5e": Chip(sides=2, pod=256, hbm=16e9, flops=197e12, hbm_bandwidth=819e9, network=1600e9 / 8),
    "v5p": Chip(sides=3, pod=8960, hbm=95e9, flops=459e12, hbm_bandwidth=2765e9, network=4800e9 / 8),
    "v6e": Chip(sides=2, pod=256, hbm=32e9, flops=918e12, hbm_bandwidth=1640e9, network=3584e9 / 8),
}


class ProgramPlan(NamedTuple):
    """What one call of a program takes on each device.

    Attributes:
      name: as the experiment names it.
      error: why it does not compile, in one line, and then no figure below is known; empty where it does.
      argument_bytes, output_bytes, temporary_bytes: as the compiler lays them out; outputs that reuse the memory of a
        donated argument count among both.
      peak_bytes: most that is in use at once, the program's own code included.
      fits: whether the peak stays within the chip's memory; None where that is unknown.
      flops: with the bodies of loops as often as they run.
      bytes_accessed: read from and written to main memory, loops likewise.
      collectives: `kind -> calls, bytes, sent`.
      compute_s, memory_s, network_s: the roofline; None for a CPU.
      bound: which of the three is longest.
      xla_flops, xla_bytes: XLA's own account, in which a loop's body counts once.
      notes: what the figures leave out.
    """

    name: str
    error: str = ""
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    fits: bool | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    collectives: Mapping[str, Traffic] = {}
    compute_s: float | None = None
    memory_s: float | None = None
    network_s: float | None = None
    bound: str | None = None
    xla_flops: float | None = None
    xla_bytes: float | None = None
    notes: tuple[str, ...] = ()


class Plan(NamedTuple):
    """All programs of an experiment, compiled for a topology.

    Attributes:
      target: `slug:preset`.
      topology: as typed.
      devices: how many.
      device_kind: the compiler's name for them.
      mesh: `axis -> devices`.
      chip: the chip's figures; None for a CPU.
      programs: in the experiment's order.
    """

    target: str
    topology: str
    devices: int
    device_kind: str
    mesh: Mapping[str, int]
    chip: Chip | None
    programs: tuple[ProgramPlan, ...]


def plan_experiment(
    target: str,
    topology: str,
    overrides: Sequence[str] = (),
    pattern: str = "",
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Compiles an experiment's programs for a topology; takes no accelerator, and starts none.

    Args:
      target: `slug[:preset]` or `FILE[:preset]`.
      topology: `v5e:16x16`, `v5p:4x4x4`, `v6e:16x16`, `cpu:8`, ...
      overrides: `field=value` each.
      pattern: a regular expression that is searched for in the names of the programs: those without are left out.
      say: as of `plan_programs`.

    Raises:
      UsageError: something that was typed is wrong, or libtpu is missing.
    """
    slug, preset = parse_target(target)
    config = configure(slug, preset, overrides)
    devices, chip = topology_devices(topology)
    mesh = mesh_of(config, devices)
    programs = load(slug).programs(config, mesh)
    try:
        chosen = {name: program for name, program in programs.items() if re.search(pattern, name)}
    except re.error as error:
        raise UsageError(f"--programs {pattern!r} is no regular expression: {error}") from None
    if not chosen:
        raise UsageError(f"--programs {pattern!r} is in none of the names: {', '.join(programs)}")
    return Plan(
        f"{slug}:{preset}",
        topology,
        len(devices),
        devices[0].device_kind,
        dict(mesh.shape),
        chip,
        plan_programs(chosen, mesh, chip, say),
    )


def topology_devices(topology: str) -> tuple[Sequence[jax.Device], Chip | None]:
    """The devices of a topology, to compile for but not to run on, and their chip's figures (None for a CPU).

    Raises:
      UsageError: no such topology, or one that this machine cannot describe.
    """
    kind, _, shape = topology.partition(":")
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UsageError(f"unknown topology {topology!r}; accepted: {ACCEPTED}")
    # The arrays that an experiment makes while it describes its programs must not wake an accelerator.
    jax.config.update("jax_platforms", "cpu")
    sides = [int(side) for side in shape.split("x")]
    if kind == "cpu":
        return _cpu_devices(topology, sides), None
    chip = CHIPS[kind]
    if len(sides) != chip.sides or math.prod(sides) > chip.pod:
        raise UsageError(
            f"{kind} takes {chip.sides} sides and at most {chip.pod} chips, not {shape}; accepted: {ACCEPTED}"
        )
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UsageError(
            f"planning for {kind} needs libtpu, the TPU compiler: pip install -e '.[plan]' (no TPU needed)"
        )
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks Google Cloud's metadata server which machine this is, and waits
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # whatever it is: without one libtpu warns; topologies ignore it
        "TPU_LOG_DIR": "disabled",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # A slice is made of hosts with 2 x 2 chips; a single chip is a host of its own.
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sides) == 1 else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices, chip
    except Exception as error:  # libtpu's errors share no class with each other
        raise UsageError(f"libtpu takes no {topology}: {_first_line(error)}; accepted: {ACCEPTED}") from None


def _cpu_devices(topology: str, sides: Sequence[int]) -> Sequence[jax.Device]:
    if len(sides) != 1:
        raise UsageError(f"cpu takes one number, not {topology!r}; accepted: {ACCEPTED}")
    with suppress(RuntimeError):  # the backend has started: it may have enough of them
        jax.config.update("jax_num_cpu_devices", sides[0])
    devices = jax.devices("cpu")
    if len(devices) < sides[0]:
        raise UsageError(
            f"{topology} needs {sides[0]} virtual devices, and this process has started with {len(devices)}; "
            f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={sides[0]}"
        )
    return devices[: sides[0]]


def plan_programs(
    programs: Mapping[str, tuple[jax.stages.Wrapped, tuple]],
    mesh: Mesh,
    chip: Chip | None,
    say: Callable[[str], None] | None = None,
) -> tuple[ProgramPlan, ...]:
    """Compiles each program for the mesh's devices; one that does not compile says why, and the others go on.

    Args:
      programs: `name -> (jitted function, abstract arguments)`; an argument without a sharding lies whole on every
        device.
      mesh: whose devices are compiled for.
      chip: their figures; None where unknown.
      say: gets a line for each program as soon as it is compiled: large ones take minutes.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    plans: list[ProgramPlan] = []
    for name, (function, arguments) in programs.items():
        start = time.perf_counter()
        try:
            compiled = function.lower(*jax.tree.map(placed, arguments)).compile()
            plans.append(_described(name, compiled, chip))
        except Exception as error:  # whatever it is, it belongs to this program: the others still are planned
            line = f"{type(error).__name__}: {_first_line(error)}"
            plans.append(ProgramPlan(name, line, fits=False if "RESOURCE_EXHAUSTED" in line else None))
        if say is not None:
            found = plans[-1].error or f"peak {_bytes(plans[-1].peak_bytes)}"
            say(f"{len(plans)} of {len(programs)}, {time.perf_counter() - start:.0f} s: {name}: {found}")
    return tuple(plans)


def _described(name: str, compiled: jax.stages.Compiled, chip: Chip | None) -> ProgramPlan:
    memory: Any = compiled.memory_analysis()
    analysis: Any = compiled.cost_analysis() or {}
    cost = program_cost(compiled.as_text() or "")
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Either figure may be 0 where the other is not: libtpu often names no temporaries, old clients no peak.
    temporaries = max(memory.temp_size_in_bytes, memory.peak_memory_in_bytes - held)
    peak = max(memory.peak_memory_in_bytes, held + memory.temp_size_in_bytes) + memory.generated_code_size_in_bytes
    notes = []
    if cost.unknown_loops:
        notes.append(f"loops that run until the data say so: {cost.unknown_loops}; their bodies count once")
    if cost.opaque:
        notes.append(f"FLOPs without those inside {', '.join(cost.opaque)}")
    roofline: dict[str, Any] = {}
    if chip is not None:
        sent = sum(traffic.sent for traffic in cost.collectives.values())
        seconds = {
            "compute": cost.flops / chip.flops,
            "memory": cost.bytes / chip.hbm_bandwidth,
            "network": sent / chip.network,
        }
        roofline = {f"{part}_s": time for part, time in seconds.items()}
        roofline |= {"bound": max(seconds, key=seconds.__getitem__), "fits": peak <= chip.hbm}
    return ProgramPlan(
        name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=temporaries,
        peak_bytes=peak,
        flops=cost.flops,
        bytes_accessed=cost.bytes,
        collectives=cost.collectives,
        xla_flops=analysis.get("flops"),
        xla_bytes=analysis.get("bytes accessed"),
        notes=tuple(notes),
        **roofline,
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as `json` can write it: tuples with names become objects."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {key: plain(entry) for key, entry in value._asdict().items()}
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    return plain(plan)


def plan_table(plan: Plan) -> Table:
    """One row a program, all figures per device and call."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    table = Table(
        title=f"{plan.target} on {plan.topology}: {plan.devices} x {plan.device_kind}, {mesh}; per device and call",
        title_justify="left",
        caption=_caption(plan),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("program", "arguments", "outputs", "temporaries", "peak", "fits", "FLOPs", "bytes"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    table.add_column("collectives")
    for heading in ("compute", "memory", "network"):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    for program in plan.programs:
        table.add_row(*_cells(program, plan.chip))
    return table


def print_plan(plan: Plan) -> None:
    """Prints the plan's table to standard output, unfolded where that is no terminal."""
    Console(width=None if sys.stdout.isatty() else 240).print(plan_table(plan))


def _cells(program: ProgramPlan, chip: Chip | None) -> list[str]:
    name = escape(program.name)
    fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}[program.fits]
    if program.error:
        return [f"{name} [yellow]*[/]", *["-"] * 4, fits, *["-"] * 7]
    peak = _bytes(program.peak_bytes)
    if chip is not None and program.peak_bytes is not None:
        peak += f" ({100 * program.peak_bytes / chip.hbm:.1f}%)"
    moved = [f"{kind} {t.calls:,} x {_bytes(t.bytes / t.calls)}" for kind, t in sorted(program.collectives.items())]
    return [
        name + (" [yellow]*[/]" if program.notes else ""),
        *map(_bytes, (program.argument_bytes, program.output_bytes, program.temporary_bytes)),
        peak,
        fits,
        _scaled(program.flops, 1000, ("", "k", "M", "G", "T", "P", "E")),
        _bytes(program.bytes_accessed),
        "\n".join(moved) or "-",
        *map(_seconds, (program.compute_s, program.memory_s, program.network_s)),
        program.bound or "-",
    ]


def _caption(plan: Plan) -> str:
    lines = []
    if plan.chip is not None:
        chip = plan.chip
        lines.append(
            f"A chip: {chip.hbm / 1e9:.0f} GB HBM at {chip.hbm_bandwidth / 1e9:,.0f} GB/s, "
            f"{chip.flops / 1e12:.0f} TFLOP/s bf16, links {chip.network / 1e9:.0f} GB/s. "
            "Times are lower bounds, every unit at its peak; a loop of many small steps waits for latency instead."
        )
    for program in plan.programs:
        lines += [f"* {program.name}: {line}" for line in (*program.notes, program.error) if line]
    return escape("\n".join(lines))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _bytes(size: float | None) -> str:
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= s), (1e-9, "ns"))
    return f"{seconds / scale:.3g} {unit}"


def _scaled(number: float | None, base: int, units: Sequence[str]) -> str:
    """A number with the unit that leaves it below `base`; "-" where unknown."""
    if number is None:
        return "-"
    step = min(len(units) - 1, int(math.log(number, base)) if number >= 1 else 0)
    return f"{number / base**step:.4g}{units[step]}"
