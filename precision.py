"""Whether bfloat16 is faster than float32 on a machine: asked of a GPU, measured on a CPU."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F


def check_bf16(device: torch.device, filters: int, hidden_dim: int) -> None:
    """Refuses bfloat16 where it is slower than float32.

    Args:
        device: where layers compute.
        filters: channels of the convolutions; 0 if there are none.
        hidden_dim: units of the hidden layers.

    Raises:
        ValueError: it is slower; the message says how much, and which instructions are missing.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"precision bf16 is slow on this GPU ({name}), which only emulates it: leave it out")
        return
    ratio = bf16_ratio(filters, hidden_dim)
    if ratio > 1:
        raise ValueError(
            f"precision bf16 takes {ratio:.1f} times as long as fp32 on this processor, which lacks the instructions "
            "for it (AMX or AVX512-BF16): leave it out"
        )


def bf16_ratio(filters: int, hidden_dim: int) -> float:
    """How many times as long bfloat16 takes as float32: a convolution and a matrix product, on one core of the CPU.

    The sizes are a run's, but with few rows and not above the defaults, so that it takes less than a second on
    processors that need ten times as long.
    """
    filters, hidden_dim = min(filters, 32), min(hidden_dim, 1024)
    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two threads measure how long they wait for each other
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            image, kernel = torch.randn(2, filters, 41, 41), torch.randn(filters, filters, 3, 3)
            rows, weight = torch.randn(32, hidden_dim), torch.randn(hidden_dim, hidden_dim)
            for dtype in seconds:
                tensors = [tensor.to(dtype) for tensor in (image, kernel, rows, weight)]
                seconds[dtype] = min(_seconds(*tensors) for _ in range(3))  # the first one warms up
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds(image: torch.Tensor, kernel: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    if len(kernel):
        F.conv2d(image, kernel)
    F.linear(rows, weight)
    return time.perf_counter() - start
