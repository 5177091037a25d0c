"""Files that appear whole or not at all, and that show if they are not what was written."""

from __future__ import annotations

import errno
import io
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Written(NamedTuple):
    """A file's name, length in bytes and checksum."""

    name: str
    size: int
    crc32: int


def write_atomically(path: Path, content: bytes | memoryview, owner: str | None = None) -> None:
    """Puts a file in place once all of it is on the disk; what was there before stays until then.

    Args:
        owner: the unique name of who writes. Until then the file is `.OWNER.tmp`: what a killed write leaves, the
            owner's next write in the folder takes away. Without one the name is always a new one.

    Raises:
        OSError: it names the file.
    """
    temporary = path.with_name(f".{owner or uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def lock(path: Path) -> IO[str]:
    """Takes a file that only one process can have, until it is closed or the process ends, however that ends.

    Where the file system knows no locks, any process can have it.

    Raises:
        ValueError: another process has it.
        OSError: it cannot be made.
    """
    path.touch(exist_ok=True)
    file = path.open()  # only to read: a disk with files that are open to be written cannot be made read-only
    try:
        try:
            _flock(file)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            file.close()
            file = path.open("r+")  # NFS locks only what can be written (man 2 flock)
            _flock(file)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path.parent} is in use by another process: wait for its end, or stop it") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            file.close()
            raise
    return file


def _flock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of files to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
                raise
        finally:
            os.close(descriptor)


def write_tensors(path: Path, content: Any, owner: str | None = None) -> Written:
    """Writes tensors in dictionaries and lists, as `write_atomically` does."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as view:
        write_atomically(path, view, owner)
        return Written(path.name, len(view), zlib.crc32(view))


def read_tensors(folder: Path, written: Written, device: torch.device | str = "cpu") -> Any:
    """What `write_tensors` wrote; nothing that the file may contain is executed.

    Raises:
        ValueError: it is missing or not what was written; the message names it.
    """
    path = folder / written.name
    with naming(path):
        content = path.read_bytes()
        if len(content) != written.size:
            raise ValueError(f"it has {len(content)} bytes of {written.size}")
        if zlib.crc32(content) != written.crc32:
            raise ValueError("its content has changed")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    with naming(path):
        return json.loads(path.read_text())


def write_json(path: Path, content: Any, owner: str | None = None) -> None:
    """Writes a JSON file, as `write_atomically` does; arrays become lists."""
    write_atomically(path, (to_json(content) + "\n").encode(), owner)


def to_json(content: Any) -> str:
    """JSON's text; arrays become lists."""
    return json.dumps(content, indent=1, default=lambda array: array.tolist())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with reading a file into one error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or does not belong here: {reason}") from error
