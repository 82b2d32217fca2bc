"""Runs an experiment in its folder: checks what was typed, refuses or resumes, writes results.json."""

import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.catalogue import RESULTS, UsageError, load, parse_target
from experiments.harness import Run, check_claims, use_figure_style
from experiments.overrides import override
from jaxpapers.train import json_value, write_whole


def run_experiment(
    target: str,
    overrides: Sequence[str] = (),
    workdir: Path | None = None,
    overwrite: bool = False,
    record: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Runs an experiment; an unfinished run of the same config is resumed.

    Args:
      target: `slug[:preset]` or `FILE[:preset]`.
      overrides: `field=value` each.
      workdir: default runs/<slug>/<preset>.
      overwrite: drop what an earlier run left in the workdir.
      record: keep results and cover figure under experiments/results/ (preset small, no overrides).

    Returns:
      The workdir, and the contents of its results.json.

    Raises:
      UsageError: something that was typed is wrong, or the workdir belongs to another run.
    """
    slug, preset = parse_target(target)
    experiment = load(slug)
    config = experiment.get_config(preset)
    override(config, overrides)
    config.lock()
    if record and (preset != "small" or overrides):
        raise UsageError("--record keeps runs of the preset small, without overrides")
    workdir = workdir or Path("runs") / slug / preset
    # Through JSON, so that what is compared on a resume is what was stored (tuples become lists).
    settings = json.loads(json.dumps({"paper": slug, "preset": preset, **config.to_dict()}))
    _enter(workdir, settings, overwrite)

    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{slug}:{preset} -> {workdir}", highlight=False, markup=False)
    use_figure_style()
    start = time.monotonic()
    with _quick_compilation(preset == "smoke"):
        measured = experiment.run(config, Run(workdir, console))
    metrics = {name: json_value(value) for name, value in measured.items()}
    results = {
        "paper": slug,
        "preset": preset,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}, {os.cpu_count()} host cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jaxpapers", "jax", "jaxlib", "flax", "optax", "numpy")},
        "config": settings,
        "metrics": metrics,
        "claims": check_claims(experiment.CLAIMS, metrics),
    }
    write_whole(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    if record:
        write_whole(RESULTS / f"{slug}.json", (workdir / "results.json").read_bytes())
        write_whole(RESULTS / f"{slug}.png", (workdir / "figures" / f"{experiment.COVER}.png").read_bytes())
    return workdir, results


@contextmanager
def _quick_compilation(wanted: bool) -> Iterator[None]:
    """A smoke run spends its time in the compiler: there, most of XLA's optimisations cost more than they save."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", wanted or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _enter(workdir: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes the workdir ours, or says why it cannot be."""
    stored = workdir / "config.json"
    if overwrite and workdir.exists():
        if any(workdir.iterdir()) and not stored.exists():
            raise UsageError(f"{workdir} holds no run (it has no config.json): --overwrite will not empty it")
        shutil.rmtree(workdir)
    if (workdir / "results.json").exists():
        raise UsageError(f"{workdir} holds a finished run; choose another --workdir, or --overwrite it")
    if not stored.exists():
        write_whole(stored, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(stored.read_text(encoding="utf8"))
    changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if changed:
        raise UsageError(
            f"{workdir} holds an unfinished run with another config (it differs in {', '.join(changed)}); "
            "choose another --workdir, or --overwrite it"
        )
