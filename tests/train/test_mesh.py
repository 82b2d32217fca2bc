"""Several devices give the numbers of one: placement by rules, fsdp, checkpoints between meshes."""

import re
import tempfile
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.train import (
    Checkpoints,
    MetricsWriter,
    OnDevice,
    abstract,
    create_state,
    fit,
    fsdp,
    initialize_distributed,
    make_mesh,
    make_train_step,
    param_specs,
    place,
    place_batch,
    read_metrics,
    state_shardings,
    to_host,
)
from tests.train.tiny import BATCH, Tokens, init_params, make_loss

KEY = jax.random.key(0)
TENSOR_RULES = (
    ("(query|key|value)/kernel", P(None, "model", None)),
    ("(query|key|value)/bias", P("model", None)),
    ("out/kernel", P("model", None, None)),
    ("up/kernel", P(None, "model")),
    ("up/bias", P("model")),
    ("down/kernel", P("model", None)),
)
OPTIMIZER = optax.adam(1e-2)
STEPS = 8
# Sums over a batch, a row or a kernel are taken in another order on several devices: float32 rounding (6e-8) that grows
# over eight Adam updates, whose first ones divide by the square root of tiny second moments.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def train(mesh=None, rules=(), batches=None, **options):
    state = create_state(init_params(), OPTIMIZER)
    step = make_train_step(make_loss(), OPTIMIZER)
    batches = Tokens() if batches is None else batches
    with tempfile.TemporaryDirectory() as folder, closing(MetricsWriter(Path(folder), "train")) as metrics:
        options = {"log_every": 1, "metrics": metrics} | options
        fitted = fit(state, step, batches, STEPS, key=KEY, mesh=mesh, rules=rules, **options)
        return fitted.state, np.array([line["train/loss"] for line in read_metrics(folder) if "train/loss" in line])


@pytest.fixture(scope="module")
def single():
    return train()


@pytest.mark.parametrize(
    ("data", "model", "rules", "split"),
    [(8, 1, (), False), (4, 2, TENSOR_RULES, False), (8, 1, (), True), (4, 2, TENSOR_RULES, True)],
    ids=["data", "data x model", "fsdp", "fsdp x model"],
)
def test_eight_devices_give_the_losses_of_one(single, data, model, rules, split):
    mesh = make_mesh(data=data, model=model)
    if split:
        rules = fsdp(init_params(), mesh, rules, min_size=64)
    state, losses = train(mesh, rules)
    np.testing.assert_allclose(losses, single[1], **CLOSE)
    expected = dict(jax.tree.leaves_with_path(single[0].params))
    for path, mine in jax.tree.leaves_with_path(state.params):
        # Softmax does not see the keys' bias: its gradient is rounding alone, which Adam blows up to full steps.
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(mine, expected[path], **CLOSE)
    kernel = state.params["blocks"]["layers_0"]["up"]["kernel"]
    moment = state.opt_state[0].mu["blocks"]["layers_0"]["up"]["kernel"]
    assert kernel.sharding == moment.sharding
    devices = (data if split else 1) * (model if rules and model > 1 else 1)
    assert kernel.addressable_shards[0].data.size * devices == kernel.size


def test_microbatches_on_a_mesh_are_those_of_one_device_and_no_row_moves():
    mesh = make_mesh()
    rules = fsdp(init_params(), mesh, min_size=64)
    state = create_state(init_params(), OPTIMIZER)
    shardings = state_shardings(state, mesh, rules)
    alone, split = (
        make_train_step(make_loss(), OPTIMIZER, microbatches=BATCH // 8, shardings=where) for where in (None, shardings)
    )
    expected = fit(state, alone, Tokens(), STEPS, key=KEY).state
    state = create_state(init_params(), OPTIMIZER)
    found = fit(state, split, Tokens(), STEPS, key=KEY, mesh=mesh, rules=rules).state
    expected = dict(jax.tree.leaves_with_path(expected.params))
    for path, mine in jax.tree.leaves_with_path(found.params):
        if "['key']['bias']" not in jax.tree_util.keystr(path):  # rounding alone, as above
            np.testing.assert_allclose(mine, expected[path], **CLOSE)
    tokens = abstract(Tokens()[0], NamedSharding(mesh, P("data")))
    program = jax.jit(split).lower(abstract(found, shardings), tokens, KEY).compile().as_text()
    assert "all-reduce" in program
    assert not re.search("all-to-all|collective-permute", program)


def random_batch(step):
    return jax.random.randint(jax.random.fold_in(KEY, step), (BATCH, 16), 0, 32)


def text_batch(step, text):
    starts = jax.random.randint(jax.random.fold_in(KEY, step), (BATCH, 1), 0, len(text) - 16)
    return text[starts + jnp.arange(16)]


TEXT = np.random.default_rng(0).integers(0, 32, 1001).astype(np.int32)  # which 8 devices do not divide


@pytest.mark.parametrize("batches", [OnDevice(random_batch), OnDevice(text_batch, TEXT)], ids=["draws", "data"])
def test_batches_made_on_the_mesh_are_those_of_one_device(batches):
    _, losses = train(batches=batches, steps_per_call=4, log_every=4)
    _, split = train(make_mesh(), batches=batches, steps_per_call=4, log_every=4)
    np.testing.assert_allclose(split, losses, **CLOSE)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 2), (1, 8)])
def test_a_checkpoint_restores_onto_another_number_of_devices(tmp_path, before, after):
    """Half the training on some devices, the other half on others: as if it had never stopped, up to rounding."""

    def mesh(devices):
        return make_mesh(devices=jax.devices()[:devices])

    def half(devices, steps):
        state = create_state(init_params(), OPTIMIZER)
        rules = fsdp(state.params, mesh(devices), min_size=64)
        with closing(Checkpoints(tmp_path)) as checkpoints:
            step = make_train_step(make_loss(), OPTIMIZER)
            options = {"key": KEY, "mesh": mesh(devices), "rules": rules}
            return fit(state, step, Tokens(), steps, checkpoints=checkpoints, **options).state

    saved = half(before, 4)
    state = half(after, 4)  # nothing is left to do: what comes back is what lies in the checkpoint
    jax.tree.map(np.testing.assert_array_equal, to_host(state), to_host(saved))
    shards = state.params["blocks"]["layers_0"]["up"]["kernel"].sharding.device_set
    assert len(shards) == after
    assert int(half(after, STEPS).step) == STEPS


def test_rules_place_parameters_and_what_the_optimizer_keeps_of_them():
    mesh = make_mesh(data=4, model=2)
    params = {"a": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "b": {"kernel": jnp.ones((6, 8))}}
    rules = (("a/kernel", P(None, "model")), ("b/", P("model")))
    state = create_state(params, optax.adam(1e-3), extra={"ema": params, "count": jnp.zeros(3)})
    shardings = state_shardings(state, mesh, rules)
    specs = {"a": {"kernel": P(None, "model"), "bias": P()}, "b": {"kernel": P("model")}}
    assert jax.tree.map(lambda s: s.spec, shardings.params) == specs
    assert jax.tree.map(lambda s: s.spec, shardings.opt_state[0].nu) == specs
    assert jax.tree.map(lambda s: s.spec, shardings.extra) == {"ema": specs, "count": P()}
    placed = place(state, shardings)
    assert placed.params["a"]["kernel"].addressable_shards[0].data.shape == (8, 3)
    same = (*rules, ("b/kernel", P("model", None)))  # the same placement twice is no fight
    assert param_specs(params, mesh, same) == param_specs(params, mesh, rules)
    assert dict(fsdp(params, mesh, (("a/kernel", P("data")),), min_size=1))["^a/kernel$"] == P("data", None)
    whole = dict(fsdp(params, mesh, rules, min_size=48))
    assert whole == {"^a/bias$": P(None), "^a/kernel$": P("data", "model"), "^b/kernel$": P("model", "data")}
    with pytest.raises(ValueError, match=r"the mesh has the axes \('data', 'model', 'seq'\), not 'fsdp'"):
        fsdp(params, mesh, axis="fsdp")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("a/", P("model")), ("a/", P())), "rules fight over a/"),
        ((("a/(", P("model")),), r"the rule 'a/\(' is no regular expression: "),
        ((("c/kernel", P("model")),), r"rules that match no parameter: \['c/kernel'\]; the parameters are a/bias"),
        ((("a/", P("model")), ("kernel", P(None, "model"))), "rules fight over a/kernel: 'a/': .*'kernel':"),
        ((("a/bias", P(None, "model")),), r"a/bias of shape \(6,\) has fewer axes than its placement"),
        ((("a/kernel", P("expert")),), r"a/kernel: the mesh has the axes \('data', 'model', 'seq'\), not 'expert'"),
        ((("a/bias", P("data")),), r"a/bias of shape \(6,\) does not divide into"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    params = {"a": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    with pytest.raises(ValueError, match=message):
        param_specs(params, make_mesh(data=4, model=2), rules)


def test_meshes_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a mesh of data=3 x model=1 x seq=1 does not fit 8 devices"):
        make_mesh(data=3)
    with pytest.raises(ValueError, match="a mesh of data=0 x model=0 x seq=1 does not fit 8 devices"):
        make_mesh(model=0)
    with pytest.raises(ValueError, match=r"a batch of shape \(6, 2\) does not divide over 8 devices along 'data'"):
        place_batch({"x": np.ones((6, 2))}, make_mesh())
    assert dict(make_mesh(model=2, seq=2).shape) == {"data": 2, "model": 2, "seq": 2}


def test_a_batch_is_split_over_data_alone():
    mesh = make_mesh(data=4, model=2)
    batch = place_batch({"x": np.arange(16).reshape(8, 2)}, mesh)["x"]
    assert batch.sharding == NamedSharding(mesh, P("data"))
    np.testing.assert_array_equal(batch, np.arange(16).reshape(8, 2))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ()),
        ({"JAX_PLATFORMS": "tpu,cpu"}, ()),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ("host:1234", 2, 1),
        ),
    ],
)
def test_other_processes_are_joined_where_the_environment_names_them(monkeypatch, environment, expected):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *address, **options: calls.append(address))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert initialize_distributed() == (expected is not None)
    assert calls == ([] if expected is None else [expected])


def test_batches_are_read_ahead_while_the_device_works():
    asked, seen = [], []

    class Recorded(Tokens):
        def __getitem__(self, step):
            asked.append(step)
            return super().__getitem__(step)

    def evaluate(state):
        seen.append(asked[-1])
        return {"newest": asked[-1]}

    train(batches=Recorded(), evaluate=evaluate, evaluate_every=1)
    assert asked == list(range(STEPS))  # each once, in order
    # After the update of step n, the batch of step n + 1 has been asked for at least: two are on their way.
    assert all(newest >= min(step + 1, STEPS - 1) for step, newest in enumerate(seen))


def test_an_error_of_the_data_comes_out_where_the_batch_is_needed():
    class Broken(Tokens):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("shard 3 is truncated")
            return super().__getitem__(step)

    with pytest.raises(OSError, match="shard 3 is truncated"):
        train(batches=Broken())
