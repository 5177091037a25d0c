"""Checks of a run's flags before it writes anything; the flags of a resumed run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from support.flags import OneLineParser
from support.machine import check_bf16, check_compiler, check_device
from support.work_dir import WorkDir


def parse_run(parser: OneLineParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a run: a resumed one keeps those that are not given, except the machine's.

    Raises UserError if there is a run to resume, but its checkpoint cannot be read.
    """
    args = parser.parse_args(argv)
    checkpoint = WorkDir(Path(args.work_dir)).checkpoint
    if args.resume and checkpoint.begun():
        then = checkpoint.read()["args"].items()
        kept = {name: value for name, value in then if parser.resume.get(name) in ("fixed", "free")}
        args = parser.parse_args(argv, argparse.Namespace(**kept))
    return args


def check_run(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Refuses flags that contradict each other, the folder or the machine. Raises UserError, which says what to do."""
    if args.replay_buffer_capacity < args.batch_size:
        raise UserError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    if args.resume and args.overwrite:
        raise UserError("resume and overwrite exclude each other: continue the run, or start a new one?")
    if args.save_tb and args.work_dir.encode("utf-8", "replace") != os.fsencode(args.work_dir):
        raise UserError(f"work_dir {args.work_dir} is not UTF-8, and TensorBoard cannot read it: leave save_tb out")
    check_device(args.device)
    work_dir = WorkDir(Path(args.work_dir))
    work_dir.check(args.resume, args.overwrite)
    if os.path.lexists(work_dir.path / ".lock"):
        work_dir.lock().close()  # a run that is under way must be named before the lack of memory that it causes
    if args.resume and work_dir.checkpoint.begun():
        check_resumed(args, parser, work_dir)
    # A checkpoint of a run in bfloat16 may continue anywhere: its precision cannot change.
    if args.precision == "bf16" and not (args.resume and work_dir.checkpoint.exists()):
        check_bf16(args.device, args.num_filters, args.hidden_dim)
    if args.compile:
        check_compiler(args.device)


def check_resumed(args: argparse.Namespace, parser: OneLineParser, work_dir: WorkDir) -> None:
    """Raises UserError if the run in the folder was started with other fixed flags, or is beyond its end."""
    # A flag that is newer than the run had its default value.
    content = work_dir.checkpoint.read()
    now, then = vars(args), vars(parser.parse_args([])) | content["args"]
    differ = [name for name, kind in parser.resume.items() if kind == "fixed" and now[name] != then[name]]
    if differ:
        changes = ", ".join(f"--{name} {then[name]} is now {now[name]}" for name in differ)
        raise UserError(f"work_dir {work_dir.path} holds a run with other flags ({changes}): choose another work_dir")
    step, limit = content["progress"]["step"] if content["progress"] else 0, args.num_train_steps
    if step > limit:
        raise UserError(f"work_dir {work_dir.path} is at step {step}, beyond --num_train_steps {limit}")


def changes(args: argparse.Namespace, parser: OneLineParser, then: dict[str, object]) -> list[str]:
    """Lines about free and machine flags whose values a resumed run changes."""
    noted = sorted(name for name, kind in parser.resume.items() if kind in ("free", "machine"))
    pairs = {name: (then.get(name), getattr(args, name)) for name in noted}
    return [f"note: --{name} was {old} and is now {new}" for name, (old, new) in pairs.items() if old != new]
