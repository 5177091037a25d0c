"""A GPU that is not there: tensors on "cuda" that have shapes, but no memory.

A program runs on it as on a real one, and what mixes devices raises. What kernels compute, races between streams, and
what allocator, libraries and driver do, it does not show.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from errors import MachineError
from support.watch import Watch

aten = torch.ops.aten
# What takes the place of PyTorch's own. A capture is watched; a replay does nothing.
CUDA: dict[str, Any] = {
    **dict.fromkeys(("Stream", "Event", "stream", "device", "CUDAGraph"), MagicMock),
    "graph": lambda *_args, **_kwargs: Watch(capturing=True),
    "graph_pool_handle": lambda: (0, 0),
    "current_stream": lambda _device=None: torch.Stream(stream_id=0, device_index=0, device_type=1),
    "get_rng_state": lambda _device=None: torch.get_rng_state(),
    "set_rng_state": lambda _state, _device=None: None,
    "is_bf16_supported": lambda **_: True,
}


class FakeGpu(FakeTensorMode):
    """Makes tensors fake: new ones, and real ones where they are used. A copy to host memory is real: zeros."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: Any) -> FakeGpu:
        return self  # a fake tensor's copy is of the same mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        if func is aten._pin_memory.default:
            func = aten.clone.default
        out: Any = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func is aten._to_copy.default and args[0].is_cuda and not out.is_cuda:
            with no_dispatch():
                return torch.zeros(out.shape, dtype=out.dtype)
        return out


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
    """Makes tensors fake, those on "cuda" too. Raises MachineError if that takes a C++ compiler and there is none."""
    with ExitStack() as stack:
        if not torch.backends.cuda.is_built():
            shim = _shim()
            shim.exchange()
            stack.callback(shim.exchange)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # where a parameter is copied
        stack.enter_context(patch.multiple(torch.cuda, **CUDA))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the GPU has no thread
        stack.enter_context(FakeGpu())
        yield


def _shim() -> ctypes.CDLL:
    """What a build of PyTorch without CUDA lacks: `fake_gpu.cpp`, compiled once on a machine."""
    from torch.utils.cpp_extension import get_default_build_root  # only here: it is slow to import

    source = Path(__file__).with_suffix(".cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(get_default_build_root(), f"fake_gpu_{digest}.so")
    if not library.exists():
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(compiler[0]) is None:
            raise MachineError(f"a fake GPU takes a C++ compiler, and {compiler[0]} is not there: install g++")
        library.parent.mkdir(parents=True, exist_ok=True)
        torch_dir, temporary = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_dir}/include", f"-L{torch_dir}/lib"]
        subprocess.run([*compiler, *flags, str(source), "-lc10", "-ltorch_cpu", "-o", str(temporary)], check=True)
        temporary.replace(library)
    return ctypes.CDLL(str(library))
