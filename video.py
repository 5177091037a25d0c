"""Videos of evaluation episodes."""

from __future__ import annotations

import signal
import subprocess
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, TimeoutExpired
from typing import Any

import numpy as np

from errors import UserError
from support.signals import STOPPING

TIMEOUT = 120  # seconds that ffmpeg may take, and one more for each MB: a slow core has 6 MB of noise a second


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
    pictures = list(frames)
    height, width = pictures[0].shape[:2]
    if any(picture.shape != (height, width, 3) or picture.dtype != np.uint8 for picture in pictures):
        raise UserError(f"video {path} cannot be written: its pictures must be of one shape (H, W, 3), uint8")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already, and is not overwritten")
    temporary, ffmpeg = path.with_name(f".{uuid.uuid4().hex}.sac_ae_tmp"), "ffmpeg"
    try:
        import imageio_ffmpeg  # only here: states need no videos

        with suppress(RuntimeError):  # it has tried some, and does not say why they failed
            ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        path.parent.mkdir(parents=True, exist_ok=True)
        run_ffmpeg(ffmpeg, np.concatenate(pictures, axis=None), f"-s {width}x{height} -r {fps}", temporary)
        temporary.replace(path)
    except (ImportError, OSError, RuntimeError, TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"video {path} cannot be written by {ffmpeg}: {reason}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def run_ffmpeg(ffmpeg: str, pixels: np.ndarray, layout: str, file: Path) -> None:
    """Writes an mp4 of pixels (N * H * W * 3,). Raises OSError, RuntimeError or TimeoutExpired, with the reason.

    imageio's own writer does not tell: it ignores ffmpeg's exit status, and so leaves parts of a video.
    """
    source = f"-loglevel error -f rawvideo -pix_fmt rgb24 {layout} -i - -vf crop=trunc(iw/2)*2:trunc(ih/2)*2"
    # One thread: by default ffmpeg takes the cores that training needs.
    command = [ffmpeg, *f"{source} -pix_fmt yuv420p -threads 1 -y -f mp4".split(), str(file.absolute())]
    # ffmpeg inherits this: it finishes the video even if Ctrl-C or a scheduler sends a signal to all processes.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with process:
        try:
            said, _ = process.communicate(pixels.data, TIMEOUT + pixels.nbytes // 10**6)  # type: ignore[arg-type]  # takes any buffer
        finally:
            process.kill()  # if it hangs
    if process.returncode != 0 or not file.exists():
        words = said.decode(errors="backslashreplace").split()
        shown = " ".join("".join(filter(str.isprintable, word)) for word in words) or "nothing"
        raise RuntimeError(f"it ends with status {process.returncode} and no video, and says: {shown:.300}")
