"""The training benchmark: rivals that agree with ours, and the refusal of those that do not."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import training

# The smallest models that have every part.
TINY = {
    "itransformer": {"variates": 3, "width": 8, "batch": 2, "steps": 5, "layers": 1, "heads": 2},
    "adafortitran": {"subcarriers": 6, "layers": 1, "batch": 2, "width": 8, "heads": 2, "positions": 20},
    "polycom": {"batch": 2, "context": 6, "layers": 1, "width": 8, "heads": 2, "hidden": 12, "vocabulary": 5},
    "matryoshka": {"batch": 6, "classes": 3, "nesting": (4, 16), "inputs": 5, "hidden": (7, 6)},
}


def make(slug, **settings):
    torch = pytest.importorskip("torch")
    return importlib.import_module(f"benchmarks.rivals.{slug}").make(torch, **TINY[slug], **settings)


def test_every_paper_with_a_rival_is_tested():
    assert training.papers() == sorted(TINY)


@pytest.mark.parametrize("slugs", [["polycom"], []])
def test_without_pytorch_it_says_what_to_install(slugs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install"):
        training.main(slugs)


def test_an_unknown_paper_is_refused(capsys):
    with pytest.raises(SystemExit):
        training.main(["koopmann"])
    assert "no rival of 'koopmann'" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["loss", "gradient", "nan"])
def test_sides_that_differ_are_not_timed(change):
    theirs = (np.float32(2.0), {"layer": {"kernel": np.ones(4), "bias": np.zeros(2)}})
    loss, gradients = theirs[0], {"layer": {"kernel": np.ones(4), "bias": np.full(2, 1e-7)}}  # rounding alone
    assert training.refuse_disagreement("here", (loss, gradients), theirs) < training.AGREEMENT
    if change == "loss":
        loss = loss * 1.01
    else:
        gradients["layer"]["bias"] = np.full(2, 1e-2 if change == "gradient" else np.nan)
    with pytest.raises(SystemExit, match=f"here: {'the loss' if change == 'loss' else 'layer/bias'} differs"):
        training.refuse_disagreement("here", (loss, gradients), theirs)


@pytest.mark.parametrize("slug", sorted(TINY))
def test_a_rival_has_our_loss_and_gradients(slug):
    sides = make(slug)
    ours, theirs = sides.gradients()
    assert training.refuse_disagreement(slug, ours, theirs) < training.AGREEMENT
    # A rival that updates its parameters no longer agrees with the weights that ours started from.
    sides.theirs()
    with pytest.raises(SystemExit, match="differs"):
        training.refuse_disagreement(slug, *sides.gradients())


def test_the_resnets_weights_are_ours():
    sides = make("matryoshka", resnet=True, side=8)  # its agreement takes long to compile: the benchmark sees to that
    state, _ = jax.eval_shape(sides.ours.step, sides.ours.state, sides.ours.batch, sides.ours.key)
    assert len(jax.tree.leaves(state.params["encoder"])) == 3 + 8 * 6 + 3 * 3


def test_a_run_leaves_its_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    rival = importlib.import_module("benchmarks.rivals.matryoshka")
    monkeypatch.setattr(rival, "POINTS", {"tiny": TINY["matryoshka"]})
    monkeypatch.setattr(training, "SAMPLE_S", 0.0)
    file = tmp_path / "figures.json"
    assert training.main(["matryoshka", "--rounds", "2", "--torch-threads", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["environment"]["torch threads"] == 1
    assert {name: len(times) for name, times in figures["seconds"]["matryoshka"]["tiny"].items()} == {
        "jaxpapers": 2,
        "PyTorch": 2,
    }
    assert "geometric mean over 1 papers" in capsys.readouterr().out
