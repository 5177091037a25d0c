"""Networks and losses: shapes, initialisation, what the losses train, acting."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from agents import STATES, make_agent, make_batch, observations, updates
from torch import nn

from decoder import make_decoder
from encoder import conv_output_shape, make_encoder
from errors import UserError
from sac_ae import Actor, SacAeAgent, Settings, weight_init
from sac_vae import SacVaeAgent
from utils import module_hash


@pytest.mark.parametrize(
    ("size", "num_layers"), [*(((64, 84), num_layers) for num_layers in range(1, 7)), ((84, 84), 4), ((16, 16), 4)]
)
def test_encoder_and_decoder_shapes(size, num_layers):
    shape = (9, *size)
    encoder, decoder = (make("pixel", shape, 50, num_layers, 4) for make in (make_encoder, make_decoder))
    obs = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    feature = encoder(obs)
    assert feature.shape == (2, 50)
    assert feature.abs().max() < 1
    assert encoder.forward_conv(obs).shape == (2, 4 * math.prod(conv_output_shape(*size, num_layers)))
    assert decoder(feature).shape == obs.shape
    assert len(encoder.convs) == len(decoder.deconvs) == num_layers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_encoder("pixel", (3, 14, 14), 5, 4, 2), "at least 16 pixels"),
        (lambda: make_encoder("pixel", (3, 15, 16), 5, 1, 2), "even"),
        (lambda: make_encoder("pixel", (17,), 5, 1, 2), "takes images"),
        (lambda: make_encoder("identity", (3, 16, 16), 5, 1, 2), "takes state vectors"),
        (lambda: make_encoder("vit", (3, 16, 16), 5, 1, 2), "unknown encoder_type 'vit'"),
        (lambda: make_decoder("vit", (3, 16, 16), 5, 1, 2), "unknown decoder_type 'vit'"),
        (lambda: make_decoder("pixel", (17,), 5, 1, 2), "needs encoder_type pixel"),
        (lambda: conv_output_shape(16, 16, 0), "at least 1"),
        (lambda: Settings(actor_log_std_min=2), "must be below"),
    ],
)
def test_impossible_networks_are_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, stride=2)])
def test_delta_orthogonal_initialisation(layer):
    layer.apply(weight_init)
    centre = layer.weight[:, :, 1, 1].detach().clone()
    with torch.no_grad():
        layer.weight[:, :, 1, 1] = 0
    assert layer.weight.abs().max() == layer.bias.abs().max() == 0
    small = centre if centre.shape[0] <= centre.shape[1] else centre.T
    assert torch.allclose(small @ small.T, 2 * torch.eye(len(small)), atol=1e-5)  # ReLU gain, squared


@pytest.mark.parametrize("cls", [SacAeAgent, SacVaeAgent])
def test_agent_initialises_every_network(cls):
    agent = make_agent(cls=cls)
    for layer in agent.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            assert torch.allclose(weight @ weight.T, torch.eye(len(weight)), atol=1e-5)
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            assert layer.bias.abs().max() == 0
    assert module_hash(agent.critic) == module_hash(agent.critic_target)


def test_policy_limits_and_modes():
    actor = Actor((5,), (2,), Settings(hidden_dim=16, **STATES))
    with torch.no_grad():
        actor.trunk[-1].weight.mul_(1000)
    mu, pi, log_pi, log_std = actor(torch.randn(64, 5))
    assert -10 <= log_std.min() < -2
    assert 0 < log_std.max() <= 2
    assert max(mu.abs().max(), pi.abs().max()) <= 1
    assert log_pi.shape == (64, 1)
    assert torch.isfinite(log_pi).all()  # where tanh is saturated
    assert actor(torch.randn(3, 5), compute_pi=False)[1:3] == (None, None)
    assert actor(torch.randn(3, 5), compute_log_pi=False)[2] is None


def trained_by(agent, update):
    """Which parts an update changes; Adam with a past would move parameters even without a gradient."""
    updates(agent, range(4))
    critic, actor = agent.critic, agent.actor
    parts = {
        "convolutions": [critic.encoder.convs],
        "encoder": [critic.encoder.fc, critic.encoder.ln],
        "Q": [critic.Q1, critic.Q2],
        "actor": [actor.trunk],
        "actor's encoder": [actor.encoder.fc, actor.encoder.ln],
        "decoder": [agent.decoder] if agent.decoder else [],
    }
    parts = {name: list(nn.ModuleList(part).parameters()) for name, part in parts.items()}
    before = copy.deepcopy(parts)
    update(agent)
    trained = set()
    for name, part in parts.items():
        changed = {not torch.equal(old, new) for old, new in zip(before[name], part, strict=True)}
        assert len(changed) <= 1  # the whole part or nothing of it
        trained |= {name} if True in changed else set()
    return trained


ACTOR = {"actor", "actor's encoder"}


@pytest.mark.parametrize(("flag", "parts"), [(False, ACTOR), (True, ACTOR | {"convolutions"})])
def test_what_the_actor_s_loss_trains(flag, parts):
    """One place, `.detach()`, decides whether it trains the convolutions."""
    obs = make_batch()[0].float()
    agent = make_agent(actor_trains_encoder=flag)

    def update(agent):
        return agent.update_actor_and_alpha(agent.critic.encoder.forward_conv(obs))

    assert trained_by(agent, update) == parts
    before = agent.alpha.item()
    assert update(agent)["train_alpha/value"] == before != agent.alpha  # what the losses used


def test_what_is_due_at_a_step():
    agent = make_agent(actor_update_freq=2, critic_target_update_freq=3, decoder_update_freq=4)
    for step in range(1, 13):
        target = module_hash(agent.critic_target)
        metrics = updates(agent, [step])
        assert ("train_actor/loss" in metrics) == (step % 2 == 0)
        assert (module_hash(agent.critic_target) != target) == (step % 3 == 0)
        assert ("train_ae/ae_loss" in metrics) == (step % 4 == 0)
        assert not any(value.requires_grad for value in metrics.values())


def test_without_a_decoder():
    agent, (obs, *_) = make_agent(decoder_type="identity"), make_batch()
    assert agent.decoder is None
    assert "train_ae/ae_loss" not in updates(agent, [0])
    hidden = agent.critic.encoder.forward_conv(obs)
    for call in (lambda: agent.update_decoder(obs.float(), hidden), lambda: agent.reconstruct(obs.numpy())):
        with pytest.raises(RuntimeError, match="no decoder"):
            call()


def test_acting():
    agent, (obs, other) = make_agent(), observations("pixel", 2)
    action = agent.select_action(obs)
    assert (action.shape, action.dtype) == ((2,), np.float32)
    np.testing.assert_allclose(agent.select_actions(np.stack([other, obs]))[1], action, rtol=1e-5)
    assert (agent.sample_action(obs) != agent.sample_action(obs)).all()


def test_where_an_observation_lies_in_memory_does_not_matter():
    """NumPy's arrays begin anywhere; products that begin elsewhere are rounded differently."""
    agent, obs = make_agent("state"), observations("state", 2).astype(np.float32)
    room, actions = np.zeros(obs.size + 16, np.float32), set()
    for offset in range(16):
        here = room[offset : offset + obs.size].reshape(obs.shape)
        here[:] = obs
        actions.add(agent.select_actions(here).tobytes())
    assert len(actions) == 1
