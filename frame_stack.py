"""Stacks the last frames of an environment. Works without gym, so that it wraps gym and Gymnasium alike."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np


class FrameStack:
    """Observes the last `k` frames on the channel axis, oldest first; an episode begins with `k` times its first frame.

    Everything else (`step`'s other values, `render`, `action_space`, `unwrapped`, ...) is the environment's own.

    Args:
        env: a gym 0.26 or Gymnasium environment that observes pixels (C, H, W), uint8.
        k: frames in an observation (k * C, H, W), a new array at each step.
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
    """Channels of a single frame in an environment's observations, which may be stacks."""
    channels = env.observation_space.shape[0]
    stacked = getattr(env, "num_stacked", None)
    # Without FrameStack: RGB frames if 3 divides the channels, else one frame.
    return channels // stacked if stacked else 3 if channels % 3 == 0 else channels
