"""Replay memory that keeps every frame once and rebuilds the stacks when it samples.

A transition's two stacks of k frames share k - 1 of them, and the next transition shares all but one with it. With both
stacks stored, a million transitions of 9 x 84 x 84 take 127 GB; with each frame stored once, 21.6 GB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import replay_files
from randomness import generator

Shape = tuple[int, ...]
Batch = tuple[Tensor, ...]  # obs, action, reward, next_obs, not_done


class ReplayBuffer:
    """A ring of transitions over a ring of frames. Each transition names the frames of its stacks by number.

    The ring of frames has room for 1/64 more frames than transitions, because an episode of n transitions has n + 1
    frames. With episodes shorter than 64 transitions, the oldest transitions are dropped before the ring is full.

    Args:
        obs_shape: (k * C, H, W) for pixels, kept as uint8, or (D,) for states, kept as float32.
        action_shape: (A,).
        capacity: transitions.
        batch_size: transitions in a sample.
        device: where samples are put.
        seed: batch number n depends only on (seed, n) and the stored transitions.
        frame_channels: C, channels of a single frame.
        frames_device: of the frames: `device` or the CPU.

    Raises ValueError if stacks are not made of whole frames, or if the capacity is below 1.
    """

    FIELDS = ("frame_ids", "actions", "rewards", "not_dones")

    def __init__(
        self,
        obs_shape: Shape,
        action_shape: Shape,
        capacity: int,
        batch_size: int,
        device: torch.device | str,
        seed: int = 0,
        frame_channels: int = 3,
        frames_device: torch.device | str = "cpu",
    ):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.obs_shape, self.device = tuple(obs_shape), torch.device(device)
        self.capacity, self.batch_size, self.seed = capacity, batch_size, seed
        self.nbytes = replay_bytes(obs_shape, action_shape, capacity, frame_channels)  # of memory, full or empty
        arrays = storage(obs_shape, action_shape, capacity, frame_channels)
        self.frames = filled(*arrays["frames"], frames_device)
        self.frame_ids = filled(*arrays["frame_ids"]).numpy()
        self.actions = filled(*arrays["actions"]).numpy()
        self.rewards = filled(*arrays["rewards"]).numpy()
        self.not_dones = filled(*arrays["not_dones"]).numpy()
        self.num_stacked = self.frame_ids.shape[1] // 2
        # Numbers count from the start and never wrap; number n is stored at index n % length of its ring.
        self.frames_added = self.transitions_added = 0
        self.oldest = 0  # the first transition whose frames are all there
        self.draws = 0  # batches drawn
        self.last_obs: list[bytes] = []  # the newest next_obs, frame by frame
        self.files = replay_files.ReplayFiles(self)

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self.transitions_added - self.oldest

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_obs: np.ndarray,
        done: bool | float,
        first: bool | None = None,
    ) -> None:
        """Stores a transition.

        Args:
            obs: stack before the action: the `next_obs` of the call before, except at an episode's start.
            action: (A,).
            reward: summed over the action's repeats.
            next_obs: stack after the action.
            done: whether the task ended; a time limit does not count.
            first: whether the transition is the first of its episode. None: it is unless `obs` is the last `next_obs`.

        Raises ValueError if a stack has another shape, or if `first` is False and `obs` is not the last `next_obs`.
        """
        stack, next_stack = self.split(obs), self.split(next_obs)
        continues = stack == self.last_obs
        if first is False and not continues:
            raise ValueError("obs is not the next_obs of the transition before: say first=True where an episode begins")
        place = self.transitions_added % self.capacity
        ids = self.frame_ids[place - 1, self.num_stacked :].tolist() if continues and not first else self._store(stack)
        shares = next_stack[:-1] == stack[1:]
        next_ids = ids[1:] + self._store(next_stack[-1:]) if shares else self._store(next_stack)
        self.last_obs = next_stack

        self.frame_ids[place] = ids + next_ids
        self.actions[place], self.rewards[place], self.not_dones[place] = action, reward, not done
        self.transitions_added += 1
        self.oldest = max(self.oldest, self.transitions_added - self.capacity)
        while self.first_frame(self.oldest) < self.frames_added - len(self.frames):
            self.oldest += 1

    def split(self, obs: np.ndarray) -> list[bytes]:
        """The stack's frames, as they are stored."""
        if obs.shape != self.obs_shape:
            raise ValueError(f"the replay holds observations of shape {self.obs_shape}, got {obs.shape}")
        dtype = np.uint8 if self.frames.dtype == torch.uint8 else np.float32
        return [frame.tobytes() for frame in np.asarray(obs, dtype).reshape(self.num_stacked, -1)]

    def _store(self, frames: list[bytes]) -> list[int]:
        """Writes frames into the ring and returns their numbers; repeated frames are written once."""
        ids: list[int] = []
        for index, frame in enumerate(frames):
            if index == 0 or frame != frames[index - 1]:
                # On a GPU the copy is queued behind the update that may be running.
                slot = self.frames[self.frames_added % len(self.frames)]
                stored = torch.frombuffer(bytearray(frame), dtype=slot.dtype).view(slot.shape)
                slot.copy_(pinned(stored, slot.device), non_blocking=True)
                self.frames_added += 1
            ids.append(self.frames_added - 1)
        return ids

    def first_frame(self, transition: int) -> int:
        """Number of the oldest frame that a transition needs; it never falls from one transition to the next."""
        return int(self.frame_ids[transition % self.capacity].min())

    def sample(self) -> Batch:
        """Draws a batch uniformly, with replacement. Raises ValueError if nothing is stored.

        It is obs (B, ...), action (B, A), reward (B, 1), next_obs (B, ...), not_done (B, 1), on the device: pixels
        uint8, all else float32.
        """
        batch = self.gather(self.draw())
        self.draws += 1
        return batch

    def draw(self) -> np.ndarray:
        """Numbers (B,) of the transitions of the next batch. Raises ValueError if nothing is stored."""
        if not len(self):
            raise ValueError("cannot sample from an empty replay: add transitions first")
        random = generator(self.seed, "replay", self.draws)
        return random.integers(self.oldest, self.transitions_added, self.batch_size)

    def gather(self, transitions: np.ndarray, staging: Sequence[Tensor | None] = (None, None)) -> Batch:
        """The transitions of these numbers, as `sample` returns them.

        Frames in host memory go to a GPU through `staging`, if it is given: pinned memory for those of obs and of
        next_obs, (B * k, *frame shape).
        """
        rows = transitions % self.capacity
        slots = torch.from_numpy(self.frame_ids[rows] % len(self.frames))
        places = send(torch.stack(slots.chunk(2, dim=1)).view(2, -1), self.frames.device)
        # index_select copies frame by frame; indexing by brackets goes byte by byte, seven times slower on a CPU.
        obs, next_obs = (
            torch.index_select(self.frames, 0, place, out=out) for place, out in zip(places, staging, strict=True)
        )
        # One tensor to send: all of action, then reward, then not_done.
        fields = np.concatenate([field[rows].ravel() for field in (self.actions, self.rewards, self.not_dones)])
        obs, next_obs, values = (send(tensor, self.device) for tensor in (obs, next_obs, torch.from_numpy(fields)))
        size, shape = len(rows), (len(rows), *self.obs_shape)
        action, reward, not_done = (part.view(size, -1) for part in values.tensor_split([-2 * size, -size]))
        return obs.view(shape), action, reward, next_obs.view(shape), not_done

    def save(self, save_dir: str | Path) -> None:
        """Writes what was added since the last `save`: chunks `START_END.pt`, and `replay.json`, which lists them.

        Each file appears whole or not at all, and a save that is killed leaves the one before it good. Chunks that the
        rings have overwritten are deleted; no file that `.replay_files` does not list is.

        Raises UserError if the folder holds files of another replay or of the authors' script, and UserError, with
        the file's name, if the system refuses to write one.
        """
        self.files.save(Path(save_dir))

    def load(self, save_dir: str | Path) -> None:
        """Restores what `save` wrote: contents, position, number of draws, and where the next `save` begins.

        Raises UserError if this buffer is not empty or is too small, or if a file, which is named, is unusable.
        """
        self.files.load(Path(save_dir))


def storage(
    obs_shape: Shape, action_shape: Shape, capacity: int, frame_channels: int = 3
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shapes and types of what a replay stores, by name."""
    num_stacked, frame, dtype = 1, tuple(obs_shape), torch.float32  # a state is a stack of one frame
    if len(obs_shape) == 3:
        if obs_shape[0] % frame_channels:
            raise ValueError(f"{obs_shape[0]} channels are not a whole number of frames of {frame_channels} channels")
        num_stacked, frame, dtype = obs_shape[0] // frame_channels, (frame_channels, *obs_shape[1:]), torch.uint8
    return {
        "frames": ((capacity + capacity // 64 + 2 * num_stacked, *frame), dtype),
        "frame_ids": ((capacity, 2 * num_stacked), torch.int64),  # those of obs, then of next_obs
        "actions": ((capacity, *action_shape), torch.float32),
        "rewards": ((capacity, 1), torch.float32),
        "not_dones": ((capacity, 1), torch.float32),
    }


def filled(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor filled with zeros now, so that a lack of memory shows at the start; torch.zeros may take it later."""
    return torch.empty(shape, dtype=dtype, device=device).zero_()


def replay_bytes(obs_shape: Shape, action_shape: Shape, capacity: int, frame_channels: int = 3) -> int:
    """Bytes that a replay of this size takes, frames and all else."""
    arrays = storage(obs_shape, action_shape, capacity, frame_channels)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor as it is or, for a GPU, its copy in pinned memory.

    From there a `non_blocking` copy is queued at once; from other memory it may wait for all kernels before it. PyTorch
    keeps the pinned memory until the copy is made. https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device."""
    return pinned(tensor, device).to(device, non_blocking=True)
