"""On a GPU that is not there: nothing mixes devices, no update waits for the GPU, and a CUDA graph can hold it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from concurrent.futures import Future
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import toy
from fake_gpu import fake_gpu
from test_cuda_graph import SHAPES, Silent, make_agent, make_replay
from test_logger import read_events
from test_train import SMALL, read_log
from watch import NotCapturableError, WaitsError, Watch

import bench
import train
from agent import Agent
from errors import UserError
from replay_buffer import send
from sac_ae import Due, SacAeAgent
from settings import Precision
from support import cuda_graph, prefetch

PRECISIONS = [None, *get_args(Precision)]
DUE = [Due(*due) for due in itertools.product((False, True), repeat=3)]


class Inline:
    """In place of a thread pool: a watch sees only its own thread."""

    def __init__(self, *_args, **_kwargs):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", Inline)


def observation(kind, *more):
    return np.zeros((*more, *SHAPES[kind]), np.uint8 if kind == "pixel" else np.float64)


def act(agent, kind):
    return agent.sample_action(observation(kind)), agent.select_actions(observation(kind, 3))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_update(gpu, kind, precision):
    """Whatever is due: on its own, and in a CUDA graph."""
    agent = make_agent(kind, "cuda", precision=precision)
    batch = make_replay(kind, "cuda", "cuda").sample()
    for due in DUE:
        if agent.decoder is not None or not due.decoder:
            with Watch():
                metrics = agent.update_from(batch, due)
            with Watch(capturing=True):
                assert agent.update_from(batch, due).keys() == metrics.keys()
            assert all(value.is_cuda for value in metrics.values())


@pytest.mark.parametrize("frames_device", ["cuda", "cpu"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_loop(gpu, kind, graphs, frames_device):
    """Nothing waits but an action, for its result."""
    agent, replay = make_agent(kind, "cuda", graphs), make_replay(kind, "cuda", frames_device)
    assert isinstance(replay, prefetch.Prefetched) == (frames_device == "cpu")
    for step in range(2 * cuda_graph.WARMUP + 4):  # two kinds of update
        with Watch(waits=2):
            actions = act(agent, kind)
        assert [action.shape for action in actions] == [(2,), (3, 2)]
        with Watch():
            agent.update(replay, Silent(), step)
            replay.add(observation(kind), np.zeros(2), 0.0, observation(kind), False, first=True)
    with pytest.raises(WaitsError, match="host memory"), Watch():
        act(agent, kind)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_compiled_updates(gpu, compiled, precision):
    """Their operations are PyTorch's own here: Triton's kernels are for a real GPU."""
    agent = make_agent("pixel", "cuda", graphs=True, compile=True, precision=precision)
    replay = make_replay("pixel", "cuda", "cuda")
    for step in range(2 * cuda_graph.WARMUP + 4):
        with Watch():
            agent.update(replay, Silent(), step)
    assert compiled


@pytest.mark.parametrize("frames_device", ["cuda:1", "cpu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_second_gpu(gpu, kind, frames_device):
    """All is on it: a tensor on the first one would not mix with it."""
    agent, replay = make_agent(kind, "cuda:1", graphs=True), make_replay(kind, "cuda:1", frames_device)
    for step in range(2 * cuda_graph.WARMUP + 2):
        act(agent, kind)
        metrics = agent.update(replay, Silent(), step)
    moments = [
        value
        for optimizer in agent.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
    ]
    assert moments
    assert {str(tensor.device) for tensor in (*metrics.values(), *replay.sample(), *moments)} == {"cuda:1"}
    with pytest.raises(RuntimeError, match="device"):
        agent.alpha * torch.ones(1, device="cuda:0")


@pytest.mark.parametrize(("kind", "replay_device"), [("pixel", "cpu"), ("identity", "cuda")])
def test_a_run_and_its_resume(gpu, kind, replay_device, tmp_path, monkeypatch):
    """Evaluation, logs, histograms, models and checkpoints; no update waits."""
    update = Agent.update

    def watched(self, *args):
        with Watch():
            return update(self, *args)

    monkeypatch.setattr(Agent, "update", watched)
    monkeypatch.setattr(train, "make_env", toy.make_toy_env)
    flags = [*SMALL, "--encoder_type", kind, "--decoder_type", kind, "--device", "cuda", "--checkpoint_minutes", "0"]
    flags += ["--replay_device", replay_device, "--save_tb", "--save_model", "--save_buffer", "--work_dir"]
    assert train.main([*flags, str(tmp_path / "log")]) == 0
    assert train.main([*flags, str(tmp_path / "log"), "--resume", "--num_train_steps", "80"]) == 0
    assert [start["step"] for start in read_log(tmp_path / "log" / "starts.log")] == [0, 60]
    assert [record["step"] for record in read_log(tmp_path / "log" / "eval.log")] == [0, 40, 80]
    histograms = read_events(tmp_path / "log").Tags()["histograms"]
    assert {"train_actor/trunk.0_weight", "train_actor/trunk.0_output"} <= set(histograms)


CONTROLS = {  # a fault, and what is raised without a graph and in one
    "item": (lambda loss, batch: loss.item(), WaitsError, WaitsError),
    "if": (lambda loss, batch: 1 if loss > 0 else 2, WaitsError, WaitsError),
    "cpu": (lambda loss, batch: loss.detach().cpu(), WaitsError, WaitsError),
    "mask": (lambda loss, batch: batch[2][batch[4].bool()].sum(), WaitsError, WaitsError),
    "nonzero": (lambda loss, batch: batch[4].nonzero(), WaitsError, WaitsError),
    "synchronize": (lambda loss, batch: torch.cuda.synchronize(), WaitsError, WaitsError),
    "tensor on the host": (lambda loss, batch: torch.tensor(1.0), None, NotCapturableError),
    "work on the host": (lambda loss, batch: torch.from_numpy(np.ones(3)) + 1, None, NotCapturableError),
    "copy from the host": (
        lambda loss, batch: torch.from_numpy(np.ones(3)).to("cuda", non_blocking=True),
        WaitsError,
        NotCapturableError,
    ),
    "pinned copy": (lambda loss, batch: send(torch.from_numpy(np.ones(3)), loss.device), None, NotCapturableError),
    "tensor to the GPU": (lambda loss, batch: torch.tensor([1.0], device="cuda"), WaitsError, NotCapturableError),
    "blocking copy": (lambda loss, batch: torch.from_numpy(np.ones(3)).to("cuda"), WaitsError, NotCapturableError),
    "mixed devices": (lambda loss, batch: batch[2] * torch.ones(8, 1), RuntimeError, NotCapturableError),
}


def add_to_the_loss(monkeypatch, fault):
    critic_loss = SacAeAgent.critic_loss

    def faulty(self, *batch):
        loss = critic_loss(self, *batch)
        fault(loss, batch)
        return loss

    monkeypatch.setattr(SacAeAgent, "critic_loss", faulty)


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("name", CONTROLS)
def test_faults_are_caught(gpu, name, capturing, monkeypatch):
    """Each in the critic's loss. What a graph cannot hold is no fault without one, unless it waits."""
    fault, *errors = CONTROLS[name]
    agent, batch = make_agent("state", "cuda"), make_replay("state", "cuda", "cuda").sample()
    with Watch():
        agent.update_from(batch, Due(True, True, False))
    add_to_the_loss(monkeypatch, fault)
    error = errors[capturing]
    with pytest.raises(error) if error else contextlib.nullcontext(), Watch(capturing=capturing):
        agent.update_from(batch, Due(True, True, False))


def test_a_fault_is_caught_at_the_capture(gpu, monkeypatch):
    """Of the graphs that a run makes."""
    agent, replay = make_agent("state", "cuda", graphs=True), make_replay("state", "cuda", "cuda")
    add_to_the_loss(monkeypatch, CONTROLS["tensor on the host"][0])
    for _ in range(cuda_graph.WARMUP):
        agent.update(replay, Silent(), 0)
    with pytest.raises(NotCapturableError, match="host memory"):
        agent.update(replay, Silent(), 0)


def test_graphs_of_an_agent_that_is_gone_are_gone(gpu):
    """Before the next capture: PyTorch has 32 streams, and destroying a graph frees workspaces of its stream."""

    def act(agent):
        for _ in range(cuda_graph.WARMUP + 1):
            agent.sample_action(observation("state"))

    gc.collect()
    gc.disable()
    try:
        agent = make_agent("state", "cuda", graphs=True)
        act(agent)
        gone = weakref.ref(agent)
        del agent
        act(make_agent("state", "cuda", graphs=True))
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no need of a compiler")
def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(UserError, match="no-compiler is not there"), fake_gpu():
        pass
    assert not list(tmp_path.iterdir())


def test_the_bench_of_updates(gpu, monkeypatch, capsys):
    """Every variant that it has on a GPU runs; torch.compile has none to compile for."""

    def no_compiler(_device):
        raise UserError("there is nothing to compile for")

    for name, value in {"ON_GPU": True, "DEVICE": torch.device("cuda"), "WARMUP": cuda_graph.WARMUP}.items():
        monkeypatch.setattr(bench, name, value)
    flags = bench.flags
    monkeypatch.setattr(bench, "flags", lambda kind, *more: flags(kind, "--device", "cuda", *more))
    monkeypatch.setattr(bench, "check_compiler", no_compiler)
    monkeypatch.setattr(bench, "floor", lambda *_: {})
    results = bench.bench_update("pixel", SimpleNamespace(rounds=1))
    trials = {
        f"this, {precision}, {trial}"
        for precision in ("tf32", "bf16")
        for trial in ("channels-last", "cudnn.benchmark")
    }
    assert results.keys() >= {"this", "this, bf16", "this, tf32", "this, without CUDA graphs", "plain", *trials}
    assert "Not measured: there is nothing to compile for" in capsys.readouterr().out


def test_warming_up_takes_none_of_a_table_s_time(monkeypatch):
    """Compiling takes longer than all that is measured."""
    clock = [0.0]

    def call():
        clock[0] += 100 if clock[0] < 100 * bench.WARMUP else 1

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(bench, "WARMUP", 5)
    results = bench.compare("", {"call": call}, rounds=100)
    assert results["call"]["low_us"] == results["call"]["high_us"] == 1e6
    assert clock[0] == 500 + bench.MOST_SECONDS
