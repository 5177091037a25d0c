"""A bug keeps its traceback, wherever it is, and harms no checkpoint."""

from __future__ import annotations

import itertools
import shutil
import sys
import traceback

import cloudpickle
import own_env
import pytest
from folders import outcome
from runs import METHODS

import evaluate
import train
from logger import Logger
from sac_ae import SacAeAgent
from support.evaluation import EpisodeError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that no other process imports it
RUN = [*own_env.RUN, *METHODS["sac_state"], *"--num_train_steps 40 --init_steps 15 --replay_buffer_capacity 25".split()]
TWO, VIDEO, RESUME = ["--eval_workers", "2"], ["--save_video"], ["--resume", "--eval_freq", "31"]
VALUE, KEY, ATTRIBUTE = ValueError("not enough values"), KeyError("such a key"), AttributeError("such_a_thing")
DISK, FILE, PIPE = OSError(5, "Input/output error"), FileNotFoundError(2, "No such file"), BrokenPipeError(32, "Pipe")
RUNTIME = RuntimeError("allocate() takes 1 argument")


def failing(function, calls, error, count=None):
    """The function, which raises an error after so many calls; `count` is shared with others."""
    count = count or itertools.count()

    def call(*args, **kwargs):
        if next(count) >= calls:
            raise error
        return function(*args, **kwargs)

    return call


def failing_env(kind, method, calls, error, training=2):
    """In place of `train.make_env`: the first ones made are for a trial and for training, the others for evaluation."""
    made, count = itertools.count(), itertools.count()

    def make_env(args, seed):
        env = own_env.make_env(args, seed)
        if (kind == "training") == (next(made) < training):
            setattr(env, method, failing(getattr(env, method, None), calls, error, kind == "training" and count))
            if method == "make":
                env.make()
        return env

    return make_env


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    monkeypatch.setattr(train, "make_env", own_env.make_env)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folders of runs without a bug, by their decisions: the one of 30 ends within an episode."""
    folders = {steps: tmp_path_factory.mktemp("ended") / "log" for steps in (30, 40)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", own_env.make_env)
        for steps, folder in folders.items():
            assert train.main([*RUN, "--num_train_steps", str(steps), "--work_dir", str(folder)]) == 0
    return folders


AT_THE_START = [
    ("training", "make", 0, FILE, []), ("training", "step", 1, DISK, []), ("training", "render", 0, VALUE, VIDEO),
    ("evaluation", "make", 0, RUNTIME, TWO), (SacAeAgent, "__init__", 0, VALUE, []),
    (SacAeAgent, "check_complete", 0, KEY, []),
]  # fmt: skip
LATER = [
    ("training", "reset", 3, KEY, []), ("training", "step", 38, FILE, []), ("evaluation", "step", 14, DISK, []),
    ("evaluation", "reset", 0, RUNTIME, TWO), ("evaluation", "render", 3, KEY, TWO + VIDEO),
    (SacAeAgent, "actor_loss", 9, RUNTIME, []), (SacAeAgent, "sample_action", 12, PIPE, []),
    (SacAeAgent, "state_dict", 2, KEY, []), (Logger, "dump", 2, DISK, []), (Logger, "close", 0, DISK, []),
    # At a resume, after a trial of three decisions: in the actions that are repeated, and later.
    ("training", "step", 4, ATTRIBUTE, RESUME), ("evaluation", "step", 2, KEY, TWO + RESUME),
    (Logger, "__init__", 0, KEY, RESUME), (SacAeAgent, "load_state_dict", 0, FILE, RESUME),
]  # fmt: skip


@pytest.mark.parametrize(("where", "method", "calls", "error", "flags"), [*AT_THE_START, *LATER])
def test_a_bug(tmp_path, monkeypatch, capfd, ended, where, method, calls, error, flags):
    remote = where == "evaluation" and method != "make" and TWO[0] in flags
    if RESUME[0] in flags:
        shutil.copytree(ended[30], tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch, pytest.raises(EpisodeError if remote else type(error)) as info:
        if isinstance(where, str):
            patch.setattr(train, "make_env", failing_env(where, method, calls, error))
        else:
            patch.setattr(where, method, failing(getattr(where, method), calls, error))
        train.main([*RUN, *flags, "--work_dir", str(tmp_path)])
    assert capfd.readouterr().err == ""
    # The last line of the traceback is where the error was raised.
    told = str(info.value) if remote else "".join(traceback.format_exception(info.value)).rstrip()
    assert [line for line in told.splitlines() if line.startswith("  File ")][-1].endswith(", in call")
    assert told.endswith("".join(traceback.format_exception_only(error)).rstrip())
    if (where, method, calls, error, flags) in AT_THE_START:
        assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
    assert train.main([*RUN, "--resume", "--work_dir", str(tmp_path)]) == 0
    assert capfd.readouterr().err == ""
    assert outcome(tmp_path) == outcome(ended[40])


@pytest.mark.parametrize("method", ["reset", "step", "render", "side_by_side"])
def test_a_bug_in_evaluate(tmp_path, monkeypatch, ended, method):
    monkeypatch.setattr(train, "make_env", failing_env("evaluation", method, 0, DISK, training=1))
    if method == "side_by_side":
        monkeypatch.setattr(evaluate, "side_by_side", failing(evaluate.side_by_side, 0, DISK))
    command = [str(ended[40]), *"--device cpu --eval_workers 1 --episodes 1 --video".split(), str(tmp_path / "a.mp4")]
    with pytest.raises(OSError, match="Input/output error"):
        evaluate.main(command)
    assert not list(tmp_path.iterdir())
