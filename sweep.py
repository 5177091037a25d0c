"""Trains every combination of tasks, methods and seeds, on one machine or a Ray cluster: `python sweep.py --help`."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from rich.console import Console
from rich.live import Live
from rich.table import Table

import train
from checkpoint import Checkpoint
from replay_buffer import replay_bytes

ROOT = Path(__file__).resolve().parent
METHODS = {
    "sac_ae": ["--encoder_type", "pixel", "--decoder_type", "pixel"],
    "sac_pixel": ["--encoder_type", "pixel", "--decoder_type", "identity"],
    "sac_state": ["--encoder_type", "identity", "--decoder_type", "identity"],
}
PUBLISHED_BUDGET = 500_000  # environment steps
_ATTEMPTS = 3  # of a run that fails by itself; one whose node dies is tried as often as that happens
_REFRESH = 5  # seconds between looks at the logs


class Spec(NamedTuple):
    """One run of the sweep."""

    name: str
    flags: list[str]  # of train.py, work_dir included
    args: argparse.Namespace

    @property
    def work_dir(self) -> Path:
        """The run's folder."""
        return Path(self.args.work_dir)


class State(NamedTuple):
    """How far a run has come."""

    step: int  # decisions
    speed: float  # decisions a second
    last_return: float  # of the last evaluation
    ended: bool


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = train.OneLineParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Flags after -- go to train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", default="published", help="comma-separated DOMAIN_TASK; or the six published ones")
    parser.add_argument("--methods", default="sac_ae", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=train.COUNT, default=1, help="seeds 1 to this")
    parser.add_argument("--work_dir", default="./sweep", help="folder of the runs' folders, seen by all nodes")
    parser.add_argument("--address", help="of a Ray cluster, or auto; None starts Ray here")
    parser.add_argument("--gpus_per_run", type=train.WEIGHT, default=0.0, help="a fraction packs runs on a GPU")
    parser.add_argument("--cpus_per_run", type=train.WEIGHT, default=1.0, help="cores that a run asks for")
    parser.add_argument("--dry_run", action="store_true", help="only print the runs and their memory")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser


def make_specs(args: argparse.Namespace) -> list[Spec]:
    """The runs that are asked for.

    Raises:
        ValueError: there is no such task or method, or train.py refuses the flags.
    """
    by_name = {f"{domain}_{task}": (domain, task) for domain, task in train.dmc2gym.task_names()}
    published = {f"{domain}_{task}": repeat for (domain, task), repeat in train.PUBLISHED_REPEATS.items()}
    tasks = list(published) if args.tasks == "published" else args.tasks.split(",")
    methods = args.methods.split(",")
    unknown = [name for name in tasks if name not in by_name] + [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"there is no task or method {', '.join(unknown)}; a task is cartpole_swingup, for one")
    specs = []
    for task, method, seed in itertools.product(tasks, methods, range(1, args.seeds + 1)):
        name = f"{task}-{method}-{seed}"
        flags = ["--domain_name", by_name[task][0], "--task_name", by_name[task][1], *METHODS[method]]
        if task in published:
            repeat = published[task]
            flags += ["--action_repeat", str(repeat), "--num_train_steps", str(PUBLISHED_BUDGET // repeat)]
        flags += [*args.flags, "--seed", str(seed), "--work_dir", str(Path(args.work_dir).resolve() / name), "--resume"]
        specs.append(Spec(name, flags, train.make_parser().parse_args(flags)))
    for spec in specs:
        train.check_task_and_networks(spec.args)
    return specs


def memory(args: argparse.Namespace) -> int:
    """Bytes of a run's replay; roughly, for states, whose shape is not known before the task is made."""
    pixels = args.encoder_type == "pixel"
    obs_shape = (3 * args.frame_stack, args.image_size, args.image_size) if pixels else (100,)
    return replay_bytes(obs_shape, (6,), train.replay_capacity(args))


def state_of(spec: Spec) -> State:
    """What the run's logs and checkpoint say."""
    steps, speeds, returns = [0], [0.0], [float("nan")]
    for name in ("train", "eval"):
        try:
            record = json.loads((spec.work_dir / f"{name}.log").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):  # not there yet, or being written
            continue
        steps.append(record["step"])
        if name == "train":
            speeds.append(record["decisions_per_second"])
        else:
            returns.append(record["episode_reward"])
    return State(max(steps), speeds[-1], returns[-1], has_ended(spec))


def has_ended(spec: Spec) -> bool:
    """Whether the run has made all its decisions and its last evaluation."""
    try:
        checkpoint = Checkpoint(spec.work_dir / "checkpoint")
        return checkpoint.exists() and checkpoint.ended(spec.args.num_train_steps)
    except ValueError:
        return False


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends (Linux: prctl, PR_SET_PDEATHSIG)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@ray.remote(max_retries=-1)
def carry_out(flags: list[str]) -> int:
    """Runs train.py on a node until it ends; its exit status. If the node dies, Ray does so again on another one."""
    work_dir = Path(flags[flags.index("--work_dir") + 1])
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "output.log").open("a") as output:
        print(f"$ {shlex.join(['python', 'train.py', *flags])}", file=output, flush=True)
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            check=False,
        ).returncode


class Sweep:
    """Runs on their way."""

    def __init__(self, specs: Sequence[Spec], num_gpus: float, num_cpus: float):
        self.specs = list(specs)
        self.states = {spec.name: state_of(spec) for spec in specs}
        self.failed: dict[str, int] = {}  # exit status
        self._attempts = dict.fromkeys(self.states, 0)
        self._resources = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._pending: dict[Any, Spec] = {}
        self._begin = time.monotonic()
        for spec in specs:
            if not self.states[spec.name].ended:
                self._submit(spec)

    def _submit(self, spec: Spec) -> None:
        self._attempts[spec.name] += 1
        self._pending[carry_out.options(**self._resources).remote(spec.flags)] = spec

    def wait(self, seconds: float) -> bool:
        """Waits for something to end, at most so long; whether there is more to wait for."""
        if not self._pending:
            return False
        done, _ = ray.wait(list(self._pending), timeout=seconds)
        for task in done:
            self._end(self._pending.pop(task), task)
        for spec in self._pending.values():
            self.states[spec.name] = state_of(spec)
        return bool(self._pending)

    def _end(self, spec: Spec, task: Any) -> None:
        try:
            status = ray.get(task)
        except ray.exceptions.RayError:
            status = -1
        self.states[spec.name] = state_of(spec)
        if self.states[spec.name].ended:
            return
        if self._attempts[spec.name] < _ATTEMPTS:
            self._submit(spec)
        else:
            self.failed[spec.name] = status

    def table(self) -> Table:
        """How far each run is, and what is left."""
        table = Table(
            title=f"{sum(state.ended for state in self.states.values())} of {len(self.specs)} runs have ended"
        )
        for column in ("run", "decisions", "a second", "last return", "left"):
            table.add_column(column, justify="left" if column == "run" else "right")
        running = {spec.name for spec in self._pending.values()}
        for spec in self.specs:
            state, total = self.states[spec.name], spec.args.num_train_steps
            left = (total - state.step) / state.speed if state.speed else float("nan")
            word = "failed" if spec.name in self.failed else "done" if state.ended else "waits"
            if spec.name in running and state.speed:
                word = f"{left / 3600:.1f} h"
            speed, last = (f"{value:.1f}" for value in (state.speed, state.last_return))
            table.add_row(spec.name, f"{state.step:,} / {total:,}", speed, last, word)
        return table

    def report(self) -> list[str]:
        """For each run that has failed, its last lines."""
        lines = []
        for spec in self.specs:
            if spec.name in self.failed:
                output = (spec.work_dir / "output.log").read_text(errors="replace").splitlines()
                lines += [f"{spec.name} failed with status {self.failed[spec.name]}; its last lines:", *output[-5:]]
        return lines


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        specs = make_specs(args)
    except (ValueError, train.dmc2gym.RendererError) as error:
        parser.error(str(error))
    if args.dry_run:
        for spec in specs:
            print(f"{spec.name}: {memory(spec.args) / 1e9:.2f} GB, python train.py {shlex.join(spec.flags)}")
        return 0
    # Runs that ask for no share of a GPU may still see it; Ray would hide it from them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address=args.address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    console = Console()
    try:
        sweep = Sweep(specs, args.gpus_per_run, args.cpus_per_run)
        with Live(sweep.table(), console=console, auto_refresh=False, transient=True) as live:
            while sweep.wait(_REFRESH):
                live.update(sweep.table(), refresh=console.is_terminal)
        console.print(sweep.table())
    finally:
        ray.shutdown()
    for line in sweep.report():
        print(line, file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
