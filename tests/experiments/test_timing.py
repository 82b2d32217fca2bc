"""Times that experiments report."""

import time

from experiments.timing import least_seconds


def test_the_least_of_the_timed_runs_is_taken_and_the_first_run_is_none_of_them(monkeypatch):
    clock, durations = [0.0], iter([0.0, 5.0, 2.0, 3.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += next(durations)

    assert least_seconds(call, 3) == 2.0
    assert next(durations, None) is None
