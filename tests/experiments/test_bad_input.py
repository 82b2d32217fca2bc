"""Bad input: every mistake is one clear line that says what was wrong and what would be accepted; nothing is lost."""

import hashlib
import io
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from experiments import cli, launch
from experiments.harness import Run
from experiments.sequence import alrnn as experiment
from jaxpapers.data import series as series_module
from jaxpapers.data.download import OfficialFile
from jaxpapers.data.dynamics import delay_embedding, integrate, simulate_lorenz63
from jaxpapers.data.series import Series, alrnn_series
from jaxpapers.nn.stack import stack_layers
from jaxpapers.train import (
    Checkpoints,
    Terminated,
    create_state,
    fit,
    make_mesh,
    make_optimizer,
    make_schedule,
    make_train_step,
    param_specs,
    update_program,
)

MESH = {"data": 4, "model": 2}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder, without data and without the network."""
    data = tmp_path / "data"
    data.mkdir(mode=0o555)
    monkeypatch.setenv("JAXPAPERS_DATA", str(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def refused(arguments, capsys):
    """The one line that the command line says."""
    code = cli.main(arguments)
    said = capsys.readouterr()
    assert code == 2, said
    lines = said.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in said.err
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep"], "argument --sweep: expected one argument"),
        (["--sweep="], "--sweep takes config.FIELD=VALUE,VALUE,..., such as config.seed=0,1,2; not ''"),
        (["--sweep=config.seed="], "such as config.seed=0,1,2; not 'config.seed='"),
        (["--sweep=config.sed=0,1"], "unknown field config.sed; did you mean 'seed'?"),
        (["--sweep=config.seed=0,0"], "--sweep config.seed=0,0: each field once, each value once"),
        (["--sweep=config.seed=0,1", "--sweep=config.seed=2"], "each field once, each value once"),
        (["--workdir=gs://bucket/run"], "gs://bucket/run is no folder: mount it, and name where it is mounted"),
        (["--sweep=config.seed=0,one"], "config.seed takes a whole number such as 0, not 'one'"),
        (["--sweep=config.lorenz63=1,2"], "config.lorenz63 is a group; set one of its fields: bins, dt,"),
        (["--sweep=config.seed=0,1", "--overwrit"], "unknown option '--overwrit'; did you mean '--overwrite'?"),
        (["--slurm-option=timeout_min", "--slurm"], "--slurm-option takes NAME=VALUE, not 'timeout_min'"),
        (["--config.seed=nan"], "config.seed takes a whole number such as 0, not 'nan'"),
        (["--config.lorenz63.rate=nan"], "config.lorenz63.rate takes a finite number such as 0.001, not 'nan'"),
        (["--config.lorenz63.rate=-inf"], "config.lorenz63.rate takes a finite number such as 0.001, not '-inf'"),
        (["--config.seed=" + "9" * 5000], f"config.seed takes a whole number such as 0, not '{'9' * 60}...'"),
        (["--config.newton_lengths=64,half"], "config.newton_lengths takes a list such as (64,), not '64,half'"),
        (["--config.=3"], "unknown field config."),
        (["--config.mesh.data=3"], "a mesh of data=3 x model=1 x seq=1 does not fit 8 devices; set config.mesh.data"),
        (["--config.mesh.model=0"], "a mesh of data=0 x model=0 x seq=1 does not fit 8 devices"),
        (["--config.batch_size=0"], "config.batch_size=0 must be at least 1"),
        (["--config.num_seeds=-2"], "config.num_seeds=-2 must be at least 1"),
        (["--config.lorenz63.updates=0"], "config.lorenz63.updates=0 must be at least 1"),
        (["--config.lorenz63.window=3000"], "config.lorenz63.window=3000 must be less than the 3000 rows of lorenz63"),
        (["--config.newton_lengths=64,5000"], "config.newton_lengths=5000 must be less than the 3000 rows of lorenz63"),
        (["--config.num_rows=10"], "the 10 rows of lorenz63"),
        (["--config.lorenz63.tau=0"], "config.lorenz63.tau=0 must be at least 1"),
        (
            ["--config.lorenz63.num_pwl=2,21"],
            "config.lorenz63.num_pwl: num_pwl must lie in 0..20 (the latent dimension)",
        ),
        (["--config.lorenz63.num_pwl=19"], "accepted are 0..17, and 20 for the PLRNN"),
        (["--config.lorenz63.num_pwl="], "config.lorenz63.num_pwl=() must be at least one P"),
        (["--config.lorenz63.latent_dim=2"], "config.lorenz63.latent_dim=2 must be at least the 3 observables"),
        (["--config.lorenz63.bins=2000"], "config.lorenz63.bins=2000 must be so few that bins^3 stays below 2^31"),
        (["--config.lorenz63.rate=0"], "config.lorenz63.rate=0.0 must be above 0"),
        (["--config.lorenz63.noise=-1"], "config.lorenz63.noise=-1.0 must be at least 0"),
        (["--config.seed=99999999999"], "config.seed=99999999999 must be a 32-bit integer"),
        (["--config.systems="], "config.systems=() must be at least one system"),
        (["--config.systems=lorenz64"], "unknown system 'lorenz64'; did you mean 'lorenz96'?"),
        (["--config.evaluate_every=15"], "config.evaluate_every=15 must be a multiple of updates_per_call=10"),
        (["--config.evaluate_every=0"], "config.evaluate_every=0 must be at least 1"),
        (["--config.free_run=1"], "config.free_run=1 must be at least 16"),
        (["--config.slope_penalties=-1"], "config.slope_penalties=(-1.0,) must be at least 0 each"),
        (["--config.optimizer=radm"], "unknown optimizer 'radm'; did you mean 'radam'?"),
        (["--config.optimizer=lbfgs"], "optimizer 'lbfgs' needs more than gradients"),
        (["--config.optimizer=sm3"], "optimizer 'sm3' needs more than gradients, or takes no schedule"),
        (["--config.schedule=cosine"], "unknown schedule 'cosine'; did you mean 'cosine_decay_schedule'?"),
        (["--config.lorenz63.last_rate=0"], "exponential_decay cannot go from a rate of 0.001 to one of 0.0"),
    ],
)
def test_command_line_and_config(arguments, message, workdir, capsys):
    assert message in refused(["run", "alrnn:smoke", f"--workdir={workdir}", *arguments], capsys)
    assert not (workdir / "checkpoints").exists(), "refused before anything was trained"
    assert not (workdir / "results.json").exists()


def test_a_sweep_without_submitit(workdir, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    said = refused(["run", "alrnn:smoke", "--sweep=config.seed=0,1", "--slurm", f"--workdir={workdir}"], capsys)
    assert said == "--slurm needs submitit: pip install -e '.[slurm]'"


def test_a_workdir_that_is_a_file(workdir, capsys):
    workdir.write_text("years of work")
    said = refused(["run", "alrnn:smoke", f"--workdir={workdir}"], capsys)
    assert said == f"cannot write into {workdir}: File exists; choose another --workdir"
    assert workdir.read_text() == "years of work"


@pytest.mark.parametrize("content", [None, b"", b'{"paper": "alr', b"\xff"], ids=["absent", "empty", "cut", "not text"])
def test_checkpoints_whose_config_is_gone(content, workdir, capsys):
    kept = workdir / "checkpoints" / "lorenz63" / "20"
    kept.mkdir(parents=True)
    if content is not None:
        (workdir / "config.json").write_bytes(content)
    said = refused(["run", "alrnn:smoke", f"--workdir={workdir}"], capsys)
    assert f"{workdir} holds checkpoints, but its config.json cannot be read" in said
    assert kept.exists()


def test_a_learning_rate_that_explodes_names_step_and_metric(workdir, capsys):
    tiny = ["--config.systems=lorenz63", "--config.lorenz63.num_pwl=2", "--config.lorenz63.updates=100"]
    rising = ["--config.schedule=linear_schedule", "--config.lorenz63.last_rate=1e9"]  # after the first epoch of 50
    said = refused(["run", "alrnn:smoke", f"--workdir={workdir}", *tiny, *rising], capsys)
    assert "in steps 51 to 60; the newest checkpoint is from before" in said
    assert "loss is [nan, " in said
    assert (workdir / "checkpoints" / "lorenz63" / "40.manifest").exists()


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """`bytes -> error` of reading them as the ECG, shape (4, 2), in a data folder of its own."""
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    monkeypatch.setattr("jaxpapers.data.download._writable", lambda folder: False)

    def read(content, official=None):
        official = content if official is None else official
        url = "https://example.org/ecg.npy"
        file = OfficialFile("alrnn/ecg.npy", url, hashlib.sha256(official).hexdigest(), len(official))
        monkeypatch.setitem(series_module.ALRNN_SERIES, "ecg", Series(file, (4, 2)))
        if content is not None:
            (tmp_path / "alrnn").mkdir()
            (tmp_path / "alrnn" / "ecg.npy").write_bytes(content)
        with pytest.raises((ValueError, OSError)) as error:
            alrnn_series("ecg")
        message = str(error.value)
        assert "alrnn/ecg.npy" in message
        assert url in message
        assert str(tmp_path) in message
        if content is not None:
            assert (tmp_path / "alrnn" / "ecg.npy").read_bytes() == content, "refused, and left as it is"
        return message

    return read


def stored(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


GOOD = stored(np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("content", "official", "message"),
    [
        (GOOD[:-1], GOOD, f"found {len(GOOD) - 1} bytes"),
        (b"", GOOD, "found 0 bytes"),
        (GOOD[:-1] + b"?", GOOD, f"{len(GOOD)} bytes with sha256"),
        (None, GOOD, "is not in"),
        (stored(np.zeros((4, 3))), None, "has shape (4, 3), expected (4, 2)"),
        (stored(np.zeros(8)), None, "has shape (8,), expected (4, 2)"),
        (stored(np.zeros((4, 2), int)), None, "holds int64, expected floating-point numbers"),
        (stored(np.full((4, 2), "x")), None, "holds <U1, expected floating-point numbers"),
        (stored(np.full((4, 2), np.nan)), None, "has 8 non-finite values"),
        (b"<html>not found</html>", None, "is no array that NumPy can read"),
        (b"", b"", "is no array that NumPy can read"),
    ],
    ids=["truncated", "empty", "checksum", "absent", "columns", "axes", "integers", "text", "nan", "html", "nothing"],
)
def test_data_files_name_file_address_and_folder(content, official, message, made_up):
    assert message in made_up(content, official)


def quadratic(params, extra, batch, key):
    return jnp.sum(params["w"] ** 2), (extra, {})


def resume(folder, params, optimizer, **options):
    with closing(Checkpoints(folder)) as checkpoints:
        return fit(
            create_state(params, optimizer),
            make_train_step(quadratic, optimizer),
            [np.zeros(8)] * 4,
            4,
            key=jax.random.key(0),
            checkpoints=checkpoints,
            **options,
        )


@pytest.mark.parametrize(
    ("params", "optimizer", "difference"),
    [
        ({"w": jnp.ones(4)}, optax.adam(0.1), "params/w is float32[3] there, and float32[4] here"),
        ({"w": jnp.ones(3), "v": jnp.ones(3)}, optax.adam(0.1), "params.v"),
        ({"w": jnp.ones(3)}, optax.sgd(0.1), "opt_state"),
        ({"w": jnp.ones(3, jnp.bfloat16)}, optax.adam(0.1), "params/w is float32[3] there, and bfloat16[3] here"),
    ],
    ids=["shape", "tree", "optimizer", "dtype"],
)
def test_checkpoints_of_another_model(params, optimizer, difference, tmp_path):
    resume(tmp_path, {"w": jnp.ones(3)}, optax.adam(0.1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="does not fit") as error:
        resume(tmp_path, params, optimizer)
    assert str(tmp_path) in str(error.value)
    assert difference in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every=-1 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"steps_per_call": 0}, "steps_per_call=0 must be at least 1"),
        ({"steps_per_call": 2, "checkpoint_every": 3}, "checkpoint_every=3 must be a multiple of steps_per_call=2"),
        ({"mesh": MESH, "rules": (("v", PartitionSpec("data")),)}, "rules that match no parameter: ['v']"),
        ({"mesh": MESH, "rules": (("w", PartitionSpec("rows")),)}, "not 'rows'"),
        ({"mesh": MESH, "rules": (("w", PartitionSpec("data")),)}, "w of shape (3,) does not divide into"),
        ({"mesh": MESH, "rules": (("w", PartitionSpec(None, "data")),)}, "fewer axes than its placement"),
        (
            {"mesh": MESH, "rules": (("w", PartitionSpec("data")), ("^w", PartitionSpec("model")))},
            "rules fight over w: 'w': ",
        ),
    ],
)
def test_loops_and_meshes(options, message, tmp_path):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(**options["mesh"])}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        resume(tmp_path, {"w": jnp.ones(3)}, optax.adam(0.1), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_mesh(data=-1), "a mesh of data=-1 x model=1 x seq=1 does not fit 8 devices"),
        (lambda: make_mesh(data=3, devices=jax.devices()[:2]), "does not fit 2 devices"),
        (lambda: param_specs({"w": jnp.ones(8)}, make_mesh(), (("v", PartitionSpec()),)), "the parameters are w"),
        (lambda: make_schedule("linear_schedule", -1.0, 0.0, 10), "cannot go from a rate of -1.0"),
        (lambda: make_optimizer("adam", 0.1, clip_norm=0.0), "expected clip_norm > 0"),
        (lambda: Checkpoints(Path("unused"), keep=1), "keep=1 must be at least 2"),
        (lambda: stack_layers({}), "expected layers_0"),
        (lambda: alrnn_series("ekg"), "unknown series 'ekg', nearest is"),
        (lambda: simulate_lorenz63(jax.random.key(0), 0), "num_steps must be at least 1, got 0"),
        (lambda: integrate(lambda x: x, jnp.ones(2), 0.1, 3, sample_every=0), "got 3 and 0"),
        (lambda: delay_embedding(jnp.ones(4), dim=3, lag=2), "need a series of at least 5 rows, got 4"),
        (lambda: experiment.get_config("large"), "preset must be smoke, small or paper, got 'large'"),
    ],
)
def test_public_functions(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


# What the random overrides draw from: half of them have the field's type, half are anything. No number is so large that
# it would be tried and cost the machine its memory: what is above 100 is beyond every check.
TYPED = {
    bool: ("true", "False"),
    int: ("0", "-1", "1", "2", "7", "20", "100"),
    float: ("0", "-1", "0.5", "1e-3", "7", "1e30", "1e99"),
    str: ("adamw", "sgd", "rprop", "linear_schedule", "constant_schedule"),
    tuple: ("1", "2,0", "20", "7,7", "0", "-1,1", "lorenz63", "ecg", "rossler,lorenz63"),
}
ANYTHING: tuple[str, ...] = (
    "",
    " ",
    ",",
    "1,",
    "nan",
    "inf",
    "-inf",
    "1e99",
    "0.5",
    "None",
    "true",
    "Ωμέγα",
    "１２",
    "💥",
    "\x00",
    "[[[",
)
ANYTHING += ("x" * 20_000, "9" * 30, "-" + "9" * 30, "1_0", "0x10", "../..", "--", "=", "a=b", "{}", "(2,)", "0,1,2")
COUNT, SEED = 100, 4


def fields(config):
    for name, value in config.items():
        if hasattr(value, "items"):
            if name in ("lorenz63", "rossler", "mesh"):
                yield from ((f"{name}.{field}", type(old)) for field, old in value.items())
        else:
            yield name, type(value)


def test_random_overrides_never_end_in_a_traceback(workdir, capsys, monkeypatch):
    """Parsing, checks, data, set-up and tracing of every accepted config; of every third, the first updates too."""
    started: list[str] = []

    def begin(run, stage, state, train_step, batches, num_steps, *, key, steps_per_call, **options):
        program = update_program(train_step, batches, min(steps_per_call, num_steps))
        if len(started) % 3:
            jax.eval_shape(program, state, key, batches.data)
        else:
            fit(state, train_step, batches, steps_per_call, key=key, steps_per_call=steps_per_call)
        started.append(stage)
        raise Terminated("far enough")

    monkeypatch.setattr(Run, "fit", begin)
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}")
    known = list(fields(launch.configure("alrnn", "smoke")))
    small = ["--config.systems=lorenz63", "--config.lorenz63.num_pwl=2", "--config.free_run=50"]
    codes = []
    for number in range(COUNT):
        count = rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])
        chosen = [known[index] for index in rng.choice(len(known), count)]
        drawn = [
            f"--config.{name}={rng.choice(TYPED[kind] if rng.random() < 0.5 else ANYTHING)}" for name, kind in chosen
        ]
        command = ["run", "alrnn:smoke", f"--workdir={workdir / str(number)}", *small, *drawn]
        try:
            codes.append(cli.main(command))
        except BaseException as error:
            raise AssertionError(f"{drawn} ended in {error!r}") from error
        said = capsys.readouterr().err
        assert codes[-1] in (0, 1, 2), drawn
        assert "Traceback" not in said, drawn
        assert codes[-1] == 0 or len(said.splitlines()[-1]) < 500, drawn
    print(f"{codes.count(0)} accepted, {codes.count(2)} refused")
    assert len(started) > COUNT / 5
    assert codes.count(2) > COUNT / 4
