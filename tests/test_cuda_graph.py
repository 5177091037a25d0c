"""Captured updates and actions are the plain ones: here in a recording, and on a GPU in a real graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agents import SHAPES, Recorder, assert_equal, make_agent, make_replay, observations, train

from sac_ae import SacAeAgent
from sac_vae import SacVaeAgent
from support import cuda_graph

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# As in a run: a burst at one step, then every step; each combination comes more often than graphs warm up.
STEPS = [20] * 3 + list(range(21, 36))


def both(kind, steps=STEPS, report=pytest.fail, **settings):
    """The record of an agent's training and the agent: without graphs, and with them."""
    results = []
    for graphs in (False, True):
        agent = make_agent(kind, graphs=graphs, report=report, **settings)
        results.append((train(agent, make_replay(kind), steps), agent))
        results[-1][0].append(float(torch.rand(())))  # the next random number
    return results


@pytest.mark.parametrize(
    ("kind", "settings", "made"),
    [
        # Whether the actor is due goes with the decoder, both every second step; the target every third.
        ("pixel", {"critic_target_update_freq": 3, "decoder_update_freq": 2}, 4),
        ("state", {}, 2),
        ("pixel", {"actor_trains_encoder": True, "decoder_update_freq": 3}, 4),
        ("pixel", {"critic_trains_encoder": False}, 2),
        ("pixel", {"freeze_encoder": True}, 2),
        ("pixel", {"cls": SacVaeAgent, "beta": 0.1}, 2),
        ("pixel", {"cls": SacVaeAgent, "critic_trains_encoder": False, "decoder_update_freq": 3}, 4),
    ],
)
def test_the_same_as_plain(recorded, kind, settings, made):
    """Losses, actions, all that training changes, and the random numbers that are left."""
    plain, graphed = both(kind, **settings)
    assert_equal(plain, graphed)
    assert recorded.made == made + 3  # there are three ways to act
    assert all(parameter.grad is None for parameter in graphed[1].parameters())  # graphs have overwritten gradients


def test_first_calls_of_a_kind_are_real_and_not_captured(recorded):
    agent, replay = make_agent("state", graphs=True), make_replay("state")
    for count in range(1, 5):
        agent.update(replay, Recorder(), 0)
        assert recorded.made == (count > cuda_graph.WARMUP == 1)


def test_compiled_losses_are_captured(recorded, compiled):
    """A capture runs the compiled code of the losses once; a replay does not run it."""
    assert_equal(*both("state", [0] * 4, compile=True))
    assert len(compiled) == 3 * (4 + 2)


class Fetching(SacAeAgent):
    """Its loss cannot be captured."""

    def critic_loss(self, batch):
        loss = super().critic_loss(batch)
        return loss * (1 if loss.item() > -1 else 2)


def test_goes_on_without_if_an_update_cannot_be_captured(recorded):
    """One line says why; gradients are those of the last update again."""
    lines = []
    results = both("state", [0, 1] * 3, lines.append, cls=Fetching)
    assert_equal(*results)
    gradients = [[parameter.grad for parameter in agent.critic.parameters()] for _, agent in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert lines == ["continuing without CUDA graphs: operation not permitted when stream is capturing"]


def test_graphs_are_given_back_if_a_later_capture_fails(recorded, monkeypatch):
    class SecondFails(recorded):
        def __init__(self, *args):
            super().__init__(*args)
            if self.made == 2:
                raise RuntimeError("out of memory\nand many lines more")

    monkeypatch.setattr(cuda_graph, "Capture", SecondFails)
    lines = []
    agent, obs = make_agent("state", graphs=True, report=lines.append), observations("state", 1)
    captured = agent.actions.__self__._captured
    for act, left in ((agent.sample_action, 1), (agent.select_action, 0)):
        for _ in range(3):
            act(obs[0])
        assert len(captured) == left
    assert SecondFails.made == 2
    assert lines == ["continuing without CUDA graphs: out of memory"]


def test_loading_goes_on_with_graphs(recorded, tmp_path):
    """Weights are loaded into the memory that the graphs read."""
    agent, replay, (obs,) = make_agent("state", graphs=True), make_replay("state"), observations("state", 1)
    train(agent, replay, STEPS)
    agent.save(tmp_path, 1)
    saved = agent.select_action(obs)
    train(agent, replay, STEPS)
    assert not np.array_equal(agent.select_action(obs), saved)
    agent.load(tmp_path, 1)
    np.testing.assert_array_equal(agent.select_action(obs), saved)


@needs_gpu
@pytest.mark.parametrize(
    ("kind", "frames_device", "cls"),
    [*((kind, place, SacAeAgent) for kind in SHAPES for place in ("cuda", "cpu")), ("pixel", "cpu", Fetching)],
)
def test_captured_is_plain_on_a_gpu(kind, frames_device, cls, monkeypatch):
    """After 200 updates: the same kernels on the same numbers, also if they are fetched late, or no capture works."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    stream, lines, results = torch.cuda.current_stream(), [], []
    for graphs in (False, True):
        agent = make_agent(kind, "cuda", graphs, lines.append, cls, precision="fp32")
        replay = make_replay(kind, "cuda", frames_device)
        losses = [agent.update(replay, Recorder(), 20)["train_critic/loss"] for _ in range(100)]
        results.append(([losses, *train(agent, replay, range(21, 121))], agent))
    assert_equal(*results, rtol=1e-3, atol=1e-4)
    assert torch.cuda.current_stream() == stream
    assert ["due to a previous error" in line for line in lines] == [False] * (cls is Fetching)


@needs_gpu
@pytest.mark.parametrize("settings", [{"precision": "tf32"}, {"precision": "bf16"}, {"compile": True}])
def test_captured_in_other_ways_to_compute_on_a_gpu(settings):
    record = train(make_agent("pixel", "cuda", True, **settings), make_replay("pixel", "cuda", "cuda"), STEPS)
    assert all(np.isfinite(list(losses.values())).all() for losses, _ in record)


@needs_gpu
@pytest.mark.parametrize("frames_device", ["cuda", "cpu"])
@pytest.mark.parametrize("graphs", [False, True])
def test_an_update_never_waits_for_the_gpu(graphs, frames_device):
    """Nothing in it fetches from the device, with graphs and without; an action does."""
    agent, replay = make_agent("pixel", "cuda", graphs), make_replay("pixel", "cuda", frames_device)
    obs = np.zeros(SHAPES["pixel"], np.uint8)
    for step in range(4 * cuda_graph.WARMUP):
        agent.update(replay, Recorder(), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            agent.update(replay, Recorder(), step)
            replay.add(obs, np.zeros(2), 0.0, obs, False, first=True)
        with pytest.raises(RuntimeError, match="synchroniz"):
            agent.sample_action(obs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
