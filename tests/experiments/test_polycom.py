"""PolyCom's experiment: the smoke run through the command line, and the claims on the card's own figures."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import cli
from experiments.catalogue import UsageError
from experiments.components import _polycom_training as training
from experiments.components import polycom as experiment
from experiments.components._polycom_theory import analyse_approximation, analyse_overhead
from experiments.harness import Run, check_claims
from jaxpapers.components.polycom import DECAYS, SIZES, FeedForward, Size
from jaxpapers.sequence.pararnn import ParaRNNLM, language_loss
from jaxpapers.train import make_mesh, read_metrics

# The measured column of the card's table of claims; where it has means alone, each seed has the mean.
MEASURED = {
    "lm/sized": False,
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


def status_of(metrics):
    return {claim["id"]: claim["status"] for claim in check_claims(experiment.CLAIMS, metrics)}


def status(changes):
    return status_of({**MEASURED, **changes})


def test_claims_hold_on_the_cards_figures():
    assert set(status({}).values()) == {"holds"}
    texts = {claim["id"]: claim["ours"] for claim in check_claims(experiment.CLAIMS, MEASURED)}
    assert texts["polynorm"].startswith(
        "training (seeds) / validation (seeds): PolyNorm 1.8651 (1.8655, 1.8511, 1.8786) / "
        "1.9340 (1.9340, 1.9340, 1.9340); "
    )
    assert texts["rate"].endswith("-3.00, -3.00; ReLU levels 7, PolyReLU's x^2 to 0e+00, u v to 1e-16")


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
        ("rate", {"exact/product": 2e-12}),
        ("rate", {f"approximation/{what}": MEASURED[f"approximation/{what}"][:3] for what in ("cells", "n2", "n3")}),
        ("memory", {"overhead/fused/residual_bytes": 1.06 * 4_194_304 + 3 * 4 * 2048}),
        ("memory", {"overhead/plain/residual_bytes": 2.4 * 4_194_304}),
        ("memory", {"overhead/gradient_difference": 2e-10}),
    ],
)
def test_claims_fail_where_they_should(claim, changes):
    assert status(changes)[claim] == "fails"


def test_claims_of_small_models_ask_for_three_seeds():
    two = {name: value[:2] for name, value in MEASURED.items() if name.startswith("swiglu/")}
    assert status(two) == {**status({}), "polynorm": "not run: no 3 seeds"}
    ones = {name: value[:1] for name, value in MEASURED.items() if name.endswith(("/train", "/validation"))}
    assert status(ones)["polyrelu"] == "not run: no 3 seeds"
    assert status(ones | {"lm/sized": True})["polyrelu"] == "holds"  # the paper's runs have no seeds


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
    assert figures == {"approximation", "loss", "experts", "rates", "ranks", "ablation"}
    statuses = {claim["id"]: claim["status"] for claim in results["claims"]}
    assert (statuses["polynorm"], statuses["rate"]) == ("not run: no swiglu/train", "holds")
    metrics = results["metrics"]
    for name, stage in results["config"]["stages"].items():
        prefixes = [name, *(f"{name}/rate_{rate:g}" for rate in stage["rates"][1:])]
        for prefix in prefixes:
            assert np.isfinite(metrics[f"{prefix}/train"]).all()
            assert np.isfinite(metrics[f"{prefix}/validation"]).all()
            assert 1 <= metrics[f"{prefix}/rank/up"][0] <= 12
    assert 0.125 <= metrics["moe_swiglu/load"][0] <= 0.5  # of the two that each token takes, one at most
    assert "by peak learning rate" in capsys.readouterr().err


def test_the_table_has_the_papers_order_and_the_other_text_below():
    config = experiment.get_config("small")
    metrics = {f"{name}/{what}": [1.0] for name in config.stages for what in ("train", "validation")}
    for name in experiment.COMPARED:
        metrics |= {
            f"{name}/rate_{rate:g}/{what}": [2.0] for rate in (1.5e-3, 6e-3) for what in ("train", "validation")
        }
    metrics |= {"wiki_swiglu/train": [1.5], "wiki_swiglu/validation": [1.625]}
    lines = experiment.rate_table(metrics, config).splitlines()[1:]
    names = ["PolyNorm", "PolyReLU", "SwiGLU", "ReLU²", "ReLU", "GELU"]
    names += [f"{name}, WikiText-2, small" for name in ("PolyNorm", "SwiGLU")]
    assert [line.split("  ")[0] for line in lines] == names
    assert lines[0].endswith("0.0015: 2.000 / 2.000   0.003: 1.000 / 1.000   0.006: 2.000 / 2.000")
    assert lines[-1].endswith(" 0.003: 1.500 / 1.625")


@pytest.fixture(scope="module")
def smoke():
    return experiment.get_config("smoke")


def test_members_of_a_population_share_seeds_and_batches_and_differ_in_the_rate(smoke):
    config = smoke.copy_and_resolve_references()
    config.num_seeds = 2
    text = np.arange(1_000, dtype=np.int32) % 11
    assert training.members("polynorm", config) == [(0, 3e-3), (1, 3e-3), (0, 1.5e-3), (0, 6e-3)]
    config.stages.polynorm.num_seeds = 1
    assert training.members("polynorm", config) == [(0, 3e-3), (0, 1.5e-3), (0, 6e-3)]
    config.stages.polynorm.num_seeds = 0
    config.stages.relu = {**config.stages.polynorm, "activation": "relu"}
    setup, other = (training.set_up_population(name, text, 11, config) for name in ("polynorm", "relu"))
    batch = np.asarray(setup.batches.batch_at(3, text))
    np.testing.assert_array_equal(batch, other.batches.batch_at(3, text))
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
        size = training.size_of(name, config)
        found = (size.num_layers, size.width, size.num_heads, size.hidden, size.num_experts)
        assert (*found, size.learning_rate, size.batch_size) == row
        assert training.length_of(name, config) == 4096
        assert {"embeddings", "coefficients"} <= set(size.decay)
    # What is given counts.
    config.lm.update({"width": 512, "length": 128, "batch_size": 32, "updates": 1_000, "warmup": 20, "vocab_size": 99})
    config.lm.decay = ("matrices",)
    config.stages.polynorm.update({"hidden": 300, "rates": (1e-2,)})
    size = training.size_of("polynorm", config)
    assert size == Size(512, 24, 16, 300, 99, 0, 0, 1e-2, 0.02, 32, 1_000, ("matrices",))
    assert training.length_of("polynorm", config) == 128
    with pytest.raises(ValueError, match="preset must be smoke, small or paper"):
        experiment.get_config("tiny")


def test_the_programs_are_traced_without_numbers(smoke):
    config = experiment.get_config("paper")
    config.stages = {name: config.stages[name] for name in ("swiglu", "moe_polynorm")}
    programs = experiment.programs(config, make_mesh(data=8, model=1))
    assert set(programs) == {f"lm/{name}/{what}" for name in config.stages for what in ("update", "evaluate")}
    for name, shape in (("swiglu", (64, 4097)), ("moe_polynorm", (1024, 4097))):
        update, arguments = programs[f"lm/{name}/update"]
        state, batch, _ = arguments
        assert batch.shape == shape
        up = state.params["blocks"]["layers"]["mlp"]["up"]
        up = up["kernel"] if name == "swiglu" else up
        assert "data" in up.sharding.spec
        text = str(update.trace(*arguments).jaxpr)
        assert ("ragged_dot" in text) == (name == "moe_polynorm")
        # A microbatch of a sequence a device: neither all logits nor all weights of the attention.
        vocab = training.size_of(name, config).vocab_size
        assert f"[8,1024,{vocab}]" in text
        assert f"[8,4096,{vocab}]" not in text
        assert ",512,4096]" in text
        assert ",4096,4096]" not in text
    assert set(experiment.programs(smoke, make_mesh(data=8, model=1))) == {f"lm/{name}" for name in smoke.stages}


TINY = Size(64, 1, 2, 24, 97, 0, 0, 3e-3, 0.1, 16, 8, DECAYS)


@pytest.fixture
def tiny(monkeypatch):
    """The preset of the paper with sizes that a test can train."""
    monkeypatch.setitem(SIZES, "1B", TINY)
    monkeypatch.setitem(SIZES, "1B-7B", TINY._replace(num_experts=4, top_k=2))
    config = experiment.get_config("paper")
    for group in ("approximation", "overhead"):
        config[group] = experiment.get_config("smoke")[group]
    config.lm.update({"length": 12, "dtype": "float32", "updates_per_call": 2, "evaluate_every": 4})
    config.lm.update({"loss_chunk": 5, "attention_chunk": 5})
    return config


def write_tokens(folder, vocab_size=97, validation=400):
    """Training text as `.bin`, validation text as `.npy`: a token is mostly the last one's successor."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ids = np.cumsum(1 + (rng.random(3_000) < 0.1)) % vocab_size
    ids.astype("<u2").tofile(folder / "train.bin")
    np.save(folder / "validation.npy", ids[:validation].astype(np.int64))


@pytest.mark.parametrize("name", ["polynorm", pytest.param("moe_polynorm", marks=pytest.mark.slow)])
def test_models_with_a_size_are_trained_on_a_mesh(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    write_tokens(tmp_path / tiny.stages[name].text)
    config, mesh = tiny, make_mesh(data=8)
    config.stages = {name: config.stages[name]}
    run = Run(tmp_path / "run", Console(quiet=True), mesh)
    metrics = experiment.run(config, run)
    figures = {path.stem for path in (run.workdir / "figures").iterdir()}
    assert figures == {"approximation", "loss"} | ({"experts"} if name == "moe_polynorm" else set())
    lines = [line["train/cross_entropy"] for line in read_metrics(run.workdir) if "train/cross_entropy" in line]
    assert len(lines) == 4  # of two updates each
    np.testing.assert_allclose(metrics[f"{name}/train"], [np.mean(lines)])
    assert lines[-1] < lines[0]
    # 33 windows of 12 targets in batches of 8, one sequence a device; the text is as the training's.
    assert metrics[f"{name}/validation"] == pytest.approx(lines[-1], abs=0.2)
    # What starts the training is never whole on one device.
    state = training.set_up_single(name, config, mesh).state
    for head in (state.params["head"]["kernel"], state.opt_state[1][0].mu["head"]["kernel"]):
        assert head.sharding.shard_shape(head.shape) == (64 // 8, 97)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_chunks_and_microbatches_give_the_update_of_the_whole_batch(devices, tiny):
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices]) if devices > 1 else None
    batches = np.random.default_rng(0).integers(97, size=(2, 16, 13)).astype(np.int32)
    curves = []
    for where, changes in (
        (None, {"microbatch": 0, "loss_chunk": 0, "attention_chunk": 0}),
        (mesh, {"microbatch": 8 // devices, "loss_chunk": 5, "attention_chunk": 5}),
    ):
        tiny.lm.update({"warmup": 0, **changes})
        setup = training.set_up_single("polynorm", tiny, where)
        assert setup.rows == (8 if changes["microbatch"] else 16)
        state, step, curve = setup.state, jax.jit(setup.train_step), []
        for batch in batches:
            state, metrics = step(state, batch, jax.random.key(0))
            curve.append([float(metrics[name]) for name in ("loss", "cross_entropy", "grad_norm")])
        curves.append([*curve, [float(optax.tree.norm(state.params))] * 3])
    np.testing.assert_allclose(*curves, rtol=1e-4)  # float32, sums in another order; Adam's first steps are signs


def test_what_fills_up_the_last_batch_of_an_evaluation_does_not_count(tiny):
    setup = training.set_up_single("polynorm", tiny)
    windows = np.random.default_rng(0).integers(97, size=(3, 13)).astype(np.int32)
    batches = training.evaluation_batches(windows, 2)
    assert [weights.tolist() for _, weights in batches] == [[1, 1], [1, 0]]
    scores = [setup.evaluate(setup.state.params, *batch)["cross_entropy"] for batch in batches]
    ones = [setup.evaluate(setup.state.params, np.stack([w, w]), np.ones(2, np.float32)) for w in windows]
    np.testing.assert_allclose(scores[1], ones[2]["cross_entropy"], rtol=1e-6)
    expected = np.mean([one["cross_entropy"] for one in ones])
    np.testing.assert_allclose(np.average(scores, weights=[2, 1]), expected, rtol=1e-6)


def test_a_text_that_is_missing_leaves_its_stages_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    metrics = experiment.run(tiny, Run(tmp_path / "run", Console(quiet=True)))
    for folder in ("redpajama", "olmoe_mix"):
        assert "has no train.npy" in metrics[f"lm/tokens/{folder}/left_out"]
    assert status_of(metrics)["polynorm"] == "not run: no polynorm/train"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"num_seeds": 2}, "config.num_seeds=2 must be 1, as stages.* has a size"),
        ({"stages": {"relu": {"rates": (1e-3, 2e-3)}}}, r"config.stages.relu.rates=\(0.001, 0.002\) must be one"),
        ({"stages": {"relu": {"rates": (-2.0,)}}}, "config.stages.relu.rates=.* must be some learning rates"),
        ({"stages": {"relu": {"text": "tokens/"}}}, "config.stages.relu.text=tokens/ must be empty or as lm.text"),
        ({"stages": {"relu": {"text": "wikitext2_small"}}}, "config.lm.vocab_size=-1 must be at least the number"),
        ({"lm": {"decay": ("norm",)}}, r"config.lm.decay=\('norm',\) must be some of"),
        ({"lm": {"updates": 0}}, "config.lm.updates=0 must be at least 1"),
        ({"lm": {"batch_size": 12}}, "config.lm.batch_size=12 must be a multiple of the 8 devices along mesh.data"),
        ({"lm": {"batch_size": 32, "microbatch": 3}}, "config.lm.microbatch=3 must be a divisor of a device's 4"),
    ],
)
def test_bad_fields_of_models_with_a_size_are_named(tiny, assignment, message, tmp_path):
    tiny.update(assignment)
    with pytest.raises(UsageError, match=message):
        experiment.programs(tiny, make_mesh(data=8))
    with pytest.raises(UsageError, match=message):
        experiment.run(tiny, Run(tmp_path, Console(quiet=True), make_mesh(data=8)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"num_seeds": 0}, "config.num_seeds=0 must be at least 1"),
        (
            {"stages": {"polynorm": {"num_seeds": 2}}},
            "config.stages.polynorm.num_seeds=2 must be between 0 and num_seeds=1",
        ),
        ({"num_rate_seeds": 2}, "config.num_rate_seeds=2 must be between 1 and num_seeds=1"),
        ({"lm": {"text": "shakespear"}}, "config.lm.text=shakespear must be one of"),
        ({"lm": {"width": 14}}, r"config.lm.width=14 must be a multiple of 2 num_heads=4 \(rotary positions\)"),
        ({"lm": {"warmup": 10}}, "config.lm.warmup=10 must be from 0 to below 10"),
        ({"lm": {"last_rate": 0.0}}, "config.lm.last_rate=0.0 must be in"),
        ({"lm": {"clip_norm": 0.0}}, "config.lm.clip_norm=0.0 must be above 0"),
        ({"lm": {"betas": (0.9, 1.0)}}, r"config.lm.betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
        ({"lm": {"betas": (0.9,)}}, r"config.lm.betas=\(0.9,\) must be two numbers"),
        ({"router": {"z_loss": -0.1}}, "config.router.z_loss=-0.1 must be at least 0"),
        ({"router": {"load_balance": -1.0}}, "config.router.load_balance=-1.0 must be at least 0"),
        ({"approximation": {"cells": ()}}, r"config.approximation.cells=\(\) must be some numbers, each at least 1"),
        ({"approximation": {"levels": (1, 0)}}, r"config.approximation.levels=\(1, 0\) must be some numbers"),
        ({"approximation": {"points": 0}}, "config.approximation.points=0 must be at least 1"),
        ({"overhead": {"order": 0}}, "config.overhead.order=0 must be at least 1"),
        ({"overhead": {"repeats": 0}}, "config.overhead.repeats=0 must be at least 1"),
        ({"lm": {"scan": True}}, "config.lm.scan=True must be False for small models"),
        ({"lm": {"microbatch": 2}}, "config.lm.microbatch=2 must be 0 for small models"),
        ({"lm": {"loss_chunk": -1}}, "config.lm.loss_chunk=-1 must be at least 0"),
        ({"lm": {"width": -1}}, "config.lm.width=-1 must be at least 1"),  # no size, no row
        ({"lm": {"text": "tokens/x"}}, "config.lm.vocab_size=-1 must be at least the number of tokens of tokens/x"),
        ({"lm": {"encoding": "words"}}, "config.lm.encoding=words must be one of"),
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
