"""Tapped delay lines: the golden figures of numpy and scipy, the tables, closed-form covariances, the stored layout."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jaxpapers.data import tdl
from jaxpapers.data.download import CorruptData, DataNotFound, data_folder, find

GOLDEN = Path(__file__).parents[1] / "golden" / "adafortitran" / "channel_and_lmmse.npz"
GRID = tdl.OfdmGrid(24)
PILOTS = tdl.pilot_indices(24, 3)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def fresh():
    """4,000 slots at 200 ns and 500 Hz, 10 dB."""
    conditions = np.tile(np.float32([10, 200, 500]), (4_000, 1))
    draw = jax.jit(lambda key: tdl.simulate_batch(key, conditions, GRID, PILOTS, "pilot", num_sinusoids=8))
    return jax.device_get(draw(jax.random.key(0)))


def test_golden_channel(golden):
    with jax.enable_x64(True):
        table = tdl.tap_table("TDL-A")
        np.testing.assert_allclose(table.delays, golden["tap_delay"], atol=1e-12)
        np.testing.assert_allclose(table.powers, golden["tap_power_normalised"], atol=1e-12)
        np.testing.assert_array_equal(tdl.CYCLIC_PREFIX, golden["cp_samples"])
        np.testing.assert_allclose(GRID.times(), golden["symbol_mid_time_s"], rtol=1e-12)
        gains = tdl.path_gains(golden["theta"], golden["phi"], table.powers, np.full(4, 500.0), GRID.times())
        np.testing.assert_allclose(gains, golden["path_gain"], atol=1e-9)
        delays = np.tile(tdl.tdl_profile("TDL-A", 200e-9)[0], (4, 1))
        np.testing.assert_allclose(tdl.frequency_response(gains, delays, GRID), golden["H"], atol=1e-9)
        F, J = tdl.channel_covariance("TDL-A", 200e-9, 500.0, GRID)
        np.testing.assert_allclose(F, golden["cov_freq"], atol=1e-9)
        np.testing.assert_allclose(J, golden["cov_time"], atol=1e-9)
    np.testing.assert_array_equal(PILOTS.rows, golden["pilot_rows"])
    np.testing.assert_array_equal(PILOTS.columns, golden["pilot_cols"])


def test_golden_path_gains_in_single_precision(golden):
    gains = tdl.path_gains(
        *(np.float32(golden[name]) for name in ("theta", "phi", "tap_power_normalised")),
        np.full(4, 500, np.float32),
        GRID.times(),
    )
    np.testing.assert_allclose(gains, golden["path_gain"], atol=1e-5)  # angles up to 6 of float32, 8 of them summed


@given(times=st.lists(st.floats(0, 2e-3), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_path_gains_are_the_sum_of_sinusoids_at_any_times(times, seed):
    rng = np.random.default_rng(seed)
    theta, phi = rng.uniform(-np.pi, np.pi, (2, 3)), rng.uniform(-np.pi, np.pi, (2, 3, 4))
    powers, doppler_hz = np.array([0.5, 0.3, 0.2]), np.array([100.0, 900.0])
    alpha = (2 * np.pi * np.arange(1, 5) + theta[..., None]) / 4
    angle = 2 * np.pi * doppler_hz[:, None, None] * np.cos(alpha)
    waves = np.exp(1j * (angle[..., None] * np.array(times) + phi[..., None]))
    with jax.enable_x64(True):
        gains = tdl.path_gains(theta, phi, powers, doppler_hz, np.array(times))
    np.testing.assert_allclose(gains, np.sqrt(powers / 4)[:, None] * waves.sum(-2), atol=1e-10)


@pytest.mark.parametrize(("name", "taps"), [("TDL-A", 23), ("TDL-B", 23), ("TDL-C", 24)])
def test_profiles_have_the_delay_spread_that_was_asked_for(name, taps):
    with jax.enable_x64(True):
        delays, powers = tdl.tdl_profile(name, 250e-9)
        assert delays.shape == powers.shape == (taps,)
        np.testing.assert_allclose(powers.sum(), 1, rtol=1e-12)
        spread = tdl.rms_delay_spread(delays, powers)
        # 3GPP's tables are rounded.
        np.testing.assert_allclose(spread, 250e-9, rtol=1e-4 if name == "TDL-A" else 1e-3)


@pytest.mark.parametrize("name", [*tdl.FILES])
def test_official_files(name):
    if find(tdl.FILES[name]) is None:
        pytest.skip(f"{name}.json is not in the data folder")
    table = tdl.tap_table(name)
    nominal = tdl.tdl_profile(name, 30e-9)
    np.testing.assert_allclose(nominal[1].sum(), 1, rtol=1e-12)
    if name == "TDL-A30":
        np.testing.assert_allclose(nominal[0][-1], 290e-9, rtol=1e-12)
    assert table.line_of_sight == (name in ("TDL-D", "TDL-E"))
    if table.line_of_sight:
        # K-factors of TR 38.901: 13.3 dB for TDL-D, 22 dB for TDL-E.
        factor = 10 * np.log10(table.powers[0] / table.powers[1])
        np.testing.assert_allclose(factor, {"TDL-D": 13.3, "TDL-E": 22.0}[name], atol=0.05)
        with pytest.raises(ValueError, match="line of sight"):
            tdl.channel_covariance(name, 1e-7, 100.0, GRID)


def test_a_line_of_sight_does_not_fade():
    powers, shift = np.float32([0.8, 0.2]), np.full(3, 500, np.float32)
    draw = jax.jit(lambda key: tdl.sum_of_sinusoids(key, powers, shift, GRID.times(), 8, line_of_sight=True))
    gains = draw(jax.random.key(0))
    np.testing.assert_allclose(np.abs(gains[:, 0]), np.sqrt(0.8), rtol=1e-5)
    turned = np.angle(gains[:, 0, 1:] / gains[:, 0, :-1])
    np.testing.assert_allclose(turned, 2 * np.pi * 350 * np.diff(GRID.times())[None].repeat(3, 0), atol=1e-5)
    assert np.abs(np.abs(gains[:, 1])).std() > 0.01


def test_a_file_that_is_missing_is_named(monkeypatch, tmp_path):
    tmp_path.chmod(0o555)
    monkeypatch.setenv("JAXPAPERS_DATA", str(tmp_path))
    tdl.tap_table.cache_clear()
    with pytest.raises(DataNotFound, match=r"ofdm_tdl/TDL-E\.json"):
        tdl.tap_table("TDL-E")


def test_tables_are_those_of_the_official_files():
    for name in tdl.TABLES:
        path = data_folder() / "ofdm_tdl" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{path} is missing")
        official = json.loads(path.read_text(encoding="utf8"))
        delays, decibels = (np.array(row.split(), float) for row in tdl.TABLES[name])
        np.testing.assert_array_equal(delays, official["delays"])
        np.testing.assert_array_equal(decibels, official["powers"])


def test_symbol_times():
    assert sum(tdl.CYCLIC_PREFIX) + 14 * 256 == 3840  # samples of 1 ms
    times = tdl.ofdm_symbol_times()
    np.testing.assert_allclose(times[0], (20 + 128) / 3.84e6, rtol=1e-12)
    np.testing.assert_allclose(times[11] - times[2], 642.7e-6, atol=0.05e-6)  # the card's digits
    np.testing.assert_allclose(times[-1] + 128 / 3.84e6, 1e-3, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "spacing", "offset", "rows"),
    [
        (120, 3, "symmetric", range(1, 120, 3)),
        (120, 3, 0, range(0, 120, 3)),
        (120, 4, "symmetric", range(0, 120, 4)),  # 2 o = 119 modulo 4 has no solution
        (120, 5, "symmetric", range(2, 120, 5)),
        (121, 4, "symmetric", range(0, 121, 4)),
        (11, 3, "symmetric", range(2, 11, 3)),
    ],
)
def test_pilot_rows(size, spacing, offset, rows):
    pilots = tdl.pilot_indices(size, spacing, offset)
    assert pilots.rows.tolist() == list(rows)
    assert pilots.columns.tolist() == [2, 11]


@pytest.mark.parametrize(("spacing", "count"), [(3, 40), (4, 30), (5, 24), (6, 20), (8, 15)])
def test_pilot_densities_of_the_paper(spacing, count):
    assert len(tdl.pilot_indices(120, spacing).rows) == count


def test_bessel_function():
    x = np.linspace(-29, 29, 101)
    with jax.enable_x64(True):
        np.testing.assert_allclose(tdl.bessel_j0(x), scipy.special.j0(x), atol=1e-14)


def test_bessel_function_ends_where_it_says():
    with pytest.raises(ValueError, match=r"bessel_j0 takes \|x\| < 30, got 30"):
        tdl.bessel_j0(np.array([1.0, -30.0]))
    traced = jax.jit(tdl.bessel_j0)(np.float32([29.9, 30, -31]))
    np.testing.assert_allclose(traced[0], scipy.special.j0(29.9), atol=1e-5)  # float32
    assert np.isnan(traced[1:]).all()
    limit = tdl.doppler_limit(GRID)
    np.testing.assert_allclose(limit, 5_144, atol=0.5)
    t = GRID.times()
    with jax.enable_x64(True):
        _, J = tdl.channel_covariance("TDL-A", 1e-7, 0.999 * limit, GRID)
        expected = scipy.special.j0(2 * np.pi * 0.999 * limit * (t[:, None] - t))
        np.testing.assert_allclose(J, expected, atol=1e-13)
        assert np.isnan(jax.jit(lambda f: tdl.channel_covariance("TDL-A", 1e-7, f, GRID)[1])(limit * 1.001)).any()
    with pytest.raises(ValueError, match="must be below 5,144 Hz on this grid, got 6000"):
        tdl.channel_covariance("TDL-A", 1e-7, 6_000, GRID)
    assert tdl.doppler_limit(tdl.OfdmGrid(24, 1)) == np.inf


def test_slots_have_the_closed_covariance(fresh):
    h = fresh.h.reshape(len(fresh.h), -1)
    # 4,000 samples of unit variance: the largest of 110,000 errors of standard deviation 0.016.
    np.testing.assert_allclose(np.mean(np.abs(h) ** 2), 1, atol=0.05)
    F, J = tdl.channel_covariance("TDL-A", 200e-9, 500.0, GRID)
    assert np.abs(h.T @ h.conj() / len(h) - np.kron(F, J)).max() < 0.08


def test_noise_is_white_and_of_the_variance_it_says(fresh):
    at_pilots = fresh.h[:, PILOTS.rows[:, None], PILOTS.columns]
    noise = (fresh.ls - at_pilots).reshape(len(fresh.h), -1)
    np.testing.assert_allclose(fresh.noise_var, 0.1, rtol=1e-5)
    covariance = noise.T @ noise.conj() / len(noise)
    assert np.abs(covariance - 0.1 * np.eye(16)).max() < 0.1 * 0.08  # as above
    assert np.abs(np.mean(noise**2)) < 0.1 * 0.02  # circular


def test_extremes_are_flat():
    spreads, shifts = np.float32([300e-9, 0]), np.float32([0, 900])
    draw = jax.jit(lambda key: tdl.tdl_frequency_response(key, "TDL-B", spreads, shifts, GRID, 8))
    still, flat = np.asarray(draw(jax.random.key(1)))
    np.testing.assert_allclose(still, np.broadcast_to(still[:, :1], still.shape), atol=1e-6)
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:1], flat.shape), atol=1e-6)
    assert np.ptp(np.abs(still[:, 0])) > 0.1
    assert np.ptp(np.abs(flat[0])) > 0.1


def test_covariances_are_hermitian_and_positive():
    with jax.enable_x64(True):
        for profile, spread, shift in (("TDL-A", 300e-9, 1000.0), ("TDL-B", 25e-9, 50.0), ("TDL-C", 0, 0)):
            for matrix in tdl.channel_covariance(profile, spread, shift, GRID):
                np.testing.assert_allclose(matrix, matrix.conj().T, atol=1e-14)
                np.testing.assert_allclose(np.diagonal(matrix), 1, atol=1e-14)
                assert np.linalg.eigvalsh(matrix).min() > -1e-12


def test_snr_references_are_13_decibels_apart():
    grid, pilots = tdl.OfdmGrid(), tdl.pilot_indices(120, 3)
    with jax.enable_x64(True):
        whole, pilot = (float(tdl.noise_variance(10.0, grid, pilots, name, 0.5)) for name in ("grid", "pilot"))
    np.testing.assert_allclose(pilot, 0.1, rtol=1e-12)
    np.testing.assert_allclose(10 * np.log10(pilot / whole) + 10 * np.log10(0.5), 13.22, atol=0.005)
    # The outside re-run's file at 0 dB: 0.037 at a mean power of 0.78.
    np.testing.assert_allclose(tdl.noise_variance(0.0, grid, pilots, "grid", 0.78), 0.037, atol=0.0005)


def test_fixed_realisations_are_the_banks():
    draw = jax.jit(
        lambda key: tdl.draw_bank(key, *map(np.float32, ([100, 200], [50, 500, 1000])), GRID, num_sinusoids=4)
    )
    bank = draw(jax.random.key(2))
    assert bank.h.shape == (2, 3, 24, 14)
    conditions = np.float32([[0, 200, 500], [20, 200, 500], [10, 100, 1000], [10, 100, 60]])
    simulate = jax.jit(lambda key: tdl.simulate_batch(key, conditions, GRID, PILOTS, "grid", "fixed", bank))
    batch = simulate(jax.random.key(3))
    np.testing.assert_array_equal(batch.h[0], bank.h[1, 1])
    np.testing.assert_array_equal(batch.h[1], bank.h[1, 1])
    np.testing.assert_array_equal(batch.h[2], bank.h[0, 2])
    assert np.isnan(batch.h[3]).all()  # 60 Hz is not in the bank
    assert not np.allclose(batch.ls[0], batch.ls[1])
    power = np.mean(np.abs(np.asarray(bank.h)[1, 1][PILOTS.rows[:, None], PILOTS.columns]) ** 2)
    np.testing.assert_allclose(batch.noise_var[:2], power * 16 / 336 * np.array([1, 0.01]), rtol=1e-5)
    np.testing.assert_array_equal(batch.conditions, conditions)


def test_channels_of_a_bank_may_share_their_phases():
    pairs = np.float32([100, 100.001, 300]), np.float32([50, 1000])
    shared, apart = (
        np.asarray(jax.jit(lambda key, s=s: tdl.draw_bank(key, *pairs, GRID, num_sinusoids=4, shared_phases=s).h)(key))
        for key, s in ((jax.random.key(2), True), (jax.random.key(2), False))
    )
    np.testing.assert_allclose(shared[0], shared[1], atol=1e-3)  # smooth in the delay spread
    assert np.abs(apart[0] - apart[1]).max() > 0.1
    assert np.abs(shared[0] - shared[2]).max() > 0.1
    # Each is the channel of its pair under the same key.
    one = tdl.tdl_frequency_response(jax.random.key(2), "TDL-A", np.float32([300e-9]), np.float32([1000]), GRID, 4)
    np.testing.assert_allclose(shared[2, 1], one[0], atol=1e-5)


def test_conditions_are_drawn_from_the_lists():
    lists = ((0, 5, 10), (25, 50), (50, 100, 150, 200))
    drawn = np.asarray(tdl.draw_conditions(jax.random.key(4), 3_000, *lists))
    counts = []
    for column, values in zip(drawn.T, lists, strict=True):
        assert set(column) == set(values)
        counts.append(np.mean(column[:, None] == values, axis=0) * len(values))
    np.testing.assert_allclose(np.concatenate(counts), 1, atol=0.15)  # 3 standard errors of a share of 1/4
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(3), atol=0.08)  # 4 standard errors


SLOT = "2_SNR-10_DS-100_DOP-200_N-3_TDL-A.mat"


def stored(folder, name=SLOT, pilots=16, rows=PILOTS.rows, compressed=False, **content):
    planes = np.zeros((24, 14, 2), complex)
    planes[..., 0] = np.arange(24 * 14).reshape(24, 14)
    cells = [(row, column) for row in rows for column in PILOTS.columns]
    for row, column in cells[:pilots]:
        planes[row, column, 1] = row + 1j * column
    scipy.io.savemat(folder / name, {"H": planes} | content, do_compression=compressed)
    return planes


@pytest.mark.parametrize("compressed", [False, True])  # MATLAB compresses by default
def test_stored_slots(tmp_path, compressed):
    stored(tmp_path, "10_SNR-0_DS-25_DOP-1000_N-3_TDL-A.mat", compressed=compressed, var_hat=0.037)
    stored(tmp_path, compressed=compressed)
    batch = tdl.read_mat_slots(tmp_path, (8, 2))
    assert batch.h.shape == (2, 24, 14)
    np.testing.assert_array_equal(batch.ls[0], PILOTS.rows[:, None] + 1j * PILOTS.columns)
    np.testing.assert_array_equal(batch.conditions, [[10, 100, 200], [0, 25, 1000]])
    np.testing.assert_allclose(batch.noise_var, [np.nan, 0.037], rtol=1e-6)
    np.testing.assert_array_equal(batch.h[0], np.arange(24 * 14).reshape(24, 14))


def cells_of(planes):
    """The array as cells of one number each."""
    return planes.astype(object)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: stored(folder, pilots=15), "15 pilots in 8 rows and 2 columns, expected all crossings of 8"),
        (lambda folder: stored(folder, H=np.zeros((24, 14))), r"H of shape \(K, T, 2\), found \(24, 14\)"),
        (lambda folder: scipy.io.savemat(folder / SLOT, {"G": np.zeros(3)}), "found None"),
        (lambda folder: stored(folder, H=cells_of(stored(folder))), "needs H of finite numbers"),
        (lambda folder: stored(folder, H=np.full((24, 14, 2), "a")), "needs H of"),
        (lambda folder: stored(folder, H=stored(folder) * np.nan), "needs H of finite numbers"),
        (lambda folder: stored(folder, var_hat=np.zeros(0)), r"needs var_hat to be one number, at least 0, found \[\]"),
        (lambda folder: stored(folder, var_hat=[0.1, 0.2]), "needs var_hat to be one number"),
        (lambda folder: stored(folder, var_hat=-0.1), "needs var_hat to be one number"),
        (lambda folder: stored(folder, var_hat=np.nan), "needs var_hat to be one number"),
        (lambda folder: stored(folder, var_hat="small"), "needs var_hat to be one number"),
        (lambda folder: (folder / SLOT).write_bytes(b"no mat"), "no .mat file that SciPy can read"),
        (lambda folder: stored(folder, "slot.mat"), "is not named"),
        (lambda folder: stored(folder, SLOT.replace("100", "1.0.0")), "is not named"),
        (lambda folder: [stored(folder), stored(folder, SLOT.replace("TDL-A", "TDL-B"))], "profiles: .*A.*B"),
        (lambda folder: [stored(folder), stored(folder, f"1{SLOT}", rows=PILOTS.rows - 1)], "patterns of pilots"),
    ],
)
def test_bad_stored_slots(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CorruptData, match=message):
        tdl.read_mat_slots(tmp_path, (8, 2))


def test_a_folder_without_slots(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.mat file"):
        tdl.read_mat_slots(tmp_path, (8, 2))


def test_pilots_of_another_shape_or_off_a_lattice(tmp_path):
    stored(tmp_path)
    with pytest.raises(CorruptData, match="16 pilots in 8 rows and 2 columns, expected all crossings of 4 and 4"):
        tdl.read_mat_slots(tmp_path, (4, 4))
    # 16 cells, of which one lies beside its row.
    planes = stored(tmp_path)
    planes[2, 2, 1], planes[1, 2, 1] = planes[1, 2, 1], 0
    stored(tmp_path, H=planes)
    with pytest.raises(CorruptData, match="16 pilots in 9 rows"):
        tdl.read_mat_slots(tmp_path, (8, 2))


def test_compressed_slots_with_a_wrong_byte_or_a_missing_end(tmp_path):
    stored(tmp_path, compressed=True)
    content = (tmp_path / SLOT).read_bytes()
    wrong = [bytearray(content), bytearray(content), content[:50], content[:-50]]
    wrong[0][-1] ^= 0xFF  # of the checksum
    wrong[1][len(content) // 2] ^= 0xFF
    for each in wrong:
        (tmp_path / SLOT).write_bytes(each)
        with pytest.raises(CorruptData, match=r"no \.mat file that SciPy can read"):
            tdl.read_mat_slots(tmp_path, (8, 2))


ONE = np.float32([[10, 100, 100]])


def simulate(conditions=ONE, grid=GRID, pilots=PILOTS, **options):
    return tdl.simulate_batch(jax.random.key(0), conditions, grid, pilots, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tdl.tdl_profile("TDL-F", 1e-7), "unknown profile 'TDL-F'"),
        (lambda: tdl.tdl_profile("TDL-A", -1e-7), "delay spread must be at least 0"),
        (lambda: tdl.channel_covariance("TDL-A", -1e-7, 1.0, GRID), "delay spread"),
        (lambda: tdl.channel_covariance("TDL-A", 1e-7, -1.0, GRID), "Doppler shift must be at least 0"),
        (lambda: tdl.draw_bank(jax.random.key(0), np.ones(1), -np.ones(1), GRID), "Doppler shift"),
        (lambda: simulate(-ONE), "delay spread"),
        (lambda: simulate(ONE * np.float32([1, 1, -1])), "Doppler shift"),
        (lambda: simulate(snr_reference="cell"), "snr_reference must be one of"),
        (lambda: simulate(realisations="old"), "realisations must be one of"),
        (lambda: simulate(realisations="fixed"), "need a bank"),
        (lambda: simulate(bank=tdl.ChannelBank(*np.zeros((3, 1)))), "take no bank"),
        (lambda: simulate(grid=tdl.OfdmGrid(22)), "not within the grid"),
        (lambda: simulate(pilots=tdl.Pilots(np.array([-1, 2]), np.array([2, 11]))), "not within the grid"),
        (lambda: simulate(num_sinusoids=0), "num_sinusoids"),
        (
            lambda: simulate(
                realisations="fixed", bank=tdl.ChannelBank(np.ones(1), np.ones(1), np.zeros((1, 1, 12, 14)))
            ),
            "the bank's channels are",
        ),
        (lambda: tdl.pilot_indices(24, 0), "spacing >= 1"),
        (lambda: tdl.pilot_indices(24, 3, offset=24), "offset must be"),
        (lambda: tdl.pilot_indices(24, 3, offset="middle"), "offset must be"),
        (lambda: tdl.pilot_indices(24, 3, columns=(2, 14)), "columns must ascend within 0 to 13"),
        (lambda: tdl.pilot_indices(24, 3, columns=(11, 2)), "columns must ascend"),
        (lambda: tdl.OfdmGrid(24, 15).times(), "num_symbols must be in 1 to 14"),
        (lambda: tdl.OfdmGrid(0).frequencies(), "num_subcarriers"),
        (lambda: tdl.ofdm_symbol_times(cyclic_prefix=(-1,)), "prefixes >= 0"),
        (lambda: tdl.draw_conditions(jax.random.key(0), 3, (), (1,), (1,)), "snrs_db"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_batches_are_made_inside_a_program():
    draw = jax.jit(lambda key, conditions: simulate(conditions, num_sinusoids=8).h)
    assert jnp.isfinite(draw(jax.random.key(0), ONE)).all()
