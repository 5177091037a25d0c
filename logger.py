"""Console lines, JSON lines and TensorBoard events of a run."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from termcolor import colored
from torch import Tensor, nn

from errors import UserError
from files import writing
from pictures import rgb
from support.report import show

# The console lines, which show fields of the log files.
LINES = {
    "train": "E: {episode:.0f} | S: {step:.0f} | D: {duration:.1f} s | R: {episode_reward:.4f} | "
    "BR: {batch_reward:.4f} | ALOSS: {actor_loss:.4f} | CLOSS: {critic_loss:.4f} | RLOSS: {ae_loss:.4f}",
    "eval": "S: {step:.0f} | ER: {episode_reward:.4f}",
}
COLOURS = {"train": "yellow", "eval": "green"}


class Logger:
    """Collects values under keys `train/...`, `train_critic/...`, `eval/...` and writes them when a line is due.

    Args:
        log_dir: an existing folder. It gets `train.log` and `eval.log`, a JSON object a line.
        use_tb: whether to write TensorBoard's events under `tb`, too.
        config: ignored; the authors' Logger takes it.
        state: what an earlier logger's `state` gave. Log lines and TensorBoard's events after it are cut. If lines
            before it are missing, UserError is raised, and nothing is cut.
    """

    def __init__(self, log_dir: str | Path, use_tb: bool = True, config: str = "rl", state: dict | None = None):
        self._paths = {section: Path(log_dir) / f"{section}.log" for section in LINES}
        self._tb, self._writer, self._hook = Path(log_dir) / "tb", None, threading.excepthook
        # Pending, by key: the sum of how many values, and its step.
        self._values: dict[str, list[tuple[Any, int, int]]] = defaultdict(list)
        self._step = -1  # of the newest line
        if state is not None:
            self._restore(state)
        if use_tb:
            from torch.utils.tensorboard import SummaryWriter  # only here: it takes seconds to import

            # TensorBoard's thread keeps an error for the next call, and must not print its traceback besides.
            hook = self._hook
            threading.excepthook = lambda args: None if "AsyncWriter" in type(args.thread).__name__ else hook(args)
            with writing(self._tb):
                self._writer = SummaryWriter(str(self._tb), purge_step=None if state is None else self._step + 1)

    def _restore(self, state: dict[str, Any]) -> None:
        """Cuts the log files to their sizes, and takes the pending values."""
        self._step = state["step"]
        self._values |= state["meters"]
        sizes = {path: state["sizes"].get(path.name, 0) for path in self._paths.values()}
        present = {path: path.stat().st_size for path in sizes if path.exists()}
        if lost := [path for path, size in sizes.items() if size > present.get(path, 0)]:
            raise UserError(f"{lost[0]} is missing or shorter than at the checkpoint: lines were lost")
        for path in present:
            with writing(path):
                os.truncate(path, sizes[path])

    def log(self, key: str, value: float | Tensor, step: int, n: int = 1) -> None:
        """Collects a number or a scalar tensor, the sum of `n` values. Waits for no GPU. Refuses keys of no section."""
        if not key.startswith(tuple(LINES)):
            raise ValueError(f"the key {key!r} begins with neither train nor eval")
        # Small live CPU tensors would fragment the heap (https://sourceware.org/glibc/wiki/MallocInternals).
        kept = value.detach() if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
        self._values[key].append((kept, n, step))

    def dump(self, step: int) -> None:
        """Writes a line for each section that has values: console, log file, TensorBoard.

        Raises UserError if a file cannot be written, or if a loss is NaN or infinite.
        """
        for section, path in self._paths.items():
            means = {key: _mean(key, self._values.pop(key)) for key in [*self._values] if key.startswith(section)}
            if not means:
                continue
            record = {_field(key): mean for key, mean in means.items()} | {"step": step}
            self._step = step
            with writing(path), path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for key, mean in means.items():
                self._tensorboard("add_scalar", key, mean, step)
            self._tensorboard("flush")
            show(f"| {colored(section, COLOURS[section])} | {LINES[section].format_map(defaultdict(float, record))}")

    def check_losses(self) -> None:
        """Raises UserError if a pending loss is NaN or infinite."""
        for key, values in self._values.items():
            _mean(key, values)

    def state(self) -> dict[str, Any]:
        """Pending values, the newest line's step, and the log files' sizes in bytes. Syncs the files to disk."""
        meters = {key: [(float(value), n, at) for value, n, at in values] for key, values in self._values.items()}
        present = [path for path in self._paths.values() if path.exists()]
        for path in present:
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())
        return {"step": self._step, "meters": meters, "sizes": {path.name: path.stat().st_size for path in present}}

    def log_param(self, key: str, param: nn.Module, step: int) -> None:
        """Histograms of a layer's weight and bias, and of their gradients where there are any."""
        for name, value in param.named_parameters(recurse=False):
            self.log_histogram(f"{key}_{name}", value, step)
            if value.grad is not None:
                self.log_histogram(f"{key}_{name}_grad", value.grad, step)

    def log_histogram(self, key: str, histogram: Tensor | np.ndarray, step: int) -> None:
        """Histogram of all entries."""
        self._tensorboard("add_histogram", key, histogram, step)

    def log_image(self, key: str, image: Tensor | np.ndarray, step: int) -> None:
        """Pictures (..., 3, H, W), eight in a row; uint8, or floating and cut to [0, 1]."""
        self._tensorboard("add_images", key, image.reshape(-1, *image.shape[-3:]), step)

    def log_video(self, key: str, frames: np.ndarray | list[np.ndarray], step: int, fps: int = 15) -> None:
        """Frames (T, H, W, 3), uint8, as an animation."""
        if self._writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            gif = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
            height, width, channels = frames[0].shape
            image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif)
            with writing(self._tb):
                self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)

    def close(self) -> None:
        """Flushes and closes TensorBoard's events. Raises UserError if they cannot be written."""
        try:
            self._tensorboard("close")
        finally:
            if self._writer is not None:
                threading.excepthook = self._hook

    def _tensorboard(self, method: str, *args: Any) -> None:
        """Calls a method of TensorBoard's writer, if there is one."""
        if self._writer is not None:
            with writing(self._tb):
                getattr(self._writer, method)(*args)


def _mean(key: str, values: list[tuple[Any, int, int]]) -> float:
    """The mean. Raises UserError if `key` is a loss and a value is NaN or infinite; it names the step."""
    sums, counts, steps = map(list, zip(*values, strict=True))
    if all(isinstance(value, Tensor) for value in sums):
        sums = torch.stack(sums).tolist()  # waits for the GPU once, not for each
    numbers = np.array([float(value) for value in sums])
    bad = np.flatnonzero(~np.isfinite(numbers))
    if key.endswith("loss") and len(bad):
        raise UserError(f"{key} became {numbers[bad[0]]} at step {steps[bad[0]]}: the run has diverged")
    return float(numbers.sum() / sum(counts))


def _field(key: str) -> str:
    """A key's name in the log files: `train_critic/loss` is `critic_loss`, `train_ae/ae_loss` is `ae_loss`."""
    group, _, name = key.partition("/")
    group = group.partition("_")[2]
    return name if not group or name.startswith(f"{group}_") else f"{group}_{name}"


@torch.no_grad()
def log_networks(logger: Logger, agent: Any, observations: np.ndarray, step: int) -> None:
    """Weights of all networks that train, activations on observations (N, ...), and reconstructions beside them."""
    obs = agent.to_network_input(torch.as_tensor(observations))
    with ExitStack() as hooks:
        for network_name, network in agent.networks.items():
            for name, layer in network.named_modules():
                if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                    key = f"train_{network_name}/{name}"
                    logger.log_param(key, layer, step)
                    # A hook gets layer, inputs, output.
                    log_output = partial(lambda key, *args: logger.log_histogram(key, args[-1], step), f"{key}_output")
                    hooks.enter_context(layer.register_forward_hook(log_output))
        agent.critic(obs, agent.actor(obs, compute_pi=False, compute_log_pi=False)[0])
        if agent.decoder is not None:
            reconstruction = agent.decoder(agent.critic.encoder(obs)) + 0.5
            pairs = torch.stack([rgb(obs) / 255, rgb(reconstruction)], dim=1)
            logger.log_image("eval/observation_and_reconstruction", pairs, step)
