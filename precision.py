"""How layers compute: float32, TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
    return _products_in("tf32" if precision == "tf32" else "ieee")


@contextmanager
def _products_in(value: str) -> Iterator[None]:
    """Sets PyTorch's switches for products and convolutions on a GPU, and restores them on exit.

    A switch that inherits from the one above it must still inherit afterwards.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    backends: Any = torch.backends
    with ExitStack() as restoring:
        for switch in (backends.cudnn, backends.cuda.matmul, backends.cudnn.conv):
            was = switch.fp32_precision
            if was != value:
                inherited = switch is backends.cudnn and was == backends.fp32_precision
                restoring.callback(setattr, switch, "fp32_precision", "none" if inherited else was)
                switch.fp32_precision = value
        yield


class ExactLinear(nn.Linear):
    """A linear layer that computes in its weights' own precision even under autocast.

    bfloat16 has 8 significant bits: it rounds Q values above 128 to integers, so small rewards would be lost.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not torch.is_autocast_enabled(inputs.device.type):
            return super().forward(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.to(self.weight.dtype))
