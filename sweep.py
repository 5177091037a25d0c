"""Trains every combination of tasks, methods and seeds, on one machine or a Ray cluster: `python sweep.py --help`."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
_ATTEMPTS = 3  # in a row without a newer checkpoint; those that end with their node are not counted
_PAUSE = 10.0  # seconds before a second attempt, twice as many before a third
_REFRESH = 5.0  # seconds between looks at the logs


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
    saved: int  # decisions in the checkpoint
    ended: bool  # all decisions and the last evaluation are made


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
    parser.add_argument("--address", default="local", help="of a Ray cluster, or auto for the one this machine is in")
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
    # Seeds outermost: a sweep that is cut short has seen every task.
    for seed, task, method in itertools.product(range(1, args.seeds + 1), tasks, methods):
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
    saved, ended = 0, False
    try:
        checkpoint = Checkpoint(spec.work_dir / "checkpoint")
        if checkpoint.exists():
            saved, ended = checkpoint.step(), checkpoint.ended(spec.args.num_train_steps)
    except ValueError:  # damaged: the run itself will say so
        pass
    return State(max(steps), speeds[-1], returns[-1], saved, ended)


def output_bytes(spec: Spec) -> int:
    """Size of what the run has printed."""
    try:
        return (spec.work_dir / "output.log").stat().st_size
    except FileNotFoundError:
        return 0


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends (Linux: prctl, PR_SET_PDEATHSIG)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@ray.remote(max_retries=0)
def carry_out(flags: list[str], pause: float) -> int:
    """Runs train.py on a node, after so many seconds, until it ends; its exit status."""
    time.sleep(pause)
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
        self.failed: dict[str, str] = {}  # why
        self._attempts = dict.fromkeys(self.states, 0)
        self._resources = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._pending: dict[Any, Spec] = {}
        self._saved: dict[str, int] = {}  # decisions in the checkpoint that the attempt began with
        self._output: dict[str, int] = {}  # bytes of output before the attempt
        for spec in specs:
            if not self.states[spec.name].ended:
                self._submit(spec)

    def _submit(self, spec: Spec) -> None:
        self._saved[spec.name] = self.states[spec.name].saved
        self._output[spec.name] = output_bytes(spec)
        pause = _PAUSE * self._attempts[spec.name]
        self._pending[carry_out.options(**self._resources).remote(spec.flags, pause)] = spec

    def wait(self, seconds: float) -> list[str]:
        """Waits for something to end, at most so long; a line for each run that has ended, failed or is tried again."""
        done, _ = ray.wait(list(self._pending), timeout=seconds)
        lines = [self._end(self._pending.pop(task), task) for task in done]
        for spec in self._pending.values():
            self.states[spec.name] = state_of(spec)
        return lines

    def _end(self, spec: Spec, task: Any) -> str:
        """Tries a run again that has not ended, unless it has failed too often in a row and got no further."""
        name, counts = spec.name, 1
        try:
            reason = f"status {ray.get(task)}"
        except ray.exceptions.NodeDiedError:
            reason, counts = "its node's death", 0
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
        state = self.states[name] = state_of(spec)
        if state.ended:
            return f"{name} has ended: last return {state.last_return:.1f}"
        further = state.saved > self._saved[name]
        self._attempts[name] = counts if further else self._attempts[name] + counts
        if self._attempts[name] < _ATTEMPTS:
            self._submit(spec)
            return f"{name} stopped with {reason}; it goes on from decision {state.saved}"
        self.failed[name] = reason
        return f"{name} failed with {reason}"

    def pending(self) -> bool:
        """Whether there is more to wait for."""
        return bool(self._pending)

    def _running(self) -> set[str]:
        """Names of the runs that have written something in this attempt."""
        return {spec.name for spec in self._pending.values() if output_bytes(spec) > self._output[spec.name]}

    def table(self, most_rows: int | None = None) -> Table:
        """How far each run is and what is left; of more runs than `most_rows`, those that run."""
        running = self._running()
        speed = sum(self.states[name].speed for name in running)
        ended = sum(state.ended for state in self.states.values())
        title = f"{ended} of {len(self.specs)} runs have ended, {len(running)} are running"
        table = Table(title=f"{title}, {speed:.1f} decisions a second" if speed else title)
        for column in ("run", "decisions", "a second", "last return", "left"):
            table.add_column(column, justify="left" if column == "run" else "right")
        shown = self.specs
        if most_rows is not None and len(shown) > most_rows:
            shown = [spec for spec in shown if spec.name in running][:most_rows]
        for spec in shown:
            table.add_row(spec.name, *self._row(spec, spec.name in running))
        return table

    def _row(self, spec: Spec, running: bool) -> Iterator[str]:
        """Its cells in the table."""
        state, total = self.states[spec.name], spec.args.num_train_steps
        yield f"{state.step:,} / {total:,}"
        yield f"{state.speed:.1f}" if state.speed else ""
        yield "" if math.isnan(state.last_return) else f"{state.last_return:.1f}"
        if running and state.speed:
            yield f"{(total - state.step) / state.speed / 3600:.1f} h"
        else:
            yield "failed" if spec.name in self.failed else "done" if state.ended else "runs" if running else "waits"

    def report(self) -> list[str]:
        """For each run that has failed, its last lines."""
        lines = []
        for spec in self.specs:
            if spec.name in self.failed:
                lines.append(f"{spec.name} failed with {self.failed[spec.name]}; its last lines:")
                with suppress(OSError):
                    lines += (spec.work_dir / "output.log").read_text(errors="replace").splitlines()[-5:]
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
            while sweep.pending():
                for line in sweep.wait(_REFRESH):
                    console.print(line, highlight=False, soft_wrap=True)
                live.update(sweep.table(most_rows=console.height - 5), refresh=console.is_terminal)
        console.print(sweep.table())
    finally:
        ray.shutdown()
    for line in sweep.report():
        print(line, file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
