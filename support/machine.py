"""What a machine has: devices, memory, bfloat16, a compiler, ffmpeg. If it lacks some, UserError says what to do."""

from __future__ import annotations

import argparse
import math
import os
import timeit
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from errors import UserError
from frame_stack import frame_channels
from replay_buffer import ReplayBuffer, replay_bytes
from support.prefetch import Prefetched

# Kept free beside the replay: on a GPU for CUDA, the libraries' workspaces and the optimisers' moments.
GPU_RESERVE = 2 * 10**9
HOST_RESERVE = 2 * 10**9


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(name: str) -> None:
    """Refuses a device that is not there, or does not work: its driver is too old, or the build lacks its kernels."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError("neither cpu nor cuda")
        torch.zeros(1, device=name).add_(1).item()  # launches a kernel, and waits for it
    except (ValueError, RuntimeError, AssertionError) as error:
        mine = name if ":" in name else f"{name}:0"
        others = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()) if f"cuda:{index}" != mine)]
        cause = (f"{error}".splitlines() or [type(error).__name__])[0]
        raise UserError(f"device {name} cannot be used ({cause}); choose {' or '.join(others)}") from error


def check_bf16(device: torch.device, filters: int, hidden_dim: int) -> None:
    """Refuses bfloat16 where it is slower than float32: asked of a GPU, measured on a CPU.

    `filters` are the channels of the convolutions, 0 if there are none; `hidden_dim` units are in hidden layers.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                name = torch.cuda.get_device_name(device)
                raise UserError(f"precision bf16 is slow on this GPU ({name}), which only emulates it: leave it out")
    elif (ratio := bf16_ratio(filters, hidden_dim)) > 1:
        raise UserError(
            f"precision bf16 takes {ratio:.1f} times as long as fp32 on this processor, which lacks the instructions "
            "for it (AMX or AVX512-BF16): leave it out"
        )


def bf16_ratio(filters: int, hidden_dim: int) -> float:
    """How many times as long bfloat16 takes as float32: a convolution and a matrix product, on one core of the CPU.

    The sizes are a run's, but with few rows and at most the defaults, so that it takes less than a second on processors
    that need ten times as long.
    """
    filters, units = min(filters, 32), min(hidden_dim, 1024)
    shapes = ((2, filters, 41, 41), (filters, filters, 3, 3), (32, units), (units, units))

    def seconds(dtype: torch.dtype) -> float:
        image, kernel, rows, weight = (torch.ones(shape, dtype=dtype) for shape in shapes)
        layers = [lambda: F.linear(rows, weight), *([lambda: F.conv2d(image, kernel)] if filters else [])]
        return min(timeit.repeat(lambda: [layer() for layer in layers], number=1, repeat=3))  # the first one warms up

    threads = torch.get_num_threads()
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


def free_host_bytes(listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still take: what is available, or what its control group (v2) leaves.

    File pages that the kernel would give up first count as free.
    https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    free = int(psutil.virtual_memory().available)
    lines = listing.read_text().splitlines() if listing.exists() else []
    own = next((root / line[4:] for line in lines if line.startswith("0::/")), root)
    for group in (own, *own.parents):
        try:
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
            left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
            free = min(free, left + int(pages))
        except (OSError, ValueError, KeyError):  # no such group, or it has no limit
            continue
    return free


def free_gpu_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, other processes counted."""
    return torch.cuda.mem_get_info(device)[0]


def update_bytes(batch_size: int, obs_shape: tuple[int, ...], num_layers: int, num_filters: int) -> int:
    """Bytes of a GPU that CUDA graphs of updates take, at most; few for states.

    An update holds about one value of float32 for each pixel, layer and filter (`bench.py count`). Graphs of four kinds
    share memory, but each may find it in other pieces.
    """
    return 4 * 4 * batch_size * math.prod(obs_shape[1:]) * num_layers * num_filters if len(obs_shape) == 3 else 0


def place_replay(
    requested: str,
    device: torch.device,
    obs_shape: tuple[int, ...],
    action_shape: tuple[int, ...],
    capacity: int,
    frame_channels: int = 3,
    update_bytes: int = 0,
) -> torch.device:
    """The device for a replay's frames. Raises UserError if it does not fit; the message names a capacity that would.

    Args:
        requested: `cuda`, `cpu`, or `auto`: the GPU if `device`, of the networks, is one and the frames fit there, else
            host memory.
        device, obs_shape, action_shape, capacity, frame_channels: of the replay.
        update_bytes: what an update takes on a GPU.
    """
    if requested == "cuda" and device.type != "cuda":
        raise UserError(f"replay_device cuda needs a GPU for the networks too, but device is {device}")
    needed = replay_bytes(obs_shape, action_shape, capacity, frame_channels)
    room: dict[str, int] = {}
    if requested != "cpu" and device.type == "cuda":
        # All of the reserve, however small the replay: the networks need as much beside it.
        room[str(device)] = free_gpu_bytes(device) - GPU_RESERVE - update_bytes
    if requested != "cuda":
        room["cpu"] = free_host_bytes() - min(HOST_RESERVE, needed // 10)
    for place, free in room.items():
        if needed <= free:
            return torch.device(place)
    places = " or ".join("host memory" if place == "cpu" else place for place in room)
    # Slightly less than would fit: its bytes are nearly, not exactly, proportional to its capacity.
    fits = max(0, int(0.99 * capacity * max(room.values()) / needed))
    raise UserError(
        f"the replay takes {needed / 1e9:.2f} GB for {capacity:,} transitions, more than can be had of {places}: "
        f"--replay_buffer_capacity {fits} fits"
    )


def make_replay(args: argparse.Namespace, env: Any, device: torch.device) -> Any:
    """A run's replay, where it fits; one in host memory prefetches for a GPU. Raises UserError if it does not fit."""
    capacity = min(args.replay_buffer_capacity, args.num_train_steps)
    shapes, channels = (env.observation_space.shape, env.action_space.shape), frame_channels(env)
    reserve = update_bytes(args.batch_size, env.observation_space.shape, args.num_layers, args.num_filters)
    place = place_replay(args.replay_device, device, *shapes, capacity, channels, reserve)
    replay = ReplayBuffer(*shapes, capacity, args.batch_size, device, args.seed, channels, place)
    return replay if place.type == device.type else Prefetched(replay)
