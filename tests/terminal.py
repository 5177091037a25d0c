"""A terminal or a pipe for a program to write to."""

from __future__ import annotations

import contextlib
import os
import pty
import termios
import threading


@contextlib.contextmanager
def reader(terminal):
    """Gives a file descriptor to write to, and a function that returns what was written once the block has ended."""
    read_end, write_end = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(write_end, (24, 80))
    chunks = []

    def read_all():
        with contextlib.suppress(OSError):  # how Linux ends a terminal
            while chunk := os.read(read_end, 1 << 16):
                chunks.append(chunk)

    thread = threading.Thread(target=read_all)
    thread.start()
    try:
        yield write_end, lambda: b"".join(chunks).decode().replace("\r\n", "\n")
    finally:
        os.close(write_end)
        thread.join()
        os.close(read_end)
