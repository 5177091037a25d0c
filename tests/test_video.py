"""Videos: they show what was rendered, and are whole or not there; what prevents them is told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import own_env
import pytest
from folders import largest_file
from runs import METHODS, read_log

import train
import video
from errors import UserError
from support.signals import STOPPING
from video import VideoRecorder, write_video

NOISE = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), np.uint8)


def test_a_video_reads_back(tmp_path):
    shades, path = iter(range(20, 160, 20)), tmp_path / "new" / "video" / f"{251 * 'a'}.mp4"  # the longest name
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


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A function that puts a Python program in the place of ffmpeg."""

    def put(code, interpreter=sys.executable):
        path = tmp_path / "bin" / "ffmpeg"
        path.parent.mkdir()
        path.write_text(f"#!{interpreter}\nimport os, sys, time\n{code}")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return put


def assert_not_written(path, words):
    with pytest.raises(UserError, match=rf"^video {path} cannot be written by \S*ffmpeg\S*: {words}$"):
        write_video(path, NOISE)
    assert not path.exists()


@pytest.mark.parametrize(("code", "words"), [
    ("sys.exit('No encoder\\nno video')", "it ends with status 1 and no video, and says: No encoder no video"),
    ("sys.stdin.buffer.read(); sys.exit(7)", ".* status 7 and no video, and says: nothing"),
    ("os.kill(os.getpid(), 9)", ".* status -9 .*"),
    ("sys.stderr.buffer.write(b'\\xff\\x1b[1m what\\r'); sys.exit(1)", r".* says: \\xff\[1m what"),
    ("print('?' * 1000000)", r".* status 0 and no video, and says: \?{300}"),
    ("", ".* status 0 and no video, and says: nothing"),
    ("time.sleep(60)", ".* timed out after 2 seconds"),
])  # fmt: skip
def test_an_ffmpeg_that_fails(tmp_path, monkeypatch, capfd, ffmpeg, code, words):
    monkeypatch.setattr(video, "TIMEOUT", 2)
    ffmpeg(code)
    assert_not_written(tmp_path / "video" / "a.mp4", words)
    assert capfd.readouterr() == ("", "")


def test_an_ffmpeg_that_cannot_start(tmp_path, monkeypatch, ffmpeg):
    ffmpeg("", interpreter="/no/such/python")
    assert_not_written(tmp_path / "a.mp4", "No such file or directory")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    assert_not_written(tmp_path / "a.mp4", "No such file or directory")


def test_a_run_goes_on_without_videos(tmp_path, monkeypatch, capsys):
    """After one line, not one for each evaluation."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    monkeypatch.setattr(train, "make_env", own_env.make_env)
    assert train.main([*own_env.RUN, *METHODS["sac_state"], "--save_video", "--work_dir", str(tmp_path)]) == 0
    reason = f"video {tmp_path}/video/0.mp4 cannot be written by /no/such/ffmpeg: No such file or directory"
    assert capsys.readouterr().err == f"warning: {reason}; the run goes on without videos\n"
    assert len(read_log(tmp_path / "eval.log")) >= 3


def test_no_process_can_be_started(tmp_path, monkeypatch):
    """imageio then says that there is no ffmpeg."""
    monkeypatch.setattr(imageio_ffmpeg._utils, "_get_ffmpeg_exe", imageio_ffmpeg._utils._get_ffmpeg_exe.__wrapped__)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: exec("raise BlockingIOError(11, 'try again')"))
    assert_not_written(tmp_path / "a.mp4", "try again")


def test_signals_to_all_processes_lose_no_video(tmp_path, monkeypatch, ffmpeg):
    """Ctrl-C in a terminal, or a scheduler's signals."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    ffmpeg(f"for number in {[*map(int, STOPPING)]}: os.kill(os.getpid(), number)\nos.execv({real!r}, sys.argv)")
    write_video(tmp_path / "a.mp4", NOISE)
    monkeypatch.undo()
    assert len(iio.imread(tmp_path / "a.mp4")) == 40


def test_a_long_video_may_take_longer(tmp_path, monkeypatch, ffmpeg):
    real = imageio_ffmpeg.get_ffmpeg_exe()
    monkeypatch.setattr(video, "TIMEOUT", 1)
    ffmpeg(f"time.sleep(2)\nos.execv({real!r}, sys.argv)")
    write_video(tmp_path / "a.mp4", np.zeros((20, 512, 512, 3), np.uint8))
    assert len(iio.imread(tmp_path / "a.mp4")) == 20


def test_videos_of_one_folder_at_once(tmp_path, monkeypatch):
    """By processes that have the same number, as in containers, or by threads."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    together = threading.Barrier(2)
    run = video.run_ffmpeg
    monkeypatch.setattr(video, "run_ffmpeg", lambda *args: (run(*args), together.wait(60)))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda name: write_video(tmp_path / name, NOISE), ("a.mp4", "b.mp4")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    assert [len(iio.imread(path)) for path in tmp_path.iterdir()] == [40, 40]


def test_videos_need_no_temporary_folder(tmp_path, monkeypatch):
    """Something may clean it during a long run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", tempfile.tempdir)
    write_video(tmp_path / "a.mp4", NOISE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk(tmp_path):
    """Wherever it is full: ffmpeg writes most of a short video at its end. Here files cannot grow beyond a size."""
    path = tmp_path / "a.mp4"
    write_video(path, NOISE)
    size = path.stat().st_size
    path.unlink()
    for limit in (10, size // 2, size - 1):
        with largest_file(limit):
            assert_not_written(path, ".*")
