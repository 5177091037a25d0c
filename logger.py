"""Console lines, JSON lines and TensorBoard events of a run."""

from __future__ import annotations

import io
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from skimage.util import montage
from termcolor import colored
from torch import Tensor, nn

# What a console line shows, by configuration and section: key, label, form.
LINES: dict[str, dict[str, list[tuple[str, str, str]]]] = {
    "rl": {
        "train": [
            ("train/episode", "E", "{:.0f}"),
            ("step", "S", "{:.0f}"),
            ("train/duration", "D", "{:.1f} s"),
            ("train/episode_reward", "R", "{:.4f}"),
            ("train/batch_reward", "BR", "{:.4f}"),
            ("train_actor/loss", "ALOSS", "{:.4f}"),
            ("train_critic/loss", "CLOSS", "{:.4f}"),
            ("train_ae/ae_loss", "RLOSS", "{:.4f}"),
        ],
        "eval": [("step", "S", "{:.0f}"), ("eval/episode_reward", "ER", "{:.4f}")],
    }
}
_COLOURS = {"train": "yellow", "eval": "green"}


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; the message names it and its step."""


class Meter:
    """Mean of the values logged under one key since the last line.

    Tensors on a GPU stay there until the mean is due, so that logging never waits for it. Those in host memory become
    numbers at once: few bytes as they are, each would keep a gap between an update's large tensors from being filled,
    tens of megabytes lost at every update (https://sourceware.org/glibc/wiki/MallocInternals).
    """

    def __init__(self) -> None:
        self._values: list[tuple[Any, int]] = []
        self._steps: list[int] = []

    def update(self, value: float | Tensor, n: int, step: int) -> None:
        """Adds `value`, the sum of `n` values."""
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.item()
        self._values.append((value, n))
        self._steps.append(step)

    def state(self) -> list[tuple[float, int, int]]:
        """Value, number and step of each update."""
        return [(float(value), n, step) for (value, n), step in zip(self._values, self._steps, strict=True)]

    def fetch(self, key: str) -> float:
        """The mean.

        Raises:
            NonFiniteLossError: `key` is a loss and one of its values is NaN or infinite.
        """
        values = [value for value, _ in self._values]
        if all(isinstance(value, Tensor) for value in values):
            sums = torch.stack([value.detach().double() for value in values]).cpu().numpy()
        else:
            sums = np.array([float(value) for value in values])
        if key.endswith("loss") and not np.isfinite(sums).all():
            first = int(np.argmax(~np.isfinite(sums)))
            raise NonFiniteLossError(f"{key} became {sums[first]} at step {self._steps[first]}: the run has diverged")
        return float(sums.sum() / sum(n for _, n in self._values))


class Logger:
    """Collects values under keys `train/...`, `train_critic/...`, `eval/...` and writes them when a line is due.

    Writes `train.log` and `eval.log`, a JSON object a line, and TensorBoard's events under `tb`.

    Args:
        log_dir: an existing folder.
        use_tb: whether to write events.
        config: which console lines, `rl`.
        purge_step: TensorBoard forgets events that an earlier logger wrote from this step on.

    Raises:
        ValueError: unknown `config`.
    """

    def __init__(self, log_dir: str | Path, use_tb: bool = True, config: str = "rl", purge_step: int | None = None):
        if config not in LINES:
            raise ValueError(f"unknown logger config {config!r}: choose one of {', '.join(LINES)}")
        self._log_dir = Path(log_dir)
        self._lines = LINES[config]
        self._meters: dict[str, dict[str, Meter]] = {section: defaultdict(Meter) for section in self._lines}
        self._writer: Any = None
        if use_tb:
            from torch.utils.tensorboard import SummaryWriter  # only here: it takes seconds to import

            self._writer = SummaryWriter(str(self._log_dir / "tb"), purge_step=purge_step)
            self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed

    def log(self, key: str, value: float | Tensor, step: int, n: int = 1) -> None:
        """Takes a number or a scalar tensor, the sum of `n` values.

        Nothing is fetched from a GPU or written before `dump`.

        Raises:
            ValueError: the key belongs to no section.
        """
        self._meters[self._section(key)][key].update(value, n, step)

    def _section(self, key: str) -> str:
        for section in self._meters:
            if key.startswith((f"{section}/", f"{section}_")):
                return section
        raise ValueError(f"the key {key!r} begins with none of {', '.join(self._meters)}")

    def dump(self, step: int) -> None:
        """Writes a line for each section that has values: console, log file and TensorBoard.

        Raises:
            OSError: a file cannot be written; the message names it.
            NonFiniteLossError: a loss is NaN or infinite; its section's line is not written.
        """
        for section, meters in self._meters.items():
            if not meters:
                continue
            means = {key: meter.fetch(key) for key, meter in meters.items()}
            meters.clear()
            record = {_field(key): mean for key, mean in means.items()} | {"step": step}
            path = self._log_dir / f"{section}.log"
            with _naming(path), path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self._writer is not None:
                with _naming(self._log_dir / "tb"):
                    for key, mean in means.items():
                        self._writer.add_scalar(key, mean, step)
                    self._writer.flush()
            shown = means | {"step": step}
            parts = [f"{label}: {form.format(shown.get(key, 0))}" for key, label, form in self._lines[section]]
            print(" | ".join([f"| {colored(section, _COLOURS[section])}", *parts]), flush=True)

    def check_losses(self) -> None:
        """Raises NonFiniteLossError if a loss that waits for its line is NaN or infinite."""
        for meters in self._meters.values():
            for key, meter in meters.items():
                meter.fetch(key)

    def state(self) -> dict[str, Any]:
        """What waits for its line, and how long the log files are, in bytes; they are on the disk afterwards."""
        waiting = {key: meter.state() for meters in self._meters.values() for key, meter in meters.items()}
        return {"meters": waiting, "sizes": {path.name: synced_size(path) for path in log_files(self._log_dir)}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Has what `state` gave wait for its line again."""
        for key, updates in state["meters"].items():
            for value, n, step in updates:
                self.log(key, value, step, n)

    def log_param(self, key: str, param: nn.Module, step: int) -> None:
        """Histograms of a layer's weight and bias, and of their gradients where there are any."""
        for name, value in param.named_parameters(recurse=False):
            self.log_histogram(f"{key}_{name}", value, step)
            if value.grad is not None:
                self.log_histogram(f"{key}_{name}_grad", value.grad, step)

    def log_histogram(self, key: str, histogram: Tensor | np.ndarray, step: int) -> None:
        """Histogram of all entries."""
        if self._writer is not None:
            with _naming(self._log_dir / "tb"):
                self._writer.add_histogram(key, histogram, step)

    def log_image(self, key: str, image: Tensor | np.ndarray, step: int) -> None:
        """One picture (3, H, W), or a grid of several (N, 3, H, W); uint8, or floating in [0, 1]."""
        if self._writer is None:
            return
        pictures = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
        pictures = pictures.reshape(-1, *pictures.shape[-3:]).transpose(0, 2, 3, 1)
        grid = montage(pictures, channel_axis=-1, padding_width=2, fill=[0, 0, 0])
        with _naming(self._log_dir / "tb"):
            self._writer.add_image(key, grid, step, dataformats="HWC")

    def log_video(self, key: str, frames: np.ndarray | list[np.ndarray], step: int, fps: int = 15) -> None:
        """Frames (T, H, W, 3), uint8, as an animation."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = np.asarray(frames)
        gif = io.BytesIO()
        iio.imwrite(gif, frames, extension=".gif", duration=1000 / fps, loop=0)
        _, height, width, channels = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif.getvalue())
        with _naming(self._log_dir / "tb"):
            self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)

    def close(self) -> None:
        """Flushes and closes TensorBoard's events.

        Raises:
            OSError: they cannot be written.
        """
        if self._writer is not None:
            threading.excepthook = self._excepthook
            with _naming(self._log_dir / "tb"):
                self._writer.close()

    def _thread_failed(self, failure: Any) -> None:
        """Prints what has ended a thread, but for the one that writes events: its error is raised at the next call."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._excepthook(failure)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names what cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def log_files(log_dir: Path) -> list[Path]:
    """The files of lines that a logger writes."""
    return [log_dir / f"{section}.log" for section in ("train", "eval")]


def synced_size(path: Path) -> int:
    """Bytes of a file, 0 if there is none, after they have been brought to the disk."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def cut_logs(log_dir: Path, state: dict[str, Any]) -> None:
    """Cuts what was written after a logger's `state`.

    Raises:
        ValueError: a file is shorter than it was then; none has been cut.
    """
    files = {path: state["sizes"][path.name] for path in log_files(log_dir)}
    for path, size in files.items():
        if (path.stat().st_size if path.exists() else 0) < size:
            raise ValueError(f"{path} is missing or shorter than at the checkpoint: lines were lost")
    for path in files:
        if path.exists():
            os.truncate(path, files[path])


def _field(key: str) -> str:
    """A key's name in the log files: `train_critic/loss` is `critic_loss`, `train_ae/ae_loss` is `ae_loss`."""
    group, _, name = key.partition("/")
    group = group.partition("_")[2]
    return name if not group or name.startswith(f"{group}_") else f"{group}_{name}"
