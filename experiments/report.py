"""The ledger of all runs, as Markdown and as one HTML page that needs no network.

What cannot be read is named in the report, not hidden.
"""

import base64
import math
import os
import re
import string
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments.catalogue import UsageError
from experiments.harness import Paper
from experiments.ledger import (
    ALL_ROOMS,
    Figure,
    Finished,
    Ledger,
    Series,
    Spread,
    Unfinished,
    collect,
    preset_key,
    seed_spreads,
)
from jaxpapers.train import write_whole

PAGE = Path(__file__).with_name("_report.html")
LINES = 24  # models drawn in a learning curve
FOLDED_ROWS = 100  # metrics in the Markdown, which is kept in the repository; the page has all
STATUSES = {"held": "✓ held", "failed": "✗ failed", "absent": "– not run"}
SPREAD_HEADER = ("metric", "median", "min to max", "seeds", "failed")
CLAIM_HEADER = ("paper", "claim", "where", "paper's figure", "ours", "status")
# On a phone the first columns are what is seen without scrolling.
HTML_CLAIM_HEADER = ("paper", "status", "claim", "where", "paper's figure", "ours")


def write_report(folder: Path | None, output: Path) -> tuple[Path, Path]:
    """Writes report.md and report.html of all runs below a folder.

    Args:
      folder: default `runs/`; a folder shaped like experiments/results is one too.
      output: folder of the two files, made if it is missing.

    Returns:
      The paths of both files.

    Raises:
      UsageError: there is no such folder, or no run in it.
    """
    folder = folder or Path("runs")
    if not folder.is_dir():
        raise UsageError(f"no folder {str(folder)!r}: `python -m experiments run` makes runs/, or name another folder")
    ledger = collect(folder)
    if not any(ledger):
        raise UsageError(f"no run in {str(folder)!r}: neither results.json nor config.json in any folder below it")
    paths = output / "report.md", output / "report.html"
    # Text that UTF-8 cannot hold (a lone surrogate in a results.json) must not cost the report.
    write_whole(paths[0], markdown(ledger, output).encode("utf8", "replace"))
    write_whole(paths[1], page(ledger).encode("utf8", "replace"))
    return paths


def _spread_cells(spread: Spread) -> tuple[str, str, str, str, str]:
    middle, extent = "–", "–"
    if spread.failed < spread.seeds:
        middle = _number(spread.median)
        extent = f"{_number(spread.low)} to {_number(spread.high)}" if spread.seeds > 1 else "–"
    return spread.name, middle, extent, str(spread.seeds), str(spread.failed) if spread.failed else "–"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _kind(status: str) -> str:
    """Key of STATUSES."""
    return {"holds": "held", "fails": "failed"}.get(status, "absent")


def _verdict(status: str) -> str:
    """The status as the report writes it, the reason included where a claim was not run."""
    kind = _kind(status)
    return STATUSES[kind] if kind != "absent" else f"– {status}"


def _held(runs: Iterable[Finished]) -> dict[str, int]:
    """Claims by status."""
    counts = dict.fromkeys(STATUSES, 0)
    for run in runs:
        for claim in run.results["claims"]:
            counts[_kind(claim["status"])] += 1
    return counts


def _facts(run: Finished) -> dict[str, str]:
    results = run.results
    return {
        "device": results["device"],
        "time": f"{_duration(results['seconds'])} ({results['seconds']:,} s)",
        "finished": results["finished"],
        "versions": ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "results": run.place,
    }


def _by_paper(ledger: Ledger) -> dict[str, dict[str, list[Finished]]]:
    """The runs by room, then by slug."""
    rooms: dict[str, dict[str, list[Finished]]] = {}
    for run in ledger.finished:
        rooms.setdefault(run.room, {}).setdefault(run.results["paper"], []).append(run)
    return rooms


def markdown(ledger: Ledger, output: Path) -> str:
    """The report as GitHub's Markdown.

    Args:
      ledger: what to report.
      output: the folder that the links to figures start from.
    """
    counts = _held(ledger.finished)
    seconds = sum(run.results["seconds"] for run in ledger.finished)
    papers = len({run.results["paper"] for run in ledger.finished})
    lines = [
        "# Results",
        "",
        f"{_count(papers, 'paper')}, {_count(len(ledger.finished), 'finished run')}: {counts['held']} of "
        f"{_count(sum(counts.values()), 'claim')} held, {counts['failed']} failed, {counts['absent']} not run; "
        f"{_duration(seconds)} ({seconds:,.1f} s) of computing.",
        "",
    ]
    if ledger.unreadable:
        lines += ["**Not readable:**", ""]
        lines += [f"- {_md(place)}: {_md(reason)}" for place, reason in ledger.unreadable] + [""]
    if ledger.unfinished:
        lines += ["**Unfinished:**", ""]
        lines += [f"- {_md(_unfinished(run))}" for run in ledger.unfinished] + [""]
    lines += ["## Claims", "", *_md_table(("room", *CLAIM_HEADER), _claim_rows(ledger)), ""]
    for room, runs_of in _by_paper(ledger).items():
        lines += [f"## {ALL_ROOMS[room]}", ""]
        for runs in runs_of.values():
            lines += [f"### {_md_title(runs[0].paper)}", ""]
            for run in runs:
                lines += _md_run(run, output)
    return "\n".join(lines).rstrip() + "\n"


def _claim_rows(ledger: Ledger) -> list[list[str]]:
    rows = []
    for run in ledger.finished:
        for claim in run.results["claims"]:
            statement = f"{claim['id']}: {claim['statement']}"
            texts = (run.room, run.name, statement, claim["where"], claim["paper"], claim["ours"])
            rows.append([*texts, _verdict(claim["status"])])
    return rows


def _md_run(run: Finished, output: Path) -> list[str]:
    counts = _held([run])
    lines = [f"#### {_md(run.name)}: {counts['held']} of {_count(sum(counts.values()), 'claim')} held", ""]
    lines += [f"- {name}: {_md(text)}" for name, text in _facts(run).items()] + [""]
    for figure in run.figures:
        link = quote(Path(os.path.relpath(figure.path, output)).as_posix())
        lines += [f"![{_md(f'{run.name}: {figure.path.stem}')}]({link})", ""]
    shown, rest = (list(map(_spread_cells, spreads)) for spreads in seed_spreads(run.results))
    if shown:
        lines += [*_md_table(SPREAD_HEADER, shown), ""]
    if rest:
        title = _count(len(rest), "more metric")
        if len(rest) > FOLDED_ROWS:
            title += f", the first {FOLDED_ROWS} of them here, all in results.json"
        lines += [f"<details><summary>{title}</summary>", ""]
        lines += [*_md_table(SPREAD_HEADER, rest[:FOLDED_ROWS]), "", "</details>", ""]
    return lines


def _md(text: str) -> str:
    """Plain text in Markdown: nothing in it is markup, a line break or a cell's end."""
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", escape(" ".join(text.split()), quote=False))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no markup


def _md_title(paper: Paper) -> str:
    title = _md(paper.title)
    if paper.arxiv:
        title = f"[{title}](https://arxiv.org/abs/{quote(paper.arxiv)})"
    return f"{title}, {paper.year}" if paper.year else title


def _md_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [header, ["---"] * len(header), *([_md(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in table]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _unfinished(run: Unfinished) -> str:
    return f"{run.paper}:{run.preset} ({run.place}): {run.newest}"


def page(ledger: Ledger) -> str:
    """The report as one HTML page: figures and curves inline, nothing to load."""
    rooms = _by_paper(ledger)
    slugs = [slug for runs_of in rooms.values() for slug in runs_of]
    anchors = _anchors(slugs)
    rows = [row for run in ledger.finished for row in _html_claims(run, anchors[run.results["paper"]])]
    contents = []
    sections = []
    for room, runs_of in rooms.items():
        articles = [_html_paper(room, anchors[slug], runs) for slug, runs in runs_of.items()]
        sections.append(f'<section class="room">\n<h2>{ALL_ROOMS[room]}</h2>\n{"".join(articles)}</section>')
        contents += [
            f'<li data-paper="{anchors[slug]}"><a href="#{anchors[slug]}">{escape(runs[0].paper.title)}</a></li>'
            for slug, runs in runs_of.items()
        ]
    count = _count(sum(_held(ledger.finished).values()), "claim")
    header = [
        f'<th scope="col" aria-sort="none"><button type="button">{name}</button></th>' for name in HTML_CLAIM_HEADER
    ]
    newest = max((run.results["finished"] for run in ledger.finished), default="")
    return string.Template(PAGE.read_text(encoding="utf8")).substitute(
        origin=escape(f"newest run finished {newest}" if newest else "no finished run"),
        totals=_html_totals(ledger),
        notes=_html_list("Not readable", [f"{place}: {reason}" for place, reason in ledger.unreadable])
        + _html_list("Unfinished runs", [_unfinished(run) for run in ledger.unfinished]),
        filters=_html_filters(ledger),
        count=f"showing all {count}",
        header="".join(header),
        claims="\n".join(rows),
        contents="\n".join(contents),
        rooms="\n".join(sections),
    )


def _anchors(slugs: Iterable[str]) -> dict[str, str]:
    """An id for each slug, unique whatever the slugs are."""
    anchors: dict[str, str] = {}
    for slug in slugs:
        wanted = re.sub(r"[^A-Za-z0-9_-]", "-", slug) or "paper"
        taken = set(anchors.values())
        numbered = (f"{wanted}-{number}" for number in range(2, len(taken) + 3))
        anchors[slug] = next(anchor for anchor in (wanted, *numbered) if anchor not in taken)
    return anchors


def _html_totals(ledger: Ledger) -> str:
    counts = _held(ledger.finished)
    totals = {
        "papers": len({run.results["paper"] for run in ledger.finished}),
        "finished runs": len(ledger.finished),
        "claims held": f"{counts['held']} of {sum(counts.values())}",
        "failed": counts["failed"],
        "not run": counts["absent"],
        "computing": _duration(sum(run.results["seconds"] for run in ledger.finished)),
    }
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in totals.items())


def _html_list(title: str, items: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<section class="note"><h2>{title}</h2>\n<ul>{lines}</ul></section>\n' if items else ""


def _html_filters(ledger: Ledger) -> str:
    """Rows of buttons; a row with one choice would be no choice."""
    runs = ledger.finished
    presets = dict.fromkeys(run.results["preset"] for run in sorted(runs, key=preset_key))
    groups = {
        "room": {run.room: ALL_ROOMS[run.room] for run in runs},
        "status": STATUSES,
        "preset": {preset: preset for preset in presets},
    }
    rows = []
    for name, choices in groups.items():
        if len(choices) < 2:
            continue
        buttons = "".join(
            f'<button type="button" data-filter="{name}" data-value="{escape(value)}" '
            f'aria-pressed="{"false" if value else "true"}">{escape(label)}</button>'
            for value, label in {"": "all", **choices}.items()
        )
        rows.append(f'<div class="choices" role="group" aria-label="{name}"><span>{name}</span>{buttons}</div>')
    return "\n".join(rows)


def _html_claims(run: Finished, anchor: str) -> Iterable[str]:
    search = escape(f"{run.paper.title} {run.paper.authors} {ALL_ROOMS[run.room]}")
    preset = escape(run.results["preset"])
    name = escape(run.name.removeprefix(f"{run.results['paper']}:"))
    for claim in run.results["claims"]:
        kind = _kind(claim["status"])
        reason = claim["status"].removeprefix("not run").lstrip(": ") if kind == "absent" else ""
        yield (
            f'<tr data-paper="{anchor}" data-room="{run.room}" data-status="{kind}" data-preset="{preset}" '
            f'data-search="{search}"><th scope="row" data-key="{escape(run.name)}">'
            f'<a href="#{anchor}">{escape(run.results["paper"])}</a><small>{name}</small></th>'
            f'<td data-key="{list(STATUSES).index(kind)}"><span class="status {kind}">{STATUSES[kind]}</span>'
            f"<small>{escape(reason)}</small></td>"
            f"<td>{escape(claim['id'])}<small>{escape(claim['statement'])}</small></td>"
            f"<td>{escape(claim['where'])}</td><td>{escape(claim['paper'])}</td><td>{escape(claim['ours'])}</td></tr>"
        )


def _html_paper(room: str, anchor: str, runs: Sequence[Finished]) -> str:
    paper = runs[0].paper
    title = escape(paper.title)
    if paper.arxiv:
        title = f'<a href="https://arxiv.org/abs/{quote(paper.arxiv)}">{title}</a>'
    about = ", ".join(filter(None, [paper.authors, str(paper.year or "")]))
    return (
        f'<article id="{anchor}" data-room="{room}">\n<h3>{title}</h3>\n<p class="quiet">{escape(about)}</p>\n'
        + "".join(map(_html_run, runs))
        + "</article>\n"
    )


def _html_run(run: Finished) -> str:
    verdicts = "".join(
        f'<span class="status {_kind(claim["status"])}">{_verdict(claim["status"])[0]} {escape(claim["id"])}</span>'
        for claim in run.results["claims"]
    )
    facts = {"claims": verdicts or "none"} | {name: escape(text) for name, text in _facts(run).items()}
    parts = [f'<div class="run">\n<h4>{escape(run.name)}</h4>\n<dl class="facts">']
    parts += [f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items()] + ["</dl>"]
    if run.figures:
        parts += ["<h4>Figures</h4>", '<div class="figures">', *map(_html_figure, run.figures), "</div>"]
    if run.series:
        parts += ["<h4>Learning curves</h4>", '<div class="curves">', *map(_html_curve, run.series), "</div>"]
    shown, rest = seed_spreads(run.results)
    if shown:
        note = "Median and range of the seeds that gave a finite number; the others have failed."
        parts += ["<h4>Spread over seeds</h4>", f'<p class="quiet">{note}</p>', _html_spreads(shown)]
    if rest:
        parts.append(f"<details><summary>{_count(len(rest), 'more metric')}</summary>{_html_spreads(rest)}</details>")
    return "\n".join([*parts, "</div>\n"])


def _html_figure(figure: Figure) -> str:
    name = escape(figure.path.stem)
    data = base64.b64encode(figure.path.read_bytes()).decode()
    return (
        f'<figure><button type="button" class="zoom" aria-label="enlarge figure {name}"><img loading="lazy" '
        f'decoding="async" alt="{name}" width="{figure.width}" height="{figure.height}" '
        f'src="data:image/png;base64,{data}"></button><figcaption>{name}</figcaption></figure>'
    )


def _html_spreads(spreads: Iterable[Spread]) -> str:
    header = "".join(f'<th scope="col">{name}</th>' for name in SPREAD_HEADER)
    rows = []
    for spread in spreads:
        name, *cells = map(escape, _spread_cells(spread))
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return (
        '<div class="scroll" role="region" aria-label="Spread over seeds" tabindex="0"><table class="spread">'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# The drawing's units are those of the view box; the page scales it to its column.
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 336, 28, 192


def _html_curve(series: Series) -> str:
    """An SVG: every model a light line, their median a bold one; logarithmic where it helps and all is positive."""
    steps, values = series.steps, series.values
    finite = np.isfinite(values)
    low, high = float(values[finite].min()), float(values[finite].max())
    logarithmic = low > 0 and high > 3 * low  # within a factor of three a logarithmic axis has no ticks to read
    if low == high:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    scale = np.log10 if logarithmic else np.asarray
    margin = 0.04 * (high - low)
    low, high = (low / 1.1, high * 1.1) if logarithmic else (low - margin, high + margin)
    start, end = min(0.0, float(steps.min())), float(steps.max()) or 1.0

    def across(step: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (np.asarray(step) - start) / (end - start)

    def up(value: Any) -> Any:
        return BOTTOM - (BOTTOM - TOP) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    median = np.full(len(steps), np.nan)
    some = finite.any(axis=1)
    median[some] = np.nanmedian(values[some], axis=1)
    models = values.shape[1]
    drawn = np.unique(np.linspace(0, models - 1, LINES).round().astype(int))[: models if models > 1 else 0]
    parts = [f'<path class="frame" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    for tick in _ticks(low, high, logarithmic):
        y = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y}" dy=".35em">{_short(tick)}</text>')
    for tick in _ticks(start, end, False):
        x = f"{across(tick):.1f}"
        parts.append(f'<path class="frame" d="M{x} {BOTTOM}v4"/>')
        parts.append(f'<text class="middle" x="{x}" y="{BOTTOM + 17}">{tick:,.10g}</text>')
    parts += [f'<path class="model" d="{_path(across(steps), up(values[:, model]))}"/>' for model in drawn]
    parts.append(f'<path class="median" d="{_path(across(steps), up(median))}"/>')
    parts.append(f'<text class="middle" x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 4}">training step</text>')
    name = f"{series.name:.38}, {'log' if logarithmic else 'linear'} scale"
    parts.append(f'<text class="name" x="4" y="14">{escape(name)}</text>')
    ends = np.flatnonzero(some)[[0, -1]]
    told = " to ".join(f"{_number(median[end])} at step {steps[end]:,.0f}" for end in ends)
    label = f"{series.stage}, {series.name}: median of {_count(models, 'model')}, from {told}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f"<figcaption>{escape(_curve_caption(series, len(drawn)))}</figcaption></figure>"
    )


def _curve_caption(series: Series, drawn: int) -> str:
    models = series.values.shape[1]
    caption = f"{series.stage}: {_count(models, 'model')}"
    if models > 1:
        caption += f", {drawn} of them drawn, median bold" if drawn < models else ", median bold"
    lost = int((~np.isfinite(series.values[-1])).sum())
    return f"{caption}; {lost} ended without a finite value" if lost else caption


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if not logarithmic:
        ticks = MaxNLocator(4).tick_values(low, high)
    else:
        ticks = LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)).tick_values(low, high)
    ticks = [float(tick) for tick in ticks if low <= tick <= high]
    return ticks[:: 1 + len(ticks) // 7]


def _short(tick: float) -> str:
    return re.sub(r"e([+-])0*", lambda exponent: "e" + exponent[1].replace("+", ""), f"{tick:.6g}")


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    """Lines between finite neighbours; h0 makes a point without neighbours visible as a dot."""
    parts = []
    pen = "M"
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}{'h0' if pen == 'M' else ''}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(parts)
