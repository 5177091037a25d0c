"""Which files in a `work_dir` its run has written: nothing else is removed or overwritten.

The run lists its files in `.run_files`, a name a line, before it writes them. What its replay writes bears the replay's
name. The authors' script and older versions of this one have no list: there, beside an `args.json`, every file that is
named as a run names its files is taken for the run's.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from replay_buffer import files_of

LIST = ".run_files"
LOGS = ("args.json", "starts.log", "train.log", "eval.log")
FOLDERS = ("tb", "video", "model", "buffer", "checkpoint")
_CHECKPOINT = "checkpoint/checkpoint.json"
# What the names of a run's files look like.
_NAMES = re.compile(
    rf"{'|'.join(map(re.escape, LOGS))}|tb/events\.out\.tfevents\..*|video/[0-9]+\.mp4"
    r"|model/(actor|critic|decoder|target)_[0-9]+\.pt|(buffer|checkpoint)/[0-9]+_[0-9]+\.pt|buffer/replay\.json"
    r"|checkpoint/state_.*\.pt"
    r"|(buffer|checkpoint)/\.([0-9]+_[0-9]+\.pt|state_.*\.pt|replay\.json|checkpoint\.json)\.tmp"  # of older versions
)
_REPLAY = re.compile(r"checkpoint/\.([0-9a-f]+)\.tmp")  # listed as the first thing that a replay of this name writes


def begin_list(work_dir: Path, replay: str) -> None:
    """Starts the list of a new run, whose replay has this name, in place of the list of the one before."""
    _write_list(work_dir, (*LOGS, f"checkpoint/.{replay}.tmp"))


def claim(work_dir: Path, *names: str) -> None:
    """Lists files, named from the folder on, that the run is about to write.

    Raises:
        FileExistsError: one of them is there and not the run's.
    """
    listed = _listed(work_dir)
    for name in names:
        if name not in listed and os.path.lexists(work_dir / name):
            raise FileExistsError(f"{work_dir / name} was not written by this run: move it away, then --resume goes on")
    note(work_dir, *names)


def note(work_dir: Path, *names: str) -> None:
    """Lists files that the run has written, on lines of their own even if a full disk has cut the last one."""
    with (work_dir / LIST).open("a") as file:
        file.writelines(f"\n{name}\n" for name in names)


def adopt(work_dir: Path, replay: str) -> None:
    """Lists what a run has written that has no list, and that the replay of this name will write there."""
    if not (work_dir / LIST).exists():
        _write_list(work_dir, [str(path.relative_to(work_dir)) for path in written(work_dir)])
    note(work_dir, f"checkpoint/.{replay}.tmp")


def written(work_dir: Path) -> list[Path]:
    """The files that the run in a folder has written, but for `checkpoint.json`, and for the list itself."""
    if (work_dir / LIST).exists():
        listed = _listed(work_dir)
        found = {work_dir / name for name in listed if os.path.lexists(work_dir / name)}
        for match in filter(None, map(_REPLAY.fullmatch, listed)):
            for folder in (work_dir, *(work_dir / name for name in FOLDERS)):
                found.update(files_of(folder, match[1]) if folder.is_dir() else ())
        found.discard(work_dir / _CHECKPOINT)
    elif (work_dir / "args.json").is_file() or (work_dir / _CHECKPOINT).is_file():
        found = {path for path in _files(work_dir) if _NAMES.fullmatch(str(path.relative_to(work_dir)))}
    else:
        found = set()
    return sorted(path for path in found if path.is_symlink() or not path.is_dir())


def strangers(work_dir: Path) -> list[str]:
    """Names of what its run has not written in a folder, but would have to overwrite if it began anew."""
    mine, names = set(written(work_dir)), []
    for path in _files(work_dir):
        name = str(path.relative_to(work_dir))
        wanted = name in FOLDERS or (_NAMES.fullmatch(name) and not name.startswith("tb/") and path.suffix != ".tmp")
        if wanted and path not in mine:
            names.append(name)
    return names


def remove(work_dir: Path, paths: list[Path]) -> list[str]:
    """Removes files, and what folders of a run that leaves empty; names of what stays in those folders."""
    for path in paths:
        path.unlink(missing_ok=True)
    for name in FOLDERS:
        with suppress(OSError):  # it is not empty, or a link
            (work_dir / name).rmdir()
    stay = (str(path.relative_to(work_dir)) for path in _files(work_dir) if path.parent != work_dir)
    return [name for name in stay if name != _CHECKPOINT]


def _write_list(work_dir: Path, names: Iterable[str]) -> None:
    """Whole or not at all, but for a loss of power; what a list lacks is not removed, so the disk is not awaited."""
    temporary = work_dir / f".{uuid.uuid4().hex}.tmp"
    temporary.write_text("".join(f"{name}\n" for name in names))
    temporary.replace(work_dir / LIST)


def _listed(work_dir: Path) -> set[str]:
    path = work_dir / LIST
    return set(filter(None, path.read_text().splitlines())) if path.exists() else set()


def _files(work_dir: Path) -> list[Path]:
    """What lies in a run's folder and in those that a run makes in it, these themselves left out."""
    folders = [work_dir / name for name in FOLDERS if (work_dir / name).is_dir()]
    return sorted(path for folder in (work_dir, *folders) for path in folder.iterdir() if path not in folders)
