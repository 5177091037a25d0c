"""Episodes side by side: the same whatever the number of processes, which never outlive the run."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
from programs import Program
from test_train import METHODS, SMALL, read_log, without_times
from toy import make_toy_env

import dmc2gym
import train
from errors import UserError
from support import evaluation
from support.evaluation import EpisodeError, SideBySide

ROOT = Path(__file__).parent.parent
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers then need not import it, nor PyTorch
make_env = functools.partial(
    dmc2gym.make, "cartpole", "swingup", from_pixels=True, height=16, width=16, frame_skip=8, episode_length=32
)


def play(envs, seeds, count=6):
    """Observations, rewards and ends of more steps than an episode has, with actions that depend on what is seen."""
    record, over = [np.stack(envs.call("reset", seeds))], np.zeros(len(seeds), bool)
    for _ in range(count):
        actions = np.sin(record[-1].reshape(len(seeds), -1).sum(axis=1, keepdims=True)).astype(np.float32)
        steps = envs.call("step", [None if ended else action for action, ended in zip(actions, over, strict=True)])
        obs, rewards = record[-1].copy(), np.zeros(len(seeds))
        for index in np.flatnonzero(~over):
            obs[index], rewards[index], over[index], _ = steps[index]
        record += [rewards, over.copy(), obs]
    return record


def play_all(num_workers):
    """What three environments show in two evaluations and in a picture after them."""
    envs = SideBySide(make_env, 3, num_workers)
    try:
        record = [array for seeds in ([5, 6, 7], [8, 5, 9]) for array in play(envs, seeds)]
        return [*record, envs.render(mode="rgb_array", height=20, width=24, camera_id=1)]
    finally:
        envs.close()


@pytest.fixture(scope="module")
def in_this_process():
    """Made once, because each environment starts a renderer."""
    return play_all(1)


@pytest.mark.parametrize("num_workers", [2, 3, 9])
def test_processes_change_nothing(in_this_process, num_workers):
    for ours, theirs in zip(in_this_process, play_all(num_workers), strict=True):
        assert np.array_equal(ours, theirs)


def test_each_episode_is_the_one_of_its_seed():
    envs, alone = SideBySide(make_env, 3, 1), make_env()
    obs = envs.call("reset", [4, 5, 6])
    rewards = sum(np.array([step[1] for step in envs.call("step", np.full((3, 1), 0.3))]) for _ in range(4))
    for index, seed in enumerate((4, 5, 6)):
        assert np.array_equal(alone.reset(seed=seed)[0], obs[index])
        assert sum(alone.step(np.full(1, 0.3))[1] for _ in range(4)) == rewards[index]
    envs.close()
    alone.close()


class Countdown:
    """Ends after as many steps as its seed says, and complains of any step after that."""

    def reset(self, seed):
        self.left = seed
        return np.array([self.left]), {}

    def step(self, action):
        if self.left == 0:
            raise RuntimeError("a step after the end")
        self.left -= 1
        return np.array([self.left]), 1.0, self.left == 0, False, {}

    def close(self):
        pass


@pytest.mark.parametrize("num_workers", [1, 2])
def test_episodes_of_different_lengths(num_workers):
    envs = SideBySide(Countdown, 3, num_workers)
    moments = list(evaluation.play(envs, [1, 4, 2], lambda obs: np.zeros((len(obs), 1))))
    assert [moment.obs[:, 0].tolist() for moment in moments] == [[1, 4, 2], [0, 3, 1], [0, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert moments[-1].returns.tolist() == moments[-1].lengths.tolist() == [1, 4, 2]
    envs.close()


class Weakling(Countdown):
    """Its simulation diverges at the last step of even seeds."""

    def reset(self, seed):
        self.seed = seed
        return super().reset(seed)

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"physics_error": "why"} if terminated and self.seed % 2 == 0 else {}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 9])
def test_waves_play_every_episode_once(num_workers, num_envs):
    envs, seeds, batches = SideBySide(Weakling, num_envs, num_workers), [3, 1, 4, 1, 5, 2, 6], []

    def act(obs):
        batches.append(len(obs))
        return np.zeros((len(obs), 1))

    moments = list(evaluation.play(envs, seeds, act))
    envs.close()
    assert moments[-1].returns.tolist() == moments[-1].lengths.tolist() == seeds
    assert moments[-1].physics_errors == {2: "why", 5: "why", 6: "why"}
    assert sum(moment.first_moved for moment in moments) == 4  # its start, and three steps
    assert [moment.obs[0][0] for moment in moments if moment.first_moved] == [3, 2, 1, 0]
    waves = [seeds[start : start + num_envs] for start in range(0, len(seeds), num_envs)]
    assert batches == [len(wave) for wave in waves for _ in range(max(wave))]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_environments_does_not_grow_with_the_episodes(tmp_path, monkeypatch, num_workers):
    """Nor with the processes; each takes memory, and a renderer's context, of which drivers allow few."""
    made = []
    side_by_side = train.SideBySide
    monkeypatch.setattr(train, "make_env", make_toy_env)
    monkeypatch.setattr(train, "SideBySide", lambda *args: made.append(args[1:]) or side_by_side(*args))
    flags = "--num_train_steps 1 --num_eval_episodes 23 --action_repeat 500".split()
    workers = ["--eval_workers", str(num_workers)]
    assert train.main([*SMALL, *METHODS["sac_state"], *flags, *workers, "--work_dir", str(tmp_path)]) == 0
    assert made == [(evaluation.MAX_ENVS, num_workers)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_errors_arrive_where_they_are_asked_for(num_workers):
    envs = SideBySide(make_env, 2, num_workers)
    first = envs.call("reset", [1, 2])
    kind = EpisodeError if num_workers > 1 else ValueError
    with pytest.raises(kind, match="actions are"):
        envs.call("step", np.array([[7.0], [0.0]]))
    assert np.array_equal(envs.call("reset", [1, 2]), first)  # answers stay in step with calls
    envs.close()


def no_env():
    raise LookupError("no such environment")


def test_environments_that_cannot_be_made():
    with pytest.raises(EpisodeError, match="LookupError: no such environment"):
        SideBySide(no_env, 2, 2)


class Chatty(Countdown):
    """Prints, and at the third step is gone."""

    def step(self, action):
        print("a line that nobody asked for", flush=True)
        if self.left == 1:
            os._exit(3)
        return super().step(action)


def test_what_environments_print_does_not_come_between():
    envs = SideBySide(Chatty, 2, 2)
    envs.call("reset", [3, 9])
    envs.call("step", np.zeros((2, 1)))
    assert [obs.tolist() for obs, *_ in envs.call("step", np.zeros((2, 1)))] == [[1], [7]]
    with pytest.raises(UserError, match="has died"):  # while it answers
        envs.call("step", np.zeros((2, 1)))
    envs.close()
    assert [group._process.returncode for group in envs._groups] == [3, 0]


def test_a_dead_process_is_an_error():
    envs = SideBySide(Countdown, 2, 2)
    envs.call("reset", [1, 2])
    envs._groups[1]._process.kill()
    envs._groups[1]._process.wait()
    with pytest.raises(UserError, match="has died"):
        envs.call("step", np.zeros((2, 1)))
    envs.close()


def test_a_run_gives_the_same_with_processes(tmp_path):
    """The whole program: returns are equal to the last bit, and so are videos."""
    flags = [
        "--save_video",
        *"--num_train_steps 12 --init_steps 6 --eval_freq 8 --num_eval_episodes 2 --action_repeat 250".split(),
    ]
    logs = []
    for workers in ("1", "2"):
        folder = tmp_path / workers
        assert train.main([*SMALL, *flags, "--eval_workers", workers, "--work_dir", str(folder)]) == 0
        logs.append([without_times(read_log(folder / f"{section}.log")) for section in ("train", "eval")])
    assert logs[0] == logs[1]
    assert len(logs[0][1]) == 2
    videos = [sorted((tmp_path / workers / "video").iterdir()) for workers in ("1", "2")]
    assert len(videos[0]) == 2
    assert [video.read_bytes() for video in videos[0]] == [video.read_bytes() for video in videos[1]]


def test_workers_stay_small():
    """They do without PyTorch."""
    code = "import sys, support.evaluation, frame_stack, dmc2gym; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def workers_of(process):
    """The run's worker processes."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "support.evaluation" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


@pytest.mark.parametrize("moment", ["starting", "evaluating", "training"])
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run(tmp_path, ending, moment):
    """Killed, or interrupted as a terminal does it, all processes at once: nothing is left, and little is said."""
    flags = [*SMALL, *METHODS["sac_state"], "--eval_workers", "2", "--num_train_steps", "100000"]
    flags += ["--work_dir", str(tmp_path / "log")]
    process = Program("train.py", *flags)
    if moment == "starting":
        while len(workers_of(process)) < 2:
            time.sleep(0.02)
    else:
        for line in process.stdout:
            if line.startswith("first an evaluation" if moment == "evaluating" else "| eval"):
                break
        time.sleep(0.3)
    children = workers_of(process)
    assert len(children) == 2
    if ending == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, ending)
    _, stderr = process.communicate(timeout=60)
    assert stderr == "" or re.fullmatch(r"train\.py: stopped by SIGINT at step \d+: --resume continues it\n", stderr), (
        stderr
    )
    assert process.returncode in ((-signal.SIGKILL,) if ending == signal.SIGKILL else (130, -signal.SIGINT))
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "a process outlives the run"
        time.sleep(0.1)
