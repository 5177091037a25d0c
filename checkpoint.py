"""A run's checkpoint: all that it needs to go on as if it had never stopped.

`checkpoint.json` holds numbers and random states and names the files that belong to it: one of tensors, and the
replay's chunks. It is replaced last, so whatever moment a run is killed at, the checkpoint that it names is whole.
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import Written, read_json, read_tensors, sync_folder, to_json, write_json, write_tensors
from replay_buffer import ReplayBuffer

_INDEX = "checkpoint.json"
_VERSION = 1


class Checkpoint:
    """The newest checkpoint of a run, in a folder of its own.

    Args:
        folder: it need not be there yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._index = folder / _INDEX
        self._state: str | None = None  # the file of tensors that the index names

    def begin(self, args: dict[str, Any], owner: str) -> None:
        """Makes the folder that of a run with these flags, without a checkpoint yet.

        At every moment its index is what it was, or says so. Other files in it stay.

        Args:
            args: the flags of the run.
            owner: name of the run's replay, which the run's files bear.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({"version": _VERSION, "args": args, "run": None}, owner)
        sync_folder(self.folder.parent)

    def _write(self, content: dict[str, Any], owner: str) -> None:
        content = json.loads(to_json(content))
        write_json(self._index, {"crc32": zlib.crc32(to_json(content).encode()), "content": content}, owner)

    def exists(self) -> bool:
        """Whether there is a checkpoint.

        Raises:
            ValueError: whether there is one cannot be said; the message names a file.
        """
        return self.begun() and self._read()["run"] is not None

    def begun(self) -> bool:
        """Whether a run has made the folder its own, with a checkpoint or without one yet."""
        return self._index.exists()

    def args(self) -> dict[str, Any]:
        """The flags of the run.

        Raises:
            ValueError: as `exists`.
        """
        return self._read()["args"]

    def step(self) -> int:
        """Decisions that had been made when it was taken.

        Raises:
            ValueError: as `exists`.
        """
        return int(self._read()["run"]["step"])

    def ended(self, num_train_steps: int) -> bool:
        """Whether nothing is left to do of a run of so many decisions.

        Raises:
            ValueError: as `exists`.
        """
        run = self._read()["run"]
        return run["step"] >= num_train_steps and not run["evaluation_due"]

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """Its tensors, on the device.

        Raises:
            ValueError: a file is missing, damaged or foreign; the message names it.
        """
        index = self._read()
        try:
            return read_tensors(self.folder, Written(*index["state"]), device)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._index} is damaged: {error}") from error

    def _read(self) -> dict[str, Any]:
        index = read_json(self._index)
        if not isinstance(index, dict) or set(index) != {"crc32", "content"}:
            raise ValueError(f"{self._index} is no checkpoint")
        content = index["content"]
        if index["crc32"] != zlib.crc32(to_json(content).encode()):
            raise ValueError(f"{self._index} is damaged: its content has changed")
        if content["version"] != _VERSION:
            raise ValueError(f"{self._index} is of another version of this program: {content['version']}")
        return content

    def write(self, args: dict[str, Any], run: dict[str, Any], tensors: dict[str, Any], replay: ReplayBuffer) -> None:
        """Writes a checkpoint, of the replay only what is new, and then removes what only the one before it needed.

        Args:
            args: the flags of the run.
            run: numbers, strings and NumPy arrays, in dictionaries and lists.
            tensors: of tensors alike.
            replay: with all that is in it.

        Raises:
            OSError: it cannot be written; the checkpoint before it is still there.
        """
        replay_index = replay.save_chunks(self.folder)
        # Two names in turn: what a killed write leaves is overwritten by the next one.
        name, other = (f"state_{replay.name}_{turn}.pt" for turn in (0, 1))
        name = other if name == self._state else name
        state = write_tensors(self.folder / name, tensors, replay.name)
        index = {"version": _VERSION, "args": args, "run": run, "state": state, "replay": replay_index}
        self._write(index, replay.name)
        replay.keep_chunks(self.folder, replay_index)
        if self._state is not None:
            (self.folder / self._state).unlink(missing_ok=True)
        self._state = name

    def load(self, replay: ReplayBuffer, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
        """`run` and `tensors` of the checkpoint, these on the device; the replay's content goes into an empty replay.

        Raises:
            ValueError: a file is missing, damaged or foreign, or the replay too small; the message names it.
        """
        index, tensors = self._read(), self.tensors(device)
        try:
            replay.load_chunks(self.folder, index["replay"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._index} is damaged: {error}") from error
        self._state = index["state"][0]
        return index["run"], tensors


def random_states() -> dict[str, Any]:
    """States of Python's and NumPy's global generators."""
    return {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` gave, lists in place of tuples and arrays allowed."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])


def torch_random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of PyTorch's generators on the CPU and on the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_torch_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets what `torch_random_states` gave."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
