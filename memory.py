"""Where the replay fits: on the GPU, in host memory, or nowhere."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from replay_buffer import replay_bytes

# Kept free for networks, activations, optimisers and the libraries' workspaces at the default sizes.
GPU_RESERVE = 4 * 10**9
HOST_RESERVE = 2 * 10**9


def free_host_bytes() -> int:
    """Memory that a process may still take: what is available, or what its control group leaves it."""
    free = int(psutil.virtual_memory().available)
    for group in _control_groups():
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                free = min(free, int(limit) - int((group / "memory.current").read_text()))
        except OSError:  # no memory controller here
            continue
    return free


def _control_groups() -> list[Path]:
    """The process's control group and those above it (cgroup v2, docs.kernel.org/admin-guide/cgroup-v2.html)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    paths = [root / line.removeprefix("0::/") for line in lines if line.startswith("0::")]
    return [group for path in paths for group in (path, *path.parents) if group.is_relative_to(root)]


def free_gpu_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, other processes counted."""
    return torch.cuda.mem_get_info(device)[0]


def place_replay(
    requested: str, device: torch.device, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], capacity: int
) -> torch.device:
    """The device for a replay's frames.

    Args:
        requested: `cuda`, `cpu`, or `auto`: the GPU if `device` is one and the frames fit beside the networks, else
            host memory.
        device: where the networks are.
        obs_shape, action_shape, capacity: of the replay.

    Raises:
        ValueError: it does not fit; the message names the largest capacity that would.
    """
    needed = replay_bytes(obs_shape, action_shape, capacity)
    if requested == "cuda" and device.type != "cuda":
        raise ValueError(f"replay_device cuda needs a GPU for the networks too, but device is {device}")
    if requested != "cpu" and device.type == "cuda":
        free = free_gpu_bytes(device) - GPU_RESERVE
        if needed <= free:
            return device
        if requested == "cuda":
            raise ValueError(_too_large(f"on {device}", needed, free, obs_shape, action_shape, capacity))
    free = free_host_bytes() - HOST_RESERVE
    if needed > free:
        raise ValueError(_too_large("in host memory", needed, free, obs_shape, action_shape, capacity))
    return torch.device("cpu")


def _too_large(
    place: str, needed: int, free: int, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], capacity: int
) -> str:
    fits = 0
    for bit in reversed(range(capacity.bit_length())):  # the largest capacity, bit by bit
        if replay_bytes(obs_shape, action_shape, fits + (1 << bit)) <= free:
            fits += 1 << bit
    return (
        f"the replay takes {needed / 1e9:.2f} GB for {capacity:,} transitions, and {max(free, 0) / 1e9:.2f} GB {place} "
        f"can be used: the largest --replay_buffer_capacity that fits is {fits}"
    )
