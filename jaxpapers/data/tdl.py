"""Radio channels: tapped delay lines of 3GPP, as an OFDM receiver sees them at its pilots.

A slot is a grid of K subcarriers and T symbols; its channel is

    H[k, l] = sum_p g_p(t_l) exp(-2 pi i f_k tau_p),    E[g_p(t) g_p(t')*] = P_p J0(2 pi f_D (t - t'))

with the delays tau_p and powers P_p of a profile (3GPP TR 38.901, Table 7.7.2-1 and following), delays scaled by the
rms delay spread, and Jakes fading of the largest Doppler shift f_D. Pilots carry the least-squares estimate H + noise.

- `tap_table`, `tdl_profile`: the profiles. TDL-A, B, C are here; TDL-D, E (with a line of sight) and the simplified
  TDL-A30, B100, C300 of TS 38.101-4 are read from the files of Sionna (`NVlabs/sionna`, Apache-2.0).
- `OfdmGrid`, `ofdm_symbol_times`, `pilot_indices`: the grid, when its symbols are, where the pilots lie.
- `path_gains`, `sum_of_sinusoids`, `tdl_frequency_response`, `channel_covariance`: channels and their covariance.
- `draw_bank`: one channel for each pair of delay spread and Doppler shift, drawn once. MATLAB's `nrTDLChannel` starts
  from the same seed again for every object, so data sets that make an object a slot hold one channel a pair. Strictly,
  such objects share their phases as well, from pair to pair: `shared_phases`.
- `simulate_batch`: pilots, channels and noise variances of slots in given conditions.
- `read_mat_slots`: slots as the authors of AdaFortiTran (arXiv 2505.09076) store theirs.

Everything but the readers is jittable, with grids and times that are known beforehand; conditions are columns (SNR in
dB, delay spread in ns, Doppler shift in Hz).
"""

import json
import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.io
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray
from scipy.io.matlab import MatReadError

from jaxpapers.data.download import CorruptData, OfficialFile, open_data
from jaxpapers.typing import AnyArray

Number = float | int | Float[AnyArray, ""]

# (delays over the delay spread, powers in dB) of TR 38.901, Tables 7.7.2-1 to 7.7.2-3.
TABLES = {
    "TDL-A": (
        "0 .3819 .4025 .5868 .4610 .5375 .6708 .5750 .7618 1.5375 1.8978 2.2242 2.1718 2.4942 2.5119 3.0582 4.0810 "
        "4.4579 4.5695 4.7966 5.0066 5.3043 9.6586",
        "-13.4 0 -2.2 -4 -6 -8.2 -9.9 -10.5 -7.5 -15.9 -6.6 -16.7 -12.4 -15.2 -10.8 -11.3 -12.7 -16.2 -18.3 -18.9 "
        "-16.6 -19.9 -29.7",
    ),
    "TDL-B": (
        "0 .1072 .2155 .2095 .2870 .2986 .3752 .5055 .3681 .3697 .5700 .5283 1.1021 1.2756 1.5474 1.7842 2.0169 2.8294 "
        "3.0219 3.6187 4.1067 4.2790 4.7834",
        "0 -2.2 -4 -3.2 -9.8 -1.2 -3.4 -5.2 -7.6 -3 -8.9 -9 -4.8 -5.7 -7.5 -1.9 -7.6 -12.2 -9.8 -11.4 -14.9 -9.2 -11.3",
    ),
    "TDL-C": (
        "0 .2099 .2219 .2329 .2176 .6366 .6448 .6560 .6584 .7935 .8213 .9336 1.2285 1.3083 2.1704 2.7105 4.2589 4.6003 "
        "5.4902 5.6077 6.3065 6.6374 7.0427 8.6523",
        "-4.4 -1.2 -3.5 -5.2 -2.5 0 -2.2 -3.9 -7.4 -7.1 -10.7 -11.1 -5.1 -6.8 -8.7 -13.2 -13.9 -13.9 -15.8 -17.1 -16 "
        "-15.7 -21.6 -22.8",
    ),
}

# Pinned to a commit: a moving branch would turn an update into a checksum error here.
SIONNA = (
    "https://raw.githubusercontent.com/NVlabs/sionna/9ca7cc75a6431a8d05c4059f3b137ba52a06ce5b/"
    "src/sionna/phy/channel/tr38901/models"
)
FILES = {
    name: OfficialFile(f"ofdm_tdl/{name}.json", f"{SIONNA}/{name}.json", sha256, size)
    for name, size, sha256 in (
        ("TDL-D", 824, "ef21c1dda98838ac74a24d7504f6d8a8bfc0bd3051279483c673f9ea3b42366a"),
        ("TDL-E", 896, "5d9cf8519179a183ccfc5020efb02cf48358f5d67a5bf40520636e44a0e2f045"),
        ("TDL-A30", 739, "ca0b02bc3da70dc3a80e520a876f8c49b6847b6f46392e72acb16539b47e5570"),
        ("TDL-B100", 750, "2beb0cd6086565dca852199b891b9d840d8dfa5ad2cc7157dad25a48bd1c0d52"),
        ("TDL-C300", 712, "4985dee6def0e486c6c4b33debe618d0c3565d29e9d231707a9a4f4adc0c8004"),
    )
}
CYCLIC_PREFIX = (20, *(18,) * 6, 20, *(18,) * 6)  # samples, of a slot of 1 ms at 15 kHz and FFTs of 256
LINE_OF_SIGHT_DOPPLER = 0.7  # of f_D: TR 38.901, Sec. 7.7.2
SNR_REFERENCES = ("grid", "pilot")
REALISATIONS = ("fresh", "fixed")
GAP_DECIMALS = 15  # of seconds: what is less apart is rounding
BESSEL_RANGE = 30  # arguments of `bessel_j0` are below


class TapTable(NamedTuple):
    """A profile.

    Attributes:
        delays: (taps,) over the rms delay spread.
        powers: (taps,), their sum is 1.
        line_of_sight: whether the first tap is one unfading path.
    """

    delays: np.ndarray
    powers: np.ndarray
    line_of_sight: bool = False


@cache
def tap_table(name: str) -> TapTable:
    """The profile of a name.

    The simplified profiles have their delays in ns; here they are over the delay spread in their name, so that
    TDL-A30 at 30 ns is the official one.

    Raises:
        ValueError: an unknown profile.
        DataNotFound, CorruptData: the file of TDL-D, E, A30, B100 or C300 is missing or not the official one.
    """
    if name in TABLES:
        delays, decibels = (np.array(row.split(), float) for row in TABLES[name])
        line_of_sight = False
    elif name in FILES:
        with open_data(FILES[name]) as stream:
            content = json.load(stream)
        delays, decibels = (np.array(content[field], float) for field in ("delays", "powers"))
        line_of_sight = bool(content["los"])
        if not content["scale_delays"]:
            delays = delays / float(re.sub(r"\D", "", name))
    else:
        raise ValueError(f"unknown profile {name!r}, expected one of {[*TABLES, *FILES]}")
    powers = 10 ** (decibels / 10)
    return TapTable(delays, powers / powers.sum(), line_of_sight)


def tdl_profile(name: str, delay_spread_s: Number) -> tuple[Float[AnyArray, "taps"], Float[AnyArray, "taps"]]:
    """Delays in seconds and powers (sum 1) of a profile at an rms delay spread.

    Raises:
        ValueError: an unknown profile or a negative delay spread.
    """
    _reject_negative("delay spread", delay_spread_s)
    table = tap_table(name)
    return delay_spread_s * table.delays, table.powers


def rms_delay_spread(delays: Float[AnyArray, "taps"], powers: Float[AnyArray, "taps"]) -> Float[Array, ""]:
    """Standard deviation of the delay under the powers, in the delays' unit."""
    share = jnp.asarray(powers) / jnp.sum(powers)
    return jnp.sqrt(jnp.sum(share * jnp.square(delays - jnp.sum(share * delays))))


def ofdm_symbol_times(
    spacing_hz: float = 15e3, fft_size: int = 256, cyclic_prefix: Sequence[int] = CYCLIC_PREFIX
) -> Float[np.ndarray, "symbols"]:
    """Middle of the useful part of every symbol, in seconds from the start of the slot.

    Args:
        spacing_hz: between subcarriers.
        fft_size: samples of the useful part.
        cyclic_prefix: samples in front of each symbol.

    Raises:
        ValueError: a spacing or size that is not positive, a negative prefix, or no symbols.
    """
    if not spacing_hz > 0 or fft_size < 1 or len(cyclic_prefix) < 1 or min(cyclic_prefix) < 0:
        raise ValueError(
            f"needs spacing_hz > 0, fft_size >= 1 and prefixes >= 0, got {spacing_hz}, {fft_size}, {cyclic_prefix}"
        )
    prefix = np.asarray(cyclic_prefix)
    ends = np.cumsum(prefix + fft_size)
    return (ends - fft_size / 2) / (spacing_hz * fft_size)


class OfdmGrid(NamedTuple):
    """A slot.

    Attributes:
        num_subcarriers: K.
        num_symbols: T; the first of the slot's.
        spacing_hz: between subcarriers.
        fft_size: samples of a symbol.
        cyclic_prefix: samples in front of each symbol of the whole slot.
    """

    num_subcarriers: int = 120
    num_symbols: int = 14
    spacing_hz: float = 15e3
    fft_size: int = 256
    cyclic_prefix: tuple[int, ...] = CYCLIC_PREFIX

    def times(self) -> Float[np.ndarray, "symbols"]:
        """t_l in seconds.

        Raises:
            ValueError: more symbols than the slot has.
        """
        times = ofdm_symbol_times(self.spacing_hz, self.fft_size, self.cyclic_prefix)
        if not 1 <= self.num_symbols <= len(times):
            raise ValueError(f"num_symbols must be in 1 to {len(times)}, got {self.num_symbols}")
        return times[: self.num_symbols]

    def frequencies(self) -> Float[np.ndarray, "subcarriers"]:
        """f_k = (k - K / 2) spacing, in Hz.

        Raises:
            ValueError: fewer than one subcarrier.
        """
        if self.num_subcarriers < 1:
            raise ValueError(f"num_subcarriers must be at least 1, got {self.num_subcarriers}")
        return (np.arange(self.num_subcarriers) - self.num_subcarriers / 2) * self.spacing_hz


class Pilots(NamedTuple):
    """Where the pilots lie: on every crossing of a row (subcarrier) and a column (symbol).

    Attributes:
        rows: (r,) ascending.
        columns: (c,) ascending.
    """

    rows: np.ndarray
    columns: np.ndarray


def pilot_indices(
    num_subcarriers: int,
    spacing: int,
    offset: int | str = "symmetric",
    columns: Sequence[int] = (2, 11),
    num_symbols: int = 14,
) -> Pilots:
    """Pilots on every `spacing`-th row.

    Args:
        num_subcarriers: K.
        spacing: N.
        offset: the first row; "symmetric": the smallest o with 2 o = K - 1 modulo N, so that as many rows are left
            below as above, and 0 where there is none.
        columns: the symbols with pilots.
        num_symbols: T.

    Raises:
        ValueError: pilots outside the grid, or columns that do not ascend.
    """
    if spacing < 1 or num_subcarriers < 1:
        raise ValueError(f"needs spacing >= 1 and num_subcarriers >= 1, got {spacing} and {num_subcarriers}")
    if offset == "symmetric":
        offset = next((o for o in range(spacing) if (2 * o - num_subcarriers + 1) % spacing == 0), 0)
    if not isinstance(offset, int) or not 0 <= offset < num_subcarriers:
        raise ValueError(f"offset must be 'symmetric' or a row of 0 to {num_subcarriers - 1}, got {offset!r}")
    places = np.asarray(columns, int)
    if len(places) < 1 or places.min() < 0 or places.max() >= num_symbols or (np.diff(places) <= 0).any():
        raise ValueError(f"columns must ascend within 0 to {num_symbols - 1}, got {tuple(columns)}")
    return Pilots(np.arange(offset, num_subcarriers, spacing), places)


def path_gains(
    theta: Float[AnyArray, "*batch taps"],
    phi: Float[AnyArray, "*batch taps sinusoids"],
    powers: Float[AnyArray, "taps"],
    doppler_hz: Float[AnyArray, "*batch"],
    times: Float[np.ndarray, "symbols"],
) -> Complex[Array, "*batch taps symbols"]:
    """g_p(t) = sqrt(P_p / S) sum_n exp(i (2 pi f_D t cos alpha_n + phi_n)), alpha_n = (2 pi n + theta) / S, n = 1..S.

    Over theta and phi uniform on a circle the autocorrelation is P_p J0 exactly, for every S (Xiao, Zheng, Beaulieu).
    """
    phi, powers = jnp.asarray(phi), jnp.asarray(powers)
    count = phi.shape[-1]
    alpha = (2 * np.pi * jnp.arange(1, count + 1) + jnp.asarray(theta)[..., None]) / count
    speed = 2 * np.pi * jnp.asarray(doppler_hz)[..., None, None] * jnp.cos(alpha)
    # From symbol to symbol every sinusoid turns by an angle of which there are few, two for the prefixes of LTE: a
    # product of complex numbers a symbol takes half the time of a sine and a cosine.
    gaps, kinds = np.unique(np.diff(times, prepend=0).round(GAP_DECIMALS), return_inverse=True)
    turns = _unit(speed * gaps.reshape(-1, *(1,) * speed.ndim))

    def next_symbol(phasors: Array, kind: Array) -> tuple[Array, Array]:
        phasors = phasors * turns[kind]
        return phasors, jnp.sum(phasors, axis=-1)

    _, total = lax.scan(next_symbol, _unit(phi), jnp.asarray(kinds))
    return jnp.sqrt(powers / count)[:, None] * jnp.moveaxis(total, 0, -1)


def _unit(angle: Array) -> Array:
    return lax.complex(jnp.cos(angle), jnp.sin(angle))


def sum_of_sinusoids(
    key: PRNGKeyArray,
    powers: Float[AnyArray, "taps"],
    doppler_hz: Float[AnyArray, "batch"],
    times: Float[np.ndarray, "symbols"],
    num_sinusoids: int = 32,
    line_of_sight: bool = False,
) -> Complex[Array, "batch taps symbols"]:
    """Gains of independent taps, fading with Jakes' spectrum.

    Args:
        key: draws them.
        powers: of the taps.
        doppler_hz: largest Doppler shift of every realisation.
        times: when to look, in seconds.
        num_sinusoids: S.
        line_of_sight: the first tap is one path of constant strength instead, its Doppler shift 0.7 f_D.

    Raises:
        ValueError: a negative Doppler shift, or fewer than one sinusoid.
    """
    _reject_negative("Doppler shift", doppler_hz)
    if num_sinusoids < 1:
        raise ValueError(f"num_sinusoids must be at least 1, got {num_sinusoids}")
    shape = (doppler_hz.shape[0], powers.shape[0], num_sinusoids)
    theta_key, phi_key = jax.random.split(key)
    theta = jax.random.uniform(theta_key, shape[:2], minval=-np.pi, maxval=np.pi)
    phi = jax.random.uniform(phi_key, shape, minval=-np.pi, maxval=np.pi)
    gains = path_gains(theta, phi, powers, doppler_hz, times)
    if not line_of_sight:
        return gains
    shift = 2 * np.pi * LINE_OF_SIGHT_DOPPLER * jnp.asarray(doppler_hz)[:, None]
    direct = jnp.sqrt(powers[0]) * jnp.exp(1j * (shift * jnp.asarray(times) + theta[:, :1]))
    return gains.at[:, 0].set(direct)


def tdl_frequency_response(
    key: PRNGKeyArray,
    profile: str | TapTable,
    delay_spread_s: Float[AnyArray, "batch"],
    doppler_hz: Float[AnyArray, "batch"],
    grid: OfdmGrid,
    num_sinusoids: int = 32,
) -> Complex[Array, "batch subcarriers symbols"]:
    """H of independent slots, E|H|^2 = 1.

    Args:
        key: draws them.
        profile: of `tap_table`, or its name.
        delay_spread_s: rms, in seconds, one a slot.
        doppler_hz: largest Doppler shift, one a slot.
        grid: the slot.
        num_sinusoids: of a tap.

    Raises:
        ValueError: an unknown profile, a negative delay spread or Doppler shift.
    """
    _reject_negative("delay spread", delay_spread_s)
    table = tap_table(profile) if isinstance(profile, str) else profile
    gains = sum_of_sinusoids(key, table.powers, doppler_hz, grid.times(), num_sinusoids, table.line_of_sight)
    delays = jnp.asarray(delay_spread_s)[:, None] * table.delays
    return frequency_response(gains, delays, grid)


def frequency_response(
    gains: Complex[AnyArray, "batch taps symbols"], delays: Float[AnyArray, "batch taps"], grid: OfdmGrid
) -> Complex[Array, "batch subcarriers symbols"]:
    """H[k, l] = sum_p g_p(t_l) exp(-2 pi i f_k tau_p), delays in seconds."""
    phase = -2 * np.pi * grid.frequencies()[:, None] * jnp.asarray(delays)[:, None, :]
    return jnp.einsum("bkp,bpt->bkt", jnp.exp(1j * phase), gains, precision="highest")


def bessel_j0(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """J0(x) = mean over the circle of cos(x cos a): 64 angles are exact to rounding for |x| < 30.

    Raises:
        ValueError: larger arguments; where they are traced their values are NaN instead.
    """
    if not isinstance(x, jax.core.Tracer) and (largest := np.max(np.abs(x), initial=0)) >= BESSEL_RANGE:
        raise ValueError(f"bessel_j0 takes |x| < {BESSEL_RANGE}, got {largest}")
    x = jnp.asarray(x)
    angles = 2 * np.pi * (np.arange(64) + 0.5) / 64
    return jnp.where(jnp.abs(x) < BESSEL_RANGE, jnp.mean(jnp.cos(x[..., None] * np.cos(angles)), axis=-1), jnp.nan)


def doppler_limit(grid: OfdmGrid) -> float:
    """The Doppler shift in Hz that `channel_covariance` cannot reach: 30 / (2 pi (t_T - t_1)), none for one symbol."""
    duration = np.ptp(grid.times())
    return float(BESSEL_RANGE / (2 * np.pi * duration)) if duration else np.inf


def channel_covariance(
    profile: str | TapTable, delay_spread_s: Number, doppler_hz: Number, grid: OfdmGrid
) -> tuple[Complex[Array, "subcarriers subcarriers"], Float[Array, "symbols symbols"]]:
    """F over subcarriers and J over symbols: the covariance of H, row-major, is their Kronecker product F (x) J.

        F[k, k'] = sum_p P_p exp(-2 pi i (f_k - f_k') tau_p),    J[l, l'] = J0(2 pi f_D (t_l - t_l'))

    Doppler shifts are below `doppler_limit`, 5,144 Hz for the 14 symbols of a slot: see `bessel_j0`.

    Raises:
        ValueError: an unknown profile, one with a line of sight (its covariance is no such product), a negative delay
            spread or Doppler shift, or one at the limit or above (where it is traced, J is NaN instead).
    """
    _reject_negative("delay spread", delay_spread_s)
    _reject_negative("Doppler shift", doppler_hz)
    if not isinstance(doppler_hz, jax.core.Tracer) and doppler_hz >= (limit := doppler_limit(grid)):
        raise ValueError(f"the Doppler shift must be below {limit:,.0f} Hz on this grid, got {doppler_hz}")
    table = tap_table(profile) if isinstance(profile, str) else profile
    if table.line_of_sight:
        raise ValueError(f"the covariance of {profile} is no Kronecker product: it has a line of sight")
    frequencies, times = grid.frequencies(), grid.times()
    phase = 2 * np.pi * (frequencies[:, None] - frequencies)[..., None] * (delay_spread_s * table.delays)
    over_subcarriers = jnp.sum(table.powers * jnp.exp(-1j * jnp.asarray(phase)), axis=-1)
    return over_subcarriers, bessel_j0(2 * np.pi * doppler_hz * (times[:, None] - times))


class ChannelBank(NamedTuple):
    """One channel for each pair of a delay spread and a Doppler shift.

    Attributes:
        delay_spreads_ns: (D,).
        dopplers_hz: (F,).
        h: (D, F, K, T).
    """

    delay_spreads_ns: AnyArray
    dopplers_hz: AnyArray
    h: AnyArray


def draw_bank(
    key: PRNGKeyArray,
    delay_spreads_ns: Float[AnyArray, "spreads"],
    dopplers_hz: Float[AnyArray, "shifts"],
    grid: OfdmGrid,
    profile: str | TapTable = "TDL-A",
    num_sinusoids: int = 32,
    shared_phases: bool = False,
) -> ChannelBank:
    """Draws the bank of the "fixed" realisations.

    Args:
        key: draws it.
        delay_spreads_ns: those of the bank.
        dopplers_hz: likewise.
        grid: the slot.
        profile: of `tap_table`, or its name.
        num_sinusoids: of a tap.
        shared_phases: False: the channels of the pairs are independent. True: all have the same angles and phases of
            their sinusoids, as those of objects that start from one seed: H is a smooth function of the pair.

    Raises:
        ValueError: as `tdl_frequency_response`.
    """
    _reject_negative("delay spread", delay_spreads_ns)
    _reject_negative("Doppler shift", dopplers_hz)
    spreads, shifts = jnp.asarray(delay_spreads_ns), jnp.asarray(dopplers_hz)
    each_spread, each_shift = (part.reshape(-1) for part in jnp.meshgrid(1e-9 * spreads, shifts, indexing="ij"))
    if shared_phases:

        def channel(spread: Array, shift: Array) -> Array:
            return tdl_frequency_response(key, profile, spread[None], shift[None], grid, num_sinusoids)[0]

        h = jax.vmap(channel)(each_spread, each_shift)
    else:
        h = tdl_frequency_response(key, profile, each_spread, each_shift, grid, num_sinusoids)
    return ChannelBank(spreads, shifts, h.reshape(len(spreads), len(shifts), *h.shape[1:]))


def look_up(
    bank: ChannelBank, delay_spread_ns: Float[AnyArray, "batch"], doppler_hz: Float[AnyArray, "batch"]
) -> Complex[Array, "batch subcarriers symbols"]:
    """The bank's channels for these conditions; NaN for a condition that it does not have."""

    def position(known: AnyArray, asked: AnyArray) -> tuple[Array, Array]:
        distance = jnp.abs(jnp.asarray(asked)[:, None] - jnp.asarray(known))
        return jnp.argmin(distance, axis=1), jnp.min(distance, axis=1) <= 1e-3

    row, has_row = position(bank.delay_spreads_ns, delay_spread_ns)
    column, has_column = position(bank.dopplers_hz, doppler_hz)
    return jnp.where((has_row & has_column)[:, None, None], jnp.asarray(bank.h)[row, column], jnp.nan)


def noise_variance(
    snr_db: Float[AnyArray, "*batch"] | float | int,
    grid: OfdmGrid,
    pilots: Pilots,
    snr_reference: str = "grid",
    power: Float[AnyArray, "*batch"] | float | int = 1.0,
) -> Float[Array, "*batch"]:
    """Variance of the noise on a pilot of power 1.

    Args:
        snr_db: label of the slot.
        grid: the slot.
        pilots: their share of the grid counts for "grid".
        snr_reference: "pilot": power / variance is the SNR (power 1 is meant). "grid": the received power is measured
            over the whole grid, empty cells included, as MATLAB's `awgn(..., "measured")` does on a grid of pilots
            alone: they are cleaner than the label by K T / (r c), 13.2 dB for 80 pilots in 120 x 14.
        power: mean |H|^2 over the pilots.

    Raises:
        ValueError: an unknown reference.
    """
    if snr_reference not in SNR_REFERENCES:
        raise ValueError(f"snr_reference must be one of {SNR_REFERENCES}, got {snr_reference!r}")
    variance = 10 ** (-jnp.asarray(snr_db) / 10)
    if snr_reference == "pilot":
        return variance
    share = len(pilots.rows) * len(pilots.columns) / (grid.num_subcarriers * grid.num_symbols)
    return jnp.asarray(power) * share * variance


class Batch(NamedTuple):
    """Slots.

    Attributes:
        ls: (batch, r, c) least-squares estimates at the pilots.
        h: (batch, K, T) channels.
        conditions: (batch, 3) SNR in dB, delay spread in ns, Doppler shift in Hz.
        noise_var: (batch,) variance of the noise in `ls`.
    """

    ls: AnyArray
    h: AnyArray
    conditions: AnyArray
    noise_var: AnyArray


def draw_conditions(
    key: PRNGKeyArray,
    batch_size: int,
    snrs_db: Sequence[float | int],
    delay_spreads_ns: Sequence[float | int],
    dopplers_hz: Sequence[float | int],
) -> Float[Array, "batch 3"]:
    """Conditions drawn uniformly and independently from the three lists.

    Raises:
        ValueError: an empty list.
    """
    lists = {"snrs_db": snrs_db, "delay_spreads_ns": delay_spreads_ns, "dopplers_hz": dopplers_hz}
    if empty := [name for name, values in lists.items() if len(values) < 1]:
        raise ValueError(f"no values in {empty}")
    columns = [
        jax.random.choice(part, jnp.asarray(values, float), (batch_size,))
        for part, values in zip(jax.random.split(key, 3), lists.values(), strict=True)
    ]
    return jnp.stack(columns, axis=1)


def simulate_batch(
    key: PRNGKeyArray,
    conditions: Float[AnyArray, "batch 3"],
    grid: OfdmGrid,
    pilots: Pilots,
    snr_reference: str = "grid",
    realisations: str = "fresh",
    bank: ChannelBank | None = None,
    profile: str | TapTable = "TDL-A",
    num_sinusoids: int = 32,
) -> Batch:
    """Slots in these conditions. QPSK pilots have modulus 1, so that the error of Y / X is noise of the same variance.

    Args:
        key: draws channels and noise.
        conditions: (SNR in dB, delay spread in ns, Doppler shift in Hz) of each.
        grid: the slot.
        pilots: where they lie.
        snr_reference: what the SNR means, see `noise_variance`; the power is measured in every slot.
        realisations: "fresh": a new channel for every slot. "fixed": the bank's, the same in all slots of equal delay
            spread and Doppler shift (NaN where it has none); noise alone is new.
        bank: of the "fixed" realisations.
        profile: of the "fresh" ones.
        num_sinusoids: likewise.

    Raises:
        ValueError: pilots outside the grid; unknown options; "fixed" without a bank, "fresh" with one; a bank of
            another grid; negative delay spreads or Doppler shifts.
    """
    if realisations not in REALISATIONS:
        raise ValueError(f"realisations must be one of {REALISATIONS}, got {realisations!r}")
    if (realisations == "fixed") != (bank is not None):
        raise ValueError(f"{realisations!r} realisations {'need a' if bank is None else 'take no'} bank")
    size = (grid.num_subcarriers, grid.num_symbols)
    if any(places.min() < 0 or places.max() >= end for places, end in zip(pilots, size, strict=True)):
        raise ValueError(f"pilots in rows {pilots.rows} and columns {pilots.columns} are not within the grid {size}")
    snr_db, delay_spread_ns, doppler_hz = jnp.asarray(conditions).T
    for name, values in (("delay spread", conditions[:, 1]), ("Doppler shift", conditions[:, 2])):
        _reject_negative(name, values)
    channel_key, noise_key = jax.random.split(key)
    if bank is None:
        h = tdl_frequency_response(channel_key, profile, 1e-9 * delay_spread_ns, doppler_hz, grid, num_sinusoids)
    elif bank.h.shape[2:] != size:
        raise ValueError(f"the bank's channels are {bank.h.shape[2:]}, the grid is {size}")
    else:
        h = look_up(bank, delay_spread_ns, doppler_hz)
    at_pilots = h[:, pilots.rows[:, None], pilots.columns]
    power = jnp.mean(jnp.square(jnp.abs(at_pilots)), axis=(1, 2))
    variance = noise_variance(snr_db, grid, pilots, snr_reference, power)
    noise = jax.random.normal(noise_key, (2, *at_pilots.shape)) * jnp.sqrt(variance / 2)[:, None, None]
    return Batch(at_pilots + lax.complex(noise[0], noise[1]), h, jnp.asarray(conditions), variance)


NUMBER = r"\d+(?:\.\d+)?"
NAME = re.compile(
    rf"(?P<number>\d+)_SNR-(?P<snr>-?{NUMBER})_DS-(?P<spread>{NUMBER})_DOP-(?P<shift>{NUMBER})_N-\d+"
    r"_(?P<profile>TDL-\w+)\.mat"
)


def read_mat_slots(folder: str | Path, pilot_shape: tuple[int, int]) -> Batch:
    """Slots of a folder in the layout of AdaFortiTran's authors, in the order of their numbers.

    A file `{i}_SNR-{dB}_DS-{ns}_DOP-{Hz}_N-{spacing}_TDL-A.mat` has H of shape (K, T, 2 or more): plane 0 the channel,
    plane 1 the least-squares estimates, zero away from the pilots. Its variable `var_hat` is the noise variance that
    the authors estimated; where it is missing, that is NaN here.

    Args:
        folder: with nothing but such .mat files, of one profile and one pattern of pilots.
        pilot_shape: (r, c).

    Raises:
        FileNotFoundError: no .mat file in the folder.
        CorruptData: a file of another name or content, or whose pilots are not all crossings of r rows and c columns;
            files of several profiles, shapes or patterns.
    """
    files = sorted(Path(folder).glob("*.mat"))
    if not files:
        raise FileNotFoundError(f"no .mat file in {folder}")
    matches = {}
    for path in files:
        match = NAME.fullmatch(path.name)
        if match is None:
            raise CorruptData(f"{path} is not named {{i}}_SNR-{{dB}}_DS-{{ns}}_DOP-{{Hz}}_N-{{spacing}}_TDL-A.mat")
        matches[int(match["number"]), path] = match
    if len(profiles := {match["profile"] for match in matches.values()}) > 1:
        raise CorruptData(f"the slots in {folder} have several profiles: {sorted(profiles)}")
    slots, patterns = [], set()
    for place in sorted(matches):
        slot, pattern = _read_slot(place[1], matches[place], pilot_shape)
        slots.append(slot)
        patterns.add(pattern)
    if len(shapes := {slot.h.shape for slot in slots}) > 1:
        raise CorruptData(f"the slots in {folder} have several shapes: {sorted(shapes)}")
    if len(patterns) > 1:
        raise CorruptData(f"the slots in {folder} have several patterns of pilots (rows, columns): {sorted(patterns)}")
    return Batch(*(np.stack(parts) for parts in zip(*slots, strict=True)))


def _read_slot(path: Path, match: re.Match[str], pilot_shape: tuple[int, int]) -> tuple[Batch, tuple]:
    """One slot, without the batch axis, and the rows and columns of its pilots."""
    try:
        content = scipy.io.loadmat(path)
    except (ValueError, TypeError, NotImplementedError, OSError, IndexError, zlib.error, MatReadError) as error:
        raise CorruptData(f"{path} is no .mat file that SciPy can read ({error})") from error
    planes = content.get("H")
    if planes is None or planes.ndim != 3 or planes.shape[2] < 2:
        raise CorruptData(f"{path} needs H of shape (K, T, 2), found {None if planes is None else planes.shape}")
    if not _finite(planes):
        raise CorruptData(f"{path} needs H of finite numbers")
    estimates = planes[..., 1]
    rows, columns = (np.flatnonzero(estimates.any(axis=axis)) for axis in (1, 0))
    found = estimates[estimates != 0]  # row-major
    if (len(rows), len(columns)) != tuple(pilot_shape) or found.size != len(rows) * len(columns):
        raise CorruptData(
            f"{path} has {found.size} pilots in {len(rows)} rows and {len(columns)} columns, "
            f"expected all crossings of {pilot_shape[0]} and {pilot_shape[1]}"
        )
    variance = np.asarray(content.get("var_hat", np.nan))
    is_one = variance.size == 1 and np.isrealobj(variance) and _finite(variance) and variance >= 0
    if "var_hat" in content and not is_one:
        raise CorruptData(f"{path} needs var_hat to be one number, at least 0, found {variance}")
    ls, h = found.reshape(pilot_shape).astype(np.complex64), planes[..., 0].astype(np.complex64)
    conditions = np.array([match["snr"], match["spread"], match["shift"]], np.float32)
    slot = Batch(ls, h, conditions, variance.reshape(()).astype(np.float32))
    return slot, (tuple(rows.tolist()), tuple(columns.tolist()))


def _finite(values: np.ndarray) -> bool:
    """Whether these are numbers, not cells or text, and finite."""
    return np.issubdtype(values.dtype, np.number) and bool(np.isfinite(values).all())


def _reject_negative(name: str, values: Float[AnyArray, "..."] | float | int) -> None:
    if not isinstance(values, jax.core.Tracer) and np.min(np.asarray(values)) < 0:
        raise ValueError(f"a {name} must be at least 0, got {np.min(np.asarray(values))}")
