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
        self._stream = None
        if replay.device.type == "cuda":
            self._stream = torch.cuda.Stream(replay.device)
            # Pinned memory, from which copies run beside the update's kernels.
            shape = (replay.batch_size * replay.num_stacked, *replay.frames.shape[1:])
            self._staging = [torch.empty(shape, dtype=replay.frames.dtype, pin_memory=True) for _ in range(2)]

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
        if self._stream is None:
            return self._replay.gather(transitions)
        with torch.cuda.stream(self._stream):
            batch = self._replay.gather(transitions, self._staging)
        self._stream.synchronize()  # this thread waits, so that the staging memory may be written again
        return batch
