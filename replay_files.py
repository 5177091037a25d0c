"""A replay's files: chunks of transitions and frames, each written once, and an index that lists them."""

from __future__ import annotations

import os
import re
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch

from errors import UserError
from files import Written, read_json, read_tensors, reading, write_json, write_tensors, writing

if TYPE_CHECKING:
    from replay_buffer import ReplayBuffer

INDEX = "replay.json"
CHUNK = re.compile(r"[0-9]+_[0-9]+\.pt")  # the authors' replay uses the same names
MAX_CHUNK = 10_000  # transitions in a file; one file at a time is copied in memory


class Chunk(NamedTuple):
    """A file, and the numbers that follow its last transition and its last frame."""

    end: int
    frames_end: int
    file: Written


class ReplayFiles:
    """Saves and loads a replay, in any number of folders."""

    def __init__(self, replay: ReplayBuffer):
        self.name = uuid4().hex  # each file holds it, which tells this replay's files from another's
        self._replay = weakref.proxy(replay)  # in a circle its memory would only be freed by the garbage collector
        self._chunks: dict[Path, list[Chunk]] = {}  # written so far, by folder

    def save(self, folder: Path) -> None:
        """Writes what is new, and the index; see `ReplayBuffer.save`."""
        folder = folder.resolve()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / INDEX, *(() if folder in self._chunks else chunks_in(folder))):
            self._check_owned(path)
        if self._replay.transitions_added:
            index = self.save_chunks(folder)
            write_json(folder / INDEX, index, self.name)
            self.delete_unlisted(folder, index)

    def load(self, folder: Path) -> None:
        """Reads the index and its chunks; see `ReplayBuffer.load`."""
        self.load_chunks(folder, read_json(folder / INDEX), folder / INDEX)

    def save_chunks(self, folder: Path) -> dict[str, Any]:
        """Writes what is not in the folder yet. Returns the index that `load_chunks` needs, as JSON can hold it."""
        replay, chunks = self._replay, list(self._chunks.get(folder.resolve(), []))
        unsaved = max(chunks[-1].end if chunks else 0, replay.oldest)
        for start in range(unsaved, replay.transitions_added, MAX_CHUNK):
            chunks.append(self._save_chunk(folder, start, chunks[-1].frames_end if chunks else 0))
        needed = replay.first_frame(replay.oldest) if len(replay) else 0
        return {
            "replay": self.name,
            "shapes": self._shapes(),
            "oldest": replay.oldest,
            "draws": replay.draws,
            "chunks": [chunk for chunk in chunks if chunk.end > replay.oldest or chunk.frames_end > needed],
        }

    def _save_chunk(self, folder: Path, start: int, frames_start: int) -> Chunk:
        """Writes transitions from `start` on, with their frames from `frames_start` on that are still there."""
        replay = self._replay
        end = min(start + MAX_CHUNK, replay.transitions_added)
        rows = np.arange(start, end) % replay.capacity
        frames_start = max(frames_start, replay.frames_added - len(replay.frames))
        # The newest frames may belong to no transition that is left.
        last = end == replay.transitions_added
        frames_end = replay.frames_added if last else max(frames_start, int(replay.frame_ids[rows].max()) + 1)
        content = {"replay": self.name, "start": start, "frames_start": frames_start}
        content["frames"] = replay.frames.index_select(0, self._slots(frames_start, frames_end)).cpu()
        content |= {field: torch.from_numpy(getattr(replay, field)[rows]) for field in replay.FIELDS}
        path = folder / f"{start}_{end}.pt"
        self._check_owned(path)
        return Chunk(end, frames_end, write_tensors(path, content, self.name))

    def delete_unlisted(self, folder: Path, index: dict[str, Any]) -> None:
        """Deletes this replay's chunks that the index, which must already be on the disk, does not list."""
        self._chunks[folder.resolve()] = index["chunks"]
        listed = {chunk.file.name for chunk in index["chunks"]}
        for path in chunks_in(folder):
            if path.name not in listed and belongs_to(path, self.name):  # overwritten in the ring, or of a killed save
                with writing(path):
                    path.unlink()

    def load_chunks(self, folder: Path, index: dict[str, Any], index_path: Path) -> None:
        """Fills an empty replay from an index that `save_chunks` gave, read from `index_path`; errors as `load`."""
        replay = self._replay
        if replay.transitions_added:
            raise UserError("this replay holds transitions already: load into a new one")
        with reading(index_path):
            name, shapes, oldest, draws = (index[key] for key in ("replay", "shapes", "oldest", "draws"))
            chunks = [Chunk(end, frames_end, Written(*file)) for end, frames_end, file in index["chunks"]]
        if shapes != self._shapes():
            raise UserError(f"{folder} holds a replay of shapes {shapes}, not {self._shapes()}")
        for chunk in chunks:
            content = read_tensors(folder, chunk.file)
            if content["replay"] != name:
                raise UserError(f"{folder / chunk.file.name} belongs to another replay")
            # Of frames that do not fit into this ring, the newest: `_check_room` says later whether they suffice.
            newest = content["frames"][-len(replay.frames) :].to(replay.frames.device)
            replay.frames.index_copy_(0, self._slots(chunk.frames_end - len(newest), chunk.frames_end), newest)
            rows = np.arange(content["start"], chunk.end) % replay.capacity
            for field in replay.FIELDS:
                getattr(replay, field)[rows] = content[field].numpy()
        self.name, replay.draws = name, draws
        self._chunks[folder.resolve()] = chunks
        if chunks:
            self._check_room(folder, oldest, chunks[-1])

    def _check_room(self, folder: Path, oldest: int, last: Chunk) -> None:
        """Sets what follows from the last chunk. Raises UserError if the rings were too small for all chunks."""
        replay = self._replay
        replay.oldest, replay.transitions_added, replay.frames_added = oldest, last.end, last.frames_end
        frames = replay.frames_added - replay.first_frame(oldest)
        if len(replay) > replay.capacity or frames > len(replay.frames):
            room = f"more than this replay of {replay.capacity} can"
            raise UserError(f"{folder} holds {len(replay)} transitions, {room}")
        _, _, _, next_obs, _ = replay.gather(np.array([last.end - 1]))
        replay.last_obs = replay.split(next_obs[0].cpu().numpy())

    def _check_owned(self, path: Path) -> None:
        if os.path.lexists(path) and not belongs_to(path, self.name):
            raise UserError(f"{path} belongs to another replay, or is damaged: save to an empty folder")

    def _shapes(self) -> list[list[int]]:
        """Shapes of frames, frame numbers and actions, as JSON has them."""
        replay = self._replay
        return [list(shape[1:]) for shape in (replay.frames.shape, replay.frame_ids.shape, replay.actions.shape)]

    def _slots(self, start: int, end: int) -> torch.Tensor:
        """Places in the ring of the frames of these numbers."""
        return torch.arange(start, end, device=self._replay.frames.device) % len(self._replay.frames)


def chunks_in(folder: Path) -> list[Path]:
    """Files with a chunk's name."""
    return [path for path in folder.iterdir() if CHUNK.fullmatch(path.name)]


def belongs_to(path: Path, name: str) -> bool:
    """Whether an index or a chunk begins with the replay's name, as this replay's do."""
    with suppress(OSError), path.open("rb") as file:
        return name.encode() in file.read(4096)
    return False
