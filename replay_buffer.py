"""Replay memory that keeps every frame once and rebuilds the stacks when it samples.

The two stacks of a transition are k + 1 frames in a row, and the next transition shares k of them. With both stacks
stored, a million transitions of 9 x 84 x 84 take 127 GB; with each frame stored once, 22 GB.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from itertools import starmap, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from files import read_index, read_tensors, unfinished, write_index, write_tensors, writing
from randomness import generator

Shape = tuple[int, ...]
FIELDS = ("newest", "actions", "rewards", "not_dones")
COUNTERS = ("transitions_added", "frames_added", "oldest", "draws")
INDEX = "replay.json"
CHUNKS = "[0-9]*_[0-9]*.pt"  # names of chunks, as a pattern of `glob`
MAX_CHUNK = 10_000  # transitions in a file; one file at a time is copied in memory


class Batch(NamedTuple):
    """B transitions: obs and next_obs (B, ...), pixels uint8 and states float32; all else float32."""

    obs: Tensor
    action: Tensor  # (B, A)
    reward: Tensor  # (B, 1)
    next_obs: Tensor
    not_done: Tensor  # (B, 1)


class Chunk(NamedTuple):
    """A file of transitions and their frames; `end` is the number after its last transition."""

    name: str
    crc32: int
    end: int


class ReplayBuffer:
    """A ring of transitions over a ring of frames.

    k is the number of stacked frames, 1 for states. An episode of n decisions stores n + k frames. For states the ring
    of frames has room for two frames a transition, so nothing is lost. For pixels it has room for 33/32: episodes of
    fewer than 32 k decisions reduce the capacity to about 33/32 * n / (n + k) of it, the newest transitions.

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
        # Filled with zeros now, so that a lack of memory shows at the start; torch.zeros may take it later.
        (shape, dtype), *others = storage(obs_shape, action_shape, capacity, frame_channels).values()
        self.frames = torch.empty(shape, dtype=dtype, device=frames_device).zero_()
        self.newest, self.actions, self.rewards, self.not_dones = (
            torch.empty(shape, dtype=dtype).zero_().numpy() for shape, dtype in others
        )
        self.num_stacked = math.prod(obs_shape) // self.frames[0].numel()
        self._shapes = [list(shape) for shape in (obs_shape, self.frames.shape[1:], action_shape)]
        # Numbers count from the start and never wrap; number n is stored at index n % length of its ring.
        self.frames_added = self.transitions_added = 0
        self.oldest = 0  # the first transition whose frames are all there
        self.draws = 0  # batches drawn
        self.id = uuid.uuid4().hex  # tells this replay's files from those of another
        self._last = b""  # the newest next_obs
        self._own: set[Chunk] = set()  # files that this object has written or loaded

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
        """Stores a copy of a transition.

        Args:
            obs: stack before the action: the `next_obs` of the call before, except at an episode's start.
            action: (A,).
            reward: summed over the action's repeats.
            next_obs: stack after the action: `obs` without its oldest frame, and a new frame.
            done: whether the task ended; a time limit does not count.
            first: whether the transition is the first of its episode. None: it is unless `obs` is the last `next_obs`.

        Raises ValueError, and stores nothing, if a shape is wrong, or if a stack does not continue the one before it.
        """
        action, reward, not_done = np.asarray(action, np.float32), float(reward), float(not done)
        if not obs.shape == next_obs.shape == self.obs_shape:
            raise ValueError(f"observations must have shape {self.obs_shape}, got {obs.shape} and {next_obs.shape}")
        if action.shape != self.actions.shape[1:]:
            raise ValueError(f"actions must have shape {self.actions.shape[1:]}, got {action.shape}")
        dtype = np.uint8 if self.frames.dtype == torch.uint8 else np.float32
        stack, next_stack = (np.asarray(each, dtype).reshape(self.num_stacked, -1) for each in (obs, next_obs))
        continues = stack.tobytes() == self._last
        if first is False and not continues:
            raise ValueError("obs is not the next_obs of the transition before: say first=True where an episode begins")
        if next_stack[:-1].tobytes() != stack[1:].tobytes():
            raise UserError(
                "an observation does not continue the one before, without its oldest frame and with a new one: "
                "stack frames by FrameStack, in the outermost wrapper"
            )
        new = next_stack[-1:] if continues and not first else np.concatenate([stack, next_stack[-1:]])
        for frame in torch.from_numpy(new.reshape(-1, *self.frames.shape[1:]).copy()):
            # On a GPU the copy is queued behind the update that may be running.
            slot = self.frames[self.frames_added % len(self.frames)]
            slot.copy_(pinned(frame, slot.device), non_blocking=True)
            self.frames_added += 1
        place = self.transitions_added % self.capacity
        self.newest[place] = self.frames_added - 1
        self.actions[place], self.rewards[place], self.not_dones[place] = action, reward, not_done
        self._last = next_stack.tobytes()
        self.transitions_added += 1
        self._drop_overwritten()

    def _drop_overwritten(self) -> None:
        """Moves `oldest` to the first transition that is still there with all of its frames."""
        self.oldest = max(self.oldest, self.transitions_added - self.capacity)
        # Frames of numbers below frames_added - len(frames) are overwritten; those of the newest transition never are.
        while self.newest[self.oldest % self.capacity] - self.num_stacked < self.frames_added - len(self.frames):
            self.oldest += 1

    def sample(self) -> Batch:
        """Draws a batch uniformly, with replacement, onto the device. Raises ValueError if nothing is stored."""
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
        """The transitions of these numbers, on the device.

        Frames in host memory go to a GPU through `staging`, if it is given: pinned memory for those of obs and of
        next_obs, (B * k, *frame shape).
        """
        rows, k = transitions % self.capacity, self.num_stacked
        frames = (self.newest[rows, None] + np.arange(-k, 1)) % len(self.frames)
        places = send(torch.from_numpy(np.stack([frames[:, :k], frames[:, 1:]]).reshape(2, -1)), self.frames.device)
        # index_select copies frame by frame; indexing by brackets goes byte by byte, seven times slower on a CPU.
        obs, next_obs = (
            torch.index_select(self.frames, 0, place, out=out) for place, out in zip(places, staging, strict=True)
        )
        # One tensor to send: all of action, then reward, then not_done.
        fields = np.concatenate([field[rows].ravel() for field in (self.actions, self.rewards, self.not_dones)])
        obs, next_obs, values = (send(tensor, self.device) for tensor in (obs, next_obs, torch.from_numpy(fields)))
        size, shape = len(rows), (len(rows), *self.obs_shape)
        action, reward, not_done = (part.view(size, -1) for part in values.tensor_split([-2 * size, -size]))
        return Batch(obs.view(shape), action, reward, next_obs.view(shape), not_done)

    def save(self, save_dir: str | Path) -> None:
        """Writes what the folder lacks: chunks `START_END.pt`, then `replay.json`, which lists them. If empty, nothing.

        It lacks all that this object has neither written nor loaded. A save that is killed leaves the one before it
        whole. Of other files, only chunks that are not listed any more are deleted; no chunk replaces a file.

        Raises UserError if the folder holds anything but a save of this replay, or if a file cannot be written.
        """
        folder, path = Path(save_dir), Path(save_dir) / INDEX
        if not self.transitions_added:
            return
        if not path.exists() and not any(folder.glob("[!.]*")):
            # If the first save is killed, this tells whose files are there.
            write_index(path, {"id": self.id, "shapes": self._shapes, "chunks": []} | dict.fromkeys(COUNTERS, 0))
        before = read_index(path) if path.exists() else {}
        if before.get("id") != self.id:
            raise UserError(f"{folder} belongs to another replay: save to an empty folder")
        there = {*folder.glob(CHUNKS)}
        try:
            index = self.save_chunks(folder, before["chunks"])
            write_index(path, index)
        except UserError:
            there |= {folder / chunk[0] for chunk in read_index(path)["chunks"]}  # of the new index, if it is in place
            remove({*folder.glob(CHUNKS)} - there)
            raise
        names, old_names = ({chunk[0] for chunk in each["chunks"]} for each in (index, before))
        remove([*folder.glob(unfinished(Path(CHUNKS)).name), *(folder / name for name in old_names - names)])

    def save_chunks(self, folder: Path, saved: Iterable[Sequence[Any]]) -> dict[str, Any]:
        """Writes what the folder lacks, and replaces no file. Returns the index for `load_chunks`, as JSON can hold it.

        `saved` are the chunks of the folder's index before, and `index["chunks"]` those of the new one.
        """
        # A killed run or a copy of this replay may have written other transitions of the same numbers.
        own = takewhile(self._own.__contains__, starmap(Chunk, saved))
        chunks = [chunk for chunk in own if chunk.end > self.oldest]
        if chunks and int(chunks[0].name.partition("_")[0]) > self.oldest:  # that run was further, and deleted some
            chunks = []
        for start in range(chunks[-1].end if chunks else self.oldest, self.transitions_added, MAX_CHUNK):
            chunks.append(self._write_chunk(folder, start, min(start + MAX_CHUNK, self.transitions_added)))
        self._own.update(chunks)
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {"id": self.id, "shapes": self._shapes, "chunks": chunks} | counters

    def _write_chunk(self, folder: Path, start: int, end: int) -> Chunk:
        """Writes the transitions from number `start` to `end`, without `end` itself, and their frames."""
        rows = np.arange(start, end) % self.capacity
        content = {field: torch.from_numpy(getattr(self, field)[rows]) for field in FIELDS}
        slots = self._slots(int(self.newest[rows[0]]) - self.num_stacked, int(self.newest[rows[-1]]) + 1)
        content["frames"] = self.frames.index_select(0, slots).cpu()
        name = f"{start}_{end}.pt"
        while (folder / name).exists():  # the save before may need it
            name = f"0{name}"
        return Chunk(name, write_tensors(folder / name, content), end)

    def load(self, save_dir: str | Path) -> None:
        """Restores what `save` wrote: contents, position, number of draws, and where the next `save` begins.

        If this replay has room for fewer frames, the oldest transitions are dropped.

        Raises UserError if this replay is not empty or has another shape or too small a capacity, or if a file is
        missing or damaged.
        """
        self.load_chunks(Path(save_dir), read_index(Path(save_dir) / INDEX))

    def load_chunks(self, folder: Path, index: dict[str, Any]) -> None:
        """Fills this replay from an index that `save_chunks` gave; errors as `load`."""
        stored = index["transitions_added"] - index["oldest"]
        if self.transitions_added:
            raise UserError("this replay holds transitions already: load into a new one")
        if index["shapes"] != self._shapes:
            raise UserError(f"{folder} holds a replay of shapes {index['shapes']}, not {self._shapes}")
        if stored > self.capacity:
            raise UserError(f"{folder} holds {stored} transitions, more than the replay's capacity, {self.capacity}")
        for name, crc32, end in index["chunks"]:
            content = read_tensors(folder / name, crc32)
            # The rings may be shorter than the chunk: its end is what counts.
            rows = np.arange(end - len(content["rewards"]), end)[-self.capacity :] % self.capacity
            for field in FIELDS:
                getattr(self, field)[rows] = content[field][-self.capacity :].numpy()
            frames, frames_end = content["frames"][-len(self.frames) :], int(content["newest"][-1]) + 1
            slots = self._slots(frames_end - len(frames), frames_end)
            self.frames.index_copy_(0, slots, frames.to(self.frames.device))
        for name in ("id", *COUNTERS):
            setattr(self, name, index[name])
        self._drop_overwritten()
        if len(self):
            newest_stack = self._slots(self.frames_added - self.num_stacked, self.frames_added)
            self._last = self.frames.index_select(0, newest_stack).cpu().numpy().tobytes()
        self._own.update(starmap(Chunk, index["chunks"]))

    def _slots(self, start: int, end: int) -> Tensor:
        """Places in the ring of the frames of these numbers."""
        return torch.arange(start, end, device=self.frames.device) % len(self.frames)


def storage(
    obs_shape: Shape, action_shape: Shape, capacity: int, frame_channels: int = 3
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shapes and types of what a replay stores, by name."""
    # A state is a stack of one frame; frames are small, so that there is room for episodes of one decision each.
    frame, dtype, room = tuple(obs_shape), torch.float32, 2 * capacity
    if len(obs_shape) == 3:
        if obs_shape[0] % frame_channels:
            raise ValueError(f"{obs_shape[0]} channels are not a whole number of frames of {frame_channels} channels")
        frame, dtype = (frame_channels, *obs_shape[1:]), torch.uint8
        room = capacity + capacity // 32 + 2 * obs_shape[0] // frame_channels  # two stacks, for a small capacity
    return {
        "frames": ((room, *frame), dtype),
        "newest": ((capacity,), torch.int64),  # number of the newest frame of next_obs
        "actions": ((capacity, *action_shape), torch.float32),
        "rewards": ((capacity, 1), torch.float32),
        "not_dones": ((capacity, 1), torch.float32),
    }


def replay_bytes(obs_shape: Shape, action_shape: Shape, capacity: int, frame_channels: int = 3) -> int:
    """Bytes that a replay of this size takes, frames and all else."""
    arrays = storage(obs_shape, action_shape, capacity, frame_channels)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())


def remove(paths: Iterable[Path]) -> None:
    """Deletes files, those that are there."""
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor as it is or, for a GPU, its copy in pinned memory.

    From there a `non_blocking` copy is queued at once; from other memory it may wait for all kernels before it. PyTorch
    keeps the pinned memory until the copy is made. https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device."""
    return pinned(tensor, device).to(device, non_blocking=True)
