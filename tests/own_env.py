"""An environment as a user of this project would write it: plain Gymnasium, or gym 0.26, and nothing of dm_control."""

from __future__ import annotations

import gymnasium
import numpy as np

from utils import FrameStack

# Flags for a run: episodes of 8 to 11 decisions, two of them at random; an evaluation after every third; a checkpoint
# after each.
RUN = (
    "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --init_steps 20 --num_train_steps 80 --eval_freq 25 "
    "--num_eval_episodes 2 --eval_workers 1 --device cpu --checkpoint_minutes 0"
).split()
SIDE = 24
PICTURE = (33, 41, 3)  # of `render`; an mp4 has no odd sides


class Task:
    """A bright square that drifts at random and that actions push sideways, seen from above.

    The first position, the drift and the episode's length are drawn from the generator that `reset` seeds. An episode
    lasts 8 to 11 decisions, or ends before that if the square reaches an edge.

    Args:
        states: observe position, drift and time instead of pixels.
        repeats: whether `reset`'s seed is heeded. If not, an episode lasts `length` decisions and is never the same.
        render_mode: None renders nothing, as in Gymnasium.
    """

    def __init__(self, states=False, repeats=True, render_mode="rgb_array", length=10):
        box = self.spaces.Box
        state = box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = state if states else box(0, 255, (3, SIDE, SIDE), np.uint8)
        self.action_space = box(-1, 1, (2,), np.float32)
        self.states, self.repeats, self.render_mode, self.length = states, repeats, render_mode, length
        self.going = None  # whether an episode is under way; None before the first `reset`

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed if self.repeats else None)
        random = self.np_random if self.repeats else np.random.default_rng()
        self.random, self.going, self.time = random, True, 0
        self.position = random.uniform(-0.5, 0.5, 2)
        self.drift = random.normal(0, 0.05, 2)
        if self.repeats:
            self.length = int(random.integers(8, 12))
        return self.observe(), {"length": self.length}

    def step(self, a):  # as many environments name it
        if not self.going:
            raise RuntimeError("step was called before reset, or after an episode's end")
        assert a.shape == (2,)
        assert a.dtype == np.float32
        self.time += 1
        self.drift = 0.9 * self.drift + self.random.normal(0, 0.05, 2)
        moved = self.position + self.drift + 0.2 * a
        terminated = bool(self.repeats and np.abs(moved).max() > 1)
        self.position = np.clip(moved, -1, 1)
        truncated = self.time >= self.length and not terminated
        self.going = not (terminated or truncated)
        return self.observe(), 1 - np.abs(self.position).mean(), terminated, truncated, {}

    def observe(self):
        if self.states:
            return np.array([*self.position, *self.drift], np.float32)
        return self.picture((SIDE, SIDE, 3)).transpose(2, 0, 1)

    def picture(self, shape):
        """The background tells the time."""
        picture = np.full(shape, 10 * self.time, np.uint8)
        row, column = ((self.position + 1) / 2 * (np.array(shape[:2]) - 4)).astype(int)
        picture[row : row + 4, column : column + 4] = 255
        return picture

    def render(self):
        if self.going is None:
            raise RuntimeError("render was called before reset")
        return None if self.render_mode is None else self.picture(PICTURE)


class OwnEnv(Task, gymnasium.Env):
    """As a Gymnasium environment."""

    spaces = gymnasium.spaces


def gym_env(**options):
    """The same as an environment of gym 0.26."""
    import gym  # only here: environments of Gymnasium do without

    class OwnGymEnv(Task, gym.Env):
        spaces = gym.spaces

    return OwnGymEnv(**options)


def make_env(args, seed):
    """In place of `train.make_env`: pixels or states, as the flags say."""
    states = args.encoder_type == "identity"
    env = OwnEnv(states=states)
    return env if states else FrameStack(env, args.frame_stack)
