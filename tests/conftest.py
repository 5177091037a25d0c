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
    from fake_gpu import fake_gpu

    from errors import UserError

    try:
        with fake_gpu():
            pass
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def gpu(compiler):
    """A fake one."""
    from fake_gpu import fake_gpu

    with fake_gpu():
        yield


@pytest.fixture
def recorded(monkeypatch):
    """CUDA graphs are recordings, made at the second call; the class of recordings, which counts them."""
    from recorded_graph import RecordedGraph

    from support import cuda_graph

    monkeypatch.setattr(cuda_graph, "Capture", RecordedGraph)
    monkeypatch.setattr(cuda_graph, "WARMUP", 1)
    monkeypatch.setattr(RecordedGraph, "made", 0)
    return RecordedGraph


@pytest.fixture
def compiled(monkeypatch):
    """Compiled code calls PyTorch's own operations, which recordings and watches see. A list grows at each call."""
    import torch

    calls, compile_, aot_eager = [], torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(module, inputs):
        run = aot_eager(module, inputs)
        return lambda *args: calls.append(run) or run(*args)

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend))
    yield calls
    torch._dynamo.reset()
