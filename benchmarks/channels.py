"""Radio channels: slots of tapped delay lines a second, freshly drawn and from a fixed bank, against Sionna's TDL.

A call yields the frequency responses H of a batch of OFDM slots, K subcarriers by 14 symbols, at 200 ns and 500 Hz
(the middle of AdaFortiTran's sweeps; the time depends on neither). Both sides have the same profile, subcarriers and
number of sinusoids a tap, and a cyclic prefix of 18 samples for every symbol, as the symbols of Sionna are equidistant.

- `fresh`: `tdl_frequency_response`, compiled; a new key in every call;
- `fixed bank`: `look_up` among 240 channels that were drawn once, compiled; Sionna has no such thing;
- `Sionna`: a `TDL` and `cir_to_ofdm_channel`, eager, as its users write them. It takes part on a CPU where Sionna 2 is
  installed, which computes with PyTorch.

Nothing is timed unless the slots of both sides have the distribution that was asked for: mean power 1, and the
correlations over subcarriers and over symbols of `channel_covariance`, each within five standard errors; the slots of
the bank are those that were drawn.

PyTorch chooses its number of threads, see `benchmarks.training` for what that means on a busy machine.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    environment,
    environment_line,
    figure_table,
    find_rival,
    paired_times,
    print_table,
    ratios,
    write_json,
)
from benchmarks.training import SAMPLE_S
from jaxpapers.data.tdl import (
    TABLES,
    ChannelBank,
    OfdmGrid,
    channel_covariance,
    draw_bank,
    draw_conditions,
    look_up,
    tdl_frequency_response,
    tdl_profile,
)

SUBCARRIERS = (24, 120)
DELAY_SPREAD_NS, DOPPLER_HZ, CARRIER_HZ = 200.0, 500.0, 3.5e9
BANK_SPREADS_NS, BANK_DOPPLERS_HZ = np.arange(25.0, 301, 25), np.arange(50.0, 1001, 50)
SINUSOIDS = 32
CHECKED_SLOTS = 8192  # five standard errors are 0.054 at most, where the mean power is 1
STANDARD_ERRORS = 5.0  # several hundred correlations stand the test: none fails by chance
TAPS_AGREEMENT = 1e-6  # delays and powers of Sionna are in float32

Draw = Callable[[], Any]


class Sionna(NamedTuple):
    """What the benchmark takes from Sionna, and its PyTorch."""

    version: str
    torch: Any
    phy: Any
    TDL: Any


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks channels", description=__doc__.partition("\n")[0])
    parser.add_argument("--subcarriers", type=int, nargs="+", default=SUBCARRIERS, help="K of every point")
    parser.add_argument("--batch", type=int, default=64, help="slots of a call")
    parser.add_argument("--profile", choices=TABLES, default="TDL-A", help="of TR 38.901")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each rival")
    parser.add_argument("--torch-threads", type=int, help="threads of PyTorch; its own choice without")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    if min(args.subcarriers) < 1 or args.batch < 1:
        parser.error(f"{args.subcarriers} subcarriers, batch {args.batch}: all must be at least 1")
    where = environment() | {"batch": args.batch, "profile": args.profile}
    sionna = find_sionna(args.torch_threads)
    if sionna:
        torch = sionna.torch
        where |= {"sionna": sionna.version, "torch": torch.__version__, "torch threads": torch.get_num_threads()}

    print(f"{environment_line()}, {args.profile}, batch {args.batch}")
    results = {f"K = {k}": compare(sionna, args.profile, k, args.batch, args.rounds) for k in args.subcarriers}
    if args.json:
        write_json(args.json, {"environment": where} | results)
    return 0


def find_sionna(threads: int | None) -> Sionna | None:
    """Sionna, or None where it takes no part."""

    def load() -> Sionna:
        import sionna
        import torch
        from sionna import phy
        from sionna.phy.channel.tr38901 import TDL

        return Sionna(sionna.__version__, torch, phy, TDL)

    found = find_rival("Sionna", load)
    if found and threads is not None:
        found.torch.set_num_threads(threads)
    return found


def compare(sionna: Sionna | None, profile: str, num_subcarriers: int, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds per call of every side at one point, and how far its correlations are from the closed form.

    Raises:
        SystemExit: a side draws something else.
    """
    grid = OfdmGrid(num_subcarriers, cyclic_prefix=(18,) * 14)
    point = f"K = {num_subcarriers}"
    fresh = {"fresh": our_draws(profile, grid, batch)}
    if sionna:
        fresh["Sionna"] = sionna_draws(sionna, profile, grid, batch)
    errors = {
        name: refuse_disagreement(f"{point}, {name}", draw, profile, grid, CHECKED_SLOTS)
        for name, draw in fresh.items()
    }
    for name, error in errors.items():
        print(f"{point}, {name}: correlations at most {error:.1f} standard errors from the closed form")
    calls = {"fresh": fresh.pop("fresh"), "fixed bank": bank_draws(profile, grid, batch), **fresh}
    times = paired_times(calls, rounds, SAMPLE_S)
    report(point, times, batch)
    return {"seconds": times, "standard errors": errors}


def our_draws(profile: str, grid: OfdmGrid, batch: int) -> Draw:
    """`() -> H` (batch, K, T), other slots in every call."""

    @jax.jit
    def draw(step: int, delay_spread_s: jax.Array, doppler_hz: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), step)
        return tdl_frequency_response(key, profile, delay_spread_s, doppler_hz, grid, SINUSOIDS)

    # As arguments: XLA would compute with constants before the first call.
    delay_spread_s, doppler_hz = jnp.full(batch, 1e-9 * DELAY_SPREAD_NS), jnp.full(batch, DOPPLER_HZ)
    steps = itertools.count()
    return lambda: draw(next(steps), delay_spread_s, doppler_hz)


def bank_draws(profile: str, grid: OfdmGrid, batch: int) -> Draw:
    """`() -> H` (batch, K, T) of random conditions of the bank, the same in every call.

    Raises:
        SystemExit: the slots are not the bank's.
    """
    bank_key, condition_key = jax.random.split(jax.random.key(1))
    bank = draw_bank(bank_key, BANK_SPREADS_NS, BANK_DOPPLERS_HZ, grid, profile, SINUSOIDS)
    conditions = draw_conditions(condition_key, batch, [0.0], BANK_SPREADS_NS.tolist(), BANK_DOPPLERS_HZ.tolist())
    _, spreads, dopplers = conditions.T
    program = jax.jit(look_up)
    refuse_other_slots(bank, spreads, dopplers, program(bank, spreads, dopplers))
    return lambda: program(bank, spreads, dopplers)


def refuse_other_slots(bank: ChannelBank, spreads_ns: jax.Array, dopplers_hz: jax.Array, found: jax.Array) -> None:
    """Raises SystemExit where the slots are not those of the bank at these conditions."""
    rows, columns = np.searchsorted(BANK_SPREADS_NS, spreads_ns), np.searchsorted(BANK_DOPPLERS_HZ, dopplers_hz)
    if not np.array_equal(found, np.asarray(bank.h)[rows, columns]):
        raise SystemExit("error: fixed bank: the slots are not those that were drawn")


def sionna_draws(sionna: Sionna, profile: str, grid: OfdmGrid, batch: int) -> Draw:
    """`() -> H` as Sionna has it, (batch, 1, 1, 1, 1, T, K), other slots in every call.

    Raises:
        SystemExit: Sionna's profile has other taps.
    """
    channel = sionna.phy.channel
    sionna.phy.config.seed = 0  # here: timings use up as many random numbers as they happen to
    speed = DOPPLER_HZ * sionna.phy.SPEED_OF_LIGHT / CARRIER_HZ
    spread = 1e-9 * DELAY_SPREAD_NS
    model = sionna.TDL(
        profile.removeprefix("TDL-"), spread, CARRIER_HZ, num_sinusoids=SINUSOIDS, min_speed=speed, device="cpu"
    )
    for what, theirs, ours in zip(
        ("delays", "powers"), (model.delays, model.mean_powers), tdl_profile(profile, spread), strict=True
    ):
        if len(theirs) != len(ours) or np.abs(theirs.numpy() - ours).max() > TAPS_AGREEMENT * np.max(ours):
            raise SystemExit(f"error: {profile}: Sionna's taps have other {what}")
    frequencies = channel.subcarrier_frequencies(grid.num_subcarriers, grid.spacing_hz, device="cpu")
    symbols_per_s = float(1 / np.diff(grid.times()).mean())

    def draw() -> Any:
        gains, delays = model(batch, grid.num_symbols, symbols_per_s)
        return channel.cir_to_ofdm_channel(frequencies, gains, delays)

    return draw


def in_our_layout(h: Any) -> np.ndarray:
    """(batch, K, T), of JAX or of Sionna."""
    return np.asarray(h) if isinstance(h, jax.Array) else h.numpy()[:, 0, 0, 0, 0].swapaxes(1, 2)


def refuse_disagreement(where: str, draw: Draw, profile: str, grid: OfdmGrid, num_slots: int) -> float:
    """Refuses to time what does not draw the channels that were asked for.

    Each slot has one estimate of every correlation, and the slots are independent: the standard error of the mean
    follows from how the slots scatter.

    Args:
        where: the point and the side.
        draw: its slots, in its layout.
        profile: that was asked for.
        grid: likewise.
        num_slots: that are drawn at least.

    Returns:
        The largest distance from the closed form, in standard errors.

    Raises:
        SystemExit: a distance above STANDARD_ERRORS.
    """
    found = [lag_products(in_our_layout(draw()))]
    while sum(len(over_subcarriers) for over_subcarriers, _ in found) < num_slots:
        found.append(lag_products(in_our_layout(draw())))
    covariances = channel_covariance(profile, 1e-9 * DELAY_SPREAD_NS, DOPPLER_HZ, grid)
    largest = 0.0
    for axis, parts, covariance in zip(("subcarriers", "symbols"), zip(*found, strict=True), covariances, strict=True):
        samples = np.concatenate(parts)
        closed_form = np.array([np.diagonal(covariance, lag).mean() for lag in range(len(covariance))])
        distances = np.abs(samples.mean(0) - closed_form) / (samples.std(0) / np.sqrt(len(samples)))
        worst = int(np.argmax(distances))  # the first NaN, if there is one
        if not distances[worst] <= STANDARD_ERRORS:
            what = "mean power" if worst == 0 else f"correlation over {worst} {axis}"
            raise SystemExit(
                f"error: {where}: the {what} is {samples.mean(0)[worst]:.3f} instead of {closed_form[worst]:.3f}, "
                f"{distances[worst]:.1f} standard errors off"
            )
        largest = max(largest, float(distances[worst]))
    return largest


def lag_products(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of H[k, l] H[k + d, l]* and of H[k, l] H[k, l + d]* over each slot: (slots, K) and (slots, T)."""

    def along_last(h: np.ndarray) -> np.ndarray:
        size = h.shape[-1]
        # The transform of all products' sums is the squared modulus; as many zeros keep both ends apart.
        power = np.square(np.abs(np.fft.fft(h, 2 * size))).mean(1)
        return np.fft.ifft(power)[:, :size].conj() / np.arange(size, 0, -1)

    return along_last(h.swapaxes(1, 2)), along_last(h)


def report(point: str, times: Mapping[str, Sequence[float]], batch: int) -> None:
    """Prints slots per second and ratios of times to those of fresh slots."""
    table = figure_table("", "slots/s", "ms a batch", "x fresh", "quartiles", title=f"{point}, batch {batch}")
    over = ratios(times, "fresh")
    for name, ratio in over.items():
        seconds = statistics.median(times[name])
        rate, milliseconds = f"{batch / seconds:,.0f}", f"{1e3 * seconds:.3f}"
        table.add_row(name, rate, milliseconds, *ratio.cells(digits=3))
    print_table(table)
    if "Sionna" in over:
        print(f"{point}: {over['Sionna']} times Sionna's fresh slots per second\n")
