"""The command line and the loop: real runs, the order of things, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from agents import WithDropout
from events import read_events
from programs import Program, run_program
from runs import METHODS, SMALL, TOY, open_run, read_log, run_toy, without_times
from terminal import reader
from toy import BarEnv, CountingEnv, StateEnv, make_toy_env

import dmc2gym
import evaluate
import sac_ae
import train
from randomness import generator
from sac_ae import SacAeAgent
from support import report
from utils import FrameStack, ReplayBuffer, module_hash

ROOT = Path(__file__).parent.parent
SHORT = "--init_steps 12 --num_train_steps 30 --eval_freq 20".split()
STATES = METHODS["sac_state"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run(tmp_path, monkeypatch, capsys, method):
    monkeypatch.setattr(train, "EPISODE_LENGTH", 80)  # ten decisions: the simulator's pictures take most of the time
    saving = ["--save_tb", "--save_video", "--save_model", "--save_buffer"]
    assert train.main([*SMALL, *SHORT, *METHODS[method], *saving, "--work_dir", str(tmp_path)]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in lines] == ["eval", "train", "train", "eval", "train"]
    episodes, evaluations = read_log(tmp_path / "train.log"), read_log(tmp_path / "eval.log")
    counts = [(record["episode"], record["step"], record["environment_steps"]) for record in episodes]
    assert counts == [(1, 10, 80), (2, 20, 160), (3, 30, 240)]
    assert [(record["step"], record["environment_steps"]) for record in evaluations] == [(0, 0), (20, 160)]
    losses = {"critic_loss", "actor_loss", "alpha_loss"} | ({"ae_loss"} if method == "sac_ae" else set())
    assert [{key for key in record if key.endswith("_loss")} for record in episodes] == [set(), losses, losses]
    assert all(math.isfinite(value) for record in episodes + evaluations for value in record.values())
    qualities = {"psnr", "ssim"} if method == "sac_ae" else set()
    assert all({"psnr", "ssim"} & record.keys() == qualities for record in evaluations)

    names = {path.name for folder in ("model", "video", "buffer") for path in (tmp_path / folder).iterdir()}
    networks = ["actor", "critic", "target"] + (["decoder"] if method == "sac_ae" else [])
    models = {f"{name}_{step}.pt" for name in networks for step in (0, 20, 30)}
    assert names == models | {"0.mp4", "20.mp4", "0_20.pt", "20_30.pt", "replay.json"}
    for name in networks:  # all learn, the target, too
        first, last = (torch.load(tmp_path / "model" / f"{name}_{step}.pt") for step in (0, 30))
        first, last = (state.get("critic_target", state) for state in (first, last))
        assert all(not torch.equal(first[key], last[key]) for key in first if key.endswith("weight"))
    assert iio.imread(tmp_path / "video" / "20.mp4").shape == (11, 256, 256, 3)
    tags = read_events(tmp_path).Tags()
    shown = {"train_critic/loss", "train/episode_reward", "eval/episode_reward"} | {f"eval/{key}" for key in qualities}
    assert shown <= set(tags["scalars"])
    assert {"train_actor/trunk.4_weight", "train_critic/Q1.trunk.0_output"} <= set(tags["histograms"])
    assert "eval/video" in tags["images"]
    assert ("eval/observation_and_reconstruction" in tags["images"]) == (method == "sac_ae")


def test_everything_random_depends_on_the_seed(tmp_path, monkeypatch):
    """Episodes, which all differ, actions, draws from the replay, PyTorch's numbers, and so all that is logged."""
    monkeypatch.setattr(train, "EPISODE_LENGTH", 80)
    seen, reset = {}, dmc2gym.DMCWrapper.reset
    monkeypatch.setattr(dmc2gym.DMCWrapper, "reset", lambda env, *, seed: seeds.append(seed) or reset(env, seed=seed))
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        seeds, folder = [], tmp_path / name
        with open_run(*SMALL, *SHORT, *STATES, "--seed", seed, "--work_dir", str(folder)) as run:
            train.train(run)
        assert len(set(seeds)) == len(seeds) == 1 + 2 * 2 + 3  # a trial, two evaluations, training
        seen[name] = [seeds, run.replay.draw().tolist(), torch.rand(1).item(), run.agent.log_alpha.item()]
        seen[name] += [run.replay.gather(np.arange(12)).action.tolist()]
        seen[name] += [without_times(read_log(folder / f"{section}.log")) for section in ("train", "eval")]
    assert seen["a"] == seen["b"]
    assert all(first != second for first, second in zip(seen["a"], seen["c"], strict=True))
    assert not set(seen["a"][0]) & set(seen["c"][0])


def test_no_two_purposes_share_random_numbers():
    names = ("training", "evaluation", "random action", "replay")
    assert len({generator(seed, name, 3).random() for seed in (1, 2) for name in names}) == 8


class Diverging(StateEnv):
    """Diverges once, at its eighth decision."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.steps == 8 and not vars(self).setdefault("diverged", False):
            self.diverged = True
            return obs, 0.0, True, False, {"physics_error": "why"}
        return obs, reward, *rest


def test_a_simulation_that_diverges_ends_an_episode_not_the_run(tmp_path, capsys, monkeypatch):
    """In training and in evaluation; the logs count such ends."""
    monkeypatch.setattr(train, "make_env", lambda args, seed: Diverging())
    flags = "--num_train_steps 28 --init_steps 50 --eval_freq 28 --num_eval_episodes 2 --work_dir".split()
    assert train.main([*TOY, *STATES, *flags, str(tmp_path)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: the simulation diverged at step 0, evaluation episode 0, decision 8, which ends the episode: why",
        "warning: the simulation diverged at step 0, evaluation episode 1, decision 8, which ends the episode: why",
        "warning: the simulation diverged at step 8, which ends the episode: why",
    ]
    episodes, evaluations = read_log(tmp_path / "train.log"), read_log(tmp_path / "eval.log")
    assert [record.get("physics_errors") for record in evaluations] == [2, None]
    assert [(record["step"], record.get("physics_errors")) for record in episodes] == [(8, 1), (28, None)]


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
        monkeypatch.setattr(
            owner, name, lambda *args, **kwargs: events.append(note(*args)) or original(*args, **kwargs)
        )

    noting(SacAeAgent, "sample_action", lambda agent, obs: "policy")
    noting(SacAeAgent, "update", lambda agent, replay, logger, step: ("update", step, replay.transitions_added))
    noting(ReplayBuffer, "add", lambda replay, *transition: "add")
    noting(CountingEnv, "step", lambda env, action: "step")
    monkeypatch.setattr(train, "evaluate", lambda run: events.clear())  # the trial's, too
    flags = "--num_train_steps 9 --init_steps 6 --eval_freq 1000".split()
    run_toy(tmp_path, monkeypatch, lambda: CountingEnv(limit=20), *flags)
    want = ["step", "add"] * 6
    want += ["policy"] + [("update", 6, 6)] * 6 + ["step", "add"]
    want += ["policy", ("update", 7, 7), "step", "add"]
    want += ["policy", ("update", 8, 8), "step", "add"]
    assert events == want


def test_evaluation_does_not_touch_training(tmp_path, monkeypatch, capsys):
    """More evaluations, videos or TensorBoard change nothing in training, and evaluations are in evaluation mode."""
    monkeypatch.setitem(train.AGENTS, "sac_ae", WithDropout)
    variants = {
        "few": ["--eval_freq", "1000"],
        "many": ["--eval_freq", "20", "--num_eval_episodes", "3", "--save_tb"],
        "video": ["--eval_freq", "20", "--save_tb", "--save_video"],
    }
    outcomes, returns = [], []
    for name, flags in variants.items():
        flags += "--num_train_steps 60 --init_steps 20 --save_model".split()
        run = run_toy(tmp_path, monkeypatch, BarEnv, *flags, name=name)
        outcomes.append((without_times(read_log(tmp_path / name / "train.log")), module_hash(run.agent)))
        modes = {name: network.training for name, network in run.agent.networks.items()}
        assert [name for name in modes if not modes[name]] == ["critic_target", "frozen"]
    assert len(outcomes[0][0]) == 3
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for _ in range(2):
        capsys.readouterr()
        assert evaluate.main([str(tmp_path / "few"), "--episodes=2", "--device=cpu", "--eval_workers=1"]) == 0
        returns.append(capsys.readouterr().out)
    assert returns[0] == returns[1]


def test_an_episode_takes_the_time_of_its_decisions(tmp_path, monkeypatch):
    """Not that of evaluations, nor that between a stop within it and the resume; on a clock that decisions advance."""
    clock, random_action = [0.0], train.random_action

    class SlowEnv(StateEnv):
        def step(self, action):
            clock[0] += 0.5
            return super().step(action)

    def act(space, seed, step):
        if step == 26:
            signal.raise_signal(signal.SIGTERM)
        return random_action(space, seed, step)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "make_env", lambda args, seed: SlowEnv())
    flags = [*TOY, *STATES, *"--num_train_steps 40 --init_steps 100 --eval_freq 20 --num_eval_episodes 2".split()]
    flags += ["--work_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "random_action", act)
        assert train.main(flags) == 128 + signal.SIGTERM
    clock[0] += 1000
    assert train.main([*flags, "--resume"]) == 0
    for name, seconds in (("train.log", 10.0), ("eval.log", 20.0)):  # evaluation's environments take turns
        for record in read_log(tmp_path / name):
            assert (record["duration"], record["decisions_per_second"]) == (seconds, 2.0)


@pytest.mark.parametrize(("channels", "stack"), [(1, 1), (1, 3), (6, 1), (6, 3)])
def test_frames_that_are_not_rgb(tmp_path, monkeypatch, channels, stack):
    """Grey ones and those of two cameras, stacked or not, are learned from; three channels of them are shown."""
    monkeypatch.setattr(CountingEnv, "channels", channels)
    make_env = (lambda args, seed: FrameStack(CountingEnv(), 3)) if stack == 3 else (lambda args, seed: CountingEnv())
    monkeypatch.setattr(train, "make_env", make_env)
    flags = [*TOY, *"--init_steps 6 --num_train_steps 12 --save_tb --work_dir".split(), str(tmp_path)]
    with open_run(*flags) as run:
        train.train(run)
    batch = run.replay.gather(np.arange(run.replay.oldest, 12))
    assert batch.obs.shape[1:] == (stack * channels, 16, 16)
    before, after = (obs[:, -channels:].flatten(1).int() for obs in (batch.obs, batch.next_obs))
    assert (before + 1 == after).all()
    assert "eval/observation_and_reconstruction" in read_events(tmp_path).Tags()["images"]


def give_nan_reward(env, action, step=BarEnv.step):
    obs, _, *rest = step(env, action)
    return obs, float("nan"), *rest


def give_nan_loss(agent, replay, logger, step):
    logger.log("train_critic/loss", float("nan"), step)


def give_nan_action(agent, obs):
    return np.full((1,), np.nan, np.float32)


def find_no_room(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")


@pytest.mark.parametrize(
    ("owner", "method", "replacement", "steps", "words"),
    [
        (BarEnv, "step", give_nan_reward, 50, "the environment's observation or reward at step 1 is NaN or infinite"),
        (SacAeAgent, "update", give_nan_loss, 50, "train_critic/loss became nan at step 30: the run has diverged"),
        (SacAeAgent, "update", give_nan_loss, 32, "train_critic/loss became nan at step 30: the run has diverged"),
        (SacAeAgent, "sample_action", give_nan_action, 50, "the policy's action is NaN or infinite at step 30"),
        (SacAeAgent, "select_actions", give_nan_action, 50, "the policy's action is NaN or infinite at step 0"),
        (SacAeAgent, "update", find_no_room, 50, "Tried to allocate 2 GiB.; --replay_device cpu or"),
    ],
)
def test_what_ends_a_run_is_one_line(tmp_path, monkeypatch, capsys, owner, method, replacement, steps, words):
    """When the policy acts, or at the latest when the run ends."""
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(BarEnv(), 3))
    monkeypatch.setattr(owner, method, replacement)
    flags = ["--init_steps", "30", "--save_model", "--work_dir", str(tmp_path), "--num_train_steps", str(steps)]
    assert train.main([*TOY, *flags]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model" / f"actor_{steps}.pt").exists()


class Faulty(StateEnv):
    """Its observation of this number is NaN."""

    def __init__(self, number):
        super().__init__()
        self.countdown = number + 1

    def _observe(self):
        self.countdown -= 1
        return super()._observe() if self.countdown else np.full(3, np.nan)


@pytest.mark.parametrize(
    ("env", "number", "where"),
    [
        (1, 10, "or reward at step 10"),
        (1, 21, "at step 20"),
        (1, 36, "or reward at step 35"),
        (2, 0, "in the evaluation at step 0"),
    ],
)
def test_a_bad_observation_is_the_environments_fault(tmp_path, monkeypatch, capsys, env, number, where):
    """Of training's environment with random decisions, at an episode's start, with the policy's; of evaluation's."""
    made = itertools.count()
    monkeypatch.setattr(train, "make_env", lambda args, seed: Faulty(number if next(made) == env else -1))
    flags = "--init_steps 30 --num_train_steps 50 --work_dir".split()
    assert train.main([*TOY, *STATES, *flags, str(tmp_path)]) == 1
    error = f": error: the environment's observation {where} is NaN or infinite\n"
    assert capsys.readouterr().err.endswith(error)


def test_interrupt_while_starting(tmp_path):
    """Until training has begun, nothing needs to be said."""
    command = [sys.executable, "train.py", *SMALL, *STATES, "--work_dir", str(tmp_path / "log")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=60), process.stderr.read()) == (-signal.SIGINT, "")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("lines", [0, 12])
def test_closed_pipe(tmp_path, lines):
    """A reader that leaves, as `head` does, is no mistake in the flags, not even before the first line."""
    process = Program("train.py", *SMALL, *STATES, "--num_train_steps", "100000", "--work_dir", tmp_path / "log")
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == "train.py: error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_on_a_terminal_only(tmp_path, terminal):
    flags = [*SMALL, *STATES, *"--num_train_steps 130 --init_steps 100 --eval_freq 1000".split()]
    with reader(terminal) as (stderr, read):
        result = run_program("train.py", *flags, "--work_dir", tmp_path, stderr=stderr)
    bars, lines = read(), [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [f"{name}: " in bars for name in ("first updates", "evaluation")] == 2 * [terminal]
    assert [line.split()[1] for line in lines] == ["eval", "train"]


# The numbers that the method's results rest on (paper, table 3, and the authors' script).
PUBLISHED = """
encoder_type pixel decoder_type pixel image_size 84 frame_stack 3 batch_size 128 hidden_dim 1024 num_layers 4
num_filters 32 encoder_feature_dim 50 init_steps 1000 replay_buffer_capacity 1000000 discount 0.99 init_temperature 0.1
alpha_lr 0.0001 alpha_beta 0.5 critic_lr 0.001 actor_lr 0.001 encoder_lr 0.001 decoder_lr 0.001 critic_beta 0.9
actor_beta 0.9 critic_tau 0.01 encoder_tau 0.05 actor_update_freq 2 critic_target_update_freq 2 decoder_update_freq 1
actor_log_std_min -10 actor_log_std_max 2 decoder_latent_lambda 1e-06 decoder_weight_lambda 1e-07 eval_freq 10000
num_eval_episodes 10
""".split()


def test_published_defaults():
    args = train.make_parser().parse_args([])
    assert [str(getattr(args, name)) for name in PUBLISHED[::2]] == PUBLISHED[1::2]


def test_hints_before_the_first_decision(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", make_toy_env)
    hints = ["have --action_repeat 8, not 4", "renderer: a name", "renderer is software", "nothing will be learned"]
    with open_run(*SMALL, "--work_dir", str(tmp_path)) as run:
        for renderer, repeat, steps, given in (
            (("a name", True), 4, 60, [True, True, True, False]),
            (("a name", False), 8, run.args.init_steps, [False, True, False, True]),
            (None, 4, 60, [False] * 4),  # not a task of the Control Suite
        ):
            run.args.action_repeat, run.args.num_train_steps = repeat, steps
            printed = "\n".join(report.describe(run, renderer))
            assert [hint in printed for hint in hints] == given


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoreSettings(sac_ae.Settings):
    novelty: sac_ae.Fraction = sac_ae.setting(0.25, "share of novelty")


class Curious(SacAeAgent):
    """Another agent, which shares flags with the first."""

    settings_class = MoreSettings


def test_every_setting_is_a_flag_that_reaches_the_agent(monkeypatch):
    """A new one is written once, in the settings of an agent."""
    monkeypatch.setitem(train.AGENTS, "curious", Curious)
    flags = ["--agent", "curious", *STATES, *"--novelty 0.5 --actor_lr 0.375 --device cpu".split()]
    args = train.make_parser().parse_args(flags)
    settings = dataclasses.asdict(train.make_agent(args, (5,), (2,)).settings)
    assert settings == {name: getattr(args, name) for name in settings}
    assert (settings["novelty"], settings["actor_lr"]) == (0.5, 0.375)
    field = dataclasses.make_dataclass("Other", [("discount", float, 0.5)], bases=(sac_ae.Settings,), frozen=True)
    monkeypatch.setattr(Curious, "settings_class", field)
    with pytest.raises(ValueError, match="different defaults for discount"):
        train.make_parser()
