"""What lies in a folder of runs: finished ones, unfinished ones, and files that cannot be read.

Knows the folders that `run` leaves (results.json, figures/*.png, metrics.jsonl) and the recorded form of
`experiments/results` (<slug>.json beside <slug>.png).
"""

import json
import math
import os
from collections import Counter, UserDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.catalogue import ROOMS, implemented, load, planned
from experiments.harness import PRESETS, Paper, check_claims
from jaxpapers.train import read_metrics

ALL_ROOMS = ROOMS | {"other": "Other"}  # a result whose paper the catalogue does not know is shown all the same
SPREAD_ROWS = 20  # metrics shown at once; the rest is folded away
PANELS = 6  # learning curves of a stage
POINTS = 200  # of a learning curve
LARGEST = 1e150  # of a learning curve: a model beyond it has failed, and differences overflow
# Fields of results.json that the report needs, and their types.
FIELDS: dict[str, Any] = {
    "paper": str,
    "preset": str,
    "finished": str,
    "seconds": (int, float),
    "device": str,
    "versions": dict,
    "metrics": dict,
    "claims": list,
}
CLAIM_FIELDS = ("id", "where", "statement", "paper", "ours", "status")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Series(NamedTuple):
    """A learning curve: `steps` (points,) and `values` (points, models)."""

    stage: str
    name: str
    steps: np.ndarray
    values: np.ndarray


class Figure(NamedTuple):
    """A PNG file, and its size in pixels."""

    path: Path
    width: int
    height: int


class Finished(NamedTuple):
    """A finished run.

    Attributes:
      path: its results.json.
      place: the same, as the report names it.
      name: slug:preset, and the folder where several runs would have the same name, as those of a sweep.
      room: of the paper; "other" where the catalogue does not know it.
      paper: the paper's card.
      results: what results.json holds.
      figures: of the run.
      series: learning curves that can be drawn.
    """

    path: Path
    place: str
    name: str
    room: str
    paper: Paper
    results: dict[str, Any]
    figures: list[Figure]
    series: list[Series]


class Unfinished(NamedTuple):
    """A run that has a config and no results, and the newest line of its metrics."""

    place: str
    paper: str
    preset: str
    newest: str


class Ledger(NamedTuple):
    """What lies below a folder; `unreadable` holds the place and the reason."""

    finished: list[Finished]
    unfinished: list[Unfinished]
    unreadable: list[tuple[str, str]]


class Spread(NamedTuple):
    """A metric over seeds: median and range of those that gave a finite number; the others have failed."""

    name: str
    median: float
    low: float
    high: float
    seeds: int
    failed: int


def collect(folder: Path) -> Ledger:
    """All runs below a folder, in the catalogue's order of rooms, then by paper, preset and place."""
    ledger = Ledger([], [], [])
    for path in _candidates(folder):
        place = path.relative_to(folder).as_posix()
        try:
            contents = _object(path)
            if path.name != "config.json":
                run, broken = _finished(path, place, contents)
                ledger.finished.append(run)
                ledger.unreadable.extend((f"{place}: {what}", why) for what, why in broken)
            elif isinstance(contents.get("paper"), str):  # other tools have files of this name too
                lines = _lines(path.parent)
                newest = f"{lines[-1]['stage']}, step {lines[-1]['step']:,}" if lines else "nothing logged yet"
                preset = str(contents.get("preset", ""))
                ledger.unfinished.append(
                    Unfinished(path.parent.relative_to(folder).as_posix(), contents["paper"], preset, newest)
                )
        except (OSError, ValueError, RecursionError) as error:
            ledger.unreadable.append((place, " ".join(str(error).split()) or type(error).__name__))
    rooms = list(ALL_ROOMS)
    ledger.finished.sort(key=lambda run: (rooms.index(run.room), run.results["paper"], *preset_key(run), run.place))
    names = Counter(run.name for run in ledger.finished)
    ledger.finished[:] = [
        run if names[run.name] == 1 else run._replace(name=f"{run.name} ({os.path.dirname(run.place) or '.'})")
        for run in ledger.finished
    ]
    return ledger


def _candidates(folder: Path) -> Iterable[Path]:
    """The results.json of each run, the config.json of unfinished ones, and recorded <slug>.json files."""
    known = {*implemented(), *planned()}
    for path in sorted(folder.glob("*.json")):
        if path.stem in known or path.with_suffix(".png").exists():
            yield path
    for name, folders, files in os.walk(folder):
        folders.sort()
        if "results.json" in files or "config.json" in files:
            # Checkpoints are large trees without results; a sweep's runs may lie below their parent's folder.
            folders[:] = [child for child in folders if child not in ("checkpoints", "tensorboard", "figures")]
            yield Path(name) / ("results.json" if "results.json" in files else "config.json")


def _object(path: Path) -> dict[str, Any]:
    contents = json.loads(path.read_text(encoding="utf8"))
    if not isinstance(contents, dict):
        raise ValueError(f"holds a {type(contents).__name__}, not an object")
    return contents


def _finished(path: Path, place: str, results: dict[str, Any]) -> tuple[Finished, list[tuple[str, str]]]:
    """The run, and what beside its results cannot be read."""
    for name, kind in FIELDS.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(f"{name} is {'wrong' if name in results else 'missing'}: {results.get(name)!r:.40}")
    if not math.isfinite(results["seconds"]):
        raise ValueError(f"seconds is {results['seconds']}")
    for claim in results["claims"]:
        if not isinstance(claim, dict) or not all(isinstance(claim.get(name), str) for name in CLAIM_FIELDS):
            raise ValueError(f"a claim is {claim!r:.40}, not an object with the texts {', '.join(CLAIM_FIELDS)}")
    broken = []
    figures = []
    of_a_run = path.name == "results.json"
    images = sorted((path.parent / "figures").glob("*.png")) if of_a_run else [path.with_suffix(".png")]
    for image in images:
        try:
            if image.exists() or of_a_run:
                figures.append(_figure(image))
        except (OSError, ValueError) as error:
            broken.append((image.name, str(error)))
    series: list[Series] = []
    try:
        series = _series(_curves(results, path.parent))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        broken.append(("curves", f"{type(error).__name__}: {error}"))
    room, paper = _paper(results["paper"])
    name = f"{results['paper']}:{results['preset']}"
    return Finished(path, place, name, room, paper, results, figures, series), broken


def _paper(slug: str) -> tuple[str, Paper]:
    """Room and card, from the experiment's file or the list of planned papers."""
    files = implemented()
    if slug in files:
        return files[slug].parent.name, load(slug).PAPER
    if slug in planned():
        row = planned()[slug]
        return row["room"], Paper(row["title"], row["authors"], row["year"], row["arxiv"])
    return "other", Paper(slug, "", 0, "")


def preset_key(run: Finished) -> tuple[int, str]:
    """Sorts runs by preset: smoke, small, paper, then others."""
    preset = run.results["preset"]
    return (PRESETS.index(preset) if preset in PRESETS else len(PRESETS)), preset


def _figure(path: Path) -> Figure:
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(PNG_SIGNATURE):
        raise ValueError("is not a PNG file")
    return Figure(path, int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))


def _lines(workdir: Path) -> list[dict[str, Any]]:
    """The well-formed lines of metrics.jsonl, none where there is no run's folder."""
    return [
        line
        for line in read_metrics(workdir)
        if isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)
    ]


Points = Mapping[tuple[str, str], list[tuple[Any, Any]]]  # (stage, name) -> (step, value) of each point


def _curves(results: dict[str, Any], workdir: Path) -> Points:
    points = defaultdict(list)
    if "curves" in results:
        for stage, columns in results["curves"].items():
            for name, (steps, values) in columns.items():
                points[stage, name] = list(zip(steps, values, strict=True))
        return points
    for line in _lines(workdir):
        for name in line.keys() - {"stage", "step"}:
            points[line["stage"], name].append((line["step"], line[name]))
    return points


def thinned(count: int) -> np.ndarray:
    """Indices of at most `POINTS` of so many points of a learning curve, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, POINTS).round().astype(int))


def _series(curves: Points) -> list[Series]:
    """The curves that can be drawn: two points or more, the same number of models in each; the loss first."""
    chosen = []
    for stage in dict.fromkeys(stage for stage, _ in curves):
        names = sorted(name for of, name in curves if of == stage)
        # The loss and the evaluations; gradient norms and the like only where there is nothing else.
        names = [name for name in names if name == "train/loss" or name.startswith("eval/")] or names
        drawn = 0
        for name in sorted(names, key=lambda name: name != "train/loss"):
            points = curves[stage, name]
            try:
                raw = np.asarray([value for _, value in points])
                steps = np.asarray([step for step, _ in points], dtype=float)
                values = raw.astype(float).reshape(len(steps), -1)
                values = np.where(np.abs(values) < LARGEST, values, np.nan)
            except (ValueError, TypeError, OverflowError):
                continue  # text, or another number of models at each step
            if len(steps) < 2 or raw.dtype == bool or raw.ndim > 2 or not np.isfinite(values).any() or drawn == PANELS:
                continue
            kept = thinned(len(steps))
            chosen.append(Series(stage, name, steps[kept], values[kept]))
            drawn += 1
    return chosen


class _Asked(UserDict):
    """Metrics that remember which of them were asked for."""

    def __init__(self, metrics: Mapping[str, Any]):
        super().__init__(metrics)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def seed_spreads(results: dict[str, Any]) -> tuple[list[Spread], list[Spread]]:
    """The metrics that hold one number a seed, those that the claims look at first: what to show, and the rest."""
    asked = _Asked(results["metrics"])
    if results["paper"] in implemented():
        check_claims(load(results["paper"]).CLAIMS, asked)
    spreads = [_spread(name, numbers) for name, value in results["metrics"].items() if (numbers := _numbers(value))]
    shown = [spread for spread in spreads if spread.name in asked.names] or spreads
    shown = shown[:SPREAD_ROWS]
    return shown, [spread for spread in spreads if spread not in shown]


def _numbers(value: Any) -> list[float] | None:
    """A number, or a flat list of them, as floats (NaN and infinities are text in JSON); None for anything else."""
    values = value if isinstance(value, list) else [value]
    numeric = all(type(item) in (int, float) or item in ("nan", "inf", "-inf") for item in values)
    try:
        return [float(item) for item in values] if values and numeric else None
    except OverflowError:
        return None


def _spread(name: str, numbers: Sequence[float]) -> Spread:
    finite = [number for number in numbers if math.isfinite(number)]
    median, low, high = (float(np.median(finite)), min(finite), max(finite)) if finite else (math.nan,) * 3
    return Spread(name, median, low, high, len(numbers), len(numbers) - len(finite))
