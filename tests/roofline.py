"""The least time that an update takes on a GPU, from what it asks of it: `python tests/roofline.py` needs no GPU.

https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from count import Count
from fake_gpu import fake_gpu
from watch import Watch

from replay_buffer import ReplayBuffer, Shape
from sac_ae import Due, SacAeAgent
from support import report

SHAPES: dict[str, Shape] = {"pixel": (9, 84, 84), "state": (17,)}
LAUNCH = 2e-6  # seconds from one kernel to the next, in a CUDA graph or from a host that is ahead


class Gpu(NamedTuple):
    """Peaks: of memory in TB/s; of dense products in TFLOP/s, by what their operands are taken for."""

    memory: float
    fp32: float
    tf32: float
    bf16: float


# https://www.nvidia.com/en-us/data-center/h100/: SXM. Tensor cores: half of what it gives for sparse products.
H100 = Gpu(3.35, 67, 495, 989)


def least(count: Count, peaks: Gpu, launch: float = 0.0) -> float:
    """Seconds that the operations take one after the other, if each reaches a peak; `launch` is a kernel's least."""
    return sum(
        max(each.flop / getattr(peaks, each.operands) / 1e12, each.bytes / peaks.memory / 1e12, each.kernels * launch)
        for each in count.operations
    )


def counts(obs_shape: Shape, action_shape: Shape, batch_size: int, **settings: Any) -> Iterator[tuple[str, Count]]:
    """Counts of a batch, of updates with and without the actor, and of an action; within `fake_gpu`."""
    agent = SacAeAgent(obs_shape, action_shape, "cuda", **settings)
    replay = ReplayBuffer(obs_shape, action_shape, 10, batch_size, "cuda", frames_device="cuda")
    obs = np.zeros(obs_shape, np.uint8 if len(obs_shape) == 3 else np.float32)
    replay.add(obs, np.zeros(action_shape), 0.0, obs, False)
    with Watch(), Count() as count:
        batch = replay.sample()
    yield "batch", count
    for actor, target, name in ((True, True, "update with actor, target"), (False, False, "update without")):
        due = Due(actor, target, agent.decoder is not None)
        agent.update_from(batch, due)  # its optimisers make their moments
        with Watch(capturing=True), Count() as count:
            agent.update_from(batch, due)
        yield name, count
    with Watch(capturing=True), Count() as count:
        agent.actions(batch[0][:1], True)
    yield "action", count


def main() -> None:
    """Prints a table of the counts at default settings, by observations and precision."""
    batch_size = 128
    numbers = ", ".join(f"{name} {peak:g}" for name, peak in H100._asdict().items())
    report.show(
        f"Peaks (memory TB/s, products TFLOP/s): {numbers}. Batches of {batch_size}, PyTorch {torch.__version__}.\n"
        "MB at once: what an update makes, beside weights, moments and batch. Least: microseconds, if each operation "
        f"reaches a peak; with launches: if no kernel takes less than {LAUNCH * 1e6:g}.\n"
    )
    report.show("| observations | precision | what | kernels | GFLOP | MB moved | MB at once | least | with launches |")
    report.show("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for (kind, shape), precision in itertools.product(SHAPES.items(), (None, "fp32", "tf32", "bf16")):
        types = "pixel" if len(shape) == 3 else "identity"
        settings = {"encoder_type": types, "decoder_type": types, "precision": precision}
        with report.one_line(sys.exit), fake_gpu():
            for name, count in counts(shape, (6,), batch_size, **settings):
                kernels, flop, moved = map(count.total, ("kernels", "flop", "bytes"))
                times = [least(count, H100, launch) * 1e6 for launch in (0.0, LAUNCH)]
                report.show(
                    f"| {kind} | {precision or 'default'} | {name} | {kernels} | {flop / 1e9:.2f} | {moved / 1e6:,.1f} "
                    f"| {count.peak / 1e6:,.1f} | {times[0]:,.0f} | {times[1]:,.0f} |"
                )


if __name__ == "__main__":
    main()
