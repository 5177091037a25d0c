"""A run's checkpoint: all that it needs to continue as if it had never stopped.

`checkpoint.json` holds numbers and names the files that belong to it: one of tensors, and the replay's chunks. It is
replaced last, so that the checkpoint it names is whole at every moment.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from files import Written, read_json, read_tensors, sync_folder, to_json, write_json, write_tensors, writing
from replay_buffer import ReplayBuffer

VERSION = 2


class Checkpoint:
    """The newest checkpoint of a run, in a folder of its own, which need not be there yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = folder / "checkpoint.json"
        self._state: str | None = None  # the file of tensors that the index names

    def begin(self, args: dict[str, Any], owner: str) -> None:
        """Starts a new run with these flags, atomically. Files bear the name of its replay, `owner`."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write({"version": VERSION, "args": args, "progress": None}, owner)
            sync_folder(self.folder.parent)

    def begun(self) -> bool:
        """Whether a run has started in the folder, with a checkpoint or without one yet."""
        return os.path.lexists(self.index)

    def exists(self) -> bool:
        """Whether there is a checkpoint. Raises UserError, with a file's name, if that cannot be read."""
        return self.begun() and self.read()["progress"] is not None

    def read(self) -> dict[str, Any]:
        """`args`, `progress` and more; `progress` is None if there is no checkpoint yet.

        Raises UserError if the file is missing, damaged, or of another version; the message names it.
        """
        index = read_json(self.index)
        if not isinstance(index, dict) or set(index) != {"crc32", "content"}:
            raise UserError(f"{self.index} is not a checkpoint")
        content = index["content"]
        if index["crc32"] != zlib.crc32(to_json(content).encode()):
            raise UserError(f"{self.index} is damaged: its content has changed")
        if content["version"] != VERSION:
            raise UserError(
                f"{self.index} is of version {content['version']} of this program, which is at version {VERSION}: "
                "resume it with the commit that began it (see starts.log), or choose another work_dir"
            )
        return content

    def write(
        self, args: dict[str, Any], numbers: dict[str, Any], tensors: dict[str, Any], replay: ReplayBuffer
    ) -> None:
        """Writes a checkpoint, of the replay only what is new, and then removes what only the one before it needed.

        Args:
            args: the flags of the run.
            numbers: `progress`, and whatever else JSON can hold; arrays become lists.
            tensors: in dictionaries and lists.

        Raises MachineError if it cannot be written; the checkpoint before it is still there.
        """
        replay_index = replay.files.save_chunks(self.folder)
        # Two names in turn: the next write replaces what a killed one left.
        owner = replay.files.name
        name, other = (f"state_{owner}_{turn}.pt" for turn in (0, 1))
        name = other if name == self._state else name
        state = write_tensors(self.folder / name, tensors, owner)
        self._write({"version": VERSION, "args": args, "state": state, "replay": replay_index} | numbers, owner)
        replay.files.delete_unlisted(self.folder, replay_index)
        if self._state is not None:
            with writing(self.folder / self._state):
                (self.folder / self._state).unlink(missing_ok=True)
        self._state = name

    def _write(self, content: dict[str, Any], owner: str) -> None:
        write_json(self.index, {"crc32": zlib.crc32(to_json(content).encode()), "content": content}, owner)

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """Its tensors, on the device. Raises UserError if a file is missing or damaged; the message names it."""
        return read_tensors(self.folder, Written(*self.read()["state"]), device)

    def load(self, replay: ReplayBuffer, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `read` gives, and the checkpoint's tensors. Fills the replay, which must be empty.

        Raises UserError if a file, which is named, is missing, damaged or foreign, or if the replay is too small.
        """
        content, tensors = self.read(), self.tensors(device)
        replay.files.load_chunks(self.folder, content["replay"], self.index)
        self._state = content["state"][0]
        return content, tensors
