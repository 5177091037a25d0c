"""Console lines, log files, TensorBoard events and videos, read back."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from events import read_events
from PIL import Image
from runs import read_log
from terminal import reader

from errors import UserError
from logger import Logger

ROOT = Path(__file__).parent.parent


def write(logger, step, values):
    for key, value in values.items():
        logger.log(key, value, step)
    logger.dump(step)


def test_a_line_shows_means_and_0_for_what_was_not_logged(tmp_path, capsys):
    """A value may be the sum of several. Without TensorBoard, there are only logs."""
    logger = Logger(tmp_path, use_tb=False)
    for value in (1.0, 2.0, 6.0):
        logger.log("train_critic/loss", torch.tensor(value), 999)
    record = {"episode": 4, "duration": 0.8123, "episode_reward": 21.16758, "batch_reward": 0.125}
    logger.log("eval/episode_reward", 10.0, 1000, n=4)
    logger.log_histogram("train/x", np.arange(3.0), 1000)
    logger.log_image("train/x", np.zeros((3, 4, 4), np.uint8), 1000)
    logger.log_video("train/x", np.zeros((2, 4, 4, 3), np.uint8), 1000)
    write(logger, 1000, {f"train/{name}": value for name, value in record.items()} | {"train_ae/ae_loss": 0.25})
    logger.close()
    assert capsys.readouterr().out == (
        "| train | E: 4 | S: 1000 | D: 0.8 s | R: 21.1676 | BR: 0.1250 "
        "| ALOSS: 0.0000 | CLOSS: 3.0000 | RLOSS: 0.2500\n| eval | S: 1000 | ER: 2.5000\n"
    )
    assert read_log(tmp_path / "train.log") == [record | {"critic_loss": 3.0, "ae_loss": 0.25, "step": 1000}]
    assert {path.name for path in tmp_path.iterdir()} == {"train.log", "eval.log"}


def test_tensors_in_host_memory_are_not_kept(tmp_path):
    """Kept until the line, they would have a thousand updates of a line take 40 GB, for want of connected memory."""
    logger, loss = Logger(tmp_path, use_tb=False), torch.tensor(0.1, dtype=torch.float64)
    kept = weakref.ref(loss)
    logger.log("train_critic/loss", loss, 1)
    del loss
    assert kept() is None
    logger.dump(1)
    assert read_log(tmp_path / "train.log")[0]["critic_loss"] == 0.1


def test_colour_on_a_terminal(tmp_path):
    program = f"import logger; log = logger.Logger({str(tmp_path)!r}, use_tb=False)\n"
    program += "log.log('eval/episode_reward', 1.0, 0); log.dump(0)"
    with reader(terminal=True) as (stdout, printed):
        environment = {"PATH": "/usr/bin:/bin", "TERM": "xterm"}
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=stdout, env=environment, check=True)
    assert printed() == "| \x1b[32meval\x1b[0m | S: 0 | ER: 1.0000\n"


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_bad_losses_are_named(tmp_path, bad):
    logger = Logger(tmp_path, use_tb=False)
    for step, value in ((7, 1.0), (8, bad), (9, 2.0)):
        logger.log("train_critic/loss", torch.tensor(value), step)
    for look in (logger.check_losses, lambda: logger.dump(10)):
        with pytest.raises(UserError, match=r"train_critic/loss .* step 8"):
            look()
    assert not (tmp_path / "train.log").exists()


def test_a_key_of_no_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the key 'loss' begins with neither train nor eval"):
        Logger(tmp_path, use_tb=False).log("loss", 1.0, 0)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_restored_logger_continues_after_the_lines_of_its_state(tmp_path, kept):
    """From before the first line, after it, after the second; values that wait for the next line are kept."""
    logger, steps = Logger(tmp_path), [0, 5, 9]
    for step in steps:
        if step == steps[kept]:
            logger.log("train/batch_reward", 1.0, step)
            state = json.loads(json.dumps(logger.state()))  # as a checkpoint keeps it
        write(logger, step, {"train/episode": step, "train/batch_reward": 3.0})
    logger.close()
    logger = Logger(tmp_path, state=state)
    write(logger, steps[kept], {"train/episode": step})
    logger.close()
    assert [record["step"] for record in read_log(tmp_path / "train.log")] == steps[: kept + 1]
    assert read_log(tmp_path / "train.log")[-1]["batch_reward"] == 1.0
    assert [event.step for event in read_events(tmp_path).Scalars("train/episode")] == steps[: kept + 1]


def test_tensorboard_events(tmp_path):
    hook, logger = threading.excepthook, Logger(tmp_path)
    logger.log("train_critic/loss", torch.tensor(1.0), 4)
    write(logger, 5, {"train_critic/loss": torch.tensor(2.0)})
    layer = torch.nn.Linear(2, 3)
    layer(torch.ones(1, 2)).sum().backward()
    logger.log_param("train_actor/fc", layer, 5)
    logger.log_video("eval/video", np.random.default_rng(0).integers(0, 256, (6, 16, 20, 3), dtype=np.uint8), 5)
    shades = np.array([50, 100, 150, 200], np.uint8)
    logger.log_image("eval/grid", np.broadcast_to(shades[:, None, None, None], (4, 3, 8, 8)), 5)
    logger.close()
    assert threading.excepthook is hook

    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train_critic/loss")] == [(5, 1.5)]
    names = {f"train_actor/fc_{name}" for name in ("weight", "bias", "weight_grad", "bias_grad")}
    assert set(events.Tags()["histograms"]) == names
    (video,) = events.Images("eval/video")
    with Image.open(io.BytesIO(video.encoded_image_string)) as animation:
        assert (animation.format, animation.n_frames, animation.size) == ("GIF", 6, (20, 16))
    (grid,) = events.Images("eval/grid")
    assert np.array_equal(iio.imread(grid.encoded_image_string)[..., 0], np.kron([shades], np.ones((8, 8))))
