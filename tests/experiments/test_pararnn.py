"""ParaRNN's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json

import jax
import numpy as np
import pytest

from experiments import cli
from experiments.catalogue import UsageError
from experiments.harness import check_claims
from experiments.sequence import pararnn as experiment
from experiments.sequence._pararnn_training import lm_model, lm_recipe, optimizer_of, set_up_lm, set_up_task
from jaxpapers.data.text import OWN_SOURCE, vocabulary_size
from jaxpapers.train import abstractly, make_mesh

CELLS = ("gru", "lstm")
# The measured column of the card's table of claims, and the paper's own figures where it has none.
MEASURED = {
    **{f"newton/gru/D{D}/L{L}": [[9.3e-1, 6.3e-2, 3.5e-4, 3.6e-7, 2.4e-7]] * 3 for D in (64, 256) for L in (256, 2048)},
    **{
        f"newton/lstm/D{D}/L{L}": [[9.3e-1, 1.3e-1, 7.3e-4, 3.0e-7, 2.7e-7]] * 3 for D in (64, 256) for L in (256, 2048)
    },
    **{f"exact/{cell}/float32/{what}": 1e-6 for cell in CELLS for what in ("states", "grad_g", "grad_A")},
    **{f"exact/{cell}/float64/{what}": 1e-15 for cell in CELLS for what in ("states", "grad_g", "grad_A")},
    "tasks/parity/gru/last": [1.0, 1.0],
    "tasks/parity/lstm/last": [1.0, 1.0],
    "tasks/parity/linear/last": [0.49, 0.5],
    "tasks/parity/mamba2/last": [0.52, 0.51],
    "tasks/parity/attention/last": [0.48, 0.53],
    **{
        f"clip/{cell}/{name}": row
        for cell in CELLS
        for name, row in {
            "0.5": [3, 3],
            "0.9": [3, 4],
            "1.5": [4, 5],
            "2": [4, "inf"],
            "3": ["inf", 9],
            "4": ["inf", "inf"],
        }.items()
    },
    "lm/gru/perplexity": 18.56,
    "lm/lstm/perplexity": 18.40,
    "lm/linear/perplexity": 19.0,
    "lm/mamba2/perplexity": 17.5,
    "lm/attention/perplexity": 17.0,
    "lm/gru/residual": 1e-6,
    "lm/lstm/residual": 1e-6,
    "speed/lengths": [256, 512, 1024],
    "accelerator/speed_up/gru": [300.0, 665.0, 900.0],
    "accelerator/speed_up/lstm": [200.0, 447.0, 600.0],
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["clip"].endswith("2: 4-4 (2 of 4 never); 3: 9-9 (2 of 4 never); 4: none (4 of 4 never)")
    assert texts["depth"] == "ParaGRU 665 at L = 512, 900 at 1024; ParaLSTM 447 at L = 512, 600 at 1024"


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("clip", {"clip/gru/3": [9, 9], "clip/lstm/3": [9, 9]}),
        ("newton3", {"newton/lstm/D64/L2048": [[0.9, 0.1, 7e-4, 6e-6, 1e-7]]}),
        ("newton3", {"newton/gru/D256/L256": [[0.9, 9e-4, 1e-4, 1e-7, 1e-7]]}),
        ("newton3", {"newton/gru/D64/L2048": [[0.9, 0.1, 4e-3, 1e-7, 1e-7]]}),
        ("exact", {"exact/lstm/float32/grad_A": 2e-5}),
        ("exact", {"exact/gru/float64/states": 2e-10}),
        ("parity", {"tasks/parity/gru/last": [1.0, 0.98]}),
        ("parity", {"tasks/parity/attention/last": [0.48, 0.61]}),
        ("clip", {"clip/lstm/0.5": [3, 4]}),
        ("clip", {"clip/gru/0.9": [3, "inf"]}),
        ("clip", {"clip/gru/4": [3, 4], "clip/lstm/4": [5, 6]}),
        ("lm", {"lm/gru/perplexity": 18.8}),
        ("lm", {"lm/lstm/residual": 2e-4}),
        ("depth", {"accelerator/speed_up/gru": [2.0, 0.9, 3.0]}),
        ("depth", {"accelerator/speed_up/lstm": [2.0, 5.0, 4.0]}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


FEWER = ("--config.lm.mixers=lstm", "--config.tasks.parity.mixers=attention")


@pytest.mark.parametrize("fewer", [FEWER, pytest.param((), marks=pytest.mark.slow)], ids=["fewer models", "all"])
def test_the_smoke_run(fewer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    assert cli.main(["run", "pararnn:smoke", f"--workdir={tmp_path / 'run'}", *fewer]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == {
        "residuals",
        "clip",
        "speed",
        "tasks",
        "language",
    }
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert statuses["exact"] == "holds"
    assert statuses["depth"] == "not run: no accelerator/speed_up/gru"
    assert results["metrics"]["lm/lstm/residual"] < 1e-4


def test_the_projection_follows_every_update():
    config = experiment.get_config("smoke")
    optimizer = optimizer_of(config, config.lm)
    params = {"A": jax.numpy.full((3, 4), 0.499), "kernel": jax.numpy.ones((2, 2))}
    grads = jax.tree.map(lambda leaf: -jax.numpy.ones_like(leaf), params)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda a, b: a + b, params, updates)
    np.testing.assert_allclose(params["A"], 0.5, atol=1e-6)  # it would be beyond
    assert (params["kernel"] > 1).all()


def test_paper_is_the_rows_of_the_tables():
    config = experiment.get_config("paper")
    experiment.check_config(config)
    for size, mixer, row in (
        ("400M", "gru", (5e-3, 1e-3, 1e-4, 256, 20_000, 1024, 24, 4)),
        ("2.9B", "attention", (3e-3, 1e-4, 1e-4, 512, 55_000, 2560, 32, 32)),
        ("7B", "lstm", (3e-3, 1e-4, 5e-6, 2048, 33_000, 4096, 32, 4)),
    ):
        config.lm.size = size
        recipe, model = lm_recipe(mixer, config), lm_model(mixer, experiment.VOCABULARY, config)
        assert row == (
            *(recipe.rate, recipe.weight_decay, recipe.z_loss, recipe.batch_size, recipe.updates),
            *(model.width, model.num_layers, model.num_heads),
        )
    config.lm.batch_size = 8  # what is given counts
    assert lm_recipe("gru", config).batch_size == 8
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


@pytest.mark.parametrize("seq", [1, pytest.param(2, marks=pytest.mark.slow)])  # the kernel, and chunks
def test_the_programs_of_the_tables_are_traced_without_numbers(seq):
    config = experiment.get_config("paper")
    config.lm.mixers = ("gru",)
    programs = experiment.programs(config, make_mesh(data=8 // seq, model=1, seq=seq))
    assert set(programs) == {"lm/gru/update"}
    update, arguments = programs["lm/gru/update"]
    state, batch, _ = arguments
    assert batch.shape == (256, 2049)
    assert state.params["embed"]["embedding"].shape == (50_432, 1024)
    kernels = str(update.trace(*arguments).jaxpr).count("recurrence_")
    assert bool(kernels) == (seq == 1)


@pytest.mark.slow  # tests/ops/test_newton.py splits sequences
def test_a_sequence_split_over_devices_gives_the_loss_of_one():
    config = experiment.get_config("smoke")
    config.lm.width = 64
    tokens = jax.random.randint(jax.random.key(0), (4, config.lm.length + 1), 0, 65)
    losses = []
    for mesh in (None, make_mesh(data=2, model=1, seq=4)):
        setup = set_up_lm("gru", 65, config, mesh)
        if mesh:  # parameters are never whole on one device
            embedding = setup.state.params["embed"]["embedding"]
            assert embedding.sharding.shard_shape(embedding.shape) == (65, 32)
        metrics = jax.jit(setup.train_step)(setup.state, tokens, jax.random.key(0))[1]
        losses.append((metrics["loss"], metrics["grad_norm"]))
    np.testing.assert_allclose(*losses, rtol=2e-5)  # float32: three Newton iterations against the loop


@pytest.mark.slow  # tests/ops/test_newton.py holds the gradients of both against each other
def test_training_through_newton_is_training_through_the_loop():
    config = experiment.get_config("smoke")
    batches = jax.random.randint(jax.random.key(0), (5, 4, config.lm.length + 1), 0, 65)
    curves = []
    for method in ("sequential", "chunked"):
        config.lm.method = method
        setup = set_up_lm("lstm", 65, config)
        train_step, state, curve = jax.jit(setup.train_step), setup.state, []
        for step, batch in enumerate(batches):
            state, metrics = train_step(state, batch, jax.random.key(step))
            curve.append(float(metrics["loss"]))
            assert metrics["newton_residual"] < 1e-4
        curves.append(curve)
    np.testing.assert_allclose(*curves, rtol=1e-4)  # float32, three iterations; Adam's first steps have equal size


def test_without_the_clip_a_task_is_solved_until_it_is_solved():
    config = experiment.get_config("paper")
    assert set_up_task("parity", "gru", config, abstractly).model.mixer_options["solver"].fallback == "sequential"
    assert not set_up_task("k_hop_1", "gru", config, abstractly).model.mixer_options


def test_polynorm_takes_the_swiglus_place_at_equal_parameters():
    config = experiment.get_config("smoke")
    sizes = {}
    for activation in ("swiglu", "polynorm"):
        config.lm.activation = activation
        setup = set_up_lm("gru", 7, config, jit=abstractly)
        sizes[activation] = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
        tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
        logits = jax.eval_shape(setup.model.apply, {"params": setup.state.params}, tokens)
        assert logits.shape == (2, 8, 7)
    assert sizes["polynorm"] - sizes["swiglu"] == 4 * config.lm.num_layers  # the coefficients


@pytest.mark.slow
def test_the_smoke_run_with_polynorm(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))
    options = (f"--workdir={tmp_path / 'run'}", *FEWER, "--config.lm.activation=polynorm")
    assert cli.main(["run", "pararnn:smoke", *options]) == 0
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    config, vocab_size = experiment.get_config("smoke"), vocabulary_size(OWN_SOURCE)
    shapes = set_up_lm("lstm", vocab_size, config, jit=abstractly).state.params
    swiglus = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert metrics["lm/lstm/parameters"] - swiglus == 4 * config.lm.num_layers
    assert metrics["lm/lstm/perplexity"] < vocab_size  # that of a guess


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (("lm", "text", "shakespear"), "config.lm.text=shakespear must be one of"),
        (("lm", "encoding", "words"), "config.lm.encoding=words must be one of"),
        (("lm", "size", "3B"), "config.lm.size=3B must be empty or one of"),
        (("lm", "rate", 0.0), "config.lm.rate=0.0 must be above 0"),
        (("lm", "batch_size", -1), "config.lm.batch_size=-1 must be at least 1"),  # no size, no row
        (("lm", "method", "newton"), "config.lm.method=newton must be one of"),
        (("lm", "mixers", ("gruu",)), r"config.lm.mixers=\('gruu',\) must be some of"),
        (("lm", "activation", "swish"), r"config.lm.activation=swish must be one of"),
    ],
)
def test_bad_fields_are_named(assignment, message):
    config = experiment.get_config("smoke")
    group, field, value = assignment
    config[group][field] = value
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)
