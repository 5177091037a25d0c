"""An own Gymnasium environment in place of `train.make_env`: it gets all that the Control Suite gets."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import own_env
import pytest
from events import read_events
from folders import checkpoint_of, contents, outcome
from own_env import OwnEnv
from programs import Program
from runs import METHODS, assert_refused, read_log
from torch import nn

import evaluate
import train
from sac_ae import SacAeAgent
from utils import FrameStack

ROOT = Path(__file__).parent.parent
STATES = METHODS["sac_state"]
RUN = [*own_env.RUN, "--save_tb", "--save_video"]


def closure(make=OwnEnv, **options):
    """A function that no process can import: it holds variables of this one."""

    def make_env(args, seed):
        if args.encoder_type == "identity":
            return make(states=True, **options)
        return FrameStack(make(**options), args.frame_stack)

    return make_env


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setattr(train, "make_env", own_env.make_env)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of runs with these flags, in one process, that save what they can. Tests must not write there."""

    @functools.cache
    def get(*flags):
        folder = tmp_path_factory.mktemp("uninterrupted")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_env", own_env.make_env)
            assert train.main([*RUN, *flags, "--save_model", "--work_dir", str(folder)]) == 0
        return folder

    return get


def results(folder):
    """All that runs of the same flags have in common."""
    return outcome(folder), {path.name: path.read_bytes() for path in (folder / "video").iterdir()}


@pytest.mark.parametrize("flags", [[], STATES], ids=["pixels", "states"])
def test_what_a_run_saves(uninterrupted, capsys, flags):
    folder = uninterrupted(*flags)
    assert capsys.readouterr().err == ""
    assert np.diff([record["step"] for record in read_log(folder / "train.log")], prepend=0).max() <= 11
    steps = [record["step"] for record in read_log(folder / "eval.log")]
    assert len(steps) >= 3
    assert {path.name for path in (folder / "video").iterdir()} == {f"{step}.mp4" for step in steps}
    for step in steps:
        frames = iio.imread(folder / "video" / f"{step}.mp4")
        assert frames.shape[1:] == (32, 40, 3)  # without the odd row and column
        assert frames[0, :2].mean() < frames[-1, :2].mean()  # the background shows the time
    images = read_events(folder).Tags()["images"]
    assert "eval/video" in images
    assert ("eval/observation_and_reconstruction" in images) == (not flags)


@pytest.mark.parametrize(("make_env", "flags"), [
    (own_env.make_env, []), (closure(own_env.gym_env), []), (closure(own_env.gym_env), STATES)
])  # fmt: skip
def test_two_processes_give_the_same(tmp_path, monkeypatch, capsys, uninterrupted, make_env, flags):
    """Whether children can import the function or not; and gym 0.26 gives the same as Gymnasium."""
    monkeypatch.setattr(train, "make_env", make_env)
    assert train.main([*RUN, *flags, "--eval_workers", "2", "--work_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    assert results(tmp_path) == results(uninterrupted(*flags))


# A program of the user: environment and function are its own, which no other process can import.
PROGRAM = """
import sys
import train
from own_env import OwnEnv
from utils import FrameStack

class Mine(OwnEnv):
    def step(self, a):
        return super().step(a)

train.make_env = lambda args, seed: FrameStack(Mine(), args.frame_stack)
if __name__ == "__main__":
    sys.exit(train.main())
"""


def test_a_killed_program_goes_on(tmp_path, uninterrupted):
    """With a function of its own `__main__`, two processes and videos; it lies outside of the project."""
    folder, path, printed = tmp_path / "log", tmp_path / "program.py", ""
    path.write_text(PROGRAM)
    flags = [*RUN, "--eval_workers", "2", "--work_dir", folder]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = Program(path, *flags, **paths)
    assert any(line.startswith("| train | E: 4 ") for line in process.stdout)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGKILL
    process = Program(path, *flags, "--resume", **paths)
    printed, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert "resuming at step" in printed
    assert results(folder) == results(uninterrupted())


def stop_at_update(monkeypatch, number):
    """Sends this process SIGTERM during an update, once."""
    update, calls = train.SacAeAgent.update, []
    clock = itertools.count(0, 1e-6)  # on which an update takes a second, and nothing else any time to speak of
    monkeypatch.setattr(time, "perf_counter", lambda: len(calls) + next(clock))

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(train.SacAeAgent, "update", stopped)


@pytest.mark.parametrize(("number", "step", "flags"), [(1, 20, STATES), (20, 20, []), (30, 30, STATES)])
def test_stopped_in_an_update(tmp_path, monkeypatch, capsys, uninterrupted, number, step, flags):
    """In the middle of an episode, which is caught up without a word."""
    command = [*RUN, *flags, "--work_dir", str(tmp_path / "log")]
    with monkeypatch.context() as patch:
        stop_at_update(patch, number)
        assert train.main(command) == 128 + signal.SIGTERM
    progress = checkpoint_of(tmp_path / "log")["progress"]
    assert (progress["step"], progress["updates"]) == (step, number)
    assert progress["action"] is not None
    began = step - len(progress["actions"])  # the episode: before the first updates, or later
    updates = number if began < 20 else number - began + 1
    assert progress["seconds"] == pytest.approx(updates, abs=0.1)  # of those that the stop came in, too
    assert capsys.readouterr().err.endswith(f": stopped by SIGTERM at step {step}: --resume continues it\n")
    assert train.main([*command, "--resume"]) == 0
    assert capsys.readouterr().err == ""
    assert outcome(tmp_path / "log") == outcome(uninterrupted(*flags))


@pytest.mark.parametrize(("step", "signalled", "flags", "length"), [
    (14, False, STATES, None), (25, True, STATES, None), (14, False, STATES, 3), (25, True, STATES, 10),
    (34, False, [], 3),
])  # fmt: skip
def test_episodes_that_do_not_repeat_are_noticed(tmp_path, monkeypatch, capsys, step, signalled, flags, length):
    """At a resume in the middle of one, which may be over by then; in one line, and the run goes on to its end."""
    monkeypatch.setattr(train, "make_env", closure(repeats=length is None))
    command = [*own_env.RUN, *flags, "--eval_freq", "1000", "--work_dir", str(tmp_path / "log"), "--num_train_steps"]
    with monkeypatch.context() as patch:
        if signalled:
            stop_at_update(patch, step)
        status = train.main([*command, "45" if signalled else str(step)])
    assert status == (128 + signal.SIGTERM if signalled else 0)
    assert checkpoint_of(tmp_path / "log")["progress"]["actions"]
    capsys.readouterr()
    monkeypatch.setattr(train, "make_env", closure(repeats=length is None, length=length))
    assert train.main([*command, "45", "--resume"]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (length is not None)
    if errors:
        assert errors[0].startswith("warning: the episode under way begins anew")
        steps = [record["step"] for record in read_log(tmp_path / "log" / "train.log")]
        assert steps == [*range(10, step, 10), *range(step + length, 46, length)]
    progress = checkpoint_of(tmp_path / "log")["progress"]
    assert (progress["step"], progress["updates"]) == (45, 44)  # none is lost, none is made twice


def test_saved_models_play(tmp_path, capsys, uninterrupted):
    """In one process and in two: the same returns, the same video."""
    folder, printed = uninterrupted(), []
    before = contents(folder)
    capsys.readouterr()
    for workers in ("1", "2"):
        command = [str(folder), *"--episodes 3 --device cpu --eval_workers".split(), workers]
        assert evaluate.main([*command, "--video", str(tmp_path / f"{workers}.mp4")]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        printed.append(output.out.splitlines()[:-1])
    assert printed[0] == printed[1]
    assert len({line.split()[-1] for line in printed[0][1:4]}) == 3  # returns
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()
    assert contents(folder) == before


class DecodesStates(SacAeAgent):
    """Its decoder's images are no pictures."""

    def __init__(self, obs_shape, *args, **settings):
        super().__init__(obs_shape, *args, **settings)
        self.decoder = nn.Linear(*obs_shape, *obs_shape)
        self.decoder_optimizer = self.adam(self.decoder.parameters(), 1e-3)

    def update_decoder(self, obs, hidden=None):
        return {"train_ae/ae_loss": self.minimise((self.decoder(obs) - obs).square().mean(), self.decoder_optimizer)}


def test_an_agent_that_decodes_states(tmp_path, monkeypatch, capsys):
    """The quality of pictures is told of pixels alone."""
    monkeypatch.setitem(train.AGENTS, "sac_ae", DecodesStates)
    flags = [*own_env.RUN, *STATES, "--num_train_steps", "22", "--work_dir", str(tmp_path)]
    assert train.main(flags) == 0
    assert not any("psnr" in record for record in read_log(tmp_path / "eval.log"))
    command = [str(tmp_path), *"--device cpu --eval_workers 1 --episodes 1 --video".split(), str(tmp_path / "a.mp4")]
    assert evaluate.main(command) == 0
    assert "PSNR" not in capsys.readouterr().out


def test_an_environment_that_draws_nothing(tmp_path, monkeypatch, capsys):
    """It is refused only where pictures are needed."""
    monkeypatch.setattr(train, "make_env", closure(render_mode=None))
    flags = [*own_env.RUN, *STATES, "--num_train_steps", "3", "--save_tb", "--work_dir", str(tmp_path)]
    assert train.main(flags) == 0
    command = [str(tmp_path), *"--device cpu --eval_workers 1 --episodes 1".split()]
    assert evaluate.main(command) == 0
    capsys.readouterr()
    words = "the environment's render() gives no picture"
    assert_refused(capsys, [*command, "--video", str(tmp_path / "a.mp4")], words, program=evaluate)
