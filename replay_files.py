"""A replay's files: chunks of transitions and frames, each written once, and an index that lists them."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from errors import UserError
from files import Record, read_index, read_tensors, write_index, write_tensors

if TYPE_CHECKING:
    from replay_buffer import ReplayBuffer

INDEX = "replay.json"
CHUNK = re.compile(r"[0-9]+_[0-9]+\.pt")  # the authors' replay uses the same names
LIST = ".replay_files"
MAX_CHUNK = 10_000  # transitions in a file; one file at a time is copied in memory
COUNTERS = ("transitions_added", "frames_added", "oldest", "draws")


class Chunk(NamedTuple):
    """A file, its checksum, and the numbers that follow its last transition and its last frame."""

    name: str
    crc32: int
    end: int
    frames_end: int


class ReplayFiles:
    """Saves and loads a replay, in any number of folders."""

    def __init__(self, replay: ReplayBuffer):
        self._replay = weakref.proxy(replay)  # in a circle its memory would only be freed by the garbage collector
        self._chunks: dict[Path, list[Chunk]] = {}  # written so far, by folder
        self._loaded: set[Path] = set()  # folders read, whose record does not list what is in them yet

    def save(self, folder: Path, record: Record | None = None) -> None:
        """Writes what is new, and the index; see `ReplayBuffer.save`.

        `record` lists which files in the folder may be replaced. None: the folder gets a record of its own.
        """
        record = record or self._own_record(folder)
        if self._replay.transitions_added:
            record.claim(folder / INDEX)
            index = self.save_chunks(folder, record)
            write_index(folder / INDEX, index)
            record.remove(folder, keep=[INDEX, *(chunk.name for chunk in index["chunks"])])

    def _own_record(self, folder: Path) -> Record:
        """The record of a folder that this replay was saved to, or loaded from, or that holds no other replay."""
        record, at = Record(folder, LIST), folder.resolve()
        if at in self._loaded:
            record.note(folder / INDEX, *(folder / chunk.name for chunk in self._chunks[at]))
            self._loaded.remove(at)
        elif at not in self._chunks:
            if others := [path for path in folder.glob("*") if path.name == INDEX or CHUNK.fullmatch(path.name)]:
                raise UserError(f"{others[0]} belongs to another replay: save to an empty folder")
            self._chunks[at] = []
        return record

    def load(self, folder: Path) -> None:
        """Reads the index and its chunks; see `ReplayBuffer.load`."""
        self.load_chunks(folder, read_index(folder / INDEX))

    def save_chunks(self, folder: Path, record: Record) -> dict[str, Any]:
        """Writes what is not in the folder yet. Returns the index that `load_chunks` needs, as JSON can hold it."""
        replay, chunks = self._replay, list(self._chunks.get(folder.resolve(), []))
        unsaved, added = max(chunks[-1].end if chunks else 0, replay.oldest), replay.transitions_added
        spans = [(start, min(start + MAX_CHUNK, added)) for start in range(unsaved, added, MAX_CHUNK)]
        record.claim(*(folder / f"{start}_{end}.pt" for start, end in spans))
        for start, end in spans:
            chunks.append(self._save_chunk(folder, start, end, chunks[-1].frames_end if chunks else 0))
        first_frame = replay.first_frame(replay.oldest) if len(replay) else 0
        chunks = [chunk for chunk in chunks if chunk.end > replay.oldest or chunk.frames_end > first_frame]
        self._chunks[folder.resolve()] = chunks
        counters = {name: getattr(replay, name) for name in COUNTERS}
        return counters | {"first_frame": first_frame, "shapes": self._shapes(), "chunks": chunks}

    def _save_chunk(self, folder: Path, start: int, end: int, frames_start: int) -> Chunk:
        """Writes transitions, with their frames from `frames_start` on that are still there."""
        replay = self._replay
        rows = np.arange(start, end) % replay.capacity
        frames_start = max(frames_start, replay.frames_added - len(replay.frames))
        # The newest frames may belong to no transition that is left.
        last = end == replay.transitions_added
        frames_end = replay.frames_added if last else max(frames_start, int(replay.frame_ids[rows].max()) + 1)
        content = {field: torch.from_numpy(getattr(replay, field)[rows]) for field in replay.FIELDS}
        content["frames"] = replay.frames.index_select(0, self._slots(frames_start, frames_end)).cpu()
        name = f"{start}_{end}.pt"
        return Chunk(name, write_tensors(folder / name, content), end, frames_end)

    def load_chunks(self, folder: Path, index: dict[str, Any]) -> None:
        """Fills an empty replay from an index that `save_chunks` gave; errors as `ReplayBuffer.load`."""
        replay, chunks = self._replay, [Chunk(*chunk) for chunk in index["chunks"]]
        if replay.transitions_added:
            raise UserError("this replay holds transitions already: load into a new one")
        if index["shapes"] != self._shapes():
            raise UserError(f"{folder} holds a replay of shapes {index['shapes']}, not {self._shapes()}")
        stored, frames = index["transitions_added"] - index["oldest"], index["frames_added"] - index["first_frame"]
        if stored > replay.capacity or frames > len(replay.frames):
            room = f"{replay.capacity} and {len(replay.frames)}"
            raise UserError(
                f"{folder} holds {stored} transitions with {frames} frames, but this replay has room for {room}"
            )
        for chunk in chunks:
            content = read_tensors(folder / chunk.name, chunk.crc32)
            # Older frames of the chunk may not fit into this ring: they are not needed.
            newest = content["frames"][-len(replay.frames) :].to(replay.frames.device)
            replay.frames.index_copy_(0, self._slots(chunk.frames_end - len(newest), chunk.frames_end), newest)
            rows = np.arange(chunk.end - len(content["rewards"]), chunk.end) % replay.capacity
            for field in replay.FIELDS:
                getattr(replay, field)[rows] = content[field].numpy()
        for name in COUNTERS:
            setattr(replay, name, index[name])
        if chunks:
            _, _, _, next_obs, _ = replay.gather(np.array([replay.transitions_added - 1]))
            replay.last_obs = replay.split(next_obs[0].cpu().numpy())
        self._chunks[folder.resolve()] = chunks
        self._loaded.add(folder.resolve())

    def _shapes(self) -> list[list[int]]:
        """Shapes of frames, frame numbers and actions, as JSON has them."""
        replay = self._replay
        return [list(shape[1:]) for shape in (replay.frames.shape, replay.frame_ids.shape, replay.actions.shape)]

    def _slots(self, start: int, end: int) -> torch.Tensor:
        """Places in the ring of the frames of these numbers."""
        return torch.arange(start, end, device=self._replay.frames.device) % len(self._replay.frames)
