"""Measures speed beside the plain way of doing the same, which is tests/plain.py: `python bench.py all`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import contextlib
import itertools
import json
import platform
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
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import train
from files import write_json
from sac_ae import SacAeAgent
from support import cuda_graph, report
from support.evaluation import SideBySide, play
from support.flags import OneLineParser, number, user_path
from support.machine import check_bf16, check_compiler, cores
from utils import ReplayBuffer, set_seed_everywhere

sys.path.insert(0, str(Path(__file__).parent / "tests"))
import roofline
from plain import PlainAgent, PlainEnv, PlainReplay

Results = dict[str, Any]
Calls = dict[str, Callable[[], Any]]
OBS: dict[str, np.ndarray] = {"pixel": np.zeros((9, 84, 84), np.uint8), "state": np.zeros(17)}
ACTION_SHAPE, BATCH_SIZE = (6,), 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WARMUP = cuda_graph.WARMUP + 2 if ON_GPU else 2  # rounds that are not measured; CUDA graphs are captured in them
MOST_SECONDS = 40.0  # of a table: after these no round begins


def compare(title: str, calls: Calls, rounds: int, parts: int = 1) -> Results:
    """Times calls, prints a table and returns its numbers. A call does `parts` of what the title says.

    The calls take turns, so that a change of the machine's load meets all of them. The last is the plain way.
    """
    for call in WARMUP * list(calls.values()):
        call()
    synchronize = torch.get_device_module(DEVICE).synchronize
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
    results, plain = {}, np.median(list(times.values())[-1])
    for name, microseconds in times.items():
        low, median, high = np.percentile(microseconds, (25, 50, 75))
        ratio = plain / median
        report.show(f"| {name} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {ratio:.2f} times as long |")
        results[name] = {"median_us": median, "low_us": low, "high_us": high, "plain_over_this": ratio}
    return results


def make_replay(kind: str, make: Callable[..., Any] = ReplayBuffer, capacity: int = 2000, **more: Any) -> Any:
    """A replay that is full of one episode of random frames, stacked in threes, or of random states."""
    replay = make(OBS[kind].shape, ACTION_SHAPE, capacity, BATCH_SIZE, DEVICE, **more)
    random, pixels = np.random.default_rng(0), kind == "pixel"
    draw = partial(random.integers, 0, 256, (3, 84, 84), np.uint8) if pixels else partial(random.standard_normal, 17)
    frames = [draw() for _ in range(3 if pixels else 1)]
    for _ in range(capacity):
        obs, frames = np.concatenate(frames), [*frames[1:], draw()]
        replay.add(obs, random.uniform(-1, 1, ACTION_SHAPE), 0.5, np.concatenate(frames), False)
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


def bench_replay(kind: str, args: argparse.Namespace) -> Results:
    """An `add` and a batch: of the replay, wherever its frames can be, and of plain storage."""
    replays = {"each frame once, host memory": make_replay(kind, capacity=args.capacity)}
    if ON_GPU:
        replays["each frame once, on the GPU"] = make_replay(kind, capacity=args.capacity, frames_device=DEVICE)
    replays["plain: both stacks of every transition, host memory"] = make_replay(kind, PlainReplay, args.capacity)
    for name, replay in replays.items():
        report.show(f"{name}: {replay.nbytes:,} bytes for {args.capacity:,} transitions")
    # The observation continues itself, so that one frame of a transition is new.
    still = OBS[kind], np.zeros(ACTION_SHAPE), 0.5, OBS[kind], False
    adds: Calls = {name: partial(replay.add, *still) for name, replay in replays.items()}
    samples: Calls = {name: replay.sample for name, replay in replays.items()}
    return {
        "add": compare(f"Replay, {kind}: one `add`", adds, args.rounds),
        "sample": compare(f"Replay, {kind}: one batch of {BATCH_SIZE}", samples, args.rounds),
    }


def bench_update(kind: str, args: argparse.Namespace) -> Results:
    """Two updates, one of them with the actor; each takes a batch from the replay."""
    variants: dict[str, list[str]] = {"this": [], "this, bf16": ["--precision=bf16"]}
    if ON_GPU:
        variants |= {"this, fp32": ["--precision=fp32"], "this, tf32": ["--precision=tf32"]}
        variants |= {"this, without CUDA graphs": ["--cuda_graph=off"], "this, compiled": ["--compile"]}
    if ON_GPU and kind == "pixel":  # sources disagree on what these do
        for precision, trial in itertools.product(("tf32", "bf16"), ("channels-last", "cudnn.benchmark")):
            variants[f"this, {precision}, {trial}"] = [f"--precision={precision}"]
    replay, plain_replay = make_replay(kind, frames_device=DEVICE), make_replay(kind, PlainReplay)

    def two_updates(agent: SacAeAgent, benchmark: bool) -> None:
        torch.backends.cudnn.benchmark = benchmark  # cuDNN tries its algorithms and takes the fastest
        for step in range(2):
            agent.update_from(replay.sample(), agent.due(step))
        torch.backends.cudnn.benchmark = False

    calls: Calls = {}
    for name, more in variants.items():
        with report.one_line(lambda reason: report.show(f"\nNot measured: {reason}")):
            if "bf16" in name:
                check_bf16(DEVICE, num_filters=32, hidden_dim=1024)
            if "compiled" in name:
                check_compiler(str(DEVICE))
            agent, plain = make_agents(kind, *more)
            if "channels-last" in name:  # the layout in which a GPU's tensor cores take pixels and kernels
                agent.layout = torch.channels_last
                torch.nn.ModuleDict(agent.networks).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            calls[name] = partial(two_updates, agent, "cudnn.benchmark" in name)
    calls["plain"] = lambda: [plain.update(plain_replay.sample(), step) for step in range(2)]
    results = compare(f"Update, {kind}: mean of one with the actor and one without", calls, args.rounds, parts=2)
    with FlopCounterMode(display=False) as counter:
        calls["this, without CUDA graphs" if ON_GPU else "this"]()
    return results | {"floor": floor(counter.get_total_flops() / 2, results["this"]["median_us"])}


def floor(flops: float, measured_us: float) -> Results:
    """The least that an update's operations can take on this machine, at the measured rate of a matrix product."""
    size = 4096 if ON_GPU else 1024
    matrices = {"left": torch.randn(size, size, device=DEVICE), "right": torch.randn(size, size, device=DEVICE)}
    product = Timer("left @ right", globals=matrices, num_threads=torch.get_num_threads())
    rate = 2 * size**3 / product.blocked_autorange().median
    least_us = flops / rate * 1e6
    report.show(
        f"\nFloor: {flops / 1e9:.2f} GFLOP at the measured {rate / 1e9:,.0f} GFLOP/s: {least_us:,.0f} us; "
        f"the update reaches {least_us / measured_us:.0%} of that."
    )
    return {"gflop": flops / 1e9, "gflop_per_s": rate / 1e9, "least_us": least_us, "reached": least_us / measured_us}


def bench_act(kind: str, args: argparse.Namespace) -> Results:
    """An action for one observation, from host memory and back."""
    agent, plain = make_agents(kind)
    calls: Calls = {"this": lambda: agent.sample_action(OBS[kind]), "plain": lambda: plain.act(OBS[kind][None])}
    return compare(f"Acting, {kind}", calls, args.rounds)


def bench_train(kind: str, args: argparse.Namespace) -> Results:
    """A decision of train.py's own loop, update and environment included, without evaluation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as resources:
        more = "--init_steps=1", "--num_eval_episodes=1", "--replay_buffer_capacity=10000", f"--work_dir={folder}/run"
        run: Any = train.open_run(flags(kind, *more), train.make_parser(), resources)
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
        return compare(f"End to end, {kind}: one decision of cheetah run, action repeat 4", calls, args.rounds, parts=2)


def bench_env(kind: str, args: argparse.Namespace) -> Results:
    """The environment's part of a decision: four simulator steps, and the picture or the state."""
    env, plain_env = train.make_env(flags(kind), seed=1), PlainEnv("cheetah", "run", 4, kind == "pixel")
    with contextlib.closing(env), contextlib.closing(plain_env):
        env.reset()
        action = env.action_space.sample()
        calls: Calls = {"this": lambda: env.step(action), "plain": lambda: plain_env.step(action)}
        return compare(f"Environment, {kind}: cheetah run, action repeat 4", calls, args.rounds)


def bench_eval(kind: str, args: argparse.Namespace) -> Results:
    """An evaluation of ten short episodes: side by side, and one after the other."""
    (agent, plain), workers = make_agents(kind), min(10, cores())
    with contextlib.ExitStack() as resources:

        def evaluation(act: Callable[..., Any], num_envs: int, num_workers: int) -> Callable[[], Any]:
            envs = SideBySide(lambda: TimeLimit(train.make_env(flags(kind), 1), 25), num_envs, num_workers)
            resources.enter_context(contextlib.closing(envs))
            return lambda: list(play(envs, range(10), act))

        calls = {
            f"{workers} processes": evaluation(agent.select_actions, 10, workers),
            "in this process": evaluation(agent.select_actions, 10, 1),
            "plain": evaluation(plain.act, 1, 1),
        }
        return compare(f"Evaluation, {kind}: ten episodes of 25 decisions", calls, args.rounds)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    benches = {"replay": bench_replay, "update": bench_update, "act": bench_act, "train": bench_train}
    benches |= {"env": bench_env, "eval": bench_eval}
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=[*benches, "all", "count"], help="what to measure; count: what updates take at least")
    add("--kind", choices=list(OBS), help="observations; None: both")
    add("--rounds", type=number(int, 1), default=1000 if ON_GPU else 100, help="of a table; it ends after 40 seconds")
    add("--capacity", type=number(int, 1), default=10_000, help="transitions of the replay")
    add("--gpu", type=roofline.gpu, default="h100", help="of count: h100, a100, 4090, or its peaks TB/s,FP32,TF32,BF16")
    add("--out", type=user_path, help="file for the numbers as JSON")
    args = parser.parse_args(argv)
    kinds = [args.kind] if args.kind else list(OBS)
    with report.one_line(parser.fail):
        if args.command == "count":
            roofline.show(args.gpu, {kind: OBS[kind].shape for kind in kinds}, ACTION_SHAPE, BATCH_SIZE)
            return
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
        about = {"processor": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}
        about["instructions"] = torch.backends.cpu.get_cpu_capability()
        results: Results = {"machine": report.provenance(DEVICE) | about}
        report.show(json.dumps(results["machine"]))
        for name in benches if args.command == "all" else [args.command]:
            for kind in kinds:
                results[f"{name}_{kind}"] = benches[name](kind, args)
        if args.out:
            write_json(Path(args.out), results)


if __name__ == "__main__":
    main()
