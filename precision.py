"""How layers compute: float32, TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from settings import Precision


def layers_in(precision: Precision | None, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which layers compute in a precision; None leaves PyTorch's settings as they are."""
    if precision is None:
        return nullcontext()
    if precision == "bf16":
        # Without autocast's cache of cast weights, because weights change within an update.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return _tf32(precision == "tf32")


def layers_dtype(weight: Tensor) -> torch.dtype:
    """The type of the inputs with which a layer of this weight computes now."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Sets whether products and convolutions on a GPU use TF32, and restores PyTorch's switches on exit.

    A switch that inherits from the one above it must still inherit afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    backends: Any = torch.backends
    value = "tf32" if allowed else "ieee"
    before = []
    try:
        for switch in (backends.cudnn, backends.cuda.matmul, backends.cudnn.conv):
            if switch.fp32_precision != value:
                before.append((switch, switch.fp32_precision))
                switch.fp32_precision = value
        yield
    finally:
        for switch, was in reversed(before):
            inherited = switch is backends.cudnn and was == backends.fp32_precision
            switch.fp32_precision = "none" if inherited else was


def run_mlp(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """`layers(inputs)`, with the last layer in the weights' own precision even under autocast.

    bfloat16 has 8 significant bits: it rounds Q values above 128 to integers, so small rewards would be lost.
    """
    if not torch.is_autocast_enabled(inputs.device.type):
        return layers(inputs)
    *hidden, last = layers
    for layer in hidden:
        inputs = layer(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        return last(inputs.to(last.get_parameter("weight").dtype))
