"""Sweeps: every combination once, resumed where it was, failures told and not in the others' way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from test_resume import assert_gone, outcome

import sweep
import train
from support.machine import cores
from support.work_dir import Checkpoint

TINY = (
    "--image_size 16 --num_layers 2 --num_filters 4 --hidden_dim 16 --batch_size 8 --init_steps 40 --action_repeat 50 "
    "--num_train_steps 100 --eval_freq 60 --num_eval_episodes 2 --eval_workers 1 --device cpu"
).split()
LONGER = [*TINY, "--num_train_steps", "500", "--eval_freq", "250"]
STATE = "--encoder_type identity --decoder_type identity --domain_name cartpole --task_name swingup".split()
ONE = ["--tasks", "cartpole_swingup", "--methods", "sac_state"]
TWO = [*ONE, "--seeds", "2"]
LONG = bool(os.environ.get("LONG_TESTS"))


def test_published_tasks():
    """Their repeats, and decisions for 500k environment steps."""
    runs = runs_of("--methods", "sac_ae,sac_pixel,sac_state", "--seeds", "10")
    assert len(runs) == len({run.work_dir.path for run in runs}) == 6 * 3 * 10
    assert all(run.args.num_train_steps * run.args.action_repeat == 500_000 for run in runs)
    walker = next(run.args for run in runs if run.name == "walker_walk-sac_pixel-7")
    assert (walker.action_repeat, walker.seed, walker.encoder_type, walker.decoder_type) == (2, 7, "pixel", "identity")
    assert walker.resume


def runs_of(*flags):
    return sweep.make_runs(sweep.make_parser().parse_args(flags))


def test_flags_after_the_dashes():
    """As many decisions as the budget has at the repeat in force; what is named twice runs once."""
    flags = ["--tasks", "walker_walk,walker_walk", "--cpus_per_run", "3.5", "--", "--action_repeat", "4"]
    (run,) = runs_of(*flags)
    assert (run.args.action_repeat, run.args.num_train_steps, run.args.eval_workers) == (4, 125_000, 3)
    (run,) = runs_of(*flags, "--num_train_steps=100", "--eval_workers", "7")
    assert (run.args.num_train_steps, run.args.eval_workers) == (100, 7)


@pytest.mark.parametrize(("flags", "words"), [
    (["--tasks", "cartpole_fly"], "there is no task or method cartpole_fly"),
    (["--methods", "ppo"], "there is no task or method ppo"),
    (["--seeds", "0"], "must be at least 1"),
    (["--", "--hidden_dim", "none"], "invalid int value"),
    (["--", "--image_size", "85"], "image sides must be even"),
    (["--", "--batch_size", "9", "--replay_buffer_capacity", "8"], "replay_buffer_capacity must be at least"),
    (["--", "--seed=7", "--work_dir", "x"], "--seed, --work_dir after --"),
    (["--gpus_per_run", "1.5"], "a fraction or a whole number"),
    (["--cpus_per_run", "0"], "must be at least 0.0001"),
    (["--address", "nowhere"], "there is no Ray cluster at nowhere"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        sweep.main(["--work_dir", str(tmp_path / "sweep"), *flags])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, sweep.__file__, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error = "sweep.py: error: no ray: use `make sweep`, or pip install -r requirements-sweep.txt\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", error)


def test_no_cluster(tmp_path, capsys, monkeypatch):
    """As Ray tells it, which would find any cluster on this machine, or wait for one that has left its address."""

    def init(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    test_bad_input(tmp_path, capsys, ["--address", "auto"], "there is no Ray cluster at auto: Could not find any")


def test_more_than_any_node_has_is_refused(tmp_path, capsys, monkeypatch):
    """Without a start of Ray: this machine's node is made up."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 8e9}}])
    flags = ["--cpus_per_run", "1000", "--memory_per_run", "2"]
    test_bad_input(tmp_path, capsys, flags, "no node has the 1000 cores, 0 GPUs and 2.0 GB of memory")


def test_dry_run(tmp_path, capsys):
    assert sweep.main(["--work_dir", str(tmp_path / "sweep"), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("cartpole_swingup-sac_ae-1: about 3.3 GB, python train.py --domain_name cartpole")
    assert not (tmp_path / "sweep").exists()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node, because starting one takes long."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    cluster.shutdown()


def test_a_sweep(tmp_path, capsys, monkeypatch, cluster):
    """Logs and parameters are those of single runs; one that fails is told; a rerun starts nothing that has ended."""
    folder = tmp_path / "sweep"
    good, broken = (folder / f"cartpole_swingup-sac_state-{seed}" for seed in (1, 2))
    broken.mkdir(parents=True)
    (broken / "args.json").write_text("not a run")
    joined = ["--address", cluster.address, "--work_dir", str(folder), *TWO, "--"]
    command = [*joined, *TINY]
    assert sweep.main(command) == 1
    output = capsys.readouterr()
    assert "1 of 2 runs have ended" in output.out
    assert "cartpole_swingup-sac_state-2 failed with status 2\n    " in output.err
    assert "holds files that its run has not written (args.json)" in output.err
    assert starts(broken) == 1  # the user's mistake
    assert train.main([*TINY, *STATE, "--seed", "1", "--work_dir", str(tmp_path / "single")]) == 0
    assert outcome(good) == outcome(tmp_path / "single")

    (broken / "args.json").unlink()
    assert sweep.main(command) == 0
    assert starts(good) == 1
    assert json.loads((broken / "eval.log").read_text().splitlines()[-1])["step"] == 60

    short = [*joined, "--num_train_steps", "100"]
    capsys.readouterr()
    assert [run.args.hidden_dim for run in runs_of(*short)] == [16, 16]
    assert sweep.main([*short, "--hidden_dim", "32"]) == 1
    output = capsys.readouterr()
    assert "0 of 2 runs have ended, 0 are running, 2 failed" in output.out
    assert "holds a run with other flags (--action_repeat 50 is now 8, --hidden_dim 16 is now 32)" in output.err

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("something was started"))
    assert sweep.main(command) == 0
    assert "2 of 2 runs have ended" in capsys.readouterr().out
    assert not ray.is_initialized()


def starts(work_dir):
    return (work_dir / "output.log").read_text().count("$ python train.py")


def test_a_folder_that_cannot_be_one(tmp_path, capsys, cluster):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "cartpole_swingup-sac_state-1").write_text("a file")
    assert sweep.main(["--address", cluster.address, "--work_dir", str(folder), *ONE, "--", *TINY]) == 1
    output = capsys.readouterr()
    assert "0 of 1 runs have ended" in output.out
    assert "cartpole_swingup-sac_state-1 failed with [Errno 17] File exists" in output.err


@pytest.mark.parametrize(("number", "running"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_stopping_a_sweep(tmp_path, number, running):
    """The runs write checkpoints, and nothing is left behind. Before that, a run that is killed begins again."""
    folders = [tmp_path / f"cartpole_swingup-sac_state-{seed + 1}" for seed in range(running)]
    share = str(cores() / running)  # if one of two runs is running, the other one waits
    flags = [*TWO, "--cpus_per_run", share, "--", *TINY, "--num_train_steps", "100000"]
    with subprocess.Popen(
        [sys.executable, "sweep.py", "--work_dir", str(tmp_path), *flags], cwd=sweep.ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: all((folder / "train.log").exists() for folder in folders))
            if number == signal.SIGTERM:
                command = [sys.executable, str(sweep.ROOT / "train.py")]
                children = psutil.Process(process.pid).children(recursive=True)
                next(child for child in children if child.cmdline()[:2] == command).kill()
                wait_for(lambda: sum((folder / "output.log").read_text().count("action:") for folder in folders) == 3)
                wait_for(lambda: all((folder / "train.log").exists() for folder in folders))
            others = psutil.Process(process.pid).children(recursive=True)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert "stopping: the runs write checkpoints" in out
    assert err.splitlines()[-1] == f"sweep.py: stopped by {number.name}: the same command continues it"
    assert "0 of 2 runs have ended, 0 are running, 0 failed" in out
    assert all(saved(folder) >= 20 for folder in folders)
    assert all("stopped by SIGTERM at step" in (folder / "output.log").read_text() for folder in folders)
    assert_gone(others)


def test_a_sweep_that_can_print_no_more(tmp_path):
    """As when its terminal is closed: the runs write checkpoints all the same."""
    folder = tmp_path / "cartpole_swingup-sac_state-1"
    flags = [*ONE, "--", *TINY, "--num_train_steps", "100000"]
    with Path("/dev/full").open("w") as full, subprocess.Popen(
        [sys.executable, "sweep.py", "--work_dir", str(tmp_path), *flags], cwd=sweep.ROOT, start_new_session=True,
        stdout=full, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            wait_for((folder / "train.log").exists)
            others = psutil.Process(process.pid).children(recursive=True)
            for _ in range(2):  # a shell sends it to each of its jobs, and the system to the job in front
                os.killpg(process.pid, signal.SIGHUP)
                time.sleep(0.2)
            _, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 1
    assert err.splitlines()[-1] == "sweep.py: error: [Errno 28] No space left on device"
    assert saved(folder) >= 20
    assert_gone(others)


def saved(work_dir):
    return Checkpoint(work_dir / "checkpoint").read()["progress"]["step"]


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_losing_a_node(tmp_path, capsys, cluster):
    """The runs are on two nodes, one of which goes: all end, none twice, and like single runs."""
    runs = 4 if LONG else 2
    folder, names = tmp_path / "sweep", [f"cartpole_swingup-sac_state-{seed + 1}" for seed in range(runs)]
    flags = [*LONGER, "--checkpoint_freq", "20"]
    joined = ["--address", cluster.address, "--work_dir", str(folder), *ONE]
    node = cluster.add_node(num_cpus=2)
    lost = threading.Thread(target=lose, args=(cluster, node, runs // 2))
    lost.start()
    try:
        status = sweep.main([*joined, "--seeds", str(runs), "--cpus_per_run", str(4 // runs), "--", *flags])
    finally:
        lost.join()
    output = capsys.readouterr()
    assert status == 0, output
    for name in names:
        assert output.out.count(f"{name} has ended") == 1
    names.sort(key=lambda name: starts(folder / name))
    assert [starts(folder / name) for name in names] == (runs // 2) * [1] + (runs // 2) * [2]
    assert all("resuming at step" in (folder / name / "output.log").read_text() for name in names[runs // 2 :])
    name = names[-1]
    assert train.main([*LONGER, *STATE, "--seed", name[-1], "--work_dir", str(tmp_path / name)]) == 0
    assert outcome(folder / name) == outcome(tmp_path / name)


def lose(cluster, node, runs):
    """Takes the node from the cluster when all its runs have a checkpoint."""
    deadline = time.monotonic() + 200
    raylet = psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)
    saved = set()
    while len(saved) < runs and time.monotonic() < deadline:
        time.sleep(0.05)
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                command = process.cmdline()
                work_dir = command[command.index("--work_dir") + 1]
                if Checkpoint(Path(work_dir) / "checkpoint").exists():
                    saved.add(work_dir)
    cluster.remove_node(node, allow_graceful=False)
