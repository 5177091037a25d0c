"""Videos of evaluation episodes."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import imageio.v2 as imageio

from signals import held_signals


class VideoRecorder:
    """Collects rendered frames and writes them as an mp4.

    Args:
        dir_name: folder of the videos, made when the first one is saved; None records nothing.
        height, width: of the picture in pixels, even.
        camera_id: of the simulator's cameras.
        fps: frames a second.
    """

    def __init__(
        self, dir_name: str | Path | None, height: int = 256, width: int = 256, camera_id: int = 0, fps: int = 30
    ):
        self.dir_name = None if dir_name is None else Path(dir_name)
        self.height = height
        self.width = width
        self.camera_id = camera_id
        self.fps = fps
        self.enabled = False
        self.frames: list[Any] = []

    def init(self, enabled: bool = True) -> None:
        """Begins a video, or turns recording off."""
        self.frames = []
        self.enabled = enabled and self.dir_name is not None

    def record(self, env: Any) -> None:
        """Adds a frame of what `env` shows now."""
        if self.enabled:
            frame = env.render(mode="rgb_array", height=self.height, width=self.width, camera_id=self.camera_id)
            self.frames.append(frame)

    def save(self, file_name: str) -> None:
        """Writes the frames to `file_name` (.mp4) in the recorder's folder; it appears whole or not at all."""
        if not self.enabled or self.dir_name is None:
            return
        write_video(self.dir_name / file_name, self.frames, self.fps)


def write_video(path: Path, frames: Iterable[Any], fps: int = 30, overwrite: bool = True) -> None:
    """Writes pictures (H, W, 3), uint8 with even sides, as an mp4, in a folder that is made if it is missing.

    The file appears whole or not at all.

    Raises:
        FileExistsError: the file is there and shall not be overwritten.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.mp4")
    # One writer thread: by default ffmpeg takes the cores that training needs. Blocks of 2: any even size is kept.
    options: dict[str, Any] = {"macro_block_size": 2, "output_params": ["-threads", "1"], "ffmpeg_log_level": "quiet"}
    try:
        writer: Any
        with imageio.get_writer(temporary, fps=fps, **options) as writer:
            for frame in frames:
                with held_signals():  # the first frame starts ffmpeg
                    writer.append_data(frame)
        if not is_whole(temporary):
            raise OSError("a full disk at its end is nothing that ffmpeg tells")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists by now, and is not overwritten")
        temporary.replace(path)
    except FileExistsError:
        raise
    except OSError as error:  # of many lines
        raise OSError(errno.EIO, "ffmpeg could not write it; is the disk full?", str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether an mp4 has its index and ends where its boxes do (ISO/IEC 14496-12: size and name, then content)."""
    content, offset, names = path.read_bytes(), 0, set()
    while offset + 8 <= len(content):
        names.add(content[offset + 4 : offset + 8])
        offset += max(8, int.from_bytes(content[offset : offset + 4]))
    return offset == len(content) and b"moov" in names
