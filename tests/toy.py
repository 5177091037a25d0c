"""Environments without a simulator: one that counts, one that can be learned from pixels in seconds."""

from __future__ import annotations

import sys

import cloudpickle
import gym
import numpy as np

import train
from utils import FrameStack

make_task = train.make_env
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not import it, nor PyTorch


class CountingEnv(gym.Env):
    """Every pixel is the number of the frame within the run (mod 256): stacking errors show.

    Episodes last `limit` decisions; with `ends` an action above 0.5 ends one before.
    """

    channels = 3

    def __init__(self, size=16, limit=5, ends=False):
        self.observation_space = gym.spaces.Box(0, 255, (self.channels, size, size), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.limit = limit
        self.ends = ends
        self.frame = -1

    def _observe(self):
        self.frame += 1
        return np.full(self.observation_space.shape, self.frame % 256, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        ended = bool(self.ends and action[0] > 0.5)
        return self._observe(), 1.0, ended, self.steps == self.limit and not ended, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class BarEnv(gym.Env):
    """A bright bar that actions move sideways; the reward is 1 where it stands in the middle, 0 at the edges.

    An episode begins with the bar near an edge and lasts 20 decisions, so a policy that does nothing gets little.
    """

    size = 24

    def __init__(self):
        self.observation_space = gym.spaces.Box(0, 255, (3, self.size, self.size), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.rng = np.random.default_rng()

    def _observe(self):
        picture = np.zeros(self.observation_space.shape, np.uint8)
        column = int((self.position + 1) / 2 * (self.size - 4))
        picture[:, :, column : column + 4] = 255
        return picture

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.steps = 0
        self.position = self.first_position()
        return self._observe(), {}

    def first_position(self):
        return float(self.rng.choice([-0.9, 0.9]))

    def step(self, action):
        self.steps += 1
        self.position = float(np.clip(self.position + 0.3 * action[0], -1, 1))
        return self._observe(), 1 - abs(self.position), False, self.steps == 20, {}

    def render(self):
        return self._observe().transpose(1, 2, 0)


class SlidingEnv(BarEnv):
    """A bar that begins anywhere, before a background that brightens by the decision: no two frames are the same."""

    state_names = ("position/0", "size/0")

    def __init__(self, size):
        self.size = size
        super().__init__()
        self.shown = np.zeros(2)

    @property
    def current_state(self):
        self.shown[:] = self.position, self.size  # the same array each time
        return self.shown

    def _observe(self):
        return np.maximum(super()._observe(), 10 * self.steps).astype(np.uint8)

    def first_position(self):
        return float(self.rng.uniform(-0.9, 0.9))

    def render(self):
        picture = np.zeros((256, 256, 3), np.uint8)
        picture[:, :128, 1] = 12 * getattr(self, "steps", 0)
        return picture


class StateEnv(SlidingEnv):
    """The same bar, its position and time observed as a state."""

    def __init__(self):
        super().__init__(24)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def _observe(self):
        return np.array([self.position, self.position**2, self.steps / 20])


def make_toy_env(args, seed):
    """In place of `train.make_env`: pixels or states without a simulator; episodes last 20 decisions."""
    if args.encoder_type == "pixel":
        return FrameStack(SlidingEnv(args.image_size), args.frame_stack)
    return StateEnv()


def make_sliding_env(args, seed):
    """In place of `train.make_env`: the toy for pixels; states stay the simulator's."""
    return (make_toy_env if args.encoder_type == "pixel" else make_task)(args, seed)
