"""Videos of evaluation episodes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from errors import UserError
from files import write_atomically
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
        self.dir_name, self.fps = dir_name, fps
        given = {"height": height, "width": width, "camera_id": camera_id}
        given = {name: value for name, value in given.items() if value is not None}
        self.keywords: dict[str, Any] = given and {"mode": "rgb_array"} | given
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
            write_video(Path(self.dir_name) / file_name, self.frames, self.fps)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 30, overwrite: bool = True) -> None:
    """Writes pictures (H, W, 3), uint8, as an mp4, in a folder that is made if it is missing.

    The file appears whole or not at all. An odd last row or column is cut, because the format has none. All pictures
    are held in memory, and signals wait until they are encoded.

    Raises:
        UserError: it cannot be written, or is there and must not be overwritten.
    """
    pictures = list(frames)
    # One thread: by default ffmpeg takes the cores that training needs.
    output = ["-threads", "1", "-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2"]
    options: dict[str, Any] = {"fps": fps, "output_params": output, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
    try:
        with held_signals():
            content = iio.imwrite("<bytes>", pictures, extension=".mp4", **options)
        if not is_whole(content):  # ffmpeg's exit status is lost
            raise OSError("the file is not whole")
    except OSError as error:
        raise UserError(f"video {path}: ffmpeg cannot write its temporary file; is the disk full?") from error
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already, and is not overwritten")
    write_atomically(path, content)


def is_whole(content: bytes) -> bool:
    """Whether an mp4 ends with its index, which ffmpeg writes last (ISO/IEC 14496-12: size, name, content)."""
    start = content.rfind(b"moov") - 4
    return int.from_bytes(content[start : start + 4]) == len(content) - start
