"""Control Suite tasks as gym 0.26 environments."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import os
import warnings
from typing import Any

import gym
import numpy as np
from gym.wrappers import TimeLimit

from dmc2gym.rendering import renderer_error, start_renderer
from errors import UserError

with contextlib.suppress(ModuleNotFoundError):  # `_suite` says what to install
    from dm_control.rl.control import PhysicsError

_UNLIMITED = 1e10  # dm_control's limit of an actuator that has none (mjMAXVAL)


def make(domain_name: str, task_name: str, seed: int = 1, *, episode_length: int = 1000, **options: Any) -> gym.Env:
    """Makes a `DMCWrapper`, whose keywords `options` are, with a limit of environment steps, in whole decisions."""
    env = DMCWrapper(domain_name, task_name, seed, **options)
    return TimeLimit(env, max_episode_steps=math.ceil(episode_length / env.frame_skip))


def task_names() -> list[tuple[str, str]]:
    """Domain and task of everything in the suite."""
    return list(_suite().ALL_TASKS)


def renderer_of(env: Any, drawn: bool = True) -> tuple[str, bool] | None:
    """What draws the pictures of an environment, if they are drawn, and whether that is software on the CPU.

    None if `env`, of gym or Gymnasium and wrapped or not, is no `DMCWrapper`. Raises UserError if nothing renders.
    """
    task = getattr(env.unwrapped, "gym_env", env).unwrapped  # shimmy's `gym_env` is gym's, shown as one of Gymnasium
    if not isinstance(task, DMCWrapper):
        return None
    if not drawn:
        return "none", False
    start_renderer(task.physics)
    from OpenGL import GL  # only here: dm_control has chosen its platform

    with task.physics.contexts.gl.make_current() as context:
        name = (context.call(GL.glGetString, GL.GL_RENDERER) or b"unknown").decode()
    software = any(word in name.lower() for word in ("llvmpipe", "softpipe", "swrast", "software"))
    return f"{name} through {os.environ.get('MUJOCO_GL', 'the default backend')}", software


@functools.cache
def _suite() -> Any:
    """Imports dm_control's suite, late: that takes a second, which `--help` should not."""
    # MuJoCo's warning about the suite's own models, and what `step` reports as `physics_error`
    hidden = ("settotalmass", "The simulation is unstable")
    logging.getLogger("absl").addFilter(lambda record: not any(text in record.getMessage() for text in hidden))
    warnings.filterwarnings("ignore", module="glfw")  # about a missing display, which matters only if GLFW is chosen
    try:
        from dm_control import suite
    except ModuleNotFoundError as error:
        install = "pip install -r requirements.txt; pip install --no-deps -r requirements-suite.txt"
        raise UserError(f"the Control Suite is not installed ({error}); type: {install}") from error
    except Exception as error:  # each renderer that cannot load raises its own kinds
        raise renderer_error(error) from error
    return suite


def _no_observation(_physics: Any) -> dict[str, np.ndarray]:
    """In place of a task's `get_observation`, which its environment calls at each step."""
    return {"nothing": np.zeros(0)}


class DMCWrapper(gym.Env):
    """A Control Suite task. Only the task's own time limit ends an episode; `make` adds one in environment steps.

    Raises UserError if there is no such task, or if the renderer that the user chose does not load; ValueError if
    `frame_skip` is less than 1.

    Args:
        domain_name, task_name: of the suite.
        seed: of the task's randomness and of the action space.
        visualize_reward: whether `render` colours the scene by reward. Observed pixels never show the reward.
        from_pixels: whether to observe pixels, uint8, instead of states, (D,) float64.
        height, width: of observed pixels, which are (3, H, W), or (H, W, 3) unless `channels_first`.
        camera_id: of all pictures. None: camera 0, but 2 for quadruped, whose camera 0 does not follow the robot.
        frame_skip: environment steps in a decision; the action is repeated.
        environment_kwargs, time_limit: for dm_control's Environment and task (simulated seconds). None: its defaults.
        render_size: height and width of the pictures of a plain `render()`. None: those of observed pixels.

    `physics` is dm_control's simulation. Also if pixels are observed, `state_space` is the space of states,
    `state_names` the names of their dimensions (position/0, ...), and `current_state` the last one, (D,) float64; None
    before the first reset.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gym annotates it as an instance's

    def __init__(
        self,
        domain_name: str,
        task_name: str,
        seed: int = 1,
        visualize_reward: bool = True,
        from_pixels: bool = False,
        height: int = 84,
        width: int = 84,
        camera_id: int | None = None,
        frame_skip: int = 1,
        environment_kwargs: dict[str, Any] | None = None,
        time_limit: float | None = None,
        channels_first: bool = True,
        render_size: int | None = None,
    ):
        if (domain_name, task_name) not in task_names():
            wanted, names = f"{domain_name} {task_name}", [" ".join(names) for names in task_names()]
            close = ", ".join(difflib.get_close_matches(wanted, names, n=5, cutoff=0.4)) or "none"
            raise UserError(f"the Control Suite has no task {wanted}; close ones: {close}")
        if frame_skip < 1:
            raise ValueError(f"frame_skip must be at least 1, got {frame_skip}")
        task_kwargs = {"random": seed} | ({} if time_limit is None else {"time_limit": time_limit})
        coloured = visualize_reward and not from_pixels
        self._env = _suite().load(domain_name, task_name, task_kwargs, environment_kwargs, coloured)
        self.physics, self.frame_skip, self.render_mode = self._env.physics, frame_skip, "rgb_array"
        self._from_pixels, self._channels_first = from_pixels, channels_first
        self._height, self._width, self._render_size = height, width, render_size
        self.camera_id = camera_id if camera_id is not None else {"quadruped": 2}.get(domain_name, 0)

        limits = self._env.action_spec()
        unlimited = np.maximum(-limits.minimum, limits.maximum) >= _UNLIMITED
        self._action_low = np.where(unlimited, -1.0, limits.minimum)
        self._action_high = np.where(unlimited, 1.0, limits.maximum)
        self.action_space = gym.spaces.Box(-1.0, 1.0, limits.shape, np.float32, seed=seed)
        parts = self._env.observation_spec().items()
        self.state_names = [f"{name}/{index}" for name, spec in parts for index in range(math.prod(spec.shape))]
        self._env.task.get_observation = _no_observation  # `_observe` computes it, once a decision
        self.state_space = gym.spaces.Box(-np.inf, np.inf, (len(self.state_names),), np.float64)
        shape = (3, height, width) if channels_first else (height, width, 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8) if from_pixels else self.state_space
        self.current_state: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode. A seed alone determines it; only LQR's springs come from the seed of `make`.

        Returns observation and info, as `step` does. Raises UserError if pixels are observed and nothing can render,
        and dm_control's PhysicsError if the simulation diverges at once, ten times.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        # Quadruped escape asks for a renderer, to tell it the new terrain. One that starts later sees it anyway.
        self.physics._make_rendering_contexts = lambda: None  # hides the class's method
        try:
            time_step = self._begin_episode()
        finally:
            del self.physics._make_rendering_contexts
        self._last = self._observe(time_step)
        return self._last

    def _begin_episode(self) -> Any:
        for _ in range(9):
            with contextlib.suppress(PhysicsError):
                return self._env.reset()
        return self._env.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeats an action (A,), in [-1, 1], for `frame_skip` environment steps, or until the episode ends.

        Returns the last observation, the sum of rewards, whether the task ended (its discount is 0), whether its time
        ran out, and info: `internal_state` (the simulator's, float64) and `discount`. If the simulation diverges, the
        episode ends with reward 0, discount 0, the previous observation, and the reason in info as `physics_error`.
        Raises ValueError for an action of another shape or range, UserError as `reset`.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not (np.abs(action) <= 1).all():
            raise ValueError(f"actions are {self.action_space.shape} in [-1, 1], got {action}")
        scaled = self._action_low + (action + 1) / 2 * (self._action_high - self._action_low)
        reward = 0.0
        try:
            for _ in range(self.frame_skip):
                time_step = self._env.step(scaled)
                reward += time_step.reward or 0.0
                if time_step.last():
                    break
            self._last = obs, info = self._observe(time_step)
        except PhysicsError as error:  # as in dm_control's composer.Environment, but with a finite observation
            obs, info = self._last
            return obs.copy(), 0.0, True, False, info | {"discount": 0.0, "physics_error": str(error)}
        ended = bool(time_step.discount == 0)
        return obs, reward, ended, bool(time_step.last() and not ended), info

    def _observe(self, time_step: Any) -> tuple[np.ndarray, dict[str, Any]]:
        task = self._env.task
        values = type(task).get_observation(task, self.physics).values()
        self.current_state = np.concatenate([np.ravel(value) for value in values]).astype(np.float64)
        discount = 1.0 if time_step.discount is None else time_step.discount
        info = {"internal_state": self.physics.get_state().copy(), "discount": discount}
        if not self._from_pixels:
            return self.current_state.copy(), info
        pixels = self.render(height=self._height, width=self._width)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if self._channels_first else pixels, info

    def render(  # type: ignore[override]  # as in gym before 0.26: size and camera by call
        self, mode: str = "rgb_array", height: int | None = None, width: int | None = None, camera_id: int | None = None
    ) -> np.ndarray:
        """Draws a picture, (H, W, 3) uint8; by default of `render_size` and with the environment's camera.

        Raises ValueError if the mode is not rgb_array, UserError if nothing can render.
        """
        if mode != "rgb_array":
            raise ValueError(f"render mode {mode!r} is not supported, only rgb_array")
        height, width = height or self._render_size or self._height, width or self._render_size or self._width
        start_renderer(self.physics, height, width)
        return self.physics.render(height, width, self.camera_id if camera_id is None else camera_id)

    def close(self) -> None:
        """Frees simulation and renderer."""
        self.physics.free()
