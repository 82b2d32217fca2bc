"""SIGTERM: what SLURM, spot machines and `kill` send before they end a process for good."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Terminated(Exception):
    """The run was asked to stop (SIGTERM), and everything that a resume needs has been saved."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread, wherever that is.

    Work that would lose something by it holds the signal back with `sigterm_noted`.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM")

    with _handler(stop):
        yield


@contextmanager
def sigterm_noted() -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM is noted. Yields `stops_at(step)`: whether to stop now, the same answer on all processes.

    With several processes jax's own service notes the signal on any of them, and chooses a step that all reach.
    """
    noted = threading.Event()

    def stops_at(step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else noted.is_set()

    with _handler(lambda signum, frame: noted.set()) if jax.process_count() == 1 else nullcontext():
        yield stops_at


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
