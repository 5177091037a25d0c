"""A Control Suite task as a gym 0.26 environment."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  # for `_free_at_exit`
import logging
import math
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import gym
import numpy as np
from gym.wrappers import TimeLimit

from dmc2gym.rendering import check_display, not_started, renderer_error, renderer_name, uninterrupted

_UNLIMITED = 1e10  # dm_control's limit of an actuator without one (mjMAXVAL)


def _suite() -> Any:
    """dm_control's suite, imported when it is first needed: that takes a second, and `--help` should not."""
    logging.getLogger("absl").addFilter(_worth_reading)
    warnings.filterwarnings("ignore", module="glfw")  # that it finds no display: said where it matters
    try:
        from dm_control import suite
    except Exception as error:  # what a renderer raises that cannot start is of many kinds
        raise renderer_error(error) from error
    return suite


def _physics_error() -> type[Exception]:
    """What dm_control raises where a simulation diverges."""
    from dm_control.rl.control import PhysicsError

    return PhysicsError


def _nothing(_physics: Any) -> dict[str, np.ndarray]:
    return {"nothing": np.zeros(0)}


def _worth_reading(record: logging.LogRecord) -> bool:
    """Not MuJoCo's warning at every load of the suite's own models, nor what `step` tells in `physics_error`."""
    return not any(text in record.getMessage() for text in ("settotalmass", "The simulation is unstable"))


def task_names() -> list[tuple[str, str]]:
    """Domain and task of everything in the suite."""
    return list(_suite().ALL_TASKS)


def make(
    domain_name: str,
    task_name: str,
    seed: int = 1,
    visualize_reward: bool = True,
    from_pixels: bool = False,
    height: int = 84,
    width: int = 84,
    camera_id: int | None = None,
    frame_skip: int = 1,
    episode_length: int = 1000,
    environment_kwargs: dict[str, Any] | None = None,
    time_limit: float | None = None,
    channels_first: bool = True,
) -> gym.Env:
    """A task with its time limit.

    Args:
        domain_name, task_name: of the suite.
        seed: of the task's own randomness and of the action space.
        visualize_reward: colour the scene by reward in `render`; observed pixels never show the reward.
        from_pixels: observe pixels, not states.
        height, width: of observed pixels.
        camera_id: of observed pixels; None is camera 0, but 2 for quadruped, whose camera 0 does not follow it.
        frame_skip: environment steps an action is repeated for.
        episode_length: environment steps after which an episode is truncated.
        environment_kwargs: for dm_control's Environment.
        time_limit: the task's own limit in simulated seconds; None is the task's default.
        channels_first: pixels (3, H, W), else (H, W, 3).

    Raises:
        ValueError: no such task, or a number out of range.
        RendererError: pixels were asked for and nothing can render.
    """
    if frame_skip < 1 or episode_length < 1:
        raise ValueError(f"frame_skip {frame_skip} and episode_length {episode_length} must be at least 1")
    env = DMCWrapper(
        domain_name,
        task_name,
        seed=seed,
        visualize_reward=visualize_reward,
        from_pixels=from_pixels,
        height=height,
        width=width,
        camera_id=camera_id,
        frame_skip=frame_skip,
        environment_kwargs=environment_kwargs,
        time_limit=time_limit,
        channels_first=channels_first,
    )
    return TimeLimit(env, max_episode_steps=math.ceil(episode_length / frame_skip))


class DMCWrapper(gym.Env):
    """A task without a time limit of gym's; arguments as for `make`.

    Pickling keeps the state of task and simulation, not the renderer, which is made anew when it is needed.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gym declares it an instance's

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
    ):
        suite = _suite()
        if (domain_name, task_name) not in suite.ALL_TASKS:
            raise ValueError(f"the Control Suite has no task {domain_name} {task_name}")
        task_kwargs: dict[str, Any] = {"random": seed}
        if time_limit is not None:
            task_kwargs["time_limit"] = time_limit
        self._env = suite.load(
            domain_name,
            task_name,
            task_kwargs=task_kwargs,
            environment_kwargs=environment_kwargs,
            visualize_reward=visualize_reward and not from_pixels,
        )
        self._from_pixels = from_pixels
        self._height = height
        self._width = width
        self.camera_id = camera_id if camera_id is not None else {"quadruped": 2}.get(domain_name, 0)
        self._frame_skip = frame_skip
        self._channels_first = channels_first
        self.render_mode = "rgb_array"

        limits = self._env.action_spec()
        unlimited = np.abs([limits.minimum, limits.maximum]).max(axis=0) >= _UNLIMITED
        self._action_low = np.where(unlimited, -1.0, limits.minimum)
        self._action_high = np.where(unlimited, 1.0, limits.maximum)
        self.action_space = gym.spaces.Box(-1.0, 1.0, limits.shape, np.float32, seed=seed)
        size = sum(math.prod(spec.shape) for spec in self._env.observation_spec().values())
        self.state_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        if from_pixels:
            shape = (3, height, width) if channels_first else (height, width, 3)
            self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        else:
            self.observation_space = self.state_space
        self.current_state: np.ndarray | None = None
        self._free_at_exit()

    def _free_at_exit(self) -> None:
        # At garbage collection, or before exit: renderers that Python tears down print tracebacks. OSMesa draws in a
        # thread of concurrent.futures, which ends its threads before `atexit` calls anything; what is registered here
        # after it was imported comes before that. https://github.com/python/cpython/blob/3.13/Lib/threading.py
        self._finalizer = weakref.finalize(self, self._env.physics.free)
        getattr(threading, "_register_atexit", atexit.register)(self._finalizer)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_finalizer"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._free_at_exit()

    @property
    def physics(self) -> Any:
        """dm_control's physics."""
        return self._env.physics

    @property
    def random_state(self) -> dict[str, Any]:
        """State of the generator that episodes are drawn from, to be set again."""
        return self._env.task.random.get_state(legacy=False)

    @random_state.setter
    def random_state(self, state: dict[str, Any]) -> None:
        self._env.task.random.set_state(state)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; with a seed, one that depends on that seed alone.

        LQR tasks draw their springs when they are made: there it depends on the seed of `make`, too. A simulation that
        diverges before it has begun is begun anew, up to ten times.

        Raises:
            dm_control.rl.control.PhysicsError: it has diverged each time.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        with not_started(self._env.physics):
            for left in reversed(range(10)):
                try:
                    time_step = self._env.reset()
                    break
                except _physics_error():
                    if not left:
                        raise
        self._last = self._observe(time_step)
        return self._last

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeats an action for `frame_skip` environment steps, or until the episode ends.

        Args:
            action: (A,) in [-1, 1].

        Returns:
            The last observation, rewards summed, whether the task ended (its discount is 0) or its time ran out,
            and info with `internal_state` (the simulator's) and `discount`. Where the simulation diverges, the episode
            ends with reward 0, discount 0, the observation before, and the reason in info as `physics_error`.

        Raises:
            ValueError: the action is of another shape, out of range or not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not (np.abs(action) <= 1).all():
            raise ValueError(f"actions are {self.action_space.shape} in [-1, 1], got {action}")
        try:
            time_step, reward = self._advance(action)
            self._last = obs, info = self._observe(time_step)
        except _physics_error() as error:
            # As in dm_control's composer.Environment. The observation stays finite: it is the last one before.
            obs, info = self._last
            return obs.copy(), 0.0, True, False, info | {"discount": 0.0, "physics_error": str(error)}
        ended = bool(time_step.discount == 0)
        return obs, reward, ended, bool(time_step.last() and not ended), info

    def _advance(self, action: np.ndarray) -> tuple[Any, float]:
        """The environment steps of a decision: dm_control's last time step, and the rewards summed."""
        scaled = self._action_low + (action + 1) / 2 * (self._action_high - self._action_low)
        reward = 0.0
        for left in reversed(range(self._frame_skip)):
            time_step = self._step_unobserved(scaled) if left else self._env.step(scaled)
            reward += time_step.reward or 0.0
            if time_step.last():
                if left:
                    time_step = time_step._replace(observation=self._env.task.get_observation(self._env.physics))
                break
        return time_step, reward

    def _step_unobserved(self, action: np.ndarray) -> Any:
        """An environment step that another one follows: its observation, which nobody sees, is not computed."""
        task = self._env.task
        task.get_observation = _nothing  # hides the task's own method
        try:
            return self._env.step(action)
        finally:
            del task.get_observation

    def _observe(self, time_step: Any) -> tuple[np.ndarray, dict[str, Any]]:
        values = [np.ravel(value) for value in time_step.observation.values()]
        self.current_state = np.concatenate(values).astype(np.float64)
        info = {
            "internal_state": self._env.physics.get_state().copy(),
            "discount": 1.0 if time_step.discount is None else time_step.discount,
        }
        if not self._from_pixels:
            return self.current_state.copy(), info
        pixels = self.render(height=self._height, width=self._width)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if self._channels_first else pixels, info

    def render(  # type: ignore[override]  # as in gym before 0.26: size and camera by call
        self,
        mode: str = "rgb_array",
        height: int | None = None,
        width: int | None = None,
        camera_id: int | None = None,
    ) -> np.ndarray:
        """A picture (H, W, 3), uint8; size and camera are by default those of observed pixels.

        Raises:
            ValueError: another mode.
            RendererError: nothing can render.
        """
        if mode != "rgb_array":
            raise ValueError(f"render mode {mode!r} is not supported, only rgb_array")
        height = self._height if height is None else height
        width = self._width if width is None else width
        camera_id = self.camera_id if camera_id is None else camera_id
        self._start_renderer(height, width)
        return self._env.physics.render(height=height, width=width, camera_id=camera_id)

    def _start_renderer(self, height: int = 0, width: int = 0) -> None:
        """Makes the renderer, or makes it anew if its buffer is too small for a picture."""
        physics, visual = self._env.physics, self._env.physics.model.vis.global_
        try:
            check_display()
            if height > visual.offheight or width > visual.offwidth:
                visual.offheight, visual.offwidth = max(height, visual.offheight), max(width, visual.offwidth)
                if physics._contexts:
                    physics._free_rendering_contexts()
            if not physics._contexts:
                with uninterrupted():
                    _ = physics.contexts
        except Exception as error:  # of many kinds, by backend and driver
            raise renderer_error(error) from error

    @property
    def renderer(self) -> tuple[str, bool]:
        """What draws the pictures, and whether it is software on the CPU."""
        self._start_renderer()
        return renderer_name(self._env.physics)

    def close(self) -> None:
        """Frees simulation and renderer."""
        self._finalizer()
