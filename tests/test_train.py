"""The command line and the loop: real runs, the order of things, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import gym
import imageio.v3 as iio
import numpy as np
import psutil
import pytest
import torch
from programs import Program, run_program
from terminal import reader
from test_logger import read_events
from torch import nn
from toy import BarEnv, CountingEnv

import dmc2gym
import evaluate
import settings
import train
from errors import UserError
from randomness import generator
from sac_ae import SacAeAgent
from support import machine, report
from support.checks import check_run, parse_run
from support.work_dir import FOLDERS, LOGS
from utils import FrameStack, ReplayBuffer, eval_mode
from video import write_video

ROOT = Path(__file__).parent.parent
LONG = bool(os.environ.get("LONG_TESTS"))
LINE = {
    "train": re.compile(
        r"\| train \| E: \d+ \| S: \d+ \| D: \d+\.\d s \| R: -?\d+\.\d{4} \| BR: -?\d+\.\d{4}"
        r" \| ALOSS: -?\d+\.\d{4} \| CLOSS: \d+\.\d{4} \| RLOSS: \d+\.\d{4}"
    ),
    "eval": re.compile(r"\| eval \| S: \d+ \| ER: -?\d+\.\d{4}"),
}
SMALL = (
    "--domain_name cartpole --task_name swingup --action_repeat 8 --image_size 32 --num_layers 2 --num_filters 8 "
    "--hidden_dim 32 --batch_size 8 --init_steps 25 --num_train_steps 60 --eval_freq 40 --num_eval_episodes 2 "
    "--device cpu --eval_workers 1"
).split()
METHODS = {
    "sac_ae": [],
    "sac_pixel": ["--decoder_type", "identity"],
    "sac_state": ["--encoder_type", "identity", "--decoder_type", "identity"],
}
SHORT = "--init_steps 12 --num_train_steps 30 --eval_freq 20".split()
SAVE = ["--save_tb", "--save_video", "--save_model", "--save_buffer"]


@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes of 10 decisions at repeat 8: the simulator's pictures take most of the time."""
    monkeypatch.setattr(train, "EPISODE_LENGTH", 80)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records):
    times = ("duration", "decisions_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_a_run(tmp_path, capsys, short_episodes, method):
    work_dir = tmp_path / "log"
    assert train.main([*SMALL, *SHORT, *METHODS[method], *SAVE, "--work_dir", str(work_dir)]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    kinds = [line.split()[1] for line in lines]
    assert kinds == ["eval", "train", "train", "eval", "train"]
    assert all(LINE[kind].fullmatch(line) for kind, line in zip(kinds, lines, strict=True))

    episodes, evaluations = read_log(work_dir / "train.log"), read_log(work_dir / "eval.log")
    assert [record["step"] for record in episodes] == [10, 20, 30]
    assert [record["episode"] for record in episodes] == [1, 2, 3]
    assert [record["environment_steps"] for record in episodes] == [80, 160, 240]
    assert [record["step"] for record in evaluations] == [0, 20]
    assert [record["environment_steps"] for record in evaluations] == [0, 160]
    assert all(record["decisions_per_second"] > 0 for record in episodes + evaluations)
    losses = {"critic_loss", "actor_loss", "alpha_loss"} | ({"ae_loss"} if method == "sac_ae" else set())
    assert not losses & set(episodes[0])  # not updated yet
    for record in episodes[1:]:
        assert {key for key in record if key.endswith("_loss")} == losses
        assert all(math.isfinite(value) for value in record.values())
    rloss = [float(line.split("RLOSS: ")[1]) for line in lines if "RLOSS" in line]
    assert [value > 0 for value in rloss] == [False, method == "sac_ae", method == "sac_ae"]

    # Parameters moved, the target's too.
    networks = ["actor", "critic", "target"] + (["decoder"] if method == "sac_ae" else [])
    models = {f"{name}_{step}.pt" for name in networks for step in (0, 20, 30)}
    assert {path.name for path in (work_dir / "model").iterdir()} == models
    for name in networks:
        first, last = (torch.load(work_dir / "model" / f"{name}_{step}.pt") for step in (0, 30))
        first, last = (state.get("critic_target", state) for state in (first, last))
        assert all(not torch.equal(first[key], last[key]) for key in first if key.endswith("weight"))

    assert {path.name for path in (work_dir / "video").iterdir()} == {"0.mp4", "20.mp4"}
    assert iio.imread(work_dir / "video" / "20.mp4").shape == (11, 256, 256, 3)
    assert {path.name for path in (work_dir / "buffer").iterdir()} == {"0_20.pt", "20_30.pt", "replay.json"}
    assert json.loads((work_dir / "args.json").read_text())["batch_size"] == 8
    tags = read_events(work_dir).Tags()
    assert {"train_critic/loss", "train/episode_reward", "eval/episode_reward", "train_alpha/value"} <= set(
        tags["scalars"]
    )
    assert "eval/video" in tags["images"]
    assert ("eval/observation_and_reconstruction" in tags["images"]) == (method == "sac_ae")
    assert {"train_actor/trunk.4_weight", "train_critic/Q1.trunk.0_output"} <= set(tags["histograms"])


def open_run(*flags):
    """A run as the command line makes it, before its first decision, and what closes it."""
    parser, resources = train.make_parser(), contextlib.ExitStack()
    args = parse_run(parser, flags)
    check_run(args, parser)
    return train.open_run(args, parser, resources), resources


def run_toy(tmp_path, monkeypatch, make_env, *flags, name="log"):
    """A run of the real loop in an environment without a simulator; returns it after the end."""
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(make_env(), args.frame_stack))
    small = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --num_eval_episodes 1 --image_size 16"
    small += " --device cpu --eval_workers 1"
    run, resources = open_run(*small.split(), *flags, "--work_dir", str(tmp_path / name))
    with resources:
        train.train(run)
        run.save_checkpoint()
    return run


def test_evaluation_schedule(tmp_path, monkeypatch):
    """At the first episode end at or after each multiple of eval_freq: here episodes last 7 decisions."""
    flags = "--num_train_steps 70 --init_steps 100 --eval_freq 10".split()
    run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=7), *flags)
    steps = [record["step"] for record in read_log(tmp_path / "log" / "eval.log")]
    assert steps == [0, 14, 21, 35, 42, 56, 63, 70]


def test_time_limits_bootstrap_and_true_ends_do_not(tmp_path, monkeypatch):
    flags = "--num_train_steps 200 --init_steps 300 --eval_freq 1000".split()
    run = run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=5, ends=True), *flags)
    _, action, _, next_obs, not_done = run.replay.gather(np.arange(run.replay.oldest, 200))
    ended = action[:, 0] > 0.5
    assert torch.equal(not_done[:, 0], (~ended).float())
    # Episode ends of both kinds occurred, and no stack reaches across either.
    episodes = read_log(tmp_path / "log" / "train.log")
    lengths = np.diff([0] + [record["step"] for record in episodes])
    assert (lengths == 5).sum() > 5
    assert ended.sum() > 20
    newest, oldest = next_obs[:, 6, 0, 0].int(), next_obs[:, 0, 0, 0].int()
    assert ((newest - oldest) % 256 <= 2).all()
    assert [record["episode_reward"] for record in episodes] == lengths.tolist()


def test_order_of_the_loop(tmp_path, monkeypatch):
    """Uniform actions, then the burst, then action, update, environment, replay, in this order."""
    events = []

    def noting(owner, name, note):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            events.append(note(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noting(train.SacAeAgent, "sample_action", lambda agent, obs: "policy")
    noting(train.SacAeAgent, "update", lambda agent, replay, logger, step: ("update", step, replay.transitions_added))
    noting(ReplayBuffer, "add", lambda replay, *transition, first: "add")
    noting(CountingEnv, "step", lambda env, action: "step")
    flags = "--num_train_steps 9 --init_steps 6 --eval_freq 1000".split()
    run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=20), *flags)
    events = events[events.index("add") - 1 :]  # after those of the first evaluation
    want = ["step", "add"] * 6
    want += ["policy"] + [("update", 6, 6)] * 6 + ["step", "add"]
    want += ["policy", ("update", 7, 7), "step", "add"]
    want += ["policy", ("update", 8, 8), "step", "add"]
    assert events == want


def test_evaluation_does_not_touch_training(tmp_path, monkeypatch):
    """More evaluations, videos or TensorBoard change nothing in training."""
    base = "--num_train_steps 60 --init_steps 20".split()
    variants = {
        "few": ["--eval_freq", "1000"],
        "many": ["--eval_freq", "20", "--num_eval_episodes", "3", "--save_tb"],
        "video": ["--eval_freq", "20", "--save_tb", "--save_video"],
    }
    logs, parameters = [], []
    for name, flags in variants.items():
        run = run_toy(tmp_path, monkeypatch, BarEnv, *base, *flags, "--image_size", "24", name=name)
        logs.append(without_times(read_log(tmp_path / name / "train.log")))
        parameters.append(torch.cat([p.detach().flatten() for p in run.agent.critic.parameters()]))
    assert len(logs[0]) == 3
    assert logs[0] == logs[1] == logs[2]
    assert torch.equal(parameters[0], parameters[1])
    assert torch.equal(parameters[0], parameters[2])


def test_same_seed_same_run(tmp_path, short_episodes):
    logs, flags = {}, "--action_repeat 16 --init_steps 5 --num_train_steps 12 --eval_freq 8 --num_eval_episodes 1"
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = tmp_path / name
        assert train.main([*SMALL, *flags.split(), "--seed", seed, "--save_model", "--work_dir", str(folder)]) == 0
        logs[name] = [without_times(read_log(folder / f"{section}.log")) for section in ("train", "eval")]
    assert logs["a"] == logs["b"]
    assert logs["a"][0] != logs["c"][0]
    assert logs["a"][1] != logs["c"][1]
    models = [torch.load(tmp_path / name / "model" / "critic_12.pt") for name in ("a", "b")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_everything_random_depends_on_the_seed(tmp_path, monkeypatch):
    """Actions, episodes, draws from the replay and evaluations, not only the first weights."""
    seen, reset = {}, dmc2gym.DMCWrapper.reset

    def note(env, *, seed=None):
        seeds.append(seed)
        return reset(env, seed=seed)

    monkeypatch.setattr(dmc2gym.DMCWrapper, "reset", note)
    for seed in ("1", "2"):
        seeds = []
        run, resources = open_run(*SMALL, *METHODS["sac_state"], "--seed", seed, "--work_dir", str(tmp_path / seed))
        with resources:
            train.train(run)
            run.replay.oldest, run.replay.transitions_added = 0, 60
            actions = run.replay.gather(np.arange(60))[1][:25]
            seen[seed] = [seeds, actions.tolist(), run.replay.draw().tolist(), torch.rand(1).item()]
    assert len(seen["1"][0]) == 1 + 2 * 1 + 1  # the spare one, an evaluation, an episode
    assert all(first != second for first, second in zip(seen["1"], seen["2"], strict=True))


def test_no_two_purposes_share_random_numbers():
    names = ("training", "evaluation", "random action", "replay")
    draws = {tuple(generator(seed, name, 3).integers(0, 2**62, 2)) for seed in (1, 2) for name in names}
    assert len(draws) == 8


def test_evaluations_differ_in_episodes_and_steps(tmp_path, monkeypatch):
    seeds = []
    reset = BarEnv.reset
    monkeypatch.setattr(BarEnv, "reset", lambda self, *, seed=None: seeds.append(seed) or reset(self, seed=seed))
    flags = "--num_train_steps 40 --init_steps 100 --eval_freq 20 --image_size 24 --num_eval_episodes 3".split()
    run_toy(tmp_path, monkeypatch, BarEnv, *flags)
    assert len(seeds) == len(set(seeds)) == 9 + 2 + 1  # evaluations, training, and a spare environment


def test_times(tmp_path, monkeypatch):
    """D and decisions per second are of the episode, evaluation apart, on a clock that ticks with decisions."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    step = CountingEnv.step

    def slow_step(self, action):
        clock[0] += 0.5
        return step(self, action)

    monkeypatch.setattr(CountingEnv, "step", slow_step)
    flags = "--num_train_steps 12 --init_steps 100 --eval_freq 4 --num_eval_episodes 2".split()
    run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=4), *flags)
    for record in read_log(tmp_path / "log" / "train.log"):
        assert (record["duration"], record["decisions_per_second"]) == (2.0, 2.0)
    for record in read_log(tmp_path / "log" / "eval.log"):
        assert (record["duration"], record["decisions_per_second"]) == (4.0, 2.0)  # two episodes, one after the other


class PoisonedEnv(BarEnv):
    """Its rewards become NaN."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan"), *rest


def test_a_bad_loss_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(PoisonedEnv(), 3))
    flags = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --image_size 24 --init_steps 30 --device cpu"
    flags += " --eval_workers 1"
    for steps in ("100", "32"):  # found when the policy acts, and at the run's end
        command = [*flags.split(), "--num_train_steps", steps, "--work_dir", str(tmp_path / steps), "--save_model"]
        assert train.main(command) == 1
        error = capsys.readouterr().err
        assert error == "train.py: error: train_critic/loss became nan at step 30: the run has diverged\n"
        assert not (tmp_path / steps / "model" / f"actor_{steps}.pt").exists()


def test_a_bad_action_stops_the_run(tmp_path, monkeypatch, capsys):
    """Losses can stay finite while the policy does not; in training and in evaluation alike."""
    nan = np.full(1, np.nan, np.float32)
    for name, step in (("sample_action", 30), ("select_actions", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "make_env", lambda args, seed: FrameStack(BarEnv(), 3))
            patch.setattr(train.SacAeAgent, name, lambda agent, obs: nan)
            flags = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --image_size 24 --init_steps 30"
            flags += " --eval_workers 1"
            command = [*flags.split(), "--num_train_steps", "50", "--device", "cpu", "--work_dir", str(tmp_path / name)]
            assert train.main(command) == 1
        assert f"action is NaN or infinite at step {step}: the run has diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--domain_name chetah", "no task chetah run; close ones: cheetah run"),
        ("--domain_name walker --task_name rum", "walker run"),
        ("--task_name fly", "cheetah run"),
        ("--batch_size 0", "--batch_size: must be at least 1, got 0"),
        ("--batch_size many", "--batch_size: invalid int value: 'many'"),
        ("--discount 1.5", "--discount: must be at most 1, got 1.5"),
        ("--discount nan", "--discount"),
        ("--critic_lr inf", "--critic_lr: must be at most 1.79"),
        ("--actor_lr 0", "must be above 0"),
        ("--alpha_beta 1", "--alpha_beta"),
        ("--critic_tau -0.1", "--critic_tau"),
        ("--init_steps 0", "--init_steps"),
        ("--seed -1", "--seed"),
        ("--seed 4294967296", "--seed"),
        ("--action_repeat 0", "--action_repeat"),
        ("--frame_stack 0", "--frame_stack"),
        ("--actor_log_std_min 3", "actor_log_std_min must be below"),
        ("--image_size 83", "even"),
        ("--image_size 14", "at least 16 pixels a side"),
        ("--num_layers 22", "at least 88 pixels a side"),
        ("--encoder_type identity", "decoder_type pixel needs encoder_type pixel"),
        ("--encoder_type vit", "--encoder_type: invalid choice: 'vit'"),
        ("--replay_buffer_capacity 127", "at least batch_size"),
        ("--device cuda:77", "device cuda:77 cannot be used ("),
        ("--precision fp16", "--precision: invalid choice: 'fp16'"),
        ("--replay_device cuda --device cpu", "replay_device cuda needs a GPU"),
        (
            "--replay_buffer_capacity 99999999 --num_train_steps 99999999",
            "fits",
        ),
        ("--device gpu", "device gpu cannot be used ("),
        ("--device meta", "device meta cannot be used (neither cpu nor cuda); this machine has cpu"),
        ("--device hpu", "device hpu cannot be used ("),
        ("--batch_size 1" + 400 * "0", "--batch_size: must be at most 9223372036854775807, got 10000"),
        ("--action_repeat 1001", "--action_repeat: must be at most 1000, got 1001"),
        ("--frame_stack 101", "--frame_stack"),
        ("--actor_log_std_min nan", "got nan"),
        ("--hidden_dim 1000000000", "allocate"),
        ("--image_size 100000", ""),
        ("--agent ddpg", "--agent: invalid choice: 'ddpg'"),
        ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
        ("--batch 12", "unrecognized arguments: --batch"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, words):
    assert_refused(tmp_path / "log", capsys, flags.split(), words)
    assert not (tmp_path / "log").exists()


def assert_refused(work_dir, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--work_dir", str(work_dir), *flags])
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("train.py: error: ")
    assert words in output.err


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.parametrize("name", [*LOGS, *FOLDERS])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    assert_refused(tmp_path, capsys, [], "holds a run already")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_impossible_folders_are_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("precious")
    assert_refused(tmp_path / "file", capsys, [], "is not a folder")
    assert_refused(tmp_path / "file" / "below", capsys, [], "is not a folder")
    assert_refused(tmp_path / (300 * "x"), capsys, [], "cannot be used")
    assert_refused("", capsys, [], "--work_dir: is empty")
    assert_refused("/proc/new", capsys, SMALL, "")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert_refused(tmp_path / "link", capsys, [], "is not a folder")
    (tmp_path / "link").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert_refused(tmp_path / "new", capsys, [], "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_compile_without_a_compiler_is_refused(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "train.py", *SMALL, "--compile", "--work_dir", str(tmp_path / "log")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "'no-such-compiler'); it needs a C++ compiler (g++, or what CXX names)" in result.stderr
    assert not (tmp_path / "log").exists()


def test_cuda_graphs_are_for_gpus(monkeypatch):
    """Chosen by flag and device."""
    graphed = []
    monkeypatch.setattr(train, "Graphs", lambda agent, report: graphed.append(agent.device.type))

    class Agent(SacAeAgent):
        def __init__(self, obs_shape, action_shape, device, **settings):
            self.device = torch.device(device)

    monkeypatch.setitem(train.AGENTS, "sac_ae", Agent)
    for flags in (["--device", "cpu"], ["--device", "cuda"], ["--device", "cuda", "--cuda_graph", "off"]):
        train.make_agent(train.make_parser().parse_args(flags), (9, 84, 84), (6,))
    assert graphed == ["cuda"]


def test_videos_survive_signals_to_all_processes(tmp_path):
    """As a scheduler sends them: ffmpeg ends when it has all frames."""
    sent = []

    def send():
        while not sent:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "rawvideo" in child.cmdline():
                        child.send_signal(signal.SIGTERM)
                        sent.append(child)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    write_video(tmp_path / "video.mp4", (np.full((256, 256, 3), index, np.uint8) for index in range(200)))
    sender.join(timeout=60)
    assert sent
    assert len(iio.imread(tmp_path / "video.mp4")) == 200


@contextlib.contextmanager
def largest_file(size):
    """No process here, nor below, can write a file of more bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_video_is_whole_or_not_there(tmp_path):
    """Wherever the disk is full: ffmpeg writes most of a short video at its end, and fails in silence."""
    path, frames = tmp_path / "video.mp4", np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), np.uint8)
    write_video(path, frames)
    size = len(path.read_bytes())
    path.unlink()
    for limit in (10, 1000, size // 2, size - 600, size - 1):
        with largest_file(limit), pytest.raises(UserError, match="is the disk full"):
            write_video(path, frames)
        assert not list(tmp_path.iterdir())
    with largest_file(size):
        write_video(path, frames)
    assert len(iio.imread(path)) == 40


def test_video_without_ffmpeg_is_refused(tmp_path, capsys, monkeypatch):
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    assert_refused(tmp_path / "log", capsys, ["--save_video"], "videos need ffmpeg")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("backend", ["egl", *(["disabled", "nonsense", "glfw"] if LONG else [])])
def test_no_renderer_is_refused(tmp_path, backend):
    # Without a vendor's library EGL itself is there but has nothing to render with.
    environment = {
        key: value for key, value in os.environ.items() if "DISPLAY" not in key and key != "DMC2GYM_RENDERER"
    }
    environment |= {"MUJOCO_GL": backend, "__EGL_VENDOR_LIBRARY_FILENAMES": str(tmp_path / "none.json")}
    command = [sys.executable, "train.py", "--work_dir", str(tmp_path / "log")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"MUJOCO_GL={backend}" in result.stderr
    assert "unset it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_states_need_no_renderer_that_works(tmp_path):
    """EGL is there but does not work, and nobody has chosen it: a run that draws nothing is not disturbed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DMC2GYM_RENDERER")}
    environment |= {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}
    flags = [*SMALL, *METHODS["sac_state"], "--num_train_steps", "2", "--work_dir", str(tmp_path / "log")]
    result = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("method", ["reset", "step", "render"])
def test_what_fails_in_the_first_steps_fails_before_anything_is_written(tmp_path, monkeypatch, method):
    def fail(*_, **__):
        raise LookupError("nothing to draw with")

    monkeypatch.setattr(dmc2gym.DMCWrapper, method, fail)
    with pytest.raises(LookupError):
        train.main([*SMALL, "--work_dir", str(tmp_path / "log")])
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "cause",
    [
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: no kernel image is available for execution on the device",
        "The NVIDIA driver on your system is too old (found version 11040).",
    ],
)
def test_a_device_that_fails_says_why(tmp_path, capsys, monkeypatch, cause):
    """The other ones are offered."""

    def fail(*_, **__):
        raise RuntimeError(f"{cause}\nCUDA kernel errors might be")

    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = f"device cuda cannot be used ({cause}); this machine has cpu, cuda:0, cuda:1\n"
    assert_refused(tmp_path / "log", capsys, ["--device", "cuda"], words)
    assert not (tmp_path / "log").exists()


def test_a_compiler_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    """The compiler's first line is shown."""

    def fail(_function):
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ -o ...\n\nOutput:\nfatal error: no space\nterminated.\n")

    monkeypatch.setattr(torch, "compile", fail)
    assert_refused(tmp_path / "log", capsys, ["--compile"], "compile does not work here: fatal error: no space; it")
    assert not (tmp_path / "log").exists()


def test_bfloat16_is_refused_where_it_is_slower(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "bf16_ratio", lambda *sizes: asked.append(sizes) or 10.6)
    line = "precision bf16 takes 10.6 times as long as fp32 on this processor, which lacks the instructions for it (AMX"
    assert_refused(tmp_path / "log", capsys, ["--precision", "bf16"], line)
    assert_refused(tmp_path / "log", capsys, ["--precision", "bf16", *METHODS["sac_state"]], line)
    assert asked == [(32, 1024), (32, 1024)]
    assert not (tmp_path / "log").exists()
    assert (
        train.main([*SMALL, *METHODS["sac_state"], "--num_train_steps", "2", "--work_dir", str(tmp_path / "log")]) == 0
    )
    assert len(asked) == 2  # nobody else waits for it


def test_a_run_that_began_in_bfloat16_goes_on_in_it(tmp_path, monkeypatch):
    flags = [*SMALL, *METHODS["sac_state"], "--precision", "bf16", "--work_dir", str(tmp_path / "log")]
    monkeypatch.setattr(machine, "bf16_ratio", lambda *_: 0.5)
    assert train.main(flags) == 0
    monkeypatch.setattr(machine, "bf16_ratio", lambda *_: 10.6)
    assert train.main([*flags, "--resume", "--num_train_steps", "70"]) == 0


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch):
    supported = [False]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(UserError, match="an old one"):
        machine.check_bf16(torch.device("cuda"), 32, 1024)
    supported[0] = True
    machine.check_bf16(torch.device("cuda"), 32, 1024)


def test_asking_for_bfloat16_changes_nothing():
    before = torch.get_rng_state(), torch.get_num_threads()
    assert machine.bf16_ratio(8, 64) > 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


class WithDropout(SacAeAgent):
    """Draws from PyTorch's generator whenever it acts in training mode; and has a frozen network of its own."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.actor.trunk.append(nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).requires_grad_(False)


def test_evaluations_are_played_in_evaluation_mode(tmp_path, monkeypatch, short_episodes):
    """So that how often they are played changes nothing in training; afterwards the agent is in training mode."""
    monkeypatch.setitem(train.AGENTS, "sac_ae", WithDropout)
    args = train.make_parser().parse_args(["--device", "cpu", *METHODS["sac_state"]])
    agent, logs = train.make_agent(args, (5,), (1,)), []
    modes = [(network.training, name) for name, network in agent.networks.items()]
    with eval_mode(agent):
        assert not any(network.training for network in agent.networks.values())
    assert [(network.training, name) for name, network in agent.networks.items()] == modes
    assert (False, "frozen") in modes
    for eval_freq in ("10", "30"):
        folder = tmp_path / eval_freq
        flags = [*SMALL, *SHORT, *METHODS["sac_state"], "--save_model", "--eval_freq", eval_freq]
        assert train.main([*flags, "--work_dir", str(folder)]) == 0
        logs.append(without_times(read_log(folder / "train.log")))
    assert logs[0] == logs[1]
    assert {record["step"] for record in read_log(tmp_path / "10" / "eval.log")} == {0, 10, 20, 30}
    args, words = evaluate.make_parser().parse_known_args([str(tmp_path / "10"), "--device=cpu", "--eval_workers=1"])
    evaluation = evaluate.Evaluation(args, words)
    with contextlib.closing(evaluation.envs):
        assert (evaluation.play() == evaluation.play()).all()


def test_networks_in_a_list_are_refused(tmp_path, monkeypatch):
    """Checkpoints would lack them; a traceback says what to use."""

    class Ensemble(SacAeAgent):
        held: type = list

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            linear = nn.Linear(2, 2)
            self.ensemble_optimizer = self.adam(linear.parameters(), 1e-3)
            if self.held is not None:
                self.ensemble = self.held([linear])

    monkeypatch.setitem(train.AGENTS, "sac_ae", Ensemble)
    command = [*SMALL, *METHODS["sac_state"], "--num_train_steps", "5", "--work_dir", str(tmp_path / "log")]
    for Ensemble.held, words in ((list, "ensemble holds networks"), (None, "ensemble_optimizer trains what is in no")):
        with pytest.raises(TypeError, match=words):
            train.main(command)
    Ensemble.held = nn.ModuleList
    assert train.main(command) == 0


@pytest.mark.parametrize(
    ("space", "shown"),
    [
        (gym.spaces.Dict({"state": gym.spaces.Box(-1, 1, (3,))}), "not None of shape ()"),
        (gym.spaces.Box(0, 1, (3, 16, 16), np.float32), "not float32 of shape (9, 16, 16)"),
    ],
    ids=["dictionary", "floats"],
)
def test_observations_that_the_networks_cannot_take(tmp_path, monkeypatch, capsys, space, shown):
    def make_env(args, seed):
        env = CountingEnv()
        env.observation_space = space
        return FrameStack(env, args.frame_stack) if space.shape else env

    monkeypatch.setattr(train, "make_env", make_env)
    words = f"observations must be states (D,) or uint8 pixels (C, H, W), {shown}"
    assert_refused(tmp_path / "log", capsys, SMALL, words)


def test_grey_frames(tmp_path, monkeypatch, capsys):
    """They can be learned from; pictures of them are refused."""

    def make_env(args, seed):
        env = CountingEnv(size=32)
        env.observation_space = gym.spaces.Box(0, 255, (1, 32, 32), np.uint8)
        return FrameStack(env, args.frame_stack)

    monkeypatch.setattr(train, "make_env", make_env)
    assert_refused(tmp_path / "log", capsys, [*SMALL, "--save_tb"], "RGB frames (3, H, W) only, not of 1 channels")
    assert train.main([*SMALL, *SHORT, "--work_dir", str(tmp_path / "log")]) == 0


def pace_of(monkeypatch, capsys, update, left, count=60):
    """What a run says whose updates take so many seconds each, with `left` to come after the first."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    pace = report.Pace(torch.device("cpu"))
    for number in range(count):
        clock[0] += update if number else 50  # which is no update's time
        pace.lap(left - number)
    return capsys.readouterr().out


@pytest.mark.parametrize(("update", "said"), [(2.0, True), (0.001, False)])
def test_the_time_that_is_left_is_said_once(monkeypatch, capsys, update, said):
    """After 25 updates, if it is more than an hour."""
    line = "note: an update every 2 s: at least 4.0 hours are left\n"
    assert pace_of(monkeypatch, capsys, update, left=7225) == (line if said else "")
    assert pace_of(monkeypatch, capsys, update, left=7225, count=25) == ""


def test_long_times_are_said_in_days(monkeypatch, capsys):
    assert "s: at least 8.2 days are left" in pace_of(monkeypatch, capsys, 1.0, left=710_000)


def test_a_long_run_says_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.Pace, "WORTH_SAYING", 0.0)
    assert train.main([*SMALL, *METHODS["sac_state"], "--work_dir", str(tmp_path / "log")]) == 0
    assert capsys.readouterr().out.count("note: an update every ") == 1


def test_a_simulation_that_diverges_ends_an_episode_not_the_run(tmp_path, capsys, monkeypatch):
    """In training and in evaluation; the run goes on, and its logs count such ends."""
    step, steps = dmc2gym.DMCWrapper.step, []

    def diverge(env, action):
        steps.append(env)
        if len([each for each in steps if each is env]) == 5:  # of each environment
            env.physics.data.qvel[:] = 1e12
        return step(env, action)

    monkeypatch.setattr(dmc2gym.DMCWrapper, "step", diverge)
    folder = tmp_path / "log"
    flags = [*SMALL, *METHODS["sac_state"], "--num_train_steps", "260", "--eval_freq", "130", "--init_steps", "100"]
    assert train.main([*flags, "--work_dir", str(folder)]) == 0
    stderr = capsys.readouterr().err.splitlines()
    assert [line.split(", which")[0] for line in stderr] == [
        "warning: the simulation diverged at step 0, evaluation episode 0, decision 5",
        "warning: the simulation diverged at step 0, evaluation episode 1, decision 5",
        "warning: the simulation diverged at step 5",
    ]
    assert [record.get("physics_errors") for record in read_log(folder / "eval.log")] == [2, None]
    assert [record.get("physics_errors") for record in read_log(folder / "train.log")] == [1, None, None]
    assert [record["step"] for record in read_log(folder / "train.log")] == [5, 130, 255]
    assert all(math.isfinite(value) for record in read_log(folder / "train.log") for value in record.values())


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    actions = [action for action in train.make_parser()._actions if action.dest != "help"]
    assert {action.dest for action in actions} == set(vars(train.make_parser().parse_args([])))
    for action in actions:
        assert action.help
        assert f"{action.help} (default: {action.default})" in shown


def test_published_defaults():
    """The numbers that the method's results rest on (paper, table 3, and the authors' script)."""
    args = train.make_parser().parse_args([])
    assert (args.encoder_type, args.decoder_type) == ("pixel", "pixel")
    assert (args.image_size, args.frame_stack, args.batch_size, args.hidden_dim) == (84, 3, 128, 1024)
    assert (args.num_layers, args.num_filters, args.encoder_feature_dim) == (4, 32, 50)
    assert (args.init_steps, args.replay_buffer_capacity, args.discount) == (1000, 1_000_000, 0.99)
    assert (args.init_temperature, args.alpha_lr, args.alpha_beta) == (0.1, 1e-4, 0.5)
    assert args.critic_lr == args.actor_lr == args.encoder_lr == args.decoder_lr == 1e-3
    assert (args.critic_tau, args.encoder_tau) == (0.01, 0.05)
    assert (args.actor_update_freq, args.critic_target_update_freq, args.decoder_update_freq) == (2, 2, 1)
    assert (args.actor_log_std_min, args.actor_log_std_max) == (-10, 2)
    assert (args.decoder_latent_lambda, args.decoder_weight_lambda) == (1e-6, 1e-7)
    assert (args.eval_freq, args.num_eval_episodes) == (10_000, 10)


def test_first_lines(tmp_path):
    run, resources = open_run(*SMALL, "--action_repeat", "4", "--work_dir", str(tmp_path))
    with resources:
        lines = list(report.describe(run, ("a name", True)))
        starts = ["note: the published", "device: cpu", "renderer: a name", "warning: this renderer is software"]
        starts += [
            "observation: (9, 32, 32) uint8",
            "action: (1,)",
            "replay: 0.2 MB in host memory for 60 transitions",
            f"checkpoints: up to 0.2 MB in {tmp_path}/checkpoint, ",
            "actor: ",
            "critic: ",
            "decoder: ",
        ]
        starts += ["first an evaluation, 25 random decisions"]
        assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
        assert "--action_repeat 8, not 4" in lines[0]
        assert not any("software" in line for line in report.describe(run, ("a name", False)))
        assert not any("renderer" in line for line in report.describe(run, None))
        run.args.num_train_steps = run.args.init_steps
        assert list(report.describe(run, None))[-1].startswith("note: nothing will be learned")


def test_published_repeats(tmp_path):
    """Paper, table 2; a run with another one says so."""
    assert report.PUBLISHED_REPEATS == {
        ("cartpole", "swingup"): 8, ("reacher", "easy"): 4, ("cheetah", "run"): 4, ("ball_in_cup", "catch"): 4,
        ("finger", "spin"): 2, ("walker", "walk"): 2,
    }  # fmt: skip
    for task, repeat, noted in (("finger spin", "2", False), ("finger spin", "3", True), ("hopper hop", "3", False)):
        domain_name, task_name = task.split()
        flags = [*SMALL, *METHODS["sac_state"], "--domain_name", domain_name, "--task_name", task_name]
        run, resources = open_run(*flags, "--action_repeat", repeat, "--work_dir", str(tmp_path / (task + repeat)))
        with resources:
            lines = report.describe(run, ("none", False))
            assert any(line.startswith("note: the published") for line in lines) == noted


def test_every_setting_is_a_flag_that_reaches_the_agent():
    """A new one is written once, in the settings of an agent."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MoreSettings(settings.Settings):
        novelty: settings.Fraction = settings.setting(0.25, "share of novelty")

    class Curious(train.SacAeAgent):
        settings_class = MoreSettings

    names = [field.name for field in dataclasses.fields(settings.Settings)]
    assert set(names) <= set(vars(train.make_parser().parse_args([])))
    with mock.patch.dict(train.AGENTS, {"curious": Curious}):
        args = train.make_parser().parse_args(["--agent", "curious", *METHODS["sac_state"], "--novelty", "0.5"])
        for name in ("actor_lr", "critic_tau"):
            setattr(args, name, 0.375)
        agent = train.make_agent(args, (5,), (2,))
    assert (agent.settings.novelty, agent.settings.actor_lr, agent.settings.critic_tau) == (0.5, 0.375, 0.375)
    assert {name: getattr(agent.settings, name) for name in names} == {name: getattr(args, name) for name in names}


def start(tmp_path, *flags, real=True):
    """A program in a process of its own, or without its imports."""
    command = ["train.py", *SMALL, *METHODS["sac_state"], *flags, "--work_dir", str(tmp_path / "log")]
    if not real:
        return Program(*command)
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_interrupt(tmp_path):
    process = start(tmp_path, "--num_train_steps", "100000", real=False)
    for line in process.stdout:
        if line.startswith("| train"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert re.fullmatch(r"train.py: stopped by SIGINT at step \d+: --resume continues it\n", process.stderr.read())


@pytest.mark.parametrize("seconds", [0.3, 1.5, 2.5])
def test_interrupt_while_starting(tmp_path, seconds):
    """Until training has begun, nothing has been written and nothing needs to be said."""
    process = start(tmp_path, "--num_train_steps", "100000")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = {-signal.SIGINT: "", 130: r"train.py: stopped by SIGINT at step \d+: --resume continues it\n"}
    assert re.fullmatch(said[process.wait(timeout=60)], process.stderr.read())


def test_a_gpu_without_room(tmp_path, monkeypatch, capsys):
    """One line, as for all that can happen to a run, not a traceback."""

    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(train.SacAeAgent, "update", update)
    assert (
        train.main([*SMALL, *METHODS["sac_state"], "--num_train_steps", "1100", "--work_dir", str(tmp_path / "log")])
        == 1
    )
    error = capsys.readouterr().err
    assert "error: CUDA out of memory. Tried to allocate 2 GiB.; for training, --replay_device cpu" in error
    assert "--replay_device cpu or --cuda_graph off leaves" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("lines", [0, 1, 12])
def test_closed_pipe(tmp_path, lines):
    """A reader that leaves, as `head` does, is no mistake in the flags, not even before the first line."""
    process = start(tmp_path, "--num_train_steps", "100000", real=lines == 1)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == "train.py: error: [Errno 32] Broken pipe\n"


def test_output_on_a_terminal_and_on_a_pipe(tmp_path):
    """Bars go to stderr if that is a terminal; stdout holds whole lines either way."""
    flags = [*SMALL, *METHODS["sac_state"], *"--num_train_steps 130 --init_steps 100 --eval_freq 1000".split()]
    outputs = []
    for terminal in (True, False):
        with reader(terminal) as (stderr, read):
            result = run_program("train.py", *flags, "--work_dir", tmp_path / str(terminal), stderr=stderr)
        assert result.returncode == 0
        bars = read()
        assert [bars.count(f"{name}: ") > 0 for name in ("first updates", "evaluation")] == 2 * [terminal]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith("|")])
        assert all(LINE[line.split()[1]].fullmatch(line) for line in outputs[-1])
    remove_times = [[re.sub(r"D: \S+ s", "", line) for line in lines] for lines in outputs]
    assert remove_times[0] == remove_times[1]
    assert len(outputs[0]) == 2


def test_agents_share_the_defaults_of_their_settings(monkeypatch):
    """A subclass with another default would change the other agents' flag."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OtherSettings(settings.Settings):
        discount: settings.Fraction = settings.setting(0.5, "discount per decision")

    class Other(train.SacAeAgent):
        settings_class = OtherSettings

    monkeypatch.setitem(train.AGENTS, "other", Other)
    with pytest.raises(ValueError, match="different defaults for discount"):
        train.make_parser()
