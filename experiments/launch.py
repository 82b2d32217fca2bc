"""Runs an experiment in its folder: checks what was typed, refuses or resumes, writes results.json."""

import datetime
import fcntl
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict
from rich.console import Console

from experiments.catalogue import RESULTS, UsageError, load, parse_target
from experiments.harness import Run, check_claims, use_figure_style
from experiments.ledger import collect, thinned
from experiments.overrides import override
from experiments.report import markdown
from jaxpapers.train import json_value, make_mesh, on_first, read_metrics, sigterm_raises, write_whole

LOCK, SECONDS = ".lock", ".seconds"
MESH = {"data": 0, "model": 1, "seq": 1}  # of every config that has no mesh of its own; 0: all devices that are left


def run_experiment(
    target: str,
    overrides: Sequence[str] = (),
    workdir: Path | None = None,
    overwrite: bool = False,
    record: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Runs an experiment; an unfinished run of the same config is resumed.

    With several processes each of them calls it; the first one writes.

    Args:
      target: `slug[:preset]` or `FILE[:preset]`.
      overrides: `field=value` each.
      workdir: default runs/<slug>/<preset>.
      overwrite: drop what an earlier run left in the workdir.
      record: keep results and cover figure under experiments/results/ (preset small, no overrides).

    Returns:
      The workdir, and the contents of its results.json.

    Raises:
      UsageError: something that was typed is wrong, or the workdir belongs to another run or cannot be written.
      Terminated: SIGTERM came; the same call resumes the run.
    """
    slug, preset = parse_target(target)
    experiment = load(slug)
    config = configure(slug, preset, overrides)
    if record and (preset != "small" or overrides):
        raise UsageError("--record keeps runs of the preset small, without overrides")
    workdir = workdir or Path("runs") / slug / preset
    settings = settings_of(slug, preset, config)
    first = jax.process_index() == 0
    console = Console(stderr=True, soft_wrap=True, quiet=not first)
    with sigterm_raises(), ExitStack() as held:

        def enter() -> None:
            held.enter_context(_held(workdir))
            _enter(workdir, settings, overwrite)

        on_first(enter)
        console.print(f"{slug}:{preset} -> {workdir}", highlight=False, markup=False)
        use_figure_style()
        mesh = mesh_of(config)
        with _stopwatch(workdir) as seconds, _quick_compilation(preset == "smoke"):
            measured = experiment.run(config, Run(workdir, console, mesh if mesh.size > 1 else None))
        metrics = {name: json_value(value) for name, value in measured.items()}
        results = {
            "paper": slug,
            "preset": preset,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds(), 1),
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}, {os.cpu_count()} host cores",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("jaxpapers", "jax", "jaxlib", "flax", "optax", "numpy")},
            "config": settings,
            "metrics": metrics,
            "claims": check_claims(experiment.CLAIMS, metrics),
            "curves": curves(workdir),
        }
        if first:
            write_whole(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    if record and first:
        if left_out := [name for name in metrics if name.endswith("/left_out")]:
            raise UsageError(f"not recorded, as parts of the run are missing: {', '.join(left_out)}")
        write_whole(RESULTS / f"{slug}.json", (workdir / "results.json").read_bytes())
        write_whole(RESULTS / f"{slug}.png", (workdir / "figures" / f"{experiment.COVER}.png").read_bytes())
        write_whole(RESULTS / "README.md", markdown(collect(RESULTS), RESULTS))
    return workdir, results


def settings_of(slug: str, preset: str, config: ConfigDict) -> dict[str, Any]:
    """What config.json and results.json say of a run; through JSON, in which tuples become lists."""
    return json.loads(json.dumps({"paper": slug, "preset": preset, **config.to_dict()}))


def configure(slug: str, preset: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The preset's config with the overrides, locked; every config has a group `mesh`.

    Raises:
      UsageError: an override that does not fit.
    """
    config = load(slug).get_config(preset)
    config.mesh = config.get("mesh", ConfigDict(MESH))
    override(config, overrides)
    config.lock()
    return config


def mesh_of(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that a config asks for, of all devices or of those given.

    Raises:
      UsageError: it does not fit them.
    """
    try:
        return make_mesh(**config.mesh, devices=devices)
    except (ValueError, NotImplementedError) as error:  # jax cannot lay every mesh onto every torus
        raise UsageError(f"{str(error).partition(chr(10))[0]}; set config.mesh.data, .model or .seq") from None


def curves(workdir: Path) -> dict[str, dict[str, list[Any]]]:
    """Losses and evaluations of every stage against the step, thinned and rounded: what a report draws."""
    stages: dict[str, dict[str, list[Any]]] = {}
    lines = read_metrics(workdir)
    for stage in dict.fromkeys(line["stage"] for line in lines):
        for name in ("train/loss", *sorted({key for line in lines for key in line if key.startswith("eval/")})):
            points = [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]
            if points:
                points = [points[index] for index in thinned(len(points))]
                steps, values = zip(*points, strict=True)
                stages.setdefault(stage, {})[name] = [list(steps), [_rounded(value) for value in values]]
    return stages


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@contextmanager
def _quick_compilation(wanted: bool) -> Iterator[None]:
    """A smoke run spends its time in the compiler: there, most of XLA's optimisations cost more than they save."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", wanted or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextmanager
def _stopwatch(workdir: Path) -> Iterator[Callable[[], float]]:
    """Yields a clock of the run's seconds, those of earlier sittings included (but for what a SIGKILL cut off)."""
    path = workdir / SECONDS
    before, start = float(path.read_text()) if path.exists() else 0.0, time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - start

    try:
        yield seconds
    finally:
        if jax.process_index() == 0:
            write_whole(path, f"{seconds():.1f}")


def _held(workdir: Path) -> TextIO:
    """Keeps other processes out of the workdir; the system lets go of it when this process ends, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / LOCK).open("a+", encoding="utf8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UsageError(f"{workdir} is in use by another run: {lock.read().strip()}") from None
        lock.truncate(0)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}")
        lock.flush()
    except OSError as error:
        raise UsageError(f"cannot write into {workdir}: {error.strerror}; choose another --workdir") from None
    return lock


def _enter(workdir: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes the workdir ours, or says why it cannot be."""
    stored = workdir / "config.json"
    left = [path for path in workdir.iterdir() if path.name != LOCK]
    if overwrite and left:
        if not stored.exists():
            raise UsageError(f"{workdir} holds no run (it has no config.json): --overwrite will not empty it")
        for path in sorted(left, key=lambda path: path == stored):  # last: half of this can then be done again
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (workdir / "results.json").exists():
        raise UsageError(f"{workdir} holds a finished run; choose another --workdir, or --overwrite it")
    if any((workdir / "checkpoints").glob("*/*")):
        try:
            before = json.loads(stored.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{workdir} holds checkpoints, but its config.json cannot be read ({error}): nobody knows whose they "
                "are; choose another --workdir"
            ) from None
        changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
        if changed:
            raise UsageError(
                f"{workdir} holds an unfinished run with another config (it differs in {', '.join(changed)}); "
                "choose another --workdir, or --overwrite it"
            )
    else:
        (workdir / SECONDS).unlink(missing_ok=True)
    write_whole(stored, json.dumps(settings, indent=1) + "\n")
