"""What a CUDA graph does, on a CPU: it records the operations of a function once, and replays those alone."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from watch import tensors_in


def memory_of(*values):
    """What the tensors lie in, each once."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors_in(values)}


class Recorder(TorchDispatchMode):
    """Runs and records operations, and remembers what the memory held that they change."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or nothing would run compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        inputs = memory_of(args, kwargs)
        if func._schema.is_mutable:
            for key, memory in inputs.items():
                if key not in self.before:
                    self.before[key] = memory, memory.clone()
        out = func(*args, **kwargs)
        if func._schema.is_mutable or memory_of(out).keys() - inputs.keys():  # else it is a view, which stays one
            self.operations.append((func, args, kwargs, tensors_in(out)))
        return out

    def undo(self):
        for memory, content in self.before.values():
            memory.copy_(content)


class RecordedGraph:
    """In place of `cuda_graph.Capture`.

    Each replay writes into the memory of the recording. What Python computed at the capture stays as it was: numbers,
    branches, tensors made of numbers.
    """

    made = 0

    def __init__(self, function, arguments, device, pool):
        type(self).made += 1
        self.arguments = [argument.clone() for argument in arguments]
        random, recorder = torch.get_rng_state(), Recorder()
        try:
            with recorder:
                self.result = function(*self.arguments)
        finally:  # a capture computes nothing
            recorder.undo()
            torch.set_rng_state(random)
        self.operations = recorder.operations

    @torch.no_grad()
    def __call__(self, *arguments):
        for mine, argument in zip(self.arguments, arguments, strict=True):
            assert (mine.shape, mine.dtype) == (argument.shape, argument.dtype)
            mine.copy_(argument)
        for func, args, kwargs, outputs in self.operations:
            for old, new in zip(outputs, tensors_in(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result.clone()
