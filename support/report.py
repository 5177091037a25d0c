"""What a program prints: what it works with, progress bars, warnings, errors; and how it was started."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from errors import UserError
from support.machine import cores
from support.published import REPEATS
from support.signals import silence


def show(line: str) -> None:
    """Prints a line on stdout. Raises UserError if that is a pipe without a reader, or a full disk."""
    try:
        print(line, flush=True)
    except OSError as error:
        silence(sys.stdout.fileno())  # or Python fails once more at exit
        raise UserError(str(error)) from error


def say(line: str) -> None:
    """Prints a line on stderr, above a progress bar if there is one."""
    with suppress(OSError):  # where nobody can read it
        tqdm.write(line, file=sys.stderr)


def warn_of_divergence(where: str, error: str) -> None:
    """Says that an episode has ended because its simulation diverged."""
    say(f"warning: the simulation diverged at {where}, which ends the episode: {error}")


# `progress_bar(items, name)`: a bar on stderr if that is a terminal; it is gone before a line is printed.
progress_bar = partial(tqdm, leave=False, disable=None)


def in_bytes(number: int) -> str:
    """A number of bytes as GB or MB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def describe(run: Any, renderer: tuple[str, bool] | None) -> Iterator[str]:
    """Yields the lines that an open `support.checkpoint.Run` prints before it trains.

    `renderer` is its name, and whether it is software on the CPU; None if the task is not the Control Suite's.
    """
    args, progress, replay, device, env = run.args, run.progress, run.replay, run.agent.device, run.env
    repeat = REPEATS.get((args.domain_name, args.task_name), args.action_repeat)
    if args.action_repeat != repeat and renderer is not None:
        yield f"note: the published results on this task have --action_repeat {repeat}, not {args.action_repeat}"
    yield f"device: {device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{cores()} cores'})"
    if renderer is not None:
        yield f"renderer: {renderer[0]}"
        if renderer[1]:
            yield "warning: this renderer is software on the CPU, about 25 ms a frame; a GPU needs its EGL driver"
    yield f"observation: {env.observation_space.shape} {env.observation_space.dtype}"
    yield f"action: {env.action_space.shape}"
    place = "in host memory" if replay.frames.device.type == "cpu" else f"on {replay.frames.device}"
    size, folder = in_bytes(replay.nbytes), run.checkpoint_dir
    yield f"replay: {size} {place} for {replay.capacity:,} transitions"
    free = shutil.disk_usage(folder).free
    yield f"checkpoints: up to {size} in {folder}, {in_bytes(free)} free"
    if args.save_buffer:
        yield f"saved replay: up to {size} more in {run.work_dir / 'buffer'}"
    if free < replay.nbytes * (2 if args.save_buffer else 1):
        yield "warning: the disk may be full before the run ends; if so, free space, then --resume continues"
    for name, network in run.agent.networks.items():
        if name != "critic_target":
            yield f"{name}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters"
    if args.freeze_encoder and run.agent.decoder is not None:
        yield "note: the decoder will not train either, because the encoder is frozen"
    if progress.step:
        yield f"after {progress.step:,} of {args.num_train_steps:,}; evaluation at {progress.next_evaluation:,}"
    elif args.num_train_steps <= args.init_steps:
        yield "note: nothing will be learned: num_train_steps does not exceed init_steps"
    else:
        yield f"first an evaluation, {args.init_steps:,} random decisions, then as many updates at once"


def provenance(device: torch.device) -> dict[str, Any]:
    """When, where and by what a run on this device is started."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Of this program's own repository, not of one around it.
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no clone
        commit = subprocess.run(git, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "commit": commit,
        "machine": f"{platform.platform()}, {cores()} cores",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for name in ("numpy", "dm_control", "mujoco", "gym"):
        with suppress(importlib.metadata.PackageNotFoundError):  # an environment of one's own may do without
            start[name] = importlib.metadata.version(name)
    return start


@contextmanager
def one_line(fail: Callable[[str], Any], gpu_advice: str = "") -> Iterator[None]:
    """Hands the message of a user's mistake, or of what the machine lacks, to `fail`, and continues after the block.

    `gpu_advice` is added if a GPU's memory is full. Any other exception is a bug and passes, with its traceback.
    """
    try:
        yield
    except (UserError, MemoryError) as error:
        fail(str(error) or "out of memory")
    except torch.OutOfMemoryError as error:
        fail(f"{error}{gpu_advice}")
    except RuntimeError as error:
        too_large = "DefaultCPUAllocator" in str(error) or "Storage size calculation overflowed" in str(error)
        if type(error) is not RuntimeError or not too_large:
            raise
        fail(str(error))
