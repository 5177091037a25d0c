"""Where the replay fits: on the GPU, in host memory, or nowhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import psutil
import torch

from errors import UserError
from frame_stack import frame_channels
from replay_buffer import ReplayBuffer, replay_bytes
from support.prefetch import Prefetched

# Kept free for networks, activations, optimisers and the libraries' workspaces at the default sizes.
GPU_RESERVE = 4 * 10**9
HOST_RESERVE = 2 * 10**9


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


def place_replay(
    requested: str,
    device: torch.device,
    obs_shape: tuple[int, ...],
    action_shape: tuple[int, ...],
    capacity: int,
    frame_channels: int = 3,
) -> torch.device:
    """The device for a replay's frames. Raises UserError if it does not fit; the message names a capacity that would.

    Args:
        requested: `cuda`, `cpu`, or `auto`: the GPU if `device`, of the networks, is one and the frames fit there, else
            host memory.
        device, obs_shape, action_shape, capacity, frame_channels: of the replay.
    """
    if requested == "cuda" and device.type != "cuda":
        raise UserError(f"replay_device cuda needs a GPU for the networks too, but device is {device}")
    needed = replay_bytes(obs_shape, action_shape, capacity, frame_channels)
    room: dict[str, int] = {}
    if requested != "cpu" and device.type == "cuda":
        # All of the reserve, however small the replay: the networks need as much beside it.
        room[str(device)] = free_gpu_bytes(device) - GPU_RESERVE
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
    place = place_replay(args.replay_device, device, *shapes, capacity, channels)
    replay = ReplayBuffer(*shapes, capacity, args.batch_size, device, args.seed, channels, place)
    return replay if place.type == device.type else Prefetched(replay)
