"""Inputs of the golden updates: parameters and batches from one seed (see data/README.md)."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from agents import OneBatch, Recorder

from sac_ae import SacAeAgent

DATA = Path(__file__).parent / "data"
LOSSES = {
    "critic_loss": "train_critic/loss",
    "actor_loss": "train_actor/loss",
    "alpha_loss": "train_alpha/loss",
    "ae_loss": "train_ae/ae_loss",
}


def load(name):
    """A golden file: `case`, `losses`, `final`, `log_alpha`."""
    return json.loads((DATA / f"{name}.json").read_text())


def start(case, device="cpu", dtype=torch.float64, cls=SacAeAgent, **settings):
    """An agent with the case's parameters, and what draws its batches."""
    obs_shape, types = (case.get("state"),), {"encoder_type": "identity", "decoder_type": "identity"}
    if "state" not in case:
        obs_shape = (case["channels"], case["size"], case["size"])
        types = {"encoder_feature_dim": case["feature"], "num_layers": case["layers"], "num_filters": case["filters"]}
    agent = cls(obs_shape, (case["actions"],), device, hidden_dim=case["hidden"], **types, **settings)
    rs = np.random.RandomState(case["seed"])
    draw_parameters(agent.double(), rs)
    for network in agent.networks.values():
        network.to(dtype)
    return agent, rs


def draw_parameters(agent, rs):
    """Sets the agent's parameters as the golden files prescribe."""
    for network, tied in ((agent.actor, "encoder.convs"), (agent.critic, "-"), (agent.decoder, "-")):
        if network is None:
            continue
        state = network.state_dict()
        for name in sorted(name for name in state if not name.startswith(tied)):
            x = rs.standard_normal(tuple(state[name].shape))
            if name.endswith("bias"):
                x = 0.01 * x
            elif ".ln." in name:
                x = 1 + 0.01 * x
            else:
                x = x / math.sqrt(np.prod(x.shape[1:]))
            with torch.no_grad():
                state[name].copy_(torch.from_numpy(x))
    agent.critic_target.load_state_dict(agent.critic.state_dict())


def draw_batches(case, rs, device="cpu"):
    """For each update: step, batch, normal noises and uniform noises in the order in which they are used."""
    pixels = "state" not in case
    size, actions = case["batch"], case["actions"]

    def observation():
        if pixels:
            return rs.randint(0, 256, (size, case["channels"], case["size"], case["size"])).astype(np.uint8)
        return rs.standard_normal((size, case["state"]))

    for step in range(case["first_step"], case["first_step"] + case["updates"]):
        obs = observation()
        action = rs.uniform(-1, 1, (size, actions))
        reward = rs.uniform(0, 1, (size, 1))
        next_obs = observation()
        not_done = (rs.uniform(size=(size, 1)) > 0.2).astype(np.float64)
        normals = [rs.standard_normal((size, actions)) for _ in range(2)]
        uniforms = [rs.uniform(size=obs.shape)] if pixels else []
        batch = tuple(torch.as_tensor(x, device=device) for x in (obs, action, reward, next_obs, not_done))
        yield step, batch, normals, uniforms


@contextlib.contextmanager
def noise(normals, uniforms):
    """Lets torch.randn_like and torch.rand_like return these arrays, one after the other."""

    def give(queue):
        def like(tensor, **_):
            values = torch.tensor(queue.pop(0), dtype=tensor.dtype, device=tensor.device)
            assert values.shape == tensor.shape
            return values

        return like

    with (
        mock.patch.object(torch, "randn_like", give(list(normals))),
        mock.patch.object(torch, "rand_like", give(list(uniforms))),
    ):
        yield


def updates(agent, case, rs):
    """The metrics of the agent's updates, on the case's batches."""
    for step, batch, normals, uniforms in draw_batches(case, rs):
        with noise(normals, uniforms):
            metrics = agent.update(OneBatch(batch), Recorder(), step)
        yield {"step": step} | {key: float(value) for key, value in metrics.items()}


def losses(metrics):
    """What of it the golden files hold, by their names."""
    return {"step": metrics["step"]} | {name: metrics[key] for name, key in LOSSES.items() if key in metrics}
