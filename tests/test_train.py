"""The command line and the loop: real runs, the order of things, refusals."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from terminal import reader
from test_logger import read_events
from toy import BarEnv, CountingEnv

import train
from utils import FrameStack

ROOT = Path(__file__).parent.parent
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
    "--device cpu"
).split()
METHODS = {
    "sac_ae": [],
    "sac_pixel": ["--decoder_type", "identity"],
    "sac_state": ["--encoder_type", "identity", "--decoder_type", "identity"],
}
SAVE = ["--save_tb", "--save_video", "--save_model", "--save_buffer"]


@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes of 20 decisions at repeat 8."""
    monkeypatch.setattr(train, "EPISODE_LENGTH", 160)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records):
    times = ("duration", "decisions_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_a_run(tmp_path, capsys, short_episodes, method):
    work_dir = tmp_path / "log"
    assert train.main([*SMALL, *METHODS[method], *SAVE, "--work_dir", str(work_dir)]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    kinds = [line.split()[1] for line in lines]
    assert kinds == ["eval", "train", "train", "eval", "train"]
    assert all(LINE[kind].fullmatch(line) for kind, line in zip(kinds, lines, strict=True))

    episodes, evaluations = read_log(work_dir / "train.log"), read_log(work_dir / "eval.log")
    assert [record["step"] for record in episodes] == [20, 40, 60]
    assert [record["episode"] for record in episodes] == [1, 2, 3]
    assert [record["environment_steps"] for record in episodes] == [160, 320, 480]
    assert [record["step"] for record in evaluations] == [0, 40]
    assert [record["environment_steps"] for record in evaluations] == [0, 320]
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
    models = {f"{name}_{step}.pt" for name in networks for step in (0, 40, 60)}
    assert {path.name for path in (work_dir / "model").iterdir()} == models
    for name in networks:
        first, last = (torch.load(work_dir / "model" / f"{name}_{step}.pt") for step in (0, 60))
        first, last = (state.get("critic_target", state) for state in (first, last))
        assert all(not torch.equal(first[key], last[key]) for key in first if key.endswith("weight"))

    assert {path.name for path in (work_dir / "video").iterdir()} == {"0.mp4", "40.mp4"}
    assert iio.imread(work_dir / "video" / "40.mp4").shape == (21, 256, 256, 3)
    assert {path.name for path in (work_dir / "buffer").iterdir()} == {"0_40.pt", "40_60.pt", "replay.json"}
    assert json.loads((work_dir / "args.json").read_text())["batch_size"] == 8
    tags = read_events(work_dir).Tags()
    assert {"train_critic/loss", "train/episode_reward", "eval/episode_reward", "train_alpha/value"} <= set(
        tags["scalars"]
    )
    assert "eval/video" in tags["images"]
    assert ("eval/observation_and_reconstruction" in tags["images"]) == (method == "sac_ae")
    assert {"train_actor/trunk.4_weight", "train_critic/Q1.trunk.0_output"} <= set(tags["histograms"])


def run_toy(tmp_path, monkeypatch, make_env, *flags, name="log"):
    """A run of the real loop in an environment without a simulator; returns it after the end."""

    def stacked(args, seed):
        env = make_env()
        env.camera_id, env.renderer = 0, ("none", False)
        return FrameStack(env, args.frame_stack)

    monkeypatch.setattr(train, "make_env", stacked)
    small = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --num_eval_episodes 1 --image_size 16"
    args = train.make_parser().parse_args(
        [*small.split(), *flags, "--device", "cpu", "--work_dir", str(tmp_path / name)]
    )
    run = train.Run(args)
    run.train()
    run.close()
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
    noting(train.ReplayBuffer, "add", lambda replay, *transition: "add")
    noting(CountingEnv, "step", lambda env, action: "step")
    flags = "--num_train_steps 9 --init_steps 6 --eval_freq 1000".split()
    run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=20), *flags)
    events = events[20:]  # the first evaluation's episode, at most
    events = events[events.index("add") - 1 :]
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
    logs = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = tmp_path / name
        assert train.main([*SMALL, "--seed", seed, "--save_model", "--work_dir", str(folder)]) == 0
        logs[name] = [without_times(read_log(folder / f"{section}.log")) for section in ("train", "eval")]
    assert logs["a"] == logs["b"]
    assert logs["a"][0] != logs["c"][0]
    assert logs["a"][1] != logs["c"][1]
    models = [torch.load(tmp_path / name / "model" / "critic_60.pt") for name in ("a", "b")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


class PoisonedEnv(BarEnv):
    """Its rewards become NaN."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan"), *rest


def test_a_bad_loss_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(PoisonedEnv(), 3))
    flags = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --image_size 24 --init_steps 30"
    flags += " --num_train_steps 100 --device cpu"
    assert train.main([*flags.split(), "--work_dir", str(tmp_path / "log")]) == 1
    error = capsys.readouterr().err
    assert error == "train.py: error: train_critic/loss became nan at step 30: the run has diverged\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--domain_name chetah", "no task chetah run; close ones: cheetah run"),
        ("--domain_name walker --task_name rum", "walker run"),
        ("--task_name fly", "cheetah run"),
        ("--batch_size 0", "--batch_size: must be at least 1, got 0"),
        ("--batch_size many", "--batch_size: invalid int value: 'many'"),
        ("--discount 1.5", "--discount: must be at least 0 and at most 1, got 1.5"),
        ("--discount nan", "--discount"),
        ("--critic_lr inf", "--critic_lr"),
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
        ("--num_train_steps 100", "at least batch_size"),
        ("--device cuda:77", "there is no device cuda:77 here"),
        ("--replay_device cuda --device cpu", "replay_device cuda needs a GPU"),
        (
            "--replay_buffer_capacity 99999999 --num_train_steps 99999999",
            "largest --replay_buffer_capacity that fits",
        ),
        ("--device gpu", "there is no device gpu here"),
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


@pytest.mark.parametrize("name", train.RUN_FILES)
def test_a_folder_that_holds_a_run_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    assert_refused(tmp_path, capsys, [], "holds a run already")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_impossible_folders_are_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("precious")
    assert_refused(tmp_path / "file", capsys, [], "cannot be written")
    assert_refused(tmp_path / "file" / "below", capsys, [], "cannot be written")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert_refused(tmp_path / "new", capsys, [], "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_video_without_ffmpeg_is_refused(tmp_path, capsys, monkeypatch):
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    assert_refused(tmp_path / "log", capsys, ["--save_video"], "save_video needs ffmpeg")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("backend", ["disabled", "nonsense", "egl"])
def test_no_renderer_is_refused(tmp_path, backend):
    # Without a vendor's library EGL itself is there but has nothing to render with.
    environment = os.environ | {"MUJOCO_GL": backend, "__EGL_VENDOR_LIBRARY_FILENAMES": str(tmp_path / "none.json")}
    command = [sys.executable, "train.py", "--work_dir", str(tmp_path / "log")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "libegl1 libgl1-mesa-dri" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for flag, default in vars(train.make_parser().parse_args([])).items():
        assert re.search(rf"--{flag}\b[^-]* [^()]*.*?\(default: {re.escape(str(default))}\)", shown), flag


def test_published_defaults():
    """The defaults that the method's results rest on."""
    want = {
        "image_size": 84, "action_repeat": 1, "frame_stack": 3, "replay_buffer_capacity": 1_000_000, "init_steps": 1000,
        "num_train_steps": 1_000_000, "batch_size": 128, "hidden_dim": 1024, "eval_freq": 10_000,
        "num_eval_episodes": 10, "critic_lr": 1e-3, "critic_beta": 0.9, "critic_tau": 0.01,
        "critic_target_update_freq": 2, "actor_lr": 1e-3, "actor_beta": 0.9, "actor_log_std_min": -10,
        "actor_log_std_max": 2, "actor_update_freq": 2, "encoder_type": "pixel", "encoder_feature_dim": 50,
        "encoder_lr": 1e-3, "encoder_tau": 0.05, "decoder_type": "pixel", "decoder_lr": 1e-3, "decoder_update_freq": 1,
        "decoder_latent_lambda": 1e-6, "decoder_weight_lambda": 1e-7, "num_layers": 4, "num_filters": 32,
        "discount": 0.99, "init_temperature": 0.1, "alpha_lr": 1e-4, "alpha_beta": 0.5, "seed": 1,
        "work_dir": "./log", "replay_device": "auto",
        "save_tb": False, "save_model": False, "save_buffer": False, "save_video": False,
        "domain_name": "cheetah", "task_name": "run", "agent": "sac_ae",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    assert vars(train.make_parser().parse_args([])) == want


def test_first_lines(tmp_path):
    flags = [*SMALL, "--action_repeat", "4", "--work_dir", str(tmp_path)]
    run = train.Run(train.make_parser().parse_args(flags))
    lines = list(run.describe())
    run.close()
    starts = ["note: the published", "device: cpu", "note: without a GPU", "renderer: "]
    starts += ["observation: (9, 32, 32) uint8", "action: (1,)", "replay: 0.00 GB", "actor: ", "critic: ", "decoder: "]
    lines = [line for line in lines if not line.startswith("warning: this renderer is software")]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    assert "--action_repeat 8, not 4" in lines[0]


def test_output_on_a_terminal_and_on_a_pipe(tmp_path):
    """Bars go to stderr if that is a terminal; stdout holds whole lines either way."""
    flags = [*SMALL, *METHODS["sac_state"], *"--num_train_steps 130 --init_steps 100 --eval_freq 1000".split()]
    outputs = []
    for terminal in (True, False):
        command = [sys.executable, "train.py", *flags, "--work_dir", str(tmp_path / str(terminal))]
        with reader(terminal) as (stderr, read):
            result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
        bars = read()
        assert [name in bars for name in ("first updates", "evaluation")] == [terminal, terminal]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith("|")])
        assert all(LINE[line.split()[1]].fullmatch(line) for line in outputs[-1])
    remove_times = [[re.sub(r"D: \S+ s", "", line) for line in lines] for lines in outputs]
    assert remove_times[0] == remove_times[1]
    assert len(outputs[0]) == 2
