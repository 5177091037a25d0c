"""Standard streams that never end a program: none is closed, and none refuses a character.

Daemons and some schedulers start programs without them.
"""

from __future__ import annotations

import io
import os
import sys


def mend() -> None:
    """Opens the null device in place of closed streams; a character that cannot be shown is printed as its number.

    To be called before anything else is imported: the next file that is opened would get a closed stream's descriptor,
    and whatever is printed there.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            os.dup2(opened, descriptor)
            os.set_inheritable(descriptor, True)
            if opened != descriptor:
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  # for as long as the program runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
