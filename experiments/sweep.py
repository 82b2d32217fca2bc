"""Sweeps: one run for every combination of the values of some fields, here or as an array job on SLURM."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.catalogue import UsageError, parse_target
from experiments.launch import configure, run_experiment, settings_of
from jaxpapers.train import initialize_distributed


class Point(NamedTuple):
    """One run of a sweep; submitit calls it on a node of the cluster.

    Attributes:
      target: `slug[:preset]`.
      overrides: of all fields, swept or not.
      workdir: of this run.
      overwrite: run it again where it has finished.
    """

    target: str
    overrides: tuple[str, ...]
    workdir: Path
    overwrite: bool = False

    def __call__(self) -> dict[str, Any]:
        """Runs or resumes it, and returns its results; one that has finished with this config is left as it is."""
        initialize_distributed()  # a job of several tasks
        done = self.workdir / "results.json"
        if done.exists() and not self.overwrite:
            results = json.loads(done.read_text(encoding="utf8"))
            slug, preset = parse_target(self.target)
            if results["config"] == settings_of(slug, preset, configure(slug, preset, self.overrides)):
                return results
        return run_experiment(self.target, self.overrides, self.workdir, self.overwrite)[1]

    def checkpoint(self) -> Any:
        """What submitit queues when the job is preempted or runs out of time: the same, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def sweep_points(
    target: str, overrides: Sequence[str], sweeps: Sequence[str], workdir: Path | None, overwrite: bool = False
) -> list[Point]:
    """The runs of a sweep, each with its own folder below the workdir, all of them checked.

    Args:
      target: `slug[:preset]`.
      overrides: `field=value` each, for all runs.
      sweeps: `config.field=value,value,...` each; several make a grid.
      workdir: default runs/<slug>/<preset>-sweep.
      overwrite: run finished ones again.

    Raises:
      UsageError: a sweep without values, or a value that its field does not take.
    """
    slug, preset = parse_target(target)
    axes = []
    for text in sweeps:
        field, _, values = text.removeprefix("config.").partition("=")
        words = [word for word in values.split(",") if word]
        if not field or not words:
            raise UsageError(f"--sweep takes config.FIELD=VALUE,VALUE,..., such as config.seed=0,1,2; not {text!r}")
        axes.append([f"{field}={word}" for word in words])
    folder = workdir or Path("runs") / slug / f"{preset}-sweep"
    points = [
        Point(f"{slug}:{preset}", (*overrides, *chosen), folder / ",".join(chosen).replace("/", "_"), overwrite)
        for chosen in itertools.product(*axes)
    ]
    for point in points:
        configure(slug, preset, point.overrides)
    return points


def submit(points: Sequence[Point], folder: Path, options: Sequence[str], cluster: str | None = None) -> list[Any]:
    """Queues the runs as one array job and returns its jobs.

    Args:
      points: the runs.
      folder: where submitit keeps its logs.
      options: `name=value` each, such as `timeout_min=240` or `slurm_partition=gpu` (submitit's parameters).
      cluster: "slurm", "local" (processes on this machine) or "debug" (this process); None: SLURM where there is one.

    Raises:
      UsageError: submitit is not installed, or an option that it does not know.
    """
    parameters: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UsageError(f"--slurm-option takes NAME=VALUE, not {option!r}")
        parameters[name] = int(value) if value.isdecimal() else value
    try:
        import submitit
    except ImportError:
        raise UsageError("--slurm needs submitit: pip install -e '.[slurm]'") from None
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(name="jaxpapers", **parameters)
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"submitit: {error}") from None
    with executor.batch():
        return [executor.submit(point) for point in points]
