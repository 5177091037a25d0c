"""What all tests share."""

import os
import signal

import pytest

# Two test processes on two cores: more threads than cores make small networks slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with SIGINT ignored, and so would be the runs that are to hear it here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores


@pytest.fixture
def compiler():
    """What a fake GPU takes on a build of PyTorch without CUDA."""
    from errors import MachineError
    from support.fake_gpu import fake_gpu

    try:
        with fake_gpu():
            pass
    except MachineError as error:
        pytest.skip(str(error))


@pytest.fixture
def gpu(compiler):
    """A fake one."""
    from support.fake_gpu import fake_gpu

    with fake_gpu():
        yield
