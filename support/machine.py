"""What a machine has: devices, bfloat16, a compiler, ffmpeg. Each check raises UserError, which says what to do."""

from __future__ import annotations

import os
import timeit
import warnings

import torch
import torch.nn.functional as F

from errors import UserError


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(name: str) -> None:
    """Refuses a device on which networks cannot be put."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError("neither cpu nor cuda")
        torch.zeros(1, device=name)
    except (ValueError, RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        cause = (f"{error}".splitlines() or [type(error).__name__])[0]
        raise UserError(f"there is no device {name} here; choose {' or '.join(there)} ({cause})") from error


def check_bf16(device: torch.device, filters: int, hidden_dim: int) -> None:
    """Refuses bfloat16 where it is slower than float32: asked of a GPU, measured on a CPU.

    `filters` are the channels of the convolutions, 0 if there are none; `hidden_dim` units are in hidden layers.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if not supported:
            name = torch.cuda.get_device_name(device)
            raise UserError(f"precision bf16 is slow on this GPU ({name}), which only emulates it: leave it out")
        return
    ratio = bf16_ratio(filters, hidden_dim)
    if ratio > 1:
        raise UserError(
            f"precision bf16 takes {ratio:.1f} times as long as fp32 on this processor, which lacks the instructions "
            "for it (AMX or AVX512-BF16): leave it out"
        )


def bf16_ratio(filters: int, hidden_dim: int) -> float:
    """How many times as long bfloat16 takes as float32: a convolution and a matrix product, on one core of the CPU.

    The sizes are a run's, but with few rows and at most the defaults, so that it takes less than a second on processors
    that need ten times as long.
    """
    filters, hidden_dim = min(filters, 32), min(hidden_dim, 1024)
    threads = torch.get_num_threads()

    def seconds(dtype: torch.dtype) -> float:
        image, kernel = torch.ones(2, filters, 41, 41, dtype=dtype), torch.ones(filters, filters, 3, 3, dtype=dtype)
        rows, weight = torch.ones(32, hidden_dim, dtype=dtype), torch.ones(hidden_dim, hidden_dim, dtype=dtype)

        def compute() -> None:
            if filters:
                F.conv2d(image, kernel)
            F.linear(rows, weight)

        return min(timeit.repeat(compute, number=1, repeat=3))  # the first one warms up

    torch.set_num_threads(1)  # on a busy machine two threads measure how long they wait for each other
    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def check_compiler(device: str) -> None:
    """Refuses torch.compile where it does not work; the first time that takes half a minute."""
    needs = "a C++ compiler (g++, or what CXX names), Python's headers (python3-dev), a TMPDIR without spaces"
    try:
        with warnings.catch_warnings(action="ignore"):  # about what is refused anyway
            torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, by compiler and system
        lines = str(error).partition("Output:\n")[2] or str(error) or type(error).__name__
        raise UserError(f"compile does not work here: {lines.strip().splitlines()[0]}; it needs {needs}") from error


def check_ffmpeg(flag: str) -> None:
    """Refuses videos, which `flag` asks for, if they cannot be encoded."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{flag} needs ffmpeg: pip install imageio[ffmpeg]") from error
