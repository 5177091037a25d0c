"""Signals. First: stop cleanly. Second: exit at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

HANGUP = [signal.SIGHUP]  # the terminal is gone
STOPPING = [signal.SIGINT, signal.SIGTERM, *HANGUP]  # Ctrl-C, and what schedulers and systems send before they kill


class Stopped(Exception):  # noqa: N818  # not an error
    """A signal asked the program to stop, and it has come to a point where it can."""


class Stop:
    """Whether a signal has asked the program to stop."""

    number: int | None = None  # the signal; None before it comes

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handles signals within the context. A second one ends the program at once, unless it is SIGHUP.

        SIGHUP says that the terminal is gone, and may come twice: from the shell and from the system; printing must not
        fail then. Signals that the program was started to ignore (`nohup`) stay ignored. In a thread, where Python
        allows no handlers, nothing changes.
        """
        main = threading.current_thread() is threading.main_thread()
        numbers = [number for number in STOPPING if main and signal.getsignal(number) is not signal.SIG_IGN]
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

        def handle(number: int, _frame: Any) -> None:
            for each in numbers:
                signal.signal(each, signal.SIG_IGN if each in HANGUP else signal.SIG_DFL)
            for descriptor in terminals if number in HANGUP else ():
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            self.number = number

        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def held_signals(numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Blocks signals within the context. A child process started there keeps them blocked.

    A scheduler may send them to all processes of a job.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
