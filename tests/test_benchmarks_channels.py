"""The benchmark of channels: both sides draw what was asked for, the refusal of what they did not, a run's files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import channels
from jaxpapers.data.tdl import OfdmGrid, draw_bank, tdl_frequency_response

GRID = OfdmGrid(12, cyclic_prefix=(18,) * 14)
OPTIONS = ["--subcarriers", "12", "--batch", "8", "--rounds", "2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(channels, "SAMPLE_S", 0.0)
    monkeypatch.setattr(channels, "CHECKED_SLOTS", 512)
    monkeypatch.setattr(channels, "SINUSOIDS", 8)
    monkeypatch.setattr(channels, "BANK_SPREADS_NS", np.array([100.0, 200.0]))
    monkeypatch.setattr(channels, "BANK_DOPPLERS_HZ", np.array([100.0, 500.0, 900.0]))


def sionna_or_skip():
    sionna = channels.find_sionna(None)
    if sionna is None:
        pytest.skip("Sionna 2 is not installed (pip install 'jaxpapers[bench]'), or this is no CPU")
    return sionna


def test_a_run_measures_both_sides_and_leaves_its_figures(tmp_path, capsys):
    sionna = sionna_or_skip()
    file = tmp_path / "figures.json"
    assert channels.main([*OPTIONS, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["environment"]["sionna"] == sionna.version
    point = figures["K = 12"]
    assert set(point["seconds"]) == {"fresh", "fixed bank", "Sionna"}
    assert {len(times) for times in point["seconds"].values()} == {2}
    assert 0 < max(point["standard errors"].values()) <= channels.STANDARD_ERRORS
    assert "times Sionna's fresh slots per second" in capsys.readouterr().out


def test_without_sionna_a_run_measures_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sionna", None)
    file = tmp_path / "figures.json"
    assert channels.main([*OPTIONS, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert "sionna" not in figures["environment"]
    assert set(figures["K = 12"]["seconds"]) == {"fresh", "fixed bank"}
    printed = capsys.readouterr().out
    assert "Sionna takes no part" in printed
    assert "times Sionna's" not in printed


def test_every_call_draws_other_slots():
    draws = [channels.our_draws("TDL-A", GRID, 8)]
    if sionna := channels.find_sionna(None):
        draws.append(channels.sionna_draws(sionna, "TDL-A", GRID, 8))
    for draw in draws:
        first, second = (channels.in_our_layout(draw()) for _ in range(2))
        assert first.shape == second.shape == (8, 12, 14)
        assert np.abs(first - second).min(axis=(1, 2)).min() > 0


def test_products_are_those_of_their_lags():
    real, imaginary = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    h = real + 1j * imaginary
    over_subcarriers, over_symbols = channels.lag_products(h)
    for lag in range(5):
        expected = (h[:, : 5 - lag] * h[:, lag:].conj()).mean((1, 2))
        np.testing.assert_allclose(over_subcarriers[:, lag], expected, atol=1e-12)
    for lag in range(4):
        expected = (h[..., : 4 - lag] * h[..., lag:].conj()).mean((1, 2))
        np.testing.assert_allclose(over_symbols[:, lag], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "delay_spread_ns", "doppler_hz", "refused"),
    [
        (1.0, 200, 500, None),
        (1.2, 200, 500, "the mean power is 1"),
        (1.0, 600, 500, r"the correlation over \d+ subcarriers"),
        (1.0, 200, 700, r"the correlation over \d+ symbols"),
        (np.nan, 200, 500, "the mean power is nan"),
    ],
)
def test_channels_that_were_not_asked_for_are_not_timed(scale, delay_spread_ns, doppler_hz, refused):
    sizes = jnp.ones(2048)

    @jax.jit
    def slots(scale, delay_spread_ns, doppler_hz):
        spreads, shifts = 1e-9 * delay_spread_ns * sizes, doppler_hz * sizes
        return scale * tdl_frequency_response(jax.random.key(0), "TDL-A", spreads, shifts, GRID, 8)

    h = slots(scale, float(delay_spread_ns), float(doppler_hz))
    if refused is None:
        assert channels.refuse_disagreement("here", lambda: h, "TDL-A", GRID, 2048) <= channels.STANDARD_ERRORS
        return
    with pytest.raises(SystemExit, match=f"error: here: {refused}"):
        channels.refuse_disagreement("here", lambda: h, "TDL-A", GRID, 2048)


def test_the_conjugate_channel_is_refused():
    """Delays of the wrong sign: all powers and moduli are right."""
    draw = channels.our_draws("TDL-A", GRID, 512)
    with pytest.raises(SystemExit, match="subcarriers"):
        channels.refuse_disagreement("here", lambda: jnp.conj(draw()), "TDL-A", GRID, 2048)


def test_slots_of_another_bank_are_not_timed():
    spreads, shifts = channels.BANK_SPREADS_NS, channels.BANK_DOPPLERS_HZ
    bank = draw_bank(jax.random.key(0), spreads, shifts, GRID, num_sinusoids=8)
    asked = jnp.float32([200, 100]), jnp.float32([100, 900])
    channels.refuse_other_slots(bank, *asked, bank.h[np.array([1, 0]), np.array([0, 2])])
    with pytest.raises(SystemExit, match="not those that were drawn"):
        channels.refuse_other_slots(bank, *asked, bank.h[np.array([0, 1]), np.array([0, 2])])


def test_other_taps_of_sionna_are_refused(monkeypatch):
    sionna = sionna_or_skip()
    monkeypatch.setattr(channels, "tdl_profile", lambda name, spread: (np.zeros(23), np.full(23, 1 / 23)))
    with pytest.raises(SystemExit, match="Sionna's taps have other delays"):
        channels.sionna_draws(sionna, "TDL-A", GRID, 8)


@pytest.mark.parametrize("options", [["--batch", "0"], ["--subcarriers", "24", "0"]])
def test_sizes_below_one_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        channels.main(options)
    assert "all must be at least 1" in capsys.readouterr().err
