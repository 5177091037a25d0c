"""What a run needs: a device, memory, a compiler, an environment. If it lacks one, UserError says what to do."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from errors import UserError
from randomness import random_action
from replay_buffer import ReplayBuffer, replay_bytes
from support.prefetch import Prefetched
from utils import frame_channels

RESERVE = 2 * 10**9  # bytes kept free beside the replay; on a GPU for CUDA, libraries' workspaces, optimisers' moments
LISTING, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group, v2 and v1: limit of memory, use of it, and the file pages that the kernel would give up first.
MEMORY_FILES = [("memory.max", "memory.current", "inactive_file")]
MEMORY_FILES += [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
# Microseconds of processor time in each period, and the period.
QUOTA_FILES = [("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")]


def control_groups(controller: str, listing: Path = LISTING, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the control groups (v2 and v1) that may limit this process, where there are any.

    https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            own = (root / controller if controllers else root) / path.lstrip("/")
            yield from (own, *own.parents)  # in a container, the group may be the root that is mounted


def cores(listing: Path = LISTING, root: Path = ROOT) -> int:
    """Cores that this process may use at a time, or what a quota of processor time comes to."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group, names in itertools.product(control_groups("cpu", listing, root), QUOTA_FILES):
        with suppress(OSError, ValueError):  # no such group, or it has no quota
            quota, period = (int(number) for name in names for number in (group / name).read_text().split())
            found = min(found, math.ceil(quota / period)) if quota > 0 else found
    return found


def limit_threads() -> None:
    """Lets PyTorch have no more threads than `cores`: it does not know of quotas. OMP_NUM_THREADS comes first."""
    if "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


def check_device(name: str) -> None:
    """Refuses a device that is not there, or does not work: its driver is too old, or the build lacks its kernels."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError("neither cpu nor cuda")
        torch.zeros(1, device=name).add_(1).item()  # launches a kernel, and waits for it
    except (ValueError, RuntimeError, AssertionError) as error:
        cause = f"{error}".partition("\n")[0] or type(error).__name__
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UserError(f"device {name} cannot be used ({cause}); this machine has {', '.join(devices)}") from error


def check_bf16(device: torch.device | str) -> None:
    """Refuses bfloat16 where it is slower than float32, because the device only emulates it."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if not fast:
        raise UserError(f"precision bf16 is slow on {device}, which only emulates it: leave it out")


def check_compiler() -> None:
    """Refuses torch.compile where there is no C++ compiler: what CXX names, else PyTorch's choice."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"compile needs a C++ compiler, but there is no {compiler}: install one, or name it in CXX")


def try_out(env: Any, args: argparse.Namespace) -> None:
    """Plays the first decisions: what fails there must fail before anything is written.

    Raises UserError if the agent cannot learn there, or if videos are wanted of an environment that cannot draw.
    """
    shape: tuple[int, ...] = env.observation_space.shape or ()
    dtype, actions = env.observation_space.dtype, env.action_space
    if len(shape) not in (1, 3) or (len(shape) == 3 and dtype != np.uint8):
        raise UserError(f"observations must be states (D,) or uint8 pixels (C, H, W), not {dtype} of shape {shape}")
    if len(shape) == 3 and shape[2] < min(shape[:2]) and (shape[2] % 3 == 0 or shape[2] in (1, 4)):
        raise UserError(f"observations of shape {shape} look like (H, W, C): put channels first, (C, H, W)")
    box = len(actions.shape or ()) == 1 and hasattr(actions, "low")
    if not box or (actions.low != -1).any() or (actions.high != 1).any():
        raise UserError(f"actions must be a Box (A,) from -1 to 1, not {actions}: rescale them in a wrapper")
    channels, (obs, _) = frame_channels(env), env.reset(seed=args.seed)
    for step in range(3):
        before = obs.copy()
        next_obs, _, terminated, truncated, _ = env.step(random_action(actions, args.seed, step))
        if not obs.shape == next_obs.shape == shape:
            raise UserError(f"observations must have the shape of their space, {shape}, not {next_obs.shape}")
        if not np.array_equal(obs, before, equal_nan=True):
            raise UserError("observations must be new arrays, but step changes the one before")
        if len(shape) == 3 and not np.array_equal(next_obs[:-channels], obs[channels:]):
            raise UserError(
                "an observation must be the one before without its oldest frame, and a new frame: "
                "stack frames by FrameStack, in the outermost wrapper"
            )
        if terminated or truncated:
            break
        obs = next_obs
    if args.save_video or (args.save_tb and args.encoder_type == "pixel"):
        picture: Any = None
        with suppress(NotImplementedError):
            picture = env.render()
        if np.shape(picture)[2:] != (3,):
            raise UserError("the environment's render() gives no picture (H, W, 3): videos cannot be made of it")


def free_host_bytes(listing: Path = LISTING, root: Path = ROOT) -> int:
    """Memory that this process may still take: what is available, or what its control groups leave."""
    free = psutil.virtual_memory().available
    for group, names in itertools.product(control_groups("memory", listing, root), MEMORY_FILES):
        with suppress(OSError, ValueError, KeyError):  # no such group, or it has no limit
            limit, used = (int((group / name).read_text()) for name in names[:2])
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[names[2]]
            free = min(free, limit - used + int(pages))
    return free


def update_bytes(batch_size: int, obs_shape: tuple[int, ...], num_layers: int, num_filters: int) -> int:
    """Bytes of a GPU that CUDA graphs of updates take, at most; few for states.

    An update holds about one value of float32 for each pixel, layer and filter. Graphs of four kinds
    share memory, but each may find it in other pieces.
    """
    return 4 * 4 * batch_size * math.prod(obs_shape[1:]) * num_layers * num_filters if len(obs_shape) == 3 else 0


def make_replay(args: argparse.Namespace, env: Any, device: torch.device) -> Any:
    """A run's replay, on the GPU or in host memory, from where it prefetches for a GPU.

    `device` is that of the networks. Raises UserError if the replay does not fit; the message names a capacity that
    would.
    """
    if args.replay_device == "cuda" and device.type != "cuda":
        raise UserError(f"replay_device cuda needs a GPU for the networks too, but device is {device}")
    obs_shape, action_shape, channels = env.observation_space.shape, env.action_space.shape, frame_channels(env)
    capacity = min(args.replay_buffer_capacity, args.num_train_steps)
    needed = replay_bytes(obs_shape, action_shape, capacity, channels)
    room: dict[str, int] = {}  # bytes, by device; the first that has enough is taken
    if args.replay_device != "cpu" and device.type == "cuda":
        # All of the reserve, however small the replay: the networks need as much beside it.
        reserve = RESERVE + update_bytes(args.batch_size, obs_shape, args.num_layers, args.num_filters)
        room[str(device)] = torch.cuda.mem_get_info(device)[0] - reserve
    if args.replay_device != "cuda":
        room["cpu"] = free_host_bytes() - min(RESERVE, needed // 10)
    place = next((torch.device(name) for name, free in room.items() if needed <= free), None)
    if place is None:
        places = " or ".join("host memory" if name == "cpu" else name for name in room)
        # Slightly less than would fit: its bytes are nearly, not exactly, proportional to its capacity.
        fits = max(0, int(0.99 * capacity * max(room.values()) / needed))
        raise UserError(
            f"the replay takes {needed / 1e9:.2f} GB for {capacity:,} transitions, more than can be had of {places}: "
            f"--replay_buffer_capacity {fits} fits"
        )
    replay = ReplayBuffer(obs_shape, action_shape, capacity, args.batch_size, device, args.seed, channels, place)
    return replay if place.type == device.type else Prefetched(replay)
