"""Environments without a simulator: one that counts, one that can be learned from pixels in seconds."""

from __future__ import annotations

import gym
import numpy as np

from environment import FrameStack, make_env


class CountingEnv(gym.Env):
    """Every pixel is the number of the frame within the run (mod 256): stacking errors show.

    Episodes last `limit` decisions; with `ends` an action above 0.5 ends one before.
    """

    def __init__(self, size=16, limit=5, ends=False):
        self.observation_space = gym.spaces.Box(0, 255, (3, size, size), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32, seed=1)
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

    @property
    def random_state(self):
        return {}

    @random_state.setter
    def random_state(self, state):
        pass

    def render(self, **_):
        return np.zeros((16, 16, 3), np.uint8)


class BarEnv(gym.Env):
    """A bright bar that actions move sideways; the reward is 1 where it stands in the middle, 0 at the edges.

    An episode begins with the bar near an edge and lasts 20 decisions, so a policy that does nothing gets little.
    """

    camera_id = 0
    renderer = ("none", False)
    size = 24

    def __init__(self, seed=0):
        self.observation_space = gym.spaces.Box(0, 255, (3, self.size, self.size), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32, seed=seed)
        self.rng = np.random.default_rng(seed)
        self.position = 0.0

    def _observe(self):
        picture = np.zeros(self.observation_space.shape, np.uint8)
        column = int((self.position + 1) / 2 * (self.size - 4))
        picture[:, :, column : column + 4] = 255
        return picture

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.position = float(self.rng.choice([-0.9, 0.9]))
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        self.position = float(np.clip(self.position + 0.3 * action[0], -1, 1))
        return self._observe(), 1 - abs(self.position), False, self.steps == 20, {}

    @property
    def random_state(self):
        return self.rng.bit_generator.state

    @random_state.setter
    def random_state(self, state):
        self.rng.bit_generator.state = state

    def render(self, **_):
        return self._observe().transpose(1, 2, 0)


class SlidingEnv(BarEnv):
    """A bar that begins anywhere, before a background that brightens by the decision: no two frames are the same."""

    def __init__(self, size):
        self.size = size
        super().__init__()

    def _observe(self):
        return np.maximum(super()._observe(), 10 * self.steps).astype(np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float(self.rng.uniform(-0.9, 0.9))
        return self._observe(), {}

    def render(self, height=1, width=1, **_):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[:, : width // 2, 1] = 12 * getattr(self, "steps", 0)
        return picture


def make_sliding_env(args, seed):
    """In place of `environment.make_env`: this one for pixels; states stay the simulator's."""
    if args.encoder_type == "pixel":
        return FrameStack(SlidingEnv(args.image_size), args.frame_stack)
    return make_env(args, seed)
