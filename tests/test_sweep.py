"""Sweeps: every combination once, resumed where it was, failures told and not in the others' way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from folders import assert_gone, outcome, step_of
from ray.cluster_utils import Cluster
from runs import assert_refused, read_log

import sweep
import train
from support.machine import cores

TINY = (
    "--image_size 16 --num_layers 2 --num_filters 4 --hidden_dim 16 --batch_size 8 --init_steps 40 --action_repeat 50 "
    "--num_train_steps 100 --eval_freq 60 --num_eval_episodes 2 --eval_workers 1 --device cpu"
).split()
STATE = "--encoder_type identity --decoder_type identity --domain_name cartpole --task_name swingup".split()
ONE = ["--tasks", "cartpole_swingup", "--methods", "sac_state"]


def runs_of(*flags):
    return sweep.make_runs(sweep.make_parser().parse_args(flags))


def test_published_tasks():
    """Their repeats, and decisions for 500k environment steps; flags after the dashes replace the sweep's own."""
    runs = runs_of("--methods", "sac_ae,sac_pixel,sac_state", "--seeds", "10")
    assert len({run.work_dir for run in runs}) == 6 * 3 * 10
    assert all(run.args.num_train_steps * run.args.action_repeat == 500_000 for run in runs)
    walker = next(run.args for run in runs if run.name == "walker_walk-sac_pixel-7")
    assert (walker.action_repeat, walker.seed, walker.encoder_type, walker.decoder_type) == (2, 7, "pixel", "identity")
    assert walker.resume
    flags = ["--tasks", "walker_walk,walker_walk", "--cpus_per_run", "3.5", "--", "--action_repeat", "4"]
    (run,) = runs_of(*flags)
    assert (run.args.action_repeat, run.args.num_train_steps, run.args.eval_workers) == (4, 125_000, 3)
    (run,) = runs_of(*flags, "--num_train_steps=100", "--eval_workers", "7")
    assert (run.args.num_train_steps, run.args.eval_workers) == (100, 7)


@pytest.mark.parametrize(("flags", "words"), [
    (["--tasks", "cartpole_fly"], "there is no task or method cartpole_fly"),
    (["--methods", "ppo"], "there is no task or method ppo"),
    (["--", "--hidden_dim", "none"], "invalid int value"),
    (["--", "--seed=7", "--work_dir", "x"], "--seed, --work_dir after --"),
    (["--gpus_per_run", "1.5"], "a fraction or a whole number"),
    (["--address", "nowhere"], "there is no Ray cluster at nowhere"),
    (["--address", "auto"], "there is no Ray cluster at auto: Could not find any"),
    (["--cpus_per_run", "9", "--memory_per_run", "2"], "no node has the 9 cores, 0 GPUs and 2.0 GB of memory"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, monkeypatch, flags, words):
    """Ray itself refuses an address that is none. A cluster that is not there and this machine's node are made up."""

    def init(address, init=ray.init, **options):
        if address == "nowhere":
            init(address, **options)
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 8e9}}])
    assert_refused(capsys, ["--work_dir", str(tmp_path / "sweep"), *flags], words, program=sweep)
    assert not (tmp_path / "sweep").exists()


def test_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, sweep.__file__, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error = "sweep.py: error: no ray: use `make sweep`, or pip install -r requirements-sweep.txt\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", error)


def test_dry_run(tmp_path, capsys):
    """Each command, with each flag once."""
    flags = ["--hidden_dim=8", "--hidden_dim", "16", "--resume", "--no-save_tb", "--critic_lr", "1e-5"]
    assert sweep.main(["--work_dir", str(tmp_path / "sweep"), "--dry_run", "--", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("cartpole_swingup-sac_ae-1: about 3.4 GB, python train.py --domain_name=cartpole")
    assert lines[0].endswith(" --hidden_dim=16 --critic_lr=1e-05 --resume --no-save_tb")
    assert not (tmp_path / "sweep").exists()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node, because starting one takes long."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    cluster.shutdown()


def test_a_sweep(tmp_path, capsys, monkeypatch, cluster):
    """Logs and parameters are those of single runs; those that fail are told; a rerun starts nothing that has ended."""
    folder = tmp_path / "sweep"
    good, broken, blocked = (folder / f"cartpole_swingup-sac_state-{seed}" for seed in (1, 2, 3))
    broken.mkdir(parents=True)
    (broken / "args.json").write_text("not a run")
    blocked.write_text("a file")
    joined = ["--address", cluster.address, "--work_dir", str(folder), *ONE, "--seeds", "3", "--"]
    command = [*joined, *TINY]
    assert sweep.main(command) == 1
    output = capsys.readouterr()
    assert "1 of 3 runs have ended" in output.out
    assert f"{broken.name} failed with status 2\n    " in output.err
    assert "holds args.json, but" in output.err
    assert f"{blocked.name} failed with [Errno 17] File exists" in output.err
    assert starts(broken) == 1  # the user's mistake
    assert train.main([*TINY, *STATE, "--seed", "1", "--work_dir", str(tmp_path / "single")]) == 0
    assert outcome(good) == outcome(tmp_path / "single")

    (broken / "args.json").unlink()
    blocked.unlink()
    assert sweep.main(command) == 0
    assert starts(good) == 1
    assert read_log(broken / "eval.log")[-1]["step"] == 60

    short = [*joined, "--num_train_steps", "100"]
    capsys.readouterr()
    assert {run.args.hidden_dim for run in runs_of(*short, "--action_repeat", "50")} == {16}
    assert sweep.main([*short, "--hidden_dim", "32"]) == 1
    output = capsys.readouterr()
    assert "0 of 3 runs have ended, 0 are running, 3 failed" in output.out
    assert "--hidden_dim 16 is now 32" in output.err

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("something was started"))
    assert sweep.main(command) == 0
    assert "3 of 3 runs have ended" in capsys.readouterr().out
    assert not ray.is_initialized()


def starts(work_dir):
    return (work_dir / "output.log").read_text().count("$ python train.py")


@contextlib.contextmanager
def started(work_dir, *flags, stdout=subprocess.PIPE):
    """A sweep that does not end by itself, in a process group of its own."""
    command = [sys.executable, "sweep.py", "--work_dir", str(work_dir), *ONE, *flags]
    command += ["--", *TINY, "--num_train_steps", "100000"]
    with subprocess.Popen(
        command, cwd=sweep.ROOT, start_new_session=True, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "running"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_stopping_a_sweep(tmp_path, number, running):
    """The runs write checkpoints, and nothing is left behind. Before that, runs go on that are killed or lose Ray."""
    folders = [tmp_path / f"cartpole_swingup-sac_state-{seed + 1}" for seed in range(running)]
    share = str(cores() / running)  # if one of two runs is running, the other one waits
    with started(tmp_path, "--seeds", "2", "--cpus_per_run", share) as process:
        wait_for(lambda: all((folder / "train.log").exists() for folder in folders))
        if number == signal.SIGTERM:
            command = [sys.executable, str(sweep.ROOT / "train.py")]
            children = psutil.Process(process.pid).children(recursive=True)
            first, second = (child for child in children if child.cmdline()[:2] == command)
            first.kill()
            second.parent().kill()
            wait_for(lambda: sum((folder / "output.log").read_text().count("action:") for folder in folders) == 4)
            wait_for(lambda: all((folder / "train.log").read_text() for folder in folders))
        others = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert "stopping: the runs write checkpoints" in out
    assert err.splitlines()[-1] == f"sweep.py: stopped by {number.name}: the same command continues it"
    assert "0 of 2 runs have ended, 0 are running, 0 failed" in out
    assert all(step_of(folder) >= 20 for folder in folders)
    assert all("stopped by SIGTERM at step" in (folder / "output.log").read_text() for folder in folders)
    assert_gone(others)


def test_a_sweep_that_can_print_no_more(tmp_path):
    """As when its terminal is closed: the runs write checkpoints all the same."""
    folder = tmp_path / "cartpole_swingup-sac_state-1"
    with Path("/dev/full").open("w") as full, started(tmp_path, stdout=full) as process:
        wait_for((folder / "train.log").exists)
        others = psutil.Process(process.pid).children(recursive=True)
        for _ in range(2):  # a shell sends it to each of its jobs, and the system to the job in front
            os.killpg(process.pid, signal.SIGHUP)
            time.sleep(0.2)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "sweep.py: error: [Errno 28] No space left on device"
    assert step_of(folder) >= 20
    assert_gone(others)


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
