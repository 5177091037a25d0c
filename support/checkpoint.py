"""A run in its folder: its lock, and the checkpoint from which it continues as if it had never stopped.

`checkpoint/checkpoint.json`, the index, stores flags and counters, and lists the checkpoint's other files: one file of
tensors, and the replay's chunks. It is replaced last, so that the files that it lists are always complete. A run writes
its first checkpoint before it prints anything.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from files import read_index, read_tensors, write_index, write_json, write_tensors, writing
from randomness import seed_of
from support import report
from support.flags import OneLineParser
from support.signals import Stop

VERSION = 4
# What a run writes to its folder. A run that is killed before its first checkpoint is complete leaves at most two of
# them, and `--resume` starts it anew.
NAMES = ("args.json", "starts.log", "train.log", "eval.log", "tb", "video", "model", "buffer", "checkpoint")
FIRST_NAMES = {"tb", "checkpoint"}
INDEX = "checkpoint.json"
# In `checkpoint`, beside the index: a file of tensors, chunks of the replay, and what a killed write leaves.
STATE, CHUNK = r"state_\d{19}\.pt", r"\d+_\d+\.pt"
FILES = re.compile(rf"{STATE}|{CHUNK}|\.({STATE}|{CHUNK}|checkpoint\.json)\.sac_ae_tmp")
MODEL = re.compile(r"(?!target_)(\w+)_(\d+)\.pt")  # the authors' script saves no target


@dataclass
class Progress:
    """Where a run is. A checkpoint holds all of it."""

    step: int = 0  # decisions made
    updates: int = 0
    episode: int = 1  # number of the episode under way
    next_evaluation: int = 0  # evaluate at the first episode end at or after this step
    actions: list[Any] = field(default_factory=list)  # of the episode under way
    action: Any = None  # of the decision under way: chosen before its updates, which change the policy
    episode_return: float = 0.0
    seconds: float = 0.0  # that the episode under way has taken, evaluation excluded
    obs_crc: int | None = None  # of the observation, to see whether the environment repeats its episodes

    def under_way(self) -> bool:
        """Whether an episode is under way."""
        return bool(self.actions) or self.action is not None

    def begin_next_episode(self) -> None:
        """Counts the episode that has ended."""
        self.episode, self.actions, self.episode_return, self.seconds = self.episode + 1, [], 0.0, 0.0

    def plan_evaluation(self, eval_freq: int) -> None:
        """Sets the next evaluation to the first multiple of `eval_freq` after the last episode's end."""
        self.next_evaluation = ((self.step - len(self.actions)) // eval_freq + 1) * eval_freq

    def evaluation_due(self) -> bool:
        """Whether an evaluation is due; never within an episode."""
        return not self.actions and self.step >= self.next_evaluation

    def ended(self, num_train_steps: int) -> bool:
        """Whether nothing is left to do."""
        return self.step >= num_train_steps and not self.evaluation_due()


class Lock:
    """Keeps other processes out of a run's folder, from `take` to `close`."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Locks the folder, which is made if it is missing. Does nothing if this lock has been taken before.

        Raises UserError if another process has it, or if the folder cannot be written.
        """
        if self._file is not None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / ".lock").open("a")  # NFS locks only what is open to be written
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                report.say(f"warning: the file system of {folder} has no locks: start no second process there")
                return
            self.close()
            if error.errno != errno.EWOULDBLOCK:
                raise UserError(f"{folder} cannot be locked: {error.strerror}") from error
            raise UserError(f"{folder} is in use by another process: wait for its end, or stop it") from None

    def close(self) -> None:
        """Lets other processes in."""
        if self._file is not None:
            self._file.close()
            self._file = None


def parse_run(
    parser: OneLineParser, argv: Sequence[str] | None, lock: Lock | None = None
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The flags of a run, and the index that it resumes from, if any. A resumed run keeps flags that are not given.

    `lock` is taken before the index is read, if the folder holds a run. Raises UserError if no run can start in the
    folder, if the index is damaged, if a fixed flag has changed, or if the run is beyond its end.
    """
    args = parser.parse_args(argv)
    path = Path(args.work_dir)
    check_folder(args, path)
    if lock is not None and run_files(path):
        lock.take(path)
    saved = read_checkpoint(path) if args.resume else None
    if saved is None:
        return args, None
    kept = {name: value for name, value in saved["args"].items() if parser.resume.get(name) in ("fixed", "free")}
    args = parser.parse_args(argv, argparse.Namespace(**kept))
    then = vars(parser.parse_args([])) | saved["args"]  # a flag that is newer than the run had its default value
    differ = [name for name, kind in parser.resume.items() if kind == "fixed" and getattr(args, name) != then[name]]
    if differ:
        changes = ", ".join(f"--{name} {then[name]} is now {getattr(args, name)}" for name in differ)
        raise UserError(f"work_dir {path} holds a run with other flags ({changes}): choose another work_dir")
    if (step := saved["progress"]["step"]) > args.num_train_steps:
        raise UserError(f"work_dir {path} is at step {step}, beyond --num_train_steps {args.num_train_steps}")
    return args, saved


def check_folder(args: argparse.Namespace, path: Path) -> None:
    """Raises UserError if the folder cannot be made or written, or holds a run that must not be touched."""
    if args.resume and args.overwrite:
        raise UserError("resume and overwrite exclude each other: continue the run, or start a new one?")
    check_writable(path, f"work_dir {path}")
    if (names := run_files(path)) and not args.resume and not args.overwrite:
        choice = "choose another, or --resume or --overwrite it"
        raise UserError(f"work_dir {path} holds a run already ({', '.join(names)}): {choice}")
    # A replay's chunks without an index: the index was lost, or they are another program's. A run never starts on them.
    begun = not FIRST_NAMES.issuperset(names) or any(
        re.fullmatch(CHUNK, file.name) for file in path.glob("checkpoint/*")
    )
    if args.resume and begun and not os.path.lexists(path / "checkpoint" / INDEX):
        raise UserError(
            f"work_dir {path} holds {', '.join(names)}, but {path / 'checkpoint' / INDEX} is missing: "
            "there is nothing to resume; choose another work_dir, or --overwrite it"
        )


def check_writable(folder: Path, name: str) -> None:
    """Raises UserError if the folder, which need not be there yet, cannot be made or written; `name` says which."""
    existing = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    if not existing.is_dir():
        raise UserError(f"{name} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name} cannot be written: choose another")


def run_files(path: Path) -> list[str]:
    """Which of NAMES are in a folder."""
    return [name for name in NAMES if os.path.lexists(path / name)]


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What the index of the run in a folder holds: `args`, `progress`, `logger`, `state`, `replay`. None without one.

    Raises UserError, which names the file, if it is damaged or of another version of this program.
    """
    index = path / "checkpoint" / INDEX
    if not os.path.lexists(index):
        return None
    content = read_index(index)
    if content["version"] != VERSION:
        raise UserError(
            f"{index} is of version {content['version']} of this program, which is at version {VERSION}: "
            "resume it with the commit that began it (see starts.log), or choose another work_dir"
        )
    return content


def find_models(path: Path, step: int | None) -> tuple[Path, int, dict[str, Any] | None]:
    """Folder and step of the models of `step`, or of the newest. If none were saved, the checkpoint's, and its index.

    `path` is a run's folder or a folder of models. Raises UserError if there are none.
    """
    for folder in (path / "model", path):
        found = {match.groups() for file in folder.glob("*.pt") if (match := MODEL.fullmatch(file.name))}
        # A run that was killed may have saved only some.
        needed = {"actor", "critic", *(name for name, _ in found if name == "decoder")}
        steps = {int(at) for _, at in found if {(name, at) for name in needed} <= found}
        if steps and step is not None and step not in steps:
            close = sorted(sorted(steps, key=lambda saved: abs(saved - step))[:3])
            raise UserError(f"{folder} holds no models of step {step}; close ones: {', '.join(map(str, close))}")
        if steps:
            return folder, max(steps) if step is None else step, None
    if (saved := read_checkpoint(path)) and step in (None, saved["progress"]["step"]):
        return path / "checkpoint", saved["progress"]["step"], saved
    wanted = "" if step is None else f" of step {step}"
    raise UserError(f"{path} holds no models{wanted} (actor_STEP.pt, ...): train.py writes them with --save_model")


def load_agent(agent: Any, path: Path, saved: dict[str, Any]) -> dict[str, Tensor]:
    """Loads the agent of a run's checkpoint. Returns the states of the random generators that belong to it.

    Raises UserError, which names the file, if it is missing, damaged or of another agent.
    """
    name, crc32 = saved["state"]
    file = path / "checkpoint" / name
    content = read_tensors(file, crc32, agent.device)
    try:
        agent.load_state_dict(content["agent"])
    except UserError as error:
        raise UserError(f"{file} is of another agent than this code's: {error}") from error
    return content["random"]


class Run:
    """What the training loop works on. `open` starts or restores the run; before that nothing is written."""

    logger: Any
    video: Any
    obs: np.ndarray
    episode_start: float  # by time.perf_counter: when the episode would have begun if the run had never stopped

    def __init__(self, args: argparse.Namespace, env: Any, agent: Any, replay: Any, eval_envs: Any):
        self.args, self.env, self.agent, self.replay, self.eval_envs = args, env, agent, replay, eval_envs
        self.work_dir = Path(args.work_dir)
        self.checkpoint_dir = self.work_dir / "checkpoint"
        self.progress, self.stop = Progress(), Stop()
        self._saved = (time.monotonic(), 0)  # when the last checkpoint was written or read, and its step
        self._chunks: Sequence[Sequence[Any]] = []  # of the replay, in the last checkpoint

    def open(self, saved: dict[str, Any] | None, lock: Lock, make_logger: Callable[..., Any]) -> list[str]:
        """Starts a new run if `saved` is None, else restores the checkpoint of this index. Returns lines to print.

        `make_logger` takes the `state` of the logger before; None if there was none. Raises UserError if the checkpoint
        cannot be used, and nothing has been changed then, or if the folder cannot be written.
        """
        lock.take(self.work_dir)
        if saved is None:
            lines = self._make_room()
            self.logger = make_logger(state=None)
            self.save_checkpoint()
        else:
            self._restore(saved)
            self.logger = make_logger(state=saved["logger"])  # cuts lines that were written after the checkpoint
            # The next start finds changed flags, even if this one is killed.
            now = {"args": vars(self.args), "progress": vars(self.progress), "threads": torch.get_num_threads()}
            self._write_index(saved | now)
            lines = self._describe_changes(saved)
        write_json(self.work_dir / "args.json", dict(sorted(vars(self.args).items())))
        start = report.provenance(self.agent.device) | {"step": self.progress.step}
        with writing(self.work_dir / "starts.log"), (self.work_dir / "starts.log").open("a") as file:
            file.write(json.dumps(start) + "\n")
        return lines

    def _make_room(self) -> list[str]:
        """Moves an old run's files to a folder beside this one, or in this one if it is a mount; lines to print."""
        if self.args.overwrite and (names := run_files(self.work_dir)):
            here = self.work_dir.resolve()
            beside = here if here.is_mount() else here.parent  # on the same disk
            there = beside / f"{here.name}.{time.strftime('%Y%m%d-%H%M%S')}"
            with writing(there):
                there.mkdir()
                for name in reversed(names):  # the checkpoint first: without it the rest is not taken for a run
                    (here / name).rename(there / name)
            # At once: what follows may fail.
            report.show(f"moved the run that was in {self.work_dir} to {there}: {', '.join(names)}")
            return []
        if not FIRST_NAMES.issuperset(run_files(self.work_dir)):  # another process has begun one since `parse_run`
            raise UserError(f"work_dir {self.work_dir} holds a run already: choose another")
        return [f"no run in {self.work_dir} yet: it begins"] if self.args.resume else []

    def _restore(self, saved: dict[str, Any]) -> None:
        """Restores the checkpoint. Raises UserError if a file is missing, damaged or foreign."""
        device, dtype = self.agent.device, self.env.action_space.dtype
        random = load_agent(self.agent, self.work_dir, saved)
        self.replay.load_chunks(self.checkpoint_dir, saved["replay"])
        torch.set_rng_state(random["cpu"].cpu())
        if "cuda" in random and device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), device)
        self.progress = progress = Progress(**saved["progress"])
        self._saved = (time.monotonic(), progress.step)
        progress.actions = [np.asarray(action, dtype) for action in progress.actions]
        progress.action = None if progress.action is None else np.asarray(progress.action, dtype)
        if saved["args"]["eval_freq"] != self.args.eval_freq and not progress.evaluation_due():
            progress.plan_evaluation(self.args.eval_freq)

    def _describe_changes(self, saved: dict[str, Any]) -> list[str]:
        """What has changed since the checkpoint, and where the run continues."""
        then, now, step = saved["args"], vars(self.args), self.progress.step
        names = sorted(then.keys() & now.keys() - {"work_dir", "resume", "overwrite"})
        lines = [f"note: --{name} was {then[name]} and is now {now[name]}" for name in names if then[name] != now[name]]
        before, threads = saved.get("threads"), torch.get_num_threads()
        if before not in (None, threads):
            lines.append(
                f"note: PyTorch had {before} threads and now has {threads} (OMP_NUM_THREADS): sums are rounded "
                "differently, so the run will differ from one that never stopped"
            )
        ended = f"the run has ended at step {step}: more --num_train_steps would take it further"
        return [*lines, ended if self.progress.ended(self.args.num_train_steps) else f"resuming at step {step}"]

    def begin_episode(self) -> None:
        """Sets `obs` to an episode's first observation, or to that of an interrupted one, whose actions are repeated.

        If the environment does not repeat its episodes under the same seed, this prints a line, and the episode begins
        anew.
        """
        progress, seed = self.progress, seed_of(self.args.seed, "training", self.progress.episode)
        self.obs, _ = self.env.reset(seed=seed)
        for action in progress.actions:
            self.obs, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                break
        if progress.obs_crc not in (None, zlib.crc32(self.obs.tobytes())):
            report.say(
                "warning: the episode under way begins anew, and the run will differ from one that never stopped: the "
                "environment does not repeat its episodes under the same seed, or this processor or renderer rounds "
                "differently from the one before"
            )
            progress.actions, progress.action, progress.episode_return, progress.seconds = [], None, 0.0, 0.0
            self.obs, _ = self.env.reset(seed=seed)
        progress.obs_crc = None
        self.episode_start = time.perf_counter() - progress.seconds

    def note_time(self) -> None:
        """Notes how long the episode under way has taken, if there is one."""
        if self.progress.under_way():
            self.progress.seconds = time.perf_counter() - self.episode_start

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due; never within an episode."""
        args, step, (last_time, last_step) = self.args, self.progress.step, self._saved
        old = time.monotonic() - last_time >= 60 * args.checkpoint_minutes
        old = old or (args.checkpoint_freq is not None and step - last_step >= args.checkpoint_freq)
        return not self.progress.actions and step > last_step and old

    def save_checkpoint(self) -> None:
        """Writes a checkpoint: of the replay what is new, tensors, then the index, which makes it the run's.

        Raises UserError if that fails; the one before it is good until then.
        """
        progress, device = self.progress, self.agent.device
        progress.obs_crc = zlib.crc32(self.obs.tobytes()) if progress.under_way() else None
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        replay, state = self.replay.save_chunks(self.checkpoint_dir, self._chunks), f"state_{time.time_ns()}.pt"
        crc32 = write_tensors(self.checkpoint_dir / state, {"agent": self.agent.state_dict(), "random": random})
        run = {"args": vars(self.args), "progress": vars(progress), "threads": torch.get_num_threads()}
        files = {"logger": self.logger.state(), "replay": replay, "state": (state, crc32)}
        self._write_index({"version": VERSION} | run | files)
        self._saved = (time.monotonic(), progress.step)

    def _write_index(self, content: dict[str, Any]) -> None:
        """Makes a checkpoint the run's, and removes the files of others, also of those that failed."""
        write_index(self.checkpoint_dir / INDEX, content)
        self._chunks = content["replay"]["chunks"]
        keep = {content["state"][0], *(chunk[0] for chunk in self._chunks)}
        with writing(self.checkpoint_dir):
            for path in self.checkpoint_dir.iterdir():
                if path.name not in keep and FILES.fullmatch(path.name) and not path.is_dir():
                    path.unlink(missing_ok=True)
