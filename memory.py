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
    return min(int(psutil.virtual_memory().available), *(_group_free(group) for group in control_groups()))


def control_groups(listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Folders of the groups that limit the process's memory, its own and those above it, of cgroup v2 and v1."""
    groups: list[Path] = [root]
    try:
        lines = listing.read_text().splitlines()
    except OSError:  # no Linux
        return groups
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            own = root / controllers / path.lstrip("/")
            groups += [group for group in (own, *own.parents) if group.is_relative_to(root)]
    return groups


def _group_free(group: Path) -> int:
    """What a group leaves free; file pages that the kernel would give up first count as free.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html
    """
    for limit, used, pages in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = int((group / limit).read_text()) - int((group / used).read_text())
            return free + int(statistics.get(pages, 0))
        except (OSError, ValueError):  # not of this version, or its limit is `max`
            continue
    return 2**63


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
    if requested == "cuda" and device.type != "cuda":
        raise ValueError(f"replay_device cuda needs a GPU for the networks too, but device is {device}")
    fits: dict[torch.device, int] = {}  # the largest capacity, by place
    if requested != "cpu" and device.type == "cuda":
        # All of the reserve, however small the replay: the networks need as much beside it.
        fits[device] = largest_capacity(free_gpu_bytes(device) - GPU_RESERVE, 0, obs_shape, action_shape)
    if requested != "cuda":
        fits[torch.device("cpu")] = largest_capacity(free_host_bytes(), HOST_RESERVE, obs_shape, action_shape)
    for place, largest in fits.items():
        if capacity <= largest:
            return place
    places = " or ".join("host memory" if place.type == "cpu" else str(place) for place in fits)
    raise ValueError(
        f"the replay takes {replay_bytes(obs_shape, action_shape, capacity) / 1e9:.2f} GB for {capacity:,} "
        f"transitions, more than can be had of {places}: the largest --replay_buffer_capacity that fits is "
        f"{max(fits.values())}"
    )


def largest_capacity(free: int, reserve: int, obs_shape: tuple[int, ...], action_shape: tuple[int, ...]) -> int:
    """Transitions whose replay leaves the reserve free, or, if it is small itself, a tenth of its own size."""
    fits = 0
    for bit in reversed(range(50)):  # the largest, bit by bit
        needed = replay_bytes(obs_shape, action_shape, fits + (1 << bit))
        if needed + min(reserve, needed // 10) <= free:
            fits += 1 << bit
    return fits
