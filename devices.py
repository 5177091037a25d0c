"""Copies from host memory to a GPU, which wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor as it is or, for a GPU, its copy in pinned memory.

    From there a `non_blocking` copy is queued at once; from other memory it may wait for all kernels before it. PyTorch
    keeps the pinned memory until the copy is made. https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device."""
    return pinned(tensor, device).to(device, non_blocking=True)
