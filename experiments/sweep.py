"""Sweeps: one run for every combination of the values of some fields, here or as an array job on SLURM."""

import itertools
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax

from experiments.catalogue import UsageError, parse_target
from experiments.launch import configure, run_experiment, settings_of
from jaxpapers.train import Terminated, initialize_distributed, sigterm_raises

FOLLOWS_S = 5.0  # of the 30 that SLURM leaves between SIGTERM and SIGKILL, unless told otherwise


class Point(NamedTuple):
    """One run of a sweep.

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
        _join_others()
        done = self.workdir / "results.json"
        if done.exists() and not self.overwrite:
            results = json.loads(done.read_text(encoding="utf8"))
            slug, preset = parse_target(self.target)
            if results["config"] == settings_of(slug, preset, configure(slug, preset, self.overrides)):
                return results
        return run_experiment(self.target, self.overrides, self.workdir, self.overwrite)[1]


@dataclass(frozen=True)
class Job:
    """A point as submitit runs it on a node of the cluster: stopped, it goes on where it was.

    Preemption and the end of the time come as submitit's signal (SIGUSR2, or what SUBMITIT_PREEMPT_SIGNAL names), whose
    handler queues the job again and leaves. Here it has to wait until the run has stopped as it stops for SIGTERM, its
    state saved; `slurm_signal_delay_s` (default 90) must give a step and a save that time. After SIGTERM alone
    (`scancel`) the state is saved, too, but nothing is queued: the job has failed, and its result says why.

    Attributes:
      point: the run.
      found: when the config.json in its folder had been written, as of submission; None where there was none.
    """

    point: Point
    found: int | None

    def __call__(self) -> dict[str, Any]:
        """Runs or resumes the point, and returns its results.

        Raises:
          UncompletedJobError: it was stopped for good.
          SystemExit: it is queued again.
        """
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        _join_others()  # first: `sigterm_raises` asks how many they are
        number = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        queue_again = signal.getsignal(number)
        asked = number == signal.SIGTERM

        def stop(signum: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked = True
            signal.raise_signal(signal.SIGTERM)  # which jax's service hears, too, where there are several processes

        try:
            with sigterm_raises():
                if not asked:
                    signal.signal(number, stop)
                # A job that is queued again must not drop what it has written itself.
                overwrite = self.point.overwrite and _written(self.point.workdir) == self.found
                return self.point._replace(overwrite=overwrite)()
        except Terminated as stopped:
            reason = str(stopped)
            until = time.monotonic() + FOLLOWS_S  # where SLURM preempts, SIGTERM may come first
            while not asked and time.monotonic() < until:
                time.sleep(0.1)
        finally:
            signal.signal(number, queue_again)
        if not asked:
            raise UncompletedJobError(f"{reason}; it is not queued again: submit it without --overwrite to resume")
        print(f"{reason}; to be queued again", file=sys.stderr)
        if callable(queue_again):
            queue_again(number, None)
        sys.exit()  # a task that is not the first, which submitit leaves the queueing to: it has no result

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, which resumes."""
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
      UsageError: a sweep without values, or with one twice, or a value that its field does not take.
    """
    slug, preset = parse_target(target)
    axes: list[list[str]] = []
    for text in sweeps:
        field, _, values = text.removeprefix("config.").partition("=")
        words = [word for word in values.split(",") if word]
        if not field or not words:
            raise UsageError(f"--sweep takes config.FIELD=VALUE,VALUE,..., such as config.seed=0,1,2; not {text!r}")
        if len(set(words)) < len(words) or any(axis[0].startswith(f"{field}=") for axis in axes):
            raise UsageError(f"--sweep {text}: each field once, each value once")
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
        return [executor.submit(Job(point, _written(point.workdir))) for point in points]


def _join_others() -> None:
    """Joins the other processes of the run, where there are any; only once."""
    if not jax.distributed.is_initialized():
        initialize_distributed()


def _written(workdir: Path) -> int | None:
    """When the run in the folder was begun: every start writes its config.json anew, after what it drops."""
    try:
        return (workdir / "config.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None
