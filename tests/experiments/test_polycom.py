"""PolyCom's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.catalogue import UsageError
from experiments.components import _polycom_training as training
from experiments.components import polycom as experiment
from experiments.components._polycom_theory import analyse_approximation, analyse_overhead
from experiments.harness import check_claims
from jaxpapers.components.polycom import FeedForward
from jaxpapers.sequence.pararnn import ParaRNNLM, language_loss
from jaxpapers.train import make_mesh

# The measured column of the card's table of claims; where it has means alone, each seed has the mean.
MEASURED = {
    "polynorm/train": [1.8655, 1.8511, 1.8786],
    "swiglu/train": [1.8925, 1.8772, 1.8886],
    "relu2/train": [1.9002, 1.8759, 1.9075],
    "relu/train": [1.9238, 1.9012, 1.9123],
    "gelu/train": [1.9257, 1.9143, 1.9473],
    "polyrelu/train": [1.8753, 1.8660, 1.8998],
    **{
        f"{name}/validation": [value] * 3
        for name, value in {
            "polynorm": 1.934,
            "swiglu": 1.945,
            "relu2": 1.952,
            "relu": 1.965,
            "gelu": 1.977,
            "polyrelu": 1.942,
        }.items()
    },
    **{
        f"{name}/rank/{matrix}": [rank] * 3
        for name, rank in {
            "polynorm": 45.9,
            "swiglu": 46.1,
            "relu": 45.6,
            "gelu": 45.2,
            "relu2": 45.6,
            "polyrelu": 45.9,
        }.items()
        for matrix in ("up", "down")
    },
    "approximation/cells": [4, 8, 16, 32, 64],
    "approximation/n2": [0.3, 7.7e-2, 1.92e-2, 4.78e-3, 1.20e-3],
    "approximation/n3": [6.28e-2 / 8**i for i in range(5)],
    "sawtooth/levels": [1, 6, 7, 8],
    "sawtooth/error": [2.0**-4, 2.0**-14, 2.0**-16, 2.0**-18],
    "exact/square": 0.0,
    "exact/product": 1e-16,
    "overhead/input_bytes": 4_194_304,
    "overhead/tokens": 2048,
    "overhead/plain/residual_bytes": 4 * 4_194_304,
    "overhead/remat/residual_bytes": 4_194_320,
    "overhead/fused/residual_bytes": 4_194_320 + 3 * 4 * 2048,
    **{f"overhead/{name}/milliseconds": 1.0 for name in ("plain", "remat", "fused")},
    "overhead/gradient_difference": 2e-16,
}


def status(changes):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, {**MEASURED, **changes})}


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["polynorm"].startswith(
        "training (seeds) / validation: PolyNorm 1.8651 (1.8655, 1.8511, 1.8786) / 1.9340"
    )
    assert texts["rate"].endswith("slopes -3.00, -3.00, -3.00, -3.00; ReLU levels 7, PolyReLU's x^2 to 0e+00")


def shifted(name, by):
    return {name: [value + by for value in MEASURED[name]]}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("polynorm", shifted("swiglu/train", -0.0165)),  # ahead by 0.0211
        ("polynorm", shifted("relu2/train", -0.0148)),  # by 0.0294
        ("polynorm", shifted("relu/train", -0.034)),
        ("polynorm", shifted("gelu/train", -0.05)),
        ("polynorm", {"relu2/validation": [1.9415] * 3}),
        ("polynorm", {"swiglu/validation": [1.9339] * 3}),
        ("polynorm", {"polynorm/train": [1.8655, "nan", 1.8786]}),
        ("polyrelu", shifted("polyrelu/train", 0.021)),  # ReLU is 0.0321 above
        ("polyrelu", {"polyrelu/validation": [1.9535] * 3}),
        ("polyrelu", shifted("relu2/train", -0.0143)),
        ("polyrelu", {"relu2/validation": [1.9419] * 3}),
        ("polyrelu", {"polynorm/validation": [1.9455] * 3}),
        ("rate", {"approximation/n2": [0.3, 7.7e-2, 1.92e-2, 4.78e-3, 1.30e-3]}),
        ("rate", {"approximation/n3": [6.28e-2 / 7.6**i for i in range(5)]}),
        ("rate", {"sawtooth/error": [2.0**-4, 2.0**-14 + 2e-9, 2.0**-16, 2.0**-18]}),
        ("rate", {"exact/square": 2e-12}),
        ("memory", {"overhead/fused/residual_bytes": 1.06 * 4_194_304 + 3 * 4 * 2048}),
        ("memory", {"overhead/plain/residual_bytes": 2.4 * 4_194_304}),
        ("memory", {"overhead/gradient_difference": 2e-10}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


def test_what_needs_no_training_satisfies_its_claims():
    config = experiment.get_config("small")
    config.overhead.repeats = 1
    metrics = analyse_approximation(config) | analyse_overhead(config)
    statuses = {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, metrics)}
    assert (statuses["rate"], statuses["memory"]) == ("holds", "holds")
    # The card's printed digits.
    np.testing.assert_allclose(metrics["approximation/n2"][3:], [4.78e-3, 1.20e-3], rtol=5e-3)
    np.testing.assert_allclose(metrics["approximation/n3"][[0, -1]], [6.28e-2, 1.52e-5], rtol=5e-3)
    np.testing.assert_allclose(metrics["sawtooth/error"][5], 6.104e-5, rtol=1e-4)


def test_the_smoke_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path / "nothing"))  # it must need no file
    assert cli.main(["run", "polycom:smoke", f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"approximation", "loss", "rates", "ranks", "ablation"}
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert (statuses["polynorm"], statuses["rate"]) == ("not run: no polyrelu/train", "holds")
    metrics = results["metrics"]
    for name, stage in results["config"]["stages"].items():
        prefixes = [name, *(f"{name}/rate_{rate:g}" for rate in stage["rates"][1:])]
        for prefix in prefixes:
            assert np.isfinite(metrics[f"{prefix}/train"]).all()
            assert np.isfinite(metrics[f"{prefix}/validation"]).all()
            assert 1 <= metrics[f"{prefix}/rank/up"][0] <= 12
    assert 0.125 <= metrics["moe_swiglu/load"][0] <= 0.5  # of the two that each token takes, one at most
    assert "by peak learning rate" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


def test_members_of_a_population_share_seeds_and_batches_and_differ_in_the_rate(smoke):
    config = smoke.copy_and_resolve_references()
    config.num_seeds = 2
    text = np.arange(1_000, dtype=np.int32) % 11
    assert training.members("polynorm", config) == [(0, 3e-3), (1, 3e-3), (0, 1.5e-3), (0, 6e-3)]
    config.stages.relu = {**config.stages.polynorm, "activation": "relu"}
    setup, other = (training.set_up_population(name, text, 11, config) for name in ("polynorm", "relu"))
    batch = np.asarray(setup.batches.batch_at(3))
    np.testing.assert_array_equal(batch, other.batches.batch_at(3))
    np.testing.assert_array_equal(batch[0], batch[2])
    assert (batch[0] != batch[1]).any()
    head = np.asarray(setup.state.params["head"]["kernel"])
    np.testing.assert_array_equal(head[0], head[3])
    np.testing.assert_array_equal(head, other.state.params["head"]["kernel"])
    assert (head[0] != head[1]).any()
    # The rate of every update is its member's: warm-up from 0, and Adam's steps of the size of the rate.
    state = setup.state
    step = jax.jit(setup.train_step)
    state, _ = step(state, batch, setup.keys)
    np.testing.assert_array_equal(state.params["head"]["kernel"], head)
    state, _ = step(state, batch, setup.keys)
    moved = np.abs(np.asarray(state.params["head"]["kernel"]) - head).max(axis=(1, 2))
    np.testing.assert_allclose(moved[[2, 3]] / moved[0], [0.5, 2.0], rtol=1e-3)  # float32


def test_pararnn_takes_the_feed_forward_block():
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 7)
    feed_forward = partial(FeedForward, activation="polynorm", hidden=24)
    model = ParaRNNLM(8, 2, 2, vocab_size=7, mixer="attention", feed_forward=feed_forward, scan=True)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    np.testing.assert_allclose(
        params["blocks"]["layers"]["mlp"]["activation"]["coeffs"], [[0, 1 / 3, 1 / 3, 1 / 3]] * 2
    )

    def loss(params):
        return language_loss(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])[0]

    grads = jax.jit(jax.grad(loss))(params)["blocks"]["layers"]["mlp"]["activation"]["coeffs"]
    assert (jnp.abs(grads) > 0).all()


def test_paper_is_the_cards_table():
    config = experiment.get_config("paper")
    experiment.check_config(config)
    for name, row in (
        ("polynorm", (24, 2048, 16, 8256, 0, 3e-4, 64)),
        ("moe_swiglu", (16, 2048, 16, 1536, 64, 4e-4, 1024)),
    ):
        size = training.size_of(name, 0, config)
        found = (size.num_layers, size.width, size.num_heads, size.hidden, size.num_experts)
        assert (*found, size.learning_rate, size.batch_size) == row
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_the_programs_are_traced_without_numbers(smoke):
    config = experiment.get_config("paper")
    config.stages = {name: config.stages[name] for name in ("swiglu", "moe_polynorm")}
    programs = experiment.programs(config, make_mesh(data=8, model=1))
    assert set(programs) == {"lm/swiglu/update", "lm/moe_polynorm/update"}
    for name, shape in (("swiglu", (64, 4097)), ("moe_polynorm", (1024, 4097))):
        update, arguments = programs[f"lm/{name}/update"]
        state, batch, _ = arguments
        assert batch.shape == shape
        up = state.params["blocks"]["layers"]["mlp"]["up"]
        up = up["kernel"] if name == "swiglu" else up
        assert "data" in up.sharding.spec
        text = str(update.trace(*arguments).jaxpr)
        assert ("ragged_dot" in text) == (name == "moe_polynorm")
    assert set(experiment.programs(smoke, make_mesh(data=8, model=1))) == {f"lm/{name}" for name in smoke.stages}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"num_seeds": 0}, "config.num_seeds=0 must be at least 1"),
        ({"num_rate_seeds": 2}, "config.num_rate_seeds=2 must be between 1 and num_seeds=1"),
        ({"lm": {"text": "shakespear"}}, "config.lm.text=shakespear must be one of"),
        ({"lm": {"width": 14}}, r"config.lm.width=14 must be a multiple of 2 num_heads=4 \(rotary positions\)"),
        ({"lm": {"warmup": 10}}, "config.lm.warmup=10 must be from 0 to below 10"),
        ({"lm": {"last_rate": 0.0}}, "config.lm.last_rate=0.0 must be in"),
        ({"lm": {"clip_norm": 0.0}}, "config.lm.clip_norm=0.0 must be above 0"),
        ({"lm": {"scan": True}}, "config.lm.scan=True must be False for small models"),
        ({"stages": {"polynorm": {"activation": "swish"}}}, "config.stages.polynorm.activation=swish must be one of"),
        ({"stages": {"moe_swiglu": {"hidden": 25}}}, "config.stages.moe_swiglu.hidden=25 must be a multiple of 3"),
        ({"stages": {"polynorm": {"order": 0}}}, "config.stages.polynorm.order=0 must be at least 1"),
        ({"stages": {"polynorm": {"rates": (0.0,)}}}, "config.stages.polynorm.rates=.* must be some learning rates"),
        ({"stages": {"polynorm": {"size": "7B"}}}, "config.stages.polynorm.size=7B must be empty or one of"),
        ({"stages": {"moe_swiglu": {"top_k": 9}}}, "config.stages.moe_swiglu.top_k=9 must be between 1 and"),
    ],
)
def test_bad_fields_are_named(smoke, assignment, message):
    config = smoke.copy_and_resolve_references()
    config.update(assignment)
    with pytest.raises(UsageError, match=message):
        experiment.check_config(config)
