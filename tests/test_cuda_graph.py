"""Captured updates and actions are the plain ones: here with a stand-in for graphs, and on a GPU with real ones."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_graph
from cuda_graph import GraphedAgent
from sac_ae import Due, SacAeAgent
from utils import ReplayBuffer, set_seed_everywhere

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = {"hidden_dim": 32, "encoder_feature_dim": 8, "num_layers": 2, "num_filters": 4}
SHAPES = {"pixel": (9, 24, 24), "state": (5,)}


class Silent:
    def log(self, key, value, step, n=1):
        pass


class StandIn:
    """Uses a function as a capture does: some calls now, with whatever they leave behind; later on other values."""

    made = 0

    def __init__(self, function, arguments, device):
        type(self).made += 1
        self.function, self.arguments = function, [argument.clone() for argument in arguments]
        for _ in range(4):
            self.result = function(*self.arguments)

    def __call__(self, arguments):
        for mine, argument in zip(self.arguments, arguments, strict=True):
            assert (mine.shape, mine.dtype) == (argument.shape, argument.dtype)
            mine.copy_(argument)
        self.result.copy_(self.function(*self.arguments))
        return self.result.clone()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Captured", StandIn)
    monkeypatch.setattr(StandIn, "made", 0)


def make_agent(cls, kind, device="cpu", **kwargs):
    set_seed_everywhere(3)
    types = "pixel" if kind == "pixel" else "identity"
    return cls(SHAPES[kind], (2,), device, encoder_type=types, decoder_type=types, **SIZES, **kwargs)


def make_replay(kind, device="cpu", frames_device="cpu", count=60):
    replay = ReplayBuffer(SHAPES[kind], (2,), 100, 8, device, seed=7, frames_device=frames_device)
    rng = np.random.default_rng(5)

    def draw():
        shape = SHAPES[kind]
        return rng.integers(0, 256, shape).astype(np.uint8) if len(shape) == 3 else rng.standard_normal(shape)

    obs = draw()
    for _ in range(count):
        following = draw()
        replay.add(obs, rng.uniform(-1, 1, 2), float(rng.uniform()), following, False)
        obs = following
    return replay


class Undrawn:
    """A replay seen from outside: it only gives batches."""

    def __init__(self, replay):
        self.sample = replay.sample


def train(agent, replay, steps):
    """Losses of the updates and an action after each."""
    record = []
    rng = np.random.default_rng(2)
    shape = agent_shape(agent)
    for step in steps:
        metrics = agent.update(replay, Silent(), step)
        obs = rng.integers(0, 256, (2, *shape)).astype(np.uint8 if len(shape) == 3 else np.float64)
        actions = [agent.sample_action(obs[0]), agent.select_action(obs[1]), agent.select_actions(obs)]
        record.append(({key: float(value) for key, value in metrics.items()}, actions))
    return record


def agent_shape(agent):
    return SHAPES["state"] if agent.decoder is None else SHAPES["pixel"]


def state(agent):
    """Everything that training changes, by name."""
    tensors = {
        f"{name}.{key}": value for name in agent.networks for key, value in agent.networks[name].state_dict().items()
    }
    tensors["log_alpha"] = agent.log_alpha.detach()
    for name, optimizer in agent.optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}_optimizer.{index}.{key}": value for key, value in entries.items()}
    return {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}


def assert_equal(plain, graphed, rtol=0.0, atol=0.0):
    (records, agent), (other_records, other) = plain, graphed
    for (losses, actions), (other_losses, other_actions) in zip(records, other_records, strict=True):
        assert other_losses == pytest.approx(losses, rel=rtol, abs=atol)
        for action, other_action in zip(actions, other_actions, strict=True):
            np.testing.assert_allclose(other_action, action, rtol=rtol, atol=atol)
    assert set(state(agent)) == set(state(other))
    for name, tensor in state(agent).items():
        torch.testing.assert_close(
            state(other)[name], tensor, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


# As in a run: a burst at one step, then every step; with the default's combinations, and with all.
STEPS = [20] * 5 + list(range(21, 34))


@pytest.mark.parametrize("located", [True, False], ids=["gathered inside", "gathered outside"])
@pytest.mark.parametrize("kind", ["pixel", "state"])
def test_the_same_as_plain(stand_in, kind, located):
    results = []
    for cls in (SacAeAgent, GraphedAgent):
        agent = make_agent(cls, kind, critic_target_update_freq=3, decoder_update_freq=2)
        replay = make_replay(kind)
        results.append((train(agent, replay if located else Undrawn(replay), STEPS), agent))
        results[-1][0].append(({"next random number": float(torch.rand(()))}, []))
    assert_equal(*results)
    # Whether the actor is due goes with the decoder, both every second step; the target every third. Three ways to act.
    assert StandIn.made == 4 + 3


def test_default_combinations(stand_in):
    agent, replay = make_agent(GraphedAgent, "pixel"), make_replay("pixel")
    for step in STEPS:
        agent.update(replay, Silent(), step)
        assert agent.due(step) == Due(actor=step % 2 == 0, target=step % 2 == 0, decoder=True)
    assert StandIn.made == 2
    assert make_agent(GraphedAgent, "state").due(0) == Due(actor=True, target=True, decoder=False)


def test_replays_are_not_taken_for_each_other_even_if_they_are_gone(monkeypatch):
    """A graph reads the frames of the replay that it was captured with, which must not be freed before it is."""

    class Forgetful(StandIn):
        def __init__(self, function, arguments, device):
            super().__init__(function, arguments, device)
            self.function = None  # like a graph, which holds kernels and addresses

        def __call__(self, arguments):
            return self.result

    monkeypatch.setattr(cuda_graph, "Captured", Forgetful)
    monkeypatch.setattr(StandIn, "made", 0)
    agent = make_agent(GraphedAgent, "state")
    for _ in range(4):
        agent.update(make_replay("state"), Silent(), 0)
        gc.collect()
    assert Forgetful.made == 4


def test_another_replay_is_not_taken_for_the_first(stand_in):
    agent, twin = (make_agent(cls, "state") for cls in (GraphedAgent, SacAeAgent))
    for count in (10, 60):
        metrics = []
        for each in (agent, twin):
            torch.manual_seed(1)
            metrics.append(each.update(make_replay("state", count=count), Silent(), 0))
        assert {key: float(value) for key, value in metrics[0].items()} == {
            key: float(value) for key, value in metrics[1].items()
        }


@pytest.mark.parametrize("first", ["update", "act"])
def test_goes_on_without_if_capture_fails(monkeypatch, first):
    class Failing(StandIn):
        def __init__(self, *args):
            super().__init__(*args)
            raise RuntimeError("operation not permitted\nand many lines more")

    monkeypatch.setattr(cuda_graph, "Captured", Failing)
    results, lines = [], []
    for cls, kwargs in ((SacAeAgent, {}), (GraphedAgent, {"report": lines.append})):
        agent = make_agent(cls, "pixel", **kwargs)
        if first == "act":
            agent.sample_action(np.zeros(SHAPES["pixel"], np.uint8))
        results.append((train(agent, make_replay("pixel"), STEPS), agent))
    assert_equal(*results)
    assert lines == ["going on without CUDA graphs: operation not permitted"]


def test_programming_errors_are_not_hidden(stand_in):
    agent = make_agent(GraphedAgent, "state")
    with pytest.raises(ValueError, match="empty replay"):
        agent.update(make_replay("state", count=0), Silent(), 0)


def test_a_failed_restoration_is_not_hidden(monkeypatch):
    """Else the run would go on with weights that warming up has trained."""

    class Failing(StandIn):
        def __init__(self, *args):
            super().__init__(*args)
            raise RuntimeError("no capture")

    def fail(*_):
        raise RuntimeError("no such state")

    monkeypatch.setattr(cuda_graph, "Captured", Failing)
    agent = make_agent(GraphedAgent, "state", report=lambda line: None)
    monkeypatch.setattr(torch, "set_rng_state", fail)
    with pytest.raises(RuntimeError, match="no such state"):
        agent.update(make_replay("state"), Silent(), 0)


@needs_gpu
def test_values_that_are_fetched_late():
    """A run fetches losses when a line is due: each must still be that of its own update."""
    results = []
    for cls in (SacAeAgent, GraphedAgent):
        agent, replay = make_agent(cls, "state", "cuda", precision="fp32"), make_replay("state", "cuda", "cuda")
        metrics = [agent.update(replay, Silent(), step) for step in range(10)]
        results.append([float(metric["train_critic/loss"]) for metric in metrics])
    assert len(set(results[1])) == 10
    assert results[1] == pytest.approx(results[0], rel=1e-3)


FAILING_CAPTURE = """
import torch, cuda_graph
from test_cuda_graph import *
lines = []
compute = SacAeAgent.critic_loss
def fetching(self, *batch):
    loss = compute(self, *batch)
    loss.item()
    return loss
results = []
for cls, kwargs in ((SacAeAgent, {}), (GraphedAgent, {"report": lines.append})):
    SacAeAgent.critic_loss = fetching
    agent = make_agent(cls, "pixel", "cuda", precision="fp32", **kwargs)
    stream = torch.cuda.current_stream()
    results.append(([], agent))
    replay = make_replay("pixel", "cuda", "cpu")
    for step in range(20):
        agent.update(replay, Silent(), step)
    assert torch.cuda.current_stream() == stream
assert len(lines) == 1 and "going on without CUDA graphs" in lines[0], lines
assert_equal(*results, rtol=1e-3, atol=1e-4)
print(lines[0])
"""


@needs_gpu
def test_goes_on_if_a_real_capture_fails():
    """In a process of its own, for what a failed capture may leave behind."""
    here = Path(__file__).parent
    paths = {"PYTHONPATH": f"{here}:{here.parent}"}
    output = subprocess.run(
        [sys.executable, "-c", FAILING_CAPTURE], env=os.environ | paths, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert "due to a previous error" not in output.stdout


@needs_gpu
@pytest.mark.parametrize("frames_device", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", ["pixel", "state"])
def test_captured_is_plain_on_a_gpu(kind, frames_device, monkeypatch):
    """After 200 updates: the same kernels on the same numbers."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    results, lines = [], []
    for cls, kwargs in ((SacAeAgent, {}), (GraphedAgent, {"report": lines.append})):
        agent = make_agent(cls, kind, "cuda", precision="fp32", **kwargs)
        replay = make_replay(kind, "cuda", frames_device)
        results.append((train(agent, replay, [20] * 100 + list(range(21, 121))), agent))
    assert lines == []
    assert results[1][1]._graphs
    assert_equal(*results, rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("kwargs", [{"precision": "tf32"}, {"precision": "bf16"}, {"compile": True}])
def test_captured_in_other_ways_to_compute_on_a_gpu(kwargs):
    lines = []
    agent = make_agent(GraphedAgent, "pixel", "cuda", report=lines.append, **kwargs)
    record = train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    assert lines == []
    assert all(np.isfinite(list(losses.values())).all() for losses, _ in record)


@needs_gpu
@pytest.mark.parametrize("frames_device", ["cuda", "cpu"])
@pytest.mark.parametrize("cls", [SacAeAgent, GraphedAgent])
def test_an_update_never_waits_for_the_gpu(cls, frames_device):
    """Nothing in it fetches from the device, with graphs and without; an action does."""
    agent, replay = make_agent(cls, "pixel", "cuda"), make_replay("pixel", "cuda", frames_device)
    obs = np.zeros(SHAPES["pixel"], np.uint8)
    for step in range(4):
        agent.update(replay, Silent(), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4, 8):
            agent.update(replay, Silent(), step)
            replay.add(obs, np.zeros(2), 0.0, obs, False)
        with pytest.raises(RuntimeError, match="synchroniz"):
            agent.sample_action(obs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_loading_goes_on_with_graphs(tmp_path):
    """Weights are loaded into the memory that the graphs read."""
    agent, other = make_agent(GraphedAgent, "pixel", "cuda"), make_agent(SacAeAgent, "pixel", "cuda")
    train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    saved = copy.deepcopy(state(agent))
    agent.save(tmp_path, 1)
    train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    agent.load(tmp_path, 1)
    other.load(tmp_path, 1)
    assert torch.equal(state(agent)["actor.trunk.0.weight"], saved["actor.trunk.0.weight"])
    obs = np.full(SHAPES["pixel"], 9, np.uint8)
    np.testing.assert_allclose(agent.select_action(obs), other.select_action(obs), rtol=1e-4, atol=1e-5)
