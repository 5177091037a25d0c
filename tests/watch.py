"""Sees where a program waits for a GPU, real or fake, and what a CUDA graph cannot hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The host must know the result of these, or its shape.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
WAITING |= {aten.unique_dim, aten.repeat_interleave, aten.bincount}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class WaitsError(Exception):
    """Something waits for the GPU."""


class NotCapturableError(Exception):
    """A CUDA graph cannot hold this: it would happen once, at the capture, and at no replay."""


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in lists and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):
    """Raises where an operation waits for the GPU.

    Args:
        waits: how many waits are allowed.
        capturing: whether it also raises on what a CUDA graph cannot hold.
    """

    def __init__(self, waits: int = 0, capturing: bool = False):
        super().__init__()
        self.waits, self.capturing = waits, capturing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and checks it."""
        kwargs = kwargs or {}
        op, on_gpu = func.overloadpacket, any(tensor.is_cuda for tensor in tensors_in(args, kwargs))
        if on_gpu and op in WAITING:
            self._wait(f"{func} fetches from the GPU")
        if on_gpu and op in INDEXING:
            indices = tensors_in(args[1])
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._wait(f"{func} counts a mask")
            if not all(index.is_cuda for index in indices):
                self._wait(f"{func} has indices in host memory")
        if op is aten._fused_adam_:
            _check_layouts(*args[:4])
        out = func(*args, **kwargs)
        if op in (aten._to_copy, aten.copy_):
            source, target = (args[0], out) if op is aten._to_copy else (args[1], args[0])
            self._copy(func, source, target, kwargs.get("non_blocking") or args[2:3] == (True,))
        elif self.capturing and not on_gpu and not all(tensor.is_cuda for tensor in tensors_in(out)):
            raise NotCapturableError(f"{func} makes a tensor in host memory")
        return out

    def _copy(self, func: Any, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if self.capturing and not source.is_cuda:
            raise NotCapturableError(f"{func} copies from host memory")
        if source.is_cuda and not target.is_cuda:
            self._wait(f"{func} copies to host memory")
        elif target.is_cuda and not source.is_cuda and not (non_blocking and _is_pinned(source)):
            self._wait(f"{func} copies from host memory, not pinned or without non_blocking")

    def _wait(self, reason: str) -> None:
        self.waits -= 1
        if self.waits < 0:
            raise WaitsError(reason)


def _is_pinned(tensor: Tensor) -> bool:
    """Whether a host tensor lies in pinned memory. A fake GPU's tensors are marked."""
    return hasattr(tensor, "is_fake_pinned") or (torch.cuda.is_available() and tensor.is_pinned())


def _check_layouts(*lists: list[Tensor]) -> None:
    """What the kernel of the fused Adam asks of parameters, gradients and moments."""

    def layout(tensor: Tensor) -> Any:
        strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        return tensor.shape, strides, tensor.dtype, tensor.device

    for tensors in zip(*lists, strict=True):
        if any(layout(tensor) != layout(tensors[0]) for tensor in tensors):
            raise RuntimeError("fused Adam: a parameter, its gradient and its moments differ in layout, type or device")
