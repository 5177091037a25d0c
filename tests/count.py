"""Counts what a program asks of a GPU: kernels, floating-point operations, bytes that they move, memory."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from watch import tensors_in

aten = torch.ops.aten
# No kernel: memory is taken, or named.
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
FREE |= {aten.record_stream, aten.set_}
OVERWRITING = {aten.copy_, aten.zero_, aten.fill_, aten.uniform_, aten.normal_}  # they do not read what they write
# A call on lists takes chunks of tensors, so many to a kernel: ATen/native/cuda/MultiTensorApply.cuh.
CHUNK, CHUNKS = 65536, 320


class Operation(NamedTuple):
    """What one operation takes."""

    name: str
    kernels: int
    flop: int
    bytes: int
    operands: str  # what a product takes its operands for: fp32, tf32 or bf16


class Count(TorchDispatchMode):
    """Counts the operations on a GPU, and the bytes of what they make that are alive at once (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.peak = self._live = 0

    def total(self, field: str) -> int:
        """Sum of `kernels`, `flop` or `bytes`."""
        return sum(getattr(operation, field) for operation in self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs an operation, and counts it."""
        kwargs = kwargs or {}
        there = {tensor.untyped_storage()._cdata for tensor in tensors_in(args, kwargs)}
        out = func(*args, **kwargs)
        if _launches(func) and any(tensor.is_cuda for tensor in tensors_in(args, kwargs, out)):
            self.operations.append(_operation(func, args, kwargs, out))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage._cdata not in there:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, nbytes: int) -> None:
        self._live += nbytes
        self.peak = max(self.peak, self._live)


def _launches(func: Any) -> bool:
    """Whether an operation is more than a question about a tensor, or another view of it."""
    is_view = not func._schema.is_mutable and any(value.alias_info for value in func._schema.returns)
    is_view = is_view or torch.Tag.inplace_view in func.tags
    return func.namespace == "aten" and not is_view and func.overloadpacket not in FREE


def _nbytes(*values: Any) -> int:
    """Bytes of tensors on the GPU, as they are in memory: what is expanded counts once."""
    total = 0
    for tensor in tensors_in(values):
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += math.prod(sizes) * tensor.element_size() * tensor.is_cuda
    return total


def _operation(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Operation:
    """What an operation takes: it reads its arguments, and writes its result or the arguments that it changes."""
    op, schema, kernels = func.overloadpacket, func._schema, 1
    moved = 0 if schema.is_mutable else _nbytes(out)
    values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        value = values.get(argument.name)
        # Adam declares that it changes gradients, which it does only where they have been scaled.
        written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        moved += _nbytes(value) * (written + (not written or op not in OVERWRITING))
        if written and isinstance(value, list | tuple):
            chunks = sum(-(-tensor.numel() // CHUNK) for tensor in value)
            kernels = max(kernels, -(-chunks // CHUNKS))
    if op is aten.convolution and args[2] is not None:
        kernels, moved = 2, moved + 2 * _nbytes(out)  # the bias is added afterwards
    elif op is aten.convolution_backward:
        sizes, (of_input, of_weight, of_bias) = [_nbytes(value) for value in args[:3]], args[-1]
        kernels = of_input + of_weight + of_bias
        moved = (of_input + of_weight) * sum(sizes) + of_bias * sizes[0]
    elif op is aten.mse_loss:
        kernels, moved = 2, moved + _nbytes(args)  # squares, then their mean
    elif op is aten.native_layer_norm_backward:
        kernels = 2  # of the input, and of weight and bias
    flop = flop_registry[op](*args, **kwargs, out_val=out) if op in flop_registry else 0
    return Operation(op.__name__, kernels, flop, moved, _operands(op, args) if flop else "fp32")


def _operands(op: Any, args: Any) -> str:
    """What a GPU takes the operands of a product for, by PyTorch's switches."""
    if tensors_in(args)[0].dtype == torch.bfloat16:
        return "bf16"
    backends: Any = torch.backends
    switch = backends.cudnn.conv if op in (aten.convolution, aten.convolution_backward) else backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "fp32"
