"""Copies from host memory to a GPU, which wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device.

    From pinned memory a copy is queued at once; from other memory it may wait for all kernels before it. PyTorch keeps
    the pinned memory until the copy is made. https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
