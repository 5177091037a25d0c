"""Episodes played side by side: some environments here, or spread over processes of their own.

All take a step together, so that one call of the policy serves them all. Episode i is row i of that call's batch,
whatever the number of processes, and so always gets the same actions.
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

Steps = list[tuple[np.ndarray, float, bool]]  # observation, reward, whether the episode is over


class _Group:
    """Some environments in this process."""

    def __init__(self, make_env: Callable[[], Any], count: int):
        self._envs = [make_env() for _ in range(count)]

    def reset(self, seeds: Sequence[int]) -> Steps:
        return [(env.reset(seed=seed)[0], 0.0, False) for env, seed in zip(self._envs, seeds, strict=True)]

    def step(self, actions: Sequence[np.ndarray | None]) -> list[tuple[np.ndarray, float, bool] | None]:
        """None where the action is None."""
        return [
            None if action is None else self._step(env, action) for env, action in zip(self._envs, actions, strict=True)
        ]

    def _step(self, env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        obs, reward, terminated, truncated, _ = env.step(action)
        return obs, reward, terminated or truncated

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

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """First observations (N, ...) of the episodes of these seeds."""
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._obs = np.stack([obs for obs, _, _ in self._call("reset", seeds)])
        return self._obs.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations (N, ...), rewards (N,) and which episodes are over (N,); those that were stay as they are."""
        going = [None if over else action for action, over in zip(actions, self._over, strict=True)]
        rewards = np.zeros(self.num_envs)
        for index, result in enumerate(self._call("step", going)):
            if result is not None:
                self._obs[index], rewards[index], self._over[index] = result
        return self._obs.copy(), rewards, self._over.copy()

    def render(self, **kwargs: Any) -> np.ndarray:
        """A picture of the first environment."""
        self._groups[0].start("render", kwargs)
        return self._groups[0].finish()

    def close(self) -> None:
        """Closes the environments and ends their processes."""
        for group in self._groups:
            group.close()


class Moment(NamedTuple):
    """N episodes side by side, at their start or after a step.

    Observations (N, ...); returns, decisions and which episodes are over, (N,) each.
    """

    obs: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    over: np.ndarray

    @property
    def first_moved(self) -> bool:
        """Whether the first episode shows something new: its start, or what a step has made of it."""
        return self.lengths[0] == self.lengths.max()


def play(envs: SideBySide, seeds: Sequence[int], act: Callable[[np.ndarray], np.ndarray]) -> Iterator[Moment]:
    """Plays one episode of each seed to its end.

    Args:
        envs: as many environments as there are seeds.
        seeds: of the episodes.
        act: actions (N, A) for observations (N, ...).
    """
    obs = envs.reset(seeds)
    returns, lengths, over = (np.zeros(len(seeds), dtype=kind) for kind in (float, float, bool))
    yield Moment(obs, returns, lengths, over)
    while not over.all():
        lengths = lengths + ~over
        obs, rewards, over = envs.step(act(obs))
        returns = returns + rewards
        yield Moment(obs, returns, lengths, over)


if __name__ == "__main__":
    serve()
