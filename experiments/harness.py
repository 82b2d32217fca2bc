"""What an experiment is made of: the paper's card, its claims, and the folder of a run.

An experiment is a file `experiments/<room>/<slug>.py` with `PAPER`, `get_config(preset)`, `programs(config)`,
`run(config, run)`, `CLAIMS` and `COVER` (the figure that stands for it in the gallery). It is found by its
file name; nothing registers it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import matplotlib
from jax.sharding import Mesh
from matplotlib.figure import Figure
from rich.console import Console

from jaxpapers.data.download import DataNotFound
from jaxpapers.train import Checkpoints, Fitted, MetricsWriter, TrainState, fit, nbytes, write_whole

PRESETS = ("smoke", "small", "paper")
Metrics = Mapping[str, Any]
Data = TypeVar("Data")


class Paper(NamedTuple):
    """The card of a paper.

    Attributes:
      title: as published.
      authors: as published.
      year: of publication.
      arxiv: arXiv id, empty where there is none.
      code: `owner/name` of the authors' repository, empty where there is none.
    """

    title: str
    authors: str
    year: int
    arxiv: str
    code: str = ""


class Claim(NamedTuple):
    """A claim of a paper, checked on the numbers that `run` returns.

    Attributes:
      id: short name, the key in results.json.
      where: place in the paper.
      statement: what is claimed, and the criterion by which it is checked here.
      paper: the paper's own figure.
      ours: `metrics -> text`, our figure.
      holds: `metrics -> bool`. A metric that is missing (KeyError) makes the claim `not run`.
    """

    id: str
    where: str
    statement: str
    paper: str
    ours: Callable[[Metrics], str]
    holds: Callable[[Metrics], Any]


def check_claims(claims: Iterable[Claim], metrics: Metrics) -> list[dict[str, str]]:
    """Each claim with our figure and its status: "holds", "fails" or "not run: <the missing metric>"."""
    checked = []
    for claim in claims:
        try:
            ours, status = claim.ours(metrics), "holds" if claim.holds(metrics) else "fails"
        except KeyError as missing:
            ours, status = "", f"not run: no {missing.args[0]}"
        except Exception as error:  # a slip in a predicate must not cost the results of a long run
            ours, status = "", f"not run: {type(error).__name__}: {error}"
        checked.append(
            {
                **{k: getattr(claim, k) for k in ("id", "where", "statement", "paper")},
                "ours": ours,
                "status": status,
            }
        )
    return checked


class Run:
    """The folder of one run, and what an experiment writes into it; with several processes, the first of them writes.

    Args:
      workdir: the folder; figures/, checkpoints/, metrics.jsonl and tensorboard/ lie in it.
      console: where `say` prints; quiet on all processes but the first.
      mesh: the devices of the run; None for one device.
    """

    def __init__(self, workdir: Path, console: Console, mesh: Mesh | None = None):
        self.workdir = workdir
        self.mesh = mesh
        self._console = console
        self._writes = jax.process_index() == 0

    def say(self, text: str) -> None:
        """Tells the person who waits what happens now."""
        self._console.print(text, highlight=False, markup=False)

    def load(
        self, names: Iterable[str], read: Callable[[str], Data], said: str = "{} is", key: str = "{}"
    ) -> tuple[dict[str, Data], dict[str, Any]]:
        """Reads what the run needs; what has no file here is left out, with a word.

        Called before anything is trained: a missing or corrupt file should not cost a training.

        Args:
          names: of the data.
          read: `name -> data`.
          said: subject and verb of the word, `{}` the name.
          key: of the metric, `{}` the name.

        Returns:
          name -> data, and `<key>/left_out` -> the reason, of each that is missing.
        """
        found: dict[str, Data] = {}
        left_out: dict[str, Any] = {}
        for name in names:
            try:
                found[name] = read(name)
            except DataNotFound as missing:
                self.say(f"{said.format(name)} left out: {missing}")
                left_out[f"{key.format(name)}/left_out"] = str(missing)
        return found, left_out

    def fit(self, stage: str, state: TrainState, *args: Any, **options: Any) -> Fitted:
        """`jaxpapers.train.fit` with this run's checkpoints and metrics; resumes where it was stopped.

        Args:
          stage: name of what is trained, unique within the run.
          state: as of `fit`.
          *args: train_step, batches, num_steps.
          **options: as of `fit`.

        Raises:
          OSError: the disk has no room for the checkpoints; seen before anything is trained.
        """
        with closing(Checkpoints(self.workdir / "checkpoints" / stage)) as checkpoints:
            size = nbytes(state) + (nbytes(state.params) if options.get("minimize") else 0)  # with the best parameters
            checkpoints.require_room(size)
            resume_step = checkpoints.latest_step() or 0
            if resume_step:
                self.say(f"{stage}: resuming from step {resume_step:,}")
            writer = MetricsWriter(self.workdir, stage, resume_step) if self._writes else None
            with closing(writer) if writer else nullcontext() as metrics:
                options = {"mesh": self.mesh, "title": stage} | options
                return fit(state, *args, checkpoints=checkpoints, metrics=metrics, **options)

    def figure(self, name: str, figure: Figure) -> Path:
        """Saves figures/<name>.png, whole, and returns its path."""
        path = self.workdir / "figures" / f"{name}.png"
        if self._writes:
            write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight"))
        return path

    def file(self, name: str, content: str | bytes) -> Path:
        """Writes another file of the run, whole, and returns its path."""
        if self._writes:
            write_whole(self.workdir / name, content)
        return self.workdir / name


def use_figure_style() -> None:
    """One look for all figures, legible at the README's width; draws without a display."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "figure.figsize": (7.0, 4.0),
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "legend.frameon": False,
        }
    )
