"""What a program does before it imports anything else, `start.program()`, and how it prints a line, `start.show()`."""

from __future__ import annotations

import io
import os
import signal
import sys

from errors import MachineError


def program() -> None:
    """Opens missing standard streams, lets Ctrl-C end the program, and shortens the time that threads spin."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        # Daemons leave streams closed; the next file would get their numbers.
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  # it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold characters that the terminal lacks
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to clean up
    # PyTorch's threads (libgomp) spin for milliseconds while they wait for each other. On a busy machine that doubles
    # the time of an update. https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def show(line: str) -> None:
    """Prints a line on stdout. Raises MachineError if that is a pipe without a reader, or a full disk."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at exit
        raise MachineError(str(error)) from error
