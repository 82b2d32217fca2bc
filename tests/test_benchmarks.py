"""The recurrence benchmark: its rivals compute the same thing, and a run of it leaves what it says."""

import json

import jax
import numpy as np
import pytest

from benchmarks import recurrence
from jaxpapers.sequence.pararnn import Solver, solve


def test_deer_has_the_states_and_gradients_of_the_sequential_method(monkeypatch):
    point = recurrence.Point("lstm", batch=2, width=3, length=7)
    params, g = recurrence.inputs(point)
    # Gradients are as exact as the Jacobians, which are those of the iterate before: with the authors' 1e-3, to 2e-5.
    monkeypatch.setattr(recurrence, "DEER_RTOL", 1e-6)
    monkeypatch.setattr(recurrence, "DEER_ATOL", 1e-6)

    def sequential(params, g):
        return solve(params, g, solver=Solver("sequential")).states

    def states_and_gradients(rival):
        def run(params, g):
            states, pull = jax.vjp(lambda *arrays: recurrence.outputs(rival(*arrays), point.width), params, g)
            return states, *pull(2 * states)

        return jax.tree.leaves(jax.jit(run)(params, g))

    # Float32, in sums of 7 steps and 2 sequences.
    for found, expected in zip(
        states_and_gradients(recurrence.deer_states), states_and_gradients(sequential), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_run_measures_every_rival_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recurrence, "QUICK", [recurrence.Point("gru", batch=1, width=2, length=3)])
    monkeypatch.setattr(recurrence, "QUICK_UPDATES", [(1, 3)])
    monkeypatch.setattr(recurrence, "LANGUAGE", {"width": 4, "num_layers": 1, "num_heads": 1, "vocab_size": 5})
    files = {"--json": tmp_path / "figures.json", "--plot": tmp_path / "ratios.png"}
    options = [text for option, file in files.items() for text in (option, str(file))]
    assert recurrence.main(["--quick", "--rounds", "2", *options]) == 0
    figures = json.loads(files["--json"].read_text())
    point, update = figures["points"][0], figures["updates"][0]
    assert set(point["seconds"]) == {"auto", "sequential", "parallel", "chunked", "lax.scan", "DEER"}
    assert set(update["seconds"]) == {"auto", "sequential", "chunked"}
    assert max(point["errors"].values()) < recurrence.DEERS_AGREEMENT
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "auto / best method" in printed
    assert "update by auto" in printed


def test_on_an_accelerator_the_kernel_and_the_copy_take_part():
    point = recurrence.Point("gru", batch=1, width=2, length=3)
    programs = recurrence.rivals_at(point, accelerator=True)
    assert "fused" in programs
    params, g = recurrence.inputs(point)
    for gradients, shapes in ((False, [(3, 1, 1, 2)]), (True, [(3, 1, 1, 2), (3, 1, 3, 2)])):
        copied = recurrence.plain_copy(params, g, 1, gradients)
        assert [array.shape for array in copied] == shapes


def test_programs_that_differ_are_not_timed():
    with pytest.raises(SystemExit, match="chunked differs"):
        recurrence.refuse_disagreement("here", {"parallel": 1e-6, "chunked": float("nan")})
