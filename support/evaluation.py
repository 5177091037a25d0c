"""Episodes played side by side, in this process or spread over others.

All environments make each decision together, so that one call of the policy serves them all. Episode i is always in
the same row of the same call's batch, whatever the number of processes, and so always gets the same actions.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import CodeType
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from errors import UserError
from support.signals import held_signals

# Each environment takes memory (84 MB from pixels, drawn in software) and a renderer's context, of which drivers allow
# few. More episodes are played in waves.
MAX_ENVS = 10


class EpisodeError(RuntimeError):
    """An environment failed in another process; the message is the traceback there."""


class _Group:
    """Some environments in this process."""

    def __init__(self) -> None:
        self._envs: list[Any] = []
        self._answers: list[Any] = []

    def start(self, method: str, arguments: Sequence[Any]) -> None:
        """Calls a method of this class for environment i with argument i, unless that is None."""
        call = getattr(self, method)
        self._answers = [None if value is None else call(index, value) for index, value in enumerate(arguments)]

    def finish(self) -> list[Any] | Exception:
        """The values of the last calls, or the error of another process."""
        return self._answers

    def make(self, _index: int, make_env: Callable[[], Any]) -> None:
        self._envs.append(make_env())

    def reset(self, index: int, seed: int) -> np.ndarray:
        return self._envs[index].reset(seed=seed)[0]

    def step(self, index: int, action: np.ndarray) -> tuple[np.ndarray, float, bool, str | None]:
        obs, reward, terminated, truncated, info = self._envs[index].step(action)
        return obs, float(reward), bool(terminated or truncated), info.get("physics_error")

    def render(self, index: int, keywords: dict[str, Any]) -> Any:
        return self._envs[index].render(**keywords)

    def close(self) -> None:
        for env in self._envs:
            env.close()


class _Pickler(cloudpickle.Pickler):
    """Carries functions and classes of the program itself, with the names of their files, which tracebacks show."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, CodeType):
            return super().reducer_override(value)
        make, parts = self.dispatch_table[CodeType](value)
        return make, tuple(value.co_filename if part == "<dynamic-code>" else part for part in parts)


class _RemoteGroup:
    """The same in another process, which ends with this one, however this one ends.

    Unlike multiprocessing's processes, it does not import the program that started it, and so not PyTorch: less than
    half of the memory.
    """

    def __init__(self) -> None:
        self._connection, there = Pipe()
        command = [sys.executable, "-c", f"from support.evaluation import serve; serve({there.fileno()})"]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        descriptors: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": 2, "pass_fds": [there.fileno()]}
        with held_signals(), there:
            self._process = subprocess.Popen(command, env=environ, **descriptors)

    def start(self, method: str, arguments: Sequence[Any]) -> None:
        message, pickler = io.BytesIO(), _Pickler if method == "make" else pickle.Pickler  # which is faster
        pickler(message).dump((method, arguments))
        with suppress(OSError):  # the process has died, which `finish` will say
            self._connection.send_bytes(message.getvalue())

    def finish(self) -> list[Any] | Exception:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return UserError("a process that plays evaluation episodes has died")

    def close(self) -> None:
        self._connection.close()  # at which the process ends
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._process.kill()
        self._process.wait()


def serve(descriptor: int) -> None:
    """Answers a `_RemoteGroup` until that closes its connection."""
    group, answer = _Group(), None
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        while True:
            message = connection.recv_bytes()
            try:
                group.start(*pickle.loads(message))
                answer = group.finish()
            except UserError as known:
                answer = known
            except Exception:
                trace = traceback.format_exc().rstrip()
                answer = EpisodeError(f"in a process that plays evaluation episodes:\n{trace}")
            connection.send(answer)
    group.close()


class SideBySide:
    """A fixed number of environments that make decisions together.

    They are spread over at most `num_workers` processes, at most one per environment; 1: only this process.
    """

    def __init__(self, make_env: Callable[[], Any], num_envs: int, num_workers: int):
        self.num_envs = num_envs
        self._rows = np.array_split(np.arange(num_envs), min(num_workers, num_envs))
        self._groups: list[Any] = [_RemoteGroup() for _ in self._rows] if len(self._rows) > 1 else [_Group()]
        try:
            self.call("make", [make_env] * num_envs)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Calls a method of `_Group` for environment i with argument i, unless that is None. Returns the values."""
        for group, rows in zip(self._groups, self._rows, strict=True):
            group.start(method, [arguments[row] for row in rows if row < len(arguments)])
        # Every group's answer is taken before any error is raised, or later calls would get answers to earlier ones.
        answers = [group.finish() for group in self._groups]
        for error in answers:
            if isinstance(error, Exception):
                raise error
        return [answer for of_group in answers for answer in of_group]

    def render(self, **keywords: Any) -> Any:
        """A picture of the first environment."""
        return self.call("render", [keywords])[0]

    def close(self) -> None:
        """Closes the environments and ends their processes."""
        for group in self._groups:
            group.close()


class Moment(NamedTuple):
    """State of N evaluation episodes after a reset or a decision; arrays over all N are updated in place."""

    obs: np.ndarray  # (n, ...), of the current wave
    returns: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,), in decisions
    first_moved: bool  # whether the first episode shows something new
    physics_errors: dict[int, str]  # why episodes have ended where their simulation diverged, by number


def play(envs: SideBySide, seeds: Sequence[int], act: Callable[[np.ndarray], np.ndarray]) -> Iterator[Moment]:
    """Plays one episode of each seed to its end, in waves of as many as there are environments.

    `act` gives actions (n, A) for observations (n, ...); an episode that is over keeps its last observation.
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int)
    errors: dict[int, str] = {}
    for start in range(0, len(seeds), envs.num_envs):
        obs = np.stack(envs.call("reset", seeds[start : start + envs.num_envs]))
        going = [True] * len(obs)
        yield Moment(obs, returns, lengths, start == 0, errors)
        while any(going):
            first_moved = start == 0 and going[0]
            actions = [action if goes else None for action, goes in zip(act(obs), going, strict=True)]
            obs = obs.copy()
            for index, step in enumerate(envs.call("step", actions)):
                if step is not None:
                    obs[index], reward, over, error = step
                    returns[start + index] += reward
                    lengths[start + index] += 1
                    going[index] = not over
                    errors |= {} if error is None else {start + index: error}
            yield Moment(obs, returns, lengths, first_moved, errors)
