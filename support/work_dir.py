"""A run's folder: which files in it are the run's. Nothing else is removed or overwritten.

The run lists its files in `.run_files`, a name a line, before it writes them. What its replay and its checkpoints write
bears the replay's name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from errors import UserError
from files import write_atomically, writing
from replay_files import CHUNK, INDEX, belongs_to
from support.checkpoint import Checkpoint

LIST = ".run_files"
LOGS = ("args.json", "starts.log", "train.log", "eval.log")
FOLDERS = ("tb", "video", "model", "buffer", "checkpoint")
CHECKPOINT = "checkpoint/checkpoint.json"
# What a run may write, except TensorBoard's events, whose names are new each time.
NAMES = re.compile(
    rf"{'|'.join(map(re.escape, LOGS + FOLDERS))}|video/[0-9]+\.mp4|model/.*_[0-9]+\.pt|checkpoint/state_.*\.pt"
    rf"|buffer/{re.escape(INDEX)}|(buffer|checkpoint)/{CHUNK.pattern}"
)
REPLAY = re.compile(r"checkpoint/\.([0-9a-f]+)\.tmp")  # listed as the first file that a replay of this name writes


class WorkDir:
    """The folder of a run, which need not be there yet. Files are named relative to it."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = Checkpoint(path / "checkpoint")

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UserError if a run cannot start in the folder, resume the run there, or overwrite it."""
        path = self.path
        try:
            held, begun = self.held(), self.checkpoint.begun()
            strangers = self.strangers() if held else []
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
                f"work_dir {path} holds {', '.join(held)}, but {CHECKPOINT} is missing: "
                "there is nothing to resume; choose another work_dir, or --overwrite it"
            )

    def held(self) -> list[str]:
        """What of a run's files the folder holds."""
        return [name for name in (*LOGS, *FOLDERS) if os.path.lexists(self.path / name)]

    def lock(self) -> IO[str]:
        """Makes the folder, and locks it until the returned file is closed or the process ends.

        Raises UserError if another process has it, MachineError if the folder cannot be written.
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

    def begin(self, args: dict[str, Any], replay: str, resume: bool) -> list[str]:
        """Makes the folder a new run's, and removes what the run before has written; lines to print.

        `replay` is the name of the new run's replay; `resume` says that a run was to be resumed if there was one.
        """
        held, first = self.held(), f"checkpoint/.{replay}.tmp"
        self.note(first)
        old = self.written()
        self.checkpoint.begin(args, replay)  # from now on the folder holds a run that has no checkpoint yet
        for path in old:
            with writing(path):
                path.unlink(missing_ok=True)
        for name in FOLDERS:
            with suppress(OSError):  # it is not empty, or a link
                (self.path / name).rmdir()
        stay = [name for name in self._names() if "/" in name and name != CHECKPOINT]
        write_atomically(self.path / LIST, "".join(f"{name}\n" for name in (*LOGS, first)).encode(), replay)
        lines = [f"left in {self.path}, not written by its run: {', '.join(stay)}"] if stay else []
        if not held:
            return [f"no run in {self.path} yet: it begins", *lines] if resume else lines
        why = "there is no checkpoint yet" if resume else "they are overwritten"
        gone = [name for name in held if name == "checkpoint" or name not in self.held()]
        return [f"removed from {self.path}: {', '.join(gone)}; {why}", *lines]

    def claim(self, *names: str) -> None:
        """Lists files that the run is about to write. Raises UserError if one of them is there and not the run's."""
        listed = self._listed()
        for name in names:
            if name not in listed and os.path.lexists(self.path / name):
                raise UserError(
                    f"{self.path / name} was not written by this run: move it away, then --resume continues"
                )
        self.note(*names)

    def note(self, *names: str) -> None:
        """Lists files that are the run's, each on a line of its own even if a full disk has cut the last one."""
        with writing(self.path / LIST), (self.path / LIST).open("a") as file:
            file.writelines(f"\n{name}\n" for name in names)

    def written(self) -> list[Path]:
        """The files that the run in the folder has written, except `checkpoint.json` and the list."""
        listed = self._listed()
        replays = [match[1] for match in map(REPLAY.fullmatch, listed) if match]
        found = [name for name in self._names() if name in listed or self._bears(name, replays)]
        paths = [self.path / name for name in found if name != CHECKPOINT]
        return [path for path in paths if path.is_symlink() or not path.is_dir()]

    def strangers(self) -> list[str]:
        """Names of files that the run has not written, but a new run would have to overwrite."""
        mine = {str(path.relative_to(self.path)) for path in self.written()}
        return [name for name in self._names() if name not in mine and NAMES.fullmatch(name)]

    def _listed(self) -> set[str]:
        path = self.path / LIST
        return set(path.read_text().splitlines()) if path.exists() else set()

    def _names(self) -> list[str]:
        """Names of the entries of the folder and of a run's folders in it, without these folders themselves."""
        folders = [self.path / name for name in FOLDERS if (self.path / name).is_dir()]
        paths = sorted(path for folder in (self.path, *folders) for path in folder.iterdir() if path not in folders)
        return [str(path.relative_to(self.path)) for path in paths]

    def _bears(self, name: str, replays: list[str]) -> bool:
        """Whether a file has a replay's name in its own, or, as its index and chunks have, in its content."""
        path = self.path / name
        holds = path.name == INDEX or CHUNK.fullmatch(path.name) is not None
        return any(replay in path.name or (holds and belongs_to(path, replay)) for replay in replays)


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
