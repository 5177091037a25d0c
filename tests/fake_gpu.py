"""A GPU that is not there: tensors on "cuda" that have shapes, but no memory.

A program runs on it as on a real one, and what mixes devices raises. What kernels compute, races between streams, and
what allocator, libraries and driver do, it does not show.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from watch import Watch, tensors_in

aten = torch.ops.aten
# What takes the place of PyTorch's own. A capture is watched; a replay does nothing.
CUDA: dict[str, Any] = {
    **dict.fromkeys(("Stream", "Event", "stream", "device", "CUDAGraph"), lambda *_args, **_kwargs: MagicMock()),
    "graph": lambda *_args, **_kwargs: Watch(capturing=True),
    "graph_pool_handle": lambda: (0, 0),
    "current_stream": lambda _device=None: torch.Stream(stream_id=0, device_index=0, device_type=1),
    "get_rng_state": lambda _device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, _device=None: state.numpy(),  # which must be in host memory
    "is_bf16_supported": lambda **_: True,
    "get_device_name": lambda _device=None: "fake GPU",
    "mem_get_info": lambda _device=None: (80 * 10**9, 80 * 10**9),
    "synchronize": lambda device=None: torch.zeros((), device=device or "cuda").item(),  # a wait that a watch sees
}


class FakeGpu(FakeTensorMode):
    """Makes new tensors fake. What NumPy made stays real, as long as it is in host memory; what is fetched is zero."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: Any) -> FakeGpu:
        return self  # a fake tensor's copy is of the same mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        kwargs, op, inputs = kwargs or {}, func.overloadpacket, tensors_in(args, kwargs)
        if op is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            return 0
        if op is aten.record_stream:
            return None
        if op is aten._pin_memory:
            pinned: Any = args[0].detach()
            pinned.is_fake_pinned = True
            return pinned
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if inputs and not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with no_dispatch():
                return func(*args, **kwargs)
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        return _zeros(out) if op is aten._to_copy and args[0].is_cuda and not out.is_cuda else out


def _zeros(fake: Tensor) -> Tensor:
    with no_dispatch():
        return torch.zeros(fake.shape, dtype=fake.dtype)


def _numpy(fake: Tensor, *, force: bool = False) -> np.ndarray:
    if fake.is_cuda and not force:
        raise TypeError("a tensor on the GPU cannot become an array: copy it to host memory first")
    return _zeros(fake.cpu()).numpy()


def _reduce(fake: Tensor, protocol: Any) -> Any:
    return _zeros(fake).__reduce_ex__(protocol)  # in a file


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Does what nn.Module's own does, which fails on fake parameters that two modules share."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        with torch.no_grad():
            moved: Any = function(tensor)
        tensor.data = moved
        tensor.fake_device = moved.fake_device  # type: ignore[attr-defined]
    return module


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Makes tensors fake, those on "cuda" too. Raises InvalidCxxCompiler without GPU and C++ compiler."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            from torch._inductor.codecache import CppCodeCache  # only here: it is slow to import

            # PyTorch starts a thread for each device at the first of these, and then lets no fork of the process train.
            torch.zeros(1, requires_grad=True).sum().backward()
            # What PyTorch lacks without a GPU, compiled once on a machine.
            shim = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(), needs_vec_isa=False)
            shim.exchange()
            stack.callback(shim.exchange)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # where a parameter is copied
        stack.enter_context(patch.multiple(torch.cuda, **CUDA))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(torch, "set_rng_state", CUDA["set_rng_state"]))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.multiple(FakeTensor, create=True, numpy=_numpy, __reduce_ex__=_reduce))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the GPU has no thread
        stack.enter_context(FakeGpu())
        yield
