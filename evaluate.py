"""Plays episodes with the models that a run has saved: `python evaluate.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

import train
from errors import UserError
from files import read_json
from settings import Count, Precision
from support import report
from support.evaluation import MAX_ENVS, SideBySide, play
from support.flags import OneLineParser, number, user_path
from support.machine import check_bf16, check_device, cores, try_out
from support.signals import Stop, Stopped
from support.work_dir import Checkpoint, check_folder
from video import write_video

MODEL_FILE = re.compile(r"(?:actor|critic|decoder|target)_([0-9]+)\.pt")
PANEL = 256  # height and width of each of a video's pictures


def make_parser() -> OneLineParser:
    """The command line. Flags of train.py may follow."""
    parser = OneLineParser(
        description="Plays episodes with saved models, acting by the policy's mean, and prints their returns.",
        epilog="Flags of train.py override those in the run's args.json. Without that file, add the run's flags.",
    )
    parser.add_argument("work_dir", type=user_path, help="a run's folder, or a folder of models")
    add = parser.section("what to play")
    add("step", number(int, 0), None, "decisions after which the models were saved; without it the newest")
    add("episodes", Count, 10, "episodes to play, up to ten side by side")
    add("seed", number(int, 0, 2**32 - 1), 1_000_000, "seed of the episodes, unlike those of training")
    add("video", user_path, None, "new mp4 file for a video of the first episode")
    add("eval_workers", Count, cores(), "processes for evaluation, at most one per episode; 1: no extra process")
    add("device", str, "cuda" if torch.cuda.is_available() else "cpu", "device of the networks")
    add("precision", Precision | None, None, "precision of layers; without it the run's")
    return parser


def find_models(work_dir: Path, step: int | None) -> tuple[Path, int]:
    """Folder and step of a run's models: those of `step`, or the newest; where none were saved, the checkpoint.

    Raises UserError if there are none.
    """
    if not work_dir.is_dir():
        raise UserError(
            f"{work_dir} is not a folder: first name a run's folder, or a folder of models; flags come after it"
        )
    checkpoint = Checkpoint(work_dir / "checkpoint")
    for folder in (work_dir / "model", work_dir, checkpoint.folder):
        steps = {int(match[1]) for path in folder.glob("*") if (match := MODEL_FILE.fullmatch(path.name))}
        if folder == checkpoint.folder and checkpoint.exists():
            steps = {checkpoint.read()["progress"]["step"]}
        if steps and step is not None and step not in steps:
            close = sorted(sorted(steps, key=lambda held: abs(held - step))[:3])
            raise UserError(f"{folder} holds no models of step {step}; close ones: {', '.join(map(str, close))}")
        if steps:
            return folder, max(steps) if step is None else step
    raise UserError(f"{work_dir} holds no models (actor_STEP.pt, ...): train.py writes them with --save_model")


def args_file(work_dir: Path) -> Path | None:
    """The run's args.json: in its folder, also if `work_dir` is the folder `model` in it. None if there is none."""
    folder = work_dir.absolute()
    folders = [folder, folder.parent] if folder.name == "model" else [folder]
    return next((path for path in (folder / "args.json" for folder in folders) if path.exists()), None)


def training_flags(work_dir: Path, words: list[str]) -> argparse.Namespace:
    """The flags that the models were trained with: those of the run's args.json, if there is one, and `words`.

    Raises UserError if args.json is not from train.py.
    """
    parser, path = train.make_parser(), args_file(work_dir)
    flags = parser.parse_args(words)
    if path is None:
        return flags

    def fail(message: str) -> NoReturn:
        raise UserError(f"{path} is damaged: {message}")

    content, parser.error = read_json(path), fail  # type: ignore[method-assign]
    if not isinstance(content, dict):
        fail("it holds no flags")
    fixed = {name: value for name, value in content.items() if parser.resume.get(name) == "fixed" and value is not None}
    held = [f"--{name}={value}" for name, value in fixed.items() if not isinstance(value, bool)]
    held += [f"--{name}" if value else f"--no-{name}" for name, value in fixed.items() if isinstance(value, bool)]
    return parser.parse_args([*held, *words])


def check_video(path: Path) -> None:
    """Raises UserError if a video cannot be written there."""
    if path.suffix != ".mp4":
        raise UserError(f"video {path} must end in .mp4")
    if os.path.lexists(path):
        raise UserError(f"video {path} exists already: choose another, or move it away")
    check_folder(path.parent, f"the folder of video {path}")


class Evaluation:
    """Saved models with their environments. `words` are flags of train.py.

    Raises UserError if what is asked for cannot be had; nothing has been written.
    """

    def __init__(self, args: argparse.Namespace, words: list[str]):
        self.folder, self.step = find_models(Path(args.work_dir), args.step)
        self.flags = flags = training_flags(Path(args.work_dir), words)
        check_device(args.device)
        if args.precision == "bf16":  # that of the run was good where it was trained
            check_bf16(args.device, flags.num_filters, flags.hidden_dim)
        self.video = None if args.video is None else Path(args.video)
        if self.video is not None:
            check_video(self.video)
        flags.device, flags.precision = args.device, args.precision or flags.precision
        flags.save_video, flags.save_tb = self.video is not None, False
        make_env = partial(train.make_env, flags, flags.seed)
        with contextlib.closing(make_env()) as env:
            try_out(env, flags)
            self.agent = train.make_agent(flags, env.observation_space.shape, env.action_space.shape)
        try:
            if (self.folder / "checkpoint.json").exists():
                self.agent.load_state_dict(Checkpoint(self.folder).tensors(self.agent.device)["agent"])
            else:
                self.agent.load(self.folder, self.step)
        except UserError as error:
            known, hint = args_file(Path(args.work_dir)), ""
            if known is None:
                hint = "; without an args.json give the flags that it was trained with"
            elif words:
                hint = f"; the flags given replace those of {known}"
            raise UserError(f"{error}{hint}") from error
        self.agent.train(False)
        self.seeds = [episode_seed(args.seed, episode) for episode in range(args.episodes)]
        self.envs, self.stop = SideBySide(make_env, min(args.episodes, MAX_ENVS), args.eval_workers), Stop()
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []  # scene and observation

    def play(self) -> np.ndarray:
        """Plays the episodes and keeps what a video needs of the first one; their returns (N,).

        Raises:
            UserError: an action is NaN or infinite, or an environment's process has died.
            Stopped: a signal has asked for it.
        """
        for moment in report.progress(play(self.envs, self.seeds, self.act), "evaluation"):
            self.stop.check()
            if self.video is not None and moment.first_moved:
                self.seen.append((self.envs.render(), moment.obs[0].copy()))
        for episode, error in moment.physics_errors.items():
            report.warn_of_divergence(f"episode {episode}, decision {moment.lengths[episode]}", error)
        return moment.returns

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        actions = self.agent.select_actions(obs)
        if not np.isfinite(actions).all():
            raise UserError(f"the policy's action is NaN or infinite: the models of step {self.step} have diverged")
        return actions

    def frames(self) -> Iterator[np.ndarray]:
        """The pictures (H, W, 3): the scene and, of pixels, the newest observed frame and its reconstruction."""
        for scene, obs in self.seen:
            self.stop.check()
            stacks = [obs] if self.flags.encoder_type == "pixel" else []
            if self.agent.decoder is not None:
                stacks.append(self.agent.reconstruct(obs[None])[0])
            pictures = [scene, *(stack[-3:].transpose(1, 2, 0) for stack in stacks)]
            yield np.concatenate([scaled(picture) for picture in pictures], axis=1)


def episode_seed(seed: int, episode: int) -> int:
    """Seed of an episode. Its formula is fixed: with `seed_of` the same --seed would select other episodes."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def scaled(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with PANEL pixels a side, each of its pixels the nearest one."""
    rows, columns = (np.arange(PANEL) * side // PANEL for side in picture.shape[:2])
    return picture[rows][:, columns]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    with report.one_line(parser.error):
        evaluation = Evaluation(args, words)
    envs, stop = evaluation.envs, evaluation.stop
    with report.one_line(parser.complain), contextlib.closing(envs), stop.listen():
        try:
            report.show(f"models: {evaluation.folder}, step {evaluation.step}")
            returns = evaluation.play()
            for episode, (seed, value) in enumerate(zip(evaluation.seeds, returns, strict=True)):
                report.show(f"episode {episode}, seed {seed}: return {value:.4f}")
            report.show(f"mean {returns.mean():.4f}, standard deviation {returns.std():.4f}")
            if evaluation.video is not None:
                write_video(evaluation.video, evaluation.frames(), overwrite=False)
                report.show(f"video: {evaluation.video}")
        except Stopped:
            return stop.exit_status(parser.prog)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
