"""Videos: they show what was rendered, and are whole or not there; what prevents them is told in one line."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from folders import largest_file

from errors import UserError
from video import VideoRecorder, write_video

NOISE = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), np.uint8)


def test_a_video_reads_back(tmp_path):
    shades, path = iter(range(20, 160, 20)), tmp_path / "new" / "video" / "100.mp4"
    env = SimpleNamespace(render=lambda: np.full((33, 41, 3), next(shades), np.uint8)[::-1])  # not contiguous
    recorder = VideoRecorder(path.parent, fps=12)
    recorder.init()
    for _ in range(7):
        recorder.record(env)
    recorder.save(path.name)
    assert list(path.parent.iterdir()) == [path]
    frames = iio.imread(path)
    assert frames.shape == (7, 32, 40, 3)  # an mp4 has no odd sides
    assert np.allclose(frames.mean(axis=(1, 2, 3)), 20 * np.arange(1, 8), atol=6)
    assert iio.immeta(path)["fps"] == 12


def test_a_recorder_that_is_off_renders_and_writes_nothing(tmp_path):
    for folder, enabled in ((None, True), (tmp_path / "video", False)):
        recorder = VideoRecorder(folder)
        recorder.init(enabled=enabled)
        recorder.record(None)
        recorder.save("0.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ffmpeg", "words"),
    [
        ("/no/such/ffmpeg", "No such file or directory: '/no/such/ffmpeg'"),
        ("sys.exit('Unknown encoder\\nNo encoder, no video')", "Unknown encoder"),
        ("sys.stdin.buffer.read(); sys.exit(7)", "status 7"),
        ("import os; os.kill(os.getpid(), 9)", "status -9"),
        ("sys.stderr.buffer.write(b'\\xff what'); sys.exit(1)", "\ufffd what"),
        ("sys.stdin.buffer.read()", "No such file or directory: .*mp4"),  # it says that all is well
        # Ctrl-C in a terminal goes to the program's process group: it ends a video that it has begun.
        (f"import os; sys.exit(str(os.getpgid(0) == {os.getpgid(0)}))", "False"),
    ],
)
def test_an_ffmpeg_that_fails(tmp_path, monkeypatch, ffmpeg, words):
    executable, path = tmp_path / "ffmpeg", tmp_path / "video" / "a.mp4"
    executable.write_text(f"#!{sys.executable}\nimport sys; {ffmpeg}")
    executable.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg if ffmpeg.startswith("/") else str(executable))
    with pytest.raises(UserError, match=f"^video {path} cannot be written: [^\n]*{words}[^\n]*$"):
        write_video(path, NOISE)
    assert not path.parent.exists()


def test_a_full_disk(tmp_path):
    """Wherever it is full: ffmpeg writes most of a short video at its end. Here files cannot grow beyond a size."""
    path = tmp_path / "a.mp4"
    write_video(path, NOISE)
    size = path.stat().st_size
    path.unlink()
    for limit in (10, 1000, size // 2, size - 600, size - 1):
        with largest_file(limit), pytest.raises(UserError, match=f"{path} cannot be written: ffmpeg "):
            write_video(path, NOISE)
        assert not list(tmp_path.iterdir())
    with largest_file(size):
        write_video(path, NOISE)
    assert len(iio.imread(path)) == 40


def test_errors_of_the_code_that_makes_frames_keep_their_traceback(tmp_path):
    def frames():
        yield NOISE[0]
        raise OSError(5, "an error of the renderer")

    with pytest.raises(OSError, match="of the renderer"):
        write_video(tmp_path / "a.mp4", frames())


@pytest.mark.parametrize("picture", [NOISE[0] / 255, NOISE[0, :32], NOISE[0, :, :, 0]])
def test_pictures_that_are_none(tmp_path, picture):
    with pytest.raises(UserError, match="of one shape"):
        write_video(tmp_path / "a.mp4", [NOISE[0], picture])
