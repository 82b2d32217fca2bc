"""The benchmark of activations: routes that agree, the refusal of those that do not, and the files of a run."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import activation

ROUTES = {"fused", "plain", "remat"}
TORCHS = {"PyTorch", "PyTorch, recomputed"}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_measures_every_route_and_leaves_its_figures(dtype, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(activation, "SAMPLE_S", 0.0)
    small = {"width": 8, "num_layers": 1, "num_heads": 2, "hidden": 12}
    monkeypatch.setattr(activation, "MODEL", activation.MODEL | small)
    monkeypatch.setattr(activation, "CONTEXT", 4)
    file = tmp_path / "figures.json"
    options = ["--rows", "16", "--width", "96", "--dtype", dtype, "--rounds", "2", "--json", str(file)]
    assert activation.main(options) == 0
    figures = json.loads(file.read_text())
    for name in activation.CANDIDATES:
        assert set(figures[name]["seconds"]) == ROUTES | TORCHS
        assert set(figures[name]["bytes"]) == ROUTES
        # The fused function keeps its input; the plain formula that, and the powers and quotients in float32.
        kept = {route: sizes["kept"] for route, sizes in figures[name]["bytes"].items()}
        assert 3 * kept["fused"] < kept["plain"]
        assert kept["remat"] <= kept["fused"] < 1.2 * 16 * 96 * jnp.dtype(dtype).itemsize
        assert figures[name]["bytes"]["fused"]["temporary"] > 0
    for what, names in {"activations": {"SwiGLU's product", "PolyNorm"}, "models": {"swiglu", "polynorm"}}.items():
        assert names < set(figures[what]["seconds"])
        assert {len(times) for times in figures[what]["seconds"].values()} == {2}
    text = capsys.readouterr().out
    assert "SwiGLU's product" in text
    assert "tokens/s" in text


def test_models_of_all_activations_have_equally_many_parameters():
    tokens = jnp.zeros((1, 5), jnp.int32)
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(activation.language_update(name, tokens).state.params))
        for name in activation.MODELS
    ]
    assert max(counts) <= 1.001 * min(counts)


def test_without_pytorch_it_takes_no_part(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert activation.find_torch(None) is None
    assert "PyTorch takes no part" in capsys.readouterr().out


@pytest.mark.parametrize("route", ["plain", "theirs"])
def test_routes_that_differ_are_not_timed(route, monkeypatch):
    torch = pytest.importorskip("torch")
    candidate = activation.CANDIDATES["PolyNorm"]
    wrong = {
        "plain": activation.CANDIDATES["PolyReLU"].plain,
        "theirs": activation.their_polyrelu,
    }
    monkeypatch.setitem(activation.CANDIDATES, "PolyNorm", candidate._replace(**{route: wrong[route]}))
    x, g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 96)), jnp.float32)
    where = {"plain": "plain", "theirs": "PyTorch"}[route]
    with pytest.raises(SystemExit, match=f"PolyNorm, {where}: values differs"):
        activation.compare_routes("PolyNorm", x, g, torch, 1)


@pytest.mark.parametrize("options", [["--rows", "0"], ["--width", "100"]])
def test_shapes_that_do_not_match_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        activation.main(options)
    assert "the width a multiple of 3" in capsys.readouterr().err
