"""A run's folder: which files in it are the run's, and its checkpoint, from which the run continues.

The checkpoint is all that the run needs to continue as if it had never stopped. `checkpoint.json` holds numbers and
names the files that belong to it: one of tensors, and the replay's chunks. It is replaced last, so that the checkpoint
it names is whole at every moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from errors import UserError
from files import Record, read_index, read_tensors, write_index, writing
from replay_files import CHUNK

VERSION = 3
LOGS = ("args.json", "starts.log", "train.log", "eval.log")
FOLDERS = ("tb", "video", "model", "buffer", "checkpoint")
STATES = ("state_0.pt", "state_1.pt")  # in turn: the next checkpoint does not replace what the last one names
INDEX = "checkpoint.json"
# What a run may write, except TensorBoard's events, whose names are new each time.
NAMES = re.compile(
    rf"{'|'.join(map(re.escape, LOGS + FOLDERS))}|video/[0-9]+\.mp4|model/.*_[0-9]+\.pt|buffer/replay\.json"
    rf"|(buffer|checkpoint)/{CHUNK.pattern}|checkpoint/({'|'.join(map(re.escape, STATES))})"
)


class Checkpoint:
    """The newest checkpoint of a run, in a folder of its own, which need not be there yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = folder / INDEX

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
        content = read_index(self.index)
        if content["version"] != VERSION:
            raise UserError(
                f"{self.index} is of version {content['version']} of this program, which is at version {VERSION}: "
                "resume it with the commit that began it (see starts.log), or choose another work_dir"
            )
        return content

    def write(self, args: dict[str, Any], **content: Any) -> None:
        """Writes the index, atomically."""
        write_index(self.index, {"version": VERSION, "args": args} | content)

    def files(self) -> list[Path]:
        """The files that belong to the checkpoint, its index among them."""
        content = self.read()
        names = (
            [content["state"][0], *(chunk[0] for chunk in content["replay"]["chunks"])] if content["progress"] else []
        )
        return [self.index, *(self.folder / name for name in names)]

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """Its tensors, on the device. Raises UserError if a file is missing or damaged; the message names it."""
        name, crc32 = self.read()["state"]
        return read_tensors(self.folder / name, crc32, device)


class WorkDir(Record):
    """The folder of a run, which need not be there yet, with the record of the run's files."""

    def __init__(self, path: Path):
        super().__init__(path, ".run_files")
        self.checkpoint = Checkpoint(path / "checkpoint")

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UserError if a run cannot start in the folder, resume the run there, or overwrite it."""
        path = self.path
        try:
            held, begun = self.held(), self.checkpoint.begun()
            strangers = self._strangers() if held else []
            check_folder(path, f"work_dir {path}")
        except OSError as error:
            raise UserError(f"work_dir {str(path)[:100]} cannot be used: {error.strerror}") from error
        if held and not resume and not overwrite:
            choice = "choose another, or --resume or --overwrite it"
            raise UserError(f"work_dir {path} holds a run already ({', '.join(held)}): {choice}")
        if strangers and not (resume and self.checkpoint.exists()):
            shown = ", ".join(strangers[:3]) + (", ..." if strangers[3:] else "")
            choice = "move them away, or choose another work_dir"
            raise UserError(f"work_dir {path} holds files that its run has not written ({shown}): {choice}")
        if resume and not begun and held not in ([], ["checkpoint"]):
            raise UserError(
                f"work_dir {path} holds {', '.join(held)}, but {self.checkpoint.index} is missing: "
                "there is nothing to resume; choose another work_dir, or --overwrite it"
            )

    def held(self) -> list[str]:
        """What of a run's files the folder holds."""
        return [name for name in (*LOGS, *FOLDERS) if os.path.lexists(self.path / name)]

    def _strangers(self) -> list[str]:
        """Names of files that the run has not written, but a new run would have to overwrite."""
        patterns = ("*", *(f"{folder}/*" for folder in FOLDERS))
        found = {path for pattern in patterns for path in self.path.glob(pattern) if not path.is_dir()}
        return sorted(filter(NAMES.fullmatch, (str(path.relative_to(self.path)) for path in found - self.listed())))

    def lock(self) -> IO[str]:
        """Makes the folder, and locks it until the returned file is closed or the process ends.

        Raises UserError if another process has it, UserError if the folder cannot be written.
        """
        path = self.path / ".lock"
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=True)
            file = path.open()  # only to read: a disk with files that are open to be written cannot be made read-only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:  # any other error: the file system has no locks
                file.close()
                raise UserError(f"{self.path} is in use by another process: wait for its end, or stop it") from None
        return file

    def begin(self, args: dict[str, Any], resume: bool) -> list[str]:
        """Starts a new run in the folder, and removes the previous run's files. Returns lines to print.

        `resume` says that a run was to be resumed if there was one.
        """
        held, index = self.held(), self.checkpoint.index
        self.claim(index)
        self.checkpoint.write(args, progress=None)  # from now on the new run's folder
        self.remove(self.path)
        for folder in (self.path / name for name in FOLDERS):
            self.remove(folder, keep=[INDEX])
            with suppress(OSError):  # it is not empty, or a link
                folder.rmdir()
        self.claim(*(self.path / name for name in LOGS))
        if not held:
            return [f"no run in {self.path} yet: it begins"] if resume else []
        why = "there is no checkpoint yet" if resume else "they are overwritten"
        gone = [name for name in held if name == "checkpoint" or name not in self.held()]
        return [f"removed from {self.path}: {', '.join(gone)}; {why}"]


def check_folder(folder: Path, name: str) -> None:
    """Raises UserError if the folder, which need not be there yet, cannot be made or written; `name` says which."""
    existing = existing_part(folder)
    if not existing.is_dir():
        raise UserError(f"{name} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{name} cannot be written: choose another")


def existing_part(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
