"""The algorithm and the paper's variants once more, in the plainest form: functions on dictionaries of tensors.

It shares no code with the project and takes no short cut (every pass on its own, an Adam step per tensor), so that the
project's update can be tested against it, and its speed measured beside it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

Params = dict[str, torch.Tensor]


def convolve(p: Params, obs):
    x = obs / 255.0
    i = 0
    while f"encoder.convs.{i}.weight" in p:
        x = F.relu(F.conv2d(x, p[f"encoder.convs.{i}.weight"], p[f"encoder.convs.{i}.bias"], stride=2 if i == 0 else 1))
        i += 1
    return x.reshape(x.shape[0], -1)


def encode(p: Params, obs, detach=False):
    if "encoder.fc.weight" not in p:
        return obs
    x = convolve(p, obs)
    if detach:
        x = x.detach()
    x = F.linear(x, p["encoder.fc.weight"], p["encoder.fc.bias"])
    return torch.tanh(F.layer_norm(x, x.shape[1:], p["encoder.ln.weight"], p["encoder.ln.bias"]))


def three_layers(p: Params, prefix: str, x):
    for i in (0, 2):
        x = F.relu(F.linear(x, p[f"{prefix}.{i}.weight"], p[f"{prefix}.{i}.bias"]))
    return F.linear(x, p[f"{prefix}.4.weight"], p[f"{prefix}.4.bias"])


def policy(p: Params, obs, detach=False):
    mean, raw = three_layers(p, "trunk", encode(p, obs, detach)).chunk(2, dim=1)
    log_std = -10 + 0.5 * (2 - -10) * (torch.tanh(raw) + 1)
    noise = torch.randn_like(mean)
    action = torch.tanh(mean + noise * torch.exp(log_std))
    density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = (density - torch.log(F.relu(1 - action**2) + 1e-6)).sum(1, keepdim=True)
    return action, log_prob


def values(p: Params, obs, action, detach=False):
    x = torch.cat([encode(p, obs, detach), action], dim=1)
    return three_layers(p, "Q1.trunk", x), three_layers(p, "Q2.trunk", x)


def decode(p: Params, feature, height, width):
    x = F.relu(F.linear(feature, p["fc.weight"], p["fc.bias"]))
    x = x.reshape(x.shape[0], -1, height, width)
    last = sum(name.endswith("weight") for name in p) - 2
    for i in range(last):
        x = F.relu(F.conv_transpose2d(x, p[f"deconvs.{i}.weight"], p[f"deconvs.{i}.bias"]))
    return F.conv_transpose2d(
        x, p[f"deconvs.{last}.weight"], p[f"deconvs.{last}.bias"], stride=2, padding=0, output_padding=1
    )


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def make_adam(params, lr, beta=0.9, decay=0.0):
    return torch.optim.Adam(params, lr=lr, betas=(beta, 0.999), weight_decay=decay, foreach=False, fused=False)


class PlainAgent:
    """SAC+AE at the default hyper-parameters, from given parameters (state dicts).

    Keywords are flags of the paper's other experiments.
    """

    def __init__(
        self,
        actor: Params,
        critic: Params,
        decoder: Params | None,
        critic_trains_encoder=True,
        actor_trains_encoder=False,
        freeze_encoder=False,
        decoder_update_freq=1,
    ):
        self.actor_trains_encoder, self.freeze_encoder = actor_trains_encoder, freeze_encoder
        self.decoder_update_freq = decoder_update_freq
        self.critic = {name: leaf(tensor) for name, tensor in critic.items()}
        self.target = {name: tensor.detach().clone() for name, tensor in critic.items()}
        self.actor = {
            name: self.critic[name] if name.startswith("encoder.convs") else leaf(tensor)
            for name, tensor in actor.items()
        }
        self.decoder = None if decoder is None else {name: leaf(tensor) for name, tensor in decoder.items()}
        any_parameter = next(iter(self.critic.values()))
        self.log_alpha = torch.tensor(np.log(0.1), device=any_parameter.device, requires_grad=True)

        self.encoder = [tensor for name, tensor in self.critic.items() if name.startswith("encoder.")]
        q_functions = [tensor for name, tensor in self.critic.items() if name.startswith("Q")]
        heads = [tensor for name, tensor in self.actor.items() if not name.startswith("encoder.convs")]
        trains_encoder = critic_trains_encoder and not freeze_encoder
        self.critic_adam = make_adam(self.encoder + q_functions if trains_encoder else q_functions, 1e-3)
        self.actor_adam = make_adam(list(self.actor.values()) if actor_trains_encoder else heads, 1e-3)
        self.alpha_adam = make_adam([self.log_alpha], 1e-4, 0.5)
        if self.decoder is not None:
            self.encoder_adam = make_adam(self.encoder, 1e-3)
            self.decoder_adam = make_adam(list(self.decoder.values()), 1e-3, decay=1e-7)

    def act(self, obs):
        """Actions (N, A) for observations (N, ...)."""
        with torch.no_grad():
            obs = torch.as_tensor(obs, dtype=torch.float32, device=self.log_alpha.device)
            return policy(self.actor, obs)[0].cpu().numpy()

    def train(self, env, replay):
        """The training loop without evaluation, as an iterator of decisions. Each but the first has an update."""
        obs, _ = env.reset()
        for step in itertools.count():
            action = self.act(obs[None])[0]
            if step > 0:
                self.update(replay.sample(), step)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            replay.add(obs, action, reward, next_obs, terminated)
            obs = env.reset()[0] if terminated or truncated else next_obs
            yield

    def update(self, batch, step):
        """One update; the losses as numbers, under the names of the golden files."""
        obs, action, reward, next_obs, not_done = batch
        losses = {"step": step}

        with torch.no_grad():
            next_action, next_log_prob = policy(self.actor, next_obs)
            q1, q2 = values(self.target, next_obs, next_action)
            v = torch.minimum(q1, q2) - self.log_alpha.exp() * next_log_prob
            y = reward + not_done * 0.99 * v
        q1, q2 = values(self.critic, obs, action)
        loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        losses["critic_loss"] = self.step(loss, self.critic_adam)

        if step % 2 == 0:
            detach = not self.actor_trains_encoder
            new_action, log_prob = policy(self.actor, obs, detach)
            q1, q2 = values(self.critic, obs, new_action, detach)
            alpha = self.log_alpha.exp()
            loss = (alpha.detach() * log_prob - torch.minimum(q1, q2)).mean()
            losses["actor_loss"] = self.step(loss, self.actor_adam)
            loss = (alpha * (-log_prob.detach() + action.shape[1])).mean()
            losses["alpha_loss"] = self.step(loss, self.alpha_adam)

            for name, tensor in self.target.items():
                tau = 0.05 if name.startswith("encoder.") else 0.01
                tensor.copy_(tau * self.critic[name].detach() + (1 - tau) * tensor)

        if self.decoder is not None and step % self.decoder_update_freq == 0 and not self.freeze_encoder:
            losses["ae_loss"] = self.step(self.ae_loss(obs), self.encoder_adam, self.decoder_adam)
        return losses

    def ae_loss(self, obs):
        feature = encode(self.critic, obs)
        return self.reconstruction_loss(feature, obs) + 1e-6 * (0.5 * (feature**2).sum(1)).mean()

    def reconstruction_loss(self, feature, obs):
        """Mean squared error of the images that are decoded from features."""
        side = [obs.shape[i] // 2 - 1 - 2 * (self.num_layers() - 1) for i in (2, 3)]
        goal = torch.floor(obs / 8) / 32 + torch.rand_like(obs) / 32 - 0.5
        return ((decode(self.decoder, feature, *side) - goal) ** 2).mean()

    def num_layers(self):
        """Convolutions of the encoder."""
        return sum(name.startswith("encoder.convs") and name.endswith("weight") for name in self.critic)

    def step(self, loss, *adams):
        """Steps the optimisers along a loss; the loss as a number."""
        for adam in adams:
            adam.zero_grad()
        loss.backward()
        for adam in adams:
            adam.step()
        return loss.item()


class PlainVae(PlainAgent):
    """SAC on a variational autoencoder. The actor has no linear layer of its own: it learns from the mean."""

    def __init__(self, actor, critic, decoder, log_variance: Params, beta, actor_trains_encoder=False, **flags):
        super().__init__(actor, critic, decoder, actor_trains_encoder=actor_trains_encoder, **flags)
        self.actor |= {name: tensor for name, tensor in self.critic.items() if name.startswith("encoder.")}
        trunk = [tensor for name, tensor in self.actor.items() if name.startswith("trunk.")]
        self.log_variance, self.beta = {name: leaf(tensor) for name, tensor in log_variance.items()}, beta
        self.actor_adam = make_adam(trunk + self.encoder if actor_trains_encoder else trunk, 1e-3)
        self.encoder_adam = make_adam([*self.encoder, *self.log_variance.values()], 1e-3)

    def ae_loss(self, obs):
        mean = encode(self.critic, obs)
        log_variance = F.linear(convolve(self.critic, obs), self.log_variance["weight"], self.log_variance["bias"])
        posterior = torch.distributions.Normal(mean, torch.exp(log_variance).sqrt())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        sample = mean + torch.randn_like(mean) * posterior.scale
        divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
        return self.reconstruction_loss(sample, obs) + self.beta * divergence


class PlainReplay:
    """Both stacks of every transition, in NumPy, as a ring."""

    def __init__(self, obs_shape, action_shape, capacity, batch_size, device, seed=0):
        dtype = np.float32 if len(obs_shape) == 1 else np.uint8
        self.obs = np.empty((capacity, *obs_shape), dtype)
        self.next_obs = np.empty((capacity, *obs_shape), dtype)
        self.action = np.empty((capacity, *action_shape), np.float32)
        self.reward = np.empty((capacity, 1), np.float32)
        self.not_done = np.empty((capacity, 1), np.float32)
        self.capacity, self.batch_size, self.device = capacity, batch_size, device
        self.added = 0
        self.generator = np.random.default_rng(seed)

    @property
    def nbytes(self):
        return sum(field.nbytes for field in (self.obs, self.next_obs, self.action, self.reward, self.not_done))

    def add(self, obs, action, reward, next_obs, done):
        place = self.added % self.capacity
        self.obs[place] = obs
        self.action[place] = action
        self.reward[place] = reward
        self.next_obs[place] = next_obs
        self.not_done[place] = not done
        self.added += 1

    def sample(self):
        return self.gather(self.generator.integers(0, min(self.added, self.capacity), self.batch_size))

    def gather(self, transitions):
        """Transitions by their number since the start, as floats on the device."""
        places = transitions % self.capacity
        fields = (self.obs, self.action, self.reward, self.next_obs, self.not_done)
        return tuple(torch.as_tensor(field[places], device=self.device).float() for field in fields)


class PlainEnv:
    """A Control Suite task without end: states, or the last three pictures of 84 x 84 pixels."""

    def __init__(self, domain, task, action_repeat, pixels):
        from dm_control import suite

        self.env = suite.load(domain, task, task_kwargs={"random": 1, "time_limit": float("inf")})
        self.env.reset()
        self.action_repeat, self.pixels = action_repeat, pixels
        self.frames = deque([np.zeros((3, 84, 84), np.uint8)] * 3, maxlen=3)

    def step(self, action):
        """The observation after an action."""
        for _ in range(self.action_repeat):
            observation = self.env.step(action).observation
        state = np.concatenate([np.ravel(value) for value in observation.values()])
        if not self.pixels:
            return state
        self.frames.append(self.env.physics.render(84, 84, camera_id=0).transpose(2, 0, 1).copy())
        return np.concatenate(self.frames)

    def close(self):
        self.env.close()
