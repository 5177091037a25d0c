"""Trains SAC+AE on a Control Suite task: `python train.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()  # before PyTorch is imported, which reads then how its threads wait

import argparse
import functools
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import numpy as np
import torch

import dmc2gym
import utils
from errors import UserError
from logger import Logger, log_networks
from pictures import quality, some
from randomness import random_action, seed_of
from sac_ae import Count, NonNegative, SacAeAgent
from sac_vae import SacVaeAgent
from support import report
from support.checkpoint import Lock, Progress, Run, find_models, parse_run
from support.cuda_graph import Graphs
from support.evaluation import MAX_ENVS, SideBySide, play
from support.flags import OneLineParser, absolute_path, number, settings_of, user_path
from support.machine import check_bf16, check_compiler, check_device, cores, limit_threads, make_replay, try_out
from support.signals import Stopped
from utils import FrameStack, check_finite, eval_mode, set_seed_everywhere
from video import VideoRecorder

AGENTS: dict[str, type[SacAeAgent]] = {"sac_ae": SacAeAgent, "sac_vae": SacVaeAgent}
EPISODE_LENGTH = 1000  # environment steps


def make_parser() -> OneLineParser:
    """The command line: each flag with its type, its default and its help text, and what --resume does with it."""
    parser = OneLineParser(
        description="Trains SAC+AE, SAC:pixel (--decoder_type identity), SAC:state (both types identity) or SAC+VAE."
    )
    add = parser.section("environment")
    add("domain_name", str, "cheetah", "domain of the Control Suite")
    add("task_name", str, "run", "task of the domain")
    add("image_size", Count, 84, "height and width of observed pixels, even")
    add("action_repeat", number(int, 1, EPISODE_LENGTH), 1, "environment steps per decision")
    add("frame_stack", number(int, 1, 100), 3, "frames in an observation")
    add = parser.section("training (a step is a decision: action_repeat environment steps)")
    add("seed", number(int, 0, 2**32 - 1), 1, "seed of all randomness")
    add("init_steps", Count, 1000, "random decisions at the start, followed by as many updates at once")
    add("num_train_steps", Count, 1_000_000, "decisions of the run", resume="free")
    add("batch_size", Count, 128, "transitions in an update")
    add("replay_buffer_capacity", Count, 1_000_000, "largest number of transitions in the replay")
    add = parser.section("evaluation")
    add("eval_freq", Count, 10_000, "decisions between evaluations", resume="free")
    add("num_eval_episodes", Count, 10, "episodes in an evaluation")
    text = "processes for evaluation, at most one per episode; 1: no extra process"
    add("eval_workers", Count, cores(), text, resume="machine")
    add = parser.section("agent")
    add("agent", Literal[tuple(AGENTS)], "sac_ae", "sac_vae has a variational autoencoder")
    for name, (kind, default, text) in settings_of(AGENTS.values()).items():
        add(name, kind, default, text)
    add("load_encoder", absolute_path, None, "begin with the encoder of models that are saved in this folder")
    add("load_step", number(int, 0), None, "decisions after which these were saved; without it the newest")
    add = parser.section("run")
    add("work_dir", user_path, "./log", "run folder; a new one without --resume or --overwrite", resume="command")
    add("resume", bool, False, "continue the run in work_dir, or start one there", resume="command")
    add("overwrite", bool, False, "move the run in work_dir to WORK_DIR.TIME, and start a new one", resume="command")
    add("checkpoint_minutes", NonNegative, 10, "minutes between checkpoints, at ends of episodes", resume="free")
    text = "also a checkpoint every so many decisions, at episode ends"
    add("checkpoint_freq", Count | None, None, text, resume="free")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("device", str, device, "device of the networks", resume="machine")
    text = "device of the frames: auto is the GPU if they fit, else host memory"
    add("replay_device", Literal["auto", "cuda", "cpu"], "auto", text, resume="free")
    text = "auto launches updates and actions as CUDA graphs on a GPU"
    add("cuda_graph", Literal["auto", "off"], "auto", text, resume="free")
    add("save_tb", bool, False, "write TensorBoard events to work_dir/tb", resume="free")
    add("save_model", bool, False, "save the networks at evaluations to work_dir/model", resume="free")
    add("save_buffer", bool, False, "save the replay at evaluations to work_dir/buffer", resume="free")
    add("save_video", bool, False, "save an episode of each evaluation to work_dir/video", resume="free")
    return parser


def make_env(args: argparse.Namespace, seed: int) -> Any:
    """The only place that makes an environment: any gym 0.26 or Gymnasium one, of pixels (C, H, W) or states (D,).

    Its episodes must depend on the seed of `reset` alone, or resumed runs differ from those that never stopped.
    """
    dmc2gym.render_on(args.device)
    pixels = args.encoder_type == "pixel"
    view = {"from_pixels": pixels, "height": args.image_size, "width": args.image_size, "render_size": 256}
    length = {"frame_skip": args.action_repeat, "episode_length": EPISODE_LENGTH}
    env = dmc2gym.make(args.domain_name, args.task_name, seed, visualize_reward=False, **view, **length)
    return FrameStack(env, args.frame_stack) if pixels else env


# What evaluation processes get of this file and of utils.py is pickled as code, not by name: they need not import these
# files, and so not PyTorch.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(utils)


def make_agent(args: argparse.Namespace, obs_shape: tuple[int, ...], action_shape: tuple[int, ...]) -> SacAeAgent:
    """The agent of the flags; on a GPU, unless told otherwise, with CUDA graphs."""
    limit_threads()
    kind = AGENTS[args.agent]
    settings = {name: getattr(args, name) for name in settings_of([kind])}
    for name, (_, default, _) in settings_of(AGENTS.values()).items():
        if name not in settings and getattr(args, name) != default:
            raise UserError(f"the agent {args.agent} has no setting {name}: leave --{name} out, or choose its agent")
    agent = kind(obs_shape, action_shape, args.device, **settings)
    agent.check_complete()
    agent.train()  # a subclass may have added networks
    if args.cuda_graph == "auto" and agent.device.type == "cuda":
        Graphs(agent, report.say)  # replaces the agent's `update_from` and `actions`
    return agent


def load_encoder(agent: SacAeAgent, args: argparse.Namespace) -> list[str]:
    """Loads the encoder that --load_encoder names, if any, and notes its step in `args`; lines to print.

    Raises UserError if there is none, or if it does not fit.
    """
    if args.load_encoder is None:
        if args.load_step is not None:
            raise UserError("load_step needs load_encoder, the folder of the models")
        return []
    if args.encoder_type == "identity":
        raise UserError("load_encoder needs encoder_type pixel: states have no encoder")
    if not Path(args.load_encoder).is_dir():
        raise UserError(f"load_encoder {args.load_encoder} is not a folder: name a run's folder, or one of models")
    folder, args.load_step, saved = find_models(Path(args.load_encoder), args.load_step)
    if saved is not None:
        raise UserError(f"load_encoder {args.load_encoder} holds a checkpoint, but no models: --save_model writes them")
    agent.load_encoder(folder, args.load_step)
    return [f"encoder: that of {folder}, step {args.load_step}"]


def train(run: Run) -> None:
    """The training loop. A decision: choose an action, do the updates that are due, act, store the transition.

    To act is one call of `env.step`, which makes `action_repeat` environment steps.

    Raises:
        Stopped: a signal has come; the run can continue from this point.
        UserError: a loss or an action became NaN or infinite, or a file cannot be written.
    """
    args, agent, env, replay, logger, progress = run.args, run.agent, run.env, run.replay, run.logger, run.progress
    while True:
        if progress.evaluation_due():
            with eval_mode(agent):
                evaluate(run)
            progress.plan_evaluation(args.eval_freq)
        if progress.step >= args.num_train_steps:
            break
        if run.checkpoint_due():
            run.save_checkpoint()
        run.begin_episode()
        check_finite(f"the environment's observation at step {progress.step}", run.obs)
        over = False
        while not over and progress.step < args.num_train_steps:
            run.stop.check()
            # A resumed run that was stopped between updates has its action already: the policy has changed since.
            if progress.action is None:
                if progress.step < args.init_steps:
                    progress.action = random_action(env.action_space, args.seed, progress.step)
                else:
                    progress.action = check_action(agent.sample_action(run.obs), logger, progress.step)
            # Updates catch up with decisions: `init_steps` of them at the first decision after the random ones, then
            # one a decision. They precede `env.step`, so that a GPU computes while the simulator works; so their
            # batches lack this transition. All get this step, as in the authors' script: all train the actor, or none.
            updates_due = range(progress.step - progress.updates if progress.step >= args.init_steps else 0)
            is_burst = progress.step == args.init_steps
            for _ in report.progress_bar(updates_due, "first updates") if is_burst else updates_due:
                agent.update(replay, logger, progress.step)
                progress.updates += 1
                run.stop.check()
            next_obs, reward, terminated, truncated, info = env.step(progress.action)
            check_finite(f"the environment's observation or reward at step {progress.step + 1}", next_obs, reward)
            # A time limit (truncated) is not a terminal state: the target still bootstraps.
            replay.add(run.obs, progress.action, reward, next_obs, terminated, first=not progress.actions)
            progress.actions.append(progress.action)
            progress.episode_return += float(reward)
            progress.step += 1
            run.obs = next_obs
            progress.action, over = None, terminated or truncated
            if "physics_error" in info:
                logger.log("train/physics_errors", 1, progress.step)
                report.warn_of_divergence(f"step {progress.step}", info["physics_error"])
        run.note_time()
        if over:
            log_episode(logger, progress, args.action_repeat)
            progress.begin_next_episode()
    logger.check_losses()  # of the last episode, if it was cut short
    save_models(run)


def check_action(action: np.ndarray, logger: Logger, step: int) -> np.ndarray:
    """The action. Raises UserError if it is NaN or infinite; if a loss diverged, the message names the loss."""
    if not np.isfinite(action).all():
        logger.check_losses()
        raise UserError(f"the policy's action is NaN or infinite at step {step}: the run has diverged")
    return action


def log_all(logger: Logger, section: str, step: int, values: dict[str, Any]) -> None:
    """Logs values that belong to one line, and writes the line."""
    for name, value in values.items():
        logger.log(f"{section}/{name}", value, step)
    logger.dump(step)


def log_episode(logger: Logger, progress: Progress, action_repeat: int) -> None:
    """Writes the line of the episode that has ended."""
    values = {"episode": progress.episode, "episode_reward": progress.episode_return, "duration": progress.seconds}
    values |= {
        "environment_steps": progress.step * action_repeat,
        "decisions_per_second": len(progress.actions) / progress.seconds,
    }
    log_all(logger, "train", progress.step, values)


def evaluate(run: Run) -> None:
    """Plays `num_eval_episodes` episodes by the policy's mean, in separate environments and with separate seeds."""
    args, agent, logger, step, start_time = run.args, run.agent, run.logger, run.progress.step, time.perf_counter()
    seeds = [seed_of(args.seed, "evaluation", step, episode) for episode in range(args.num_eval_episodes)]

    def act(obs: np.ndarray) -> np.ndarray:
        check_finite(f"the environment's observation in the evaluation at step {step}", obs)
        return check_action(agent.select_actions(obs), logger, step)

    moments = play(run.eval_envs, seeds, act)
    run.video.init(enabled=True)
    seen = []
    for moment in report.progress_bar(moments, "evaluation"):
        run.stop.check()  # an interrupted evaluation is played again
        if 0 in moment.obs:
            run.video.record(run.eval_envs)
            seen.append(moment.obs[0].copy())
    for episode, error in moment.physics_errors.items():
        report.warn_of_divergence(
            f"step {step}, evaluation episode {episode}, decision {moment.lengths[episode]}", error
        )
    save_video(run)
    seconds = time.perf_counter() - start_time
    values = {
        "episode_reward": moment.returns.mean(),
        "episode_reward_std": moment.returns.std(),  # between this evaluation's episodes
        "duration": seconds,
        "environment_steps": step * args.action_repeat,
        "decisions_per_second": moment.lengths.sum() / seconds,
    }
    values |= {"physics_errors": len(moment.physics_errors)} if moment.physics_errors else {}
    shown = np.stack(some(seen))
    if agent.decoder is not None and shown.ndim == 4:  # a subclass may decode states
        values |= quality(shown, agent.reconstruct(shown))
    log_all(logger, "eval", step, values)
    if args.save_tb:
        log_networks(logger, agent, shown, step)
    save_models(run)


def save_models(run: Run) -> None:
    """Writes networks and replay, if asked for."""
    if run.args.save_model:
        run.agent.save(run.work_dir / "model", run.progress.step)
    if run.args.save_buffer:
        run.replay.save(run.work_dir / "buffer")


def save_video(run: Run) -> None:
    """Writes the recorded episode, if one was, as an mp4 and, thinned to about 100 frames, for TensorBoard."""
    video, step = run.video, run.progress.step
    if video.enabled:
        try:
            if run.args.save_video:
                video.save(f"{step}.mp4")
            run.logger.log_video("eval/video", video.frames[:: -(-len(video.frames) // 100)], step)
        except UserError as error:
            report.say(f"warning: {error}; the run goes on without videos")
            run.video = VideoRecorder(None)
        video.init(enabled=False)  # lets go of the frames


def open_run(
    args: argparse.Namespace, saved: dict[str, Any] | None, lock: Lock, resources: ExitStack
) -> tuple[Run, list[str]]:
    """Makes what the loop uses, and the lines to print first.

    What fails to be made fails before anything is written, except work_dir's `.lock`. `saved` is the index of the
    checkpoint to resume. Raises UserError, which says what to do.
    """
    if args.replay_buffer_capacity < args.batch_size:
        raise UserError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    check_device(args.device)
    if args.precision == "bf16" and saved is None:  # a run that began in bfloat16 goes on in it on any machine
        check_bf16(args.device)
    if args.compile:
        check_compiler()
    set_seed_everywhere(args.seed)
    make = functools.partial(make_env, args, args.seed)
    with closing(make()) as spare:  # not the run's own, which may forbid to be reset within an episode
        try_out(spare, args)
    env = resources.enter_context(closing(make()))
    agent = make_agent(args, env.observation_space.shape, env.action_space.shape)
    loaded = load_encoder(agent, args) if saved is None else []  # a resumed run has it in its checkpoint
    replay = make_replay(args, env, agent.device)
    envs = SideBySide(make, min(args.num_eval_episodes, MAX_ENVS), args.eval_workers)
    run = Run(args, env, agent, replay, resources.enter_context(closing(envs)))
    # For TensorBoard alone, a run on states records no videos: it then needs no renderer.
    recorded = args.save_video or (args.save_tb and args.encoder_type == "pixel")
    run.video = VideoRecorder(run.work_dir / "video" if recorded else None)
    renderer = dmc2gym.renderer_of(env, drawn=args.encoder_type == "pixel" or args.save_video)
    lines = run.open(saved, lock, functools.partial(Logger, run.work_dir, args.save_tb))
    resources.enter_context(closing(run.logger))
    resources.enter_context(run.stop.listen())
    ended = run.progress.ended(args.num_train_steps)
    return run, lines if ended else [*lines, *loaded, *report.describe(run, renderer)]


def carry_out(run: Run, prog: str) -> int:
    """Trains; a signal stops it with a checkpoint. Returns the exit status."""
    if run.progress.ended(run.args.num_train_steps):
        return 0
    try:
        train(run)
        run.save_checkpoint()
    except Stopped:
        run.note_time()
        run.save_checkpoint()
        return run.stop.exit_status(prog, f" at step {run.progress.step}: --resume continues it")
    step, environment_steps = run.progress.step, run.progress.step * run.args.action_repeat
    report.show(f"done: {step:,} decisions, {environment_steps:,} environment steps; all is in {run.work_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, advice = make_parser(), "; --replay_device cpu or --cuda_graph off leaves a GPU more room"
    with report.one_line(parser.complain, advice), ExitStack() as resources:
        with report.one_line(parser.error, advice):
            lock = resources.enter_context(closing(Lock()))
            args, saved = parse_run(parser, argv, lock)
            run, lines = open_run(args, saved, lock, resources)
        for line in lines:
            report.show(line)
        return carry_out(run, parser.prog)
    return 1  # `one_line` has printed an error


if __name__ == "__main__":
    sys.exit(main())
