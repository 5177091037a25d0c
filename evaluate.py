"""Plays episodes with the models that a run has saved: `python evaluate.py --help`."""

from __future__ import annotations

import signal

import streams

if __name__ == "__main__":
    streams.mend()
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # As in train.py: until episodes begin an interrupt just ends the program, imports included.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import dmc2gym
import train  # before whatever else imports PyTorch: it sets how that one's threads wait
from checkpoint import Checkpoint
from environment import make_env
from evaluation import MAX_ENVS, SideBySide, WorkerError, play
from flags import OneLineParser, number, user_path
from sac_ae import SacAeAgent
from signals import hear_interrupts
from video import write_video

# Flags of train.py that a model rests on: the environment it was trained in, and its networks.
MODEL_FLAGS = (
    *("domain_name", "task_name", "image_size", "action_repeat", "frame_stack"),
    *("hidden_dim", "actor_log_std_min", "actor_log_std_max", "encoder_type", "encoder_feature_dim"),
    *("decoder_type", "num_layers", "num_filters"),
)
MODEL_FILE = re.compile(r"(?:actor|critic|decoder|target)_([0-9]+)\.pt")
PANEL = 256  # height and width of each of a video's pictures


class NonFiniteActionError(ArithmeticError):
    """The policy's action is NaN or infinite."""


def make_parser() -> OneLineParser:
    """The command line. Flags of train.py are taken from there; those in MODEL_FLAGS are absent unless given."""
    parser = OneLineParser(
        description="Plays episodes with saved models, acting by the policy's mean, and prints their returns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flags = {action.dest: action for action in train.make_parser()._actions}

    def add(group: Any, name: str, text: str, default: Any) -> None:
        flag = flags[name]
        group.add_argument(f"--{name}", type=flag.type, choices=flag.choices, default=default, help=text)

    parser.add_argument("work_dir", type=user_path, help="a run's folder, or a folder of models")
    parser.add_argument("--step", type=number(int, 0), help="decisions after which they were saved; None: newest")
    parser.add_argument("--episodes", type=train.COUNT, default=10, help="episodes to play, up to ten side by side")
    add(parser, "seed", "of the episodes; the same ones for every model, and not those of training", 1_000_000)
    parser.add_argument("--video", type=user_path, help="an mp4 of the first episode, which must not exist yet")
    for name in ("eval_workers", "device"):
        add(parser, name, flags[name].help or "", flags[name].default)
    add(parser, "precision", "of layers; None is the run's", None)
    group = parser.add_argument_group(
        "what the models were trained with",
        "Not needed where the run's args.json says it; without one, as in train.py.",
    )
    for name in MODEL_FLAGS:
        add(group, name, f"{flags[name].help} (without args.json: {flags[name].default})", argparse.SUPPRESS)
    return parser


def find_models(work_dir: Path, step: int | None) -> tuple[Path, int]:
    """Folder and step of a run's models: those of `step`, or the newest; where none were saved, the checkpoint.

    Args:
        work_dir: the run's folder, or the one that holds the models.
        step: decisions; None chooses.

    Raises:
        ValueError: there are none.
    """
    if not work_dir.is_dir():
        raise ValueError(f"{work_dir} is no folder: name that of a run, or one of models")
    for folder in (work_dir / "model", work_dir):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        steps = {int(match[1]) for match in map(MODEL_FILE.fullmatch, names) if match}
        if step in steps:
            return folder, step
        if steps and step is not None:
            close = sorted(sorted(steps, key=lambda held: abs(held - step))[:3])
            raise ValueError(f"{folder} holds no models of step {step}; close ones: {', '.join(map(str, close))}")
        if steps:
            return folder, max(steps)
    checkpoint = Checkpoint(work_dir / "checkpoint")
    if not checkpoint.exists():
        raise ValueError(f"{work_dir} holds no models (actor_STEP.pt, ...): train.py writes them with --save_model")
    if step not in (None, checkpoint.step()):
        raise ValueError(f"{work_dir} holds no models of step {step}, only a checkpoint of step {checkpoint.step()}")
    return checkpoint.folder, checkpoint.step()


def find_flags(work_dir: Path, folder: Path) -> Path | None:
    """The args.json of the run whose models are in `folder`, if there is one."""
    places = [work_dir, folder] + ([folder.absolute().parent] if folder.absolute().name == "model" else [])
    return next((place / "args.json" for place in places if (place / "args.json").exists()), None)


def training_flags(args: argparse.Namespace, path: Path | None) -> argparse.Namespace:
    """What train.py's command line was for these models, as far as it matters here.

    Args:
        args: this program's flags.
        path: the run's args.json; without one the flags given here count, and train.py's defaults.

    Raises:
        ValueError: the file is none of train.py's, or says otherwise than a flag given here.
    """
    given = {name: value for name, value in vars(args).items() if name in MODEL_FLAGS}
    parser = train.make_parser()
    parser.exit_on_error = False
    # The seed is in it for the sake of LQR, whose springs are drawn when a task is made.
    held = {} if path is None else read_flags(path, (*MODEL_FLAGS, "seed", "precision"))
    try:
        flags = parser.parse_args([f"--{name}={value}" for name, value in held.items()])
    except argparse.ArgumentError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    denied = [name for name in given if name in held and given[name] != getattr(flags, name)]
    if denied:
        named = ", ".join(f"--{name} {given[name]} (there {getattr(flags, name)})" for name in denied)
        raise ValueError(f"{path} says otherwise than {named}: leave that out")
    for name, value in given.items():
        setattr(flags, name, value)
    flags.device, flags.precision = args.device, args.precision or flags.precision
    return flags


def read_flags(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The named flags in an args.json, those without a value left out; ValueError if it is no such file."""
    try:
        held = json.loads(path.read_text())
        return {name: held[name] for name in names if held.get(name) is not None}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not what train.py writes") from error


def check_video(path: Path) -> None:
    """Raises ValueError if a video cannot be written there."""
    if path.suffix != ".mp4":
        raise ValueError(f"video {path} must end in .mp4")
    if path.exists() or path.is_symlink():
        raise ValueError(f"video {path} exists already: choose another, or move it away")
    train.check_folder(path.parent, f"the folder of video {path}")
    train.check_ffmpeg("video")


class Evaluation:
    """Saved models and the environments that they play in.

    Making one writes nothing; `play` and `write_video` follow in this order.

    Args:
        args: of `make_parser`.

    Raises:
        ValueError, OSError, WorkerError, dmc2gym.RendererError: what is asked for cannot be had; the message is one
            for the user.
    """

    def __init__(self, args: argparse.Namespace):
        if not args.work_dir:
            raise ValueError("work_dir is empty: name a folder")
        self.folder, self.step = find_models(Path(args.work_dir), args.step)
        flags_path = find_flags(Path(args.work_dir), self.folder)
        self.flags = training_flags(args, flags_path)
        train.check_task_and_networks(self.flags)
        train.check_device(args.device)
        if args.precision is not None:  # that of the run was good where it was trained
            train.check_precision(self.flags)
        self.video = None if args.video is None else Path(args.video)
        if self.video is not None:
            check_video(self.video)
        self.agent = self.make_agent()
        try:
            if (self.folder / "checkpoint.json").exists():
                self.agent.load_state_dict(Checkpoint(self.folder).tensors(self.agent.device)["agent"])
            else:
                self.agent.load(self.folder, self.step)
        except ValueError as error:
            hint = "" if flags_path else "; without args.json give the flags that it was trained with"
            raise ValueError(f"{error}{hint}") from error
        self.seeds = [episode_seed(args.seed, episode) for episode in range(args.episodes)]
        self.envs = SideBySide(
            functools.partial(make_env, self.flags, self.flags.seed), min(args.episodes, MAX_ENVS), args.eval_workers
        )
        self.scenes: list[np.ndarray] = []
        self.observations: list[np.ndarray] = []

    def make_agent(self) -> SacAeAgent:
        """An agent for the task, after a look at whether that can be played, and drawn where it must be."""
        env = make_env(self.flags, self.flags.seed)
        self.camera_id = env.unwrapped.camera_id
        train.try_out(env, drawn=self.flags.encoder_type == "pixel" or self.video is not None)
        return train.make_agent(self.flags, env.observation_space.shape, env.action_space.shape)

    def play(self) -> np.ndarray:
        """Plays the episodes and keeps what a video needs of the first one; their returns (N,).

        Raises:
            NonFiniteActionError: an action is NaN or infinite.
            WorkerError, dmc2gym.RendererError: an environment has failed.
        """
        moments = play(self.envs, self.seeds, self.act)
        for moment in train.with_progress(moments, len(self.seeds), self.flags.action_repeat):
            if self.video is not None and moment.first_moved:
                self.scenes.append(self.envs.render(height=PANEL, width=PANEL, camera_id=self.camera_id))
                self.observations.append(moment.obs[0].copy())
        for episode, error in moment.physics_errors.items():
            train.warn_of_divergence(f"episode {episode}, decision {moment.lengths[episode]}", error)
        return moment.returns

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        actions = self.agent.select_actions(obs)
        if not np.isfinite(actions).all():
            raise NonFiniteActionError(
                f"the policy's action is no number: the models of step {self.step} have diverged"
            )
        return actions

    def frames(self) -> Iterator[np.ndarray]:
        """The pictures (H, W, 3): the scene and, of pixels, the newest observed frame and its reconstruction."""
        for scene, obs in zip(self.scenes, self.observations, strict=True):
            panels = [scene]
            if self.flags.encoder_type == "pixel":
                panels.append(scaled_up(obs[-3:]))
            if self.agent.decoder is not None:
                panels.append(scaled_up(self.agent.reconstruct(obs[None])[0, -3:]))
            yield np.concatenate(panels, axis=1)

    def write_video(self) -> None:
        """Writes the first episode, if a video is asked for.

        Raises:
            OSError: it cannot be written; the message is a line.
        """
        if self.video is None:
            return
        try:
            write_video(self.video, self.frames(), overwrite=False)
        except OSError as error:  # ffmpeg's has many lines
            raise OSError(f"video {self.video} cannot be written: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Frees the environments."""
        self.envs.close()


def episode_seed(seed: int, episode: int) -> int:
    """Seed of an episode, which depends on no other one."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def scaled_up(frame: np.ndarray) -> np.ndarray:
    """A frame (3, H, W) as a picture (PANEL, PANEL, 3), each of its pixels the nearest one."""
    rows, columns = (np.arange(PANEL) * side // PANEL for side in frame.shape[1:])
    return frame[:, rows][:, :, columns].transpose(1, 2, 0)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with train.refusals(parser):
        evaluation = Evaluation(args)
    hear_interrupts()
    try:
        print(f"models: {evaluation.folder}, step {evaluation.step}", flush=True)
        returns = evaluation.play()
        for episode, (seed, value) in enumerate(zip(evaluation.seeds, returns, strict=True)):
            print(f"episode {episode}, seed {seed}: return {value:.4f}")
        print(f"mean {returns.mean():.4f}, standard deviation {returns.std():.4f}", flush=True)
        evaluation.write_video()
        if evaluation.video is not None:
            print(f"video: {evaluation.video}")
    except (NonFiniteActionError, dmc2gym.RendererError, WorkerError, OSError) as error:
        return train.failure(parser, error)
    except KeyboardInterrupt:
        return train.interruption(parser)
    finally:
        evaluation.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
