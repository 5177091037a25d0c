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
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, ClassVar, NamedTuple

import cloudpickle
import numpy as np

from errors import MachineError, UserError
from support.signals import held_signals

# Each environment takes memory (84 MB from pixels, drawn in software) and a renderer's context, of which drivers allow
# few. More episodes are played in waves.
MAX_ENVS = 10


class EpisodeError(RuntimeError):
    """An environment failed in another process; the message is the traceback there."""


class _Group:
    """Some environments in this process."""

    def __init__(self, make_env: Callable[[], Any], count: int):
        self._envs = [make_env() for _ in range(count)]
        self._answers: list[Any] = []

    def start(self, method: str, arguments: Sequence[Any]) -> None:
        """Calls a method of this class with each argument that is not None, argument i with environment i."""
        pairs, call = zip(self._envs, arguments, strict=False), getattr(self, method)
        self._answers = [None if argument is None else call(env, argument) for env, argument in pairs]

    def finish(self) -> list[Any] | Exception:
        """The values of the last calls, or the error of another process."""
        return self._answers

    def reset(self, env: Any, seed: int) -> np.ndarray:
        return env.reset(seed=seed)[0]

    def step(self, env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool, str | None]:
        obs, reward, terminated, truncated, info = env.step(action)
        return obs, float(reward), bool(terminated or truncated), info.get("physics_error")

    def render(self, env: Any, kwargs: dict[str, Any]) -> Any:
        return env.render(**kwargs)

    def close(self) -> None:
        for env in self._envs:
            env.close()


class _Pickler(cloudpickle.Pickler):
    """Carries functions and classes of the program itself, with the names of their files, which tracebacks show."""

    @staticmethod
    def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
        make, values = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
        return make, tuple(code.co_filename if value == "<dynamic-code>" else value for value in values)

    dispatch_table: ClassVar = ChainMap({types.CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


class _RemoteGroup:
    """The same in another process, which ends with this one, however this one ends.

    Unlike multiprocessing's processes, it does not import the program that started it, and so not PyTorch: less than
    half of the memory.
    """

    def __init__(self, make_env: Callable[[], Any], count: int):
        content = io.BytesIO()
        _Pickler(content).dump((make_env, count))
        self._connection, there = Pipe()
        command = [sys.executable, "-m", "support.evaluation", str(there.fileno())]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        descriptors: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": 2, "pass_fds": [there.fileno()]}
        with held_signals(), there:
            self._process = subprocess.Popen(command, env=environ, **descriptors)
        self._send(content.getvalue())

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError:
            raise MachineError("a process that plays evaluation episodes has died") from None

    def start(self, method: str, arguments: Sequence[Any]) -> None:
        self._send(pickle.dumps((method, arguments)))

    def finish(self) -> list[Any] | Exception:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return MachineError("a process that plays evaluation episodes has died")

    def close(self) -> None:
        self._connection.close()  # at which the process ends
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(descriptor: int) -> None:
    """Answers a `_RemoteGroup` until that closes its connection. The first message makes the environments."""
    group, answer = None, None
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        while True:
            message = connection.recv_bytes()
            try:
                if group is None:
                    group = _Group(*pickle.loads(message))
                else:
                    group.start(*pickle.loads(message))
                answer = group.finish()
            except (UserError, MachineError) as known:
                answer = type(known)(str(known))
            except Exception:
                trace = traceback.format_exc().rstrip()
                answer = EpisodeError(f"in a process that plays evaluation episodes:\n{trace}")
            connection.send(answer)
    if group is not None:
        group.close()


class SideBySide:
    """A fixed number of environments that make decisions together.

    They are spread over at most `num_workers` processes, at most one per environment; 1: only this process.
    """

    def __init__(self, make_env: Callable[[], Any], num_envs: int, num_workers: int):
        self.num_envs = num_envs
        self._rows = np.array_split(np.arange(num_envs), min(num_workers, num_envs))
        kind = _RemoteGroup if len(self._rows) > 1 else _Group
        self._groups: list[Any] = []
        try:
            for rows in self._rows:
                self._groups.append(kind(make_env, len(rows)))
            self._finish()  # the environments are made
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Calls environment i with argument i, if that is not None."""
        for group, rows in zip(self._groups, self._rows, strict=True):
            group.start(method, [arguments[row] for row in rows if row < len(arguments)])
        return self._finish()

    def _finish(self) -> list[Any]:
        # Every group's answer is taken before any error is raised, or later calls would get answers to earlier ones.
        answers = [group.finish() for group in self._groups]
        for error in answers:
            if isinstance(error, Exception):
                raise error
        return [answer for of_group in answers for answer in of_group]

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """First observations (N, ...) of the episodes of these seeds, at most `num_envs`."""
        self.over = np.zeros(len(seeds), dtype=bool)
        self.physics_errors: list[str | None] = [None] * len(seeds)
        self._obs = np.stack(self._call("reset", seeds))
        return self._obs.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations (N, ...), rewards (N,) and which episodes are over (N,); those that were stay as they are.

        Where a simulation has diverged, `physics_errors` says why.
        """
        going = [None if over else action for action, over in zip(actions, self.over, strict=True)]
        rewards = np.zeros(len(going))
        for index, step in enumerate(self._call("step", going)):
            if step is not None:
                self._obs[index], rewards[index], self.over[index], self.physics_errors[index] = step
        return self._obs.copy(), rewards, self.over.copy()

    def render(self, **kwargs: Any) -> Any:
        """A picture of the first environment."""
        return self._call("render", [kwargs])[0]

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

    `act` gives actions (n, A) for observations (n, ...).
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int)
    errors: dict[int, str] = {}
    for start in range(0, len(seeds), envs.num_envs):
        wave = slice(start, start + envs.num_envs)
        obs = envs.reset(seeds[wave])
        yield Moment(obs, returns, lengths, start == 0, errors)
        while not envs.over.all():
            going = ~envs.over
            obs, rewards, _ = envs.step(act(obs))
            returns[wave] += rewards
            lengths[wave] += going
            errors |= {start + index: error for index, error in enumerate(envs.physics_errors) if error is not None}
            yield Moment(obs, returns, lengths, start == 0 and bool(going[0]), errors)


if __name__ == "__main__":
    from support import evaluation  # under this name the other process knows its errors

    evaluation.serve(int(sys.argv[1]))
