"""Helpers: stacked frames, seeds, target updates, the decoder's target, evaluation mode, hashes."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from errors import UserError
from replay_buffer import ReplayBuffer as ReplayBuffer  # for programs that import it from here


class FrameStack:
    """Observes the last `k` frames on the channel axis, oldest first; an episode begins with `k` times its first frame.

    Everything else (`step`'s other values, `render`, `action_space`, `unwrapped`, ...) is the environment's own.

    Args:
        env: a gym 0.26 or Gymnasium environment that observes pixels (C, H, W), uint8.
        k: frames in an observation (k * C, H, W), a new array at each call.
    """

    def __init__(self, env: Any, k: int):
        self.env, self.num_stacked = env, k
        space = env.observation_space
        low, high = np.concatenate([space.low] * k), np.concatenate([space.high] * k)
        self.observation_space = type(space)(low, high, dtype=space.dtype)
        self._frames: deque[np.ndarray] = deque(maxlen=k)

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not there yet while a pickle is read
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        frame, info = self.env.reset(**kwargs)
        self._frames.extend([frame] * self.num_stacked)
        return np.concatenate(self._frames), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Replaces the oldest frame by the newest."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(frame)
        return np.concatenate(self._frames), reward, terminated, truncated, info


def frame_channels(env: Any) -> int:
    """Channels of a single frame in an environment's observations: without a FrameStack they are one frame."""
    return env.observation_space.shape[0] // getattr(env, "num_stacked", 1)


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Puts modules or agents into evaluation mode, and back into the mode that each was in."""
    with ExitStack() as restoring:
        for model in models:
            restoring.callback(model.train, model.training)
            model.train(False)
        yield


@torch.no_grad()
def soft_update_params(net: nn.Module, target_net: nn.Module, tau: float) -> None:
    """Sets target = tau * net + (1 - tau) * target, parameter by parameter."""
    targets: list[Tensor] = list(target_net.parameters())
    if targets:
        torch._foreach_lerp_(targets, list(net.parameters()), tau)


def set_seed_everywhere(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators, all GPUs' included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def module_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters, buffers and extra state, bit by bit: equal for equal modules on any device."""
    leaves, structure = tree_flatten(module.state_dict())
    digest = hashlib.sha256(repr(structure).encode())  # the names
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.cpu().to_dense().resolve_conj().resolve_neg().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(pickle.dumps(leaf))
    return digest.hexdigest()


def make_dir(dir_path: str | Path) -> Path:
    """Creates a folder with its parents, where it is not there yet."""
    path = Path(dir_path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_finite(what: str, *values: Any) -> None:
    """Raises UserError if a number in some arrays is NaN or infinite; `what` says what they are, and at which step."""
    if not all(np.isfinite(each).all() for each in values):
        raise UserError(f"{what} is NaN or infinite")


def preprocess_obs(obs: Tensor, bits: int = 5) -> Tensor:
    """The decoder's target: pixels cut to `bits` bits, dithered, in [-0.5, 0.5] (Glow, arXiv 1807.03039).

    obs are floating pixels 0..255 of any shape; integers, which cannot carry the dither, raise TypeError.
    """
    if not obs.is_floating_point():
        raise TypeError(f"preprocess_obs takes floating pixels, got {obs.dtype}")
    quantised = (obs / 2 ** (8 - bits)).floor_()  # in place: these are the largest tensors of an update
    noise = torch.rand_like(obs, dtype=torch.promote_types(obs.dtype, torch.float32))
    return noise.add_(quantised).div_(2**bits).sub_(0.5)
