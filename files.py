"""Files that appear whole or not at all, and that show if they are not what was written or what is expected."""

from __future__ import annotations

import errno
import io
import json
import os
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import MachineError, UserError


class Written(NamedTuple):
    """A file's name, length in bytes and checksum."""

    name: str
    size: int
    crc32: int


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file into a MachineError that names it."""
    try:
        yield
    except OSError as error:
        raise MachineError(str(OSError(error.errno, error.strerror or str(error), str(path)))) from error


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


def write_atomically(path: Path, content: bytes | memoryview, owner: str | None = None) -> None:
    """Replaces a file once the new content is on the disk. Raises MachineError, with its name, if the system refuses.

    The temporary file is `.OWNER.tmp`: the next write of this owner in the folder replaces what a killed one left.
    Without an owner it has a new name each time.
    """
    temporary = path.with_name(f".{owner or uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of files to the disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def write_tensors(path: Path, content: Any, owner: str | None = None) -> Written:
    """Writes tensors in dictionaries and lists; arguments and errors as `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as view:
        write_atomically(path, view, owner)
        return Written(path.name, len(view), zlib.crc32(view))


def read_tensors(folder: Path, written: Written, device: torch.device | str = "cpu") -> Any:
    """Reads what `write_tensors` wrote, onto the device. Executes nothing that the file contains.

    Raises UserError if the file is missing, or is not what was written; the message names it.
    """
    path = folder / written.name
    with reading(path):
        content = path.read_bytes()
        if len(content) != written.size:
            raise ValueError(f"it has {len(content)} bytes of {written.size}")
        if zlib.crc32(content) != written.crc32:
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


def check_alike(state: Any, like: Any, name: str = "it") -> None:
    """Raises ValueError unless both are tensors of one shape, or dictionaries of such under the same names."""
    if isinstance(like, Mapping):
        if not isinstance(state, Mapping):
            raise ValueError(f"{name} is not a dictionary of weights")
        if different := sorted(map(str, state.keys() ^ like.keys())):
            key = different[0]
            raise ValueError(f"{name} lacks {key}" if key in like else f"{name} has {key:.100}, unlike the network")
        for key in like:
            check_alike(state[key], like[key], key)
    elif not isinstance(state, Tensor) or not state.is_floating_point() or state.layout != torch.strided:
        raise ValueError(f"{name} is not a tensor of floating-point numbers")
    elif state.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}, the network's has {tuple(like.shape)}")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or damaged; the message names it."""
    with reading(path):
        return json.loads(path.read_text())


def write_json(path: Path, content: Any, owner: str | None = None) -> None:
    """Writes a JSON file; arrays become lists. Arguments and errors as `write_atomically`."""
    write_atomically(path, (to_json(content) + "\n").encode(), owner)


def to_json(content: Any) -> str:
    """JSON's text; arrays become lists."""
    return json.dumps(content, indent=1, default=lambda array: array.tolist())
