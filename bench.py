"""Speed, beside the plain way of doing the same, measured in one run: `python bench.py all`.

The plain way is the tests' restatement of the published script: every pass on its own, an Adam step per tensor, losses
fetched at each update, both stacks of every transition in NumPy, the environment after the update.
"""

from __future__ import annotations

import streams

if __name__ == "__main__":
    streams.mend()

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import train  # first: it sets how PyTorch's threads wait  # isort: skip

import numpy as np
import psutil
import torch
from dm_control import suite
from torch.utils.flop_counter import FlopCounterMode

from cuda_graph import GraphedAgent
from evaluation import SideBySide
from flags import OneLineParser, user_path
from precision import check_bf16
from sac_ae import SacAeAgent
from utils import ReplayBuffer, set_seed_everywhere

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from plain import PlainAgent, PlainReplay, policy

OBS_SHAPE, ACTION_SHAPE, BATCH_SIZE = (9, 84, 84), (6,), 128
STATE_SHAPE = (17,)
EPISODE_LENGTH = 250  # decisions, at an action repeat of 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEAST_ROUNDS, MOST_SECONDS = 3, 40.0  # of a table, whose rounds end early: all of them together take ten minutes
Results = dict[str, Any]


class Silent:
    """A logger that forgets."""

    def log(self, key: str, value: Any, step: int) -> None:
        """Does nothing."""


def synchronize() -> None:
    """Waits for what was started on a GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, pause: float = 0
) -> dict[str, list[float]]:
    """Seconds of each call in turn, round after round, so that all see the machine in the same moods.

    After MOST_SECONDS no round begins, if there were LEAST_ROUNDS.
    After each call `pause` seconds are left to whatever it does in the background, as an update would leave them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for index in range(warmup + rounds):
        if index >= warmup + LEAST_ROUNDS and time.perf_counter() - begun > MOST_SECONDS:
            break
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
            if pause:
                time.sleep(pause)
    return times


def summary(seconds: list[float]) -> Results:
    """Median and middle half in microseconds."""
    low, median, high = (float(value) * 1e6 for value in np.percentile(seconds, (25, 50, 75)))
    return {"median_us": median, "low_us": low, "high_us": high}


def show(title: str, times: dict[str, list[float]], baseline: str) -> Results:
    """Prints a table of times beside the baseline's and gives back its numbers."""
    print(f"\n{title}\n\n| | microseconds (middle half) | plain way takes |\n|---|---|---|")
    result: Results = {}
    for name, seconds in times.items():
        row = summary(seconds)
        row["plain_over_this"] = float(np.median(times[baseline]) / np.median(seconds))
        print(
            f"| {name} | {row['median_us']:,.0f} ({row['low_us']:,.0f} to {row['high_us']:,.0f})"
            f" | {row['plain_over_this']:.2f} times as long |"
        )
        result[name] = row
    return result


def transitions(count: int, obs_shape: tuple[int, ...] = OBS_SHAPE) -> Iterator[tuple[Any, ...]]:
    """Episodes of random pictures, stacked in threes as the training loop stacks them; or of random states."""
    rng = np.random.default_rng(0)

    def frame() -> np.ndarray:
        if len(obs_shape) == 1:
            return rng.standard_normal(obs_shape)
        return rng.integers(0, 256, (3, *obs_shape[1:]), dtype=np.uint8)

    depth = 1 if len(obs_shape) == 1 else obs_shape[0] // 3
    for index in range(count):
        if index % EPISODE_LENGTH == 0:
            stack = [frame()] * depth
        following = [*stack[1:], frame()]
        yield np.concatenate(stack), rng.uniform(-1, 1, ACTION_SHAPE), 0.5, np.concatenate(following), False
        stack = following


def make_agents(
    kind: str, precision: str | None = None, graph: bool = True
) -> tuple[SacAeAgent, PlainAgent, tuple[int, ...]]:
    """The agent and its plain twin with the same parameters, and the shape of what they observe."""
    set_seed_everywhere(1)
    obs_shape = OBS_SHAPE if kind == "pixel" else STATE_SHAPE
    types = "pixel" if kind == "pixel" else "identity"
    kind_of_agent = GraphedAgent if graph and DEVICE.type == "cuda" else SacAeAgent
    agent = kind_of_agent(obs_shape, ACTION_SHAPE, DEVICE, encoder_type=types, decoder_type=types, precision=precision)
    decoder = None if agent.decoder is None else agent.decoder.state_dict()
    return agent, PlainAgent(agent.actor.state_dict(), agent.critic.state_dict(), decoder), obs_shape


def bench_replay(capacity: int, batches: int) -> Results:
    """An `add` and a batch, of the replay wherever it can lie and of naive storage."""
    args = (OBS_SHAPE, ACTION_SHAPE, capacity, BATCH_SIZE, DEVICE)
    plain = "plain: both stacks of every transition, host memory"
    storages: dict[str, Any] = {}
    if DEVICE.type == "cuda":
        storages["each frame once, on the GPU"] = ReplayBuffer(*args, frames_device=DEVICE)
        storages["each frame once, host memory, prefetched"] = ReplayBuffer(*args)
        storages["each frame once, host memory, not prefetched"] = ReplayBuffer(*args, prefetch=False)
    else:
        storages["each frame once, host memory"] = ReplayBuffer(*args)
    storages[plain] = PlainReplay(*args)

    adds: dict[str, list[float]] = {name: [] for name in storages}
    for transition in transitions(capacity):
        calls = {name: functools.partial(storage.add, *transition) for name, storage in storages.items()}
        for name, seconds in interleaved(calls, rounds=1, warmup=0).items():
            adds[name] += seconds
    samples = interleaved(
        {name: storage.sample for name, storage in storages.items()},
        batches,
        warmup=10,
        pause=0.02 if DEVICE.type == "cuda" else 0,
    )
    for name, storage in storages.items():
        print(f"{name}: {storage.nbytes:,} bytes for {capacity:,} transitions")
    return {
        "bytes": {name: storage.nbytes for name, storage in storages.items()},
        "add": show("Replay: one `add`", adds, plain),
        "sample": show(f"Replay: one batch of {BATCH_SIZE}", samples, plain),
    }


def bench_fill(capacity: int) -> None:
    """Fills a replay in host memory and prints what the whole process then takes."""
    before = psutil.Process().memory_info().rss
    replay = ReplayBuffer(OBS_SHAPE, ACTION_SHAPE, capacity, BATCH_SIZE, "cpu")
    allocated = psutil.Process().memory_info().rss
    for transition in transitions(capacity):
        replay.add(*transition)
    filled = psutil.Process().memory_info().rss
    print(f"{len(replay):,} transitions of {OBS_SHAPE} stored; the buffer counts {replay.nbytes / 1e9:.3f} GB")
    print(f"resident: {before / 1e9:.3f} GB before, {allocated / 1e9:.3f} GB allocated, {filled / 1e9:.3f} GB filled")


def bench_update(kind: str, rounds: int) -> Results:
    """Two updates, one of them with the actor, a batch from the replay for each included."""
    agent, plain, obs_shape = make_agents(kind)
    agents = {"this": agent}
    try:
        check_bf16(DEVICE, filters=32 if kind == "pixel" else 0, hidden_dim=1024)
        agents["this, bf16"] = make_agents(kind, "bf16")[0]
    except ValueError as error:
        print(f"\nNot measured: {error}")
    if DEVICE.type == "cuda":
        agents["this, fp32"] = make_agents(kind, "fp32")[0]
        agents["this, tf32"] = make_agents(kind, "tf32")[0]
        agents["this, without CUDA graphs"] = make_agents(kind, graph=False)[0]
    replay = ReplayBuffer(obs_shape, ACTION_SHAPE, 2000, BATCH_SIZE, DEVICE, frames_device=DEVICE)
    plain_replay = PlainReplay(obs_shape, ACTION_SHAPE, 2000, BATCH_SIZE, DEVICE)
    for transition in transitions(2000, obs_shape):
        replay.add(*transition)
        plain_replay.add(*transition)

    def updates(agent: SacAeAgent) -> None:
        for step in range(2):
            agent.update(replay, Silent(), step)

    def plain_updates() -> None:
        for step in range(2):
            plain.update(plain_replay.sample(), step)

    calls = {name: functools.partial(updates, variant) for name, variant in agents.items()}
    times = interleaved(calls | {"plain": plain_updates}, rounds, warmup=2)
    per_update = {name: [seconds / 2 for seconds in values] for name, values in times.items()}
    result = show(f"Update, {kind}: mean of one with the actor and one without", per_update, "plain")
    counted, _, _ = make_agents(kind, graph=False)
    with FlopCounterMode(display=False) as counter:
        updates(counted)
    result["floor"] = floor(agent, counter.get_total_flops() / 2, result["this"]["median_us"])
    return result


def floor(agent: SacAeAgent, flops: float, measured_us: float) -> Results:
    """What the update costs at least on this machine: its operations at the measured rate, its bytes likewise.

    Least bytes: Adam reads parameter, gradient and two moments and writes all but the gradient; activations and
    batches, which a perfect kernel might keep on the chip, are not counted.
    """
    size = 4096 if DEVICE.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=DEVICE)
    source = torch.randn(64 * 2**20, device=DEVICE)
    target = torch.empty_like(source)
    probes = {"matrix": lambda: left @ right, "copy": lambda: target.copy_(source)}
    seconds = {name: float(np.median(times)) for name, times in interleaved(probes, rounds=10, warmup=3).items()}
    rate, bandwidth = 2 * size**3 / seconds["matrix"], 2 * source.nbytes / seconds["copy"]
    networks = [network for network in (agent.actor, agent.critic, agent.decoder) if network is not None]
    num_bytes = 7 * sum(parameter.nbytes for network in networks for parameter in network.parameters())
    least_us = max(flops / rate, num_bytes / bandwidth) * 1e6
    print(
        f"\nFloor: {flops / 1e9:.2f} GFLOP at the measured {rate / 1e9:,.0f} GFLOP/s, {num_bytes / 1e6:.0f} MB at "
        f"{bandwidth / 1e9:.1f} GB/s: {least_us:,.0f} us; the update reaches {least_us / measured_us:.0%} of that."
    )
    return {"gflop": flops / 1e9, "gflop_per_s": rate / 1e9, "least_us": least_us, "reached": least_us / measured_us}


def bench_act(kind: str, rounds: int) -> Results:
    """An action for one observation, from host memory and back."""
    agent, plain, obs_shape = make_agents(kind)
    obs = next(iter(transitions(1, obs_shape)))[0]

    def act() -> None:
        agent.sample_action(obs)

    def plain_act() -> None:
        with torch.no_grad():
            action, _ = policy(plain.actor, torch.as_tensor(obs, dtype=torch.float32, device=DEVICE).unsqueeze(0))
            action.cpu().numpy()

    return show(f"Acting, {kind}", interleaved({"this": act, "plain": plain_act}, rounds, warmup=10), "plain")


def make_run(kind: str, folder: str, num_train_steps: int) -> train.Run:
    """A run of the main job's task that can go on for so many decisions, its folder made."""
    types = [] if kind == "pixel" else ["--encoder_type", "identity", "--decoder_type", "identity"]
    flags = ["--action_repeat", "4", "--init_steps", "200", "--num_train_steps", str(num_train_steps), *types]
    run = train.Run(
        train.make_parser().parse_args([*flags, "--eval_workers", "1", "--work_dir", str(Path(folder) / kind)])
    )
    run.open()
    return run


def bench_env(rounds: int) -> Results:
    """A decision's part of the environment: four simulator steps, and the picture or the state."""
    result: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("pixel", "state"):
            run = make_run(kind, folder, 1000)
            run.begin_episode()
            direct = suite.load("cheetah", "run", task_kwargs={"random": 1, "time_limit": float("inf")})
            direct.reset()
            frames: deque[np.ndarray] = deque([np.zeros((3, *OBS_SHAPE[1:]), np.uint8)] * 3, maxlen=3)
            action = run.env.action_space.sample()

            def plain_step(
                pixels: bool = kind == "pixel", direct: Any = direct, frames: Any = frames, action: Any = action
            ) -> np.ndarray:
                for _ in range(4):
                    observation = direct.step(action).observation
                state = np.concatenate([np.ravel(value) for value in observation.values()])
                if not pixels:
                    return state
                frames.append(direct.physics.render(*OBS_SHAPE[1:], camera_id=0).transpose(2, 0, 1).copy())
                return np.concatenate(frames)

            calls: dict[str, Callable[[], Any]] = {"this": functools.partial(run.env.step, action), "plain": plain_step}
            times = interleaved(calls, rounds, warmup=5)
            result[kind] = show(f"Environment, {kind}: cheetah run, action repeat 4", times, "plain")
            run.close()
            direct.close()
    return result


def bench_evaluation(rounds: int) -> Results:
    """An evaluation of ten short episodes from pixels: side by side, and one after the other."""
    length, workers = 25, min(10, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run("pixel", folder, 1000)
        _, plain, _ = make_agents("pixel")
        make_env = functools.partial(train.make_env, run.args, 1)
        env, groups = make_env(), {workers: SideBySide(make_env, 10, workers), 1: SideBySide(make_env, 10, 1)}

        def evaluate(envs: SideBySide) -> None:
            obs = envs.reset(range(10))
            for _ in range(length):
                obs, _, _ = envs.step(run.agent.select_actions(obs))

        def plain_evaluate() -> None:
            for seed in range(10):
                obs, _ = env.reset(seed=seed)
                for _ in range(length):
                    with torch.no_grad():
                        batch = torch.as_tensor(obs, dtype=torch.float32, device=DEVICE).unsqueeze(0)
                        action = policy(plain.actor, batch)[0].squeeze(0).cpu().numpy()
                    obs, _, _, _, _ = env.step(action)

        calls = {
            ("in this process" if count == 1 else f"{count} processes"): functools.partial(evaluate, envs)
            for count, envs in groups.items()
        }
        times = interleaved(calls | {"plain": plain_evaluate}, rounds, warmup=1)
        for envs in groups.values():
            envs.close()
        env.close()
        run.close()
    return show(f"Evaluation: ten episodes of {length} decisions", times, "plain")


def bench_train(kind: str, rounds: int) -> Results:
    """A decision of the whole loop, update and environment included, without evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(kind, folder, 200 + 2 * (rounds + 1))
        _, plain, obs_shape = make_agents(kind)
        replay = PlainReplay(obs_shape, ACTION_SHAPE, 10_000, BATCH_SIZE, DEVICE)
        env = train.make_env(run.args, seed=1)
        plain_obs, _ = env.reset()
        for transition in transitions(200, obs_shape):
            run.replay.add(*transition)
            replay.add(*transition)
        run.begin_episode()
        run.step = 201
        theirs = iter(range(201, 10**9))

        def two_decisions() -> None:
            for _ in range(2):
                if not run.begun:
                    run.begin_episode()
                run.decide()

        def two_plain_decisions() -> None:
            nonlocal plain_obs
            for _ in range(2):
                with torch.no_grad():
                    batch = torch.as_tensor(plain_obs, dtype=torch.float32, device=DEVICE).unsqueeze(0)
                    action = policy(plain.actor, batch)[0].squeeze(0).cpu().numpy()
                plain.update(replay.sample(), next(theirs))
                next_obs, reward, terminated, truncated, _ = env.step(action)
                replay.add(plain_obs, action, reward, next_obs, terminated)
                plain_obs = env.reset()[0] if terminated or truncated else next_obs

        times = interleaved({"this": two_decisions, "plain": two_plain_decisions}, rounds, warmup=1)
        env.close()
        run.close()
    per_decision = {name: [seconds / 2 for seconds in values] for name, values in times.items()}
    result = show(f"End to end, {kind}: one decision of cheetah run, action repeat 4", per_decision, "plain")
    for name in times:
        result[name]["decisions_per_second"] = 1e6 / result[name]["median_us"]
        print(f"{name}: {result[name]['decisions_per_second']:.2f} decisions a second")
    return result


def machine() -> Results:
    """What this was measured on."""
    information = Path("/proc/cpuinfo")
    models = [
        line.partition(": ")[2]
        for line in (information.read_text().splitlines() if information.exists() else [])
        if line.startswith("model name")
    ]
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else [*models, platform.machine()][0]
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Runs the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command", choices=["replay", "update", "act", "env", "eval", "train", "all"], help="what to measure"
    )
    parser.add_argument("--kind", choices=["pixel", "state"], help="observations; default: both")
    parser.add_argument("--rounds", type=int, help="repetitions; default: as many as the machine does in minutes")
    parser.add_argument("--capacity", type=int, default=10_000, help="transitions of the replay")
    parser.add_argument("--fill", action="store_true", help="replay: only fill it, and print the memory it takes")
    parser.add_argument("--out", type=user_path, help="file for the numbers as JSON")
    args = parser.parse_args()
    if args.fill:
        bench_fill(args.capacity)
        return
    results: Results = {"machine": machine()}
    print(json.dumps(results["machine"]))
    many, few = (1000, 200) if DEVICE.type == "cuda" else (100, 8)
    kinds = [args.kind] if args.kind else ["pixel", "state"]
    if args.command in ("replay", "all"):
        results["replay"] = bench_replay(args.capacity, args.rounds or 200)
    for kind in kinds:
        rounds = args.rounds or (few if kind == "pixel" else many)
        if args.command in ("update", "all"):
            results[f"update_{kind}"] = bench_update(kind, rounds)
        if args.command in ("act", "all"):
            results[f"act_{kind}"] = bench_act(kind, args.rounds or many)
        if args.command in ("train", "all"):
            results[f"train_{kind}"] = bench_train(kind, rounds)
    if args.command in ("env", "all"):
        results["env"] = bench_env(args.rounds or 100)
    if args.command in ("eval", "all"):
        results["eval"] = bench_evaluation(args.rounds or 5)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
