"""The harness: targets, overrides, claims, the workdir's rules, the command line; on a toy experiment."""

import itertools
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from experiments import catalogue, cli, launch
from experiments.catalogue import UsageError
from experiments.harness import PRESETS, Claim, Paper, Run, check_claims
from experiments.ledger import collect
from experiments.overrides import override
from experiments.report import markdown
from jaxpapers.data.download import CorruptData, DataNotFound
from jaxpapers.train import make_mesh, read_metrics
from tests.experiments.toy import CRASH, TOY, toy_config

REPOSITORY = Path(__file__).parents[2]


def test_claims_hold_fail_or_are_not_run():
    slip = Claim("slip", "", "", "", lambda m: "", lambda m: 1 / 0)
    assert check_claims([slip], {})[0]["status"] == "not run: ZeroDivisionError: division by zero"
    claims = check_claims(TOY.CLAIMS, {"w": 0.01})
    assert [claim["status"] for claim in claims] == ["holds", "fails", "not run: no v"]
    assert [claim["ours"] for claim in claims] == ["0.010", "0.010", ""]


def test_data_without_a_file_are_left_out_with_a_word(tmp_path, capsys):
    def read(name):
        if name == "absent":
            raise DataNotFound("no file")
        if name == "corrupt":
            raise CorruptData("half a file")
        return len(name)

    run = Run(tmp_path, Console(width=100))
    assert run.load(("one", "absent", "three"), read) == ({"one": 3, "three": 5}, {"absent/left_out": "no file"})
    assert capsys.readouterr().out == "absent is left out: no file\n"
    assert run.load(["absent"], read, said="texts of {} are", key="lm/{}") == ({}, {"lm/absent/left_out": "no file"})
    assert capsys.readouterr().out == "texts of absent are left out: no file\n"
    with pytest.raises(CorruptData):
        run.load(["corrupt"], read)


def test_a_run_leaves_what_the_design_promises(toy, capsys):
    assert cli.main(["run", "toy", "--config.model.width=8", "--config.rate", "0.25"]) == 0
    folder = toy / "runs/toy/small"
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["config"]["model"] == {"width": 8}
    assert results["config"]["rate"] == 0.25
    assert results["metrics"]["w"] == pytest.approx(0.75**6, rel=1e-6)
    assert results["metrics"]["lost"] == "nan"
    assert results["metrics"]["list"] == [0, 1, 2]
    assert {"jax", "python"} <= set(results["versions"])
    assert (folder / "figures/line.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_metrics(folder, "toy")) == 9
    assert (folder / "checkpoints/toy").is_dir()
    printed = capsys.readouterr().out
    assert "not run: no v" in printed
    assert "0 of 3 claims hold" in printed  # 0.75**6 = 0.178


def test_a_finished_run_is_not_overwritten_by_accident(toy, capsys):
    assert cli.main(["run", "toy"]) == 0
    assert cli.main(["run", "toy"]) == 2
    assert "finished run" in capsys.readouterr().err
    assert cli.main(["run", "toy", "--overwrite"]) == 0
    (toy / "mine").mkdir()
    (toy / "mine" / "thesis.tex").write_text("years of work")
    assert cli.main(["run", "toy", "--workdir=mine", "--overwrite"]) == 2
    assert (toy / "mine" / "thesis.tex").exists()


def test_an_unfinished_run_is_resumed_with_the_same_config_only(toy, capsys, monkeypatch):
    monkeypatch.setitem(CRASH, "on", True)
    arguments = ["run", "toy", "--config.crash=true"]
    assert cli.main(arguments) == 130
    assert not (toy / "runs/toy/small/results.json").exists()
    assert cli.main([*arguments, "--config.seed=1"]) == 2
    assert "another config (it differs in seed)" in capsys.readouterr().err
    monkeypatch.setitem(CRASH, "on", False)
    assert cli.main(arguments) == 0
    assert "resuming from step 4" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(toy / "runs/toy/small") if "train/loss" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_run_that_trained_nothing_yet_takes_another_config(toy, monkeypatch):
    def fails(config, run):
        raise ValueError("a mistyped value")

    broken = types.SimpleNamespace(**{**vars(TOY), "run": fails})
    monkeypatch.setattr(launch, "load", lambda slug: broken)
    assert cli.main(["run", "toy", "--config.seed=1"]) == 2
    monkeypatch.setattr(launch, "load", lambda slug: TOY)
    assert cli.main(["run", "toy", "--config.seed=2"]) == 0


def test_a_second_run_in_the_same_folder_is_refused(toy, capsys):
    with launch._held(toy / "runs/toy/small"):
        assert cli.main(["run", "toy"]) == 2
        said = capsys.readouterr().err
        assert (
            f"runs/toy/small is in use by another run: process {os.getpid()} on {socket.gethostname()}, since" in said
        )
    assert cli.main(["run", "toy"]) == 0


def test_seconds_count_all_sittings(toy, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(launch.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setitem(CRASH, "on", True)
    assert cli.main(["run", "toy", "--config.crash=true"]) == 130
    before = float((toy / "runs/toy/small/.seconds").read_text())
    monkeypatch.setitem(CRASH, "on", False)
    assert cli.main(["run", "toy", "--config.crash=true"]) == 0
    assert before > 0
    assert json.loads((toy / "runs/toy/small/results.json").read_text())["seconds"] > before


def test_strict_makes_failing_claims_count(toy):
    assert cli.main(["run", "toy", "--strict"]) == 1


def test_record_keeps_small_runs_only(toy):
    assert cli.main(["run", "toy:smoke", "--record"]) == 2
    assert cli.main(["run", "toy", "--record", "--config.seed=1"]) == 2
    assert cli.main(["run", "toy", "--record"]) == 0
    assert sorted(path.name for path in (toy / "recorded").iterdir()) == ["README.md", "toy.json", "toy.png"]
    stages = json.loads((toy / "recorded" / "toy.json").read_text())["curves"]
    assert stages["toy"]["train/loss"] == [
        [1, 2, 3, 4, 5, 6],
        [pytest.approx(0.5 * 0.25**n, rel=1e-3) for n in range(6)],
    ]
    assert stages["toy"]["eval/w"][0] == [2, 4, 6]


def test_record_refuses_a_run_with_parts_missing(toy, monkeypatch, capsys):
    partial = types.SimpleNamespace(**{**vars(TOY), "run": lambda config, run: {"ecg/left_out": "no network"}})
    monkeypatch.setattr(launch, "load", lambda slug: partial)
    assert cli.main(["run", "toy", "--record"]) == 2
    assert "not recorded, as parts of the run are missing: ecg/left_out" in capsys.readouterr().err
    assert not (toy / "recorded").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "unknown command 'lst'; did you mean 'list'?"),
        (["list", "--markdwon"], "unknown option '--markdwon'; did you mean '--markdown'?"),
        (["run"], "required: SLUG[:PRESET]"),
        (["run", "alrn"], "unknown paper 'alrn'; did you mean 'alrnn'?"),
        (["run", "tactile_ead"], "paper 'tactile_ead' is planned"),
        (["run", "alrnn:tiny"], "unknown preset 'tiny'; known: paper, small, smoke"),
        (["run", "alrnn:smal"], "unknown preset 'smal'; did you mean 'small'?"),
        (["run", "alrnn", "--config.sed=3"], "unknown field config.sed; did you mean 'seed'?"),
        (["run", "alrnn", "--config.seed=x"], "config.seed takes a whole number such as 0, not 'x'"),
        (["run", "alrnn", "--config.seed"], "--config.seed needs a value"),
        (["run", "alrnn", "--conf.seed=1"], "unknown option '--conf.seed=1'"),
        (["run", "alrnn", "--overwrit"], "unknown option '--overwrit'; did you mean '--overwrite'?"),
        (["run", "experiments/sequence/alrn.py:smoke"], "did you mean 'experiments/sequence/alrnn.py'?"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_errors_of_the_experiment_are_one_line_unless_asked(toy, capsys, monkeypatch):
    def fails(config, run):
        raise ValueError("the data are\nupside down")

    monkeypatch.setattr(launch, "load", lambda slug: types.SimpleNamespace(**{**vars(TOY), "run": fails}))
    assert cli.main(["run", "toy"]) == 2
    assert "error: the data are upside down" in capsys.readouterr().err
    monkeypatch.setenv("JAXPAPERS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="upside"):
        cli.main(["run", "toy"])


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=3", 3),
        ("rate=1", 1.0),
        ("rate=1e-3", 1e-3),
        ("name=adam", "adam"),
        ("fast=false", False),
        ("sizes=3,4,5", (3, 4, 5)),
        ("sizes=(7,)", (7,)),
        ("model.width=16", 16),
    ],
)
def test_overrides_take_the_type_of_the_preset(assignment, expected):
    config = toy_config()
    override(config, [assignment])
    value = config
    for name in assignment.split("=")[0].split("."):
        value = value[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sead=3", "unknown field config.sead; did you mean 'seed'?"),
        ("model.with=3", "unknown field config.model.with; did you mean 'width'?"),
        ("model=3", "config.model is a group; set one of its fields: width"),
        ("seed.width=3", "config.seed is a value, it has no fields"),
        ("seed=1.5", "config.seed takes a whole number such as 0, not '1.5'"),
        ("rate=fast", "config.rate takes a finite number such as 0.5, not 'fast'"),
        ("fast=3", "config.fast takes true or false such as True, not '3'"),
        ("sizes=a,b", r"config.sizes takes a list such as (1, 2), not 'a,b'"),
    ],
)
def test_bad_overrides_are_named(assignment, message):
    with pytest.raises(UsageError) as error:
        override(toy_config(), [assignment])
    assert message in str(error.value)


def test_the_catalogue_has_47_papers_once_each():
    planned, implemented = catalogue.planned(), catalogue.implemented()
    assert not set(planned) & set(implemented)
    assert len(planned) + len(implemented) == 47
    assert {row["room"] for row in planned.values()} <= set(catalogue.ROOMS)


@pytest.mark.parametrize("slug", sorted(catalogue.implemented()))
def test_every_experiment_keeps_the_contract(slug):
    experiment = catalogue.load(slug)
    assert isinstance(experiment.PAPER, Paper)
    assert len({claim.id for claim in experiment.CLAIMS}) == len(experiment.CLAIMS) > 0
    for preset in PRESETS:
        config = experiment.get_config(preset)
        json.dumps(config.to_dict())
        experiment.check_config(config)
    assert experiment.__doc__
    assert experiment.COVER


@pytest.mark.slow
@pytest.mark.parametrize("slug", sorted(catalogue.implemented()))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_programs_to_be_planned(slug, preset):
    experiment = catalogue.load(slug)
    config = experiment.get_config(preset)
    if "only" in config:  # 400 stages are traced in minutes
        config.only = tuple(config.stages)[:4]
    if (slug, preset) == ("adafortitran", "small"):
        config.training.batch_size = 8  # two devices do not divide its 5
    assert experiment.programs(config, make_mesh(data=2, model=4))


@pytest.mark.parametrize("slug", [path.stem for path in sorted(catalogue.RESULTS.glob("*.json"))])
def test_the_record_is_of_todays_config_and_claims(slug):
    record = catalogue.recorded(slug)
    settings = launch.settings_of(slug, "small", launch.configure(slug, "small"))
    assert record["config"] == settings, f"run `python -m experiments run {slug} --record` again"
    claims = [(claim.id, claim.statement) for claim in catalogue.load(slug).CLAIMS]
    assert [(row["id"], row["statement"]) for row in record["claims"]] == claims
    assert check_claims(catalogue.load(slug).CLAIMS, record["metrics"]) == record["claims"]
    assert record["seconds"] < 15 * 60


def test_the_gallery_is_fresh():
    gallery = (catalogue.RESULTS / "README.md").read_text(encoding="utf8")
    assert gallery == markdown(collect(catalogue.RESULTS), catalogue.RESULTS)
    for path in catalogue.RESULTS.glob("*.json"):
        assert f"]({path.stem}.png)" in gallery


def test_the_readme_table_is_fresh():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf8")
    assert catalogue.markdown_table() in readme, "paste `python -m experiments list --markdown` into README.md"


def test_help_and_list_work_as_typed(capsys):
    def output(*arguments):
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout

    assert "--config FILE[:PRESET]" in output("experiments.run", "--help")
    assert "pararnn" in output("experiments", "list")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "--help"])
    assert "--config.seed=1" in capsys.readouterr().out
