"""What all tests share."""

import os
import signal

# Two test processes on two cores: more threads than cores make small networks slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with SIGINT ignored, and so would be the runs that are to hear it here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
