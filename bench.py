"""Measures speed beside the plain way of doing the same, which is tests/plain.py: `python bench.py all`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gym.wrappers import TimeLimit

import dmc2gym
import train
from sac_ae import SacAeAgent, set_precision
from support import cuda_graph, report
from support.checkpoint import Lock
from support.evaluation import SideBySide, play
from support.flags import OneLineParser, number
from support.machine import check_bf16, check_compiler, cores
from utils import ReplayBuffer, set_seed_everywhere

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from plain import PlainAgent, PlainEnv, PlainReplay

Calls = dict[str, Callable[[], Any]]
OBS: dict[str, np.ndarray] = {"pixel": np.zeros((9, 84, 84), np.uint8), "state": np.zeros(17)}
ACTION_SHAPE, BATCH_SIZE, CAPACITY = (6,), 128, 10_000  # transitions in a replay
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WARMUP = cuda_graph.WARMUP + 2 if ON_GPU else 2  # rounds that are not measured; CUDA graphs are captured in them
MOST_SECONDS = 40.0  # of a table: after these no round begins


def compare(title: str, calls: Calls, rounds: int, parts: int = 1) -> None:
    """Times calls and prints a table, beside the last call, which is the plain way.

    The calls take turns, so that a change of the machine's load meets all of them. A call does `parts` of what the
    title says.
    """
    synchronize = torch.get_device_module(DEVICE).synchronize
    for call in WARMUP * list(calls.values()):
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1e6 / parts)
        if time.perf_counter() - begun >= MOST_SECONDS:
            break
    report.show(f"\n{title}\n\n| | microseconds (middle half) | plain way takes |\n|---|---|---|")
    plain = np.median(list(times.values())[-1])
    for name, values in times.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        report.show(f"| {name} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {plain / median:.2f} times as long |")


def make_replay(kind: str, make: Callable[..., Any] = ReplayBuffer, **more: Any) -> Any:
    """A replay that is full of one episode of random frames, stacked in threes, or of random states."""
    obs_shape, random = OBS[kind].shape, np.random.default_rng(0)
    replay = make(obs_shape, ACTION_SHAPE, CAPACITY, BATCH_SIZE, DEVICE, **more)
    stacked = 3 if kind == "pixel" else 1
    frames = random.integers(0, 256, (CAPACITY + stacked, obs_shape[0] // stacked, *obs_shape[1:]), np.uint8)
    for step in range(CAPACITY):
        obs, next_obs = (frames[first : first + stacked].reshape(obs_shape) for first in (step, step + 1))
        replay.add(obs, random.uniform(-1, 1, ACTION_SHAPE), 0.5, next_obs, False)
    return replay


def flags(kind: str, *more: str) -> argparse.Namespace:
    """Flags of train.py: cheetah run, action repeat 4."""
    types = [] if kind == "pixel" else ["--encoder_type=identity", "--decoder_type=identity"]
    return train.make_parser().parse_args(["--action_repeat=4", *types, *more])


def make_agents(kind: str, *more: str) -> tuple[SacAeAgent, PlainAgent]:
    """The agent of these flags and the plain one, whose parameters are the same at each call."""
    set_seed_everywhere(1)
    agent = train.make_agent(flags(kind, *more), OBS[kind].shape, ACTION_SHAPE)
    return agent, PlainAgent(*(net and net.state_dict() for net in (agent.actor, agent.critic, agent.decoder)))


def bench_replay(kind: str, rounds: int) -> None:
    """An `add` and a batch: of the replay, wherever its frames can be, and of plain storage."""
    replays = {"each frame once, host memory": make_replay(kind)}
    if ON_GPU:
        replays["each frame once, on the GPU"] = make_replay(kind, frames_device=DEVICE)
    replays["plain: both stacks of every transition, host memory"] = make_replay(kind, PlainReplay)
    # The observation continues itself, so that one frame of a transition is new.
    still = OBS[kind], np.zeros(ACTION_SHAPE), 0.5, OBS[kind], False
    adds: Calls = {name: partial(replay.add, *still) for name, replay in replays.items()}
    compare(f"Replay, {kind}: one `add`", adds, rounds)
    samples: Calls = {name: replay.sample for name, replay in replays.items()}
    compare(f"Replay, {kind}: one batch of {BATCH_SIZE}", samples, rounds)


def bench_update(kind: str, rounds: int) -> None:
    """Two updates, one of them with the actor; each takes a batch from the replay."""
    variants: dict[str, list[str]] = {"this": [], "this, bf16": ["--precision=bf16"]}
    if ON_GPU:
        variants |= {"this, fp32": ["--precision=fp32"], "this, tf32": ["--precision=tf32"]}
        variants |= {"this, without CUDA graphs": ["--cuda_graph=off"], "this, compiled": ["--compile"]}
    replay, plain_replay = make_replay(kind, frames_device=DEVICE), make_replay(kind, PlainReplay)

    def two_updates(agent: SacAeAgent) -> None:
        set_precision(agent.settings.precision)  # the process has one, and each variant's agent has set its own
        for step in range(2):
            agent.update_from(replay.sample(), agent.due(step))

    def two_plain_updates() -> None:
        set_precision(None)
        for step in range(2):
            plain.update(plain_replay.sample(), step)

    calls = Calls()
    for name, more in variants.items():
        with report.one_line(lambda reason: report.show(f"\nNot measured: {reason}")):
            if "bf16" in name:
                check_bf16(DEVICE)
            if "compiled" in name:
                check_compiler()
            agent, plain = make_agents(kind, *more)
            calls[name] = partial(two_updates, agent)
    calls["plain"] = two_plain_updates
    compare(f"Update, {kind}: mean of one with the actor and one without", calls, rounds, parts=2)


def bench_act(kind: str, rounds: int) -> None:
    """An action for one observation, from host memory and back."""
    agent, plain = make_agents(kind)
    calls: Calls = {"this": lambda: agent.sample_action(OBS[kind]), "plain": lambda: plain.act(OBS[kind][None])}
    compare(f"Acting, {kind}", calls, rounds)


def bench_train(kind: str, rounds: int) -> None:
    """A decision of train.py's own loop, update and environment included, without evaluation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as resources:
        more = "--init_steps=1", "--num_eval_episodes=1", "--replay_buffer_capacity=10000", f"--work_dir={folder}/run"
        run: Any = train.open_run(flags(kind, *more), None, Lock(), resources)[0]
        env = resources.enter_context(contextlib.closing(train.make_env(run.args, seed=1)))
        plain = make_agents(kind)[1].train(env, make_replay(kind, PlainReplay))
        now, begin_episode = run.progress, run.begin_episode
        now.next_evaluation = sys.maxsize
        run.logger.check_losses = lambda: None  # not at the end of each call, which would wait for a GPU
        run.begin_episode = lambda: run.obs if now.actions else begin_episode()  # a call continues the episode

        def two_decisions() -> None:
            run.args.num_train_steps = now.step + 2
            with contextlib.redirect_stdout(None):  # lines of episodes
                train.train(run)

        calls: Calls = {"this": two_decisions, "plain": lambda: (next(plain), next(plain))}
        compare(f"End to end, {kind}: one decision of cheetah run, action repeat 4", calls, rounds, parts=2)


def bench_env(kind: str, rounds: int) -> None:
    """The environment's part of a decision: four simulator steps, and the picture or the state."""
    env, plain_env = train.make_env(flags(kind), seed=1), PlainEnv("cheetah", "run", 4, kind == "pixel")
    with contextlib.closing(env), contextlib.closing(plain_env):
        env.reset()
        action = env.action_space.sample()
        calls: Calls = {"this": lambda: env.step(action), "plain": lambda: plain_env.step(action)}
        compare(f"Environment, {kind}: cheetah run, action repeat 4", calls, rounds)


def bench_eval(kind: str, rounds: int) -> None:
    """An evaluation of ten short episodes: side by side, and one after the other."""
    (agent, plain), calls = make_agents(kind), Calls()
    with contextlib.ExitStack() as resources:
        for name, act, num_envs, num_workers in (
            (f"{min(10, cores())} processes", agent.select_actions, 10, cores()),
            ("in this process", agent.select_actions, 10, 1),
            ("plain", plain.act, 1, 1),
        ):
            envs = SideBySide(lambda: TimeLimit(train.make_env(flags(kind), 1), 25), num_envs, num_workers)
            moments = partial(play, resources.enter_context(contextlib.closing(envs)), range(10), act)
            calls[name] = lambda moments=moments: list(moments())  # type: ignore[misc]
        compare(f"Evaluation, {kind}: ten episodes of 25 decisions", calls, rounds)


BENCHES = {"replay": bench_replay, "update": bench_update, "act": bench_act, "train": bench_train}
BENCHES |= {"env": bench_env, "eval": bench_eval}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=[*BENCHES, "all"], help="what to measure")
    add("--kind", choices=list(OBS), help="observations; None: both")
    add("--rounds", type=number(int, 1), default=1000 if ON_GPU else 100, help="of a table; it ends after 40 seconds")
    args = parser.parse_args(argv)
    with report.one_line(parser.error):
        dmc2gym.task_names()  # the suite is there
    with report.one_line(parser.fail):
        machine = report.provenance(DEVICE) | {"threads": torch.get_num_threads()}
        report.show(json.dumps(machine | {"instructions": torch.backends.cpu.get_cpu_capability()}))
        for name in BENCHES if args.command == "all" else [args.command]:
            for kind in [args.kind] if args.kind else OBS:
                BENCHES[name](kind, args.rounds)


if __name__ == "__main__":
    main()
