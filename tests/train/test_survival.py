"""Training that survives: real processes, killed, stopped, robbed of their disk, and started again.

The victim is `victim.py`, a small transformer; AL-RNN's experiment goes the same way through the command line.
Whatever happens to a run, in the end its checkpoint and its metrics.jsonl have the bits of a run that was left alone.
"""

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments import cli
from jaxpapers.train import (
    Checkpoints,
    MetricsWriter,
    NonFiniteLoss,
    OnDevice,
    Terminated,
    create_state,
    fit,
    make_train_step,
)

REPOSITORY = Path(__file__).parents[2]
VICTIM = (sys.executable, str(REPOSITORY / "tests" / "train" / "victim.py"))
STEPS = 30
SEED = 20240
KEY = jax.random.key(0)
PATIENCE = 120  # seconds for what takes two or three: the machine may be busy


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, a cache of these tests alone, and no torch, which tensorboardX would import."""
    without_torch = tmp_path_factory.mktemp("path")
    (without_torch / "torch.py").write_text("raise ImportError\n")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "survival"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{without_torch}:{REPOSITORY}",
    }


@pytest.fixture
def start(environment):
    """Starts processes; none of them outlives the test."""
    started = []

    def start(*command):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """`steps -> workdir` of a victim that nobody disturbed."""

    @functools.cache
    def workdir(steps):
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        subprocess.run([*VICTIM, folder, f"--steps={steps}"], env=environment, check=True, capture_output=True)
        return folder

    return workdir


def finish(process, code=0):
    """Waits for the process; returns what it said on stderr."""
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, said
    return said


def wait_until(happened, process):
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(2e-3)  # a save takes a hundred times as long


def steps_logged(workdir, stage="main"):
    """Step of the last whole line of the stage, 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        for text in reversed((workdir / "metrics.jsonl").read_text().splitlines(keepends=True)):
            if text.endswith("\n") and (line := json.loads(text))["stage"] == stage:
                return line["step"]
    return 0


def sound_steps(checkpoints):
    return sorted(int(path.stem) for path in checkpoints.glob("*.manifest"))


def unfinished_saves(checkpoints):
    """Steps whose save has begun: `(under a temporary name, renamed but without a manifest)`."""
    names = {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
    temporary = {int(name.partition(".")[0]) for name in names if "orbax-checkpoint-tmp" in name}
    return temporary, {int(name) for name in names if name.isdecimal() and f"{name}.manifest" not in names}


def arrays(checkpoint):
    """All arrays of a checkpoint (parameters, optimizer, best parameters): path -> bytes and shape."""
    tree = ocp.PyTreeCheckpointer().restore(checkpoint / "default")
    leaves = jax.tree.leaves_with_path(jax.tree.map(np.asarray, tree))
    return {jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


def assert_ended_alike(workdir, expected, steps, stage=""):
    last = Path("checkpoints") / stage / str(steps)
    found = arrays(workdir / last)
    assert found == arrays(expected / last)
    assert any("mu" in name for name in found), "the optimizer's moments are in it"
    assert (workdir / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        (STEPS, {"step": 1, "temporary": 1, "renamed": 1}),
        pytest.param(240, {"step": 10, "temporary": 6, "renamed": 4}, marks=pytest.mark.slow),
    ],
    ids=["3 kills", "20 kills"],
)
def test_killed_again_and_again_a_run_ends_with_the_same_bits(tmp_path, start, undisturbed, steps, kinds):
    rng = np.random.default_rng(SEED)
    kinds = rng.permutation([kind for kind, count in kinds.items() for _ in range(count)])
    points = np.sort(rng.choice(np.arange(1, steps - 6), len(kinds), replace=False))
    print(f"seed {SEED}: {[(int(point), str(kind)) for point, kind in zip(points, kinds, strict=True)]}")
    workdir, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    during_a_save = 0
    for point, kind in zip(points, kinds, strict=True):
        process = start(*VICTIM, workdir, f"--steps={steps}")
        first = max(point, *sound_steps(checkpoints), 0) if kind != "step" else point
        reached = {
            "step": lambda: steps_logged(workdir) >= point,  # noqa: B023
            "temporary": lambda: any(step > first for step in unfinished_saves(checkpoints)[0]),  # noqa: B023
            "renamed": lambda: any(step > first for step in unfinished_saves(checkpoints)[1]),  # noqa: B023
        }[kind]
        wait_until(reached, process)
        process.kill()
        finish(process, -signal.SIGKILL)
        during_a_save += any(unfinished_saves(checkpoints))
    assert during_a_save >= len(points) / 4
    finish(start(*VICTIM, workdir, f"--steps={steps}"))
    assert_ended_alike(workdir, undisturbed(steps), steps)
    assert not any(unfinished_saves(checkpoints)), "what was cut off is cleaned up"


def test_sigterm_saves_and_ends_with_0(tmp_path, start, undisturbed):
    workdir = tmp_path / "run"
    process = start(*VICTIM, workdir)
    wait_until(lambda: steps_logged(workdir) >= 7, process)
    asked = time.monotonic()
    process.terminate()
    said = finish(process)
    assert time.monotonic() - asked < 20  # a step and a save; seconds even where the machine is busy
    saved = sound_steps(workdir / "checkpoints")[-1]
    assert said.strip().endswith(f"train: stopped by SIGTERM after step {saved}, which is saved")
    assert 7 <= saved < STEPS
    finish(start(*VICTIM, workdir))
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)


def halve(params, extra, batch, key):
    return params["w"] ** 2 / 4, (extra, {})


def fit_in_process(folder, optimizer, **options):
    state, step = create_state({"w": jnp.ones(())}, optimizer), make_train_step(halve, optimizer)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return fit(state, step, OnDevice(lambda step: None), 4, key=KEY, checkpoints=checkpoints, **options)


def test_sigterm_after_the_last_step_is_not_forgotten(tmp_path):
    """Whoever trains several models one after another must hear of it."""

    def evaluate(state):
        if int(state.step) == 4 and not sound_steps(tmp_path):
            signal.raise_signal(signal.SIGTERM)
        return {}

    with pytest.raises(Terminated):
        fit_in_process(tmp_path, optax.sgd(1.0), evaluate=evaluate)
    assert sound_steps(tmp_path) == [4]
    assert int(fit_in_process(tmp_path, optax.sgd(1.0), evaluate=evaluate).state.step) == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_parameters_that_one_step_spoils_are_not_saved(tmp_path):
    optimizer = optax.sgd(lambda step: jnp.where(step < 3, 1.0, jnp.inf))  # loss and gradient are still finite
    message = "the parameters are not finite after step 4; the newest checkpoint is from before"
    with pytest.raises(NonFiniteLoss, match=message):
        fit_in_process(tmp_path, optimizer, checkpoint_every=1)
    assert sound_steps(tmp_path) == [2, 3]


def test_an_optimizer_that_a_huge_gradient_spoils_is_not_saved(tmp_path):
    """Its square overflows in Adam's second moment; loss, gradient and parameters stay finite, and nothing trains."""

    def loss(params, extra, batch, key):
        return batch * params["w"], (extra, {})

    optimizer = optax.adam(0.1)
    spoilt = pytest.raises(NonFiniteLoss, match="the optimizer's state is not finite after step 8")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints, spoilt:
        fit(
            create_state({"w": jnp.ones(())}, optimizer),
            make_train_step(loss, optimizer),
            OnDevice(lambda step: jnp.where(step == 4, 1e25, 1.0)),
            12,
            key=KEY,
            log_every=4,
            checkpoints=checkpoints,
            checkpoint_every=4,
        )
    assert sound_steps(tmp_path) == [4]


def test_sigterm_during_an_evaluation_stops_after_it(tmp_path):
    def evaluate(state):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    with pytest.raises(Terminated, match="after step 2, which is saved"):
        fit_in_process(tmp_path, optax.sgd(1.0), evaluate=evaluate, evaluate_every=2, checkpoint_every=4)
    assert sound_steps(tmp_path) == [2]


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(checkpoint):
    os.truncate(largest_file(checkpoint), largest_file(checkpoint).stat().st_size // 2)


def flip(checkpoint):
    content = bytearray(largest_file(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    largest_file(checkpoint).write_bytes(content)


def delete(checkpoint):
    largest_file(checkpoint).unlink()


def delete_manifest(checkpoint):
    checkpoint.with_name(f"{checkpoint.name}.manifest").unlink()


def cut_manifest(checkpoint):
    os.truncate(checkpoint.with_name(f"{checkpoint.name}.manifest"), 100)


FILES, CUT_OFF = "its files are not those that were saved", "its save was cut off"
DAMAGES = [(truncate, FILES), (flip, FILES), (delete, FILES), (cut_manifest, FILES), (delete_manifest, CUT_OFF)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [pytest.param(*case, marks=[] if case[0] is flip else [pytest.mark.slow]) for case in DAMAGES],
)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, start, undisturbed, damage, reason):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed(STEPS), workdir)
    checkpoints = workdir / "checkpoints"
    newest = checkpoints / str(STEPS)
    damage(newest)
    left = contents(newest)
    said = finish(start(*VICTIM, workdir))
    assert f"checkpoint {STEPS} is damaged ({reason}); it is set aside as {checkpoints}/damaged-{STEPS}" in said
    assert f"training goes on from checkpoint {STEPS - 3}" in said
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)
    assert contents(checkpoints / f"damaged-{STEPS}") == left


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_every_damage_is_noticed(tmp_path, caplog, damage, reason):
    """The same without a process of its own, on one parameter."""
    fit_in_process(tmp_path, optax.sgd(0.5), checkpoint_every=1)
    expected = arrays(tmp_path / "4")
    damage(tmp_path / "4")
    left = contents(tmp_path / "4")
    fit_in_process(tmp_path, optax.sgd(0.5), checkpoint_every=1)
    assert f"checkpoint 4 is damaged ({reason}); it is set aside as {tmp_path}/damaged-4" in caplog.text
    assert "training goes on from checkpoint 3" in caplog.text
    assert arrays(tmp_path / "4") == expected
    assert contents(tmp_path / "damaged-4") == left


def test_with_all_checkpoints_damaged_training_starts_anew(tmp_path, start, undisturbed):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed(STEPS), workdir)
    truncate(workdir / "checkpoints" / str(STEPS))
    flip(workdir / "checkpoints" / str(STEPS - 3))
    said = finish(start(*VICTIM, workdir))
    assert said.count("is set aside as") == 2
    assert "training goes on from the beginning: no checkpoint is left" in said
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)
    assert {path.name for path in (workdir / "checkpoints").glob("damaged-*")} == {"damaged-27", "damaged-30"}


def test_a_loss_that_is_not_finite_ends_with_2_and_spoils_nothing(tmp_path, start, undisturbed):
    workdir = tmp_path / "run"
    said = finish(start(*VICTIM, workdir, "--nan-from=16"), 2)
    assert said == "error: loss is nan at step 17; the newest checkpoint is from before\n"
    assert sound_steps(workdir / "checkpoints") == [12, 15]
    for name, (dtype, shape, content) in arrays(workdir / "checkpoints" / "15").items():
        assert np.isfinite(np.frombuffer(content, dtype).reshape(shape)).all(), name
    finish(start(*VICTIM, workdir))
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)


@pytest.fixture
def small_disk(tmp_path):
    """`bytes -> folder` on a file system of that size."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    """Takes all the room that is left, however much of it is given back meanwhile."""
    with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def one_line(said):
    """The error among what jax may have to say."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    assert "Exception" not in said
    return errors[0]


def test_a_checkpoint_without_room_leaves_those_before_it(small_disk, capfd):
    folder = small_disk(2**19) / "checkpoints"
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1000)})
        message = rf"no room for checkpoint 2 in {folder}: needed 0.8 MiB, free 0.\d MiB; those before it are whole"
        with pytest.raises(OSError, match=message):
            checkpoints.save(2, {"w": jax.random.normal(KEY, (200_000,))})
    (folder / "7.orbax-checkpoint-tmp").mkdir()  # of a process that was killed, at a step that does not come again
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        restored = checkpoints.restore({"w": jnp.zeros(1000)})
        assert restored is not None
        assert restored[0] == 1
        np.testing.assert_array_equal(restored[1]["w"], 1.0)
        checkpoints.save(2, restored[1])
    assert sound_steps(folder) == [1, 2]
    assert not any(unfinished_saves(folder))
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_is_an_error_for_tensorboard_too(tmp_path):
    """It used to be the end of a thread, for which the next line of metrics waited for ever."""
    metrics = MetricsWriter(tmp_path, "main")
    metrics._board._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device"):
        metrics.write(1, {"loss": 1.0})


@pytest.mark.slow
def test_a_disk_that_fills_up_later_costs_no_good_checkpoint(small_disk, start, undisturbed):
    disk = small_disk(6 * 2**20)
    workdir = disk / "run"
    process = start(*VICTIM, workdir)
    wait_until(lambda: len(sound_steps(workdir / "checkpoints")) == 2, process)
    while process.poll() is None:
        fill(disk)
        time.sleep(0.01)
    assert "error: [Errno 28] " in one_line(finish(process, 2))
    assert 0 < sound_steps(workdir / "checkpoints")[-1] < STEPS
    (disk / "filler").unlink()
    said = finish(start(*VICTIM, workdir))
    assert "from the beginning" not in said
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 16_000], ids=["metrics fail", "checkpoints fail"])
def test_a_limit_on_files_costs_no_good_checkpoint(tmp_path, start, undisturbed, limit):
    workdir = tmp_path / "run"
    process = start(*VICTIM, workdir)
    wait_until(lambda: len(sound_steps(workdir / "checkpoints")) == 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    said = finish(process, 2)  # between words of orbax's threads, where a write fails under them
    assert "error: [Errno 27] " in said
    assert "File too large" in said
    assert ("cannot be written into" in said) == bool(limit)
    assert 0 < sound_steps(workdir / "checkpoints")[-1] < STEPS
    finish(start(*VICTIM, workdir))
    assert_ended_alike(workdir, undisturbed(STEPS), STEPS)


ALRNN = (
    "run",
    "alrnn:smoke",
    "--config.systems=lorenz63",
    "--config.lorenz63.num_pwl=2",
    "--config.lorenz63.updates=1000",
    "--config.updates_per_call=2",
    "--config.evaluate_every=100",
)


def test_too_small_a_disk_is_refused_before_training(small_disk, capsys):
    workdir = small_disk(2**16) / "run"
    assert cli.main([*ALRNN, f"--workdir={workdir}"]) == 2
    said = capsys.readouterr().err
    assert f"no room for the checkpoints of this run in {workdir}" in one_line(said)
    assert not (workdir / "metrics.jsonl").exists()


def test_a_read_only_workdir_is_refused_before_training(small_disk, tmp_path, capsys):
    if os.geteuid() == 0:  # whom no permission stops
        closed = small_disk(2**20)
        subprocess.run(["mount", "-o", "remount,ro", closed], check=True)
        reason = "Read-only file system"
    else:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        reason = "Permission denied"
    workdir = closed / "run"
    assert cli.main([*ALRNN, f"--workdir={workdir}"]) == 2
    expected = f"error: cannot write into {workdir}: {reason}; choose another --workdir"
    assert one_line(capsys.readouterr().err) == expected


@pytest.mark.slow
def test_al_rnn_through_the_command_line(tmp_path, start, environment, capsys):
    """SIGKILL, SIGTERM while it trains and SIGTERM while it analyses, a second run in its folder between them."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    command = [sys.executable, "-m", "experiments", *ALRNN, f"--workdir={whole}"]
    finish(start(*command))
    command[-1] = f"--workdir={workdir}"

    process = start(*command)
    wait_until(lambda: steps_logged(workdir, "lorenz63") >= 200, process)
    assert cli.main([*ALRNN, f"--workdir={workdir}"]) == 2
    said = one_line(capsys.readouterr().err)
    assert f"{workdir} is in use by another run: process {process.pid} on {socket.gethostname()}, since 2" in said
    process.kill()
    finish(process, -signal.SIGKILL)

    reached = steps_logged(workdir, "lorenz63")
    process = start(*command)  # the folder is free again
    wait_until(lambda: steps_logged(workdir, "lorenz63") > reached, process)
    process.terminate()
    said = finish(process)
    assert "lorenz63: resuming from step" in said
    assert "lorenz63: stopped by SIGTERM after step" in said
    assert "which is saved; the same command resumes" in said

    process = start(*command)
    wait_until((workdir / "checkpoints" / "lorenz63" / "1000.manifest").exists, process)
    process.terminate()
    assert "stopped by SIGTERM" in finish(process)
    assert not (workdir / "results.json").exists()

    finish(start(*command))
    for stage in ("lorenz63", "lorenz63_slopes"):
        assert_ended_alike(workdir, whole, 1000, stage)
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (workdir, whole))
    assert results["metrics"] == expected["metrics"]


SWALLOWS = """
import os, signal, sys, time
from jaxpapers.train import Terminated, sigterm_raises
class Final:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
try:
    with sigterm_raises():
        Final()
        print("swallowed", flush=True)
        time.sleep(30)
except Terminated:
    print("heard")
time.sleep(2.5)
print("and once only")
"""


def test_a_sigterm_that_a_finalizer_swallows_comes_again():
    done = subprocess.run([sys.executable, "-c", SWALLOWS], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:3] == ["swallowed", "heard", "and once only"], done.stderr
