"""Speed, beside the plain way of doing the same, measured in one run: `python bench.py replay`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from utils import ReplayBuffer

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from plain import PlainReplay  # the tests' plain form of everything

OBS_SHAPE, ACTION_SHAPE, BATCH_SIZE = (9, 84, 84), (6,), 128
EPISODE_LENGTH = 250  # decisions, at an action repeat of 4


def transitions(count: int) -> Iterator[tuple[np.ndarray, np.ndarray, float, np.ndarray, bool]]:
    """Episodes of random pictures, stacked in threes as the training loop stacks them."""
    rng = np.random.default_rng(0)
    for index in range(count):
        if index % EPISODE_LENGTH == 0:
            stack = [rng.integers(0, 256, (3, 84, 84), dtype=np.uint8)] * 3
        following = [*stack[1:], rng.integers(0, 256, (3, 84, 84), dtype=np.uint8)]
        yield np.concatenate(stack), rng.uniform(-1, 1, 6), 0.5, np.concatenate(following), False
        stack = following


def microseconds(call: Callable[[], Any]) -> float:
    """Time of a call, with all that it started on a GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def spread(values: list[float]) -> str:
    """Median, and the middle half of the values."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def bench_replay(capacity: int, batches: int) -> None:
    """Prints microseconds for an `add` and for a batch, of the replay wherever it can lie and of naive storage."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = (OBS_SHAPE, ACTION_SHAPE, capacity, BATCH_SIZE, device)
    storages: dict[str, Any] = {}
    if device.type == "cuda":
        storages["each frame once, on the GPU"] = ReplayBuffer(*args, frames_device=device)
        storages["each frame once, pinned host memory, prefetched"] = ReplayBuffer(*args)
    else:
        storages["each frame once, host memory"] = ReplayBuffer(*args)
    storages["naive: both stacks of every transition, host memory"] = PlainReplay(*args)

    adds: dict[str, list[float]] = {name: [] for name in storages}
    for transition in transitions(capacity):
        for name, storage in storages.items():
            adds[name].append(microseconds(lambda: storage.add(*transition)))  # noqa: B023  # called at once
    samples: dict[str, list[float]] = {name: [] for name in storages}
    for _ in range(batches):
        for name, storage in storages.items():
            samples[name].append(microseconds(lambda: storage.sample()))  # noqa: B023

    print(f"{capacity:,} transitions of {OBS_SHAPE}, batches of {BATCH_SIZE} to {device_name(device)}")
    print("median (and middle half) of microseconds\n")
    print("| replay | bytes | of naive | per add | per batch | of naive |\n|---|---|---|---|---|---|")
    *_, naive = storages
    for name, storage in storages.items():
        size, batch = storage.nbytes / storages[naive].nbytes, np.median(samples[name]) / np.median(samples[naive])
        times = f"{spread(adds[name])} | {spread(samples[name])} | {batch:.2f}"
        print(f"| {name} | {storage.nbytes:,} | {size:.3f} | {times} |")


def bench_fill(capacity: int) -> None:
    """Fills a replay in host memory and prints what the whole process then takes."""
    before = psutil.Process().memory_info().rss
    replay = ReplayBuffer(OBS_SHAPE, ACTION_SHAPE, capacity, BATCH_SIZE, "cpu")
    allocated = psutil.Process().memory_info().rss
    for transition in transitions(capacity):
        replay.add(*transition)
    filled = psutil.Process().memory_info().rss
    print(f"{len(replay):,} transitions of {OBS_SHAPE} stored; the buffer counts {replay.nbytes / 1e9:.3f} GB")
    print(f"resident: {before / 1e9:.3f} GB before, {allocated / 1e9:.3f} GB allocated, {filled / 1e9:.3f} GB filled")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads on the CPU."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser("replay", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    replay.add_argument("--capacity", type=int, default=10_000, help="transitions")
    replay.add_argument("--batches", type=int, default=200, help="samples of each kind")
    replay.add_argument("--fill", action="store_true", help="only fill it, and print the memory it takes")
    args = parser.parse_args()
    if args.fill:
        bench_fill(args.capacity)
    else:
        bench_replay(args.capacity, args.batches)


if __name__ == "__main__":
    main()
