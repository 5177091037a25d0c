"""The environment as the agent sees it; without PyTorch, so that processes that only play start fast and stay small."""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

import gym
import numpy as np

import dmc2gym

EPISODE_LENGTH = 1000  # environment steps


def make_env(args: argparse.Namespace, seed: int) -> Any:
    """The task as the agent sees it: frames stacked where they are pixels."""
    env = dmc2gym.make(
        args.domain_name,
        args.task_name,
        seed=seed,
        visualize_reward=False,
        from_pixels=args.encoder_type == "pixel",
        height=args.image_size,
        width=args.image_size,
        frame_skip=args.action_repeat,
        episode_length=EPISODE_LENGTH,
    )
    return FrameStack(env, args.frame_stack) if args.encoder_type == "pixel" else env


class FrameStack(gym.Wrapper):
    """Stacks the last `k` frames on the channel axis, oldest first; the first frame of an episode is repeated.

    Observations (C, H, W) become new arrays (k * C, H, W).
    """

    def __init__(self, env: gym.Env, k: int):
        super().__init__(env)
        self._k = k
        self._frames: deque[np.ndarray] = deque(maxlen=k)
        space: Any = env.observation_space
        self.observation_space = gym.spaces.Box(
            low=np.concatenate([space.low] * k), high=np.concatenate([space.high] * k), dtype=space.dtype
        )
        # Code written for gym's own wrappers looks for the limit here.
        self._max_episode_steps = getattr(env, "_max_episode_steps", None)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode: `k` times its first frame."""
        frame, info = self.env.reset(**kwargs)
        self._frames.extend([frame] * self._k)
        return np.concatenate(self._frames), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Drops the oldest frame for the newest."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(frame)
        return np.concatenate(self._frames), reward, terminated, truncated, info
