"""A replay's next batch, gathered and copied to the GPU while an update runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from replay_buffer import Batch, ReplayBuffer


class Prefetched:
    """Gives the batches that the replay would give. Everything but `add` and `sample` is the replay's own.

    After `add` the next batch is determined: it is drawn at once, and a thread gathers it.

    Args:
        replay: with its frames in host memory.
    """

    def __init__(self, replay: ReplayBuffer):
        self._replay = replay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: Future[Batch] | None = None
        self._sampling = False  # whether a batch was drawn since the last `add`
        self._stream = torch.cuda.Stream(replay.device) if replay.device.type == "cuda" else None
        # Frames of obs and of next_obs, in pinned memory, from which copies run beside the update's kernels.
        shape = (replay.batch_size * replay.num_stacked, *replay.frames.shape[1:])
        pinned = self._stream is not None
        self._staging = [torch.empty(shape, dtype=replay.frames.dtype, pin_memory=pinned) for _ in range(2)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replay, name)

    def __len__(self) -> int:
        return len(self._replay)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Stores a transition; see `ReplayBuffer.add`."""
        if self._next is not None:
            self._next.result()  # it reads frames that this call may overwrite
        self._replay.add(*args, **kwargs)
        self._next = self._thread.submit(self._gather, self._replay.draw()) if self._sampling else None
        self._sampling = False

    def sample(self) -> Batch:
        """Draws a batch; see `ReplayBuffer.sample`."""
        self._sampling = True
        if self._next is None:
            return self._replay.sample()
        batch, self._next = self._next.result(), None
        self._replay.draws += 1
        if self._stream is not None:
            for tensor in batch:  # allocated on the thread's stream, used on this one
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return batch

    def _gather(self, transitions: np.ndarray) -> Batch:
        replay = self._replay
        for slots, staging in zip(replay.slots(transitions), self._staging, strict=True):
            torch.index_select(replay.frames, 0, slots, out=staging)
        fields, (obs, next_obs) = replay.fields(transitions), self._staging
        if self._stream is None:
            return replay.to_batch(obs.clone(), next_obs.clone(), fields)
        with torch.cuda.stream(self._stream):
            batch = replay.to_batch(obs, next_obs, fields)
            copied = torch.cuda.Event()
            copied.record()
        copied.synchronize()  # this thread waits, so that the staging buffers may be written again
        return batch
