"""Times and memory that experiments report."""

import time

import jax
import jax.numpy as jnp
import pytest

from experiments.timing import least_seconds, residual_bytes, residuals, seconds_in_turns, temporary_bytes


@pytest.fixture
def clock(monkeypatch):
    """A clock that calls set forward, and makes such calls: of the durations given, one a run."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def calls_of(durations):
        durations = iter(durations)

        def call():
            now[0] += next(durations)

        return call

    return calls_of


def test_the_least_of_the_timed_runs_is_taken_and_the_first_run_is_none_of_them(clock):
    durations = iter([0.0, 5.0, 2.0, 3.0])
    assert least_seconds(clock(durations), 3) == 2.0
    assert next(durations, None) is None


def test_calls_are_timed_in_turns(clock):
    order = []

    def noted(name, call):
        return lambda: (order.append(name), call())[1]

    calls = {"a": noted("a", clock([9.0, 1.0, 2.0])), "b": noted("b", clock([9.0, 3.0, 4.0]))}
    assert seconds_in_turns(calls, 2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert order == ["a", "b"] * 3


def test_reverse_mode_keeps_each_array_once():
    x, y = jnp.ones((5, 3)), jnp.ones((3, 2))
    assert {array.shape for array in residuals(jnp.matmul, x, y)} == {(5, 3), (3, 2)}
    assert residual_bytes(jnp.matmul, x, y) == x.nbytes + y.nbytes
    assert residual_bytes(lambda x: jnp.sum(x * x), x) == x.nbytes  # both factors are one array
    assert residual_bytes(jnp.sum, x) == 0
    assert residual_bytes(lambda x: x**2, x.astype(jnp.bfloat16)) == x.nbytes / 2


def test_temporaries_are_what_a_program_holds_beside_arguments_and_results():
    rows = jax.ShapeDtypeStruct((1000, 2), jnp.float32)
    pairs = jax.jit(lambda x: jnp.sort(x @ x.T)[:, 0]).lower(rows).compile()
    assert 4_000_000 <= temporary_bytes(pairs) < 20_000_000
    assert temporary_bytes(jax.jit(lambda x: x + 1).lower(rows).compile()) < 1000
