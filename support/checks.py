"""Checks of flags, machine and environment before a run writes anything; the flags of a resumed run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from errors import UserError
from randomness import random_action
from support.flags import OneLineParser
from support.machine import check_bf16, check_compiler, check_device, check_ffmpeg
from support.work_dir import WorkDir


def parse(parser: OneLineParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags in force: a resumed run keeps those that are not given, except the machine's.

    Raises UserError if there is a run to resume, but its checkpoint cannot be read.
    """
    args = parser.parse_args(argv)
    checkpoint = WorkDir(Path(args.work_dir)).checkpoint
    if not (args.resume and args.work_dir and checkpoint.begun()):
        return args
    given, then = parser.given(argv), checkpoint.read()["args"]
    for name, kind in parser.resume.items():
        if kind in ("fixed", "free") and name not in given and name in then:
            setattr(args, name, then[name])
    return args


def check(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Refuses invalid combinations of flags. Raises UserError, which says what to do."""
    if args.replay_buffer_capacity < args.batch_size:
        raise UserError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    if not args.work_dir:
        raise UserError("work_dir is empty: name a folder")
    if args.resume and args.overwrite:
        raise UserError("resume and overwrite exclude each other: continue the run, or start a new one?")
    if args.save_tb and args.work_dir.encode("utf-8", "replace") != os.fsencode(args.work_dir):
        raise UserError(f"work_dir {args.work_dir} is not UTF-8, and TensorBoard cannot read it: leave save_tb out")
    check_device(args.device)
    work_dir = WorkDir(Path(args.work_dir))
    work_dir.check(args.resume, args.overwrite)
    if args.resume and work_dir.checkpoint.begun():
        check_resumed(args, parser, work_dir)
    # A checkpoint of a run in bfloat16 may continue anywhere: its precision cannot change.
    if args.precision == "bf16" and not (args.resume and work_dir.checkpoint.exists()):
        check_bf16(torch.device(args.device), args.num_filters if args.encoder_type == "pixel" else 0, args.hidden_dim)
    if args.compile:
        check_compiler(args.device)
    if args.save_video:
        check_ffmpeg("save_video")


def try_out(env: Any, args: argparse.Namespace, renderer_of: Callable[..., Any]) -> tuple[str, bool] | None:
    """Plays the first decisions in a spare environment: what fails there must fail before anything is written.

    Returns:
        The renderer, and whether it is software on the CPU; None if the environment is not a Control Suite task.
    """
    check_spaces(env)
    env.reset(seed=args.seed)
    for step in range(3):
        env.step(random_action(env.action_space, args.seed, step))
    drawn = args.encoder_type == "pixel" or args.save_video
    if drawn and (args.save_video or args.save_tb):
        check_picture(env)
    return renderer_of(env, drawn)


def check_spaces(env: Any) -> None:
    """Refuses an environment that the agent cannot learn in."""
    shape, dtype, actions = env.observation_space.shape, env.observation_space.dtype, env.action_space
    if len(shape) not in (1, 3) or (len(shape) == 3 and dtype != np.uint8):
        raise UserError(f"observations must be states (D,) or uint8 pixels (C, H, W), not {dtype} of shape {shape}")
    box = len(actions.shape or ()) == 1 and hasattr(actions, "low")
    if not box or (actions.low != -1).any() or (actions.high != 1).any():
        raise UserError(f"actions must be a Box (A,) from -1 to 1, not {actions}: rescale them in a wrapper")


def check_picture(env: Any) -> None:
    """Refuses videos of an environment that cannot draw."""
    try:
        picture = env.render()
    except NotImplementedError:
        picture = None
    if np.ndim(picture) != 3:
        raise UserError("the environment's render() gives no picture (H, W, 3): videos cannot be made of it")


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
