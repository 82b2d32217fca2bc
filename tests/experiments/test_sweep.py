"""Sweeps: a grid of runs, here or through submitit, each in a folder of its own."""

import json
import sys

import pytest

from experiments import cli, launch, sweep
from experiments.catalogue import UsageError
from experiments.sweep import submit, sweep_points
from tests.experiments.toy import TOY


@pytest.fixture(autouse=True)
def toy_for_sweeps(toy):
    return toy


def finals(folder):
    return {path.parent.name: json.loads(path.read_text())["metrics"]["w"] for path in folder.rglob("results.json")}


def test_a_grid_of_runs_one_after_another(toy, capsys):
    command = ["run", "toy", "--sweep", "config.rate=0.5,0.25", "--sweep=config.seed=0,1", "--config.model.width=8"]
    assert cli.main(command) == 0
    folder = toy / "runs/toy/small-sweep"
    expected = {f"rate={rate},seed={seed}": pytest.approx((1 - rate) ** 6) for rate in (0.5, 0.25) for seed in (0, 1)}
    assert finals(folder) == expected
    config = json.loads((folder / "rate=0.25,seed=1" / "config.json").read_text())
    assert (config["rate"], config["seed"], config["model"]["width"]) == (0.25, 1, 8)
    assert "4 runs in runs/toy/small-sweep" in capsys.readouterr().out


def test_a_stopped_sweep_goes_on_where_it_was(toy, monkeypatch):
    ran = []

    def run(config, run):
        if len(ran) == 1 and config.seed == 1:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(config.seed)
        return TOY.run(config, run)

    monkeypatch.setattr(launch, "load", lambda slug: type("Toy", (), {**vars(TOY), "run": staticmethod(run)}))
    command = ["run", "toy", "--sweep", "config.seed=0,1,2"]
    assert cli.main(command) == 130
    assert cli.main(command) == 0
    assert ran == [0, "stopped", 1, 2]


def test_submitit_runs_the_points_and_queues_them_again_when_preempted(toy):
    points = sweep_points("toy", ["rate=0.25"], ["config.seed=0,1"], toy / "swept")
    jobs = submit(points, toy / "logs", ["timeout_min=5"], cluster="debug")
    assert [job.result()["metrics"]["w"] for job in jobs] == [pytest.approx(0.75**6)] * 2
    assert set(finals(toy / "swept")) == {"seed=0", "seed=1"}
    again = points[0].checkpoint()
    assert again.function is points[0]
    assert points[0]()["metrics"]["w"] == pytest.approx(0.75**6)  # it has finished


def test_old_results_of_another_config_are_not_passed_off_as_new(toy, capsys):
    command = ["run", "toy", "--sweep", "config.seed=0,1"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--config.rate=0.25"]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert cli.main([*command, "--config.rate=0.25", "--overwrite"]) == 0
    assert list(finals(toy / "runs/toy/small-sweep").values()) == [pytest.approx(0.75**6)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "config.seed="], "--sweep takes config.FIELD=VALUE,VALUE,..., such as config.seed=0,1,2"),
        (["--sweep", "0,1"], "--sweep takes config.FIELD=VALUE"),
        (["--sweep", "config.seed=0,1", "--strict"], "--strict goes with a single run, not with a sweep"),
        (["--sweep", "config.seed=0,1", "--record"], "--record goes with a single run, not with a sweep"),
        (["--slurm-option", "gpus_per_node=1"], "--slurm-option needs --slurm"),
        (["--sweep", "config.sed=0,1"], "unknown field config.sed; did you mean 'seed'?"),
        (["--sweep", "config.seed=0,x"], "config.seed takes a whole number such as 0, not 'x'"),
        (["--sweep", "config.seed=0", "--slurm", "--slurm-option", "gpus"], "--slurm-option takes NAME=VALUE"),
    ],
)
def test_mistakes_are_seen_before_anything_runs(toy, arguments, message, capsys):
    assert cli.main(["run", "toy", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not finals(toy)


def test_options_that_submitit_does_not_know_are_one_line(toy):
    points = sweep_points("toy", [], ["config.seed=0"], None)
    with pytest.raises(UsageError, match="submitit: Unknown argument"):
        submit(points, toy / "logs", ["slurm_partitoin=gpu"], cluster="debug")


def test_without_submitit_the_way_to_it_is_named(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[slurm\]'"):
        sweep.submit([], toy, [])
