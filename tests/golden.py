"""Inputs of the golden updates: parameters and batches from one seed (see data/README.md)."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from sac_ae import SacAeAgent

DATA = Path(__file__).parent / "data"


def load_case(name):
    """A golden file: `case`, `losses`, `final`, `log_alpha`."""
    return json.loads((DATA / f"{name}.json").read_text())


def make_agent(case, device="cpu", **kwargs):
    """An agent of the case's size in float64, its parameters not yet set."""
    if "state" in case:
        obs_shape, types = (case["state"],), {"encoder_type": "identity", "decoder_type": "identity"}
    else:
        obs_shape = (case["channels"], case["size"], case["size"])
        types = {
            "encoder_feature_dim": case["feature"],
            "num_layers": case["layers"],
            "num_filters": case["filters"],
        }
    agent = SacAeAgent(obs_shape, (case["actions"],), device, hidden_dim=case["hidden"], **types, **kwargs)
    for network in (agent.actor, agent.critic, agent.critic_target, agent.decoder):
        if network is not None:
            network.double()
    return agent


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
            values = torch.as_tensor(queue.pop(0), dtype=tensor.dtype, device=tensor.device)
            assert values.shape == tensor.shape
            return values

        return like

    with (
        mock.patch.object(torch, "randn_like", give(list(normals))),
        mock.patch.object(torch, "rand_like", give(list(uniforms))),
    ):
        yield


def statistics(tensor):
    """What the golden files keep of a final parameter."""
    flat = tensor.detach().cpu().double().numpy().reshape(-1)
    return [flat.sum(), (flat**2).sum(), *flat[:3]]


def expected_statistics(entry):
    """The same of a golden file's entry."""
    return [entry["sum"], entry["sum_of_squares"], *entry["first"]]
