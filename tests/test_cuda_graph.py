"""Captured updates and actions are the plain ones: here in a recording, and on a GPU in a real graph."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_graph import RecordedGraph

from sac_ae import Due, SacAeAgent
from support import cuda_graph
from support.cuda_graph import Graphs
from support.prefetch import Prefetched
from utils import ReplayBuffer, set_seed_everywhere

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = {"hidden_dim": 32, "encoder_feature_dim": 8, "num_layers": 2, "num_filters": 4}
SHAPES = {"pixel": (9, 24, 24), "state": (5,)}


class Silent:
    def log(self, key, value, step, n=1):
        pass


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(cuda_graph, "Capture", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", 0)


def make_agent(kind, device="cpu", graphs=False, report=pytest.fail, cls=SacAeAgent, **kwargs):
    set_seed_everywhere(3)
    types = "pixel" if kind == "pixel" else "identity"
    agent = cls(SHAPES[kind], (2,), device, encoder_type=types, decoder_type=types, **SIZES, **kwargs)
    if graphs:
        Graphs(agent, report)
    return agent


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
    return Prefetched(replay) if str(device) != str(frames_device) else replay


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


def held(agent):
    """Everything that training changes, by name."""
    tensors = {
        f"{name}.{key}": value for name in agent.networks for key, value in agent.networks[name].state_dict().items()
    }
    tensors |= agent.parameters
    for name, optimizer in agent.optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in entries.items()}
    return tensors


def state(agent):
    return {name: tensor.detach().cpu().double() for name, tensor in held(agent).items()}


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


# As in a run: a burst at one step, then every step; each of the combinations comes more often than graphs warm up.
STEPS = [20] * 5 + list(range(21, 51))


@pytest.mark.parametrize("kind", ["pixel", "state"])
def test_the_same_as_plain(recorded, kind):
    results = []
    for graphs in (False, True):
        agent = make_agent(kind, graphs=graphs, critic_target_update_freq=3, decoder_update_freq=2)
        results.append((train(agent, make_replay(kind), STEPS), agent))
        results[-1][0].append(({"next random number": float(torch.rand(()))}, []))
    assert_equal(*results)
    # Whether the actor is due goes with the decoder, both every second step; the target every third. Three ways to act.
    assert RecordedGraph.made == 4 + 3


def test_default_combinations(recorded):
    agent, replay = make_agent("pixel", graphs=True), make_replay("pixel")
    for step in STEPS:
        agent.update(replay, Silent(), step)
        assert agent.due(step) == Due(actor=step % 2 == 0, target=step % 2 == 0, decoder=True)
    assert RecordedGraph.made == 2
    assert make_agent("state").due(0) == Due(actor=True, target=True, decoder=False)


def test_no_gradients_of_another_update_are_shown(recorded):
    """Kinds take turns; in memory that graphs share, gradients of the kind captured last would lie."""
    agents = [make_agent("pixel", graphs=graphs) for graphs in (False, True)]
    for agent in agents:
        train(agent, make_replay("pixel"), STEPS)
    plain, graphed = ([parameter.grad for parameter in agent.critic.parameters()] for agent in agents)
    assert all(gradient is not None for gradient in plain)
    for mine, other in zip(graphed, plain, strict=True):
        assert mine is None or torch.equal(mine, other)


def test_first_calls_of_a_kind_are_real_and_not_captured(recorded):
    agent, replay = make_agent("state", graphs=True), make_replay("state")
    for count in range(1, 6):
        agent.update(replay, Silent(), 0)
        assert RecordedGraph.made == (count > cuda_graph.WARMUP)


def test_compiled_losses_are_captured(recorded, compiled):
    """A capture runs the compiled code of the four losses once; a replay does not run it."""
    results, steps = [], [0] * (cuda_graph.WARMUP + 3)
    for graphs in (False, True):
        agent = make_agent("pixel", graphs=graphs, compile=True)
        results.append((train(agent, make_replay("pixel"), steps), agent))
        assert len(compiled) == 4 * (cuda_graph.WARMUP + 1 if graphs else len(steps))
        compiled.clear()
    assert_equal(*results)


class Fetching(SacAeAgent):
    """Its loss cannot be captured."""

    def critic_loss(self, *batch):
        loss = super().critic_loss(*batch)
        return loss * (1 if loss.item() > -1 else 2)


def test_goes_on_without_if_a_compiled_loss_cannot_be_captured(recorded, compiled):
    results, lines = [], []
    for graphs in (False, True):
        agent = make_agent("state", graphs=graphs, report=lines.append, cls=Fetching, compile=True)
        results.append((train(agent, make_replay("state"), STEPS), agent))
    assert_equal(*results)
    assert lines == ["continuing without CUDA graphs: operation not permitted when stream is capturing"]
    assert compiled


class Curious(SacAeAgent):
    """Has one more network, optimiser and metric."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = torch.nn.Linear(self.critic.encoder.feature_dim, 1).to(self.device)
        self.head_optimizer = self.adam(self.head.parameters(), 1e-3)

    def update_networks(self, obs, action, reward, next_obs, not_done, due):
        metrics = super().update_networks(obs, action, reward, next_obs, not_done, due)
        loss = (self.head(self.critic.encoder(obs).detach()) - reward).pow(2).mean()
        self.head_optimizer.zero_grad()
        loss.backward()
        self.head_optimizer.step()
        return metrics | {"train_head/loss": loss.detach()}


def test_a_subclass_is_captured_whole(recorded):
    results = []
    for graphs in (False, True):
        agent = make_agent("pixel", graphs=graphs, cls=Curious)
        results.append((train(agent, make_replay("pixel"), STEPS), agent))
    assert_equal(*results)
    assert "train_head/loss" in results[1][0][-1][0]
    assert {"head.weight", "head_optimizer.0.exp_avg"} <= set(state(results[1][1]))


class Annealed(SacAeAgent):
    """Its loss has a factor that Python changes at each update."""

    factor = 1.0

    def critic_loss(self, *batch):
        self.factor *= 0.5
        return self.factor * super().critic_loss(*batch)


def test_a_graph_keeps_a_number_of_the_capture(recorded):
    """So such an agent is not the same with graphs; these tests would show it."""
    results = []
    for graphs in (False, True):
        agent = make_agent("state", graphs=graphs, cls=Annealed)
        results.append((train(agent, make_replay("state"), [0] * (cuda_graph.WARMUP + 2)), agent))
    (plain, _), (graphed, _) = results
    critic = [[losses["train_critic/loss"] for losses, _ in record] for record in (plain, graphed)]
    same = cuda_graph.WARMUP + 1  # up to the capture, whose factor is right at its first replay
    assert critic[1][:same] == pytest.approx(critic[0][:same], rel=1e-6)
    with pytest.raises(AssertionError):
        assert_equal(*results, rtol=1e-6)


@pytest.mark.parametrize("first", ["update", "act"])
def test_goes_on_without_if_capture_fails(monkeypatch, first):
    class Failing(RecordedGraph):
        def __init__(self, *args):
            super().__init__(*args)
            raise RuntimeError("operation not permitted\nand many lines more")

    monkeypatch.setattr(cuda_graph, "Capture", Failing)
    results, lines = [], []
    for graphs in (False, True):
        agent = make_agent("pixel", graphs=graphs, report=lines.append)
        for _ in range(9) if first == "act" else ():
            agent.sample_action(np.zeros(SHAPES["pixel"], np.uint8))
        results.append((train(agent, make_replay("pixel"), STEPS), agent))
    assert_equal(*results)
    gradients = [[parameter.grad for parameter in agent.critic.parameters()] for _, agent in results]
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))
    assert lines == ["continuing without CUDA graphs: operation not permitted"]


def test_graphs_are_given_back_if_a_later_capture_fails(monkeypatch):
    class SecondFails(RecordedGraph):
        made = 0

        def __init__(self, *args):
            super().__init__(*args)
            if self.made == 2:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_graph, "Capture", SecondFails)
    agent = make_agent("state", graphs=True, report=lambda _: None)
    captured = agent.actions.__self__._captured
    for sample in (True, False):
        for _ in range(cuda_graph.WARMUP + 2):
            agent.actions(torch.zeros(1, *SHAPES["state"]), sample)
        assert len(captured) == sample
    assert SecondFails.made == 2


def test_programming_errors_are_not_hidden(recorded):
    agent = make_agent("state", graphs=True)
    with pytest.raises(ValueError, match="empty replay"):
        agent.update(make_replay("state", count=0), Silent(), 0)


def test_loading_copies_into_the_memory_that_graphs_use():
    """Weights, parameters and moments stay where they are; other moments are made."""
    agent, other = make_agent("pixel"), make_agent("pixel")
    train(agent, make_replay("pixel"), STEPS)
    saved = agent.state_dict()
    train(other, make_replay("pixel"), STEPS[:8])
    before = {name: tensor.data_ptr() for name, tensor in held(other).items()}
    other.load_state_dict(saved)
    assert {name: tensor.data_ptr() for name, tensor in held(other).items()} == before
    assert_equal(([], agent), ([], other))
    fresh = make_agent("pixel")
    fresh.load_state_dict(saved)
    assert_equal(([], agent), ([], fresh))


@needs_gpu
def test_values_that_are_fetched_late():
    """A run fetches losses when a line is due: each must still be that of its own update."""
    results = []
    for graphs in (False, True):
        agent = make_agent("state", "cuda", graphs, precision="fp32")
        replay = make_replay("state", "cuda", "cuda")
        metrics = [agent.update(replay, Silent(), step) for step in range(10)]
        results.append([float(metric["train_critic/loss"]) for metric in metrics])
    assert len(set(results[1])) == 10
    assert results[1] == pytest.approx(results[0], rel=1e-3)


FAILING_CAPTURE = """
import torch
from test_cuda_graph import *
torch.backends.cudnn.deterministic = True
lines = []
compute = SacAeAgent.critic_loss
def fetching(self, *batch):
    loss = compute(self, *batch)
    loss.item()
    return loss
results = []
SacAeAgent.critic_loss = fetching
for graphs in (False, True):
    agent = make_agent("pixel", "cuda", graphs, lines.append, precision="fp32")
    stream = torch.cuda.current_stream()
    results.append(([], agent))
    replay = make_replay("pixel", "cuda", "cpu")
    for step in range(20):
        agent.update(replay, Silent(), step)
    assert torch.cuda.current_stream() == stream
assert len(lines) == 1 and "continuing without CUDA graphs" in lines[0], lines
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
    for graphs in (False, True):
        agent = make_agent(kind, "cuda", graphs, lines.append, precision="fp32")
        replay = make_replay(kind, "cuda", frames_device)
        results.append((train(agent, replay, [20] * 100 + list(range(21, 121))), agent))
    assert lines == []
    assert_equal(*results, rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("kwargs", [{"precision": "tf32"}, {"precision": "bf16"}, {"compile": True}])
def test_captured_in_other_ways_to_compute_on_a_gpu(kwargs):
    lines = []
    agent = make_agent("pixel", "cuda", True, lines.append, **kwargs)
    record = train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    assert lines == []
    assert all(np.isfinite(list(losses.values())).all() for losses, _ in record)


@needs_gpu
@pytest.mark.parametrize("frames_device", ["cuda", "cpu"])
@pytest.mark.parametrize("graphs", [False, True])
def test_an_update_never_waits_for_the_gpu(graphs, frames_device):
    """Nothing in it fetches from the device, with graphs and without; an action does."""
    agent, replay = make_agent("pixel", "cuda", graphs), make_replay("pixel", "cuda", frames_device)
    obs = np.zeros(SHAPES["pixel"], np.uint8)
    for step in range(12):
        agent.update(replay, Silent(), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(12, 16):
            agent.update(replay, Silent(), step)
            replay.add(obs, np.zeros(2), 0.0, obs, False)
        with pytest.raises(RuntimeError, match="synchroniz"):
            agent.sample_action(obs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_loading_goes_on_with_graphs(tmp_path):
    """Weights are loaded into the memory that the graphs read."""
    agent, other = make_agent("pixel", "cuda", graphs=True), make_agent("pixel", "cuda")
    train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    saved = copy.deepcopy(state(agent))
    agent.save(tmp_path, 1)
    train(agent, make_replay("pixel", "cuda", "cuda"), STEPS)
    agent.load(tmp_path, 1)
    other.load(tmp_path, 1)
    assert torch.equal(state(agent)["actor.trunk.0.weight"], saved["actor.trunk.0.weight"])
    obs = np.full(SHAPES["pixel"], 9, np.uint8)
    np.testing.assert_allclose(agent.select_action(obs), other.select_action(obs), rtol=1e-4, atol=1e-5)
