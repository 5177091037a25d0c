"""Videos of evaluation episodes."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np

from errors import UserError
from files import write_atomically


class VideoRecorder:
    """Collects rendered frames and writes them as an mp4 of `fps` frames a second.

    `dir_name` is the folder of the videos, made when the first one is saved; None records nothing.
    """

    def __init__(self, dir_name: str | Path | None, fps: int = 30):
        self.dir_name, self.fps = dir_name, fps
        self.init(enabled=False)

    def init(self, enabled: bool = True) -> None:
        """Begins a video, or turns recording off."""
        self.frames: list[Any] = []
        self.enabled = enabled and self.dir_name is not None

    def record(self, env: Any) -> None:
        """Adds a picture (H, W, 3), uint8, of what `env` shows now."""
        if self.enabled:
            self.frames.append(env.render())

    def save(self, file_name: str) -> None:
        """Writes the frames to `file_name` (.mp4) in the recorder's folder. Raises UserError, as `write_video`."""
        if self.enabled and self.dir_name is not None:
            write_video(Path(self.dir_name) / file_name, self.frames, self.fps)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 30, overwrite: bool = True) -> None:
    """Writes pictures of one shape (H, W, 3), uint8, as an mp4, in a folder that is made if it is missing.

    The file appears whole or not at all. An odd last row or column is cut, because the format has none. Raises
    UserError, which says why, if the file cannot be written, or is there and must not be overwritten.
    """
    pictures = [np.ascontiguousarray(frame) for frame in frames]  # an error here is not ffmpeg's
    height, width = pictures[0].shape[:2]
    if any(picture.shape != (height, width, 3) or picture.dtype != np.uint8 for picture in pictures):
        raise UserError(f"video {path} cannot be written: its pictures must be of one shape (H, W, 3), uint8")
    try:
        content = run_ffmpeg(pictures, f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps}".split())
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"video {path} cannot be written: {error}") from error
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already, and is not overwritten")
    write_atomically(path, content)


def run_ffmpeg(pictures: Iterable[np.ndarray], layout: list[str]) -> bytes:
    """An mp4 of pictures. Raises ImportError, OSError or RuntimeError, with the reason.

    imageio's own writer does not tell: it ignores ffmpeg's exit status, and so returns parts of a video.
    """
    import imageio_ffmpeg  # only here: states need no videos

    # One thread: by default ffmpeg takes the cores that training needs.
    output = ["-pix_fmt", "yuv420p", "-vf", "crop=trunc(iw/2)*2:trunc(ih/2)*2", "-threads", "1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *layout, "-i", "-", *output]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        # In a process group of its own, which Ctrl-C does not reach.
        with subprocess.Popen([*command, str(file)], stdin=PIPE, stderr=PIPE, process_group=0) as ffmpeg:
            with suppress(BrokenPipeError):  # it has ended, and says why
                for picture in pictures:
                    ffmpeg.stdin.write(picture.data)  # type: ignore[union-attr]
            said = ffmpeg.communicate()[1].decode(errors="replace").split("\n")
        if ffmpeg.returncode != 0:
            raise RuntimeError(next(filter(None, said), f"ffmpeg ends with status {ffmpeg.returncode}"))
        return file.read_bytes()
