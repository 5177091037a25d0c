"""The examples of docs/change_it.md apply, are as short as promised, and run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_cuda_graph
import torch
import toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from support.work_dir import Checkpoint

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "change_it.md").read_text(), re.DOTALL)
BUDGETS = {"shift": 20, "environment": 15, "loss": 30}  # lines
TINY = (
    "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --init_steps 10 --replay_buffer_capacity 40 "
    "--device cpu --eval_workers 1 --num_eval_episodes 2"
).split()
STATES = ["--encoder_type", "identity", "--decoder_type", "identity"]
# Several runs in one process, which imports PyTorch once.
RUN = "import json, sys, toy, train; {}; sys.exit(max(train.main(flags) for flags in json.loads(sys.argv[1])))"
RUN_SUITE, RUN_TOY = RUN.format("pass"), RUN.format("train.make_env = toy.make_sliding_env")


# A program that is run several times.
RUN_PROGRAM = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        assert exit_.code == 0
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT / "tests"), "GIT_CEILING_DIRECTORIES": "/"}


def patched(folder, name):
    """A copy of the project's Python files with the diff of this name applied."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("dmc2gym/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    diff = dict(zip(BUDGETS, DIFFS, strict=True))[name]
    subprocess.run(["git", "apply", "-"], cwd=folder, env=environment(), input=diff, text=True, check=True)
    return folder


def loaded(monkeypatch, path):
    """A module of a patched copy; what it imports is the project's."""
    spec = importlib.util.spec_from_file_location(f"patched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def log_of(work_dir):
    """Lines of train.log, without times."""
    records = [json.loads(line) for line in (work_dir / "train.log").read_text().splitlines()]
    times = ("duration", "decisions_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records]


def agent_of(work_dir):
    """The agent's part of the checkpoint."""
    return Checkpoint(work_dir / "checkpoint").tensors(torch.device("cpu"))["agent"]


@pytest.mark.parametrize("name", BUDGETS)
def test_examples_are_short(name):
    """Added and removed lines count, but for blank ones and the headers of files."""
    diff = dict(zip(BUDGETS, DIFFS, strict=True))[name]
    lines = [line for line in diff.splitlines() if re.match(r"[-+]", line) and not re.match(r"(---|\+\+\+) ", line)]
    assert 0 < sum(line.strip("+- ") != "" for line in lines) <= BUDGETS[name]


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
    assert {(int(y), int(x)) for y, x in zip(down, right, strict=True)} == {
        (y, x) for y in range(-3, 4) for x in range(-3, 4)
    }


def test_a_shift_is_off_by_default_and_resumes(monkeypatch, tmp_path):
    """Off, the patched project trains as this one does, bit for bit."""
    flags = {
        "off": ["--num_train_steps", "60"],
        "whole": ["--num_train_steps", "60", "--random_shift", "2"],
        "parts": ["--num_train_steps", "40", "--random_shift", "2"],
    }
    tiny = [*TINY, "--image_size", "16"]
    runs = [[*tiny, *flags[name], "--work_dir", str(tmp_path / name)] for name in flags]
    runs.append([*tiny, "--resume", "--num_train_steps", "60", "--work_dir", str(tmp_path / "parts")])
    folder = patched(tmp_path / "project", "shift")
    run(folder, "-c", RUN_TOY, json.dumps(runs))
    monkeypatch.setattr(train, "make_env", toy.make_sliding_env)
    assert train.main([*tiny, *flags["off"], "--work_dir", str(tmp_path / "unpatched")]) == 0

    assert log_of(tmp_path / "off") == log_of(tmp_path / "unpatched")
    assert log_of(tmp_path / "off")[-1]["critic_loss"] != log_of(tmp_path / "whole")[-1]["critic_loss"]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "args.json").read_text())["random_shift"] == 2


def test_an_environment_of_ones_own(tmp_path):
    """With processes that play evaluation episodes: they get the script's function."""
    folder = patched(tmp_path / "project", "environment")
    command = ["my_train.py", *TINY, *STATES, "--eval_workers", "2", "--work_dir", str(tmp_path / "log")]
    starts = [[*command, "--num_train_steps", "40"], [*command, "--resume", "--num_train_steps", "210"]]
    done = run(folder, "-c", RUN_PROGRAM, json.dumps(starts))
    assert "observation: (3,) float32" in done.stdout
    assert "resuming at step 40" in done.stdout
    (record,) = log_of(tmp_path / "log")
    assert record["step"] == 200  # an episode of the pendulum
    assert record["episode_reward"] < 0
    assert agent_of(tmp_path / "log")["networks"]["actor"]["trunk.0.weight"].shape == (8, 3)


def test_a_loss_with_a_network_of_its_own(tmp_path):
    """It is in the log, in TensorBoard and in checkpoints, and a resumed run equals one that never stopped."""
    common = [*TINY, *STATES, "--agent", "sac_ae_reward", "--reward_lr", "0.01", "--action_repeat", "100"]
    whole, parts = ([*common, "--work_dir", str(tmp_path / name)] for name in ("whole", "parts"))
    runs = [
        [*whole, "--num_train_steps", "60", "--save_tb"],
        [*parts, "--num_train_steps", "40", "--save_model"],
        [*parts, "--num_train_steps", "60", "--resume"],
    ]
    run(patched(tmp_path / "project", "loss"), "-c", RUN_SUITE, json.dumps(runs))

    records = log_of(tmp_path / "whole")
    assert ["reward_loss" in record for record in records] == [False] + 5 * [True]
    assert records == log_of(tmp_path / "parts")
    agent = agent_of(tmp_path / "whole")
    assert "trunk.0.weight" in agent["networks"]["reward_model"]
    assert len(agent["optimizers"]["reward_optimizer"]) == 6
    for part in agent:
        torch.testing.assert_close(agent_of(tmp_path / "parts")[part], agent[part], rtol=0, atol=0)
    events = EventAccumulator(str(tmp_path / "whole" / "tb"))
    events.Reload()
    assert "train_reward/loss" in events.Tags()["scalars"]
    assert "train_reward_model/trunk.0_weight" in events.Tags()["histograms"]
    assert (tmp_path / "parts" / "model" / "reward_model_60.pt").exists()


@pytest.mark.parametrize("kind", ["pixel", "state"])
def test_a_loss_in_cuda_graphs(monkeypatch, tmp_path, kind):
    """With recorded graphs, losses, weights and moments are those without, the new network's included."""
    monkeypatch.setattr(test_cuda_graph.cuda_graph, "Capture", test_cuda_graph.RecordedGraph)
    agent_class = loaded(monkeypatch, patched(tmp_path, "loss") / "with_reward.py").RewardAgent
    results = []
    for graphs in (False, True):
        agent = test_cuda_graph.make_agent(kind, graphs=graphs, cls=agent_class)
        results.append((test_cuda_graph.train(agent, test_cuda_graph.make_replay(kind), range(8)), agent))
    losses, _ = results[0][0][0]
    assert "train_reward/loss" in losses
    assert any(name.startswith("reward_model.") for name in test_cuda_graph.state(results[0][1]))
    test_cuda_graph.assert_equal(*results)
