"""The 47 papers: which are implemented, which are planned, what their last recorded run says."""

import difflib
import importlib
import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.table import Table

from experiments.harness import PRESETS

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
ROOMS = {
    "sequence": "Sequence models",
    "components": "Components",
    "science": "Scientific machine learning",
    "fields": "Neural fields",
    "perception": "Perception and signals",
    "representation": "Representation learning",
    "interpretability": "Interpretability",
    "theory": "Theory",
}


class UsageError(ValueError):
    """Something the caller typed cannot be done; printed as one line."""


def require(holds: Any, field: str, value: Any, expected: str) -> None:
    """Refuses a field of a config.

    Args:
      holds: whether the value can be taken.
      field: such as `lm.rate`.
      value: what it is.
      expected: what it takes, after "must be".

    Raises:
      UsageError: it cannot.
    """
    if not holds:
        raise UsageError(f"config.{field}={value} must be {expected}")


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
      room: folder of the paper.
      slug: name of its files.
      title, authors, year, arxiv: of the paper.
      state: "planned", or what the recorded run says of the claims.
    """

    room: str
    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    state: str


def implemented() -> dict[str, Path]:
    """`slug -> file` of all experiments."""
    return {path.stem: path for room in ROOMS for path in sorted((ROOT / room).glob("[!_]*.py"))}


def planned() -> dict[str, dict[str, Any]]:
    """`slug -> {room, title, authors, year, arxiv}` of the papers that have no experiment yet."""
    return tomllib.loads((ROOT / "planned.toml").read_text(encoding="utf8"))


def recorded(slug: str) -> dict[str, Any] | None:
    """The committed results of the paper's `small` run, None where there are none."""
    path = RESULTS / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else None


def load(slug: str) -> ModuleType:
    """The experiment's module.

    Raises:
      UsageError: no such experiment; the nearest slug is suggested.
    """
    files = implemented()
    if slug in files:
        return importlib.import_module(f"experiments.{files[slug].parent.name}.{slug}")
    if slug in planned():
        raise UsageError(f"paper {slug!r} is planned, not implemented yet; implemented: {', '.join(files)}")
    raise UsageError(f"unknown paper {slug!r}{nearest(slug, [*files, *planned()])}")


def parse_target(target: str) -> tuple[str, str]:
    """`(slug, preset)` of `slug`, `slug:preset`, or `path/to/experiment.py:preset` (ml_collections' form).

    Raises:
      UsageError: no such preset or file; the nearest is suggested.
    """
    name, _, preset = target.partition(":")
    preset = preset or "small"
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    if name.endswith(".py"):
        path = Path(name).resolve()
        if path not in implemented().values():
            known = [os.path.relpath(file) for file in implemented().values()]
            raise UsageError(f"no experiment in {name!r}{nearest(name, known)}")
        name = path.stem
    return name, preset


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known word, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def entries() -> list[Entry]:
    """All papers, room by room, the implemented ones of a room first."""
    rows = [Entry(**row, slug=slug, state="planned") for slug, row in planned().items()]
    for slug, path in implemented().items():
        paper = load(slug).PAPER
        rows.append(Entry(path.parent.name, slug, paper.title, paper.authors, paper.year, paper.arxiv, _state(slug)))
    rooms = list(ROOMS)
    return sorted(rows, key=lambda row: (rooms.index(row.room), row.state == "planned"))


def _state(slug: str) -> str:
    results = recorded(slug)
    if results is None:
        return "implemented, no recorded run"
    held = sum(claim["status"] == "holds" for claim in results["claims"])
    return f"claims {held}/{len(results['claims'])} held"


def listing_table() -> Table:
    """What `python -m experiments list` prints."""
    table = Table("room", "slug", "title", "state", box=None, header_style="bold")
    for row in entries():
        table.add_row(row.room, row.slug, row.title, row.state, style="dim" if row.state == "planned" else "")
    return table


def markdown_table() -> str:
    """The README's tables, one a room."""
    rows = entries()
    lines = []
    for room, name in ROOMS.items():
        lines += [f"**{name}** (`{room}`)", "", "| paper | authors | state |", "|---|---|---|"]
        for row in (row for row in rows if row.room == room):
            title = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
            slug = f"`{row.slug}`"
            if row.state != "planned":
                slug = f"[`{row.slug}`](experiments/{room}/{row.slug}.py)"
            lines.append(f"| {slug} {title}, {row.year} | {row.authors} | {row.state} |")
        lines.append("")
    return "\n".join(lines).strip()
