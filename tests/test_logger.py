"""Console lines, log files, TensorBoard events and videos, read back."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import reader

from errors import UserError
from logger import Logger
from video import VideoRecorder

ROOT = Path(__file__).parent.parent


def read_events(folder):
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    return events.Reload()


def test_train_line(tmp_path, capsys):
    logger = Logger(tmp_path, use_tb=False)
    for value in (1.0, 2.0, 6.0):
        logger.log("train_critic/loss", torch.tensor(value), 999)
    logger.log("train_actor/loss", torch.tensor(-0.5, dtype=torch.float64), 999)
    logger.log("train_ae/ae_loss", 0.25, 999)
    logger.log("train/batch_reward", torch.tensor(0.125), 999)
    logger.log("train/episode", 4, 1000)
    logger.log("train/duration", 0.8123, 1000)
    logger.log("train/episode_reward", 21.16758, 1000)
    logger.dump(1000)
    assert capsys.readouterr().out == (
        "| train | E: 4 | S: 1000 | D: 0.8 s | R: 21.1676 | BR: 0.1250"
        " | ALOSS: -0.5000 | CLOSS: 3.0000 | RLOSS: 0.2500\n"
    )
    record = json.loads((tmp_path / "train.log").read_text())
    assert record == {
        "critic_loss": 3.0,
        "actor_loss": -0.5,
        "ae_loss": 0.25,
        "batch_reward": 0.125,
        "episode": 4,
        "duration": 0.8123,
        "episode_reward": 21.16758,
        "step": 1000,
    }


def test_tensors_in_host_memory_are_not_kept(tmp_path):
    """Kept until the line, they would have a thousand updates of a line take 40 GB, for want of connected memory."""
    logger = Logger(tmp_path, use_tb=False)
    loss = torch.tensor(0.1, dtype=torch.float64)
    kept = weakref.ref(loss)
    logger.log("train_critic/loss", loss, 1)
    del loss
    assert kept() is None
    logger.dump(1)
    assert json.loads((tmp_path / "train.log").read_text())["critic_loss"] == 0.1


def test_line_before_the_first_update(tmp_path, capsys):
    logger = Logger(tmp_path, use_tb=False)
    for key, value in (("train/episode", 1), ("train/duration", 0.8), ("train/episode_reward", 0.0)):
        logger.log(key, value, 1000)
    logger.dump(1000)
    assert capsys.readouterr().out == (
        "| train | E: 1 | S: 1000 | D: 0.8 s | R: 0.0000 | BR: 0.0000 | ALOSS: 0.0000 | CLOSS: 0.0000 | RLOSS: 0.0000\n"
    )


def test_eval_line_and_means(tmp_path, capsys):
    logger = Logger(tmp_path, use_tb=False)
    logger.log("eval/episode_reward", 20.0, 0)
    logger.log("eval/episode_reward", 22.3352, 0)
    logger.dump(0)
    logger.log("eval/episode_reward", 10.0, 10000, n=4)  # the sum of four
    logger.dump(10000)
    assert capsys.readouterr().out == "| eval | S: 0 | ER: 21.1676\n| eval | S: 10000 | ER: 2.5000\n"
    records = [json.loads(line) for line in (tmp_path / "eval.log").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 10000]
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_colour_only_on_a_terminal(tmp_path, terminal, no_color, coloured):
    program = (
        "from logger import Logger\n"
        f"logger = Logger({str(tmp_path)!r}, use_tb=False)\n"
        "logger.log('eval/episode_reward', 1.0, 0)\n"
        "logger.dump(0)"
    )
    environment = {"PATH": "/usr/bin:/bin", "TERM": "xterm"} | ({"NO_COLOR": "1"} if no_color else {})
    with reader(terminal) as (stdout, read):
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=stdout, env=environment, check=True)
    line = read()
    assert ("\x1b[" in line) == coloured
    assert re.sub("\x1b\\[\\d+m", "", line) == "| eval | S: 0 | ER: 1.0000\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_losses_are_named(tmp_path, bad):
    logger = Logger(tmp_path, use_tb=False)
    for step, value in ((7, 1.0), (8, bad), (9, 2.0)):
        logger.log("train_critic/loss", torch.tensor(value), step)
    with pytest.raises(UserError, match=r"train_critic/loss .* step 8"):
        logger.check_losses()
    with pytest.raises(UserError, match=r"train_critic/loss .* step 8"):
        logger.dump(10)
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize("key", ["loss", "training/loss"])
def test_a_key_of_no_section_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"the key '{key}' begins with neither train nor eval"):
        Logger(tmp_path, use_tb=False).log(key, 1.0, 0)


def test_tensorboard_events(tmp_path):
    logger = Logger(tmp_path, use_tb=True)
    logger.log("train_critic/loss", torch.tensor(1.0), 4)
    logger.log("train_critic/loss", torch.tensor(2.0), 5)
    logger.dump(5)
    layer = torch.nn.Linear(2, 3)
    layer(torch.ones(1, 2)).sum().backward()
    logger.log_param("train_actor/fc", layer, 5)
    logger.log_histogram("train_actor/fc_output", np.arange(10.0), 5)
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 20, 3), dtype=np.uint8)
    logger.log_video("eval/video", frames, 5)
    logger.log_image("eval/one", torch.rand(3, 8, 9), 5)
    shades = np.array([50, 100, 150, 200], np.uint8)[:, None, None, None]
    logger.log_image("eval/grid", np.broadcast_to(shades, (4, 3, 8, 8)), 5)
    logger.close()

    events = read_events(tmp_path)
    (scalar,) = events.Scalars("train_critic/loss")
    assert (scalar.step, scalar.value) == (5, 1.5)
    names = {f"train_actor/fc_{name}" for name in ("weight", "bias", "weight_grad", "bias_grad", "output")}
    assert set(events.Tags()["histograms"]) == names
    (video,) = events.Images("eval/video")
    with Image.open(io.BytesIO(video.encoded_image_string)) as animation:
        assert animation.format == "GIF"
        assert animation.n_frames == 6
        assert animation.size == (20, 16)
    (picture,) = events.Images("eval/one")
    assert iio.imread(picture.encoded_image_string).shape[-1] == 3
    (grid,) = events.Images("eval/grid")
    assert np.array_equal(
        iio.imread(grid.encoded_image_string)[..., 0], np.kron([[50, 100, 150, 200]], np.ones((8, 8)))
    )


def test_without_tensorboard_nothing_is_written(tmp_path):
    logger = Logger(tmp_path, use_tb=False)
    logger.log_histogram("train/x", np.arange(3.0), 0)
    logger.log_image("train/x", np.zeros((3, 4, 4), np.uint8), 0)
    logger.log_video("train/x", np.zeros((2, 4, 4, 3), np.uint8), 0)
    logger.close()
    assert not list(tmp_path.iterdir())


class Painter:
    """Shows pictures that count."""

    def __init__(self):
        self.count = 0

    def render(self, mode, height, width, camera_id):
        self.count += 1
        self.camera_id = camera_id
        return np.full((height, width, 3), 20 * self.count, np.uint8)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (90, 100), (64, 64)])
def test_video_reads_back(tmp_path, height, width):
    video = VideoRecorder(tmp_path / "video", height=height, width=width, camera_id=3, fps=12)
    painter = Painter()
    video.init(enabled=True)
    for _ in range(7):
        video.record(painter)
    video.save("100.mp4")
    frames = iio.imread(tmp_path / "video" / "100.mp4")
    assert frames.shape == (7, height, width, 3)
    assert np.allclose(frames.mean(axis=(1, 2, 3)), 20 * np.arange(1, 8), atol=6)
    assert painter.camera_id == 3
    assert iio.immeta(tmp_path / "video" / "100.mp4")["fps"] == 12
    assert [path.name for path in (tmp_path / "video").iterdir()] == ["100.mp4"]


def test_video_turned_off(tmp_path):
    painter = Painter()
    for video in (VideoRecorder(None), VideoRecorder(tmp_path / "video")):
        video.init(enabled=video.dir_name is None)
        video.record(painter)
        video.save("0.mp4")
    assert painter.count == 0
    assert not (tmp_path / "video").exists()
