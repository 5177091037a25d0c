"""Episodes played side by side: some environments here, or spread over processes of their own.

All take a step together, so that one call of the policy serves them all. Episode i is always in the same row of the
same call's batch, whatever the number of processes, and so always gets the same actions.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from signals import held_signals

# Observation, reward, whether the episode is over, and why its simulation has diverged, if it has; None of an
# environment that has nothing to do.
Step = tuple[np.ndarray, float, bool, str | None] | None
# Environments at most: each takes memory (84 MB from pixels, drawn in software) and a renderer's context, of which
# drivers allow few. More episodes are played in waves.
MAX_ENVS = 10


class _Group:
    """Some environments in this process."""

    def __init__(self, make_env: Callable[[], Any], count: int):
        self._envs = [make_env() for _ in range(count)]

    def reset(self, seeds: Sequence[int | None]) -> list[Step]:
        """None where the seed is None."""
        return [
            None if seed is None else (env.reset(seed=seed)[0], 0.0, False, None)
            for env, seed in zip(self._envs, seeds, strict=True)
        ]

    def step(self, actions: Sequence[np.ndarray | None]) -> list[Step]:
        """None where the action is None."""
        return [
            None if action is None else self._step(env, action) for env, action in zip(self._envs, actions, strict=True)
        ]

    def _step(self, env: Any, action: np.ndarray) -> Step:
        obs, reward, terminated, truncated, info = env.step(action)
        return obs, reward, terminated or truncated, info.get("physics_error")

    def render(self, kwargs: dict[str, Any]) -> np.ndarray:
        return self._envs[0].render(**kwargs)

    def close(self) -> None:
        for env in self._envs:
            env.close()

    # The two halves of a call, as `_RemoteGroup` has them.
    def start(self, method: str, *args: Any) -> None:
        self._result = getattr(self, method)(*args)

    def finish(self) -> Any:
        return self._result


class WorkerError(RuntimeError):
    """A process that plays evaluation episodes has failed or died."""


class _RemoteGroup:
    """The same in a process of its own, which ends with this one, however this one ends.

    The two talk through the process's standard input and output. Unlike multiprocessing's, it does not import the
    program that started it, and so does without PyTorch: less than half of the memory, a third of the time to import.
    """

    def __init__(self, make_env: Callable[[], Any], count: int):
        paths = {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        with held_signals():
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | paths
            )
        self._send((make_env, count))

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except OSError:
            raise WorkerError("a process that plays evaluation episodes has died") from None

    def start(self, method: str, *args: Any) -> None:
        self._send((method, args))

    def finish(self) -> Any:
        assert self._process.stdout is not None
        try:
            error, result = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise WorkerError("a process that plays evaluation episodes has died") from None
        if error is not None:
            raise WorkerError(f"an evaluation episode failed: {error}")
        return result

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()  # at which it ends
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """Answers a `_RemoteGroup` until that closes this process's input. The first answer tells of the environments."""
    group = None
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed must not come between
    try:
        while True:
            try:
                message = pickle.load(sys.stdin.buffer)
                if group is None:
                    group, answer = _Group(*message), None
                else:
                    method, args = message
                    answer = getattr(group, method)(*args)
            except (EOFError, pickle.UnpicklingError):  # the other process has closed the pipe, or is gone
                break
            except Exception as error:  # told where it was asked for, as text: not every exception can be pickled
                pickle.dump((f"{type(error).__name__}: {error}", None), answers)
            else:
                pickle.dump((None, answer), answers)
            answers.flush()
            if group is None:
                break
    except BrokenPipeError:
        pass
    finally:
        with suppress(OSError):
            answers.close()
        if group is not None:
            group.close()


class SideBySide:
    """A fixed number of environments that take steps together.

    Args:
        make_env: makes one of them; picklable if there are processes.
        num_envs: how many.
        num_workers: processes they are spread over, at most one for each; 1 means none but this.
    """

    def __init__(self, make_env: Callable[[], Any], num_envs: int, num_workers: int):
        self.num_envs = num_envs
        num_groups = min(num_workers, num_envs)
        self._slices = np.array_split(np.arange(num_envs), num_groups)
        kind = _RemoteGroup if num_groups > 1 else _Group
        self._groups: list[Any] = []
        try:
            for part in self._slices:
                self._groups.append(kind(make_env, len(part)))
            for group in self._groups if num_groups > 1 else []:
                group.finish()  # its environments are made
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        for group, part in zip(self._groups, self._slices, strict=True):
            group.start(method, [arguments[index] for index in part])
        # Every group's answer is taken before any error is raised, or later calls would get answers to earlier ones.
        answers: list[Any] = []
        errors: list[WorkerError] = []
        for group in self._groups:
            try:
                answers += group.finish()
            except WorkerError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def _call_each(self, method: str, arguments: Sequence[Any]) -> list[Step]:
        """Calls one environment for each argument; those that are left over have nothing to do."""
        return self._call(method, [*arguments, *[None] * (self.num_envs - len(arguments))])

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """First observations (N, ...) of the episodes of these seeds, at most `num_envs`."""
        self.over = np.zeros(len(seeds), dtype=bool)
        self.physics_errors: list[str | None] = [None] * len(seeds)
        self._obs = np.stack([step[0] for step in self._call_each("reset", seeds) if step is not None])
        return self._obs.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations (N, ...), rewards (N,) and which episodes are over (N,); those that were stay as they are.

        Where a simulation has diverged, `physics_errors` says why.
        """
        going = [None if over else action for action, over in zip(actions, self.over, strict=True)]
        rewards = np.zeros(len(going))
        for index, step in enumerate(self._call_each("step", going)):
            if step is not None:
                self._obs[index], rewards[index], self.over[index], self.physics_errors[index] = step
        return self._obs.copy(), rewards, self.over.copy()

    def render(self, **kwargs: Any) -> np.ndarray:
        """A picture of the first environment."""
        self._groups[0].start("render", kwargs)
        return self._groups[0].finish()

    def close(self) -> None:
        """Closes the environments and ends their processes."""
        for group in self._groups:
            group.close()


class Moment(NamedTuple):
    """N episodes at the start of some of them, or after a step of these.

    Observations (n, ...) of those that are being played; returns and decisions of all, (N,) each; whether the first
    episode shows something new; and why episodes have ended where their simulation diverged, by number.
    """

    obs: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    first_moved: bool
    physics_errors: dict[int, str]


def play(envs: SideBySide, seeds: Sequence[int], act: Callable[[np.ndarray], np.ndarray]) -> Iterator[Moment]:
    """Plays one episode of each seed to its end, in waves of as many as there are environments.

    Args:
        envs: any number.
        seeds: of the episodes.
        act: actions (n, A) for observations (n, ...).
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int)
    errors: dict[int, str] = {}
    for start in range(0, len(seeds), envs.num_envs):
        wave = slice(start, start + envs.num_envs)
        obs = envs.reset(seeds[wave])
        yield Moment(obs, returns.copy(), lengths.copy(), start == 0, dict(errors))
        while not envs.over.all():
            going = ~envs.over
            obs, rewards, _ = envs.step(act(obs))
            returns[wave] += rewards
            lengths[wave] += going
            errors |= {start + index: error for index, error in enumerate(envs.physics_errors) if error is not None}
            yield Moment(obs, returns.copy(), lengths.copy(), start == 0 and bool(going[0]), dict(errors))


if __name__ == "__main__":
    serve()
