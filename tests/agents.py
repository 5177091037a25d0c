"""Small agents, what trains them, and a comparison of two that must be the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sac_ae import SacAeAgent
from support.cuda_graph import Graphs
from support.prefetch import Prefetched
from utils import ReplayBuffer, set_seed_everywhere

SIZES = {"hidden_dim": 16, "encoder_feature_dim": 6, "num_layers": 2, "num_filters": 4}
SHAPES = {"pixel": (9, 16, 16), "state": (5,)}
STATES = {"encoder_type": "identity", "decoder_type": "identity"}


class WithDropout(SacAeAgent):
    """Has dropout in actor, critic and target, and a frozen network of its own."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        for network in (self.actor, self.critic.Q1, self.critic_target.Q1):
            network.trunk.append(nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).requires_grad_(False)


class OneBatch:
    """A replay that gives the batch it was given."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self):
        return self.batch


class Recorder:
    """A logger that remembers."""

    def __init__(self):
        self.values = {}

    def log(self, key, value, step, n=1):
        self.values[key, step] = value


def make_agent(kind="pixel", device="cpu", graphs=False, report=pytest.fail, cls=SacAeAgent, **settings):
    """The same agent at each call."""
    set_seed_everywhere(3)
    agent = cls(SHAPES[kind], (2,), device, **(SIZES | ({} if kind == "pixel" else STATES) | settings))
    if graphs:
        Graphs(agent, report)
    return agent


def observations(kind, count, seed=5):
    """Stacks of three frames as they follow each other in an episode, or states, at random."""
    rng, shape = np.random.default_rng(seed), SHAPES[kind]
    if kind == "state":
        return rng.standard_normal((count, *shape))
    frames = rng.integers(0, 256, (count + 2, 3, *shape[1:])).astype(np.uint8)
    return np.stack([frames[index : index + 3].reshape(shape) for index in range(count)])


def make_batch(kind="pixel"):
    """Eight transitions of random numbers."""
    obs, next_obs = (torch.from_numpy(observations(kind, 8, seed)) for seed in (1, 2))
    return obs, torch.rand(8, 2) * 2 - 1, torch.rand(8, 1), next_obs, torch.ones(8, 1)


def make_replay(kind, device="cpu", frames_device="cpu", count=40):
    """A replay of one episode, which prefetches if its frames are on another device."""
    replay = ReplayBuffer(SHAPES[kind], (2,), 100, 8, device, seed=7, frames_device=frames_device)
    rng, obs = np.random.default_rng(6), observations(kind, count + 1)
    for index in range(count):
        replay.add(obs[index], rng.uniform(-1, 1, 2), float(rng.uniform()), obs[index + 1], False, first=index == 0)
    return Prefetched(replay) if str(device) != str(frames_device) else replay


def updates(agent, steps, kind="pixel"):
    """Updates on random batches; returns the metrics of the last."""
    for step in steps:
        metrics = agent.update(OneBatch(make_batch(kind)), Recorder(), step)
    return metrics


def train(agent, replay, steps):
    """The metrics of each step's update, and an action of each way to act after it."""
    record, kind = [], "state" if agent.decoder is None else "pixel"
    for step, obs in zip(steps, observations(kind, len(steps)), strict=True):
        metrics = agent.update(replay, Recorder(), step)
        actions = agent.sample_action(obs), agent.select_action(obs), agent.select_actions(np.stack([obs, obs]))
        record.append(({key: float(value) for key, value in metrics.items()}, actions))
    return record


def assert_equal(plain, other, rtol=0.0, atol=0.0):
    """That two agents, each given with the record of its training, hold the same, moments included."""
    results = [(record, agent.state_dict()) for record, agent in (plain, other)]
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)
