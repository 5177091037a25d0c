"""Networks: shapes, shared convolutions, initialisation, densities, saving and loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_golden import OneBatch, Recorder
from torch import nn

from decoder import make_decoder
from encoder import IdentityEncoder, PixelEncoder, conv_output_shape, make_encoder, tie_weights
from errors import UserError
from sac_ae import Actor, SacAeAgent, gaussian_logprob, squash, weight_init
from utils import module_hash

SMALL = {"hidden_dim": 16, "encoder_feature_dim": 6, "num_layers": 2, "num_filters": 4}


def make_small_agent(**kwargs):
    return SacAeAgent((9, 16, 16), (2,), "cpu", **(SMALL | kwargs))


def random_batch(obs_shape=(9, 16, 16), size=8, actions=2):
    def obs():
        return torch.randint(0, 256, (size, *obs_shape), dtype=torch.uint8)

    return obs(), torch.rand(size, actions) * 2 - 1, torch.rand(size, 1), obs(), torch.ones(size, 1)


@pytest.mark.parametrize("num_layers", range(1, 7))
@pytest.mark.parametrize("size", [64, 84, 100, (64, 84)])
def test_encoder_and_decoder_shapes(size, num_layers):
    height, width = size if isinstance(size, tuple) else (size, size)
    shape = (9, height, width)
    encoder = make_encoder("pixel", shape, 50, num_layers, 4)
    decoder = make_decoder("pixel", shape, 50, num_layers, 4)
    obs = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    feature = encoder(obs)
    assert feature.shape == (2, 50)
    assert feature.abs().max() < 1
    out_height, out_width = conv_output_shape(height, width, num_layers)
    assert encoder.forward_conv(obs).shape == (2, 4 * out_height * out_width)
    assert decoder(feature).shape == obs.shape
    assert len(encoder.convs) == len(decoder.deconvs) == num_layers


def test_published_size():
    assert conv_output_shape(84, 84, 4) == (35, 35)


def test_smallest_image():
    assert make_encoder("pixel", (3, 16, 16), 5, 4, 2)(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        make_encoder("pixel", (3, 14, 14), 5, 4, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_encoder("pixel", (3, 15, 16), 5, 1, 2), "even"),
        (lambda: make_encoder("pixel", (17,), 5, 1, 2), "takes images"),
        (lambda: make_encoder("identity", (3, 16, 16), 5, 1, 2), "takes state vectors"),
        (lambda: make_encoder("vit", (3, 16, 16), 5, 1, 2), "unknown encoder_type 'vit'"),
        (lambda: make_decoder("vit", (3, 16, 16), 5, 1, 2), "unknown decoder_type 'vit'"),
        (lambda: make_decoder("pixel", (17,), 5, 1, 2), "needs encoder_type pixel"),
        (lambda: conv_output_shape(16, 16, 0), "at least 1"),
    ],
)
def test_impossible_networks_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_identity_types():
    encoder = make_encoder("identity", (17,), 50, 4, 32)
    assert isinstance(encoder, IdentityEncoder)
    assert encoder.feature_dim == 17
    assert make_decoder("identity", (17,), 50, 4, 32) is None


def test_tied_convolutions_are_the_same_objects():
    agent = make_small_agent()
    for actor_conv, critic_conv in zip(agent.actor.encoder.convs, agent.critic.encoder.convs, strict=True):
        assert actor_conv.weight is critic_conv.weight
        assert actor_conv.bias is critic_conv.bias
    assert agent.actor.encoder.fc.weight is not agent.critic.encoder.fc.weight
    assert agent.critic_target.encoder.convs[0].weight is not agent.critic.encoder.convs[0].weight
    with pytest.raises(TypeError, match="cannot tie"):
        tie_weights(nn.Linear(2, 2), nn.Conv2d(2, 2, 3))


def test_actor_loss_leaves_convolutions_and_critic_alone():
    agent = make_small_agent()
    # Adam with a past moves parameters even without a gradient; give the actor's one a past.
    for step in range(4):
        agent.update(OneBatch(random_batch()), Recorder(), step)
    before = module_hash(agent.critic), module_hash(agent.actor.trunk), module_hash(agent.actor.encoder.fc)
    agent.update_actor_and_alpha(random_batch()[0].float())
    assert module_hash(agent.critic) == before[0]
    assert module_hash(agent.actor.trunk) != before[1]
    assert module_hash(agent.actor.encoder.fc) != before[2]


def test_the_temperature_in_the_logs_is_the_one_that_the_losses_used():
    agent = make_small_agent()
    before = agent.alpha.item()
    metrics = agent.update_actor_and_alpha(random_batch()[0].float())
    assert metrics["train_alpha/value"].item() == before != agent.alpha.item()


def test_decoder_loss_trains_the_whole_encoder():
    agent = make_small_agent()
    parts = [*agent.critic.encoder.convs, agent.critic.encoder.fc, agent.critic.encoder.ln, agent.decoder]
    before = [module_hash(part) for part in parts]
    others = module_hash(agent.critic.Q1), module_hash(agent.actor.trunk)
    agent.update_decoder(random_batch()[0].float())
    assert all(module_hash(part) != was for part, was in zip(parts, before, strict=True))
    assert (module_hash(agent.critic.Q1), module_hash(agent.actor.trunk)) == others


def test_what_is_due_at_a_step():
    agent = make_small_agent(actor_update_freq=2, critic_target_update_freq=3, decoder_update_freq=4)
    for step in range(1, 13):
        target = module_hash(agent.critic_target)
        metrics = agent.update(OneBatch(random_batch()), Recorder(), step)
        assert ("train_actor/loss" in metrics) == (step % 2 == 0)
        assert (module_hash(agent.critic_target) != target) == (step % 3 == 0)
        assert ("train_ae/ae_loss" in metrics) == (step % 4 == 0)
        assert not any(value.requires_grad for value in metrics.values())


def test_without_a_decoder():
    agent = make_small_agent(decoder_type="identity")
    assert agent.decoder is None
    assert "train_ae/ae_loss" not in agent.update(OneBatch(random_batch()), Recorder(), 0)
    with pytest.raises(RuntimeError, match="no decoder"):
        agent.update_decoder(random_batch()[0].float())
    with pytest.raises(RuntimeError, match="no decoder"):
        agent.reconstruct(random_batch()[0].to(torch.uint8).numpy())


@pytest.mark.parametrize("count", [2, 100])
def test_an_optimiser_of_other_parameters_is_refused_before_anything_is_loaded(count):
    """Of fewer, or of the same in another order."""
    agent, other = make_small_agent(), make_small_agent()
    agent.update(OneBatch(random_batch()), Recorder(), 0)
    parameters = list(other.actor.parameters())[::-1][:count]
    other.actor_optimizer = other.adam(parameters, 1e-3)
    before = module_hash(other.actor)
    with pytest.raises(UserError, match="actor_optimizer trains other parameters"):
        other.load_state_dict(agent.state_dict())
    assert module_hash(other.actor) == before


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, stride=2)])
def test_delta_orthogonal_initialisation(layer):
    layer.apply(weight_init)
    centre = layer.weight[:, :, 1, 1].detach()
    off_centre = layer.weight.detach().clone()
    off_centre[:, :, 1, 1] = 0
    assert off_centre.abs().max() == 0
    assert layer.bias.abs().max() == 0
    small = centre if centre.shape[0] <= centre.shape[1] else centre.T
    assert torch.allclose(small @ small.T, 2 * torch.eye(len(small)), atol=1e-5)  # ReLU gain, squared


def test_agent_initialises_every_network():
    agent = make_small_agent()
    for network in (agent.actor, agent.critic, agent.decoder):
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
                assert torch.allclose(weight @ weight.T, torch.eye(len(weight)), atol=1e-5)
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                assert layer.bias.abs().max() == 0
    assert module_hash(agent.critic) == module_hash(agent.critic_target)


def test_log_probability_against_torch_distributions():
    mu, log_std, noise = torch.randn(3, 20, 4, dtype=torch.float64)
    pi = mu + noise * log_std.exp()
    normal = torch.distributions.Normal(mu, log_std.exp())
    assert torch.allclose(gaussian_logprob(noise, log_std), normal.log_prob(pi).sum(-1, keepdim=True))
    _, squashed, log_pi = squash(mu, pi, gaussian_logprob(noise, log_std))
    transformed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    want = transformed.log_prob(squashed).sum(-1, keepdim=True)
    inside = (1 - squashed**2).min(dim=-1).values > 1e-2  # elsewhere the 1e-6 of the method shows
    assert inside.sum() > 3
    assert torch.allclose(log_pi[inside], want[inside], atol=1e-3)


def test_policy_limits_and_modes():
    actor = Actor((5,), (2,), 16, "identity", 0, -10, 2, 0, 0)
    with torch.no_grad():
        actor.trunk[-1].weight.mul_(1000)
    mu, pi, log_pi, log_std = actor(torch.randn(64, 5))
    assert log_std.min() >= -10
    assert log_std.max() <= 2
    assert log_std.max() - log_std.min() > 8
    assert mu.abs().max() <= 1
    assert pi.abs().max() <= 1
    assert log_pi.shape == (64, 1)
    assert torch.isfinite(log_pi).all()
    assert actor(torch.randn(3, 5), compute_pi=False)[1:3] == (None, None)
    assert actor(torch.randn(3, 5), compute_log_pi=False)[2] is None


def test_acting():
    agent = make_small_agent()
    obs = random_batch()[0][0].numpy()
    action = agent.select_action(obs)
    assert action.shape == (2,)
    assert action.dtype == np.float32
    assert (agent.select_action(obs) == action).all()
    assert (agent.sample_action(obs) != agent.sample_action(obs)).all()


@pytest.mark.parametrize("types", [{}, {"decoder_type": "identity"}])
def test_save_and_load(tmp_path, types):
    agent = make_small_agent(**types)
    for step in range(3):
        agent.update(OneBatch(random_batch()), Recorder(), step)
    agent.save(tmp_path, 7)
    other = make_small_agent(**types)
    other.load(tmp_path, 7)
    names = ["actor", "critic", "critic_target"] + ([] if types else ["decoder"])
    for name in names:
        assert module_hash(getattr(other, name)) == module_hash(getattr(agent, name))
    assert other.log_alpha.item() == agent.log_alpha.item() != make_small_agent().log_alpha.item()
    assert other.actor.encoder.convs[0].weight is other.critic.encoder.convs[0].weight
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == {f"{name}_7.pt" for name in ("actor", "critic", "target", *([] if types else ["decoder"]))}


def test_load_models_of_the_authors_script(tmp_path):
    """They lack target and temperature: the target becomes the critic's copy."""
    agent = make_small_agent()
    for step in range(3):
        agent.update(OneBatch(random_batch()), Recorder(), step)
    agent.save(tmp_path, 7)
    (tmp_path / "target_7.pt").unlink()
    other = make_small_agent()
    other.load(tmp_path, 7)
    assert module_hash(other.critic_target) == module_hash(agent.critic) != module_hash(agent.critic_target)


def test_golden_parameter_names():
    """Names that saved models of the authors' script have."""
    agent = make_small_agent()
    encoder = {f"encoder.{layer}.{kind}" for layer in ("convs.0", "convs.1", "fc", "ln") for kind in ("weight", "bias")}
    trunk = {f"trunk.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(agent.actor.state_dict()) == encoder | trunk
    assert set(agent.critic.state_dict()) == encoder | {f"Q{i}.{name}" for i in (1, 2) for name in trunk}
    deconvs = {f"{layer}.{kind}" for layer in ("fc", "deconvs.0", "deconvs.1") for kind in ("weight", "bias")}
    assert set(agent.decoder.state_dict()) == deconvs
    assert isinstance(agent.actor.encoder, PixelEncoder)
