"""Symbolic analysis and cycles: golden enumerations, loops, and the skew tent map, of which all is known."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.ops.dsr_metrics import lyapunov_spectrum
from jaxpapers.sequence import alrnn
from jaxpapers.sequence.alrnn.periodic import lyndon_words

GOLDEN = Path(__file__).parents[1] / "golden" / "alrnn"
symbol_sequences = st.lists(st.integers(0, 3), min_size=2, max_size=60).map(np.array)


def one_unit(slope, steep):
    """The skew tent map as an AL-RNN with M = P = 1: slopes `slope` below 0 and -steep above."""
    no_hidden = np.zeros((0, 1))
    return alrnn.ALRNNParams(np.array([slope]), np.array([[-steep - slope]]), np.array([1.0]), no_hidden)


def load(name):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    size = len(golden["A"])
    return golden, alrnn.ALRNNParams(golden["A"], golden["W"], golden["h"], np.zeros((size - 1, 1)))


# ---- symbols


def test_golden_symbols():
    golden = dict(np.load(GOLDEN / "symbolic.npz"))
    code = alrnn.symbolic_code(golden["z_pwl"], 2)
    np.testing.assert_array_equal(code.symbols, golden["symbols"])
    np.testing.assert_array_equal(code.bits, golden["regions_by_frequency"])
    np.testing.assert_array_equal(code.counts, golden["counts"])
    np.testing.assert_allclose(code.occupation, golden["counts"] / 2000, rtol=1e-15)
    counts = alrnn.transition_counts(code.symbols)
    np.testing.assert_array_equal(counts, golden["transition_counts"])
    np.testing.assert_allclose(alrnn.visit_connectome(code.symbols), golden["connectome_reference"], rtol=0, atol=1e-9)
    entropy = alrnn.topological_entropy(alrnn.admissibility_graph(counts))
    np.testing.assert_allclose(entropy, golden["topological_entropy_adjacency"], rtol=0, atol=1e-9)
    numbers = [len(alrnn.words(code.symbols, n)) for n in range(1, 9)]
    np.testing.assert_array_equal(numbers, golden["words_per_length"])
    growth = np.log(np.array(numbers[1:]) / numbers[:-1])
    np.testing.assert_allclose(alrnn.word_entropy(code.symbols, 7), growth, rtol=1e-12)


@given(seed=st.integers(0, 10**6), num_pwl=st.integers(0, 5), length=st.sampled_from([1, 2, 50]))
def test_the_code_names_each_state_by_its_region(seed, num_pwl, length):
    z = np.random.default_rng(seed).normal(size=(length, 5))
    code = alrnn.symbolic_code(z, num_pwl)
    np.testing.assert_array_equal(code.bits[code.symbols], z[:, 5 - num_pwl :] > 0)
    assert len(np.unique(code.bits, axis=0)) == len(code.bits)
    np.testing.assert_array_equal(code.counts, np.bincount(code.symbols))
    assert np.all(np.diff(code.counts) <= 0)


@given(symbols=symbol_sequences)
def test_transitions_and_visits_are_counted_one_by_one(symbols):
    counts = np.zeros((4, 4), int)
    for now, following in itertools.pairwise(symbols):
        counts[now, following] += 1
    ours = alrnn.transition_counts(symbols, 4)
    np.testing.assert_array_equal(ours, counts)
    np.testing.assert_array_equal(ours.sum(axis=1), np.bincount(symbols[:-1], minlength=4))
    probabilities = alrnn.transition_probabilities(ours)
    np.testing.assert_allclose(probabilities.sum(axis=1), ours.any(axis=1), rtol=1e-12)
    np.testing.assert_allclose(probabilities * ours.sum(axis=1, keepdims=True), counts, rtol=1e-12)

    runs = [symbol for symbol, _ in itertools.groupby(symbols)][:-1]  # the last has not ended
    if not runs:
        with pytest.raises(ValueError, match="never changes its region"):
            alrnn.visit_connectome(symbols, 4)
        return
    visits = np.zeros((4, 4))
    for now, following in itertools.pairwise(runs):
        visits[now, following] += 1
    for symbol in runs:
        visits[symbol, symbol] += 1
    np.testing.assert_allclose(alrnn.visit_connectome(symbols, 4), visits / visits.sum(), rtol=1e-12)


@given(symbols=symbol_sequences, length=st.integers(1, 5))
def test_words_are_the_set_of_windows(symbols, length):
    if length > len(symbols):
        with pytest.raises(ValueError, match="length must lie in"):
            alrnn.words(symbols, length)
        return
    expected = {tuple(symbols[i : i + length]) for i in range(len(symbols) - length + 1)}
    assert [tuple(word) for word in alrnn.words(symbols, length)] == sorted(expected)


def test_topological_entropy_of_known_graphs():
    golden_mean = (1 + 5**0.5) / 2
    for graph, entropy in (
        (np.ones((5, 5), bool), np.log(5)),
        (np.eye(4, dtype=bool)[[2, 0, 3, 1]], 0.0),
        (np.array([[1, 1], [1, 0]]), np.log(golden_mean)),
        (np.array([[1, 1], [0, 1]]), 0.0),
        (np.array([[7, 3], [9, 0]]), np.log(golden_mean)),  # counts are read as 0/1
    ):
        # 1e-7: [[1, 1], [0, 1]] has a double eigenvalue, accurate to the root of the rounding.
        np.testing.assert_allclose(alrnn.topological_entropy(graph), entropy, rtol=0, atol=1e-7)
    # Nilpotent of a size at which rounding alone makes eigenvalues of modulus 0.5.
    assert alrnn.topological_entropy(np.triu(np.ones((64, 64), bool), 1)) == -np.inf


def test_regions_tell_labels():
    symbols = np.array([0, 0, 0, 1, 1, 2])
    labels = np.array([5, 5, 1, 1, 1, 0])
    assert alrnn.label_accuracy(symbols, labels) == 5 / 6
    with pytest.raises(ValueError, match="one label per symbol"):
        alrnn.label_accuracy(symbols, labels[:-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_orbit_that_is_not_finite_is_refused(bad):
    z = np.ones((10, 3))
    z[6, 1] = bad
    with pytest.raises(ValueError, match="not finite from time 6 on"):
        alrnn.symbolic_code(z, 1)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 states"):
        alrnn.symbolic_code(np.ones((0, 3)), 1)
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2"):
        alrnn.transition_counts(np.array([0, 2]), 2)
    with pytest.raises(ValueError, match=r"got -1\.\.0"):
        alrnn.transition_counts(np.array([0, -1]))
    with pytest.raises(ValueError, match="at least one symbol"):
        alrnn.transition_counts(np.array([], int))
    with pytest.raises(ValueError, match="square"):
        alrnn.topological_entropy(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="max_length"):
        alrnn.word_entropy(np.array([0, 1]), 0)
    with pytest.raises(ValueError, match="length must lie in"):
        alrnn.words(np.array([0, 1]), 0)


# ---- the skew tent map


@pytest.mark.parametrize("slope", [1.5, 2.5])
def test_skew_tent_map(slope):
    # Both branches of [1 - u, 1] cover the whole interval if (s - 1)(u - 1) = 1.
    steep = 1 + 1 / (slope - 1)
    p = one_unit(slope, steep)
    with jax.enable_x64(True):
        orbit = np.asarray(alrnn.free_run(p, np.array([0.1234]), 20_000, 1))
        exponent = jax.jit(lambda z: lyapunov_spectrum(lambda z: alrnn.step(p, z, 1), z, 20_000, num_exponents=1))(
            np.array([0.1234])
        )
    assert -steep + 1 - 1e-12 <= orbit.min() < orbit.max() <= 1 + 1e-12
    code = alrnn.symbolic_code(orbit, 1)
    # The invariant density is uniform: the share of a branch is its width, 1 / |its slope|. 20,000 dependent steps.
    share = {int(bits[0]): occupation for bits, occupation in zip(code.bits, code.occupation, strict=True)}
    np.testing.assert_allclose([share[0], share[1]], [1 / slope, 1 / steep], atol=0.02)
    np.testing.assert_allclose(exponent, np.log(slope) / slope + np.log(steep) / steep, atol=1e-2)
    graph = alrnn.admissibility_graph(alrnn.transition_counts(code.symbols))
    np.testing.assert_allclose(alrnn.topological_entropy(graph), np.log(2), rtol=1e-12)
    np.testing.assert_allclose(alrnn.word_entropy(code.symbols, 6), np.log(2), rtol=1e-12)

    found = alrnn.cycles(p, 1, 6)
    lengths = np.bincount([len(cycle.word) for cycle in found])[1:]
    np.testing.assert_array_equal(lengths, [2, 1, 2, 3, 6, 9])
    for k in range(1, 7):  # 2^k points of a period that divides k
        assert sum(len(cycle.word) for cycle in found if k % len(cycle.word) == 0) == 2**k
    for cycle in found:
        ones = cycle.word.sum()
        np.testing.assert_allclose(
            cycle.multipliers, [slope ** (len(cycle.word) - ones) * (-steep) ** ones], rtol=1e-10
        )


@pytest.mark.parametrize("name", ["skew_tent", "toy_m3_p2"])
def test_golden_orbits_and_exponents(name):
    golden, p = load(name)
    num_pwl, steps = int(golden["P"]), int(golden["lyapunov_steps"])
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            alrnn.free_run(p, golden["z0"], 50, num_pwl), golden["orbit_first50"], rtol=0, atol=1e-9
        )
        spectrum = jax.jit(lambda z0: lyapunov_spectrum(lambda z: alrnn.step(p, z, num_pwl), z0, steps))
        # The tent's orbit is chaotic: rounding decides which one is averaged over.
        tolerance = 1e-2 if name == "skew_tent" else 1e-4
        np.testing.assert_allclose(spectrum(golden["z0"]), golden["lyapunov_spectrum"], rtol=0, atol=tolerance)


# ---- fixed points and cycles


@pytest.mark.parametrize("name", ["skew_tent", "toy_m3_p2"])
def test_golden_cycles(name):
    golden, p = load(name)
    max_length = int(golden["max_cycle_length"])
    found = alrnn.cycles(p, int(golden["P"]), max_length)
    lengths = np.bincount([len(cycle.word) for cycle in found], minlength=max_length + 1)[1:]
    np.testing.assert_array_equal(lengths, golden["n_cycles"])
    for index, cycle in enumerate(found):
        np.testing.assert_array_equal(cycle.word, golden[f"cycle{index:02d}_word"])
        np.testing.assert_allclose(cycle.points, golden[f"cycle{index:02d}_points"], rtol=0, atol=1e-9)
        # Eigenvalues of equal modulus have no order: compare the polynomials of which they are the roots.
        multipliers = golden[f"cycle{index:02d}_multipliers"]
        np.testing.assert_allclose(np.poly(cycle.multipliers), np.poly(multipliers), rtol=1e-9, atol=1e-9)
        assert np.all(np.diff(np.abs(cycle.multipliers)) <= 1e-12)


def random_model(seed):
    """A small model that often has cycles."""
    rng = np.random.default_rng(seed)
    no_hidden = np.zeros((2, 1))
    return alrnn.ALRNNParams(rng.uniform(-1, 1, 3), rng.normal(0, 1.2, (3, 3)), rng.normal(size=3), no_hidden)


@given(seed=st.integers(0, 10**6), leaky=st.booleans())
def test_real_fixed_points_stay_and_cycles_return(seed, leaky):
    p = random_model(seed)
    if leaky:
        p = p._replace(slopes=np.array([9.0, 0.3, -0.4]))

    def step(z):
        negative = 0 if p.slopes is None else p.slopes * z
        return p.a * z + p.W @ np.where((np.arange(3) > 0) & (z <= 0), negative, z) + p.h

    fixed = alrnn.fixed_points(p, 2)
    np.testing.assert_array_equal(fixed.bits, [[0, 0], [0, 1], [1, 0], [1, 1]])
    for bits, point, real, values, radius in zip(*fixed, strict=True):
        inside = np.array_equal(point[1:] > 0, bits == 1)
        assert real == inside
        slopes = np.r_[1.0, np.where(bits == 1, 1.0, 0.0 if p.slopes is None else p.slopes[1:])]
        matrix = np.diag(p.a) + p.W * slopes
        # Relative to the size of the point: I - W_D may be near singular.
        np.testing.assert_allclose(matrix @ point + p.h, point, rtol=0, atol=1e-9 * (1 + np.abs(point).max()))
        np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(matrix)).max(), rtol=1e-10)
        np.testing.assert_allclose(np.poly(values), np.poly(np.linalg.eigvals(matrix)), rtol=1e-8, atol=1e-8)
        assert not real or np.allclose(step(point), point, rtol=0, atol=1e-9 * (1 + np.abs(point).max()))

    found = alrnn.cycles(p, 2, 4)
    assert sum(len(cycle.word) == 1 for cycle in found) == fixed.real.sum()
    for cycle in found:
        z, size = cycle.points[0], 1 + np.abs(cycle.points).max()
        for k, (bits, point) in enumerate(zip(cycle.word, cycle.points, strict=True)):
            np.testing.assert_array_equal(point[1:] > 0, bits == 1)
            np.testing.assert_allclose(z, point, rtol=0, atol=1e-8 * size)
            assert k == 0 or not np.allclose(point, cycle.points[0], atol=1e-10)
            z = step(point)
        np.testing.assert_allclose(z, cycle.points[0], rtol=0, atol=1e-8 * size)


def test_scyfi_finds_what_the_search_finds():
    for p, num_pwl, max_length in ((one_unit(1.5, 3.0), 1, 6), (load("toy_m3_p2")[1], 2, 4)):
        exhaustive = alrnn.cycles(p, num_pwl, max_length)
        for length in range(1, max_length + 1):
            expected = [cycle for cycle in exhaustive if len(cycle.word) == length]
            found = alrnn.scyfi(jax.random.key(length), p, num_pwl, length)
            assert [cycle.word.tolist() for cycle in found] == [cycle.word.tolist() for cycle in expected]
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one.points, other.points, rtol=0, atol=1e-9)


def test_scyfi_starts_from_observed_words():
    p = one_unit(1.5, 3.0)
    with jax.enable_x64(True):
        orbit = np.asarray(alrnn.free_run(p, np.array([0.1234]), 2000, 1))
    code = alrnn.symbolic_code(orbit, 1)
    observed = code.bits[alrnn.words(code.symbols, 8)]
    found = alrnn.scyfi(jax.random.key(0), p, 1, 8, start_words=observed)
    # Of the 36 binary necklaces of length 8, 6 are repetitions; the observed words (nearly) all close to a cycle.
    assert len(found) == len({cycle.word.tobytes() for cycle in found}) == 30
    for cycle in found:
        np.testing.assert_array_equal(cycle.points > 0, cycle.word == 1)
    one_word = alrnn.scyfi(jax.random.key(0), p, 1, 3, start_words=np.array([[[1], [0], [0]]]))
    assert [cycle.word.tolist() for cycle in one_word] == [[[0], [0], [1]]]


def test_fixed_points_of_chosen_regions_and_of_none():
    p = random_model(0)
    every, chosen = alrnn.fixed_points(p, 2), alrnn.fixed_points(p, 2, np.array([[1, 0], [0, 0]]))
    np.testing.assert_array_equal(chosen.points, every.points[[2, 0]])
    linear = alrnn.fixed_points(p, 0)
    assert linear.bits.shape == (1, 0)
    expected = np.linalg.solve(np.eye(3) - np.diag(p.a) - p.W, p.h)
    np.testing.assert_allclose(linear.points[0], expected, rtol=1e-10)
    assert linear.real[0]


def test_a_singular_region_has_no_fixed_point():
    p = one_unit(1.0, 3.0)  # z -> z + 1 below 0
    fixed = alrnn.fixed_points(p, 1)
    assert np.isnan(fixed.points[0]).all()
    np.testing.assert_array_equal(fixed.real, [False, True])
    assert [len(cycle.word) for cycle in alrnn.cycles(p, 1, 1)] == [1]


@pytest.mark.parametrize(("num_symbols", "max_length"), [(2, 8), (4, 4), (1, 3)])
def test_lyndon_words_are_the_primitive_necklaces(num_symbols, max_length):
    expected = set()
    for length in range(1, max_length + 1):
        for word in itertools.product(range(num_symbols), repeat=length):
            rotations = [word[i:] + word[:i] for i in range(1, length)]
            if all(word < rotation for rotation in rotations):
                expected.add(word)
    assert list(lyndon_words(num_symbols, max_length)) == sorted(expected)


def test_bad_input_of_the_cycle_search_is_refused():
    p = random_model(0)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        alrnn.cycles(p, 2, 0)
    with pytest.raises(ValueError, match="use scyfi"):
        alrnn.cycles(p, 2, 20)
    with pytest.raises(ValueError, match="2 bits per region, got 3"):
        alrnn.fixed_points(p, 2, np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 1 each"):
        alrnn.scyfi(jax.random.key(0), p, 2, 0)
    with pytest.raises(ValueError, match=r"start_words must be \(n, 3, 2\)"):
        alrnn.scyfi(jax.random.key(0), p, 2, 3, start_words=np.ones((4, 2, 2)))
    wide = alrnn.ALRNNParams(np.ones(30), np.eye(30), np.ones(30), np.ones((29, 1)))
    with pytest.raises(ValueError, match="give the bits"):
        alrnn.fixed_points(wide, 25)
