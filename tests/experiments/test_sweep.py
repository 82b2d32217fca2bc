"""Sweeps: a grid of runs, here or through submitit, each in a folder of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from submitit import JobEnvironment
from submitit.core.utils import FailedJobError, pickle_load

from experiments import cli, launch, sweep
from experiments.catalogue import UsageError
from experiments.sweep import Job, Point, submit, sweep_points
from jaxpapers.train import Checkpoints, OnDevice, create_state, make_train_step, read_metrics
from tests.experiments.toy import TOY

REPOSITORY = Path(__file__).parents[2]


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
    ran: list[object] = []

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


def test_one_failure_does_not_cost_the_other_runs(toy, capsys):
    assert cli.main(["run", "toy", f"--workdir={toy / 'swept'}", "--sweep", "config.rate=-1e30,0.5"]) == 2
    assert set(finals(toy / "swept")) == {"rate=0.5"}
    said = capsys.readouterr().err
    assert "error: rate=-1e30: " in said
    assert "error: 1 of 2 runs failed: rate=-1e30" in said


def test_submitit_runs_the_points(toy):
    points = sweep_points("toy", ["rate=0.25"], ["config.seed=0,1"], toy / "swept")
    jobs = submit(points, toy / "logs", ["timeout_min=5"], cluster="debug")
    assert [job.result()["metrics"]["w"] for job in jobs] == [pytest.approx(0.75**6)] * 2
    assert set(finals(toy / "swept")) == {"seed=0", "seed=1"}
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


STEPS = 20


def noisy_run(config, run):
    """Trains one number with noise, and notes each step and the process that made it, for good."""

    def loss(params, extra, batch, key):
        return (params["w"] - jax.random.normal(key)) ** 2, (extra, {})

    def evaluate(state):
        time.sleep(config.pause)
        with (run.workdir / f"steps-{jax.process_index()}").open("a") as notes:
            notes.write(f"{os.getpid()} {int(state.step)}\n")
        return {"w": state.params["w"]}

    optimizer = optax.adam(0.1)
    fitted = run.fit(
        "toy",
        create_state({"w": jax.numpy.ones(())}, optimizer),
        make_train_step(loss, optimizer),
        OnDevice(lambda step: None),
        STEPS,
        key=jax.random.key(config.seed),
        log_every=1,
        evaluate=evaluate,
        evaluate_every=1,
        checkpoint_every=config.checkpoint_every,
        minimize="w",
    )
    return {"w": fitted.state.params["w"], "best": fitted.best.step}


def noisy_config(preset):
    config = TOY.get_config(preset)
    config.pause = 0.0
    config.checkpoint_every = STEPS  # before the end there is what a signal has saved, and nothing else
    return config


NOISY: Any = types.SimpleNamespace(**{**vars(TOY), "get_config": noisy_config, "run": noisy_run})


class NoisyPoint(Point):
    """A point that finds the noisy toy in the job's own process, too."""

    def __call__(self):
        launch.load = lambda slug: NOISY
        return super().__call__()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "load", None)
        folder = tmp_path_factory.mktemp("uninterrupted")
        NoisyPoint("toy", (), folder)()
    return folder


@pytest.fixture
def queue(toy, monkeypatch):
    """Submits one job to this machine; its processes end with the test."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
    jobs = []

    def submit_one(point, **options):
        jobs.extend(submit([point], toy / "logs", [f"{name}={value}" for name, value in options.items()], "local"))
        return jobs[-1]

    yield submit_one
    for job in jobs:
        job.cancel()
        job._process.wait(20)


def wait_for(reached):
    deadline = time.monotonic() + 120
    while not (value := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def steps_of(workdir, index=0):
    """`{process: the steps it has made}`."""
    made: dict[int, list[int]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / f"steps-{index}").read_text().splitlines():
            process, step = map(int, line.split())
            made.setdefault(process, []).append(step)
    return made


def process_at(workdir, step, index=0):
    """Waits until another process has made this step, and returns it."""

    def reached():
        made = steps_of(workdir, index)
        return next((process for process in made.keys() - {os.getpid()} if step in made[process]), None)

    return wait_for(reached)


def assert_resumed_once(workdir, index=0):
    """Two processes made every step, none of them twice; returns the last one of the first process."""
    first, second = steps_of(workdir, index).values()
    assert first + second == list(range(1, STEPS + 1))
    return first[-1]


def assert_ended_alike(workdir, uninterrupted):
    got, expected = (json.loads((folder / "results.json").read_text()) for folder in (workdir, uninterrupted))
    assert got["metrics"] == expected["metrics"]
    assert got["curves"] == expected["curves"]
    assert read_metrics(workdir) == read_metrics(uninterrupted)


@pytest.mark.parametrize(
    ("signals", "minutes", "said", "overwrite"),
    [
        # What submitit's SlurmJob._interrupt sends. The second finds the run stopped by the first.
        pytest.param((signal.SIGTERM, signal.SIGUSR2), 60, ("is preempted", "(3 remaining"), False, id="preempted"),
        # A job that was given less than ten minutes has always timed out for submitit.
        pytest.param(
            (signal.SIGUSR2,),
            5,
            ("is timed-out", "(2 remaining"),
            True,
            id="timed out, overwrites",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_job_is_queued_again_and_resumes(queue, toy, uninterrupted, signals, minutes, said, overwrite):
    workdir = toy / "run"
    if overwrite:  # only this, not what the job has made itself before it was stopped
        NoisyPoint("toy", ("rate=0.25",), workdir)()
    job = queue(NoisyPoint("toy", ("pause=0.1",), workdir, overwrite), timeout_min=minutes)
    process = process_at(workdir, 7)
    for number in signals:
        os.kill(process, number)
        time.sleep(1)
    results = job.result()
    assert results == json.loads((workdir / "results.json").read_text())
    last = assert_resumed_once(workdir)
    assert_ended_alike(workdir, uninterrupted)
    log = job.stdout() + job.stderr()
    for words in (f"toy: stopped by SIGTERM after step {last}, which is saved; to be queued again", *said):
        assert words in log


def test_after_sigterm_the_job_has_failed_and_its_run_is_saved(queue, toy, uninterrupted):
    workdir = toy / "run"
    point = NoisyPoint("toy", ("pause=0.1",), workdir)
    job = queue(point)
    os.kill(process_at(workdir, 7), signal.SIGTERM)
    with pytest.raises(FailedJobError, match="which is saved; it is not queued again") as failed:
        job.result()
    queue(point).result()
    last = assert_resumed_once(workdir)
    assert f"toy: stopped by SIGTERM after step {last}, " in str(failed.value)
    assert_ended_alike(workdir, uninterrupted)


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_during_a_save_waits_for_it(toy, monkeypatch, uninterrupted, name):
    number = signal.Signals[f"SIG{name}"]
    monkeypatch.setattr(JobEnvironment, "USR_SIG", name)
    save = Checkpoints.save
    saved: list[int] = []

    def signalled_save(self, step, tree):
        if not saved:
            signal.raise_signal(number)
        save(self, step, tree)
        saved.append(step)

    def queue_again(signum, frame):
        raise SystemExit("queued again")

    monkeypatch.setattr(Checkpoints, "save", signalled_save)
    job = Job(NoisyPoint("toy", ("checkpoint_every=5",), toy / "run"), None)
    before = signal.signal(number, queue_again)
    try:
        with pytest.raises(SystemExit, match="queued again"):
            job()
        assert signal.getsignal(number) is queue_again
        assert saved == [5, 6]
        job()
    finally:
        signal.signal(number, before)
    assert steps_of(toy / "run") == {os.getpid(): list(range(1, STEPS + 1))}
    assert_ended_alike(toy / "run", uninterrupted)


SLURM = {
    "sbatch": "echo Submitted batch job 12",
    "srun": "exit 1",
    "scontrol": 'echo "$SLURM_PROCID $@" >> requeued',
}


@pytest.mark.slow
@pytest.mark.xdist_group("processes")  # two processes and their test fill the two cores of CI
def test_the_tasks_of_a_slurm_job_stop_at_one_step_and_the_first_queues_it_again(toy, monkeypatch, uninterrupted):
    workdir = toy / "run"
    for name, line in SLURM.items():
        (toy / name).write_text(f"#!/bin/sh\n{line}\n")
        (toy / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(toy), prepend=os.pathsep)
    point = NoisyPoint("toy", ("pause=0.1",), workdir)
    (job,) = submit([point], toy / "logs", ["timeout_min=60", "tasks_per_node=2"], "slurm")
    assert job.job_id == "12"

    def start():
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            address = f"localhost:{listener.getsockname()[1]}"
        of_all = {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
            "XLA_FLAGS": "",
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": "12",
            "SLURM_NTASKS": "2",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
        }
        return [
            tasks.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "submitit.core._submit", toy / "logs"],
                    env={**os.environ, **of_all, "SLURM_PROCID": str(index), "JAX_PROCESS_ID": str(index)},
                )
            )
            for index in range(2)
        ]

    with contextlib.ExitStack() as tasks:
        first = start()
        for task in first:
            tasks.callback(task.kill)
        assert process_at(workdir, 7) == first[0].pid
        for task in first:
            task.send_signal(signal.SIGUSR2)
        assert [task.wait(120) for task in first] == [255, 0]
        assert (toy / "requeued").read_text() == "0 requeue 12\n"
        paths = [job.task(index).paths.result_pickle for index in range(2)]
        assert not any(path.exists() for path in paths)
        second = start()
        for task in second:
            tasks.callback(task.kill)
        assert [task.wait(120) for task in second] == [0, 0]
    results = [pickle_load(path) for path in paths]
    assert [outcome for outcome, _ in results] == ["success"] * 2
    assert results[0][1]["metrics"] == results[1][1]["metrics"]
    assert assert_resumed_once(workdir, 0) == assert_resumed_once(workdir, 1)
    assert_ended_alike(workdir, uninterrupted)
