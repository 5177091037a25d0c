"""The examples of docs/change_it.md apply and run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import agents
import pytest
import torch
import toy
from events import read_events
from folders import checkpoint_of
from runs import METHODS, read_log, without_times

import train

ROOT = Path(__file__).parent.parent
NAMES = ("shift", "environment", "loss")
DIFFS = dict(
    zip(NAMES, re.findall(r"```diff\n(.*?)```", (ROOT / "docs/change_it.md").read_text(), re.DOTALL), strict=True)
)
TINY = (
    "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --init_steps 10 --replay_buffer_capacity 40 "
    "--device cpu --eval_workers 1 --num_eval_episodes 2 --image_size 16"
).split()
STATES = METHODS["sac_state"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "GIT_CEILING_DIRECTORIES": "/"}


def patched(folder, name):
    """A copy of the project's Python files with the diff of this name applied."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("dmc2gym/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    subprocess.run(["git", "apply", "-"], cwd=folder, env=ENVIRONMENT, input=DIFFS[name], text=True, check=True)
    return folder


def loaded(monkeypatch, path):
    """A module of a patched copy; what it imports is the project's, and the copy's where that is new."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"patched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(program, *flags):
    assert program.main([*TINY, *map(str, flags)]) == 0


def log_of(work_dir):
    return without_times(read_log(work_dir / "train.log"))


def agent_of(work_dir):
    """The agent's part of the checkpoint."""
    name = checkpoint_of(work_dir)["state"][0]
    return torch.load(work_dir / "checkpoint" / name, weights_only=True)["agent"]


def test_a_shift_moves_images_by_so_many_pixels(monkeypatch, tmp_path):
    """Every pixel holds its own row and column, so a result shows where it was taken from."""
    random_shift = loaded(monkeypatch, patched(tmp_path, "shift") / "sac_ae.py").random_shift
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    obs = torch.stack([rows, columns]).repeat(500, 1, 1, 1)
    torch.manual_seed(0)
    assert torch.equal(random_shift(obs, 0), obs)
    shifted = random_shift(obs, 3)
    down, right = shifted[:, 0, 6, 5] - 6, shifted[:, 1, 6, 5] - 5
    assert torch.equal(shifted[:, 0], (rows + down[:, None, None]).clamp(0, 11))
    assert torch.equal(shifted[:, 1], (columns + right[:, None, None]).clamp(0, 9))
    offsets = set(zip(down.tolist(), right.tolist(), strict=True))
    assert offsets == {(y, x) for y in range(-3, 4) for x in range(-3, 4)}


def test_a_shift_is_off_by_default_and_resumes(monkeypatch, tmp_path):
    """Off, the patched project trains as this one does, bit for bit."""
    monkeypatch.setattr(train, "make_env", toy.make_toy_env)
    run(train, "--num_train_steps", 60, "--work_dir", tmp_path / "unpatched")
    agent = loaded(monkeypatch, patched(tmp_path / "project", "shift") / "sac_ae.py").SacAeAgent
    monkeypatch.setattr(train, "AGENTS", {"sac_ae": agent})
    run(train, "--num_train_steps", 60, "--work_dir", tmp_path / "off")
    run(train, "--num_train_steps", 60, "--work_dir", tmp_path / "whole", "--random_shift", 2)
    run(train, "--num_train_steps", 40, "--work_dir", tmp_path / "parts", "--random_shift", 2)
    run(train, "--num_train_steps", 60, "--work_dir", tmp_path / "parts", "--resume")
    assert log_of(tmp_path / "off") == log_of(tmp_path / "unpatched")
    assert log_of(tmp_path / "off")[-1]["critic_loss"] != log_of(tmp_path / "whole")[-1]["critic_loss"]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_an_environment_of_ones_own(tmp_path):
    """With processes that play evaluation episodes: they get the script's function."""
    folder = patched(tmp_path / "project", "environment")
    flags = [*TINY, *STATES, "--eval_workers", "2", "--num_train_steps", "210", "--work_dir", str(tmp_path / "log")]
    command = [sys.executable, "my_train.py", *flags]
    printed = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert "observation: (3,) float32" in printed
    (record,) = log_of(tmp_path / "log")
    assert record["step"] == 200  # an episode of the pendulum
    assert record["episode_reward"] < 0


def test_a_loss_with_a_network_of_its_own(monkeypatch, tmp_path):
    """It is in the log, in TensorBoard and in checkpoints, and a resumed run equals one that never stopped."""
    program = loaded(monkeypatch, patched(tmp_path / "project", "loss") / "train.py")
    monkeypatch.setattr(program, "make_env", toy.make_toy_env)
    common = [*STATES, "--agent", "sac_ae_reward", "--reward_lr", 0.01]
    run(program, *common, "--work_dir", tmp_path / "whole", "--num_train_steps", 60, "--save_tb")
    run(program, *common, "--work_dir", tmp_path / "parts", "--num_train_steps", 40, "--save_model")
    run(program, *common, "--work_dir", tmp_path / "parts", "--num_train_steps", 60, "--resume")
    records, agent = log_of(tmp_path / "whole"), agent_of(tmp_path / "whole")
    assert ["reward_loss" in record for record in records] == [True] * 3
    assert records == log_of(tmp_path / "parts")
    assert len(agent["_extra_state"]["reward_optimizer"]) == 6
    torch.testing.assert_close(agent_of(tmp_path / "parts"), agent, rtol=0, atol=0)
    tags = read_events(tmp_path / "whole").Tags()
    assert "train_reward/loss" in tags["scalars"]
    assert "train_reward_model/trunk.0_weight" in tags["histograms"]
    assert (tmp_path / "parts" / "model" / "reward_model_60.pt").exists()


@pytest.mark.parametrize("kind", agents.SHAPES)
def test_a_loss_in_cuda_graphs(recorded, monkeypatch, tmp_path, kind):
    """With recorded graphs, losses, weights and moments are those without, the new network's included."""
    agent_class = loaded(monkeypatch, patched(tmp_path, "loss") / "with_reward.py").RewardAgent
    results = []
    for graphs in (False, True):
        agent = agents.make_agent(kind, graphs=graphs, cls=agent_class)
        results.append((agents.train(agent, agents.make_replay(kind), range(8)), agent))
    agents.assert_equal(*results)
    assert "train_reward/loss" in results[1][0][0][0]
    assert "reward_model.trunk.0.weight" in results[1][1].state_dict()
