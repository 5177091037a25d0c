"""What all tests share."""

import os

# Two test processes on two cores: more threads than cores make small networks slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")
