"""The numbers that claims compare, and how they are written out."""

import numpy as np
import pytest

from experiments.claims import each, mean, mean_and_each, measured

METRICS = {"one": 0.5, "seeds": [1, 2.5], "failed": ["nan", 0.1], "large": np.array([np.inf, 3, -np.inf])}


def test_a_measure_is_one_number_a_seed():
    assert measured(METRICS, "one").tolist() == [0.5]
    assert measured(METRICS, "seeds").tolist() == [1, 2.5]
    assert measured({"rows": [[1, 2], [3, 4]]}, "rows").shape == (2, 2)
    with pytest.raises(KeyError, match="absent"):  # the claim is not run
        measured(METRICS, "absent")


@pytest.mark.parametrize("key", ["failed", "large"])
def test_nothing_that_is_compared_with_a_failed_seed_holds(key):
    found = measured(METRICS, key).mean()
    assert not found <= np.inf
    assert not found >= -np.inf
    assert np.isnan(mean(METRICS, key))
    assert mean(METRICS, "seeds") == 1.75


def test_a_failed_seed_counts_as_the_worst_where_a_claim_says_so():
    np.testing.assert_array_equal(measured(METRICS, "failed", failed=np.inf), [np.inf, 0.1])
    np.testing.assert_array_equal(measured(METRICS, "large", failed=np.inf), [np.inf, 3, np.inf])


def test_numbers_are_written_out():
    assert each([0.12345, 2]) == "0.123, 2.000"
    assert each(["nan", 1.25, float("-inf")], "+.1f") == "failed, +1.2, failed"
    assert each([]) == ""
    assert mean_and_each(np.array([0.1, 0.3])) == "0.200 (0.100, 0.300)"
    assert mean_and_each(np.array([0.1, np.nan]), ".1f") == "failed (0.1, failed)"
    assert mean_and_each(np.array([0.1]), ".4f") == "0.1000"
