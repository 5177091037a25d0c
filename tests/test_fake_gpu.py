"""On a GPU that is not there: nothing mixes devices, no update waits for the GPU, and a CUDA graph can hold it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch
import toy
from agents import Recorder, make_agent, make_replay, observations
from events import read_events
from runs import SMALL, read_log
from torch.utils._python_dispatch import TorchDispatchMode
from watch import NotCapturableError, WaitsError, Watch, tensors_in

import train
from replay_buffer import send
from sac_ae import Due, SacAeAgent
from support import cuda_graph, machine, prefetch


class Inline:
    """In place of a thread pool: a watch sees only its own thread."""

    def __init__(self, *_args, **_kwargs):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(cuda_graph, "WARMUP", 1)


def act(agent, kind):
    obs = observations(kind, 3)
    return agent.sample_action(obs[0]), agent.select_actions(obs)


ALL = {"pixel": Due(True, True, True), "state": Due(True, True, False)}
UPDATES = [("pixel", None, Due(*due)) for due in itertools.product((False, True), repeat=3)]
UPDATES += [("pixel", "bf16", ALL["pixel"]), ("state", None, ALL["state"]), ("state", "bf16", ALL["state"])]


@pytest.mark.parametrize(("kind", "precision", "due"), UPDATES)
def test_every_update(gpu, kind, precision, due):
    """On its own, and in a CUDA graph."""
    agent = make_agent(kind, "cuda", precision=precision)
    batch = make_replay(kind, "cuda", "cuda", count=4).sample()
    for capturing in (False, True):
        with Watch(capturing=capturing):
            metrics = agent.update_from(batch, due)
        assert all(value.is_cuda for value in metrics.values())


@pytest.mark.parametrize(
    ("kind", "graphs", "frames_device"), [("pixel", True, "cpu"), ("pixel", False, "cuda"), ("state", True, "cuda")]
)
def test_the_loop(gpu, kind, graphs, frames_device):
    """Nothing waits but an action, for its result. With graphs the first calls are plain, and the second captured."""
    agent, (obs,) = make_agent(kind, "cuda", graphs), observations(kind, 1)
    replay = make_replay(kind, "cuda", frames_device)
    assert isinstance(replay, prefetch.Prefetched) == (frames_device == "cpu")
    for _ in range(3):
        with Watch(waits=2):
            assert [action.shape for action in act(agent, kind)] == [(2,), (3, 2)]
        with Watch():
            agent.update(replay, Recorder(), 0)
            replay.add(0 * obs, np.zeros(2), 0.0, 0 * obs, False, first=True)
    with pytest.raises(WaitsError, match="host memory"), Watch():
        act(agent, kind)


def test_the_second_gpu(gpu):
    """All is on it: a tensor on the first one would not mix with it."""
    agent, replay = make_agent("pixel", "cuda:1", graphs=True), make_replay("pixel", "cuda:1", "cpu")
    for _ in range(3):
        act(agent, "pixel")
        metrics = agent.update(replay, Recorder(), 0)
    moments = [value for state in agent.critic_optimizer.state.values() for value in state.values()]
    assert moments
    assert {str(tensor.device) for tensor in (*metrics.values(), *replay.sample(), *moments)} == {"cuda:1"}
    with pytest.raises(RuntimeError, match="device"):
        agent.alpha * torch.ones(1, device="cuda:0")


@pytest.mark.parametrize("more", [[], ["--agent", "sac_vae", "--actor_trains_encoder"]])
def test_a_run_and_its_resume(gpu, tmp_path, monkeypatch, more):
    """Evaluation, logs, histograms, models and checkpoints; no update waits. Another run takes its encoder."""
    update = SacAeAgent.update

    def watched(self, *args):
        with Watch():
            return update(self, *args)

    monkeypatch.setattr(SacAeAgent, "update", watched)
    monkeypatch.setattr(train, "make_env", toy.make_toy_env)
    flags = [*SMALL, *"--device cuda --replay_device cpu --init_steps 18 --eval_freq 20 --checkpoint_minutes 0".split()]
    flags += "--actor_update_freq 1 --critic_target_update_freq 1 --save_tb --save_model --save_buffer".split()
    folder = tmp_path / "log"
    assert train.main([*flags, *more, "--num_train_steps", "20", "--work_dir", str(folder)]) == 0
    assert train.main([*flags, *more, "--num_train_steps", "40", "--work_dir", str(folder), "--resume"]) == 0
    assert [start["step"] for start in read_log(folder / "starts.log")] == [0, 20]
    assert [record["step"] for record in read_log(folder / "eval.log")] == [0, 20, 40]
    loading = ["--load_encoder", str(folder), "--freeze_encoder", "--num_train_steps", "20"]
    assert train.main([*flags, *loading, "--work_dir", str(tmp_path / "frozen")]) == 0
    histograms = read_events(folder).Tags()["histograms"]
    assert {"train_actor/trunk.0_weight", "train_actor/trunk.0_output"} <= set(histograms)


class Peak(TorchDispatchMode):
    """Counts the bytes of new tensors that are alive at once."""

    live = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = {tensor.untyped_storage()._cdata for tensor in tensors_in(args, kwargs)}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            if (memory := tensor.untyped_storage())._cdata not in there:
                self.add(memory.nbytes())
                weakref.finalize(memory, self.add, -memory.nbytes())
        return out

    def add(self, nbytes):
        self.live += nbytes
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize(
    ("batch_size", "image_size", "num_layers", "num_filters"), [(128, 84, 4, 32), (64, 64, 2, 64), (128, 100, 6, 16)]
)
def test_the_memory_kept_free_for_updates(gpu, batch_size, image_size, num_layers, num_filters):
    """It holds an update of each of four kinds, and is not a multiple of that."""
    shape = (9, image_size, image_size)
    agent = SacAeAgent(shape, (6,), "cuda", num_layers=num_layers, num_filters=num_filters, precision="fp32")
    obs, number = (torch.zeros(batch_size, *sizes, device="cuda") for sizes in (shape, (1,)))
    batch = obs, number.expand(-1, 6), number, obs, number
    agent.update_from(batch, ALL["pixel"])  # the optimisers make their moments
    with Peak() as count:
        agent.update_from(batch, ALL["pixel"])
    assert 2 * count.peak < machine.update_bytes(batch_size, shape, num_layers, num_filters) < 8 * count.peak


@pytest.mark.parametrize(("flag", "graphs"), [("auto", True), ("off", False)])
def test_graphs_unless_told_otherwise(gpu, flag, graphs):
    args = train.make_parser().parse_args([*SMALL, "--device", "cuda", "--cuda_graph", flag])
    agent = train.make_agent(args, (9, 32, 32), (1,))
    assert graphs == isinstance(getattr(agent.update_from, "__self__", None), cuda_graph.Graphs)


CONTROLS = {  # a fault, and what is raised without a graph and in one
    "item": (lambda loss, batch: loss.item(), WaitsError, WaitsError),
    "cpu": (lambda loss, batch: loss.detach().cpu(), WaitsError, WaitsError),
    "mask": (lambda loss, batch: batch.reward[batch.not_done.bool()].sum(), WaitsError, WaitsError),
    "synchronize": (lambda loss, batch: torch.cuda.synchronize(), WaitsError, WaitsError),
    "tensor on the host": (lambda loss, batch: torch.tensor(1.0), None, NotCapturableError),
    "pinned copy": (lambda loss, batch: send(torch.from_numpy(np.ones(3)), loss.device), None, NotCapturableError),
    "tensor to the GPU": (lambda loss, batch: torch.tensor([1.0], device="cuda"), WaitsError, NotCapturableError),
    "mixed devices": (lambda loss, batch: batch.reward * torch.ones(8, 1), RuntimeError, NotCapturableError),
}


class Faulty(SacAeAgent):
    """Has a fault in the critic's loss."""

    fault = None

    def critic_loss(self, batch):
        loss = super().critic_loss(batch)
        if self.fault is not None:
            self.fault(loss, batch)
        return loss


@pytest.mark.parametrize("name", CONTROLS)
def test_faults_are_caught(gpu, name):
    """What a graph cannot hold is no fault without one, unless it waits."""
    agent, batch = make_agent("state", "cuda", cls=Faulty), make_replay("state", "cuda", "cuda").sample()
    with Watch():
        agent.update_from(batch, Due(True, True, False))
    agent.fault, *errors = CONTROLS[name]
    for capturing, error in zip((False, True), errors, strict=True):
        with pytest.raises(error) if error else contextlib.nullcontext(), Watch(capturing=capturing):
            agent.update_from(batch, Due(True, True, False))


def test_a_fault_is_caught_at_the_capture(gpu):
    """Of the graphs that a run makes."""
    agent, replay = make_agent("state", "cuda", True, cls=Faulty), make_replay("state", "cuda", "cuda")
    agent.fault = lambda loss, batch: torch.tensor(1.0)
    agent.update(replay, Recorder(), 0)
    with pytest.raises(NotCapturableError, match="host memory"):
        agent.update(replay, Recorder(), 0)


def test_graphs_of_an_agent_that_is_gone_are_gone(gpu):
    """Before the next capture: PyTorch has 32 streams, and destroying a graph frees workspaces of its stream."""
    gc.collect()
    gc.disable()
    try:
        agents = []
        for _ in range(2):
            agent = make_agent("state", "cuda", graphs=True)
            agents.append(weakref.ref(agent))
            act(agent, "state")
            act(agent, "state")
            del agent
        assert agents[0]() is None
    finally:
        gc.enable()
