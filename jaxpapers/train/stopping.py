"""SIGTERM: what SLURM, spot machines and `kill` send before they end a process for good."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import jax
from jax.experimental import multihost_utils

AGAIN_S = 2.0
# jax's service wants a number that grows from question to question and is the same on all processes. Not the step:
# that starts again with every training of a run.
QUESTIONS = itertools.count(1)


class Terminated(BaseException):
    """The run was asked to stop (SIGTERM), and everything that a resume needs has been saved.

    No Exception, as KeyboardInterrupt is none: it comes from anywhere, and whoever lives with a failed computation (a
    claim that cannot be checked, jax's cache) must not live with this.
    """


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread, wherever that is.

    Work that would lose something by it holds the signal back with `sigterm_noted`. With several processes nothing
    is raised: jax's own service notes the signal, and the next training stops where all can.
    """
    if jax.process_count() > 1:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        # Python swallows what is raised inside a finalizer: it comes again until somebody has heard it.
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise Terminated("stopped by SIGTERM")

    with _handler(stop), _handler(stop, signal.SIGALRM):
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is noted. Yields `stops()`: whether to stop now, the same answer on all processes.

    With several processes jax's own service notes the signal on any of them, and chooses a step that all reach.

    Raises:
      Terminated: at the end, where SIGTERM was noted and nothing has stopped for it.
    """
    noted = threading.Event()

    def stops() -> bool:
        if jax.process_count() == 1:
            return noted.is_set()
        return multihost_utils.reached_preemption_sync_point(next(QUESTIONS))

    with _handler(lambda signum, frame: noted.set()) if jax.process_count() == 1 else nullcontext():
        yield stops
    if noted.is_set():  # it came after the last question
        raise Terminated("stopped by SIGTERM")


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None], number: int = signal.SIGTERM) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
