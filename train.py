"""Trains SAC+AE on a Control Suite task: `python train.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import functools
import sys
import time
from contextlib import ExitStack, closing
from typing import Any, Literal

import cloudpickle
import numpy as np
import torch

import dmc2gym
from errors import UserError
from logger import Logger, log_networks
from randomness import random_action, seed_of
from sac_ae import SacAeAgent
from settings import Count, Weight
from support import report
from support.checks import check_run, parse_run
from support.cuda_graph import Graphs
from support.evaluation import MAX_ENVS, SideBySide, play
from support.flags import OneLineParser, number, settings_of, user_path
from support.machine import cores, make_replay, try_out
from support.run import Progress, Run
from support.signals import Stopped
from utils import FrameStack, eval_mode, set_seed_everywhere
from video import VideoRecorder

AGENTS: dict[str, type[SacAeAgent]] = {"sac_ae": SacAeAgent}
EPISODE_LENGTH = 1000  # environment steps


def make_parser() -> OneLineParser:
    """The command line: each flag with its type, its default and its help text, and what --resume does with it."""
    parser = OneLineParser(
        description="Trains SAC+AE, SAC:pixel (--decoder_type identity) or SAC:state (both types identity)."
    )
    add = parser.section("environment")
    add("domain_name", str, "cheetah", "domain of the Control Suite")
    add("task_name", str, "run", "task of the domain")
    add("image_size", Count, 84, "height and width of observed pixels, even")
    add("action_repeat", number(int, 1, EPISODE_LENGTH), 1, "environment steps per decision")
    add("frame_stack", number(int, 1, 100), 3, "frames in an observation")
    add = parser.section("training (a step is a decision: action_repeat environment steps)")
    add("agent", Literal[tuple(AGENTS)], "sac_ae", "the method")
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
    for name, (kind, default, text) in settings_of(AGENTS.values()).items():
        add(name, kind, default, text)
    add = parser.section("run")
    add("work_dir", user_path, "./log", "run folder; a new one without --resume or --overwrite", resume="command")
    add("resume", bool, False, "continue the run in work_dir, or start one there", resume="command")
    add("overwrite", bool, False, "remove the run in work_dir, and start a new one", resume="command")
    add("checkpoint_minutes", Weight, 10, "minutes between checkpoints, at ends of episodes", resume="free")
    add("checkpoint_freq", Count | None, None, "also a checkpoint every so many decisions", resume="free")
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


# Processes that play evaluation episodes get functions of this file by value: they need not import it, nor PyTorch.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make_agent(args: argparse.Namespace, obs_shape: tuple[int, ...], action_shape: tuple[int, ...]) -> SacAeAgent:
    """The agent of the flags; on a GPU, unless told otherwise, with CUDA graphs."""
    kind = AGENTS[args.agent]
    settings = {name: getattr(args, name) for name in settings_of([kind])}
    agent = kind(obs_shape, action_shape, args.device, **settings)
    agent.check_attributes()
    agent.train()  # a subclass may have added networks
    if args.cuda_graph == "auto" and agent.device.type == "cuda":
        Graphs(agent, report.say)
    return agent


def train(run: Run) -> None:
    """The training loop. A decision: an action, the updates that are due, an environment step, the replay's `add`.

    Raises:
        Stopped: a signal has come; the run can continue from this point.
        UserError: a loss or an action became NaN or infinite, or a file cannot be written.
    """
    args, agent, env, replay, logger, now = run.args, run.agent, run.env, run.replay, run.logger, run.progress
    while True:
        if now.evaluation_due():
            with eval_mode(agent):
                evaluate(run)
            now.next_evaluation = (now.step // args.eval_freq + 1) * args.eval_freq
        if now.step >= args.num_train_steps:
            break
        if run.checkpoint_due():
            run.save_checkpoint()
        obs, over = run.begin_episode(), False
        while not over and now.step < args.num_train_steps:
            run.stop.check()
            if now.action is None:  # a resumed run may hold one: a signal came during the updates that follow it
                if now.step < args.init_steps:
                    now.action = random_action(env.action_space, args.seed, now.step)
                else:
                    now.action = check_finite(agent.sample_action(obs), logger, now.step)
            # The update precedes the environment step: its batch lacks this transition; a GPU works during the step.
            # No updates during the random decisions; then a burst of one for each, all at this step, so that actor and
            # target train in all or none of them, as in the authors' script; then one update a decision.
            owed = range(now.step - now.updates if now.step >= args.init_steps else 0)
            for _ in report.progress(owed, "first updates") if len(owed) > 1 else owed:
                agent.update(replay, logger, now.step)
                now.updates += 1
                run.pace.lap(left=args.num_train_steps - 1 - now.updates)
                run.stop.check()
            next_obs, reward, terminated, truncated, info = env.step(now.action)
            # A time limit (truncated) is not a terminal state: the target still bootstraps.
            replay.add(obs, now.action, reward, next_obs, terminated, first=not now.actions)
            now.actions.append(now.action)
            now.episode_return += float(reward)
            now.step += 1
            obs = run.obs = next_obs
            now.action, over = None, terminated or truncated
            if "physics_error" in info:
                logger.log("train/physics_errors", 1, now.step)
                report.warn_of_divergence(f"step {now.step}", info["physics_error"])
        run.note_time()
        if over:
            log_episode(logger, now, args.action_repeat)
            now.episode, now.actions, now.episode_return, now.seconds = now.episode + 1, [], 0.0, 0.0
    logger.check_losses()  # of the last episode, if it was cut short
    run.save_models()


def check_finite(action: np.ndarray, logger: Logger, step: int) -> np.ndarray:
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


def log_episode(logger: Logger, now: Progress, action_repeat: int) -> None:
    """Writes the line of the episode that has ended."""
    values = {"episode": now.episode, "episode_reward": now.episode_return, "duration": now.seconds}
    values |= {"environment_steps": now.step * action_repeat, "decisions_per_second": len(now.actions) / now.seconds}
    log_all(logger, "train", now.step, values)


def evaluate(run: Run) -> None:
    """Plays `num_eval_episodes` episodes by the policy's mean, in separate environments and with separate seeds."""
    args, agent, logger, step, start_time = run.args, run.agent, run.logger, run.progress.step, time.perf_counter()
    seeds = [seed_of(args.seed, "evaluation", step, episode) for episode in range(args.num_eval_episodes)]
    moments = play(run.eval_envs, seeds, lambda obs: check_finite(agent.select_actions(obs), logger, step))
    run.video.init(enabled=True)
    seen = []
    for moment in report.progress(moments, "evaluation"):
        run.stop.check()  # an interrupted evaluation is played again
        if moment.first_moved:
            run.video.record(run.eval_envs)
            seen += [moment.obs[0].copy()] if args.save_tb else []
    for episode, error in moment.physics_errors.items():
        report.warn_of_divergence(
            f"step {step}, evaluation episode {episode}, decision {moment.lengths[episode]}", error
        )
    run.save_video()
    seconds = time.perf_counter() - start_time
    values = {
        "episode_reward": moment.returns.mean(),
        "episode_reward_std": moment.returns.std(),  # between this evaluation's episodes
        "duration": seconds,
        "environment_steps": step * args.action_repeat,
        "decisions_per_second": moment.lengths.sum() / seconds,
    }
    values |= {"physics_errors": len(moment.physics_errors)} if moment.physics_errors else {}
    log_all(logger, "eval", step, values)
    if args.save_tb:
        log_networks(logger, agent, np.stack(seen[:: max(1, len(seen) // 8)][:8]), step)
    run.save_models()


def open_run(args: argparse.Namespace, parser: OneLineParser, resources: ExitStack) -> Run:
    """Makes what the loop uses. Before all environments, agent and replay exist, only work_dir's `.lock` is written.

    Raises UserError if this is impossible; the message says what to do.
    """
    set_seed_everywhere(args.seed)
    make = functools.partial(make_env, args, args.seed)
    with closing(make()) as spare:
        try_out(spare, args)
        renderer = dmc2gym.renderer_of(spare, drawn=args.encoder_type == "pixel" or args.save_video)
    env = resources.enter_context(closing(make()))
    agent = make_agent(args, env.observation_space.shape, env.action_space.shape)
    run = Run(args, env, agent, make_replay(args, env, agent.device))
    resources.enter_context(run.work_dir.lock())
    envs = SideBySide(make, min(args.num_eval_episodes, MAX_ENVS), args.eval_workers)
    run.eval_envs = resources.enter_context(closing(envs))
    lines = run.open(parser, functools.partial(Logger, run.work_dir.path, args.save_tb))
    resources.enter_context(closing(run.logger))
    # For TensorBoard alone, a run on states records no videos: it then needs no renderer.
    recorded = args.save_video or (args.save_tb and args.encoder_type == "pixel")
    run.video = VideoRecorder(run.work_dir.path / "video" if recorded else None)
    resources.enter_context(run.stop.listen())
    run.lines = [*lines, *(() if run.ended() else report.describe(run, renderer))]
    return run


def carry_out(run: Run, prog: str) -> int:
    """Trains; a signal stops it with a checkpoint. Returns the exit status."""
    for line in run.lines:
        report.show(line)
    if run.ended():
        return 0
    try:
        train(run)
        run.save_checkpoint()
    except Stopped:
        run.note_time()
        run.save_checkpoint()
        return run.stop.exit_status(prog, f" at step {run.progress.step}: --resume continues it")
    step, environment_steps = run.progress.step, run.progress.step * run.args.action_repeat
    report.show(f"done: {step:,} decisions, {environment_steps:,} environment steps; all is in {run.work_dir.path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    with report.one_line(parser.complain), ExitStack() as resources:
        with report.one_line(parser.error):
            args = parse_run(parser, argv)
            check_run(args, parser)
            run = open_run(args, parser, resources)
        return carry_out(run, parser.prog)
    return 1  # `one_line` has printed an error


if __name__ == "__main__":
    sys.exit(main())
