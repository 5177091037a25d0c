"""What cannot run is refused: one line, status 2, and nothing is written."""

from __future__ import annotations

import importlib
import os

import gym
import pytest
import torch
from folders import contents
from gym.spaces import Box
from runs import METHODS, SMALL, TOY, assert_refused
from toy import CountingEnv, make_task, make_toy_env

import train
from utils import FrameStack

STATES = METHODS["sac_state"]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(train, "make_env", make_toy_env)


# What rows of the table need; the argument is a MonkeyPatch.


def simulator(patch):
    patch.setattr(train, "make_env", make_task)


def broken_gpu(patch):
    def fail(*_, **__):
        raise RuntimeError("The NVIDIA driver on your system is too old.\nCUDA kernel errors might be")

    patch.setattr(torch, "zeros", fail)
    patch.setattr(torch.cuda, "device_count", lambda: 2)


def bf16(patch, there=False):
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


class NewestFirst(FrameStack):
    """Its stacks do not continue each other."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs[::-1].copy(), *rest


def env(stack=FrameStack, **attributes):
    """One with other attributes."""
    made = CountingEnv()
    vars(made).update(attributes)
    return lambda patch: patch.setattr(train, "make_env", lambda args, seed: stack(made, 3))


HUGE, LONG_NAME, URL = "1" + 400 * "0", 300 * "x", "gs://bucket/run"
ENCODER = "--freeze_encoder", "--actor_trains_encoder", "--no-critic_trains_encoder"
REFUSED = [  # words, what is said, what the row needs; words may begin with a program other than train
    ("--domain_name chetah --task_name run", "no task chetah run; close ones: cheetah run", simulator),
    ("--image_size 83", "even", simulator),
    ("--image_size 100000", "", simulator),
    ("--image_size 84 --num_layers 22", "at least 88 pixels a side"),
    ("--batch_size 0", "--batch_size: must be at least 1, got 0"),
    ("--batch_size many", "--batch_size: invalid int value: 'many'"),
    (f"--batch_size {HUGE}", "--batch_size: must be at most 9223372036854775807, got 10000"),
    ("--discount 1.5", "--discount: must be at most 1, got 1.5"),
    ("--discount nan", "--discount: must be at least 0, got nan"),
    ("--critic_lr inf", "--critic_lr: must be at most 1.79"),
    ("--actor_lr 0", "--actor_lr: must be above 0"),
    ("--seed 4294967296", "--seed: must be at most 4294967295"),
    ("--actor_log_std_min 3", "actor_log_std_min must be below"),
    ("--encoder_type identity", "decoder_type pixel needs encoder_type pixel"),
    ("--precision fp16", "--precision: invalid choice: 'fp16'"),
    ("--freeze_encoder --actor_trains_encoder", "freeze_encoder and actor_trains_encoder exclude each other"),
    *((f"{flag} --encoder_type identity --decoder_type identity", "states have no encoder") for flag in ENCODER),
    ("--beta 0.1", "the agent sac_ae has no setting beta: leave --beta out"),
    ("--agent sac_vae --decoder_type identity", "sac_vae needs encoder_type pixel and decoder_type pixel"),
    ("--agent sac_vae --encoder_type identity --decoder_type identity", "sac_vae needs encoder_type pixel"),
    ("--agent sac_vae --decoder_latent_lambda 1", "sac_vae has no decoder_latent_lambda: beta takes its place"),
    ("--batch 12", "unrecognized arguments: --batch"),
    ("--save_tb=false", "argument --save_tb/--no-save_tb: ignored explicit argument 'false'"),
    ("sweep: --dry_run True", "unrecognized arguments: True"),
    ("--resume --overwrite", "exclude each other"),
    ("--hidden_dim 1000000000", "allocate"),
    ("--replay_buffer_capacity 127 --batch_size 128", "at least batch_size"),
    ("--replay_buffer_capacity 99999999 --num_train_steps 99999999", "fits"),
    ("--replay_device cuda --device cpu", "replay_device cuda needs a GPU"),
    ("--device meta", "device meta cannot be used (neither cpu nor cuda); this machine has cpu"),
    ("--device cuda:77", "device cuda:77 cannot be used ("),
    ("--device cuda", "is too old.); this machine has cpu, cuda:0, cuda:1\n", broken_gpu),
    ("--precision bf16", "precision bf16 is slow", bf16),
    ("--compile", "C++ compiler", lambda patch: patch.setenv("CXX", "no-such-compiler")),
    ("--work_dir TMP/run", "holds a run already (args.json)"),
    ("--work_dir TMP/file/below", "is not a folder"),
    ("--work_dir TMP/link", "is not a folder"),
    ("--work_dir=", "--work_dir: is empty"),
    ("--work_dir /proc/new", "/proc/new"),
    ("--work_dir TMP/new", "cannot be written", lambda patch: patch.setattr(os, "access", lambda *_: False)),
    (f"--resume --work_dir {LONG_NAME}", "cannot be used: File name too long"),
    (f"evaluate: {LONG_NAME}", "cannot be used: File name too long"),
    ("\r", r"unrecognized arguments: \r (\r is a carriage return"),
    ("--task_name run\r", r"no task cartpole run\r; close ones: ", simulator),
    ("--work_dir run\r", r"run\r has characters that cannot be shown"),
    ("--work_dir b\udcfccher", r"b\udcfccher has characters that cannot be shown"),  # Latin-1
    (f"--work_dir {URL}", "is a URL"),
    (f"evaluate: TMP --video {URL}", "is a URL"),
    (f"plot: {URL}", "is a URL"),
    (f"plot: TMP --out {URL}", "is a URL"),
    (f"sweep: --work_dir {URL}", "is a URL"),
    ("--save_video", "render() gives no picture", env(render=lambda: None)),
    ("--save_tb", "render() gives no picture", env(render=lambda: None)),
    ("", "not None of shape ()", env(lambda env, k: env, observation_space=gym.spaces.Dict(a=Box(-1, 1, (3,))))),
    ("", "not float32 of shape (9, 16, 16)", env(observation_space=Box(0, 1, (3, 16, 16)))),
    ("", "actions must be a Box (A,) from -1 to 1", env(action_space=Box(-2, 2, (1,)))),
    ("", "actions must be a Box (A,) from -1 to 1", env(action_space=gym.spaces.Discrete(2))),
    ("", "FrameStack", env(NewestFirst)),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0][:50] or case[1])
def test_what_cannot_run_is_refused(tmp_path, monkeypatch, capsys, case):
    words, said, *needs = case
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "file", tmp_path / "run" / "args.json"):
        file.write_text("precious")
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    program, _, words = words.rpartition(": ")
    given = [word for word in words.replace("TMP", str(tmp_path)).split(" ") if word]
    with monkeypatch.context() as patch:
        for need in needs:
            need(patch)
        flags = given if program else [*SMALL, "--work_dir", str(tmp_path / "log"), *given]
        assert_refused(capsys, flags, said, importlib.import_module(program or "train"))
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_run_that_began_in_bfloat16_goes_on_in_it(tmp_path, monkeypatch):
    flags = [*TOY, *STATES, *"--init_steps 8 --num_train_steps 10 --precision bf16 --work_dir".split(), str(tmp_path)]
    bf16(monkeypatch, there=True)
    assert train.main(flags) == 0
    bf16(monkeypatch)
    assert train.main([*flags, "--resume", "--num_train_steps", "12"]) == 0
