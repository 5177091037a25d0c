"""SAC+AE: soft actor-critic on the features of a regularised autoencoder (Yarats et al., arXiv 1910.01741).

Shapes: B batch, C H W channels, height and width of the stacked frames, A action dimension, D feature dimension.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder import make_decoder
from encoder import make_encoder
from files import write_tensors
from utils import preprocess_obs, soft_update_params

Metrics = dict[str, Tensor]


class TransitionSource(Protocol):
    """Whatever `SacAeAgent.update` draws its batches from."""

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """obs, action, reward, next_obs, not_done."""


class MetricLogger(Protocol):
    """Whatever `SacAeAgent.update` hands its losses to."""

    def log(self, key: str, value: Any, step: int) -> None:
        """Takes one detached value of a step."""


class Due(NamedTuple):
    """What an update trains besides the critic."""

    actor: bool  # and alpha
    target: bool
    decoder: bool


def gaussian_logprob(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log density (B, 1) of mean + noise * std under N(mean, std), from noise and log_std (B, A)."""
    log_density = -0.5 * noise.pow(2) - log_std - 0.5 * math.log(2 * math.pi)
    return log_density.sum(-1, keepdim=True)


def squash(mu: Tensor, pi: Tensor | None, log_pi: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squashes mean and sample by tanh and corrects the log density for it (SAC, arXiv 1801.01290, appendix C)."""
    mu = torch.tanh(mu)
    if pi is not None:
        pi = torch.tanh(pi)
        if log_pi is not None:
            # relu: rounding can make 1 - pi^2 negative where tanh is saturated.
            log_pi = log_pi - torch.log(torch.relu(1 - pi.pow(2)) + 1e-6).sum(-1, keepdim=True)
    return mu, pi, log_pi


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
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, out_dim),
    )


def run_mlp(layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """The MLP's output, its last layer computed in the weights' own precision under autocast, too.

    bfloat16 has eight bits: values above 128 would be rounded to whole numbers, and rewards be lost in differences.
    """
    *hidden, last = layers
    for layer in hidden:
        inputs = layer(inputs)
    if not torch.is_autocast_enabled(inputs.device.type):
        return last(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        return last(inputs.to(last.get_parameter("weight").dtype))


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether products and convolutions on a GPU may be in TF32; PyTorch's switches are put back at its end.

    From PyTorch 2.9 on those are `fp32_precision`, which must not be mixed with `allow_tf32`. One that follows the
    switch above it is not touched, so that it goes on to follow.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    new = hasattr(cudnn, "fp32_precision")
    name = "fp32_precision" if new else "allow_tf32"
    value: Any = ("tf32" if allowed else "ieee") if new else allowed
    before = []
    try:
        for switch in (cudnn, matmul, *([cudnn.conv] if new else [])):
            if getattr(switch, name) != value:
                before.append((switch, getattr(switch, name)))
                setattr(switch, name, value)
        yield
    finally:
        for switch, was in reversed(before):
            inherited = new and switch is cudnn and was == backends.fp32_precision
            setattr(switch, name, "none" if inherited else was)


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
        self.log_std_min = log_std_min
        self.log_std_max = log_std_max
        self.trunk = mlp(self.encoder.feature_dim, hidden_dim, 2 * action_shape[0])
        self.apply(weight_init)

    def forward(
        self, obs: Tensor, compute_pi: bool = True, compute_log_pi: bool = True, detach_encoder: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Mean action, sampled action, its log probability (B, 1), and log std; actions (B, A) in [-1, 1].

        The sample and its log probability are None where they were not asked for. A sample draws its noise from one
        `torch.randn_like` of shape (B, A).
        """
        return self.policy(self.encoder(obs, detach=detach_encoder), compute_pi, compute_log_pi)

    def policy(
        self, feature: Tensor, compute_pi: bool = True, compute_log_pi: bool = True
    ) -> tuple[Tensor, Any, Any, Tensor]:
        """What `forward` returns, from features (B, D)."""
        mu, raw_log_std = run_mlp(self.trunk, feature).chunk(2, dim=-1)
        # A smooth bound instead of a clamp: the gradient never vanishes altogether.
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (torch.tanh(raw_log_std) + 1)
        pi = log_pi = None
        if compute_pi:
            noise = torch.randn_like(mu)
            pi = mu + noise * log_std.exp()
            if compute_log_pi:
                log_pi = gaussian_logprob(noise, log_std)
        mu, pi, log_pi = squash(mu, pi, log_pi)
        return mu, pi, log_pi, log_std


class QFunction(nn.Module):
    """Value of an action, from features and action joined."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.trunk = mlp(obs_dim + action_dim, hidden_dim, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Features (B, D) and actions (B, A) to values (B, 1)."""
        return run_mlp(self.trunk, torch.cat([obs, action], dim=1))


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
        return self.values(self.encoder(obs, detach=detach_encoder), action)

    def values(self, feature: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns, from features (B, D)."""
        return self.Q1(feature, action), self.Q2(feature, action)


class SacAeAgent:
    """Networks, losses and optimisers of SAC+AE.

    With `decoder_type="identity"` there is no decoder (the paper's SAC:pixel); with `encoder_type="identity"` too
    observations are state vectors (SAC:state). Frequencies count decisions, not environment steps.

    With `precision="bf16"` layers compute in bfloat16 (autocast); weights, optimisers, LayerNorm, densities, targets
    and losses stay in float32. `fp32` and `tf32` are PyTorch's ways to compute products and convolutions on a GPU; None
    leaves that as it is, which by default means TF32 in convolutions only. With `compile` the losses go through
    torch.compile, which takes a minute at their first use and rounds otherwise; the noise stays the same.

    Raises:
        ValueError: types or sizes that do not fit together, or an unknown precision.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...],
        action_shape: tuple[int, ...],
        device: torch.device | str,
        hidden_dim: int = 1024,
        discount: float = 0.99,
        init_temperature: float = 0.1,
        alpha_lr: float = 1e-4,
        alpha_beta: float = 0.5,
        actor_lr: float = 1e-3,
        actor_beta: float = 0.9,
        actor_log_std_min: float = -10,
        actor_log_std_max: float = 2,
        actor_update_freq: int = 2,
        critic_lr: float = 1e-3,
        critic_beta: float = 0.9,
        critic_tau: float = 0.01,
        critic_target_update_freq: int = 2,
        encoder_type: str = "pixel",
        encoder_feature_dim: int = 50,
        encoder_lr: float = 1e-3,
        encoder_tau: float = 0.05,
        decoder_type: str = "pixel",
        decoder_lr: float = 1e-3,
        decoder_update_freq: int = 1,
        decoder_latent_lambda: float = 1e-6,
        decoder_weight_lambda: float = 1e-7,
        num_layers: int = 4,
        num_filters: int = 32,
        precision: str | None = None,
        compile: bool = False,
    ):
        if precision not in (None, "fp32", "tf32", "bf16"):
            raise ValueError(f"unknown precision {precision!r}: choose fp32, tf32 or bf16")
        self.precision = precision
        self.device = torch.device(device)
        self.discount = discount
        self.actor_update_freq = actor_update_freq
        self.critic_tau = critic_tau
        self.critic_target_update_freq = critic_target_update_freq
        self.encoder_tau = encoder_tau
        self.decoder_update_freq = decoder_update_freq
        self.decoder_latent_lambda = decoder_latent_lambda
        self.target_entropy = -math.prod(action_shape)

        encoder_args = (encoder_type, encoder_feature_dim)
        conv_args = (num_layers, num_filters)
        limits = (actor_log_std_min, actor_log_std_max)
        self.actor = Actor(obs_shape, action_shape, hidden_dim, *encoder_args, *limits, *conv_args).to(self.device)
        self.critic = Critic(obs_shape, action_shape, hidden_dim, *encoder_args, *conv_args).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        # The actor sees the critic's convolutions; its losses do not train them (paper, section 5.2).
        self.actor.encoder.copy_conv_weights_from(self.critic.encoder)
        self.decoder = make_decoder(decoder_type, obs_shape, encoder_feature_dim, *conv_args)
        if self.device.type == "cpu":
            # Another layout in memory, in which the convolutions' backward passes are a fifth faster there.
            # https://pytorch.org/tutorials/intermediate/memory_format_tutorial.html
            for network in self.networks.values():
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        # float64 whatever the networks are: one number, stepped a million times by 1e-4 and less.
        self.log_alpha = torch.tensor(math.log(init_temperature), dtype=torch.float64, device=self.device)
        self.log_alpha.requires_grad_()

        def adam(params: Iterable[Tensor], lr: float, beta: float, weight_decay: float = 0) -> torch.optim.Adam:
            # Capturable: as CUDA graphs want it. Nothing else changes, a fused Adam counts its steps on the GPU anyway.
            capturable = self.device.type == "cuda"
            return torch.optim.Adam(
                params, lr, (beta, 0.999), weight_decay=weight_decay, fused=True, capturable=capturable
            )

        shared = {id(parameter) for parameter in self.critic.parameters()}
        self.actor_parameters = [parameter for parameter in self.actor.parameters() if id(parameter) not in shared]
        self.actor_optimizer = adam(self.actor_parameters, actor_lr, actor_beta)
        self.critic_optimizer = adam(self.critic.parameters(), critic_lr, critic_beta)
        self.log_alpha_optimizer = adam([self.log_alpha], alpha_lr, alpha_beta)
        if self.decoder is not None:
            self.decoder.to(self.device).apply(weight_init)
            self.encoder_optimizer = adam(self.critic.encoder.parameters(), encoder_lr, 0.9)
            self.decoder_optimizer = adam(self.decoder.parameters(), decoder_lr, 0.9, decoder_weight_lambda)
        if compile:
            for name in ("critic_loss", "actor_loss", "decoder_loss"):
                setattr(self, name, torch.compile(getattr(self, name), options={"fallback_random": True}))
        self.train()

    def train(self, training: bool = True) -> None:
        """Sets training or evaluation mode of every network but the target, which never trains."""
        self.training = training
        for name, network in self.networks.items():
            network.train(training and name != "critic_target")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Actor, critic, target critic and, if there is one, decoder, by name."""
        names = ("actor", "critic", "critic_target", "decoder")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def optimizers(self) -> dict[str, torch.optim.Adam]:
        """The three to five Adams, by name."""
        names = ("critic", "actor", "log_alpha", "encoder", "decoder")
        found = {name: getattr(self, f"{name}_optimizer", None) for name in names}
        return {name: optimizer for name, optimizer in found.items() if optimizer is not None}

    @property
    def alpha(self) -> Tensor:
        """Temperature, a float64 scalar with gradient to `log_alpha`."""
        return self.log_alpha.exp()

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return next(self.critic.parameters()).dtype

    def select_action(self, obs: np.ndarray) -> np.ndarray:
        """The policy's mean action (A,) for one observation: evaluation."""
        return self._act(obs[None], sample=False)[0]

    def select_actions(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        return self._act(obs, sample=False)

    def sample_action(self, obs: np.ndarray) -> np.ndarray:
        """An action (A,) drawn from the policy for one observation: training."""
        return self._act(obs[None], sample=True)[0]

    @contextmanager
    def layer_precision(self) -> Iterator[None]:
        """Within it, layers compute in the agent's precision; PyTorch's switches are put back at its end."""
        if self.precision is None:
            yield
        elif self.precision == "bf16":
            # Without autocast's cache of cast weights: an update steps weights and then uses them again.
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                yield
        else:
            with _tf32(self.precision == "tf32"):
                yield

    def _act(self, obs: np.ndarray, sample: bool) -> np.ndarray:
        return self._actions(torch.from_numpy(obs), sample).cpu().numpy()

    @torch.no_grad()
    def _actions(self, obs: Tensor, sample: bool) -> Tensor:
        """Actions (N, A) on the agent's device, drawn from the policy or its means, for observations (N, ...)."""
        with self.layer_precision():
            mu, pi, _, _ = self.actor(self._floating(obs), compute_pi=sample, compute_log_pi=False)
        return pi if sample else mu

    def _floating(self, tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 and self.device.type == "cpu" else torch.preserve_format
        return tensor.to(self.device, self.dtype, memory_format=layout)

    @torch.no_grad()
    def reconstruct(self, obs: np.ndarray) -> np.ndarray:
        """The decoder's image (N, C, H, W) of observations (N, C, H, W), both uint8 pixels."""
        if self.decoder is None:
            raise RuntimeError("there is no decoder: this agent was made with decoder_type identity")
        with self.layer_precision():
            image = self.decoder(self.critic.encoder(self._floating(torch.from_numpy(obs))))
        return ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def update(self, replay_buffer: TransitionSource, L: MetricLogger, step: int) -> Metrics:  # noqa: N803
        """One update of everything that is due at decision `step`, on one batch.

        Args:
            replay_buffer: gives obs (uint8 or floating, 0..255 for pixels), action, reward, next_obs, not_done.
            L: gets each of the returned metrics.
            step: number of the decision, which selects what is due.

        Returns:
            Detached scalars on the agent's device, under the names they are logged with.
        """
        metrics = self._update_from(replay_buffer, self.due(step))
        for key, value in metrics.items():
            L.log(key, value, step)
        return metrics

    def due(self, step: int) -> Due:
        """What the update of decision `step` trains."""
        return Due(
            actor=step % self.actor_update_freq == 0,
            target=step % self.critic_target_update_freq == 0,
            decoder=self.decoder is not None and step % self.decoder_update_freq == 0,
        )

    def _update_from(self, replay_buffer: TransitionSource, due: Due) -> Metrics:
        return self._update(replay_buffer.sample(), due)

    def _update(self, batch: Iterable[Tensor], due: Due) -> Metrics:
        obs, action, reward, next_obs, not_done = (self._floating(field) for field in batch)
        metrics = {"train/batch_reward": reward.mean()}
        with self.layer_precision():
            metrics |= self.update_critic(obs, action, reward, next_obs, not_done)
            if due.actor or due.decoder:
                # With the critic's new weights, once for the actor, for its critic and for the decoder.
                with torch.set_grad_enabled(due.decoder):
                    hidden = self.critic.encoder.forward_conv(obs)
            if due.actor:
                metrics |= self.update_actor_and_alpha(obs, hidden)
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
            target_q = reward + not_done * self.discount * target_v
        q1, q2 = self.critic(obs, action)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)

    def actor_loss(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Policy loss (paper, equation 3), and of its actions the log probability (B, 1) and mean entropy.

        hidden is what the critic's convolutions make of the observations; no gradient reaches it. The entropy is that
        of the Gaussian before tanh.
        """
        _, pi, log_pi, log_std = self.actor.policy(self.actor.encoder.forward_head(hidden, detach=True))
        q = torch.min(*self.critic.values(self.critic.encoder.forward_head(hidden, detach=True), pi))
        loss = (self.alpha.detach() * log_pi - q).mean()
        entropy = 0.5 * log_std.shape[1] * (1 + math.log(2 * math.pi)) + log_std.detach().sum(dim=-1).mean()
        return loss, log_pi.detach(), entropy

    def alpha_loss(self, log_pi: Tensor) -> Tensor:
        """Temperature loss (SAC, arXiv 1812.05905, equation 18)."""
        return (self.alpha * (-log_pi - self.target_entropy)).mean()

    def decoder_loss(self, obs: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruction loss with penalised features (paper, equation 4).

        hidden is what the critic's convolutions make of obs, with gradient.
        """
        if self.decoder is None:
            raise RuntimeError("there is no decoder to train: this agent was made with decoder_type identity")
        feature = self.critic.encoder.forward_head(hidden)
        latent_loss = 0.5 * feature.pow(2).sum(1).mean()
        reconstruction_loss = F.mse_loss(self.decoder(feature), preprocess_obs(obs))
        return reconstruction_loss + self.decoder_latent_lambda * latent_loss

    def update_critic(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, not_done: Tensor) -> Metrics:
        """Trains the critic, its encoder included.

        Tensors in the networks' dtype: obs and next_obs (B, ...), action (B, A), reward and not_done (B, 1).
        """
        loss = self.critic_loss(obs, action, reward, next_obs, not_done)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return {"train_critic/loss": loss.detach()}

    def update_actor_and_alpha(self, obs: Tensor, hidden: Tensor | None = None) -> Metrics:
        """Trains the policy, but not the convolutions, and the temperature.

        obs (B, ...) in the networks' dtype; hidden is what the critic's convolutions make of it, if known already.
        """
        hidden = self.critic.encoder.forward_conv(obs) if hidden is None else hidden
        loss, log_pi, entropy = self.actor_loss(hidden)
        self.actor_optimizer.zero_grad()
        loss.backward(inputs=self.actor_parameters)  # and not the critic's, through which it passes
        self.actor_optimizer.step()

        alpha = self.alpha.detach()
        alpha_loss = self.alpha_loss(log_pi)
        self.log_alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.log_alpha_optimizer.step()

        return {
            "train_actor/loss": loss.detach(),
            "train_actor/entropy": entropy,
            "train_alpha/loss": alpha_loss.detach(),
            "train_alpha/value": alpha,
        }

    def update_target(self) -> None:
        """Moves the target critic towards the critic, its encoder faster than its Q functions."""
        q_functions, target_q_functions = (
            nn.ModuleList([critic.Q1, critic.Q2]) for critic in (self.critic, self.critic_target)
        )
        soft_update_params(q_functions, target_q_functions, self.critic_tau)
        soft_update_params(self.critic.encoder, self.critic_target.encoder, self.encoder_tau)

    def update_decoder(self, obs: Tensor, hidden: Tensor | None = None) -> Metrics:
        """Trains the critic's whole encoder and the decoder; arguments as for `update_actor_and_alpha`."""
        hidden = self.critic.encoder.forward_conv(obs) if hidden is None else hidden
        loss = self.decoder_loss(obs, hidden)
        self.encoder_optimizer.zero_grad()
        self.decoder_optimizer.zero_grad()
        loss.backward()
        self.encoder_optimizer.step()
        self.decoder_optimizer.step()
        return {"train_ae/ae_loss": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that updates change: networks, target, log alpha and the optimisers' moments."""
        return copy.deepcopy(
            {
                "networks": {name: network.state_dict() for name, network in self.networks.items()},
                "log_alpha": self.log_alpha.detach(),
                "optimizers": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what `state_dict` gave; settings, such as learning rates, stay this agent's.

        Raises:
            ValueError: it is that of an agent of other networks; this one is as it was.
        """
        mine = self.state_dict()
        _check_alike({"networks": state["networks"]}, {"networks": mine["networks"]})
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for name, optimizer in self.optimizers.items():
            settings = optimizer.state_dict()["param_groups"]
            moments_of = copy.deepcopy(state["optimizers"][name])  # PyTorch's optimisers would share them
            optimizer.load_state_dict({"state": moments_of, "param_groups": settings})
            for parameter, moments in optimizer.state.items():
                for key, value in moments.items():
                    if value.shape == parameter.shape and key != "step":  # in the parameter's layout in memory
                        moments[key] = torch.empty_like(parameter).copy_(value)

    def save(self, model_dir: str | Path, step: int) -> None:
        """Writes `NAME_STEP.pt` for actor, critic, decoder and, as `target`, the target critic with log alpha."""
        for name, state in self._states().items():
            write_tensors(Path(model_dir) / f"{name}_{step}.pt", state)

    def _states(self) -> dict[str, dict[str, Any]]:
        states: dict[str, dict[str, Any]] = {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target": {"critic_target": self.critic_target.state_dict(), "log_alpha": self.log_alpha.detach()},
        }
        if self.decoder is not None:
            states["decoder"] = self.decoder.state_dict()
        return states

    def load(self, model_dir: str | Path, step: int) -> None:
        """Loads what `save` or the authors' script wrote; without `target_STEP.pt` the target is the critic's copy.

        Nothing that a file contains is executed. If it raises, the agent is as it was.

        Raises:
            ValueError: a network's file is missing, damaged, foreign, or of another network than this agent's; the
                message is a line that names it.
        """
        paths = {name: Path(model_dir) / f"{name}_{step}.pt" for name in self._states()}
        if not os.path.lexists(paths["target"]):
            del paths["target"]
        states = {name: _read_state(path, self._states()[name], self.device) for name, path in paths.items()}
        target = states.pop("target", {"critic_target": states["critic"]})
        for name, state in states.items():
            getattr(self, name).load_state_dict(state)
        self.critic_target.load_state_dict(target["critic_target"])
        if "log_alpha" in target:
            with torch.no_grad():
                self.log_alpha.copy_(target["log_alpha"])


def _read_state(path: Path, like: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the file holds: tensors of the names and shapes of `like`; else ValueError, a line that names the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        raise ValueError(f"{path} is damaged, or holds something else than a network's weights") from error
    try:
        _check_alike(state, like)
    except ValueError as error:
        raise ValueError(f"{path} is not of this network: {error}") from None
    return state


def _check_alike(state: Any, like: Any, name: str = "it") -> None:
    """Raises ValueError unless both are tensors of one shape, or dictionaries of such under the same names."""
    if isinstance(like, Mapping):
        if not isinstance(state, Mapping):
            raise ValueError(f"{name} is no dictionary of weights")
        different = sorted(map(str, state.keys() ^ like.keys()))
        if different:
            key = different[0]
            raise ValueError(
                f"{name} lacks {key}" if key in like else f"{name} has {key:.100}, which the network has not"
            )
        for key in like:
            _check_alike(state[key], like[key], key)
    elif not isinstance(state, Tensor) or not state.is_floating_point() or state.layout != torch.strided:
        raise ValueError(f"{name} is no tensor of floating numbers")
    elif state.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}, the network's has {tuple(like.shape)}")
