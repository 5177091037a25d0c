"""An own Gymnasium environment in place of `train.make_env`: it gets all that the Control Suite gets."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import own_env
import pytest
from own_env import OwnEnv
from programs import Program
from test_logger import read_events
from test_resume import checkpoint_of, contents, outcome
from test_train import assert_refused, read_log

import evaluate
import train
from utils import FrameStack

ROOT = Path(__file__).parent.parent
# Episodes of 8 to 11 decisions, two of them at random; an evaluation after every third; a checkpoint after each.
RUN = (
    "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --init_steps 20 --num_train_steps 80 --eval_freq 25 "
    "--num_eval_episodes 2 --eval_workers 1 --device cpu --checkpoint_minutes 0"
).split()
STATES = ["--encoder_type", "identity", "--decoder_type", "identity"]


def closure(make=OwnEnv, **options):
    """A function that no process can import: it holds variables of this one."""

    def make_env(args, seed):
        if args.encoder_type == "identity":
            return make(states=True, **options)
        return FrameStack(make(**options), args.frame_stack)

    return make_env


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "make_env", own_env.make_env)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of runs with these flags, in one process, that save what they can. Tests must not write there."""
    folders = {}

    def get(*flags):
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("uninterrupted") / "log"
            saving = ["--save_tb", "--save_video", "--save_model"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "make_env", own_env.make_env)
                assert train.main([*RUN, *flags, *saving, "--work_dir", str(folders[flags])]) == 0
        return folders[flags]

    return get


def videos(folder):
    return {path.name: path.read_bytes() for path in (folder / "video").iterdir()}


@pytest.mark.parametrize("flags", [(), tuple(STATES)], ids=["pixels", "states"])
def test_a_run_saves_all_it_can(uninterrupted, capsys, flags):
    folder = uninterrupted(*flags)
    assert capsys.readouterr().err == ""
    episodes, evaluations = read_log(folder / "train.log"), read_log(folder / "eval.log")
    lengths = np.diff([0] + [record["step"] for record in episodes])
    assert lengths.max() <= 11
    assert all(0 < record["episode_reward"] <= length for record, length in zip(episodes, lengths, strict=True))
    assert all("critic_loss" in record for record in episodes[2:])
    steps = [record["step"] for record in evaluations]
    assert steps[0] == 0
    assert len(steps) >= 3
    assert set(videos(folder)) == {f"{step}.mp4" for step in steps}
    for step in steps:
        frames = iio.imread(folder / "video" / f"{step}.mp4")
        assert frames.shape[1:] == (32, 40, 3)  # without the odd row and column
        assert 2 <= len(frames) <= 12
        assert frames[0, :2].mean() < frames[-1, :2].mean()  # the background shows the time
    models = {"actor", "critic", "target"} | (set() if flags else {"decoder"})
    saved = {path.name for path in (folder / "model").iterdir()}
    assert saved == {f"{name}_{step}.pt" for name in models for step in (*steps, 80)}
    tags = read_events(folder).Tags()
    assert {"train/episode_reward", "eval/episode_reward"} <= set(tags["scalars"])
    assert "eval/video" in tags["images"]
    assert ("eval/observation_and_reconstruction" in tags["images"]) == (not flags)


@pytest.mark.parametrize(
    "make_env",
    [own_env.make_env, closure(), closure(own_env.gym_env)],
    ids=["of a module", "a closure", "gym 0.26"],
)
def test_two_processes_give_the_same(tmp_path, monkeypatch, capsys, uninterrupted, make_env):
    """And gym 0.26 the same as Gymnasium."""
    monkeypatch.setattr(train, "make_env", make_env)
    folder = tmp_path / "log"
    assert train.main([*RUN, "--save_video", "--eval_workers", "2", "--work_dir", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    assert outcome(folder) == outcome(uninterrupted())
    assert videos(folder) == videos(uninterrupted())


@pytest.mark.parametrize(
    ("make_env", "flags"),
    [(closure(own_env.gym_env), STATES), (lambda args, seed: OwnEnv(), [])],
    ids=["gym 0.26, states", "not stacked"],
)
def test_other_kinds(tmp_path, monkeypatch, capfd, make_env, flags):
    monkeypatch.setattr(train, "make_env", make_env)
    assert train.main([*RUN, *flags, "--num_train_steps", "40", "--save_tb", "--work_dir", str(tmp_path / "log")]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert f"observation: {'(4,) float32' if flags else '(3, 24, 24) uint8'}" in printed.out


# A program of the user: environment and function are its own, which no other process can import.
PROGRAM = """
import sys
import train
from own_env import OwnEnv
from utils import FrameStack

class Mine(OwnEnv):
    def step(self, action):
        return super().step(action)

def make_env(args, seed):
    return FrameStack(Mine(), args.frame_stack)

update, calls = train.SacAeAgent.update, []

def wait_at_the_third(*args):
    calls.append(args)
    if len(calls) == 3:
        print("third update", flush=True)
        sys.stdin.readline()
    return update(*args)

train.make_env = make_env
if "--wait" in sys.argv:
    sys.argv.remove("--wait")
    train.SacAeAgent.update = wait_at_the_third
if __name__ == "__main__":
    sys.exit(train.main())
"""


def start(folder, *flags):
    """Runs PROGRAM, which lies outside of the project."""
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, program, *RUN, *flags, "--work_dir", str(folder)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def program(folder, *flags):
    """The same without its imports."""
    path = folder.parent / "program.py"
    path.write_text(PROGRAM)
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return Program(path, *RUN, *flags, "--work_dir", folder, PYTHONPATH=paths)


def wait_for(process, words):
    assert any(line.startswith(words) for line in process.stdout), process.stderr.read()


def test_a_killed_program_goes_on(tmp_path, uninterrupted):
    """With a function of its own `__main__`, two processes and videos."""
    folder, flags = tmp_path / "log", ["--eval_workers", "2", "--save_video"]
    process = program(folder, *flags)
    wait_for(process, "| train | E: 4 ")
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (-signal.SIGKILL, "")
    assert checkpoint_of(folder)["progress"]["step"] < 80
    process = program(folder, *flags, "--resume")
    printed, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert "resuming at step" in printed
    assert outcome(folder) == outcome(uninterrupted())
    assert videos(folder) == videos(uninterrupted())


def test_a_program_that_is_stopped_in_its_first_updates_goes_on(tmp_path, capsys, uninterrupted):
    folder = tmp_path / "log"
    process = start(folder, "--wait")
    wait_for(process, "third update")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate("\n", timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr == "program.py: stopped by SIGTERM at step 20: --resume continues it\n"
    assert checkpoint_of(folder)["progress"]["updates"] == 3
    assert train.main([*RUN, "--resume", "--work_dir", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    assert outcome(folder) == outcome(uninterrupted())


def stop_at_update(monkeypatch, number):
    """Sends this process SIGTERM during an update, once."""
    update, calls = train.SacAeAgent.update, []
    clock = itertools.count(0, 1e-6)  # on which an update takes a second, and nothing else any time to speak of
    monkeypatch.setattr(time, "perf_counter", lambda: len(calls) + next(clock))

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(train.SacAeAgent, "update", stopped)


@pytest.mark.parametrize(
    ("number", "step", "flags"), [(1, 20, STATES), (20, 20, []), (25, 25, STATES)], ids=["first", "20th", "25th"]
)
def test_stopped_in_an_update(tmp_path, monkeypatch, capsys, uninterrupted, number, step, flags):
    """In the middle of an episode, which is caught up without a word."""
    command = [*RUN, *flags, "--work_dir", str(tmp_path / "log")]
    with monkeypatch.context() as patch:
        stop_at_update(patch, number)
        assert train.main(command) == 128 + signal.SIGTERM
    progress = checkpoint_of(tmp_path / "log")["progress"]
    assert (progress["step"], progress["updates"]) == (step, number)
    assert progress["actions"]
    assert progress["action"] is not None
    began = step - len(progress["actions"])  # before the updates, or after as many as decisions
    updates = number - (began if began > 20 else 0)
    assert progress["seconds"] == pytest.approx(updates, abs=0.1)  # of those that the stop came in, too
    assert capsys.readouterr().err == f"train.py: stopped by SIGTERM at step {step}: --resume continues it\n"
    assert train.main([*command, "--resume"]) == 0
    assert capsys.readouterr().err == ""
    assert outcome(tmp_path / "log") == outcome(uninterrupted(*flags))


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("moment", ["random decisions", "an update", "the end of a run"])
def test_episodes_that_do_not_repeat_are_noticed(tmp_path, monkeypatch, capsys, repeats, moment):
    """At a resume in the middle of one, in one line; the run goes on to its end."""
    monkeypatch.setattr(train, "make_env", closure(repeats=repeats))
    flags = [] if moment == "the end of a run" else STATES
    command = [*RUN, *flags, "--eval_freq", "1000", "--work_dir", str(tmp_path / "log"), "--num_train_steps"]
    step = {"random decisions": 14, "an update": 25, "the end of a run": 34}[moment]
    if moment == "an update":
        with monkeypatch.context() as patch:
            stop_at_update(patch, step)
            assert train.main([*command, "45"]) == 128 + signal.SIGTERM
    else:
        assert train.main([*command, str(step)]) == 0
    assert checkpoint_of(tmp_path / "log")["progress"]["actions"]
    capsys.readouterr()
    assert train.main([*command, "45", "--resume"]) == 0
    errors = capsys.readouterr().err.splitlines()
    steps = [record["step"] for record in read_log(tmp_path / "log" / "train.log")]
    if repeats:
        assert errors == []
        assert max(np.diff([0, *steps])) <= 11
    else:
        assert [line.split(":")[:2] for line in errors] == [
            ["warning", " the environment does not repeat its episodes under the same seed"]
        ]
        assert steps == [*range(10, step, 10), *range(step + 10, 46, 10)]
    progress = checkpoint_of(tmp_path / "log")["progress"]
    assert (progress["step"], progress["updates"]) == (45, 44)  # none is lost, none is made twice


@pytest.mark.parametrize("kind", ["pixels", "states"])
def test_saved_models_play(tmp_path, capsys, uninterrupted, kind):
    """In one process and in two: the same returns, the same video."""
    folder = uninterrupted(*(STATES if kind == "states" else ()))
    before, printed = contents(folder), []
    capsys.readouterr()  # what the run printed, if it is this test that needs it first
    for workers in ("1", "2"):
        flags = ["--episodes", "3", "--device", "cpu", "--eval_workers", workers]
        assert evaluate.main([str(folder), *flags, "--video", str(tmp_path / f"{workers}.mp4")]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        printed.append(output.out.splitlines()[:-1])
    assert printed[0] == printed[1]
    assert [line.split()[0] for line in printed[0]] == ["models:", "episode", "episode", "episode", "mean"]
    assert "step 80" in printed[0][0]
    assert len({line.split()[-1] for line in printed[0][1:4]}) == 3
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "2.mp4").read_bytes()
    assert iio.imread(tmp_path / "1.mp4").shape[1:] == (256, 256 if kind == "states" else 3 * 256, 3)
    assert contents(folder) == before


def test_what_draws_nothing_is_refused(tmp_path, monkeypatch, capsys):
    """Before anything is written, and only where pictures are needed."""
    monkeypatch.setattr(train, "make_env", closure(render_mode=None))
    for flags in (["--save_video"], ["--save_tb"], ["--save_video", *STATES]):
        assert_refused(tmp_path / "log", capsys, [*RUN, *flags], "the environment's render() gives no picture")
        assert not (tmp_path / "log").exists()
    flags = [*RUN, "--num_train_steps", "3", "--save_model", "--work_dir"]
    assert train.main([*flags, str(tmp_path / "log")]) == 0
    assert train.main([*flags, str(tmp_path / "states"), *STATES, "--save_tb"]) == 0
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(tmp_path / "log"), "--device", "cpu", "--video", str(tmp_path / "a.mp4")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "the environment's render() gives no picture" in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before
    assert evaluate.main([str(tmp_path / "log"), "--device", "cpu", "--eval_workers", "1", "--episodes", "1"]) == 0


def test_nothing_is_said_of_a_task_that_is_not_played(tmp_path, capsys):
    assert train.main([*RUN, *STATES, "--num_train_steps", "3", "--work_dir", str(tmp_path / "log")]) == 0
    assert "published results" not in capsys.readouterr().out
