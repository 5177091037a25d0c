"""Replay memory that keeps every frame once and rebuilds the stacks when it samples.

A transition's two stacks of k frames share k - 1 of them, and the next transition shares all but one with it. Kept
naively, a million transitions of 9 x 84 x 84 take 127 GB; with each frame kept once, 21.6 GB.
"""

from __future__ import annotations

import math
import os
import re
import uuid
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from files import Written, naming, read_json, read_tensors, write_json, write_tensors
from prefetch import Prefetcher

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # obs, action, reward, next_obs, not_done
_MAX_CHUNK = 10_000  # transitions in a file of `save`: small beside the buffer, whose copy it is in memory
_FIELDS = ("frame_ids", "actions", "rewards", "not_dones")
_INDEX = "replay.json"


class ReplayBuffer:
    """A ring of transitions over a ring of frames.

    Each transition names the frames of its stacks by number. `add` recognises the frames it has stored last by their
    content, so it needs no word of where an episode begins, and whatever it is given comes back bit for bit.

    There is room for 1/64 more frames than transitions, since an episode of n transitions has n + 1 frames. Where
    episodes are shorter than 64 transitions, frames run out first, and the oldest transitions make room early.

    Args:
        obs_shape: (k * C, H, W) for pixels, kept as uint8, or (D,) for states, kept as float32.
        action_shape: (A,).
        capacity: transitions.
        batch_size: transitions in a sample.
        device: where samples are put.
        seed: of the generator that draws them.
        frame_channels: C, channels of a single frame.
        frames_device: where the frames lie, `device` or host memory; it changes nothing about what is drawn.
        prefetch: gather the next batch while the last one is used; by default where that pays, if the frames lie in
            host memory and samples go to a GPU.

    Raises:
        ValueError: stacks that are not made of whole frames, a capacity below 1, prefetching from frames on a GPU.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        capacity: int,
        batch_size: int,
        device: torch.device | str,
        seed: int = 0,
        frame_channels: int = 3,
        frames_device: torch.device | str = "cpu",
        prefetch: bool | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.obs_shape = tuple(obs_shape)
        self.capacity = capacity
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.generator = np.random.default_rng(seed)
        self.num_stacked, frames_shape, dtype = _frames_layout(self.obs_shape, capacity, frame_channels)
        # Filled, so that the memory is taken now: what is not there must show at the start, not hours into the run.
        self.frames = torch.empty(frames_shape, dtype=dtype, device=frames_device).zero_()
        self.frame_ids = np.empty((capacity, 2 * self.num_stacked), dtype=np.int64)  # those of obs, then of next_obs
        self.actions = np.empty((capacity, *action_shape), dtype=np.float32)
        self.rewards = np.empty((capacity, 1), dtype=np.float32)
        self.not_dones = np.empty((capacity, 1), dtype=np.float32)
        for field in _FIELDS:
            getattr(self, field).fill(0)

        # Counted since the start and never wrapped: a number's place in a ring is its remainder by the ring's length.
        self.frames_added = 0
        self.transitions_added = 0
        self.oldest = 0  # the first transition that is still whole
        self.name = uuid.uuid4().hex  # tells this replay's files from another's
        self._saved: dict[Path, list[_Chunk]] = {}  # what lies in which folder
        self._newest: list[tuple[int, np.ndarray]] = []  # the last next_obs: number and pixels of each frame
        if prefetch is None:
            prefetch = self.frames.device.type == "cpu" and self.device.type == "cuda"
        if prefetch and self.frames.device.type != "cpu":
            raise ValueError("prefetch is for frames in host memory: those on a GPU are gathered there at once")
        self._prefetcher = Prefetcher(self) if prefetch else None

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self.transitions_added - self.oldest

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the full buffer takes."""
        return self.frames.nbytes + sum(getattr(self, field).nbytes for field in _FIELDS)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_obs: np.ndarray,
        done: bool | float,
        new_episode: bool = False,
    ) -> None:
        """Stores a transition.

        Args:
            obs: stack before the action: the `next_obs` of the call before, except at an episode's start.
            action: (A,).
            reward: summed over the action's repeats.
            next_obs: stack after it.
            done: whether the episode truly ended; a time limit is no such end.
            new_episode: says that `obs` begins an episode; otherwise that is seen by its frames.

        Raises:
            ValueError: an observation of another shape.
        """
        stack, next_stack = self._split(obs), self._split(next_obs)
        obs_frames = self._store(stack, [] if new_episode else self._newest)
        # Copied, because the next call compares with it and the caller may go on writing into the array.
        self._newest = self._store(next_stack.copy(), obs_frames[1:])

        place = self.transitions_added % self.capacity
        self.frame_ids[place] = [number for number, _ in obs_frames + self._newest]
        self.actions[place] = action
        self.rewards[place] = reward
        self.not_dones[place] = not done
        self.transitions_added += 1
        self.oldest = max(self.oldest, self.transitions_added - self.capacity)
        while self._first_frame(self.oldest) < self.frames_added - len(self.frames):
            self.oldest += 1

    def _split(self, obs: np.ndarray) -> np.ndarray:
        """The stack as its frames, (k, *frame shape), in the storage's dtype."""
        if obs.shape != self.obs_shape:
            raise ValueError(f"the replay holds observations of shape {self.obs_shape}, got {obs.shape}")
        dtype = np.uint8 if self.frames.dtype == torch.uint8 else np.float32
        return np.asarray(obs, dtype=dtype).reshape(self.num_stacked, *self.frames.shape[1:])

    def _store(self, stack: np.ndarray, expected: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        """Number and pixels of each frame of a stack.

        A frame that equals the one expected in its place, or the one before it, is that one; others are written.
        """
        stored: list[tuple[int, np.ndarray]] = []
        # What is used again must outlive the writes of one `add`: at most one for each frame of both stacks.
        safe = self.frames_added + 2 * self.num_stacked - len(self.frames)
        for position, frame in enumerate(stack):
            for number, known in expected[position : position + 1] + stored[-1:]:
                # By their bytes: 0.0 and -0.0 are equal numbers, but not the same.
                if number >= safe and np.array_equal(frame.view(np.uint8), known.view(np.uint8)):
                    break
            else:
                number = self.frames_added
                # On a GPU it is queued behind the update that may be running; the source has been read by then.
                self.frames[number % len(self.frames)].copy_(torch.from_numpy(frame), non_blocking=True)
                self.frames_added += 1
            stored.append((number, frame))
        return stored

    def _first_frame(self, transition: int) -> int:
        """Number of the oldest frame that a transition needs; it never falls from one transition to the next."""
        return int(self.frame_ids[transition % self.capacity].min())

    def sample(self) -> Batch:
        """Draws a batch uniformly, with replacement.

        Returns:
            obs (B, ...), action (B, A), reward (B, 1), next_obs (B, ...), not_done (B, 1), on the device:
            pixels uint8, all else float32.

        Raises:
            ValueError: nothing is stored yet.
        """
        if self._prefetcher is not None:
            return self._prefetcher.sample()
        return self.assemble(*self.draw_places())

    def draw(self, oldest: int, end: int) -> np.ndarray:
        """Numbers (B,) of transitions from `oldest` to before `end`, uniform and with replacement.

        Raises:
            ValueError: there are none.
        """
        if oldest >= end:
            raise ValueError("cannot sample from an empty replay: add transitions first")
        return self.generator.integers(oldest, end, self.batch_size)

    def gather(self, transitions: np.ndarray) -> Batch:
        """The transitions of these numbers, counted since the start, as `sample` returns them."""
        return self.assemble(*self.places(transitions))

    def places(self, transitions: np.ndarray) -> tuple[Tensor, ...]:
        """What `assemble` makes a batch of, all in host memory.

        Places in the ring of frames of obs and of next_obs, (B * k,) each; action, reward, not_done.
        """
        rows = transitions % self.capacity
        slots = torch.from_numpy(self.frame_ids[rows] % len(self.frames))
        fields = (torch.from_numpy(values[rows]) for values in (self.actions, self.rewards, self.not_dones))
        return *(half.flatten() for half in slots.split(self.num_stacked, dim=1)), *fields

    def draw_places(self) -> tuple[Tensor, ...]:
        """The same of a batch drawn uniformly: `assemble` makes of it what `sample` would have returned."""
        return self.places(self.draw(self.oldest, self.transitions_added))

    def assemble(
        self, obs_slots: Tensor, next_obs_slots: Tensor, action: Tensor, reward: Tensor, not_done: Tensor
    ) -> Batch:
        """A batch from its `places`, wherever those are."""
        # index_select copies frame by frame; indexing by brackets goes byte by byte, seven times slower on a CPU.
        obs_frames, next_obs_frames = (
            self.frames.index_select(0, slots.to(self.frames.device, non_blocking=True))
            for slots in (obs_slots, next_obs_slots)
        )
        return self.join(obs_frames, next_obs_frames, action, reward, not_done)

    def join(
        self, obs_frames: Tensor, next_obs_frames: Tensor, action: Tensor, reward: Tensor, not_done: Tensor
    ) -> Batch:
        """A batch on the samples' device from the frames (B * k, ...) of its stacks and its fields."""
        obs, next_obs = (
            frames.view(-1, *self.obs_shape).to(self.device, non_blocking=True)
            for frames in (obs_frames, next_obs_frames)
        )
        action, reward, not_done = (field.to(self.device, non_blocking=True) for field in (action, reward, not_done))
        return obs, action, reward, next_obs, not_done

    def save(self, save_dir: str | Path) -> None:
        """Writes what was added since the last `save`: a chunk `START_END.pt`, then `replay.json`, which lists them.

        Either file appears whole or not at all, and a save that is killed leaves the one before it good. Chunks that
        the rings have overwritten are deleted; each holds this replay's name, and what does not hold it stays.

        Raises:
            FileExistsError: the folder holds files of another replay, or of the authors' script.
        """
        folder = Path(save_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _INDEX
        self._check_owned(path, *(() if folder in self._saved else _chunks_in(folder)))
        if self.transitions_added:
            index = self.save_chunks(folder)
            write_json(path, index, self.name)
            self.keep_chunks(folder, index)

    def _check_owned(self, *paths: Path) -> None:
        for path in paths:
            if os.path.lexists(path) and not _written_by(path, self.name):
                raise FileExistsError(f"{path} belongs to another replay, or is damaged: save to an empty folder")

    def save_chunks(self, folder: Path) -> dict[str, Any]:
        """Writes what is not in the folder yet; an index of all that `load_chunks` needs, as JSON can hold it."""
        chunks = list(self._saved.get(folder.resolve(), []))
        unsaved = max(chunks[-1].end if chunks else 0, self.oldest)
        for start in range(unsaved, self.transitions_added, _MAX_CHUNK):
            chunks.append(self._save_chunk(folder, start, chunks[-1].frames_end if chunks else 0))
        needed = self._first_frame(self.oldest) if len(self) else 0
        return {
            "replay": self.name,
            "shapes": self._shapes(),
            "oldest": self.oldest,
            "generator": (self._prefetcher or self).generator_state(),
            "chunks": [chunk for chunk in chunks if chunk.end > self.oldest or chunk.frames_end > needed],
        }

    def keep_chunks(self, folder: Path, index: dict[str, Any]) -> None:
        """Deletes this replay's chunks that the index, which must have been written by now, does not list."""
        self._saved[folder.resolve()] = index["chunks"]
        listed = {chunk.file.name for chunk in index["chunks"]}
        for path in _chunks_in(folder):
            if path.name not in listed and _written_by(path, self.name):  # overwritten in the ring, or of a killed save
                path.unlink()

    def _save_chunk(self, folder: Path, start: int, frames_start: int) -> _Chunk:
        """Writes transitions from `start` on, with their frames from `frames_start` on that are still there."""
        end = min(start + _MAX_CHUNK, self.transitions_added)
        places = np.arange(start, end) % self.capacity
        frames_start = max(frames_start, self.frames_added - len(self.frames))
        frames_end = max(frames_start, int(self.frame_ids[places].max()) + 1)
        if end == self.transitions_added:
            frames_end = self.frames_added  # the newest frame may be needed by none that is left
        content = {
            "replay": self.name,
            "start": start,
            "frames_start": frames_start,
            "frames": self.frames.index_select(0, self._ring(frames_start, frames_end)).cpu(),
        }
        content |= {field: torch.from_numpy(getattr(self, field)[places]) for field in _FIELDS}
        path = folder / f"{start}_{end}.pt"
        self._check_owned(path)
        return _Chunk(end, frames_end, write_tensors(path, content, self.name))

    def _shapes(self) -> list[list[int]]:
        """Shapes of frames, frame numbers and actions, as JSON has them."""
        return [list(self.frames.shape[1:]), list(self.frame_ids.shape[1:]), list(self.actions.shape[1:])]

    def _ring(self, start: int, end: int) -> Tensor:
        """Places of the frames of these numbers."""
        return torch.arange(start, end, device=self.frames.device) % len(self.frames)

    def generator_state(self) -> dict[str, Any]:
        """State of the generator that draws."""
        return dict(self.generator.bit_generator.state)

    def load(self, save_dir: str | Path) -> None:
        """Restores what `save` wrote: contents, position, fullness, generator, and where the next `save` begins.

        Raises:
            ValueError: this buffer is not empty or is too small, or a file is missing, damaged or foreign; the message
                names the file.
        """
        index_path = Path(save_dir) / _INDEX
        index = read_json(index_path)
        try:
            self.load_chunks(index_path.parent, index)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{index_path} is damaged: {error}") from error

    def load_chunks(self, folder: Path, index: dict[str, Any]) -> None:
        """The same from an index that `save_chunks` gave.

        Raises:
            ValueError: as `load`.
            KeyError, TypeError: the index is damaged.
        """
        if self.transitions_added:
            raise ValueError("this replay holds transitions already: load into a new one")
        if index["shapes"] != self._shapes():
            raise ValueError(f"{folder} holds a replay of shapes {index['shapes']}, not {self._shapes()}")
        chunks = [_Chunk(end, frames_end, Written(*file)) for end, frames_end, file in index["chunks"]]
        for chunk in chunks:
            content = read_tensors(folder, chunk.file)
            with naming(folder / chunk.file.name):
                self._load_chunk(content, chunk, index["replay"])
        self.name = index["replay"]
        self.generator.bit_generator.state = index["generator"]
        self._saved[folder.resolve()] = chunks
        if not chunks:
            return
        self.oldest = index["oldest"]
        self.transitions_added = chunks[-1].end
        self.frames_added = chunks[-1].frames_end
        frames = self.frames_added - self._first_frame(self.oldest)
        if len(self) > self.capacity or frames > len(self.frames):
            raise ValueError(f"{folder} holds {len(self)} transitions, more than this replay of {self.capacity} can")
        self._newest = self._newest_stack()

    def _load_chunk(self, content: dict[str, Any], chunk: _Chunk, name: str) -> None:
        """Puts a chunk's content into the rings."""
        if content["replay"] != name:
            raise ValueError("it belongs to another replay")
        frames = content["frames"].to(self.frames.device)
        newest = slice(max(0, len(frames) - len(self.frames)), None)
        ring = self._ring(content["frames_start"], chunk.frames_end)
        self.frames.index_copy_(0, ring[newest], frames[newest])
        places = np.arange(content["start"], chunk.end) % self.capacity
        for field in _FIELDS:
            getattr(self, field)[places] = content[field].numpy()

    def _newest_stack(self) -> list[tuple[int, np.ndarray]]:
        """Number and pixels of each frame of the last `next_obs`."""
        ids = self.frame_ids[(self.transitions_added - 1) % self.capacity, self.num_stacked :]
        return [(int(number), self.frames[number % len(self.frames)].cpu().numpy().copy()) for number in ids]


def files_of(folder: Path, name: str) -> list[Path]:
    """What was written into a folder in the name of a replay: with it in their names, or in their content."""
    named = [path for path in folder.iterdir() if name in path.name]
    return named + [path for path in (folder / _INDEX, *_chunks_in(folder)) if _written_by(path, name)]


def _chunks_in(folder: Path) -> list[Path]:
    """Files that are named like chunks, as those of the authors' replay are, too."""
    return [path for path in folder.iterdir() if re.fullmatch(r"[0-9]+_[0-9]+\.pt", path.name)]


def _written_by(path: Path, name: str) -> bool:
    """Whether the replay of this name has written an index or a chunk. Tensors are not read."""
    try:
        if path.name == _INDEX:
            return read_json(path)["replay"] == name
        with zipfile.ZipFile(path) as archive:  # which is what torch.save writes
            heads = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
            return any(name.encode() in archive.read(head) for head in heads)
    except Exception:  # a foreign file may be anything, and raises almost anything
        return False


def replay_bytes(
    obs_shape: tuple[int, ...], action_shape: tuple[int, ...], capacity: int, frame_channels: int = 3
) -> int:
    """Bytes that a replay of this size takes, frames and all else."""
    num_stacked, frames_shape, dtype = _frames_layout(obs_shape, capacity, frame_channels)
    transition = 8 * 2 * num_stacked + 4 * math.prod(action_shape) + 4 + 4  # frame numbers, action, reward, not_done
    return math.prod(frames_shape) * dtype.itemsize + transition * capacity


def _frames_layout(
    obs_shape: tuple[int, ...], capacity: int, frame_channels: int
) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Frames in a stack, shape and type of the ring of frames."""
    if len(obs_shape) == 3:
        if obs_shape[0] % frame_channels:
            raise ValueError(f"{obs_shape[0]} channels are no whole number of frames of {frame_channels} channels")
        num_stacked = obs_shape[0] // frame_channels
        frame: tuple[int, ...] = (frame_channels, *obs_shape[1:])
        dtype = torch.uint8
    else:  # a state is a stack of one frame
        num_stacked, frame, dtype = 1, obs_shape, torch.float32
    return num_stacked, (capacity + capacity // 64 + 2 * num_stacked, *frame), dtype


class _Chunk(NamedTuple):
    """A file of `save`, and the numbers that follow its last transition and frame."""

    end: int
    frames_end: int
    file: Written
