"""The report: what it says equals what the runs left, whatever state they are in; the page works in a browser."""

import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import launch
from experiments import ledger as ledgers
from experiments.catalogue import RESULTS, UsageError
from experiments.figures import panels
from experiments.harness import Claim, Paper
from experiments.ledger import collect
from experiments.report import write_report

VOID = {"meta", "input", "img", "br", "hr", "link", "source", "wbr"}
EVIL = '<script>alert("1")</script> & | `x` *y* <img src=http://evil.example/x>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


def results(slug, preset="small", claims=(), metrics=None, **more):
    """What results.json of a run holds."""
    return {
        "paper": slug,
        "preset": preset,
        "finished": "2026-03-04T05:06:07+00:00",
        "seconds": 83.7,
        "device": "cpu x 1, 2 host cores",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "config": {"paper": slug, "preset": preset},
        "metrics": metrics or {},
        "claims": [
            {
                "id": name,
                "where": "Table 2",
                "statement": f"the statement of {name}",
                "paper": "0.386",
                "ours": ours,
                "status": status,
            }
            for name, ours, status in claims
        ],
    } | more


def leave_run(folder, contents, figures=()):
    """A folder as `run` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(contents["config"]))
    (folder / "results.json").write_text(json.dumps(contents))
    (folder / "figures").mkdir()
    for name in figures:
        figure, (ax,) = panels(1, 7.0, 4.0)
        ax.plot(np.sin(np.arange(50) / 5))
        ax.set(xlabel="time", ylabel="height")
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)
    return folder


def decay(steps, models, seed=0):
    """(steps, models) losses that fall, one of the models diverging at the end where there are three or more."""
    rng = np.random.default_rng(seed)
    losses = np.exp(-np.linspace(0, 6, steps))[:, None] + 0.003
    losses = losses * np.exp(0.2 * rng.standard_normal((steps, models)))
    if models > 2:
        losses[-steps // 5 :, -1] = np.nan
    return losses


def in_json(array):
    return [[value if math.isfinite(value) else "nan" for value in row] for row in array.tolist()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five finished runs in four rooms, an unfinished one, a corrupt one, a figure that is no PNG."""
    folder = tmp_path_factory.mktemp("runs")
    steps = list(range(100, 10_100, 100))
    leave_run(
        folder / "pararnn" / "small",
        results(
            "pararnn",
            claims=[("exact", "1.5e-07", "holds"), ("speed", "3.1x, 2.9x, 3.0x", "fails")],
            metrics={
                "gru/perplexity": [20.5, 19.25, 21.125],
                "gru/failed": [0.5, "nan", 0.25],
                "gru/all_failed": ["nan", "inf"],
                "gru/accuracy": 0.875,
                "gru/attention": [[1.0, 2.0], [3.0]],
                "gru/converged": [True, False],
                "note": "synthetic",
                **{f"sweep/width={width}/loss": [width / 7, width / 3] for width in range(1, 31)},
            },
            curves={
                "gru": {
                    "train/loss": [steps, in_json(decay(100, 5))],
                    "train/grad_norm": [steps, in_json(decay(100, 5))],
                    "eval/accuracy": [steps[::10], [[0.9 + 0.001 * i] for i in range(10)]],
                    "eval/gap": [steps, [0.001 * (i - 40) for i in range(100)]],
                    "eval/finite": [steps[::10], [[True, True]] * 10],
                }
            },
        ),
        figures=["speed", "perplexity"],
    )
    leave_run(
        folder / "matryoshka" / "small",
        results("matryoshka", claims=[("nested", "0.91", "holds"), ("adaptive", "", "not run: no imagenet/top1")]),
        figures=["nested"],
    )
    leave_run(folder / "matryoshka" / "smoke", results("matryoshka", "smoke", [("nested", "0.31", "fails")]))
    stages = leave_run(
        folder / "ntk" / "small",
        results("ntk", claims=[("kernel_is_constant", "0.0021 (5 seeds)", "holds"), (EVIL, EVIL, f"not run: {EVIL}")]),
    )
    lines = [
        {"stage": "wide", "step": step, "train/loss": row, "train/grad_norm": row}
        for step, row in zip(range(1, 1001), in_json(decay(1000, 3)), strict=True)
    ]
    (stages / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "wi')
    leave_run(folder / "elsewhere" / "x", results("not in the catalogue", claims=[("c", "1", "holds")]))

    unfinished = folder / "mgno" / "small"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps({"paper": "mgno", "preset": "small"}))
    (unfinished / "metrics.jsonl").write_text('{"stage": "darcy", "step": 12500, "train/loss": 0.5}\n')
    corrupt = folder / "nlse" / "small"
    corrupt.mkdir(parents=True)
    (corrupt / "results.json").write_text('{"paper": "nlse", "metr')
    (folder / "matryoshka" / "smoke" / "figures" / "torn.png").write_bytes(b"\x89PNG\r\n")
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    markdown, page = write_report(runs, tmp_path_factory.mktemp("report"))
    return markdown.read_text(encoding="utf8"), page.read_text(encoding="utf8")


class Page(HTMLParser):
    """Reads a page: the tags must be balanced; keeps ids, addresses, tables (rows of cells' texts), scripts, text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tables, self.tags, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("src", "href", "action", "data") if name in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def count(self, tag, **wanted):
        return sum(name == tag and wanted.items() <= attributes.items() for name, attributes in self.tags)


def markdown_tables(text):
    """The tables of a Markdown text: rows of cells, markup undone; every row as wide as its header."""
    tables, last = [], None
    for number, line in enumerate(text.splitlines()):
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        cells = [re.sub(r"\\([\\`*\[\]|~_])", r"\1", cell) for cell in cells]
        cells = [cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in cells]
        if last != number - 1:
            tables.append([])
        if set(cells) != {"---"}:
            tables[-1].append(cells)
        assert len(cells) == len(tables[-1][0])
        last = number
    return tables


def spread_by_hand(values):
    """The cells of a metric, by statistics.median."""
    numbers = [float(value) for value in (values if isinstance(values, list) else [values])]
    finite = [number for number in numbers if math.isfinite(number)]
    median = f"{statistics.median(finite):.4g}" if finite else "–"
    extent = f"{min(finite):.4g} to {max(finite):.4g}" if finite and len(numbers) > 1 else "–"
    return [median, extent, str(len(numbers)), str(len(numbers) - len(finite)) if len(finite) < len(numbers) else "–"]


def all_results(folder):
    """Every results.json that can be read."""
    found = []
    for path in folder.rglob("results.json"):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError:
            continue
    return found


def words(text):
    return " ".join(text.split())


def test_page_is_well_formed_and_loads_nothing(report):
    page = Page(report[1])
    assert len(page.ids) == len(set(page.ids))
    anchors = {address[1:] for address in page.addresses if address.startswith("#")}
    assert anchors == {"pararnn", "matryoshka", "ntk", "not-in-the-catalogue"}
    assert anchors <= set(page.ids)
    elsewhere = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert elsewhere
    assert all(address.startswith("https://arxiv.org/abs/") for address in elsewhere)
    assert not re.search(r"@import|url\(", report[1])
    assert page.count("script") == 1  # ours: the claim with <script> in it has become text
    assert page.count("img", loading="lazy") == 3
    assert EVIL in "".join(page.text)


def test_both_reports_say_what_every_claim_says(runs, report):
    wanted = {}
    for run in all_results(runs):
        for claim in run["claims"]:
            status = {"holds": "✓ held", "fails": "✗ failed"}.get(claim["status"], f"– {claim['status']}")
            texts = (claim["where"], claim["paper"], claim["ours"])
            wanted[run["paper"], run["preset"], claim["id"]] = claim["statement"], *texts, status
    table = markdown_tables(report[0])[0]
    assert table[0] == ["room", "paper", "claim", "where", "paper's figure", "ours", "status"]
    from_markdown = {}
    for _, name, claim, *rest in table[1:]:
        slug, preset = name.split(":")
        identity, statement = claim.split(": the statement of ")
        from_markdown[slug, preset, identity] = f"the statement of {statement}", *rest
    assert from_markdown == wanted

    header, *rows = Page(report[1]).tables[0]
    assert header == ["paper", "status", "claim", "where", "paper's figure", "ours"]
    assert len(rows) == len(wanted)
    for key, (statement, where, figure, ours, status) in wanted.items():
        slug, preset, identity = key
        row = [slug + preset, status.replace("not run: ", "not run"), identity + statement, where, figure, ours]
        assert row in rows


def test_spread_over_seeds_is_that_of_the_metrics(runs, report):
    metrics = json.loads((runs / "pararnn" / "small" / "results.json").read_text())["metrics"]
    left_out = {"gru/attention", "gru/converged", "note"}  # not one number a seed
    wanted = {name: spread_by_hand(value) for name, value in metrics.items() if name not in left_out}
    assert wanted["gru/failed"] == ["0.375", "0.25 to 0.5", "3", "1"]
    for tables in (markdown_tables(report[0]), Page(report[1]).tables):
        shown, rest = (table for table in tables if table[0][0] == "metric")
        assert len(shown) - 1 == 20
        got = {name: cells for name, *cells in (*shown[1:], *rest[1:])}
        assert got == wanted


def test_metrics_that_the_claims_look_at_come_first(tmp_path, monkeypatch):
    claims = (
        Claim("a", "", "", "", ours=lambda m: f"{m['z/9']}", holds=lambda m: m.get("z/3", 0) > 0),
        Claim("b", "", "", "", ours=lambda m: m["no such"], holds=lambda m: True),
    )
    experiment = type("Experiment", (), {"CLAIMS": claims, "PAPER": Paper("Toy", "A. Nobody", 2026, "")})
    monkeypatch.setattr(ledgers, "implemented", lambda: {"toy": Path("experiments/theory/toy.py")})
    monkeypatch.setattr(ledgers, "load", lambda slug: experiment)
    leave_run(tmp_path / "toy", results("toy", metrics={f"z/{i}": [i, i + 1] for i in range(12)}))
    shown, rest = ledgers.seed_spreads(collect(tmp_path).finished[0].results)
    assert [spread.name for spread in shown] == ["z/3", "z/9"]
    assert len(rest) == 10


def test_totals_facts_rooms_and_order(report):
    markdown, html = report
    assert "4 papers, 5 finished runs: 4 of 8 claims held, 2 failed, 2 not run; 6 min 58 s (418.5 s)" in markdown
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings == ["Claims", "Sequence models", "Representation learning", "Theory", "Other"]
    assert re.findall(r"^#### ([^:]*:\w*)", markdown, re.MULTILINE)[1:3] == ["matryoshka:smoke", "matryoshka:small"]
    text = words(" ".join(Page(html).text))
    for fact in ("4 of 8", "6 min 58 s", "1 min 24 s (83.7 s)", "cpu x 1, 2 host cores", "python 3.11.7, jax 0.10.2"):
        assert fact in text
    assert "Matryoshka Representation Learning" in text
    assert "Kusupati" in text


def test_unfinished_and_unreadable_runs_are_named(report):
    for text in (report[0], " ".join(Page(report[1]).text)):
        assert "mgno:small (mgno/small): darcy, step 12,500" in text
        assert "nlse/small/results.json: Unterminated string" in text
        assert "torn.png: is not a PNG file" in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[1]", "holds a list"),
        ('{"paper": "ntk"}', "preset is missing"),
        ("\xff", "codec"),
        ("[" * 100_000, "recursion"),
        (json.dumps(results("ntk", seconds="long")), "seconds is wrong: 'long'"),
        (json.dumps(results("ntk", seconds=float("nan"))), "seconds is nan"),
        (json.dumps(results("ntk", claims=[("a", 3.0, "holds")])), "a claim is"),
        (json.dumps(results("ntk", curves={"stage": {"train/loss": [[1, 2], [0.1]]}})), "curves: ValueError"),
        (json.dumps(results("ntk", curves=[1])), "curves: AttributeError"),
    ],
)
def test_a_corrupt_file_does_not_stop_the_report(tmp_path, text, reason):
    leave_run(tmp_path / "runs" / "good", results("matryoshka", claims=[("nested", "0.91", "holds")]))
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "results.json").write_bytes(text.encode("latin1"))
    markdown, page = write_report(tmp_path / "runs", tmp_path)
    for report in (markdown.read_text(encoding="utf8"), "".join(Page(page.read_text(encoding="utf8")).text)):
        assert re.search(rf"bad/results\.json: .*{reason}", report)
        assert "nested" in report


def test_odd_numbers_do_not_stop_the_report(tmp_path):
    """Huge, not finite, constant, ragged; text that UTF-8 cannot hold; metrics.jsonl with lines of another kind."""
    values = {"a": [1e308, -1e308], "b": ["inf", "nan"], "c": [5, 5], "d": [[1], [1, 2]], "e": ["x", 1], "f": [None, 1]}
    curves = {name: [[1, 2], column] for name, column in values.items()}
    metrics = {"huge": [10**400, 1], "overflow": 1e308, "empty": [], "text": "nan"}
    odd = results("ntk", metrics=metrics, curves={"s": curves}, claims=[("a", "\ud800 \x00", "holds")])
    leave_run(tmp_path / "odd", odd)
    lines = leave_run(tmp_path / "lines", results("ntk", "smoke"))
    (lines / "metrics.jsonl").write_text('[1]\n3\n{"step": 1}\n{"stage": "s", "step": 1, "a": 2}\n')
    page = Page(write_report(tmp_path, tmp_path / "out")[1].read_text(encoding="utf8"))
    assert page.count("svg") == 2  # c, and f with its one point: the others hold no number that can be drawn
    assert [row[0] for row in page.tables[1]] == ["metric", "overflow", "text"]


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_nothing_to_report_is_an_error_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"{name}'"):
        write_report(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_default_folder_is_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'runs'"):
        write_report(None, Path("out"))
    leave_run(tmp_path / "runs" / "ntk" / "small", results("ntk"), figures=["a b#c"])
    markdown, _ = write_report(None, Path("out"))
    link = "../runs/ntk/small/figures/a%20b%23c.png"
    assert f"]({link})" in markdown.read_text()


def test_curves_are_the_recorded_ones_or_those_of_the_metrics_file(runs):
    by_paper = {run.results["paper"]: run for run in collect(runs).finished if run.series}
    assert set(by_paper) == {"pararnn", "ntk"}
    loss, accuracy, gap = by_paper["pararnn"].series  # gradient norms are left out
    assert (loss.name, accuracy.name, gap.name) == ("train/loss", "eval/accuracy", "eval/gap")
    np.testing.assert_array_equal(loss.values, decay(100, 5))
    np.testing.assert_array_equal(accuracy.steps, range(100, 10_100, 1000))
    (thinned,) = by_paper["ntk"].series
    assert len(thinned.steps) == 200
    np.testing.assert_array_equal(thinned.steps[[0, -1]], [1, 1000])
    np.testing.assert_array_equal(thinned.values, decay(1000, 3)[thinned.steps.astype(int) - 1])


def test_curves_that_a_run_records_are_those_of_its_metrics_file(tmp_path):
    """`launch.curves` rounds to four digits and thins: the same curves, to that."""
    from_file = leave_run(tmp_path / "file", results("ntk", "small"))
    lines = []
    for step, row in enumerate(in_json(decay(120, 3)), 1):
        lines.append({"stage": "wide", "step": step, "train/loss": row})
        if step % 10 == 0:
            lines.append({"stage": "wide", "step": step, "eval/score": row[0]})
    (from_file / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    leave_run(tmp_path / "recorded", results("ntk", "smoke", curves=launch.curves(from_file)))
    recorded, read = (run.series for run in collect(tmp_path).finished)
    assert [series.name for series in recorded] == ["train/loss", "eval/score"]
    for one, other in zip(recorded, read, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one.steps, other.steps)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3)


def test_runs_of_a_sweep_are_told_apart(tmp_path):
    for seed in (0, 1):
        run = results("ntk", claims=[("kernel", f"0.{seed}", "holds")])
        leave_run(tmp_path / "ntk" / "small-sweep" / f"seed={seed}", run)
    leave_run(tmp_path / "ntk" / "smoke", results("ntk", "smoke", claims=[("kernel", "0.7", "fails")]))
    markdown, page = (path.read_text(encoding="utf8") for path in write_report(tmp_path, tmp_path))
    names = [row[1] for row in markdown_tables(markdown)[0][1:]]
    assert names == ["ntk:smoke", *(f"ntk:small (ntk/small-sweep/seed={seed})" for seed in (0, 1))]
    html = Page(page)
    assert [row[0] for row in html.tables[0][1:]] == [name.replace(":", "", 1) for name in names]
    assert html.ids == ["ntk"]


def test_curves_are_drawn_to_scale(report):
    """Pixels of the median, through the axis' own tick labels, give the numbers back."""
    svg = next(part for part in re.findall(r"<svg.*?</svg>", report[1], re.DOTALL) if "gru, train/loss" in part)
    assert "train/loss, log scale" in svg
    assert "training step" in svg
    assert svg.count('class="model"') == 5
    ticks = re.findall(r'<text class="end" x="\d+" y="([\d.]+)" dy=".35em">([^<]+)</text>', svg)
    heights, labels = np.array(ticks, dtype=float).T
    slope, offset = np.polyfit(heights, np.log10(labels), 1)
    path = re.search(r'class="median" d="([^"]+)"', svg)[1]
    drawn = np.array(re.findall(r"[ML][\d.]+ ([\d.]+)", path), dtype=float)
    # A tenth of a pixel is what the path is rounded to; the ticks it is read against as well.
    np.testing.assert_allclose(10 ** (slope * drawn + offset), np.nanmedian(decay(100, 5), axis=1), rtol=0.02)
    assert "linear scale" in next(part for part in re.findall(r"<svg.*?</svg>", report[1], re.DOTALL) if "gap" in part)


def test_recorded_results_make_the_gallery(tmp_path):
    markdown, page = write_report(RESULTS, tmp_path)
    recorded = {path.stem: json.loads(path.read_text(encoding="utf8")) for path in RESULTS.glob("*.json")}
    html, text = Page(page.read_text(encoding="utf8")), markdown.read_text(encoding="utf8")
    assert html.count("article") == len(recorded)
    assert "Not readable" not in text
    assert html.count("button", **{"class": "zoom"}) == len(list(RESULTS.glob("*.png")))
    cells = [{words(cell) for cell in row} for row in html.tables[0]]
    for slug, results in recorded.items():
        assert slug in html.ids
        for claim in results["claims"]:
            assert any({words(claim["paper"]), words(claim["ours"])} <= row for row in cells)
        assert f"({results['seconds']:,} s)" in text
    for link in re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE):
        assert (tmp_path / link).resolve().is_file()


def test_same_runs_give_the_same_bytes(runs, tmp_path):
    first, second = ([path.read_bytes() for path in write_report(runs, tmp_path / "out")] for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, runs, tmp_path):
    """The page from its file, at desktop width; whatever the console says in the end is a failure."""
    _, page = write_report(runs, tmp_path)
    resize(browser, 1280)
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def resize(browser, width):
    """Headless windows have a least width; device metrics have none."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shown(browser, selector="table.claims tbody tr"):
    return [element for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def column(browser, number):
    return [row.find_elements("css selector", "th, td")[number].text for row in shown(browser)]


def press(browser, text, within="body"):
    xpath = f"//{within}//button[normalize-space()={text!r}]"
    browser.find_element("xpath", xpath).click()


def test_browser_sorts(opened):
    first = column(opened, 2)
    header = opened.find_element("xpath", "//th[normalize-space()='ours']")
    button = header.find_element("tag name", "button")
    numbers = []
    for order in ("ascending", "descending", "none"):
        button.send_keys("\ue007")  # Enter: the keyboard alone is enough
        assert header.get_attribute("aria-sort") == order
        numbers.append([float(text.split()[0].rstrip("x,")) for text in column(opened, 5) if text[:1].isdigit()])
    assert numbers[0] == sorted(numbers[0]) == numbers[1][::-1]
    assert len(numbers[0]) == 6
    assert column(opened, 2) == first
    press(opened, "status", "thead")
    assert [text.split()[1] for text in column(opened, 1)] == ["held"] * 4 + ["failed"] * 2 + ["not"] * 2
    assert len(opened.find_elements("css selector", "[aria-sort=ascending], [aria-sort=descending]")) == 1


def test_browser_filters(opened):
    def papers():
        return [element.get_attribute("id") for element in shown(opened, "article")]

    def told():
        return opened.find_element("css selector", "[role=status]").text

    everything = papers()
    press(opened, "Representation learning")
    assert papers() == ["matryoshka"]
    assert told() == "showing 3 of 8 claims"
    assert opened.find_element("css selector", "[data-value=representation]").get_attribute("aria-pressed") == "true"
    press(opened, "✗ failed")
    assert column(opened, 0) == ["matryoshka\nsmoke"]
    press(opened, "all", "div[@aria-label='room']")
    assert papers() == ["pararnn", "matryoshka"]
    press(opened, "all", "div[@aria-label='status']")
    search = opened.find_element("css selector", "input")
    search.send_keys("Tangent CONSTANT")  # a word of the title, one of the claim
    assert [text.split("\n")[0] for text in column(opened, 2)] == ["kernel_is_constant"]
    assert [element.text for element in shown(opened, ".room > h2")] == ["Theory"]
    assert len(shown(opened, ".papers li")) == 1
    search.clear()
    search.send_keys("x\ue003")  # a letter, and Backspace
    assert papers() == everything
    assert told() == "showing 8 of 8 claims"


def test_browser_opens_and_closes_a_figure(opened):
    button = opened.find_elements("css selector", ".zoom")[1]
    small = button.find_element("tag name", "img")
    dialog = opened.find_element("tag name", "dialog")
    for close in ("escape", "click", "button"):
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.send_keys("\ue007")
        assert dialog.is_displayed()
        large = dialog.find_element("tag name", "img")
        assert large.get_attribute("src") == small.get_attribute("src")
        assert large.size["width"] > 1.3 * small.size["width"]
        assert "speed" in dialog.text
        if close == "escape":
            opened.switch_to.active_element.send_keys("\ue00c")
        elif close == "click":
            large.click()
        else:
            press(opened, "Close", "dialog")
        assert not dialog.is_displayed()
        assert opened.switch_to.active_element == button
        assert dialog.find_elements("tag name", "img") == []


@pytest.mark.parametrize("width", [390, 1280])
def test_browser_shows_all_within_the_width(opened, width):
    resize(opened, width)
    for details in opened.find_elements("tag name", "summary"):
        details.click()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """
      return [...document.querySelectorAll("body *")].filter(element => !element.closest(".scroll, dialog, svg")
        && element.getBoundingClientRect().right > innerWidth + 0.5).map(element => element.outerHTML.slice(0, 80))"""
    assert opened.execute_script(outside) == []
    opened.find_element("css selector", ".zoom").click()
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


def test_browser_loads_every_figure_and_nothing_else(opened):
    for image in opened.find_elements("css selector", ".zoom img"):
        opened.execute_script("arguments[0].scrollIntoView()", image)
        opened.execute_async_script("arguments[0].decode().then(arguments[1])", image)
        size = opened.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image)
        assert size == [int(image.get_dom_attribute(name)) for name in ("width", "height")]
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def contrast(first, second):
    """WCAG's contrast ratio of two `rgb(r, g, b)`."""
    luminances = []
    for colour in (first, second):
        channels = np.array(re.findall(r"[\d.]+", colour)[:3], dtype=float) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminances.append(linear @ [0.2126, 0.7152, 0.0722])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_is_legible_in_both_schemes(opened, scheme):
    """4.5 is WCAG AA's least contrast for text."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    colours = """
      const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
      const texts = [".held", ".failed", ".absent", "article a", "article dd", "article dt", "figcaption"];
      return [colour("article", "backgroundColor"), texts.map(text => colour(text, "color"))];
    """
    background, texts = opened.execute_script(colours)
    assert (contrast(background, "rgb(0, 0, 0)") > 10) == (scheme == "light")
    assert min(contrast(background, text) for text in texts) > 4.5
