"""Trains SAC+AE on a Control Suite task: `python train.py --help`."""

from __future__ import annotations

import os
import signal

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
import inspect
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import dmc2gym
from cuda_graph import GraphedAgent
from encoder import conv_output_shape
from environment import EPISODE_LENGTH, make_env
from evaluation import Moment, SideBySide, WorkerError, play
from logger import Logger, NonFiniteLossError
from memory import place_replay
from sac_ae import SacAeAgent
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
RUN_FILES = ("args.json", "train.log", "eval.log", "tb", "video", "model", "buffer")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


LARGEST = 2**63 - 1  # what the libraries' counters hold


def number(kind: type, low: float, high: float = LARGEST, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`, without `low` itself where `exclusive`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (exclusive and value == low) or value in (math.inf, -math.inf):
            bounds = [f"{'above' if exclusive else 'at least'} {low}"] if low > -math.inf else []
            bounds += [f"at most {high}"] if high < LARGEST or value > high else []
            shown = text if len(text) < 30 else f"{text[:30]}..."
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'a finite number'}, got {shown}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


COUNT = number(int, 1)
RATE = number(float, 0, exclusive=True)  # learning rates, temperature
BETA = number(float, 0, 0.9999999)  # of Adam: below 1
FRACTION = number(float, 0, 1)
WEIGHT = number(float, 0)
ANY = number(float, -math.inf, math.inf)


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
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes that play them, at most one for each; 1 plays them in the training process",
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
    group.add_argument("--work_dir", default="./log", help="folder of the run's files, which must not hold a run")
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
    group.add_argument("--save_tb", action="store_true", help="write TensorBoard events to work_dir/tb")
    group.add_argument("--save_model", action="store_true", help="save the networks at evaluations to work_dir/model")
    group.add_argument("--save_buffer", action="store_true", help="save the replay at evaluations to work_dir/buffer")
    group.add_argument("--save_video", action="store_true", help="save an episode of each evaluation to work_dir/video")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses what single flags do not show to be wrong.

    Raises:
        ValueError: says in a line what is wrong and what to do.
    """
    check_task_and_networks(args)
    if args.replay_buffer_capacity < args.batch_size:
        raise ValueError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    check_device(args.device)
    check_work_dir(args.work_dir)
    if args.compile:
        check_compiler()
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
        raise ValueError(f"there is no device {name} here; choose {' or '.join(there)}") from error


def check_work_dir(name: str) -> None:
    """Raises ValueError if the folder holds a run or cannot be written."""
    work_dir = Path(name)
    if not name:
        raise ValueError("work_dir is empty: name a folder")
    try:
        held = [file for file in RUN_FILES if (work_dir / file).exists()]
    except OSError as error:
        raise ValueError(f"work_dir {name[:100]} cannot be used: {error.strerror}") from error
    if held:
        raise ValueError(f"work_dir {name} holds a run already ({', '.join(held)}): choose another, or move it away")
    check_folder(work_dir, f"work_dir {name}")


def check_folder(folder: Path, name: str) -> None:
    """Raises ValueError if the folder, which need not be there yet, cannot be made or written; `name` says which."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise ValueError(f"{name} cannot be made: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name} cannot be written: choose another")


def check_compiler() -> None:
    """Raises ValueError if torch.compile finds no compiler."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ValueError(f"compile needs a C++ compiler, and {compiler} is not there: install g++, or set CXX")


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


class Run:
    """A training run: environments, agent, replay and logs, wired into one loop.

    Making one writes nothing; `open` and `train` do.

    Raises:
        ValueError, dmc2gym.RendererError: what is asked for cannot be had; the message is one for the user.
    """

    def __init__(self, args: argparse.Namespace):
        check(args)
        set_seed_everywhere(args.seed)
        self.args = args
        self.work_dir = Path(args.work_dir)
        self.env = make_env(args, args.seed)
        self.episode = 0
        self.renderer = ("none", False)
        if args.encoder_type == "pixel" or args.save_video:
            self.env.unwrapped.render()  # whatever cannot be drawn must show before anything is written
            self.renderer = self.env.unwrapped.renderer
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
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f" ({os.cpu_count()} cores)"
        yield f"device: {args.device}{name}"
        if device.type == "cpu" and args.encoder_type == "pixel":
            days = args.num_train_steps / 86400
            yield (
                f"note: without a GPU expect about one update a second, {days:.1f} days for this run; "
                "`make demo` shows everything in minutes"
            )
        renderer, software = self.renderer
        yield f"renderer: {renderer}"
        if software:
            yield "warning: this renderer is software on the CPU, about 25 ms a frame; a GPU needs its EGL driver"
        yield f"observation: {self.env.observation_space.shape} {self.env.observation_space.dtype}"
        yield f"action: {self.env.action_space.shape}"
        replay = self.replay
        place = "in host memory" if replay.frames.device.type == "cpu" else f"on {replay.frames.device}"
        yield f"replay: {replay.nbytes / 1e9:.2f} GB {place} for {replay.capacity:,} transitions"
        for name in ("actor", "critic", "decoder"):
            network = getattr(self.agent, name)
            if network is not None:
                yield f"{name}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters"
        if args.num_train_steps <= args.init_steps:
            yield "note: nothing will be learned: num_train_steps does not exceed init_steps"
        else:
            yield f"first an evaluation, {args.init_steps:,} random decisions, then as many updates at once"

    def open(self) -> None:
        """Makes the run's folder and its logs.

        Raises:
            OSError: the folder cannot be written.
        """
        # Every episode brings its own seed; of `make_env`'s, only LQR's springs come.
        make_eval_env = functools.partial(make_env, self.args, self.args.seed)
        self.eval_envs = SideBySide(make_eval_env, self.args.num_eval_episodes, self.args.eval_workers)
        make_dir(self.work_dir)
        (self.work_dir / "args.json").write_text(json.dumps(vars(self.args), indent=4, sort_keys=True) + "\n")
        self.logger = Logger(self.work_dir, use_tb=self.args.save_tb)

    def train(self) -> None:
        """Runs the loop of a run that is open.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite.
        """
        args = self.args
        self.evaluate(step=0)
        next_eval = args.eval_freq

        self.begin_episode(0)
        for step in range(args.num_train_steps):
            if self.decide(step):
                decisions = step + 1
                self.log_episode(decisions)
                if decisions >= next_eval:
                    self.evaluate(decisions)
                    next_eval = (decisions // args.eval_freq + 1) * args.eval_freq
                self.begin_episode(decisions)
        self.logger.check_losses()  # of the last episode, if it was cut short
        self.save(args.num_train_steps)

    def begin_episode(self, step: int) -> None:
        """Resets the environment before decision `step`."""
        self.episode += 1
        self.episode_start, self.episode_reward, self.start_time = step, 0.0, time.perf_counter()
        self.obs, _ = self.env.reset()

    def decide(self, step: int) -> bool:
        """One decision and what follows from it; whether it ended the episode.

        The order is the method's: the action is chosen, then the update runs, then the environment steps, so that the
        newest transition is not yet in the batch. On a GPU the update runs while the environment steps.
        """
        action = self.act(self.obs, step)
        if step >= self.args.init_steps:
            # The first time, one update for each of the random decisions, all of them at this very step.
            burst = step == self.args.init_steps
            for _ in progress(self.args.init_steps, "first updates") if burst else range(1):
                self.agent.update(self.replay, self.logger, step)
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        # A time limit is no end of the task: the target bootstraps through it.
        self.replay.add(self.obs, action, reward, next_obs, terminated)
        self.obs = next_obs
        self.episode_reward += reward
        return terminated or truncated

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
        for moment in with_progress(moments, args.action_repeat):
            if moment.first_moved:
                self.video.record(envs)
            if args.save_tb and not moment.over[0]:
                seen.append(moment.obs[0].copy())
        self.save_video(step)
        duration = time.perf_counter() - start_time
        self.logger.log("eval/episode_reward", moment.returns.sum(), step, n=len(seeds))
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
                self.video.save(f"{step}.mp4")
            self.logger.log_video("eval/video", self.video.frames[:: math.ceil(len(self.video.frames) / 100)], step)
            self.video.init(enabled=False)  # lets go of the frames

    def save(self, step: int) -> None:
        """Writes networks and replay, if asked for."""
        if self.args.save_model:
            self.agent.save(make_dir(self.work_dir / "model"), step)
        if self.args.save_buffer:
            self.replay.save(self.work_dir / "buffer")

    def close(self) -> None:
        """Frees environments and logs."""
        self.env.close()
        self.eval_envs.close()
        self.logger.close()


def progress(count: int, name: str) -> tqdm:
    """Counts, with a bar on stderr if that is a terminal; the bar is gone before a line is printed."""
    return tqdm(range(count), desc=name, leave=False, disable=None)


def with_progress(moments: Iterator[Moment], action_repeat: int) -> Iterator[Moment]:
    """The moments of an evaluation, with a bar that counts its steps."""
    with progress(math.ceil(EPISODE_LENGTH / action_repeat), "evaluation") as bar:
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


def hear_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, unless this program was started to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def failure(parser: OneLineParser, error: Exception) -> int:
    """Says what ended the program; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at exit
    print(f"{parser.prog}: error: {error}", file=sys.stderr)
    return 1


def interruption(parser: OneLineParser) -> int:
    """Says that Ctrl-C ended the program; returns the exit status."""
    print(f"{parser.prog}: interrupted", file=sys.stderr)
    return 130


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with refusals(parser):
        run = Run(args)
        run.open()
    hear_interrupts()
    try:
        for line in run.describe():
            print(line, flush=True)
        run.train()
    except (NonFiniteLossError, dmc2gym.RendererError, WorkerError, OSError) as error:
        return failure(parser, error)
    except KeyboardInterrupt:
        return interruption(parser)
    finally:
        run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
