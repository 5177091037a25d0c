"""How programs here hear signals: asked to stop once, they come to an end of their own; asked twice, they are ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # the terminal is gone; Windows has no such signal
STOPPING = [signal.SIGINT, signal.SIGTERM, *HANGUP]  # Ctrl-C, and what schedulers and systems send before they kill


@contextmanager
def asked_to_stop(ask: Callable[[int], None]) -> Iterator[None]:
    """Calls `ask` with the first signal to stop; a second one ends the program at once, unless it is SIGHUP.

    Of a closed terminal the shell tells, and so does the system. Nothing that is printed there may fail afterwards.
    Those that the program was started to ignore, as `nohup` has it do, stay ignored. Outside the main thread, where
    Python lets nobody handle signals, they stay as they are.
    """
    numbers = [number for number in STOPPING if _in_main_thread() and signal.getsignal(number) is not signal.SIG_IGN]
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def hear(number: int, _frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN if each in HANGUP else signal.SIG_DFL)
        if number in HANGUP:
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        ask(number)

    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_signals(numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Signals wait until the end. A process that is started within inherits that and sees none, ever: this one decides.

    A scheduler may send them to all processes of a job.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, unless this program was started to ignore it, or in a thread."""
    if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
