"""Files that appear whole or not at all, with checksums. A failure is one line that names the file."""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(str(OSError(error.errno, error.strerror or str(error), str(path)))) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any failure to read a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or does not belong here: {reason:.300}") from error


def unfinished(path: Path) -> Path:
    """Where a file's new content is written, under a name that nobody else gives."""
    return path.with_name(f".{path.name}.sac_ae_tmp")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file once the new content is on the disk; makes its folder. Raises UserError, which names the file."""
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

    Raises UserError, which names the file, if it is missing or has another checksum: PyTorch would load a changed bit.
    """
    with reading(path):
        content = path.read_bytes()
        if zlib.crc32(content) != crc32:
            raise ValueError("its content has changed")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


@contextmanager
def loading(path: Path, device: torch.device) -> Iterator[Any]:
    """What `torch.save` wrote, on the device. Executes nothing that the file contains.

    Raises UserError, which names the file, if it cannot be read, or if the block, which loads it, fails.
    """
    with reading(path), warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
        yield torch.load(path, map_location=device, weights_only=True)


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError, which names it, if it is missing or damaged."""
    with reading(path):
        return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, atomically; arrays become lists."""
    write_atomically(path, (_to_json(content) + "\n").encode())


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=1, default=lambda array: array.tolist())


def write_index(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file with its checksum, atomically; arrays become lists."""
    write_json(path, {"crc32": zlib.crc32(_to_json(content).encode()), "content": content})


def read_index(path: Path) -> dict[str, Any]:
    """Reads what `write_index` wrote. Raises UserError, which names the file, if it is missing or damaged."""
    index = read_json(path)
    with reading(path):
        if index["crc32"] != zlib.crc32(_to_json(index["content"]).encode()):
            raise ValueError("its content has changed")
        return index["content"]
