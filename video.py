"""Videos of evaluation episodes."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np

from errors import MachineError
from support.signals import held_signals


class VideoRecorder:
    """Collects rendered frames and writes them as an mp4.

    Args:
        dir_name: folder of the videos, made when the first one is saved; None records nothing.
        height, width, camera_id: keywords for the environment's `render`; None leaves them out.
        fps: frames a second.
    """

    def __init__(
        self,
        dir_name: str | Path | None,
        height: int | None = None,
        width: int | None = None,
        camera_id: int | None = None,
        fps: int = 30,
    ):
        self.dir_name = None if dir_name is None else Path(dir_name)
        given = {"height": height, "width": width, "camera_id": camera_id}
        given = {name: value for name, value in given.items() if value is not None}
        self.keywords: dict[str, Any] = given and {"mode": "rgb_array"} | given
        self.fps = fps
        self.init(enabled=False)

    def init(self, enabled: bool = True) -> None:
        """Begins a video, or turns recording off."""
        self.frames: list[Any] = []
        self.enabled = enabled and self.dir_name is not None

    def record(self, env: Any) -> None:
        """Adds a picture (H, W, 3), uint8, of what `env` shows now."""
        if self.enabled:
            self.frames.append(env.render(**self.keywords))

    def save(self, file_name: str) -> None:
        """Writes the frames to `file_name` (.mp4) in the recorder's folder; it appears whole or not at all."""
        if self.enabled and self.dir_name is not None:
            write_video(self.dir_name / file_name, self.frames, self.fps)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 30, overwrite: bool = True) -> None:
    """Writes pictures (H, W, 3), uint8, as an mp4, in a folder that is made if it is missing.

    The file appears whole or not at all. An odd last row or column is cut, because the format has none.

    Raises:
        MachineError: it cannot be written, or is there and must not be overwritten.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.mp4")
    # One writer thread: by default ffmpeg takes the cores that training needs. Blocks of 2: any even size is kept.
    options: dict[str, Any] = {"macro_block_size": 2, "output_params": ["-threads", "1"], "ffmpeg_log_level": "quiet"}
    try:
        with _ffmpeg(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer: Any = imageio.get_writer(temporary, fps=fps, **options)
        try:
            for frame in frames:  # an error in making one is not ffmpeg's
                height, width = (side // 2 * 2 for side in frame.shape[:2])
                with _ffmpeg(path), held_signals():  # the first frame starts ffmpeg
                    writer.append_data(frame[:height, :width])
        finally:
            with _ffmpeg(path):
                writer.close()
        with _ffmpeg(path):
            if not is_whole(temporary):
                raise OSError("ffmpeg does not report a disk that is full at its end")
            if path.exists() and not overwrite:
                raise MachineError(f"{path} exists already, and is not overwritten")
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _ffmpeg(path: Path) -> Iterator[None]:
    """Turns ffmpeg's errors, which have many lines, into one."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"video {path}: ffmpeg could not write it; is the disk full?") from error


def is_whole(path: Path) -> bool:
    """Whether an mp4 has its index and ends where its boxes do (ISO/IEC 14496-12: size and name, then content)."""
    content, offset, names = path.read_bytes(), 0, set()
    while offset + 8 <= len(content):
        names.add(content[offset + 4 : offset + 8])
        offset += max(8, int.from_bytes(content[offset : offset + 4]))
    return offset == len(content) and b"moov" in names
