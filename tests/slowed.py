"""train.py with slow disks: whoever kills it often meets a checkpoint that is half written."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

fsync = os.fsync


def slow_fsync(descriptor):
    time.sleep(0.02)  # between the last byte and the renaming
    fsync(descriptor)


if __name__ == "__main__":
    os.fsync = slow_fsync
    sys.exit(train.main())
