"""Bugs of whoever edits the code, wherever they show: they keep their traceback and harm no checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from own_env import OwnEnv
from test_resume import contents, outcome, step_of

import evaluate
import train
from errors import UserError
from logger import Logger
from support.evaluation import EpisodeError
from utils import FrameStack

ROOT = Path(__file__).parent.parent
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers then need not import it, nor PyTorch
# Episodes of 8 to 11 decisions, two of them at random; evaluations at 0 and at the fourth; a checkpoint after each.
RUN = (
    "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --init_steps 15 --num_train_steps 40 --eval_freq 25 "
    "--num_eval_episodes 2 --eval_workers 1 --device cpu --checkpoint_minutes 0 --replay_buffer_capacity 25"
).split()
STATES = ("--encoder_type", "identity", "--decoder_type", "identity")
TWO = ("--eval_workers", "2")


def attribute_bug():
    return np.zeros(1).such_a_thing


def value_bug():
    first, second = np.zeros(3)
    return first, second


def key_bug():
    return {"a": 1}["such a key"]


def os_bug():
    raise OSError(5, "Input/output error of an environment")


def file_bug():
    return open("/no/such/file")  # noqa: PTH123


def pipe_bug():
    raise BrokenPipeError(32, "Broken pipe to a simulator")


def allocate_bug():
    raise RuntimeError("allocate() takes 1 argument")


BUGS = {attribute_bug: AttributeError, value_bug: ValueError, key_bug: KeyError, os_bug: OSError}
BUGS |= {file_bug: FileNotFoundError, pipe_bug: BrokenPipeError, allocate_bug: RuntimeError}


class BuggyEnv(OwnEnv):
    """Has a bug in the call number `at`, counted from 0, of one of its methods."""

    def __init__(self, method, bug, at, **options):
        super().__init__(**options)
        self.left = {method: at}
        self.bug = bug

    def meet(self, method):
        if method in self.left:
            self.left[method] -= 1
            if self.left[method] < 0:
                self.bug()

    def reset(self, **options):
        self.meet("reset")
        return super().reset(**options)

    def step(self, action):
        self.meet("step")
        return super().step(action)

    def render(self):
        self.meet("render")
        return super().render()


class Maker:
    """In place of `train.make_env`: environments of which one, or those of evaluation, have a bug.

    Args:
        role: 0 is the spare environment, which is tried out first, 1 that of training, 2 are those of evaluation.
        method, bug, at: of `BuggyEnv`.
    """

    def __init__(self, role=3, *bug):
        self.role, self.bug = role, bug
        self.made = 0  # in the main process, before it sends a copy of this to others

    def __call__(self, args, seed):
        role = min(2, self.made)
        self.made += 1
        states = args.encoder_type == "identity"
        env = BuggyEnv(*self.bug, states=states) if role == self.role else OwnEnv(states=states)
        return env if states else FrameStack(env, args.frame_stack)


SPARE, TRAINING, EVALUATION = range(3)


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """Each test begins with environments that have no bug."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "make_env", Maker())


def run(folder, *flags):
    return train.main([*RUN, *flags, "--work_dir", str(folder)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of runs without a bug, of so many decisions. Tests must not write there."""
    folders = {}

    def get(flags, steps=40):
        if (flags, steps) not in folders:
            folders[flags, steps] = tmp_path_factory.mktemp("made") / "log"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "make_env", Maker())
                assert run(folders[flags, steps], *flags, "--num_train_steps", str(steps)) == 0
        return folders[flags, steps]

    return get


def assert_told(info, bug, remote, capture):
    """The error is of the bug's own type, or holds the traceback of the other process; it ends where the bug is."""
    if remote:
        assert type(info.value) is EpisodeError
        told = str(info.value)
        assert "support/evaluation.py" in told
    else:
        assert type(info.value) is BUGS[bug]
        assert not isinstance(info.value, UserError | UserError)
        told = "".join(traceback.format_exception(info.value)).rstrip()
        assert traceback.extract_tb(info.tb)[-1].name == bug.__name__
    place = [line for line in told.splitlines() if line.startswith("  File ")][-1]
    assert place.endswith(f", line {bug.__code__.co_firstlineno + 1}, in {bug.__name__}")
    assert told.splitlines()[-1].startswith(BUGS[bug].__name__)
    printed = capture.readouterr()
    assert "error:" not in printed.err
    assert "damaged" not in (told + printed.out + printed.err).lower()


def assert_goes_on(folder, flags, made, capture):
    """Without the bug, in this process alone, and comes to what a run without one comes to."""
    flags = tuple(flag for flag in flags if flag not in TWO)
    assert run(folder, *flags, "--resume") == 0
    assert capture.readouterr().err == ""
    assert outcome(folder) == outcome(made(tuple(flag for flag in flags if flag != "--save_video")))


# Place, bug, number of the call, flags. Evaluation plays two episodes, each in an environment of its own.
IN_ENVIRONMENTS = {
    "training": [
        (TRAINING, "reset", value_bug, 0, STATES),
        (TRAINING, "reset", key_bug, 3, STATES),
        (TRAINING, "step", os_bug, 0, STATES),
        (TRAINING, "step", attribute_bug, 22, ()),
        (TRAINING, "step", file_bug, 38, STATES),
    ],
    "evaluation": [
        (EVALUATION, "reset", os_bug, 1, STATES),
        (EVALUATION, "step", key_bug, 14, STATES),
        (EVALUATION, "render", attribute_bug, 3, (*STATES, "--save_video")),
    ],
    "evaluation in two processes": [
        (EVALUATION, "reset", value_bug, 0, (*STATES, *TWO)),
        (EVALUATION, "step", os_bug, 14, (*STATES, *TWO)),
        (EVALUATION, "render", key_bug, 3, (*STATES, *TWO, "--save_video")),
    ],
}
CASES = [(moment, *case) for moment, cases in IN_ENVIRONMENTS.items() for case in cases]


@pytest.mark.parametrize(("moment", "role", "method", "bug", "at", "flags"), CASES)
def test_in_an_environment(tmp_path, monkeypatch, capfd, made, moment, role, method, bug, at, flags):
    folder, remote = tmp_path / "log", "two" in moment
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_env", Maker(role, method, bug, at))
        with pytest.raises(EpisodeError if remote else BUGS[bug]) as info:
            run(folder, *flags)
    assert_told(info, bug, remote, capfd)
    assert_goes_on(folder, flags, made, capfd)


@pytest.mark.parametrize(
    ("method", "bug", "flags"),
    [("reset", key_bug, STATES), ("step", os_bug, ()), ("render", value_bug, ("--save_video",))],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_at_the_start(tmp_path, monkeypatch, capfd, made, method, bug, flags, resumed):
    """Or at a resume, before it is seen that there is one: nothing is written."""
    folder = tmp_path / "log"
    if resumed:
        shutil.copytree(made(STATES if flags == STATES else (), 30), folder)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_env", Maker(SPARE, method, bug, 0))
        with pytest.raises(BUGS[bug]) as info:
            run(folder, *flags, "--resume")
    assert_told(info, bug, False, capfd)
    assert contents(tmp_path) == before
    assert folder.exists() == resumed


@pytest.mark.parametrize("flags", [(), TWO], ids=["one process", "two"])
def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch, capfd, flags):
    """For evaluation, after all others were: nothing but the lock's file is written."""

    class Unmade(Maker):
        def __call__(self, args, seed):
            if self.made >= EVALUATION:
                os_bug()
            return super().__call__(args, seed)

    monkeypatch.setattr(train, "make_env", Unmade())
    with pytest.raises(EpisodeError if flags else OSError) as info:
        run(tmp_path / "log", *STATES, *flags)
    assert_told(info, os_bug, bool(flags), capfd)
    assert [path.name for path in (tmp_path / "log").iterdir()] == [".lock"]


# Decision 30 is in the middle of an episode, which a resumed run catches up: a reset, and its actions.
AT_RESUMES = [
    (TRAINING, "reset", value_bug, 0, STATES),
    (TRAINING, "step", attribute_bug, 1, ()),  # while it catches up
    (TRAINING, "step", os_bug, 6, STATES),
    (EVALUATION, "reset", file_bug, 0, STATES),
    (EVALUATION, "step", key_bug, 2, (*STATES, *TWO)),
    (EVALUATION, "render", value_bug, 2, (*STATES, "--save_video")),
]


@pytest.mark.parametrize(("role", "method", "bug", "at", "flags"), AT_RESUMES)
def test_in_an_environment_at_a_resume(tmp_path, monkeypatch, capfd, made, role, method, bug, at, flags):
    folder, remote = tmp_path / "log", "2" in flags
    shutil.copytree(made(STATES if STATES[0] in flags else (), 30), folder)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_env", Maker(role, method, bug, at))
        # An evaluation after the next episode, too.
        with pytest.raises(EpisodeError if remote else BUGS[bug]) as info:
            run(folder, *flags, "--resume", *(("--eval_freq", "31") if role == EVALUATION else ()))
    assert_told(info, bug, remote, capfd)
    assert step_of(folder) >= 30
    assert_goes_on(folder, (*flags, "--eval_freq", "25"), lambda flags: made(flags[:-2]), capfd)


def buggy_method(method, bug, at):
    """A method that has a bug in the call number `at`."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > at:
            bug()
        return method(*args, **kwargs)

    return call


IN_AGENTS = [
    # at the start, in training, in an evaluation, at a resume; decision 30 is reached after 30 updates
    ("__init__", value_bug, 0, STATES, 0),
    ("critic_loss", attribute_bug, 0, (), 0),
    ("actor_loss", key_bug, 9, STATES, 0),
    ("decoder_loss", value_bug, 20, (), 0),
    ("sample_action", os_bug, 12, STATES, 0),
    ("select_actions", value_bug, 3, STATES, 0),
    ("select_actions", attribute_bug, 3, (*STATES, *TWO), 0),
    ("state_dict", key_bug, 2, STATES, 0),
    ("critic_loss", value_bug, 0, STATES, 30),
    ("alpha_loss", os_bug, 0, STATES, 30),
    ("decoder_loss", attribute_bug, 3, (), 30),
]


@pytest.mark.parametrize(("method", "bug", "at", "flags", "steps"), IN_AGENTS)
def test_in_an_agent(tmp_path, monkeypatch, capfd, made, method, bug, at, flags, steps):
    """In this process, wherever the environments are."""
    folder = tmp_path / "log"
    if steps:
        shutil.copytree(made(flags, steps), folder)
    buggy = type("Buggy", (train.SacAeAgent,), {method: buggy_method(getattr(train.SacAeAgent, method), bug, at)})
    with monkeypatch.context() as patch:
        patch.setitem(train.AGENTS, "sac_ae", buggy)
        with pytest.raises(BUGS[bug]) as info:
            run(folder, *flags, "--resume")
    assert_told(info, bug, False, capfd)
    assert_goes_on(folder, flags, made, capfd)


IN_LOGGERS = [
    ("log", key_bug, 0, STATES, 0),  # in the first evaluation
    ("dump", os_bug, 0, (*STATES, *TWO), 0),
    ("dump", attribute_bug, 2, STATES, 0),  # at the end of an episode
    ("log", value_bug, 100, STATES, 0),  # in an update
    ("state", file_bug, 1, STATES, 0),  # at a checkpoint
    ("log", value_bug, 0, STATES, 30),  # what waits for its line is read from the checkpoint
    ("log", file_bug, 30, STATES, 30),
    ("dump", key_bug, 0, STATES, 30),
    ("close", os_bug, 0, STATES, 30),
]


@pytest.mark.parametrize(("method", "bug", "at", "flags", "steps"), IN_LOGGERS)
def test_in_a_logger(tmp_path, monkeypatch, capfd, made, method, bug, at, flags, steps):
    folder = tmp_path / "log"
    if steps:
        shutil.copytree(made(flags, steps), folder)
    with monkeypatch.context() as patch:
        patch.setattr(Logger, method, buggy_method(getattr(Logger, method), bug, at))
        with pytest.raises(BUGS[bug]) as info:
            run(folder, *flags, "--resume")
    assert_told(info, bug, False, capfd)
    assert_goes_on(folder, flags, made, capfd)


@pytest.mark.parametrize(
    ("method", "bug", "at", "flags"),
    [
        ("reset", key_bug, 0, ("--eval_workers", "1")),
        ("step", os_bug, 3, TWO),
        ("render", attribute_bug, 3, ("--eval_workers", "1", "--video")),
    ],
)
def test_in_evaluate(tmp_path, monkeypatch, capfd, made, method, bug, at, flags):
    """With what a run's checkpoint holds. The second environment is the first of those that play."""
    folder, remote = made(STATES), "2" in flags
    before = contents(folder)
    command = [str(folder), "--device", "cpu", "--episodes", "2", *flags]
    command += [str(tmp_path / "a.mp4")] if "--video" in flags else []
    monkeypatch.setattr(train, "make_env", Maker(TRAINING, method, bug, at))
    with pytest.raises(EpisodeError if remote else BUGS[bug]) as info:
        evaluate.main(command)
    assert_told(info, bug, remote, capfd)
    assert contents(folder) == before
    assert not list(tmp_path.iterdir())


# A program of the user. The line that the bug is on is the last one of its traceback.
PROGRAM = """
import sys
import train
from own_env import OwnEnv

class Mine(OwnEnv):
    count = 0

    def step(self, action):
        self.count += 1
        if MODE == "env" and self.count == 6:
            self.such_a_thing += 1
        return super().step(action)

class MyAgent(train.SacAeAgent):
    def critic_loss(self, obs, *batch):
        if MODE == "loss":
            left, right = obs
        return super().critic_loss(obs, *batch)

MODE = sys.argv.pop(1)
train.make_env = lambda args, seed: Mine(states=True)
train.AGENTS["sac_ae"] = MyAgent
if __name__ == "__main__":
    sys.exit(train.main())
"""
LINES = [line.strip() for line in PROGRAM.splitlines()]


@pytest.mark.parametrize(
    ("mode", "flags", "line", "error"),
    [
        ("env", TWO, "self.such_a_thing += 1", "AttributeError: 'Mine' object has no attribute 'such_a_thing'"),
        ("loss", (), "left, right = obs", "ValueError: too many values to unpack (expected 2)"),
    ],
    ids=["evaluation in two processes", "a loss at a resume"],
)
def test_in_a_program(tmp_path, capfd, made, mode, flags, line, error):
    """Exit status 1, and stderr ends with the bug."""
    folder, program = tmp_path / "log", tmp_path / "program.py"
    program.write_text(PROGRAM)
    if mode == "loss":
        shutil.copytree(made(STATES, 30), folder)
    process = subprocess.run(
        [sys.executable, program, mode, *RUN, *STATES, *flags, "--resume", "--work_dir", str(folder)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    assert lines[-1] == error
    place = [text for text in lines if text.startswith("  File ")][-1]
    assert f", line {LINES.index(line) + 1}, in " in place
    assert lines.count(error) == 1
    assert "damaged" not in process.stderr
    assert_goes_on(folder, (*STATES, *flags), made, capfd)


# What follows fails today. Each is a bug that looks like something else.


def assert_propagates(folder, bug, *flags):
    with pytest.raises(BUGS[bug]) as info:
        run(folder, *STATES, *flags)
    assert type(info.value) is BUGS[bug]


def test_a_broken_pipe_of_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", Maker(TRAINING, "step", pipe_bug, 0))
    assert_propagates(tmp_path / "log", pipe_bug)


def test_an_error_that_speaks_of_allocate(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", Maker(TRAINING, "step", allocate_bug, 0))
    assert_propagates(tmp_path / "log", allocate_bug)


def test_a_traceback_that_speaks_of_allocate(tmp_path, monkeypatch):
    """Any error in another process, if a function or a line on the way is called so."""
    monkeypatch.setattr(train, "make_env", Maker(EVALUATION, "step", allocate_bug, 0))
    with pytest.raises(EpisodeError):
        run(tmp_path / "log", *STATES, *TWO)


@pytest.mark.parametrize("bug", [attribute_bug, file_bug])
def test_in_the_loading_of_an_agent(tmp_path, monkeypatch, capfd, made, bug):
    """Someone would delete a good checkpoint."""
    folder = tmp_path / "log"
    shutil.copytree(made(STATES, 30), folder)
    load = buggy_method(train.SacAeAgent.load_state_dict, bug, 0)
    monkeypatch.setitem(train.AGENTS, "sac_ae", type("Buggy", (train.SacAeAgent,), {"load_state_dict": load}))
    assert_propagates(folder, bug, "--resume")


def test_the_traceback_of_another_process_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", Maker(EVALUATION, "step", value_bug, 0))
    with pytest.raises(EpisodeError) as info:
        run(tmp_path / "log", *STATES, *TWO)
    place = f'test_bugs.py", line {value_bug.__code__.co_firstlineno + 1}, in value_bug\n'
    assert f"{place}    first, second = np.zeros(3)" in str(info.value)


class Unreadable(Maker):
    """Cannot be made anew from its pickle, as if a module could not be imported there."""

    def __reduce__(self):
        return key_bug, ()


def test_what_another_process_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", Unreadable())
    with pytest.raises(EpisodeError, match="such a key"):
        run(tmp_path / "log", *STATES, *TWO)


def test_in_the_reconstruction_of_a_video(tmp_path, monkeypatch, made):
    monkeypatch.setattr(train.SacAeAgent, "reconstruct", buggy_method(train.SacAeAgent.reconstruct, os_bug, 2))
    with pytest.raises(OSError, match="of an environment") as info:
        evaluate.main([str(made(())), "--device", "cpu", "--episodes", "1", "--video", str(tmp_path / "a.mp4")])
    assert type(info.value) is OSError
