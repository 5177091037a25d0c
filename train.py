"""Trains SAC+AE on a Control Suite task: `python train.py --help`."""

from __future__ import annotations

import os
import signal

import streams

if __name__ == "__main__":
    streams.mend()
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Until training begins there is nothing to clean up: an interrupt just ends the program, imports included.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# PyTorch's threads (libgomp) spin for milliseconds while they wait for each other. On a busy machine that doubles the
# time of an update; a shorter spin costs nothing on an idle one. Read when torch is imported.
# https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import difflib
import functools
import importlib.metadata
import inspect
import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import dmc2gym
import ownership
from checkpoint import Checkpoint, random_states, set_random_states, set_torch_random_states, torch_random_states
from cuda_graph import GraphedAgent
from encoder import conv_output_shape
from environment import EPISODE_LENGTH, make_env
from evaluation import MAX_ENVS, Moment, SideBySide, WorkerError, play
from files import lock, naming, write_json
from flags import OneLineParser, number, user_path
from logger import Logger, NonFiniteLossError, cut_logs
from memory import place_replay
from pace import Pace
from precision import check_bf16
from sac_ae import SacAeAgent
from signals import asked_to_stop
from utils import ReplayBuffer, make_dir, set_seed_everywhere
from video import VideoRecorder

# Action repeats of the published results (paper, table 2).
PUBLISHED_REPEATS = {
    ("cartpole", "swingup"): 8,
    ("reacher", "easy"): 4,
    ("cheetah", "run"): 4,
    ("ball_in_cup", "catch"): 4,
    ("finger", "spin"): 2,
    ("walker", "walk"): 2,
}
# What a run writes into its work_dir; if any of it is there, the folder belongs to a run.
RUN_FILES = (*ownership.LOGS, *ownership.FOLDERS)
# Flags that may be others when a run is resumed; all else would make it another run.
CHANGEABLE = {
    *("work_dir", "resume", "overwrite", "num_train_steps", "eval_freq", "eval_workers", "device", "replay_device"),
    *("checkpoint_minutes", "checkpoint_freq", "cuda_graph", "save_tb", "save_model", "save_buffer", "save_video"),
}
UNNOTED = {"work_dir", "resume", "overwrite"}
# Flags whose defaults are the machine's, and not taken over from where the run began.
LOCAL = {"device", "eval_workers"}


COUNT = number(int, 1)
RATE = number(float, 0, exclusive=True)  # learning rates, temperature
BETA = number(float, 0, 0.9999999)  # of Adam: below 1
FRACTION = number(float, 0, 1)
WEIGHT = number(float, 0)
ANY = number(float, -math.inf, math.inf)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parser() -> OneLineParser:
    """The command line; each flag with a help text and its default."""
    parser = OneLineParser(
        description="Trains SAC+AE, SAC:pixel (--decoder_type identity) or SAC:state (both types identity).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("environment")
    group.add_argument("--domain_name", default="cheetah", help="domain of the Control Suite")
    group.add_argument("--task_name", default="run", help="task of the domain")
    group.add_argument("--image_size", type=COUNT, default=84, help="height and width of observed pixels, even")
    group.add_argument(
        "--action_repeat",
        type=number(int, 1, EPISODE_LENGTH),
        default=1,
        help="environment steps a decision lasts",
    )
    group.add_argument("--frame_stack", type=number(int, 1, 100), default=3, help="frames in an observation")

    group = parser.add_argument_group("replay")
    group.add_argument("--replay_buffer_capacity", type=COUNT, default=1_000_000, help="transitions it holds at most")
    group.add_argument(
        "--replay_device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="where frames lie: auto takes the GPU if they fit, else host memory",
    )

    group = parser.add_argument_group("training (steps are decisions: environment steps / action_repeat)")
    group.add_argument("--agent", choices=["sac_ae"], default="sac_ae", help="the method")
    group.add_argument(
        "--init_steps",
        type=COUNT,
        default=1000,
        help="decisions at random before the first update; then as many updates",
    )
    group.add_argument("--num_train_steps", type=COUNT, default=1_000_000, help="decisions in all")
    group.add_argument("--batch_size", type=COUNT, default=128, help="transitions in an update")
    group.add_argument("--hidden_dim", type=COUNT, default=1024, help="units of the hidden layers of actor and critic")
    group.add_argument("--discount", type=FRACTION, default=0.99, help="discount per decision")
    group.add_argument("--init_temperature", type=RATE, default=0.1, help="alpha at the start")
    group.add_argument("--alpha_lr", type=RATE, default=1e-4, help="learning rate of log alpha")
    group.add_argument("--alpha_beta", type=BETA, default=0.5, help="Adam's beta1 for log alpha")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_freq", type=COUNT, default=10_000, help="decisions between evaluations")
    group.add_argument("--num_eval_episodes", type=COUNT, default=10, help="episodes in an evaluation")
    group.add_argument(
        "--eval_workers",
        type=COUNT,
        default=cores(),
        help="processes that play them, at most one for each; 1 plays them in this one",
    )

    group = parser.add_argument_group("critic")
    group.add_argument("--critic_lr", type=RATE, default=1e-3, help="learning rate")
    group.add_argument("--critic_beta", type=BETA, default=0.9, help="Adam's beta1")
    group.add_argument("--critic_tau", type=FRACTION, default=0.01, help="rate of the target's Q functions")
    group.add_argument("--critic_target_update_freq", type=COUNT, default=2, help="decisions between target updates")

    group = parser.add_argument_group("actor")
    group.add_argument("--actor_lr", type=RATE, default=1e-3, help="learning rate")
    group.add_argument("--actor_beta", type=BETA, default=0.9, help="Adam's beta1")
    group.add_argument("--actor_log_std_min", type=ANY, default=-10, help="lower limit of the log deviation")
    group.add_argument("--actor_log_std_max", type=ANY, default=2, help="upper limit of the log deviation")
    group.add_argument("--actor_update_freq", type=COUNT, default=2, help="decisions between actor and alpha updates")

    group = parser.add_argument_group("encoder and decoder")
    kinds = ["pixel", "identity"]
    group.add_argument("--encoder_type", choices=kinds, default="pixel", help="identity observes states")
    group.add_argument("--encoder_feature_dim", type=COUNT, default=50, help="length of the feature vector")
    group.add_argument("--encoder_lr", type=RATE, default=1e-3, help="learning rate under the decoder's loss")
    group.add_argument("--encoder_tau", type=FRACTION, default=0.05, help="rate of the target's encoder")
    group.add_argument("--decoder_type", choices=kinds, default="pixel", help="identity means no decoder")
    group.add_argument("--decoder_lr", type=RATE, default=1e-3, help="learning rate")
    group.add_argument("--decoder_update_freq", type=COUNT, default=1, help="decisions between decoder updates")
    group.add_argument("--decoder_latent_lambda", type=WEIGHT, default=1e-6, help="weight of the features' L2 penalty")
    group.add_argument("--decoder_weight_lambda", type=WEIGHT, default=1e-7, help="weight decay of the decoder")
    group.add_argument("--num_layers", type=COUNT, default=4, help="convolutions, and transposed convolutions")
    group.add_argument("--num_filters", type=COUNT, default=32, help="channels of a convolution")

    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="of everything random")
    group.add_argument(
        "--work_dir", type=user_path, default="./log", help="folder of the run's files, which must not hold a run"
    )
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="go on from the checkpoint in work_dir; without one, start",
    )
    group.add_argument("--overwrite", action="store_true", help="remove the run that work_dir holds, and start afresh")
    group.add_argument(
        "--checkpoint_minutes", type=WEIGHT, default=10, help="minutes after which an episode's end brings a checkpoint"
    )
    group.add_argument("--checkpoint_freq", type=COUNT, help="decisions after which it does, too; None: only minutes")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where networks live")
    group.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="of layers; None is PyTorch's own choice: fp32, but tf32 in convolutions where a GPU has it",
    )
    group.add_argument(
        "--cuda_graph",
        choices=["auto", "off"],
        default="auto",
        help="auto launches updates and actions as CUDA graphs where there is a GPU",
    )
    group.add_argument(
        "--compile", action="store_true", help="put the losses through torch.compile, which takes a minute at first"
    )
    for flag, what in (
        ("--save_tb", "write TensorBoard events to work_dir/tb"),
        ("--save_model", "save the networks at evaluations to work_dir/model"),
        ("--save_buffer", "save the replay at evaluations to work_dir/buffer"),
        ("--save_video", "save an episode of each evaluation to work_dir/video"),
    ):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=what)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags in force. A run that is resumed keeps those that are not given.

    Raises:
        ValueError: there is a checkpoint to resume, but it cannot be read.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    checkpoint = Checkpoint(Path(args.work_dir) / "checkpoint")
    if args.resume and args.work_dir and checkpoint.exists():
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given = set(vars(parser.parse_args(argv))) | LOCAL | UNNOTED
        for name, value in checkpoint.args().items():
            if name not in given and name in vars(args):
                setattr(args, name, value)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuses what single flags do not show to be wrong.

    Raises:
        ValueError: says in a line what is wrong and what to do.
    """
    check_task_and_networks(args)
    if args.replay_buffer_capacity < args.batch_size:
        raise ValueError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    check_device(args.device)
    check_precision(args)
    check_work_dir(args)
    if args.compile:
        check_compiler(args.device)
    if args.save_video:
        check_ffmpeg("save_video")


def check_task_and_networks(args: argparse.Namespace) -> None:
    """Raises ValueError if there is no such task, or no such networks for it."""
    tasks = dmc2gym.task_names()
    if (args.domain_name, args.task_name) not in tasks:
        name = f"{args.domain_name} {args.task_name}"
        in_domain = [f"{domain} {task}" for domain, task in tasks if domain == args.domain_name]
        close = in_domain or difflib.get_close_matches(name, [" ".join(task) for task in tasks], n=3, cutoff=0.4)
        raise ValueError(f"the Control Suite has no task {name}; close ones: {', '.join(close) or 'none'}")
    if args.encoder_type == "pixel":
        conv_output_shape(args.image_size, args.image_size, args.num_layers)
    elif args.decoder_type == "pixel":
        raise ValueError("decoder_type pixel needs encoder_type pixel: states are not reconstructed")
    if args.actor_log_std_min >= args.actor_log_std_max:
        raise ValueError("actor_log_std_min must be below actor_log_std_max")


def check_device(name: str) -> None:
    """Raises ValueError unless the networks can be put on the device."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError("neither cpu nor cuda")
        torch.zeros(1, device=name)
    except (ValueError, RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        cause = f"{error}".splitlines()[:1]
        raise ValueError(
            f"there is no device {name} here; choose {' or '.join(there)} ({''.join(cause) or type(error).__name__})"
        ) from error


def check_precision(args: argparse.Namespace) -> None:
    """Raises ValueError if layers would compute slower in the precision that is asked for than without it.

    A run that began in it may go on: its precision cannot change.
    """
    if args.precision == "bf16" and not (args.resume and Checkpoint(Path(args.work_dir) / "checkpoint").exists()):
        filters = args.num_filters if args.encoder_type == "pixel" else 0
        check_bf16(torch.device(args.device), filters, args.hidden_dim)


def check_work_dir(args: argparse.Namespace) -> None:
    """Raises ValueError if the folder cannot be written, or holds a run that these flags neither resume nor remove.

    Or if it holds something else, not written by a run, that this one would overwrite.
    """
    work_dir = Path(args.work_dir)
    if not args.work_dir:
        raise ValueError("work_dir is empty: name a folder")
    if args.resume and args.overwrite:
        raise ValueError("resume and overwrite exclude each other: go on, or start afresh?")
    if args.save_tb and args.work_dir.encode("utf-8", "replace") != os.fsencode(args.work_dir):
        raise ValueError(f"work_dir {args.work_dir} is not UTF-8, and TensorBoard cannot read it: leave save_tb out")
    try:
        held = held_files(work_dir)
        strangers = ownership.strangers(work_dir) if held else []
        check_folder(work_dir, f"work_dir {args.work_dir}")
    except OSError as error:
        raise ValueError(f"work_dir {args.work_dir[:100]} cannot be used: {error.strerror}") from error
    checkpoint = Checkpoint(work_dir / "checkpoint")
    if args.resume and not checkpoint.begun() and (strangers or held not in ([], ["checkpoint"])):
        raise ValueError(
            f"work_dir {work_dir} holds {', '.join(held)}, but checkpoint/checkpoint.json is missing: "
            "there is nothing to resume; choose another work_dir, or --overwrite it"
        )
    if args.resume and checkpoint.begun():
        check_resumed(args)
    if strangers and (args.overwrite or (args.resume and not checkpoint.exists())):
        raise ValueError(
            f"work_dir {work_dir} holds files that its run has not written ({', '.join(strangers[:3])}"
            f"{', ...' if strangers[3:] else ''}): move them away, or choose another work_dir"
        )
    if held and not args.resume and not args.overwrite:
        raise ValueError(
            f"work_dir {work_dir} holds a run already ({', '.join(held)}): "
            "choose another, or --resume or --overwrite it"
        )


def held_files(work_dir: Path) -> list[str]:
    """What of a run's files a folder holds."""
    return [name for name in RUN_FILES if (work_dir / name).exists() or (work_dir / name).is_symlink()]


def check_resumed(args: argparse.Namespace) -> None:
    """Raises ValueError if the run in the folder was started with flags that cannot change."""
    # What the run did not know yet, because it began before there was such a flag, was the default.
    defaults = vars(make_parser().parse_args([]))
    checkpoint = Checkpoint(Path(args.work_dir) / "checkpoint")
    now, then = vars(args), defaults | checkpoint.args()
    differ = [name for name in now if name not in CHANGEABLE and now[name] != then[name]]
    if differ:
        changes = ", ".join(f"--{name} {then[name]} is now {now[name]}" for name in differ)
        raise ValueError(f"work_dir {args.work_dir} holds a run with other flags ({changes}): choose another work_dir")
    if checkpoint.exists() and checkpoint.step() > args.num_train_steps:
        step = checkpoint.step()
        raise ValueError(f"work_dir {args.work_dir} is at step {step}, beyond --num_train_steps {args.num_train_steps}")


def existing_part(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(part for part in (path, *path.absolute().parents) if part.exists() or part.is_symlink())


def check_folder(folder: Path, name: str) -> None:
    """Raises ValueError if the folder, which need not be there yet, cannot be made or written; `name` says which."""
    existing = existing_part(folder)
    if not existing.is_dir():
        raise ValueError(f"{name} cannot be made: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name} cannot be written: choose another")


def check_compiler(device: str) -> None:
    """Raises ValueError if torch.compile does not work here; the first time that takes half a minute."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise ValueError(f"compile needs a C++ compiler, and {compiler} is not there: install g++, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError("compile needs Python's headers: on Debian or Ubuntu, apt-get install python3-dev")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    if len(folder.split()) > 1:
        raise ValueError(f"compile cannot work in {folder}, because of the space: set TMPDIR to another folder")
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, by compiler and system
        lines = str(error).partition("Output:\n")[2] or str(error) or type(error).__name__
        raise ValueError(f"compile does not work here: {lines.strip().splitlines()[0]}") from error


def check_ffmpeg(flag: str) -> None:
    """Raises ValueError if the videos that a flag asks for cannot be encoded."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{flag} needs ffmpeg: pip install imageio[ffmpeg]") from error


def replay_capacity(args: argparse.Namespace) -> int:
    """Transitions to make room for: no more than the run will see."""
    return min(args.replay_buffer_capacity, args.num_train_steps)


def make_agent(args: argparse.Namespace, obs_shape: tuple[int, ...], action_shape: tuple[int, ...]) -> SacAeAgent:
    """An agent whose keywords are the flags of the same names; on a GPU, unless told otherwise, with CUDA graphs."""
    keywords = set(inspect.signature(SacAeAgent).parameters) - {"device"}
    flags = {name: value for name, value in vars(args).items() if name in keywords}
    if args.cuda_graph == "auto" and torch.device(args.device).type == "cuda":
        return GraphedAgent(obs_shape, action_shape, args.device, report=tqdm.write, **flags)
    return SacAeAgent(obs_shape, action_shape, args.device, **flags)


def try_out(env: Any, drawn: bool) -> tuple[str, bool]:
    """Plays the first decisions in an environment and closes it: what fails must show before anything is written.

    Returns:
        What draws its pictures, if they are `drawn`, and whether that is software on the CPU.

    Raises:
        dmc2gym.RendererError: they are to be drawn, and nothing here can.
    """
    try:
        env.reset()
        for _ in range(3):
            env.step(env.action_space.sample())
        if not drawn:
            return "none", False
        env.unwrapped.render()
        return env.unwrapped.renderer
    finally:
        env.close()


class Stopped(Exception):  # noqa: N818  # no error
    """A signal has asked the run to stop, and it has come to where it can."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


class Run:
    """A training run: environments, agent, replay and logs, wired into one loop.

    Making one writes nothing; `open` and `train` do. Whatever of it a checkpoint must hold is in `state`.

    Raises:
        ValueError, dmc2gym.RendererError: what is asked for cannot be had; the message is one for the user.
    """

    def __init__(self, args: argparse.Namespace):
        check(args)
        set_seed_everywhere(args.seed)
        self.args = args
        self.work_dir = Path(args.work_dir)
        self.checkpoint = Checkpoint(self.work_dir / "checkpoint")
        self.env = make_env(args, args.seed)
        self.step = 0  # decisions made
        self.next_eval = args.eval_freq
        self.evaluation_due = True
        self.episode = 0
        self.begun = False  # whether an episode is under way
        self.action: np.ndarray | None = None  # of the decision that is being made
        self.updates = 0  # done in it
        self.actions: list[np.ndarray] = []  # of the episode
        self.episode_start, self.episode_reward, self.start_time = 0, 0.0, time.perf_counter()
        self.pace = Pace(torch.device(args.device))
        self.stopping: int | None = None  # the signal that asks the run to stop
        self.waiting: dict[str, Any] = {"meters": {}}  # what a logger that opens has to print yet
        self.renderer = try_out(make_env(args, args.seed), drawn=args.encoder_type == "pixel" or args.save_video)
        obs_shape = self.env.observation_space.shape
        action_shape = self.env.action_space.shape
        self.agent = make_agent(args, obs_shape, action_shape)
        capacity, device = replay_capacity(args), torch.device(args.device)
        frames_device = place_replay(args.replay_device, device, obs_shape, action_shape, capacity)
        self.replay = ReplayBuffer(
            obs_shape,
            action_shape,
            capacity,
            args.batch_size,
            device,
            seed=args.seed,
            frames_device=frames_device,
        )
        # TensorBoard shows videos, too; but a run on states shall not need a renderer for that.
        recorded = args.save_video or (args.save_tb and args.encoder_type == "pixel")
        self.video = VideoRecorder(
            self.work_dir / "video" if recorded else None, camera_id=self.env.unwrapped.camera_id
        )

    def describe(self) -> Iterator[str]:
        """What a user wants to know before the run: lines to print."""
        args = self.args
        repeat = PUBLISHED_REPEATS.get((args.domain_name, args.task_name), args.action_repeat)
        if args.action_repeat != repeat:
            yield f"note: the published results on this task have --action_repeat {repeat}, not {args.action_repeat}"
        device = torch.device(args.device)
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f" ({cores()} cores)"
        yield f"device: {args.device}{name}"
        renderer, software = self.renderer
        yield f"renderer: {renderer}"
        if software:
            yield "warning: this renderer is software on the CPU, about 25 ms a frame; a GPU needs its EGL driver"
        yield f"observation: {self.env.observation_space.shape} {self.env.observation_space.dtype}"
        yield f"action: {self.env.action_space.shape}"
        replay = self.replay
        place = "in host memory" if replay.frames.device.type == "cpu" else f"on {replay.frames.device}"
        yield f"replay: {in_bytes(replay.nbytes)} {place} for {replay.capacity:,} transitions"
        free = shutil.disk_usage(existing_part(self.checkpoint.folder)).free
        yield f"checkpoints: up to {in_bytes(replay.nbytes)} in {self.checkpoint.folder}, {in_bytes(free)} free"
        if args.save_buffer:
            yield f"saved replay: up to {in_bytes(replay.nbytes)} more in {self.work_dir / 'buffer'}"
        if free < replay.nbytes * (2 if args.save_buffer else 1):
            yield "warning: the disk may be full before the run ends; it could then go on elsewhere, or with less to do"
        for name in ("actor", "critic", "decoder"):
            network = getattr(self.agent, name)
            if network is not None:
                yield f"{name}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters"
        if self.step:
            yield f"at decision {self.step:,} of {args.num_train_steps:,}, evaluation at {self.next_eval:,}"
        elif args.num_train_steps <= args.init_steps:
            yield "note: nothing will be learned: num_train_steps does not exceed init_steps"
        else:
            yield f"first an evaluation, {args.init_steps:,} random decisions, then as many updates at once"

    def open(self) -> list[str]:
        """Makes the run's folder and its logs, or goes on with those that are there; gives lines to print.

        Raises:
            ValueError: another process uses the folder, or the checkpoint that is there cannot be used; nothing has
                been changed.
            OSError: the folder cannot be written.
        """
        args, purge_step = self.args, None
        start = provenance(torch.device(args.device))
        make_dir(self.work_dir)
        self.lock = lock(self.work_dir / ".lock")
        # Every episode brings its own seed; of `make_env`'s, only LQR's springs come.
        make_eval_env = functools.partial(make_env, args, args.seed)
        self.eval_envs = SideBySide(make_eval_env, min(args.num_eval_episodes, MAX_ENVS), args.eval_workers)
        try:
            if args.resume and self.checkpoint.exists():
                lines = self.restore()
                ownership.adopt(self.work_dir, self.replay.name)
                ownership.note(self.work_dir, *ownership.LOGS)
                purge_step = self.step + 1
            else:
                lines = self.begin()
            tb = self.work_dir / "tb"
            events = set(tb.iterdir()) if tb.exists() else set()
            write_json(self.work_dir / "args.json", dict(sorted(vars(args).items())), self.replay.name)
            self.logger = Logger(self.work_dir, use_tb=args.save_tb, purge_step=purge_step)
            if args.save_tb:
                ownership.note(self.work_dir, *(f"tb/{path.name}" for path in tb.iterdir() if path not in events))
            with (self.work_dir / "starts.log").open("a") as file:
                file.write(json.dumps(start | {"step": self.step}) + "\n")
        except BaseException:
            self.eval_envs.close()
            self.lock.close()
            raise
        self.logger.set_state(self.waiting)
        self.last_checkpoint = (time.monotonic(), self.step)
        return lines

    def begin(self) -> list[str]:
        """Makes the folder this run's, and removes what another one or an earlier start has written; lines to print."""
        work_dir, name = self.work_dir, self.replay.name
        held = held_files(work_dir)
        ownership.adopt(work_dir, name)
        mine = ownership.written(work_dir)
        self.checkpoint.begin(vars(self.args), name)  # from now on the folder holds a run that has no checkpoint yet
        stay = ownership.remove(work_dir, mine)
        ownership.begin_list(work_dir, name)
        lines = [f"left in {work_dir}, not written by its run: {', '.join(stay)}"] if stay else []
        if not held:
            return [f"no run in {work_dir} yet: it begins", *lines] if self.args.resume else lines
        why = "there is no checkpoint yet" if self.args.resume else "they are overwritten"
        gone = [name for name in held if name == "checkpoint" or name not in held_files(work_dir)]
        return [f"removed from {work_dir}: {', '.join(gone)}; {why}", *lines]

    def restore(self) -> list[str]:
        """Takes up the checkpoint, and cuts what was logged after it; gives lines to print."""
        args, then = self.args, self.checkpoint.args()
        changed = [name for name in sorted(CHANGEABLE - UNNOTED) if then.get(name) != getattr(args, name)]
        run, tensors = self.checkpoint.load(self.replay, self.agent.device)
        with naming(self.checkpoint.folder):
            self.agent.load_state_dict(tensors["agent"])
            self.set_state(run, tensors)
        if then["eval_freq"] != args.eval_freq:
            last_end = self.episode_start if self.begun else self.step
            self.next_eval = (last_end // args.eval_freq + 1) * args.eval_freq
        cut_logs(self.work_dir, run["logger"])
        lines = [f"note: --{name} was {then.get(name)} and is now {getattr(args, name)}" for name in changed]
        if self.has_ended():
            return [*lines, f"the run has ended at step {self.step}: more --num_train_steps would take it further"]
        return [*lines, f"resuming at step {self.step}"]

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that the run needs to go on, but the replay: numbers and random states, and tensors.

        The simulation is not part of it. An episode that is under way is played again from its start: with the task's
        random state of then, and the same actions.
        """
        names = ("step", "next_eval", "evaluation_due", "episode", "begun", "updates", "episode_start")
        run = {name: getattr(self, name) for name in names} | {
            "episode_reward": float(self.episode_reward),
            "elapsed": time.perf_counter() - self.start_time,
            "logger": self.logger.state(),
            "task_random": self.task_random if self.begun else self.env.unwrapped.random_state,
            "action_random": self.env.action_space.np_random.bit_generator.state,
            "random": random_states(),
        }
        tensors = {
            "agent": self.agent.state_dict(),
            "actions": [torch.as_tensor(action) for action in self.actions],
            "action": None if self.action is None else torch.as_tensor(self.action),
            "random": torch_random_states(self.agent.device),
        }
        return run, tensors

    def set_state(self, run: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Takes up what `state` gave, but for the agent's part."""
        self.env.unwrapped.random_state = run["task_random"]
        if run["begun"]:
            self.begin_episode()
            for action in tensors["actions"]:
                self.actions.append(action.cpu().numpy())
                self.obs = self.env.step(self.actions[-1])[0]
        for name in ("step", "next_eval", "evaluation_due", "episode", "begun", "updates", "episode_start"):
            setattr(self, name, run[name])
        self.episode_reward = run["episode_reward"]
        self.start_time = time.perf_counter() - run["elapsed"]
        self.waiting = run["logger"]
        self.action = None if tensors["action"] is None else tensors["action"].cpu().numpy()
        self.env.action_space.np_random.bit_generator.state = run["action_random"]
        set_random_states(run["random"])
        set_torch_random_states(tensors["random"], self.agent.device)

    def write_checkpoint(self) -> None:
        """Writes a checkpoint, which changes nothing about the run.

        Raises:
            OSError: it cannot be written; the one before it is still there.
        """
        self.checkpoint.write(vars(self.args), *self.state(), self.replay)
        self.last_checkpoint = (time.monotonic(), self.step)

    def checkpoint_due(self) -> bool:
        """Whether it is time for one."""
        last_time, last_step = self.last_checkpoint
        minutes = (time.monotonic() - last_time) / 60
        freq = self.args.checkpoint_freq or math.inf
        return self.step > last_step and (minutes >= self.args.checkpoint_minutes or self.step - last_step >= freq)

    def train(self) -> list[str]:
        """Runs the loop of a run that is open; gives lines to print at its end.

        Raises:
            Stopped: a signal has asked for it.
            NonFiniteLossError: a loss became NaN or infinite.
        """
        if self.has_ended():
            return []
        while True:
            if self.evaluation_due:
                self.evaluate(self.step)
                self.evaluation_due = False
            if self.step >= self.args.num_train_steps:
                break
            if not self.begun:
                if self.checkpoint_due():
                    self.write_checkpoint()
                self.begin_episode()
            self.stop_if_asked()
            with self.pace.decision():
                self.decide()
        self.logger.check_losses()  # of the last episode, if it was cut short
        self.save(self.step)
        self.write_checkpoint()
        steps = self.step * self.args.action_repeat
        return [f"done: {self.step:,} decisions, {steps:,} environment steps; all is in {self.work_dir}"]

    def has_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.args.num_train_steps and not self.evaluation_due

    def stop(self, signal_number: int) -> None:
        """Asks the run to stop where it can go on another time."""
        self.stopping = signal_number

    def stop_if_asked(self) -> None:
        """Raises Stopped if a signal has asked for it: here the run can go on another time."""
        if self.stopping is not None:
            raise Stopped(self.stopping)

    def begin_episode(self) -> None:
        """Resets the environment."""
        self.task_random = self.env.unwrapped.random_state
        self.episode += 1
        self.episode_start, self.episode_reward, self.start_time = self.step, 0.0, time.perf_counter()
        self.actions = []
        self.obs, _ = self.env.reset()
        self.begun = True

    def decide(self) -> None:
        """One decision and what follows from it.

        The order is the method's: the action is chosen, then the update runs, then the environment steps, so that the
        newest transition is not yet in the batch. On a GPU the update runs while the environment steps.
        """
        if self.action is None:
            self.action = self.act(self.obs, self.step)
        if self.step >= self.args.init_steps:
            # The first time, one update for each of the random decisions, all of them at this very step.
            due = self.args.init_steps if self.step == self.args.init_steps else 1
            for _ in progress(range(self.updates, due), "first updates") if due > 1 else range(self.updates, due):
                with self.pace.update():
                    self.agent.update(self.replay, self.logger, self.step)
                self.updates += 1
                left = self.args.num_train_steps - self.step
                if note := self.pace.note(updates=due - self.updates + left - 1, decisions=left):
                    tqdm.write(note)
                if self.updates < due:
                    self.stop_if_asked()
        next_obs, reward, terminated, truncated, info = self.env.step(self.action)
        # A time limit is no end of the task: the target bootstraps through it.
        self.replay.add(self.obs, self.action, reward, next_obs, terminated)
        self.obs = next_obs
        self.episode_reward += reward
        self.actions.append(self.action)
        self.action, self.updates = None, 0
        self.step += 1
        if "physics_error" in info:
            self.logger.log("train/physics_errors", 1, self.step)
            warn_of_divergence(f"step {self.step}", info["physics_error"])
        if terminated or truncated:
            self.end_episode()

    def end_episode(self) -> None:
        """Writes the episode's line, and sees whether an evaluation is due."""
        self.begun = False
        self.log_episode(self.step)
        if self.step >= self.next_eval:
            self.evaluation_due = True
            self.next_eval = (self.step // self.args.eval_freq + 1) * self.args.eval_freq

    def act(self, obs: np.ndarray, step: int) -> np.ndarray:
        """The action of decision `step`: uniform for the first `init_steps`, then the policy's."""
        if step < self.args.init_steps:
            return self.env.action_space.sample()
        return self.finite(self.agent.sample_action(obs), step)

    def finite(self, action: np.ndarray, step: int) -> np.ndarray:
        """The action, if it is one; else NonFiniteLossError, if possible with the name of the loss that diverged."""
        if not np.isfinite(action).all():
            self.logger.check_losses()
            raise NonFiniteLossError(f"the policy's action is no number at step {step}: the run has diverged")
        return action

    def log_episode(self, step: int) -> None:
        """The line of the episode that ended when `step` decisions had been made."""
        duration = time.perf_counter() - self.start_time
        self.logger.log("train/episode", self.episode, step)
        self.logger.log("train/episode_reward", self.episode_reward, step)
        self.logger.log("train/duration", duration, step)
        self.logger.log("train/environment_steps", step * self.args.action_repeat, step)
        self.logger.log("train/decisions_per_second", (step - self.episode_start) / duration, step)
        self.logger.dump(step)

    def evaluate(self, step: int) -> None:
        """Plays `num_eval_episodes` episodes with mean actions, in environments and with seeds of their own."""
        args, envs, seen = self.args, self.eval_envs, []
        start_time = time.perf_counter()
        self.video.init(enabled=True)
        seeds = [self.evaluation_seed(step, episode) for episode in range(args.num_eval_episodes)]
        moments = play(envs, seeds, lambda obs: self.finite(self.agent.select_actions(obs), step))
        for moment in with_progress(moments, len(seeds), args.action_repeat):
            self.stop_if_asked()  # an evaluation that was broken off is played anew
            if moment.first_moved:
                self.video.record(envs)
                if args.save_tb:
                    seen.append(moment.obs[0].copy())
        for episode, error in moment.physics_errors.items():
            warn_of_divergence(f"step {step}, evaluation episode {episode}, decision {moment.lengths[episode]}", error)
        self.save_video(step)
        duration = time.perf_counter() - start_time
        self.logger.log("eval/episode_reward", moment.returns.sum(), step, n=len(seeds))
        self.logger.log("eval/episode_reward_std", moment.returns.std(), step)  # between this evaluation's episodes
        if moment.physics_errors:
            self.logger.log("eval/physics_errors", len(moment.physics_errors), step)
        self.logger.log("eval/duration", duration, step)
        self.logger.log("eval/environment_steps", step * args.action_repeat, step)
        self.logger.log("eval/decisions_per_second", moment.lengths.sum() / duration, step)
        self.logger.dump(step)
        if args.save_tb:
            self.log_networks(np.stack(seen[:: max(1, len(seen) // 8)][:8]), step)
        self.save(step)

    @torch.no_grad()
    def log_networks(self, observations: np.ndarray, step: int) -> None:
        """Weights, activations on some observations (N, ...), and reconstructions beside them, for TensorBoard."""
        agent = self.agent
        obs = torch.as_tensor(observations, device=agent.device).to(agent.dtype)
        networks: dict[str, nn.Module] = {"actor": agent.actor, "critic": agent.critic}
        if agent.decoder is not None:
            networks["decoder"] = agent.decoder
        hooks = []
        for network_name, network in networks.items():
            for name, layer in network.named_modules():
                if next(layer.parameters(recurse=False), None) is not None:
                    key = f"train_{network_name}/{name}"
                    self.logger.log_param(key, layer, step)
                    hooks.append(layer.register_forward_hook(self._log_activation(key, step)))
        mean_action, _, _, _ = agent.actor(obs, compute_pi=False, compute_log_pi=False)
        agent.critic(obs, mean_action)
        if agent.decoder is not None:
            reconstruction = agent.decoder(agent.critic.encoder(obs)) + 0.5
            newest = torch.stack([obs[:, -3:] / 255, reconstruction[:, -3:].clamp(0, 1)], dim=1)
            self.logger.log_image("eval/observation_and_reconstruction", newest.flatten(0, 1), step)
        for hook in hooks:
            hook.remove()

    def _log_activation(self, key: str, step: int) -> Callable[..., None]:
        return lambda _layer, _inputs, output: self.logger.log_histogram(f"{key}_output", output, step)

    def evaluation_seed(self, step: int, episode: int) -> int:
        """Seed of an evaluation's episode: it depends on nothing that has happened in the run."""
        return int(np.random.SeedSequence((self.args.seed, step, episode)).generate_state(1)[0])

    def save_video(self, step: int) -> None:
        """Writes the recorded episode, if one was, as an mp4 and, thinned to about 100 frames, for TensorBoard."""
        if self.video.enabled:
            if self.args.save_video:
                ownership.claim(self.work_dir, f"video/{step}.mp4")
                self.video.save(f"{step}.mp4")
            self.logger.log_video("eval/video", self.video.frames[:: math.ceil(len(self.video.frames) / 100)], step)
            self.video.init(enabled=False)  # lets go of the frames

    def save(self, step: int) -> None:
        """Writes networks and replay, if asked for."""
        if self.args.save_model:
            names = ("target" if name == "critic_target" else name for name in self.agent.networks)
            ownership.claim(self.work_dir, *(f"model/{name}_{step}.pt" for name in names))
            self.agent.save(make_dir(self.work_dir / "model"), step)
        if self.args.save_buffer:
            self.replay.save(self.work_dir / "buffer")

    def close(self) -> None:
        """Frees environments and logs."""
        self.env.close()
        self.eval_envs.close()
        try:
            self.logger.close()
        finally:
            self.lock.close()


def in_bytes(number: int) -> str:
    """A number of bytes for people."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def progress(numbers: range, name: str) -> tqdm:
    """Counts, with a bar on stderr if that is a terminal; the bar is gone before a line is printed."""
    return tqdm(numbers, desc=name, leave=False, disable=None)


def provenance(device: torch.device) -> dict[str, str]:
    """When, where and by what a run on this device is started."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        commit = "unknown"
    packages = ("torch", "numpy", "dm_control", "mujoco", "gym")
    return (
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "commit": commit,
            "machine": f"{platform.platform()}, {cores()} cores",
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
            "python": platform.python_version(),
        }
        | {name: importlib.metadata.version(name) for name in packages}
        | {"torch": str(torch.__version__)}
    )


def warn_of_divergence(where: str, error: str) -> None:
    """Says on stderr that an episode has ended because its simulation diverged."""
    with suppress(OSError):  # where nobody can read it
        tqdm.write(f"warning: the simulation diverged at {where}, which ends the episode: {error}", file=sys.stderr)


def with_progress(moments: Iterator[Moment], episodes: int, action_repeat: int) -> Iterator[Moment]:
    """The moments of an evaluation, with a bar that counts its steps."""
    waves = math.ceil(episodes / MAX_ENVS)
    with progress(range(waves * math.ceil(EPISODE_LENGTH / action_repeat)), "evaluation") as bar:
        for moment in moments:
            if moment.lengths.any():
                bar.update()
            yield moment


@contextmanager
def refusals(parser: OneLineParser) -> Iterator[None]:
    """What cannot be had, as the parser's error: a line, and exit status 2."""
    try:
        yield
    except (ValueError, dmc2gym.RendererError, WorkerError, MemoryError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        if "allocate" not in str(error):  # how PyTorch says on CPU and GPU that memory does not suffice
            raise
        parser.error(str(error))


def failure(parser: OneLineParser, error: Exception | str) -> int:
    """Says what ended the program; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at exit
    print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def interruption(parser: OneLineParser) -> int:
    """Says that Ctrl-C ended the program; returns the exit status."""
    print(f"{parser.prog}: interrupted", file=sys.stderr)
    return 130


def carry_out(run: Run, parser: OneLineParser) -> int:
    """Trains, and writes a checkpoint if a signal stops it; the exit status."""
    try:
        with asked_to_stop(run.stop):
            try:
                for line in run.describe() if not run.has_ended() else ():
                    print(line, flush=True)
                for line in run.train():
                    print(line, flush=True)
            except Stopped as stopped:
                run.write_checkpoint()
                name = signal.Signals(stopped.signal_number).name
                print(f"{parser.prog}: stopped by {name} at step {run.step}: --resume goes on", file=sys.stderr)
                return 128 + stopped.signal_number
            finally:
                run.close()
    except torch.OutOfMemoryError as error:
        return failure(parser, f"{error}; --resume goes on, with --replay_device cpu there is more room on a GPU")
    except (NonFiniteLossError, dmc2gym.RendererError, WorkerError, OSError) as error:
        return failure(parser, error)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    parser.parse_args(argv)  # whatever is wrong with a flag alone is said first
    with refusals(parser):
        run = Run(parse(argv))
        for line in run.open():
            print(line, flush=True)
    return carry_out(run, parser)


if __name__ == "__main__":
    sys.exit(main())
