"""Trains every combination of tasks, methods and seeds, on one machine or a Ray cluster: `python sweep.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import ctypes
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

try:
    import ray
    from rich.console import Console
    from rich.live import Live
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"sweep.py: error: {error}: use `make sweep`, or pip install -r requirements-sweep.txt", file=sys.stderr)
    sys.exit(2)

import pandas as pd

import dmc2gym
import train
from errors import UserError
from replay_buffer import replay_bytes
from sac_ae import Count, NonNegative, Positive
from support import report
from support.checkpoint import Progress, parse_run
from support.flags import OneLineParser, number, user_path
from support.published import METHODS, REPEATS
from support.signals import Stop

ROOT = Path(__file__).resolve().parent
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
    add("gpus_per_run", NonNegative, 0.0, "GPUs that a run asks for; a fraction shares a GPU; 0: a node's first GPU")
    add("cpus_per_run", number(float, 0.0001), 1.0, "cores that a run asks for")
    add("memory_per_run", Positive | None, None, "GB that a run asks for; None: an estimate")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser


def resume(flags: list[str]) -> tuple[argparse.Namespace, bool]:
    """The flags in force in a run, and whether it has ended. What train.py refuses, it says itself when it runs."""
    parser = train.make_parser()
    with suppress(UserError, OSError):
        args, saved = parse_run(parser, flags)
        return args, saved is not None and Progress(**saved["progress"]).ended(args.num_train_steps)
    return parser.parse_args(flags), False


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    with suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


class Job:
    """A run of the sweep: its flags of train.py, the `args` that they come to, and the bytes that it asks for."""

    def __init__(self, flags: list[str], memory_per_run: float | None):
        self.flags, (self.args, ended) = flags, resume(flags)
        self.memory = int(memory_per_run * 1e9) if memory_per_run else memory(self.args)
        self.work_dir = Path(self.args.work_dir)
        self.name, self.state = self.work_dir.name, "done" if ended else "waits"  # or "runs" or "failed"
        self.old_lines, self.outcome = len(lines_of(self.work_dir / "output.log")), ""

    def finish(self, task: Any) -> None:
        """Finds out how Ray's task has ended, and says so in `outcome`."""
        try:
            reason = f"status {ray.get(task)}"  # 0, but not ended: this machine does not see the node's work_dir
        except ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", type(error).__name__))
        self.state = "done" if resume(self.flags)[1] else "failed"
        self.outcome = f"{self.name} {'has ended' if self.state == 'done' else f'failed with {reason}'}"

    def printed(self) -> list[str]:
        """The lines that the run has printed in this sweep."""
        return lines_of(self.work_dir / "output.log")[self.old_lines :]

    def row(self) -> dict[str, str]:
        """How far the run is."""
        logs: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}  # their last lines
        for name in logs:
            for line in lines_of(self.work_dir / f"{name}.log")[-2:]:  # the last one may be half written
                with suppress(ValueError):
                    logs[name] = json.loads(line)
        step, total = max(log.get("step", 0) for log in logs.values()), self.args.num_train_steps
        speed, last = logs["train"].get("decisions_per_second"), logs["eval"].get("episode_reward")
        left = f"{(total - step) / speed / 3600:.1f} h" if speed and self.state == "runs" else self.state
        shown = {"run": self.name, "decisions": f"{step:,} / {total:,}", "a second": f"{speed:.1f}" if speed else ""}
        return shown | {"last return": "" if last is None else f"{last:.1f}", "left": left}


def make_runs(args: argparse.Namespace) -> list[Job]:
    """The runs of the sweep. Raises UserError if there is no such task or method, or if train.py refuses the flags."""
    by_name = {"_".join(task): task for task in dmc2gym.task_names()}
    published = {"_".join(task): repeat for task, repeat in REPEATS.items()}
    tasks = list(published if args.tasks == "published" else dict.fromkeys(args.tasks.split(",")))
    methods = list(dict.fromkeys(args.methods.split(",")))
    if unknown := [name for name in tasks if name not in by_name] + [name for name in methods if name not in METHODS]:
        raise UserError(f"there is no task or method {', '.join(unknown)}; a task is cartpole_swingup, for one")
    given = train.make_parser().given(args.flags)
    if own := sorted(OWN & given.keys()):
        raise UserError(f"--{', --'.join(own)} after --: tasks, methods and seeds say that")
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        raise UserError(f"gpus_per_run must be a fraction or a whole number, got {args.gpus_per_run:g}")
    runs, folder = [], Path(args.work_dir).resolve()
    # Seeds are outermost: a sweep that is cut short has seen every task.
    for seed, task, method in itertools.product(range(1, args.seeds + 1), tasks, methods):
        (domain, name), (_, encoder, decoder) = by_name[task], METHODS[method]
        values: dict[str, Any] = {"domain_name": domain, "task_name": name}
        values |= {"encoder_type": encoder, "decoder_type": decoder, "seed": seed}
        values |= {"work_dir": folder / f"{task}-{method}-{seed}", "eval_workers": max(1, int(args.cpus_per_run))}
        if task in published:
            values["action_repeat"] = given.get("action_repeat", published[task])
            values["num_train_steps"] = PUBLISHED_BUDGET // values["action_repeat"]
        shown = (values | given | {"resume": True}).items()
        switches = {True: "--", False: "--no-"}
        flags = [f"{switches[value]}{key}" if isinstance(value, bool) else f"--{key}={value}" for key, value in shown]
        runs.append(Job(flags, args.memory_per_run))
    return runs


def memory(args: argparse.Namespace) -> int:
    """Estimates a run's host memory in bytes: the replay, and 2 GB (on states 1 GB) for the rest."""
    capacity = min(args.replay_buffer_capacity, args.num_train_steps)
    if args.encoder_type == "identity":
        return replay_bytes((100,), (6,), capacity) + 10**9  # the shape of states is not known before the task is made
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
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # Ray's processes inherit it: they must outlast the terminal
    try:
        ray.init(args.address, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(f"there is no Ray cluster at {args.address}: {error}") from error
    finally:
        signal.signal(signal.SIGHUP, before)
    asked = {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run, "memory": largest.memory}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        shares = f"{args.cpus_per_run:g} cores, {args.gpus_per_run:g} GPUs and {largest.memory / 1e9:.1f} GB of memory"
        raise UserError(f"no node has the {shares} that {largest.name} asks for: ask for less")


def table(runs: list[Job]) -> str:
    """How far each run is. Those that are running come first: a terminal shows as many rows as it has room for."""
    count = [run.state for run in runs].count
    title = f"{count('done')} of {len(runs)} runs have ended, {count('runs')} are running, {count('failed')} failed"
    rows = [run.row() for run in sorted(runs, key=lambda run: run.state != "runs")]
    return f"{title}\n{pd.DataFrame(rows).to_string(index=False)}"


def carry_out(runs: list[Job], args: argparse.Namespace, stop: Stop) -> None:
    """Has Ray run what waits, and shows how far it is, until a signal stops it."""
    reported, tasks, console = time.monotonic(), dict[Any, Job](), Console(markup=False, highlight=False)
    shown = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext()
    with stop.listen():
        try:
            for run in (run for run in runs if run.state == "waits"):
                options = run_train.options(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, memory=run.memory)
                tasks[options.remote(run.flags, run.work_dir)] = run
            with shown as live:
                while tasks and stop.number is None:
                    for task in ray.wait(list(tasks), timeout=2)[0]:
                        run = tasks.pop(task)
                        run.finish(task)
                        report.show(run.outcome)
                    for run in tasks.values():
                        run.state = "runs" if run.printed() else "waits"
                    if live is not None:
                        live.update(table(runs), refresh=True)
                    elif time.monotonic() - reported > 600:
                        report.show(table(runs))
                        reported = time.monotonic()
            if stop.number is not None:
                report.show("stopping: the runs write checkpoints")
        finally:  # also if nothing can be printed, because the terminal is gone
            for task in tasks:
                ray.cancel(task)
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks), timeout=120)
            for run in tasks.values():
                run.state = "done" if resume(run.flags)[1] else "waits"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, stop = make_parser(), Stop()
    args = parser.parse_args(argv)
    with report.one_line(parser.error):
        runs = make_runs(args)
    with report.one_line(parser.fail), ExitStack() as resources:
        if args.dry_run:
            for run in runs:
                report.show(
                    f"{run.name}: about {run.memory / 1e9:.1f} GB, {shlex.join(['python', 'train.py', *run.flags])}"
                )
            return 0
        if waiting := [run for run in runs if run.state == "waits"]:
            resources.callback(ray.shutdown)
            with report.one_line(parser.error):
                start_ray(args, max(waiting, key=lambda run: run.memory))
            carry_out(runs, args, stop)
        report.show(table(runs))
    failed = [run for run in runs if run.state == "failed"]
    for run in failed:
        print(run.outcome, *run.printed()[-5:], sep="\n    ", file=sys.stderr)
    if stop.number is not None:
        return stop.exit_status(parser.prog, ": the same command continues it")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
