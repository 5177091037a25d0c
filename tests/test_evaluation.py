"""Episodes side by side: the same whatever the number of processes, which never outlive the run."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import psutil
import pytest
from folders import assert_gone
from programs import Program
from runs import METHODS, SMALL
from toy import make_toy_env

import train
from errors import UserError
from support import evaluation
from support.evaluation import EpisodeError, SideBySide, reset, step

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # children then need not import it, nor PyTorch


def play_all(make_env, num_workers):
    """What three environments show in five episodes and in a picture after them."""

    def look_at(obs):  # actions that depend on every pixel of all observations
        return np.sin(obs.reshape(len(obs), -1).sum(axis=1, keepdims=True)).astype(np.float32)

    with contextlib.closing(SideBySide(make_env, 3, num_workers)) as envs:
        moments = list(evaluation.play(envs, [5, 6, 7, 8, 5], look_at))
        return [
            *(obs for moment in moments for obs in moment.obs.values()),
            moments[-1].returns,
            envs.render(height=20, width=24, camera_id=1),
        ]


def test_processes_change_nothing(tmp_path, monkeypatch):
    """They import nothing from the current folder, but from one whose name has a colon, as this process does."""
    current, colon = tmp_path / "current", tmp_path / "a:b"
    for name in ("errors", "utils", "support/__init__", "dmc2gym/__init__", "numpy", "signal"):
        path = current / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit(3)")
    colon.mkdir()
    settings = {"from_pixels": True, "height": 16, "width": 16, "frame_skip": 8, "episode_length": 32}
    (colon / "my_env.py").write_text(
        f"import dmc2gym\ndef make(): return dmc2gym.make('cartpole', 'swingup', **{settings})"
    )
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(colon)])
    import my_env

    monkeypatch.chdir(current)
    *_, returns, _ = here = play_all(my_env.make, 1)
    assert returns[0] == returns[4]  # of the same seed
    assert len(set(returns)) == 4
    for ours, theirs in zip(here, play_all(my_env.make, 2), strict=True):
        assert np.array_equal(ours, theirs)


class Countdown:
    """Ends after as many steps as its seed says, of even seeds by a divergence; complains of any step after that."""

    def reset(self, seed):
        self.seed = self.left = seed
        return np.array([self.left]), {"not to be pickled": lambda: None}

    def step(self, a):
        if self.left == 0:
            raise RuntimeError("a step after the end")
        self.left -= 1
        over = self.left == 0
        info = {"physics_error": "why"} if over and self.seed % 2 == 0 else {"not to be pickled": lambda: None}
        return np.array([self.left]), 1.0, over, False, info

    def close(self):
        pass


@pytest.mark.parametrize("num_workers", [1, 2])
def test_episodes_of_different_lengths(num_workers):
    """One that is over keeps its last observation; another may begin only when all of its wave are over."""
    seeds, batches = [1, 4, 2, 2, 1], []

    def act(obs):
        batches.append(obs[:, 0].tolist())
        return np.zeros((len(obs), 1))

    with contextlib.closing(SideBySide(Countdown, 3, num_workers)) as envs:
        moments = list(evaluation.play(envs, seeds, act))
    shown = [{episode: obs.item() for episode, obs in moment.obs.items()} for moment in moments]
    first, second = [{0: 1, 1: 4, 2: 2}, {0: 0, 1: 3, 2: 1}, {1: 2, 2: 0}, {1: 1}, {1: 0}], [{3: 2, 4: 1}, {3: 1, 4: 0}]
    assert shown == [*first, *second, {3: 0}]
    assert moments[-1].returns.tolist() == moments[-1].lengths.tolist() == seeds
    assert moments[-1].physics_errors == {1: "why", 2: "why", 3: "why"}
    assert batches == [[1, 4, 2], [0, 3, 1], [0, 2, 0], [0, 1, 0], [2, 1], [1, 0]]


def test_the_number_of_environments_does_not_grow_with_the_episodes(tmp_path, monkeypatch):
    """Each takes memory, and a renderer's context, of which drivers allow few."""
    made = []
    monkeypatch.setattr(train, "make_env", lambda args, seed: made.append(seed) or make_toy_env(args, seed))
    flags = [*SMALL, *METHODS["sac_state"], *"--num_train_steps 1 --num_eval_episodes 23".split()]
    assert train.main([*flags, "--work_dir", str(tmp_path)]) == 0
    assert len(made) <= evaluation.MAX_ENVS + 2  # training, and a spare one


class Faulty(Countdown):
    """Prints, and fails in a way that its action names."""

    def step(self, a):
        print("a line that nobody asked for", flush=True)
        obs, *others = super().step(a)
        if a == 1:
            raise LookupError("a mistake")
        if a == 2:
            raise UserError("put it right")
        if a == 3:
            os._exit(3)
        return (lambda: obs) if a == 4 else obs, *others


@pytest.mark.parametrize(("action", "error", "words"), [
    (1, EpisodeError, r"Traceback(.*\n)+.*, in step\n(.*\n)*LookupError: a mistake$"), (2, UserError, "^put it right$"),
    (3, UserError, "^a process that plays evaluation episodes has died$"),
    (4, EpisodeError, r"Traceback(.*\n)+.*pickle.*lambda"),
])  # fmt: skip
def test_errors_in_a_child(action, error, words):
    with contextlib.closing(SideBySide(Faulty, 2, 2)) as envs:
        envs.call(reset, [3, 9])
        assert [obs.tolist() for obs, *_ in envs.call(step, [0, 0])] == [[2], [8]]
        with pytest.raises(error, match=words):
            envs.call(step, [action, 0])
        if action != 3:  # later answers belong to later calls
            assert [obs.tolist() for obs in envs.call(reset, [5, 6])] == [[5], [6]]
    assert [child._process.returncode for child in envs._children] == [3 if action == 3 else 0, 0]


def no_env():
    raise LookupError("no such environment")


class Unreadable:
    """Cannot be made anew from its pickle, as if a module could not be imported there."""

    def __init__(self, make_env):
        self.make_env = make_env

    def __call__(self):
        return self.make_env()

    def __reduce__(self):
        return no_env, ()


def no_process(*_, **__):
    raise BlockingIOError(11, "Resource temporarily unavailable")


def dying(parent):
    """Makes an environment, but not in a child."""
    return Countdown() if os.getpid() == parent else os._exit(3)


@pytest.mark.parametrize(("maker", "popen", "cause"), [
    (Countdown, no_process, "[Errno 11] Resource temporarily unavailable"),
    (Unreadable(Countdown), subprocess.Popen, "LookupError: no such environment"),
    (functools.partial(dying, os.getpid()), subprocess.Popen, "a process that plays evaluation episodes has died"),
])  # fmt: skip
def test_this_process_makes_environments_if_others_cannot(monkeypatch, capsys, maker, popen, cause):
    monkeypatch.setattr(subprocess, "Popen", popen)
    with contextlib.closing(SideBySide(maker, 2, 2)) as envs:
        assert [obs.tolist() for obs in envs.call(reset, [3, 9])] == [[3], [9]]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: evaluation goes on in this process, because no other can do it ({cause})")
    with pytest.raises(LookupError, match="no such environment"):
        SideBySide(no_env, 2, 2)
    assert capsys.readouterr().err == ""


def test_no_child_is_left_of_environments_that_cannot_be_sent():
    before = psutil.Process().children()
    with pytest.raises(TypeError, match="pickle") as kept:  # with its traceback, as a notebook keeps it
        SideBySide(functools.partial(dying, threading.Lock()), 2, 2)
    assert psutil.Process().children() == before, kept


def test_children_do_without_pytorch():
    """Which takes more memory than an environment."""
    args = train.make_parser().parse_args(SMALL)
    program = "import pickle, sys; pickle.load(sys.stdin.buffer)(); print('torch' in sys.modules)"
    message = cloudpickle.dumps(functools.partial(train.make_env, args, 1))
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; import support.evaluation; {program}"]
    assert subprocess.check_output(command, input=message) == b"False\n"


def children_of(process):
    """The run's processes that play evaluation episodes."""
    children = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "support.evaluation" in " ".join(child.cmdline()):
                children.append(child)
    return children


@pytest.mark.parametrize(("ending", "moment"), [
    (signal.SIGKILL, "starting"), (signal.SIGKILL, "evaluating"), (signal.SIGINT, "starting"),
    (signal.SIGINT, "training"), (signal.SIGTERM, "evaluating"), (signal.SIGTERM, "training"),
])  # fmt: skip
def test_no_process_outlives_the_run(tmp_path, ending, moment):
    """Killed, interrupted by a terminal, or stopped by a scheduler, which signals each process of a job."""
    flags = [*SMALL, *METHODS["sac_state"], "--eval_workers", "2", "--num_train_steps", "100000"]
    process = Program("train.py", *flags, "--work_dir", tmp_path / "log")
    if moment == "starting":
        while len(children_of(process)) < 2:
            time.sleep(0.02)
    else:
        start = "first an evaluation" if moment == "evaluating" else "| eval"
        assert any(line.startswith(start) for line in process.stdout)
        time.sleep(0.3)
    children = children_of(process)
    assert len(children) == 2
    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)
    else:
        for child in children if ending == signal.SIGTERM and moment != "starting" else ():
            child.send_signal(ending)
        process.send_signal(ending)
    _, stderr = process.communicate()
    if moment == "starting" or ending == signal.SIGKILL:
        assert (process.returncode, stderr) == (-ending, "")
    else:
        said = rf"train\.py: stopped by {ending.name} at step \d+: --resume continues it\n"
        assert re.fullmatch(said, stderr), stderr
        assert process.returncode == 128 + ending
    assert_gone(children)
