"""How programs here hear signals: asked to stop once, they come to an end of their own; asked twice, they are ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, what schedulers and systems send before they kill, and the end of the terminal; Windows has no SIGHUP.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def asked_to_stop(ask: Callable[[int], None]) -> Iterator[None]:
    """Calls `ask` with the first signal to stop; a second one ends the program at once.

    Those that the program was started to ignore, as `nohup` has it do, stay ignored.
    """
    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]

    def hear(number: int, _frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        ask(number)

    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_signals() -> Iterator[None]:
    """Signals to stop wait until the end. A process started within inherits that and sees none, ever: this one decides.

    A scheduler may send them to all processes of a job.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, unless this program was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
