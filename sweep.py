"""Trains every combination of tasks, methods and seeds, on one machine or a Ray cluster: `python sweep.py --help`."""

from __future__ import annotations

import streams

if __name__ == "__main__":
    streams.mend()

import argparse
import ctypes
import itertools
import json
import logging
import math
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
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import train
from checkpoint import Checkpoint
from flags import OneLineParser, number, user_path
from replay_buffer import replay_bytes
from signals import HANGUP, asked_to_stop, held_signals

ROOT = Path(__file__).resolve().parent
METHODS = {
    "sac_ae": ["--encoder_type", "pixel", "--decoder_type", "pixel"],
    "sac_pixel": ["--encoder_type", "pixel", "--decoder_type", "identity"],
    "sac_state": ["--encoder_type", "identity", "--decoder_type", "identity"],
}
PUBLISHED_BUDGET = 500_000  # environment steps
# Flags of train.py that are the sweep's to give.
OWN = ("--domain_name", "--task_name", "--encoder_type", "--decoder_type", "--seed", "--work_dir", "--overwrite")
_ATTEMPTS = 3  # in a row without a newer checkpoint
_DEATHS = 10  # of nodes under a run, in a row without a newer checkpoint
_PAUSE = 10.0  # seconds before the next attempt after one stop in vain, twice as many after two
_REFRESH = 1.0  # seconds between looks at the logs
_REPORT = 600.0  # seconds between tables where there is no terminal
_GRACE = 120.0  # seconds that runs have for their checkpoints when the sweep is stopped


class Spec(NamedTuple):
    """One run of the sweep."""

    name: str
    flags: list[str]  # of train.py, work_dir included
    args: argparse.Namespace  # that these come to, with what a run that is there already keeps

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


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Flags after -- go to train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", default="published", help="comma-separated DOMAIN_TASK; or the six published ones")
    parser.add_argument("--methods", default="sac_ae", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=train.COUNT, default=1, help="seeds 1 to this")
    parser.add_argument(
        "--work_dir", type=user_path, default="./sweep", help="folder of the runs' folders, seen by all nodes"
    )
    parser.add_argument("--address", default="local", help="of a Ray cluster, or auto for the one this machine is in")
    parser.add_argument("--gpus_per_run", type=train.WEIGHT, default=0.0, help="a fraction packs runs on a GPU")
    parser.add_argument("--cpus_per_run", type=number(float, 0.0001), default=1.0, help="cores that a run asks for")
    parser.add_argument("--memory_per_run", type=train.RATE, help="GB that a run asks for; None estimates them")
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
    tasks = list(published if args.tasks == "published" else dict.fromkeys(args.tasks.split(",")))
    methods = list(dict.fromkeys(args.methods.split(",")))
    unknown = [name for name in tasks if name not in by_name] + [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"there is no task or method {', '.join(unknown)}; a task is cartpole_swingup, for one")
    given = {flag.partition("=")[0] for flag in args.flags}
    if given.intersection(OWN):
        raise ValueError(f"{', '.join(sorted(given.intersection(OWN)))} after --: tasks, methods and seeds say that")
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        raise ValueError(f"gpus_per_run must be a fraction or a whole number, got {args.gpus_per_run:g}")
    eval_workers = ["--eval_workers", str(max(1, int(args.cpus_per_run)))]
    specs = []
    # Seeds outermost: a sweep that is cut short has seen every task.
    for seed, task, method in itertools.product(range(1, args.seeds + 1), tasks, methods):
        name = f"{task}-{method}-{seed}"
        domain_name, task_name = by_name[task]
        flags = ["--domain_name", domain_name, "--task_name", task_name, *METHODS[method], *eval_workers]
        if task in published:
            if "--action_repeat" not in given:
                flags += ["--action_repeat", str(published[task])]
            if "--num_train_steps" not in given:
                repeat = train.make_parser().parse_args([*flags, *args.flags]).action_repeat
                flags += ["--num_train_steps", str(PUBLISHED_BUDGET // repeat)]
        flags += [*args.flags, "--seed", str(seed), "--work_dir", str(Path(args.work_dir).resolve() / name), "--resume"]
        specs.append(Spec(name, flags, flags_in_force(flags)))
    for spec in specs:
        train.check_task_and_networks(spec.args)
    return specs


def flags_in_force(flags: list[str]) -> argparse.Namespace:
    """What train.py makes of the flags; if the run's checkpoint cannot be read, it will say so itself."""
    try:
        return train.parse(flags)
    except (ValueError, OSError):
        return train.make_parser().parse_args(flags)


def memory(args: argparse.Namespace) -> int:
    """Bytes of host memory that a run takes, roughly: its replay and 2 GB for all else; 1 GB if it is on states."""
    pixels = args.encoder_type == "pixel"
    if pixels and args.replay_device == "cuda":
        return int(2e9)
    # The shape of states is not known before the task is made.
    obs_shape = (3 * args.frame_stack, args.image_size, args.image_size) if pixels else (100,)
    return replay_bytes(obs_shape, (6,), train.replay_capacity(args)) + int(2e9 if pixels else 1e9)


def state_of(spec: Spec, before: State | None = None) -> State:
    """What the run's logs and checkpoint say; of what is not there yet, damaged or being written, nothing.

    With the state before, only the logs are read: the checkpoint takes longer.
    """
    steps, speeds, returns = [0], [0.0], [math.nan]
    for name in ("train", "eval"):
        with suppress(OSError, ValueError, IndexError, KeyError, TypeError):
            record = json.loads((spec.work_dir / f"{name}.log").read_text().splitlines()[-1])
            steps.append(int(record["step"]))
            if name == "train":
                speeds.append(float(record["decisions_per_second"]))
            else:
                returns.append(float(record["episode_reward"]))
    saved, ended = (0, False) if before is None else (before.saved, before.ended)
    if before is None:
        with suppress(OSError, ValueError):
            checkpoint = Checkpoint(spec.work_dir / "checkpoint")
            if checkpoint.exists():
                saved, ended = checkpoint.step(), checkpoint.ended(spec.args.num_train_steps)
    return State(max(*steps, saved), speeds[-1], returns[-1], saved, ended)


def output_bytes(spec: Spec) -> int:
    """Size of what the run has printed."""
    try:
        return (spec.work_dir / "output.log").stat().st_size
    except OSError:
        return 0


def output_end(spec: Spec) -> list[str]:
    """The last lines of what the run has printed."""
    try:
        return (spec.work_dir / "output.log").read_text(errors="replace").splitlines()[-5:]
    except OSError:
        return []


@ray.remote(max_retries=0)
def carry_out(flags: list[str], work_dir: Path, pause: float) -> int:
    """Runs train.py on a node, after so many seconds, until it ends; its exit status.

    If this task is cancelled, train.py is told to stop, and writes a checkpoint.
    """
    for _ in range(round(10 * pause)):  # neither this sleep nor the one below would hear of a cancellation
        time.sleep(0.1)
    work_dir.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it
        if sys.platform.startswith("linux"):  # the kernel shall kill this process when Ray's, its parent, ends
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    with (work_dir / "output.log").open("a", errors="backslashreplace") as output:
        print(f"$ {shlex.join(['python', 'train.py', *flags])}", file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
    return process.returncode


def node_with(request: dict[str, float]) -> bool:
    """Whether a node of the cluster has so much of each resource, if nothing else runs there."""
    return any(
        all(node["Resources"].get(name, 0) >= amount for name, amount in request.items())
        for node in ray.nodes()
        if node["Alive"]
    )


class Sweep:
    """Runs on their way."""

    def __init__(self, specs: Sequence[Spec], num_gpus: float, num_cpus: float, memory_gb: float | None):
        self.specs = list(specs)
        self.states = {spec.name: state_of(spec) for spec in specs}
        self.failed: dict[str, str] = {}  # why
        self._shares = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        self._memory = {spec.name: int(memory_gb * 1e9) if memory_gb else memory(spec.args) for spec in specs}
        self._pending: dict[Any, Spec] = {}
        self._stops: dict[str, list[bool]] = {spec.name: [] for spec in specs}  # in vain; whether a node died
        self._begun: dict[str, tuple[int, int]] = {}  # bytes of output and decisions saved before the attempt
        self._waiting = [spec for spec in specs if not self.states[spec.name].ended]
        for spec in specs:
            if self.states[spec.name].ended:
                try:
                    train.check_resumed(spec.args)
                except ValueError as error:
                    self.failed[spec.name] = str(error)

    def start(self) -> None:
        """Hands the runs that have not ended to Ray."""
        for spec in self._waiting:
            self._submit(spec)

    def _submit(self, spec: Spec) -> None:
        self._begun[spec.name] = (output_bytes(spec), self.states[spec.name].saved)
        options = carry_out.options(**self._shares, memory=self._memory[spec.name])
        pause = _PAUSE * len(self._stops[spec.name])
        self._pending[options.remote(spec.flags, spec.work_dir, pause)] = spec

    def wait(self, seconds: float) -> list[str]:
        """Waits for something to end, at most so long; a line for each run that has ended, failed or is tried again."""
        done, _ = ray.wait(list(self._pending), timeout=seconds)
        lines = [self._end(self._pending.pop(task), task) for task in done]
        running = self.running()
        for spec in self._pending.values():
            if spec.name in running:
                self.states[spec.name] = state_of(spec, before=self.states[spec.name])
        return lines

    def _end(self, spec: Spec, task: Any) -> str:
        """Sees whether a run has ended; if not, it is tried again unless it has stopped in vain too often."""
        name, died, last = spec.name, False, False
        try:
            status = ray.get(task)
            reason = f"status {status}" if status >= 0 else signal.Signals(-status).name
            last = status == 0
        except ray.exceptions.NodeDiedError:
            reason, died = "its node's death", True
        except ray.exceptions.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            reason = type(error).__name__
        state = self.states[name] = state_of(spec)
        stops = self._stops[name]
        if state.ended:
            return f"{name} has ended: last return {state.last_return:.1f}"
        if last:
            reason += f", but its end is not seen here: do all nodes share {spec.work_dir}?"
        elif state.saved > self._begun[name][1]:
            stops.clear()
        else:
            stops.append(died)
        if last or stops.count(False) >= _ATTEMPTS or len(stops) >= _DEATHS:
            self.failed[name] = reason
            return f"{name} failed with {reason}"
        self._submit(spec)
        return f"{name} stopped with {reason}; it goes on from decision {state.saved}"

    def pending(self) -> bool:
        """Whether there is more to wait for."""
        return bool(self._pending)

    def stop(self) -> list[str]:
        """Has the runs write checkpoints and end; a line for each that did not."""
        for task in self._pending:
            ray.cancel(task)
        _, late = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_GRACE)
        for spec in self._pending.values():
            self.states[spec.name] = state_of(spec)
        lines = [f"{self._pending[task].name} is ended without a checkpoint: it takes too long" for task in late]
        self._pending = {}
        return lines

    def unplaceable(self) -> str | None:
        """Why a run will wait for ever, unless the cluster grows; None if none will."""
        shares = {"GPU": self._shares["num_gpus"], "CPU": self._shares["num_cpus"]}
        for spec in self._waiting:
            size = self._memory[spec.name]
            if not node_with(shares | {"memory": size}):
                asked = f"{shares['CPU']:g} cores, {shares['GPU']:g} GPUs and {size / 1e9:.1f} GB of memory"
                return f"no node has the {asked} that {spec.name} asks for"
        return None

    def running(self) -> set[str]:
        """Names of the runs that have written something in this attempt."""
        return {spec.name for spec in self._pending.values() if output_bytes(spec) > self._begun[spec.name][0]}

    def table(self, most_rows: int | None = None) -> Group:
        """How far each run is and what is left; of more runs than `most_rows`, those that run."""
        running = self.running()
        ended = sum(state.ended for name, state in self.states.items() if name not in self.failed)
        speed = sum(self.states[name].speed for name in running)
        title = f"{ended} of {len(self.specs)} runs have ended, {len(running)} are running, {len(self.failed)} failed"
        # Without lines between them the columns fit in 80 characters.
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("run", overflow="fold")
        for column in ("decisions", "a second", "last return", "left"):
            table.add_column(column, justify="right", no_wrap=True)
        shown = self.specs
        if most_rows is not None and len(shown) > most_rows:
            shown = [spec for spec in shown if spec.name in running][: max(1, most_rows)]
        for spec in shown:
            table.add_row(spec.name, *self._row(spec, spec.name in running))
        return Group(f"{title}; {speed:.1f} decisions a second" if speed else title, table)

    def _row(self, spec: Spec, running: bool) -> Iterator[str]:
        """Its cells in the table."""
        state, total = self.states[spec.name], spec.args.num_train_steps
        yield f"{state.step:,} / {total:,}"
        yield f"{state.speed:.1f}" if state.speed else ""
        yield "" if math.isnan(state.last_return) else f"{state.last_return:.1f}"
        if running and state.speed:
            minutes = (total - state.step) / state.speed / 60
            yield f"{minutes / 60:.1f} h" if minutes > 60 else f"{minutes:.0f} min"
        else:
            yield "failed" if spec.name in self.failed else "done" if state.ended else "runs" if running else "waits"

    def report(self) -> list[str]:
        """For each run that has failed, its last lines."""
        lines = []
        for spec in self.specs:
            if spec.name in self.failed:
                line = f"{spec.name} failed with {self.failed[spec.name]}"
                lines += [f"{line}; its last lines:", *output_end(spec)] if spec.name in self._begun else [line]
        return lines


def carry_on(sweep: Sweep, console: Console) -> int | None:
    """Waits for the runs, telling how far they are; the signal that broke it off, or None."""
    reported = time.monotonic()
    asked: list[int] = []
    with asked_to_stop(asked.append):
        try:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while sweep.pending() and not asked:
                    for line in sweep.wait(_REFRESH):
                        console.print(line, highlight=False, soft_wrap=True)
                    if console.is_terminal:
                        live.update(sweep.table(most_rows=console.height - 5), refresh=True)
                    elif time.monotonic() - reported > _REPORT:
                        console.print(sweep.table())
                        reported = time.monotonic()
            if asked:
                console.print("stopping: the runs write checkpoints")
        finally:  # also if nothing can be printed any more, as on a terminal that is gone
            late = sweep.stop() if sweep.pending() else []
        for line in late:
            console.print(line, highlight=False, soft_wrap=True)
    return asked[0] if asked else None


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
            print(f"{spec.name}: about {memory(spec.args) / 1e9:.1f} GB, python train.py {shlex.join(spec.flags)}")
        return 0
    local = args.address == "local"
    try:
        with held_signals(HANGUP):  # the end of the terminal must not end Ray before the runs
            ray.init(
                address=args.address,
                log_to_driver=False,
                include_dashboard=False,
                logging_level=logging.ERROR,
                # Nothing goes through Ray's store of objects, which would take a third of the memory.
                object_store_memory=100_000_000 if local else None,
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        parser.error(f"Ray does not start: {error}" if local else f"there is no Ray cluster at {args.address}: {error}")
    console = Console(markup=False)  # paths may hold brackets
    try:
        sweep = Sweep(specs, args.gpus_per_run, args.cpus_per_run, args.memory_per_run)
        reason = sweep.unplaceable()
        if reason is not None and local:
            parser.error(f"{reason}: ask for less")
        if reason is not None:
            print(f"{reason}: it waits for one", file=sys.stderr)
        if not args.gpus_per_run and ray.cluster_resources().get("GPU"):
            print("note: without --gpus_per_run all runs are on a node's first GPU", file=sys.stderr)
        sweep.start()
        number = carry_on(sweep, console)
        console.print(sweep.table())
    except OSError as error:
        return train.failure(parser, error)
    finally:
        ray.shutdown()
    for line in sweep.report():
        print(line, file=sys.stderr)
    if number is not None:
        print(f"{parser.prog}: stopped by {signal.Signals(number).name}: the same command goes on", file=sys.stderr)
        return 128 + number
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(main())
