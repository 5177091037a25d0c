"""Episodes played side by side, in this process or in child processes.

All environments make each decision together, so that one call of the policy serves them all. Episode i is always in
the same row of the same call's batch, whatever the number of processes, and so always gets the same actions.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from errors import UserError
from support.signals import STOPPING

# Each environment takes memory (84 MB from pixels, drawn in software) and a renderer's context, of which drivers allow
# few. More episodes are played in waves.
MAX_ENVS = 10

# What a child process runs. A scheduler may send signals to all processes of a job: the child ignores them at once.
CHILD = f"""import signal, sys
for number in {[*map(int, STOPPING)]}: signal.signal(number, signal.SIG_IGN)
sys.path[:] = sys.argv[2:]
from support.evaluation import serve; serve(int(sys.argv[1]))"""


class EpisodeError(RuntimeError):
    """Code failed in a child process; the message is its traceback there."""


def make(envs: list[Any], makers: Sequence[Callable[[], Any]]) -> list[Any]:
    """Adds environments to a list. `SideBySide.call` runs this and the next four functions on a process's list."""
    envs += [make_env() for make_env in makers]
    return []


def reset(envs: list[Any], seeds: Sequence[int]) -> list[np.ndarray]:
    """First observations, of as many environments as there are seeds."""
    return [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=False)]


def step(envs: list[Any], actions: Sequence[np.ndarray | None]) -> list[Any]:
    """Observation, reward, whether the episode is over, and any physics error, of each environment with an action."""
    steps: list[Any] = [None] * len(actions)
    for index, action in enumerate(actions):
        if action is not None:
            obs, reward, terminated, truncated, info = envs[index].step(action)
            steps[index] = obs, float(reward), bool(terminated or truncated), info.get("physics_error")
    return steps


def render(envs: list[Any], keywords: Sequence[dict[str, Any]]) -> list[Any]:
    """Pictures, of as many environments as there are keywords."""
    return [env.render(**each) for env, each in zip(envs, keywords, strict=False)]


def current_states(envs: list[Any], wanted: Sequence[Any]) -> list[np.ndarray]:
    """Tasks' states (S,), of as many environments as `wanted` is long."""
    # Copies: an environment may change its state in place.
    return [np.array(env.unwrapped.current_state) for env, _ in zip(envs, wanted, strict=False)]


def serve(descriptor: int) -> None:
    """Answers a `Child`, from within its process, until the pipe closes."""
    envs: list[Any] = []
    with Connection(descriptor) as pipe, suppress(EOFError, ConnectionError):
        while True:
            message = pipe.recv_bytes()
            try:
                function, arguments = pickle.loads(message)
                answer = pickle.dumps(function(envs, arguments))
            except UserError as error:
                answer = pickle.dumps(UserError(str(error)))
            except Exception:
                trace = traceback.format_exc().rstrip()
                answer = pickle.dumps(EpisodeError(f"in a process that plays evaluation episodes:\n{trace}"))
            pipe.send_bytes(answer)
    for env in envs:
        env.close()


class Child:
    """Environments in a child process. It exits when the pipe closes, even if this process is killed.

    Unlike multiprocessing's processes, it does not import the program that started it, and so not PyTorch: less than
    half of the memory. It imports this project from where this process has it, not from the current folder.
    """

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()  # for a pickled call and its answer, in turn
        paths = [str(Path(__file__).parent.parent), *filter(None, sys.path)]
        if "" in sys.path:  # in a notebook or `python -c`: this process, too, finds modules in the current folder
            paths.append(str(Path.cwd()))
        command = [sys.executable, "-P", "-c", CHILD, str(theirs.fileno()), *paths]
        with theirs:  # in a session of its own, which Ctrl-C does not reach; what it prints goes to stderr
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
            )

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._process.kill()
        self._process.wait()


class SideBySide:
    """A fixed number of environments that make decisions together.

    They are spread over at most `num_workers` processes, at most one per environment; 1: only this process. If other
    processes cannot start or cannot make them, as under a limit of processes, this one makes them all, and says so.
    Raises EpisodeError for any error in another process, but UserError as it is, and if a process has died.
    """

    def __init__(self, make_env: Callable[[], Any], num_envs: int, num_workers: int):
        self.num_envs = num_envs
        self._envs: list[Any] = []  # of this process
        self._children: list[Child] = []
        self._rows = np.array_split(np.arange(num_envs), min(num_workers, num_envs))
        makers, cause = [make_env] * num_envs, ""
        if len(self._rows) > 1:
            try:
                self._children += (Child() for _ in self._rows)
                self.call(make, makers)
                return
            except (OSError, EpisodeError, UserError) as error:
                cause = (str(error) or type(error).__name__).splitlines()[-1]
                self.close()
                self._children = []
            except BaseException:
                self.close()
                raise
        self.call(make, makers)  # if this fails, too, its error is the one that counts
        if cause:
            from support import report  # only here: other processes do without PyTorch

            limit = "is there a limit of processes (ulimit -u)?"
            report.say(f"note: evaluation goes on in this process, because no other can do it ({cause}): {limit}")

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
        """Calls one of the functions above with argument i for environment i. Returns the values."""
        if not self._children:
            return function(self._envs, arguments)
        dumps = cloudpickle.dumps if function is make else pickle.dumps  # which is faster
        messages = [dumps((function, [arguments[row] for row in rows if row < len(arguments)])) for rows in self._rows]
        try:
            for child, message in zip(self._children, messages, strict=True):
                child.pipe.send_bytes(message)
            # All of them, before an error is raised, or later calls would get answers to earlier ones.
            received = [child.pipe.recv_bytes() for child in self._children]
        except (EOFError, OSError) as error:
            raise UserError("a process that plays evaluation episodes has died") from error
        answers = [pickle.loads(answer) for answer in received]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [value for values in answers for value in values]

    def render(self, **keywords: Any) -> Any:
        """A picture of the first environment."""
        return self.call(render, [keywords])[0]

    def close(self) -> None:
        """Closes the environments and ends their processes."""
        for each in (*self._envs, *self._children):
            each.close()


class Moment(NamedTuple):
    """State of N evaluation episodes after a reset or a decision; arrays over all N are updated in place."""

    obs: dict[int, np.ndarray]  # of episodes that have just been reset or made a decision, by number
    returns: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,), in decisions
    physics_errors: dict[int, str]  # why episodes have ended where their simulation diverged, by number


def play(envs: SideBySide, seeds: Sequence[int], act: Callable[[np.ndarray], np.ndarray]) -> Iterator[Moment]:
    """Plays one episode of each seed to its end, in waves of as many as there are environments.

    `act` gives actions (n, A) for observations (n, ...); an episode that is over keeps its last observation.
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int)
    errors: dict[int, str] = {}
    for start in range(0, len(seeds), envs.num_envs):
        obs = np.stack(envs.call(reset, seeds[start : start + envs.num_envs]))
        going = [True] * len(obs)
        yield Moment(dict(enumerate(obs, start)), returns, lengths, errors)
        while any(going):
            actions = [action if goes else None for action, goes in zip(act(obs), going, strict=True)]
            obs, shown = obs.copy(), {}
            for index, made in enumerate(envs.call(step, actions)):
                if made is not None:
                    obs[index], reward, over, error = made
                    shown[start + index] = obs[index]
                    returns[start + index] += reward
                    lengths[start + index] += 1
                    going[index] = not over
                    errors |= {} if error is None else {start + index: error}
            yield Moment(shown, returns, lengths, errors)
