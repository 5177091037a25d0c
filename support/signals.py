"""How a program starts, and handles signals. First signal: stop cleanly. Second: exit at once."""

from __future__ import annotations

import ctypes
import io
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Ctrl-C, the closed terminal, and what schedulers and systems send before they kill.
STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def start_program() -> None:
    """What a program does before it imports anything else.

    Opens missing standard streams, lets Ctrl-C end the program, shortens the time that threads spin, and keeps memory
    that is freed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # a daemon has closed it; the next file would get its number
            stream = open(os.devnull, mode)  # noqa: SIM115, PTH123  # gets the lowest number that is free, its own
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold characters that the terminal lacks
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to clean up
    # PyTorch's threads (libgomp) spin for milliseconds while they wait for each other. On a busy machine that doubles
    # the time of an update. https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # glibc returns large blocks to the system and takes them anew: 70,000 page faults an update from pixels.
    # https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
    chosen = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        # Where the first call is refused (older versions take at most 32 MB), the last one alone would have every large
        # block returned.
        _ = libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def silence(descriptor: int) -> None:
    """Lets an output go nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Stopped(Exception):  # noqa: N818  # not an error
    """A signal asked the program to stop, and it has come to a point where it can."""


class Stop:
    """Whether a signal has asked the program to stop."""

    number: int | None = None  # the signal; None before it comes

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped

    def exit_status(self, prog: str, rest: str = "") -> int:
        """Prints on stderr which signal stopped the program, and `rest`. Returns the status that shells expect."""
        number = signal.Signals(self.number or 0)
        with suppress(OSError):  # nobody can read it: in a pipe, Ctrl-C has ended the reader, too
            print(f"{prog}: stopped by {number.name}{rest}", file=sys.stderr)
        return 128 + number

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handles signals within the context. A second Ctrl-C or SIGTERM ends the program at once.

        The others may come again: SIGHUP from the shell and the system, SIGXCPU every second (setrlimit(2)). After
        SIGHUP the terminal is gone, and printing must not fail. Signals that the program was started to ignore
        (`nohup`) stay ignored. In a thread, where Python allows no handlers, nothing changes.
        """
        main = threading.current_thread() is threading.main_thread()
        numbers = [number for number in STOPPING if main and signal.getsignal(number) is not signal.SIG_IGN]
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

        def handle(number: int, _frame: Any) -> None:
            self.number = self.number or number
            for each in {signal.SIGINT, signal.SIGTERM}.intersection(numbers):
                signal.signal(each, signal.SIG_DFL)
            for terminal in terminals if number == signal.SIGHUP else []:
                silence(terminal)

        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
