"""What all tests share."""

import contextlib
import os
import signal
import sys

import pytest

# Two test processes on two cores: more threads than cores make small networks slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with SIGINT ignored, and so would be the runs that are to hear it here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores


@pytest.fixture(autouse=True)
def order_of_event_files(monkeypatch):
    """TensorBoard reads files of one second in the order of their names, which end in a counter: 10 comes before 9."""
    if writer := sys.modules.get("tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


@pytest.fixture
def gpu():
    """A fake one. Without a GPU it takes a C++ compiler."""
    from fake_gpu import fake_gpu
    from torch._inductor.exc import InvalidCxxCompiler

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(fake_gpu())
        except InvalidCxxCompiler as error:
            pytest.skip(str(error))
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

    calls, compile_ = [], torch.compile

    def backend(module, inputs):
        return lambda *args: calls.append(module) or module(*args)

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend))
    yield calls
    torch._dynamo.reset()
