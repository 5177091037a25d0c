"""train.py with slow disks: whoever kills it often meets a checkpoint that is half written.

With KILL_AT=N in the environment it kills itself before the Nth thing that it does to the file system.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

fsync = os.fsync


def slow_fsync(descriptor):
    time.sleep(0.02)  # between the last byte and the renaming
    fsync(descriptor)


def deadly(function):
    def call(*args, **kwargs):
        if not any(str(arg).startswith(("/dev", "/proc")) for arg in args):
            deadly.left -= 1
            if deadly.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


deadly.left = int(os.environ.get("KILL_AT", 0))

if __name__ == "__main__":
    os.fsync = slow_fsync
    if deadly.left:
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "truncate"):
            setattr(os, name, deadly(getattr(os, name)))
    sys.exit(train.main())
