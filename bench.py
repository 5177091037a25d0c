"""Measures speed beside the plain way of doing the same, which is tests/plain.py: `python bench.py all`."""

from __future__ import annotations

from support import start

if __name__ == "__main__":
    start.program()

import argparse
import contextlib
import io
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gym.wrappers import TimeLimit
from torch.utils.flop_counter import FlopCounterMode

import train
from files import write_json
from sac_ae import SacAeAgent
from support import cuda_graph, report
from support.evaluation import SideBySide, play
from support.flags import OneLineParser, number, user_path
from support.machine import check_bf16, check_compiler, cores
from support.prefetch import Prefetched
from utils import ReplayBuffer, set_seed_everywhere

sys.path.insert(0, str(Path(__file__).parent / "tests"))
import roofline
from plain import PlainAgent, PlainEnv, PlainReplay

Results = dict[str, Any]
Times = dict[str, list[float]]
Calls = dict[str, Callable[[], Any]]
OBS_SHAPES = {"pixel": (9, 84, 84), "state": (17,)}
ACTION_SHAPE, BATCH_SIZE = (6,), 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WARMUP = cuda_graph.WARMUP + 2 if ON_GPU else 2  # rounds that are not measured; CUDA graphs are captured in them
LEAST_ROUNDS, MOST_SECONDS = 3, 40.0  # of a table: after these seconds no round begins, unless there were fewer


def measure(calls: Calls, times: Times) -> None:
    """Makes each call once, in turn, and adds its seconds to `times`."""
    synchronize = torch.get_device_module(DEVICE).synchronize
    for name, call in calls.items():
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.setdefault(name, []).append(time.perf_counter() - start)


def interleaved(calls: Calls, rounds: int) -> Times:
    """Seconds of each call, round after round, so that a change of the machine's load meets all calls."""
    for _ in range(WARMUP):
        measure(calls, {})
    times, begun = Times(), time.perf_counter()
    for index in range(rounds):
        if index < LEAST_ROUNDS or time.perf_counter() - begun < MOST_SECONDS:
            measure(calls, times)
    return times


def show(title: str, times: Times, parts: int = 1) -> Results:
    """Prints a table and returns its numbers. A call does `parts` of what the title says; the last is the plain way."""
    report.show(f"\n{title}\n\n| | microseconds (middle half) | plain way takes |\n|---|---|---|")
    results, plain = {}, np.median(list(times.values())[-1]) * 1e6 / parts
    for name, seconds in times.items():
        low, median, high = np.percentile(seconds, (25, 50, 75)) * 1e6 / parts
        ratio = plain / median
        report.show(f"| {name} | {median:,.0f} ({low:,.0f} to {high:,.0f}) | {ratio:.2f} times as long |")
        results[name] = {"median_us": median, "low_us": low, "high_us": high, "plain_over_this": ratio}
    return results


def transitions(count: int, kind: str = "pixel") -> Iterator[tuple[Any, ...]]:
    """Transitions of an endless episode of random frames, stacked in threes, or of random states."""
    random, pixels = np.random.default_rng(0), kind == "pixel"
    draw = partial(random.integers, 0, 256, (3, 84, 84), np.uint8) if pixels else partial(random.standard_normal, 17)
    frames = [draw() for _ in range(3 if pixels else 1)]
    for _ in range(count):
        obs, frames = np.concatenate(frames), [*frames[1:], draw()]
        yield obs, random.uniform(-1, 1, ACTION_SHAPE), 0.5, np.concatenate(frames), False


def flags(kind: str, *more: str) -> argparse.Namespace:
    """Flags of train.py: cheetah run, action repeat 4."""
    types = [] if kind == "pixel" else ["--encoder_type", "identity", "--decoder_type", "identity"]
    return train.make_parser().parse_args(["--action_repeat", "4", *types, *more])


def make_agents(kind: str, *more: str) -> tuple[SacAeAgent, PlainAgent]:
    """The agent of these flags and the plain one, whose parameters are the same at each call."""
    set_seed_everywhere(1)
    agent = train.make_agent(flags(kind, *more), OBS_SHAPES[kind], ACTION_SHAPE)
    return agent, PlainAgent(*(net and net.state_dict() for net in (agent.actor, agent.critic, agent.decoder)))


def bench_replay(capacity: int, batches: int) -> Results:
    """An `add` and a batch: of the replay, wherever its frames can be, and of plain storage."""
    args = (OBS_SHAPES["pixel"], ACTION_SHAPE, capacity, BATCH_SIZE, DEVICE)
    storages: dict[str, Any] = {"each frame once, host memory": ReplayBuffer(*args)}
    if ON_GPU:
        storages["each frame once, on the GPU"] = ReplayBuffer(*args, frames_device=DEVICE)
        storages["each frame once, host memory, prefetched"] = Prefetched(ReplayBuffer(*args))
    storages["plain: both stacks of every transition, host memory"] = PlainReplay(*args)
    adds, samples = Times(), Times()
    for index, transition in enumerate(transitions(capacity)):
        measure({name: partial(storage.add, *transition) for name, storage in storages.items()}, adds)
        if index >= capacity - batches:
            time.sleep(0.02 if ON_GPU else 0)  # about an update, in which the next batch is prefetched
            measure({name: storage.sample for name, storage in storages.items()}, samples)
    for name, storage in storages.items():
        report.show(f"{name}: {storage.nbytes:,} bytes for {capacity:,} transitions")
    return {
        "bytes": {name: storage.nbytes for name, storage in storages.items()},
        "add": show("Replay: one `add`", adds),
        "sample": show(f"Replay: one batch of {BATCH_SIZE}", samples),
    }


def in_channels_last(agent: SacAeAgent, updates: Callable[[], Any]) -> Callable[[], Any]:
    """The updates, with pixels and kernels in the layout in which a GPU's tensor cores take them."""
    agent.layout = torch.channels_last
    for network in agent.networks.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return updates


def with_fastest_algorithms(_agent: SacAeAgent, updates: Callable[[], Any]) -> Callable[[], Any]:
    """The updates, for whose convolutions cuDNN tries its algorithms and takes the fastest."""

    def call() -> None:
        torch.backends.cudnn.benchmark = True
        updates()
        torch.backends.cudnn.benchmark = False

    return call


TRIALS = {"channels-last": in_channels_last, "cudnn.benchmark": with_fastest_algorithms}


def bench_update(kind: str, rounds: int) -> Results:
    """Two updates, one of them with the actor; each takes a batch from the replay."""
    variants: dict[str, list[str]] = {"this": []}
    not_measured = partial(report.one_line, lambda reason: report.show(f"\nNot measured: {reason}"))
    with not_measured():
        check_bf16(DEVICE, filters=32 if kind == "pixel" else 0, hidden_dim=1024)
        variants["this, bf16"] = ["--precision", "bf16"]
    if ON_GPU:
        variants |= {f"this, {precision}": ["--precision", precision] for precision in ("fp32", "tf32")}
        variants["this, without CUDA graphs"] = ["--cuda_graph", "off"]
        with not_measured():
            check_compiler(str(DEVICE))
            variants["this, compiled"] = ["--compile"]
    if ON_GPU and kind == "pixel":  # sources disagree on what these do
        for precision in ("tf32", "bf16"):
            variants |= {f"this, {precision}, {trial}": ["--precision", precision] for trial in TRIALS}
    args = (OBS_SHAPES[kind], ACTION_SHAPE, 2000, BATCH_SIZE, DEVICE)
    replay, plain_replay, plain = ReplayBuffer(*args, frames_device=DEVICE), PlainReplay(*args), make_agents(kind)[1]
    for transition in transitions(2000, kind):
        replay.add(*transition)
        plain_replay.add(*transition)
    calls: dict[str, Any] = {}
    for name, more in variants.items():
        agent = make_agents(kind, *more)[0]
        calls[name] = lambda agent=agent: [agent.update_from(replay.sample(), agent.due(step)) for step in range(2)]
        if (trial := name.rpartition(", ")[2]) in TRIALS:
            calls[name] = TRIALS[trial](agent, calls[name])
    calls["plain"] = lambda: [plain.update(plain_replay.sample(), step) for step in range(2)]
    results = show(f"Update, {kind}: mean of one with the actor and one without", interleaved(calls, rounds), parts=2)
    with FlopCounterMode(display=False) as counter:
        calls["this, without CUDA graphs" if ON_GPU else "this"]()
    return results | {"floor": floor(counter.get_total_flops() / 2, results["this"]["median_us"])}


def floor(flops: float, measured_us: float) -> Results:
    """The least that an update's operations can take on this machine, at the measured rate of a matrix product."""
    size = 4096 if ON_GPU else 1024
    left, right = torch.randn(2, size, size, device=DEVICE)
    rate = 2 * size**3 / np.median(interleaved({"product": lambda: left @ right}, rounds=10)["product"])
    floor = {"gflop": flops / 1e9, "gflop_per_s": rate / 1e9, "least_us": flops / rate * 1e6}
    floor["reached"] = floor["least_us"] / measured_us
    text = "{gflop:.2f} GFLOP at the measured {gflop_per_s:,.0f} GFLOP/s: {least_us:,.0f} us; the update reaches"
    report.show(f"\nFloor: {text.format(**floor)} {floor['reached']:.0%} of that.")
    return floor


def bench_act(kind: str, rounds: int) -> Results:
    """An action for one observation, from host memory and back."""
    (agent, plain), (obs, *_) = make_agents(kind), next(transitions(1, kind))
    calls = {"this": lambda: agent.sample_action(obs), "plain": lambda: plain.act(obs[None])}
    return show(f"Acting, {kind}", interleaved(calls, rounds))


def bench_env(kind: str, rounds: int) -> Results:
    """The environment's part of a decision: four simulator steps, and the picture or the state."""
    env, plain_env = train.make_env(flags(kind), seed=1), PlainEnv("cheetah", "run", 4, kind == "pixel")
    with contextlib.closing(env), contextlib.closing(plain_env):
        env.reset()
        action = env.action_space.sample()
        times = interleaved({"this": lambda: env.step(action), "plain": lambda: plain_env.step(action)}, rounds)
    return show(f"Environment, {kind}: cheetah run, action repeat 4", times)


def bench_evaluation(rounds: int) -> Results:
    """An evaluation of ten short episodes from pixels: side by side, and one after the other."""
    (agent, plain), length, args, workers = make_agents("pixel"), 25, flags("pixel"), min(10, cores())
    ways: dict[str, Any] = {  # how actions are chosen, and how many environments and processes play
        f"{workers} processes": (agent.select_actions, 10, workers),
        "in this process": (agent.select_actions, 10, 1),
        "plain": (plain.act, 1, 1),
    }
    with contextlib.ExitStack() as resources:
        calls: dict[str, Any] = {}
        for name, (act, *size) in ways.items():
            envs = SideBySide(lambda: TimeLimit(train.make_env(args, 1), length), *size)
            resources.enter_context(contextlib.closing(envs))
            calls[name] = lambda envs=envs, act=act: list(play(envs, range(10), act))
        return show(f"Evaluation: ten episodes of {length} decisions", interleaved(calls, rounds))


def bench_train(kind: str, rounds: int) -> Results:
    """A decision of train.py's own loop, update and environment included, without evaluation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as resources:
        resources.enter_context(contextlib.redirect_stdout(io.StringIO()))
        more = "--init_steps=1", "--num_eval_episodes=1", "--replay_buffer_capacity=10000", f"--work_dir={folder}/run"
        run: Any = train.open_run(flags(kind, *more), train.make_parser(), resources)
        env = resources.enter_context(contextlib.closing(train.make_env(run.args, seed=1)))
        replay = PlainReplay(OBS_SHAPES[kind], ACTION_SHAPE, 10_000, BATCH_SIZE, DEVICE)
        plain, now, begin_episode = make_agents(kind)[1].train(env, replay), run.progress, run.begin_episode
        now.next_evaluation = sys.maxsize
        run.begin_episode = lambda: run.obs if now.actions else begin_episode()  # a call continues the episode
        run.logger.check_losses = lambda: None  # not at the end of each call

        def two_decisions() -> None:
            run.args.num_train_steps = now.step + 2
            train.train(run)

        times = interleaved({"this": two_decisions, "plain": lambda: (next(plain), next(plain))}, rounds)
    return show(f"End to end, {kind}: one decision of cheetah run, action repeat 4", times, parts=2)


def machine() -> Results:
    """What the numbers depend on."""
    information = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    about = {
        "device": torch.cuda.get_device_name(DEVICE) if ON_GPU else [*models, platform.machine()][0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    return about | report.provenance(DEVICE)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = OneLineParser(description=__doc__)
    add, commands = parser.add_argument, ("replay", "update", "act", "train", "env", "eval")
    add("command", choices=[*commands, "all", "count"], help="what to measure; count: what updates take at least")
    add("--kind", choices=list(OBS_SHAPES), help="observations; None: both")
    add("--rounds", type=number(int, 1), default=1000 if ON_GPU else 100, help="of a table; it ends after 40 seconds")
    add("--capacity", type=number(int, 1), default=10_000, help="transitions of the replay")
    add("--gpu", type=roofline.gpu, default="h100", help="of count: h100, a100, 4090, or its peaks TB/s,FP32,TF32,BF16")
    add("--out", type=user_path, help="file for the numbers as JSON")
    args = parser.parse_args(argv)
    kinds, rounds = [args.kind] if args.kind else list(OBS_SHAPES), args.rounds
    if args.command == "count":
        with report.one_line(parser.fail):
            roofline.show(args.gpu, {kind: OBS_SHAPES[kind] for kind in kinds}, ACTION_SHAPE, BATCH_SIZE)
        return
    # By their names among the results, which begin with the command.
    parts: Calls = {"replay": lambda: bench_replay(args.capacity, rounds)}
    for kind in kinds:
        for name, bench in {"update": bench_update, "act": bench_act, "train": bench_train}.items():
            parts[f"{name}_{kind}"] = partial(bench, kind, rounds)
    parts |= {
        "env": lambda: {kind: bench_env(kind, rounds) for kind in kinds},
        "eval": lambda: bench_evaluation(rounds),
    }
    results: Results = {"machine": machine()}
    with report.one_line(parser.fail):
        report.show(json.dumps(results["machine"]))
        for name, part in parts.items():
            if args.command in ("all", name.partition("_")[0]):
                results[name] = part()
        if args.out:
            write_json(Path(args.out), results)


if __name__ == "__main__":
    main()
