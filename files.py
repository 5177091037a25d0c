"""Atomic files with checksums, and a list of the files that a program wrote."""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(str(OSError(error.errno, error.strerror or str(error), str(path)))) from error


@contextmanager
def reading(path: Path, refusal: str = "is damaged or does not belong here: {}") -> Iterator[None]:
    """Turns any failure to read a file into a UserError that names it; `refusal` has a place for the reason."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} {refusal.format(reason)}") from error


def unfinished(path: Path) -> Path:
    """Where a file's new content is written, under a name that nobody else gives."""
    return path.with_name(f".{path.name}.sac_ae_tmp")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file, in a folder that is made if need be, once the new content is on the disk.

    Raises UserError, with the file's name, if the system refuses. What a killed write leaves, the next one replaces.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = unfinished(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Brings a folder's list of files to the disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def write_tensors(path: Path, content: Any) -> int:
    """Writes tensors in dictionaries and lists, atomically. Returns the file's checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as view:
        write_atomically(path, view)
        return zlib.crc32(view)


def read_tensors(path: Path, crc32: int, device: torch.device | str = "cpu") -> Any:
    """Reads what `write_tensors` wrote, onto the device. Executes nothing that the file contains.

    Raises UserError if the file is missing, or has another checksum; the message names it.
    """
    with reading(path):
        content = path.read_bytes()
        if zlib.crc32(content) != crc32:
            raise ValueError("its content has changed")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def read_state(path: Path, like: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Reads a saved network: tensors with the names and shapes of `like`. Raises UserError, with the file's name."""
    with (
        reading(path, "is damaged, or holds something else than a network's weights"),
        warnings.catch_warnings(action="ignore"),  # about files that are refused anyway
    ):
        state = torch.load(path, map_location=device, weights_only=True)
    with reading(path, "is not of this network: {}"):
        check_alike(state, like)
    return state


def check_alike(state: Any, like: Any) -> None:
    """Raises ValueError unless both hold tensors of the same names and shapes, in dictionaries."""
    theirs, mine = _shapes(state), _shapes(like)
    for path in mine | theirs:
        has, needed = (shapes.get(path, "is missing") for shapes in (theirs, mine))
        if has != needed:
            raise ValueError(f"{'/'.join(path) or 'it':.100} {has}; the network's {needed}")


def _shapes(state: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Shapes of all tensors in dictionaries, in words, by their keys."""
    if isinstance(state, Mapping):
        return {at: shape for key in state for at, shape in _shapes(state[key], (*path, str(key))).items()}
    plain = isinstance(state, Tensor) and state.is_floating_point() and state.layout == torch.strided
    return {path: f"has shape {tuple(state.shape)}" if plain else "is not a tensor of floating-point numbers"}


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or damaged; the message names it."""
    with reading(path):
        return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, atomically; arrays become lists."""
    write_atomically(path, (_to_json(content) + "\n").encode())


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=1, default=lambda array: array.tolist())


def read_index(path: Path) -> dict[str, Any]:
    """Reads what `write_index` wrote. Raises UserError if it is missing or damaged; the message names it."""
    index = read_json(path)
    with reading(path, "is damaged, or was not written by this program"):
        if index["crc32"] != zlib.crc32(_to_json(index["content"]).encode()):
            raise ValueError
        return index["content"]


def write_index(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file with its checksum, atomically; arrays become lists."""
    write_json(path, {"crc32": zlib.crc32(_to_json(content).encode()), "content": content})


class Record:
    """Keeps a list of the files that a program wrote to a folder and its subfolders. It replaces and removes no others.

    A file is listed before it is first written, so that what a killed process leaves is known, and until it is removed.

    Args:
        folder: need not be there yet.
        name: of the list, which has a line for each file.
    """

    def __init__(self, folder: Path, name: str):
        self.path, self._list = folder, folder / name

    def listed(self) -> set[Path]:
        """The writer's files, whether they are there or not."""
        if not self._list.exists():
            return set()
        with reading(self._list):
            return {self.path / name for name in self._list.read_text().splitlines() if name}

    def claim(self, *paths: Path) -> None:
        """Lists files that are about to be written. Raises UserError if one is there and is not listed."""
        for path in set(paths) - self.listed():
            if os.path.lexists(path):
                raise UserError(
                    f"{path} was not written by this program: move it away, then continue (a run: by --resume)"
                )
        self.note(*paths)

    def note(self, *paths: Path) -> None:
        """Lists files."""
        listed = self.listed()
        if not listed.issuperset(paths):
            self._write(listed.union(paths))

    def remove(self, folder: Path, keep: Collection[str] = ()) -> None:
        """Removes the listed files that lie in the folder itself, except those of the names to keep."""
        listed = self.listed()
        gone = {path for path in listed if path.parent == folder and path.name not in keep}
        for path in gone:
            with writing(path):
                path.unlink(missing_ok=True)
                unfinished(path).unlink(missing_ok=True)
        if gone:
            self._write(listed - gone)

    def _write(self, paths: set[Path]) -> None:
        write_atomically(self._list, "".join(f"{path.relative_to(self.path)}\n" for path in sorted(paths)).encode())
