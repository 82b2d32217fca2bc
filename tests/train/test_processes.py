"""Two processes train together: the numbers of one, one checkpoint, and a clear end where a partner dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxpapers.train import read_metrics

REPOSITORY = Path(__file__).parents[2]
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}
STEPS = 12


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(workdir, *arguments, **environment):
    workdir.mkdir(exist_ok=True)
    command = [sys.executable, "tests/train/pair.py", str(workdir), str(STEPS), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **CACHE, **environment}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def who_is_who():
    """The environment of either process."""
    address = f"localhost:{free_port()}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    return [{**common, "JAX_PROCESS_ID": str(index)} for index in range(2)]


def start_pair(workdir, *arguments):
    return [start(workdir, *arguments, **environment) for environment in who_is_who()]


def finish(processes, timeout=120):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def wait_for_step(workdir, step):
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(workdir)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with two devices: the lines of metrics.jsonl that two processes must write, too."""
    workdir = tmp_path_factory.mktemp("alone")
    output = finish([start(workdir, XLA_FLAGS="--xla_force_host_platform_device_count=2")])
    assert f"step {STEPS} on 2 devices of 1 processes" in output[0]
    return workdir


def assert_same_run(workdir, alone):
    # The same program on the same two devices: the sums over processes are of two terms, whose order does not matter.
    assert read_metrics(workdir) == read_metrics(alone)
    folder = workdir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == [str(STEPS - 2), str(STEPS)]


pytestmark = pytest.mark.xdist_group("processes")  # two processes and their test fill the two cores of CI


def test_two_processes_give_the_run_of_one(alone, tmp_path):
    outputs = finish(start_pair(tmp_path))
    assert all(f"step {STEPS} on 2 devices of 2 processes" in output for output in outputs)
    assert_same_run(tmp_path, alone)
    output = finish([start(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")])
    assert f"step {STEPS} on 4 devices of 1 processes" in output[0]  # their common checkpoint restores elsewhere


@pytest.mark.slow
def test_processes_that_share_the_rows_of_a_batch_read_the_same_ones(alone, tmp_path):
    """Both devices lie along `model`: either process holds the whole batch."""
    finish(start_pair(tmp_path, 0.0, 2))
    losses, expected = ([line["train/loss"] for line in read_metrics(folder)] for folder in (tmp_path, alone))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)  # float32: the batch's mean is one sum, not two


@pytest.mark.slow
def test_a_save_that_fails_on_the_first_process_ends_both(tmp_path):
    """The first alone writes manifests; the other must not wait for it until its silence is noticed."""
    processes = start_pair(tmp_path, 0.0, 1, "no-manifests")
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all("OSError: no manifest for checkpoint 2" in output for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0], ids=["worker", "leader"])
def test_where_one_is_killed_the_other_ends_and_both_resume(alone, tmp_path, victim):
    processes = start_pair(tmp_path, 0.2)
    wait_for_step(tmp_path, 5)
    processes[victim].kill()
    output = processes[1 - victim].communicate(timeout=60)[0]  # silent for 10 seconds: see pair.py
    assert processes[1 - victim].returncode not in (0, None)
    assert "another task died" in output or "heartbeat timeout" in output or "Connection closed by peer" in output
    processes[victim].communicate()
    finish(start_pair(tmp_path))
    assert_same_run(tmp_path, alone)


def test_sigterm_to_one_stops_both_at_one_step(alone, tmp_path):
    processes = start_pair(tmp_path, 0.2)
    wait_for_step(tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, timeout=60)
    assert max(line["step"] for line in read_metrics(tmp_path)) < STEPS
    finish(start_pair(tmp_path))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_the_command_line_in_two_processes_stops_at_sigterm_and_goes_on(tmp_path):
    options = ["systems=lorenz63", "lorenz63.updates=4000", "updates_per_call=10", "evaluate_every=4000"]
    command = [sys.executable, "-m", "experiments", "run", "alrnn:smoke", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{option}" for option in options]

    def run_pair():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": REPOSITORY}
        common = {**os.environ, "JAX_PLATFORMS": "cpu", **CACHE}
        return [subprocess.Popen(command, env={**common, **who}, **pipes) for who in who_is_who()]

    processes = run_pair()
    wait_for_step(tmp_path / "run", 100)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, timeout=60)
    stopped = [line for output in outputs for line in output.splitlines() if "stopped by SIGTERM" in line]
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]  # at one step
    outputs = finish(run_pair(), timeout=300)
    assert "lorenz63: resuming from step" in outputs[0]
    assert (tmp_path / "run" / "results.json").exists()
