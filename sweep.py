"""Trains every combination of tasks, methods and seeds, on one machine or a Ray cluster: `python sweep.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import ctypes
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import ray
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Column, Table
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"sweep.py: error: {error}: use `make sweep`, or pip install -r requirements-sweep.txt", file=sys.stderr)
    sys.exit(2)

import dmc2gym
import train
from encoder import conv_output_shape
from errors import UserError
from replay_buffer import replay_bytes
from settings import Count, Rate, Weight
from support import report
from support.checks import check_resumed, parse_run
from support.flags import OneLineParser, number, user_path
from support.run import Progress
from support.signals import HANGUP, Stop, held_signals
from support.work_dir import WorkDir

ROOT = Path(__file__).resolve().parent
METHODS = {"sac_ae": ("pixel", "pixel"), "sac_pixel": ("pixel", "identity"), "sac_state": ("identity", "identity")}
OWN = {"domain_name", "task_name", "encoder_type", "decoder_type", "seed", "work_dir", "overwrite"}  # not after --
PUBLISHED_BUDGET = 500_000  # environment steps


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(description=__doc__, epilog="Flags after -- go to train.py.")
    add = parser.section("what to run")
    add("tasks", str, "published", "comma-separated DOMAIN_TASK; or the six published ones")
    add("methods", str, "sac_ae", f"comma-separated, of {', '.join(METHODS)}")
    add("seeds", Count, 1, "seeds 1 to this")
    add("work_dir", user_path, "./sweep", "folder of the runs' folders; all nodes must see it")
    add("dry_run", bool, False, "only print the runs and their memory")
    add = parser.section("where to run it")
    add("address", str, "local", "of a Ray cluster, or auto for the one this machine is in")
    add("gpus_per_run", Weight, 0.0, "GPUs that a run asks for; a fraction shares a GPU; 0: a node's first GPU")
    add("cpus_per_run", number(float, 0.0001), 1.0, "cores that a run asks for")
    add("memory_per_run", Rate | None, None, "GB that a run asks for; None: an estimate")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser


class Job:
    """A run of the sweep: its flags of train.py, the `args` that they come to, and the bytes that it asks for."""

    def __init__(self, flags: list[str], args: argparse.Namespace, memory: int):
        self.flags, self.args, self.memory, self.work_dir = flags, args, memory, WorkDir(Path(args.work_dir))
        self.name, self.outcome, self.old_lines = self.work_dir.path.name, "", 0
        self.old_lines = len(self.printed())
        self.state = "done" if self.ended() else "waits"  # or "runs" or "failed"

    def ended(self) -> bool:
        """Whether nothing is left to do. If the checkpoint cannot be read or has other flags, train.py will say so."""
        with suppress(UserError, OSError):
            check_resumed(self.args, train.make_parser(), self.work_dir)
            now = Progress(**(self.work_dir.checkpoint.read()["progress"] or {}))
            return now.step >= self.args.num_train_steps and not now.evaluation_due()
        return False

    def finish(self, task: Any) -> str:
        """Finds out how Ray's task has ended. Returns a line about it."""
        try:
            reason = f"status {ray.get(task)}"  # 0, but not ended: this machine does not see the node's work_dir
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", type(error).__name__))
        self.state = "done" if self.ended() else "failed"
        self.outcome = f"{self.name} {'has ended' if self.state == 'done' else f'failed with {reason}'}"
        return self.outcome

    def printed(self) -> list[str]:
        """The lines that the run has printed in this sweep."""
        with suppress(OSError):
            return (self.work_dir.path / "output.log").read_text(errors="replace").splitlines()[self.old_lines :]
        return []

    def last(self, log: str) -> dict[str, Any]:
        """The last record of a log; an empty one if there is none yet, or a part of it."""
        with suppress(OSError, ValueError, IndexError):
            return json.loads((self.work_dir.path / log).read_text().splitlines()[-1])
        return {}


def make_runs(args: argparse.Namespace) -> list[Job]:
    """The runs of the sweep. Raises UserError if there is no such task or method, or if train.py refuses the flags."""
    by_name = {"_".join(task): task for task in dmc2gym.task_names()}
    published = {"_".join(task): repeat for task, repeat in report.PUBLISHED_REPEATS.items()}
    tasks = list(published if args.tasks == "published" else dict.fromkeys(args.tasks.split(",")))
    methods = list(dict.fromkeys(args.methods.split(",")))
    if unknown := [name for name in tasks if name not in by_name] + [name for name in methods if name not in METHODS]:
        raise UserError(f"there is no task or method {', '.join(unknown)}; a task is cartpole_swingup, for one")
    runs, parser = [], train.make_parser()
    given = parser.given(args.flags)
    if own := sorted(OWN & given.keys()):
        raise UserError(f"--{', --'.join(own)} after --: tasks, methods and seeds say that")
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        raise UserError(f"gpus_per_run must be a fraction or a whole number, got {args.gpus_per_run:g}")
    # Seeds are outermost: a sweep that is cut short has seen every task.
    for seed, task, method in itertools.product(range(1, args.seeds + 1), tasks, methods):
        (domain, name), (encoder, decoder) = by_name[task], METHODS[method]
        flags = f"--domain_name {domain} --task_name {name} --encoder_type {encoder} --decoder_type {decoder}".split()
        flags += ["--eval_workers", str(max(1, int(args.cpus_per_run)))]
        if task in published:
            repeat = given.get("action_repeat", published[task])
            flags += ["--action_repeat", str(repeat), "--num_train_steps", str(PUBLISHED_BUDGET // repeat)]
        work_dir = Path(args.work_dir).resolve() / f"{task}-{method}-{seed}"
        flags += [*args.flags, "--seed", str(seed), "--work_dir", str(work_dir), "--resume"]
        in_force = parser.parse_args(flags)
        with suppress(UserError, OSError):  # if the checkpoint cannot be read, train.py will say so
            in_force = parse_run(parser, flags)
        estimate = memory(in_force)
        runs.append(Job(flags, in_force, int(args.memory_per_run * 1e9) if args.memory_per_run else estimate))
    return runs


def memory(args: argparse.Namespace) -> int:
    """Estimates a run's host memory in bytes: the replay, and 2 GB (on states 1 GB) for the rest.

    Raises UserError if train.py would refuse these sizes.
    """
    if args.replay_buffer_capacity < args.batch_size:
        raise UserError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    capacity = min(args.replay_buffer_capacity, args.num_train_steps)
    if args.encoder_type == "identity":
        return replay_bytes((100,), (6,), capacity) + 10**9  # the shape of states is not known before the task is made
    conv_output_shape(args.image_size, args.image_size, args.num_layers)
    obs_shape = (3 * args.frame_stack, args.image_size, args.image_size)
    return replay_bytes(obs_shape, (6,), 0 if args.replay_device == "cuda" else capacity) + 2 * 10**9


@ray.remote(max_retries=10, retry_exceptions=True)  # of errors and of lost nodes
def run_train(flags: list[str], work_dir: Path) -> int:
    """Runs train.py on a node; a cancellation sends it SIGTERM. Returns its status 0 or 2 (the user's mistake).

    Raises RuntimeError if it is another. Ray then tries again, and train.py resumes the run.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    # On Linux, the kernel kills train.py when its parent, Ray's process, ends: PR_SET_PDEATHSIG is 1.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    with (work_dir / "output.log").open("a", errors="backslashreplace") as output:
        print(f"$ {shlex.join(['python', 'train.py', *flags])}", file=output, flush=True)
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: prctl(1, 9))
        try:
            while process.poll() is None:
                time.sleep(0.1)  # a cancellation does not interrupt a call that waits
        finally:
            process.terminate()
            status = process.wait()
    if status not in (0, 2):
        raise RuntimeError(f"status {status}" if status > 0 else signal.Signals(-status).name)
    return status


def start_ray(args: argparse.Namespace, largest: Job) -> None:
    """Starts Ray, or joins a cluster. Raises UserError if that fails, or if a run is too large for every node."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if args.address == "local":
        options["object_store_memory"] = 100_000_000  # it stays empty, and would take a third of the memory
    try:
        with held_signals(HANGUP):  # when the terminal closes, Ray must not end before the runs
            ray.init(args.address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"there is no Ray cluster at {args.address}: {error}") from error
    asked = {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run, "memory": largest.memory}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        shares = f"{args.cpus_per_run:g} cores, {args.gpus_per_run:g} GPUs and {largest.memory / 1e9:.1f} GB of memory"
        raise UserError(f"no node has the {shares} that {largest.name} asks for: ask for less")


def table(runs: list[Job]) -> Group:
    """How far each run is. Those that are running come first: a terminal shows as many rows as it has room for."""
    count = [run.state for run in runs].count
    title = f"{count('done')} of {len(runs)} runs have ended, {count('runs')} are running, {count('failed')} failed"
    columns = [Column(name, justify="right", no_wrap=True) for name in ("decisions", "a second", "last return", "left")]
    rows = Table(Column("run", overflow="fold"), *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for run in sorted(runs, key=lambda run: run.state != "runs"):
        training, evaluation, total = run.last("train.log"), run.last("eval.log"), run.args.num_train_steps
        step, speed = max(training.get("step", 0), evaluation.get("step", 0)), training.get("decisions_per_second")
        left = f"{(total - step) / speed / 3600:.1f} h" if speed and run.state == "runs" else run.state
        last_return = f"{evaluation['episode_reward']:.1f}" if evaluation else ""
        rows.add_row(run.name, f"{step:,} / {total:,}", f"{speed:.1f}" if speed else "", last_return, left)
    return Group(title, rows)


def carry_out(runs: list[Job], args: argparse.Namespace, console: Console, stop: Stop) -> None:
    """Has Ray run what waits, and shows how far it is, until a signal stops it."""
    reported, tasks = time.monotonic(), dict[Any, Job]()
    with stop.listen():
        try:
            for run in (run for run in runs if run.state == "waits"):
                options = run_train.options(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, memory=run.memory)
                tasks[options.remote(run.flags, run.work_dir.path)] = run
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while tasks and stop.number is None:
                    for task in ray.wait(list(tasks), timeout=2)[0]:
                        print(tasks.pop(task).finish(task), flush=True)
                    for run in tasks.values():
                        run.state = "runs" if run.printed() else "waits"
                    if console.is_terminal:
                        live.update(table(runs), refresh=True)
                    elif time.monotonic() - reported > 600:
                        console.print(table(runs))
                        reported = time.monotonic()
            if stop.number is not None:
                print("stopping: the runs write checkpoints", flush=True)
        finally:  # also if nothing can be printed, because the terminal is gone
            for task in tasks:
                ray.cancel(task)
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks), timeout=120)
            for run in tasks.values():
                run.state = "done" if run.ended() else "waits"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, console, stop = make_parser(), Console(markup=False, highlight=False), Stop()
    args = parser.parse_args(argv)
    with report.one_line(parser.error):
        runs = make_runs(args)
    waiting = [run for run in runs if run.state == "waits"]
    try:
        if args.dry_run:
            for run in runs:
                command = shlex.join(["python", "train.py", *run.flags])
                print(f"{run.name}: about {run.memory / 1e9:.1f} GB, {command}", flush=True)
            return 0
        if waiting:
            with report.one_line(parser.error):
                start_ray(args, max(waiting, key=lambda run: run.memory))
            carry_out(runs, args, console, stop)
        console.print(table(runs))
    except OSError as error:  # stdout is full or gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python fails once more when it exits
        parser.complain(str(error))
        return 1
    finally:
        ray.shutdown()
    failed = [run for run in runs if run.state == "failed"]
    for run in failed:
        print(run.outcome, *run.printed()[-5:], sep="\n    ", file=sys.stderr)
    if stop.number is not None:
        return stop.exit_status(parser.prog, ": the same command continues it")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
