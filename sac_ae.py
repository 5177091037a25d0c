"""SAC+AE: soft actor-critic on the features of a regularised autoencoder (Yarats et al., arXiv 1910.01741).

Shapes: B batch, C H W channels, height and width of the stacked frames, A action dimension, D feature dimension.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent import Agent, Metrics
from decoder import make_decoder
from encoder import make_encoder
from errors import UserError
from precision import ExactLinear, layers_in
from settings import Settings
from utils import preprocess_obs, soft_update_params


class Due(NamedTuple):
    """What an update trains besides the critic."""

    actor: bool  # and alpha
    target: bool
    decoder: bool


def gaussian_logprob(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log density (B, 1) of mean + noise * std under N(mean, std), from noise and log_std (B, A)."""
    return (-0.5 * noise.pow(2) - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)


def squash(mu: Tensor, pi: Tensor | None, log_pi: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squashes mean and sample by tanh and corrects the log density for it (SAC, arXiv 1801.01290, appendix C)."""
    pi = None if pi is None else torch.tanh(pi)
    if pi is not None and log_pi is not None:
        # relu: rounding can make 1 - pi^2 negative where tanh is saturated.
        log_pi = log_pi - torch.log(torch.relu(1 - pi.pow(2)) + 1e-6).sum(-1, keepdim=True)
    return torch.tanh(mu), pi, log_pi


def weight_init(module: nn.Module) -> None:
    """Orthogonal linear layers, delta-orthogonal convolutions (arXiv 1806.05393), zero biases; for `module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.zeros_(module.weight)
        row, column = (size // 2 for size in module.kernel_size)
        nn.init.orthogonal_(module.weight.data[:, :, row, column], nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    hidden = [nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*hidden, ExactLinear(hidden_dim, out_dim))


class Actor(nn.Module):
    """Policy: encoder, then an MLP to mean and log std of a tanh-squashed Gaussian."""

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        hidden_dim: int,
        encoder_type: str,
        encoder_feature_dim: int,
        log_std_min: float,
        log_std_max: float,
        num_layers: int,
        num_filters: int,
    ):
        super().__init__()
        self.encoder = make_encoder(encoder_type, obs_shape, encoder_feature_dim, num_layers, num_filters)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.trunk = mlp(self.encoder.feature_dim, hidden_dim, 2 * action_shape[0])
        self.apply(weight_init)

    def forward(
        self, obs: Tensor, compute_pi: bool = True, compute_log_pi: bool = True, detach_encoder: bool = False
    ) -> tuple[Tensor, Any, Any, Tensor]:
        """Mean action, sampled action, its log probability (B, 1), and log std; actions (B, A) in [-1, 1].

        Sample and log probability are None unless asked for. The noise of a sample is one `torch.randn_like` of shape
        (B, A).
        """
        mu, raw_log_std = self.trunk(self.encoder(obs, detach_encoder)).chunk(2, dim=-1)
        # A smooth bound instead of a clamp: the gradient never vanishes altogether.
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (torch.tanh(raw_log_std) + 1)
        pi = log_pi = None
        if compute_pi:
            noise = torch.randn_like(mu)
            pi = mu + noise * log_std.exp()
            log_pi = gaussian_logprob(noise, log_std) if compute_log_pi else None
        return *squash(mu, pi, log_pi), log_std


class QFunction(nn.Module):
    """Value of an action, from features and action joined."""

    def __init__(self, feature_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.trunk = mlp(feature_dim + action_dim, hidden_dim, 1)

    def forward(self, feature: Tensor, action: Tensor) -> Tensor:
        """Features (B, D) and actions (B, A) to values (B, 1)."""
        return self.trunk(torch.cat([feature, action], dim=1))


class Critic(nn.Module):
    """Two Q functions on one encoder (clipped double Q, arXiv 1802.09477)."""

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        hidden_dim: int,
        encoder_type: str,
        encoder_feature_dim: int,
        num_layers: int,
        num_filters: int,
    ):
        super().__init__()
        self.encoder = make_encoder(encoder_type, obs_shape, encoder_feature_dim, num_layers, num_filters)
        self.Q1 = QFunction(self.encoder.feature_dim, action_shape[0], hidden_dim)
        self.Q2 = QFunction(self.encoder.feature_dim, action_shape[0], hidden_dim)
        self.apply(weight_init)

    def forward(self, obs: Tensor, action: Tensor, detach_encoder: bool = False) -> tuple[Tensor, Tensor]:
        """Both values, (B, 1) each."""
        feature = self.encoder(obs, detach_encoder)
        return self.Q1(feature, action), self.Q2(feature, action)


class SacAeAgent(Agent):
    """Networks, losses and optimisers of SAC+AE.

    With `decoder_type="identity"` there is no decoder (the paper's SAC:pixel). With `encoder_type="identity"` too,
    observations are state vectors (SAC:state). A subclass may add networks, parameters and optimisers as attributes:
    checkpoints hold all of these; saved models, `train` and histograms include the networks.

    With precision bf16 layers compute in bfloat16; weights, optimisers, LayerNorm, densities, targets and losses stay
    float32. `compile` compiles every method named `*_loss`: results are rounded differently, the noise is the same.

    Args:
        obs_shape: (C, H, W) of pixels, or (D,) of states.
        action_shape: (A,).
        device: of the networks.
        settings: those of `Settings`. Raises UserError if types or sizes do not fit together.
    """

    settings_class = Settings

    def __init__(
        self, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], device: torch.device | str, **settings: Any
    ):
        self.settings = s = self.settings_class(**settings)
        self.device = torch.device(device)
        self.target_entropy = -math.prod(action_shape)

        if s.actor_log_std_min >= s.actor_log_std_max:
            raise UserError("actor_log_std_min must be below actor_log_std_max")
        sizes = (obs_shape, action_shape, s.hidden_dim, s.encoder_type, s.encoder_feature_dim)
        self.actor = Actor(*sizes, s.actor_log_std_min, s.actor_log_std_max, s.num_layers, s.num_filters)
        self.critic = Critic(*sizes, s.num_layers, s.num_filters)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        # The actor shares the critic's convolutions; the actor's loss does not train them (paper, section 5.2).
        self.actor.encoder.copy_conv_weights_from(self.critic.encoder)
        self.decoder = make_decoder(s.decoder_type, obs_shape, s.encoder_feature_dim, s.num_layers, s.num_filters)
        if self.decoder is not None:
            self.decoder.apply(weight_init)
        # In this layout in memory the backward passes of convolutions are a fifth faster on a CPU.
        # https://pytorch.org/tutorials/intermediate/memory_format_tutorial.html
        self.layout = torch.channels_last if self.device.type == "cpu" else torch.preserve_format
        for network in self.networks.values():
            network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        # Always float64: float32 would round the many small updates of this one number.
        log_alpha = torch.tensor(math.log(s.init_temperature), dtype=torch.float64, device=self.device)
        self.log_alpha = log_alpha.requires_grad_()

        shared = set(self.critic.parameters())
        self.actor_parameters = [parameter for parameter in self.actor.parameters() if parameter not in shared]
        self.critic_optimizer = self.adam(self.critic.parameters(), s.critic_lr, s.critic_beta)
        self.actor_optimizer = self.adam(self.actor_parameters, s.actor_lr, s.actor_beta)
        self.log_alpha_optimizer = self.adam([self.log_alpha], s.alpha_lr, s.alpha_beta)
        if self.decoder is not None:
            self.encoder_optimizer = self.adam(self.critic.encoder.parameters(), s.encoder_lr)
            self.decoder_optimizer = self.adam(self.decoder.parameters(), s.decoder_lr, 0.9, s.decoder_weight_lambda)
        if s.compile:
            for name in [name for name in dir(self) if name.endswith("_loss")]:
                setattr(self, name, torch.compile(getattr(self, name), options={"fallback_random": True}))
        self.train()

    @property
    def alpha(self) -> Tensor:
        """Temperature, a float64 scalar with gradient to `log_alpha`."""
        return self.log_alpha.exp()

    @torch.no_grad()
    def actions(self, obs: Tensor, sample: bool) -> Tensor:
        """Actions (N, A) on the agent's device, drawn from the policy or its means, for observations (N, ...)."""
        with layers_in(self.settings.precision, self.device):
            mu, pi, _, _ = self.actor(self.to_network_input(obs), compute_pi=sample, compute_log_pi=False)
        return pi if sample else mu

    @torch.no_grad()
    def reconstruct(self, obs: np.ndarray) -> np.ndarray:
        """The decoder's image (N, C, H, W) of observations (N, C, H, W), both uint8 pixels.

        Raises RuntimeError if there is no decoder.
        """
        if self.decoder is None:
            raise RuntimeError("there is no decoder: this agent was made with decoder_type identity")
        with layers_in(self.settings.precision, self.device):
            image = self.decoder(self.critic.encoder(self.to_network_input(torch.from_numpy(obs))))
        return ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def due(self, step: int) -> Due:
        """What the update of decision `step` trains."""
        return Due(
            actor=step % self.settings.actor_update_freq == 0,
            target=step % self.settings.critic_target_update_freq == 0,
            decoder=self.decoder is not None and step % self.settings.decoder_update_freq == 0,
        )

    def update_networks(
        self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, not_done: Tensor, due: Due
    ) -> Metrics:
        """The updates that are due, in the method's order, from tensors in the networks' dtype."""
        metrics = {"train/batch_reward": reward.mean()}
        metrics |= self.update_critic(obs, action, reward, next_obs, not_done)
        if due.actor or due.decoder:
            # After the critic's update, one pass of the convolutions serves actor loss and decoder loss.
            with torch.set_grad_enabled(due.decoder):
                hidden = self.critic.encoder.forward_conv(obs)
        if due.actor:
            metrics |= self.update_actor_and_alpha(hidden)
        if due.target:
            self.update_target()
        if due.decoder:
            metrics |= self.update_decoder(obs, hidden)
        return metrics

    def critic_loss(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, not_done: Tensor) -> Tensor:
        """Soft Bellman residual (paper, equation 2)."""
        with torch.no_grad():
            _, next_action, next_log_pi, _ = self.actor(next_obs)
            target_v = torch.min(*self.critic_target(next_obs, next_action)) - self.alpha * next_log_pi
            target_q = reward + not_done * self.settings.discount * target_v
        q1, q2 = self.critic(obs, action)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)

    def actor_loss(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Policy loss (paper, equation 3), log probability (B, 1) of its actions, and entropy before tanh."""
        # The actor's loss does not train the convolutions (paper, section 5.2).
        _, pi, log_pi, log_std = self.actor(obs, detach_encoder=True)
        q = torch.min(*self.critic(obs, pi, detach_encoder=True))
        loss = (self.alpha.detach() * log_pi - q).mean()
        entropy = 0.5 * log_std.shape[1] * (1 + math.log(2 * math.pi)) + log_std.detach().sum(dim=-1).mean()
        return loss, log_pi.detach(), entropy

    def alpha_loss(self, log_pi: Tensor) -> Tensor:
        """Temperature loss (SAC, arXiv 1812.05905, equation 18)."""
        return (self.alpha * (-log_pi - self.target_entropy)).mean()

    def decoder_loss(self, obs: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruction loss with penalised features (paper, equation 4).

        `hidden` is the output of the critic's convolutions for obs, or obs itself. The penalty of the decoder's
        weights, lambda_theta, is the weight decay of `decoder_optimizer`. Raises RuntimeError if there is no decoder.
        """
        if self.decoder is None:
            raise RuntimeError("there is no decoder to train: this agent was made with decoder_type identity")
        feature = self.critic.encoder(hidden)
        latent_loss = 0.5 * feature.pow(2).sum(1).mean()
        reconstruction_loss = F.mse_loss(self.decoder(feature), preprocess_obs(obs))
        return reconstruction_loss + self.settings.decoder_latent_lambda * latent_loss

    def update_critic(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, not_done: Tensor) -> Metrics:
        """Trains the critic with its encoder: obs, next_obs (B, ...), action (B, A), reward, not_done (B, 1)."""
        loss = self.critic_loss(obs, action, reward, next_obs, not_done)
        return {"train_critic/loss": self.minimise(loss, self.critic_optimizer)}

    def update_actor_and_alpha(self, obs: Tensor) -> Metrics:
        """Trains policy and temperature: obs (B, ...), or the output of the critic's convolutions for them."""
        loss, log_pi, entropy = self.actor_loss(obs)
        alpha = self.alpha.detach()
        return {
            # The policy loss passes through the critic, but does not train it.
            "train_actor/loss": self.minimise(loss, self.actor_optimizer, inputs=self.actor_parameters),
            "train_actor/entropy": entropy,
            "train_alpha/loss": self.minimise(self.alpha_loss(log_pi), self.log_alpha_optimizer),
            "train_alpha/value": alpha,
        }

    def update_target(self) -> None:
        """Moves the target critic towards the critic, its encoder faster than its Q functions."""
        critic, target, s = self.critic, self.critic_target, self.settings
        soft_update_params(critic.Q1, target.Q1, s.critic_tau)
        soft_update_params(critic.Q2, target.Q2, s.critic_tau)
        soft_update_params(critic.encoder, target.encoder, s.encoder_tau)

    def update_decoder(self, obs: Tensor, hidden: Tensor | None = None) -> Metrics:
        """Trains the critic's whole encoder and the decoder; hidden are the convolutions' output, if it is known."""
        loss = self.decoder_loss(obs, obs if hidden is None else hidden)
        return {"train_ae/ae_loss": self.minimise(loss, self.encoder_optimizer, self.decoder_optimizer)}
