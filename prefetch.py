"""The replay's next batch, gathered and copied to the GPU while the update before it runs.

What comes out is what would come out without this. The next batch is drawn ahead, for the transitions that will be
stored by then if as many are added as between the last two batches. Where it comes otherwise, as it may where episodes
are so short that frames run out before transitions, the generator is set back and the batch is drawn anew.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from replay_buffer import Batch, ReplayBuffer


class _Ahead(NamedTuple):
    """A batch that was drawn ahead."""

    generator_state: dict[str, Any]  # before the draw
    drawn_from: tuple[int, int]  # transitions: the oldest, and the one after the last
    transitions: np.ndarray
    late: np.ndarray  # places in the batch of transitions that were not stored yet
    batch: Future[Batch]


class Prefetcher:
    """Draws batches from a replay whose frames lie in host memory, and works ahead in a thread."""

    def __init__(self, replay: ReplayBuffer):
        self._replay = replay
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: _Ahead | None = None
        self._last_end = 0
        self._stream = torch.cuda.Stream(replay.device) if replay.device.type == "cuda" else None
        # Frames of obs and of next_obs, in pinned memory, from which copies run beside the update's kernels.
        shape = (replay.batch_size * replay.num_stacked, *replay.frames.shape[1:])
        self._staging = [
            torch.empty(shape, dtype=replay.frames.dtype, pin_memory=self._stream is not None) for _ in range(2)
        ]

    def sample(self) -> Batch:
        """The batch that the replay would draw and gather now; begins the one after it."""
        replay, ahead = self._replay, self._ahead
        stored = (replay.oldest, replay.transitions_added)
        if ahead is not None and ahead.drawn_from == stored:
            batch = self._complete(ahead)
        else:
            if ahead is not None:
                ahead.batch.result()  # its thread reads frames and staging
                replay.generator.bit_generator.state = ahead.generator_state
            batch = replay.gather(replay.draw(*stored))
        self._ahead = self._draw_ahead(added=replay.transitions_added - self._last_end)
        self._last_end = replay.transitions_added
        return batch

    def _complete(self, ahead: _Ahead) -> Batch:
        """The batch drawn ahead, with the transitions that were stored since."""
        batch = ahead.batch.result()
        if self._stream is not None:
            for tensor in batch:  # allocated on the thread's stream, used on this one
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if len(ahead.late):
            places = torch.from_numpy(ahead.late).to(self._replay.device, non_blocking=True)
            for tensor, late in zip(batch, self._replay.gather(ahead.transitions[ahead.late]), strict=True):
                tensor[places] = late
        return batch

    def _draw_ahead(self, added: int) -> _Ahead:
        """Draws as if `added` transitions more were stored, and has the thread gather what is there already."""
        replay = self._replay
        state = replay.generator_state()
        end = replay.transitions_added + added
        oldest = max(replay.oldest, end - replay.capacity)
        transitions = replay.draw(oldest, end)
        late = np.flatnonzero(transitions >= replay.transitions_added)
        there = np.minimum(transitions, replay.transitions_added - 1)
        # Numbers and fields are read here, before anything is added; the frames, which take the time, in the thread.
        # Those of transitions from `oldest` on are only overwritten if it comes otherwise than predicted.
        gather = self._thread.submit(self._gather, *replay.places(there))
        return _Ahead(state, (oldest, end), transitions, late, gather)

    def _gather(self, obs_slots: Tensor, next_obs_slots: Tensor, *fields: Tensor) -> Batch:
        replay = self._replay
        for slots, staging in zip((obs_slots, next_obs_slots), self._staging, strict=True):
            torch.index_select(replay.frames, 0, slots, out=staging)
        if self._stream is None:
            return replay.join(*(staging.clone() for staging in self._staging), *fields)
        with torch.cuda.stream(self._stream):
            batch = replay.join(*self._staging, *fields)
            copied = torch.cuda.Event()
            copied.record()
        copied.synchronize()  # this thread waits, so that the staging buffers may be written again
        return batch

    def generator_state(self) -> dict[str, Any]:
        """State of the generator with nothing drawn ahead."""
        return self._replay.generator_state() if self._ahead is None else self._ahead.generator_state
