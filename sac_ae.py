"""SAC+AE: soft actor-critic on the features of a regularised autoencoder (Yarats et al., arXiv 1910.01741).

Shapes: B batch, C H W channels, height and width of the stacked frames, A action dimension, D feature dimension.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils._pytree import tree_leaves

from decoder import make_decoder
from encoder import make_encoder
from errors import UserError
from files import loading, write_tensors
from replay_buffer import Batch, send
from utils import preprocess_obs, soft_update_params

Metrics = dict[str, Tensor]
Kind = Literal["pixel", "identity"]
Precision = Literal["fp32", "tf32", "bf16"]


class Limits(NamedTuple):
    """A range of numbers, from `low` to `high`; without `low` itself if `exclusive`."""

    low: float = -math.inf
    high: float = math.inf
    exclusive: bool = False


Count = Annotated[int, Limits(1)]
Positive = Annotated[float, Limits(0, exclusive=True)]  # a learning rate, a temperature
Beta = Annotated[float, Limits(0, 0.9999999)]  # of Adam: below 1
Fraction = Annotated[float, Limits(0, 1)]
NonNegative = Annotated[float, Limits(0)]


def setting(default: Any, text: str) -> Any:
    """A field of a dataclass of settings: its default, and the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keywords of `SacAeAgent`, which are also flags of train.py. Defaults are those of the authors' script."""

    hidden_dim: Count = setting(1024, "units of the hidden layers of actor and critic")
    discount: Fraction = setting(0.99, "discount per decision")
    init_temperature: Positive = setting(0.1, "alpha at the start")
    alpha_lr: Positive = setting(1e-4, "learning rate of log alpha")
    alpha_beta: Beta = setting(0.5, "Adam's beta1 for log alpha")
    actor_lr: Positive = setting(1e-3, "learning rate of the actor")
    actor_beta: Beta = setting(0.9, "Adam's beta1 for the actor")
    actor_log_std_min: float = setting(-10, "lower bound of log std")
    actor_log_std_max: float = setting(2, "upper bound of log std")
    actor_update_freq: Count = setting(2, "actor and alpha train at decisions that are multiples of this")
    critic_lr: Positive = setting(1e-3, "learning rate of the critic")
    critic_beta: Beta = setting(0.9, "Adam's beta1 for the critic")
    critic_tau: Fraction = setting(0.01, "tau of the target's Q functions (soft update)")
    critic_target_update_freq: Count = setting(2, "the target moves at decisions that are multiples of this")
    encoder_type: Kind = setting("pixel", "identity: observations are states")
    encoder_feature_dim: Count = setting(50, "length of the feature vector")
    encoder_lr: Positive = setting(1e-3, "learning rate of the encoder under the decoder's loss")
    encoder_tau: Fraction = setting(0.05, "tau of the target's encoder (soft update)")
    decoder_type: Kind = setting("pixel", "identity: no decoder")
    decoder_lr: Positive = setting(1e-3, "learning rate of the decoder")
    decoder_update_freq: Count = setting(1, "the decoder's loss trains at decisions that are multiples of this")
    decoder_latent_lambda: NonNegative = setting(1e-6, "weight of the features' L2 penalty")
    decoder_weight_lambda: NonNegative = setting(1e-7, "weight decay of the decoder")
    num_layers: Count = setting(4, "convolutions of the encoder, and of the decoder")
    num_filters: Count = setting(32, "channels of a convolution")
    critic_trains_encoder: bool = setting(True, "let the critic's loss train the encoder")
    actor_trains_encoder: bool = setting(False, "let the actor's loss train what it shares with the critic")
    freeze_encoder: bool = setting(False, "let no loss train the critic's encoder; nor does the decoder train")
    precision: Precision | None = setting(None, "precision of layers; without it fp32, but tf32 in GPU convolutions")
    compile: bool = setting(False, "compile the losses by torch.compile, which takes a minute at first")

    def __post_init__(self) -> None:
        if self.precision not in (None, *get_args(Precision)):
            raise UserError(f"unknown precision {self.precision!r}: choose one of {', '.join(get_args(Precision))}")
        if self.actor_log_std_min >= self.actor_log_std_max:
            raise UserError("actor_log_std_min must be below actor_log_std_max")
        if self.freeze_encoder and self.actor_trains_encoder:
            raise UserError("freeze_encoder and actor_trains_encoder exclude each other: leave one of them out")
        changed = self.freeze_encoder or self.actor_trains_encoder or not self.critic_trains_encoder
        if changed and self.encoder_type == "identity":
            raise UserError(
                "states have no encoder: leave freeze_encoder, actor_trains_encoder and critic_trains_encoder out"
            )


def set_precision(precision: Precision | None) -> None:
    """Sets how a GPU computes products and convolutions in float32, for the whole process.

    None and bf16 set PyTorch's defaults: products in full float32, convolutions in TF32.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = {"fp32": "ieee", "tf32": "tf32"}.get(precision or "", "none")
    backends.cudnn.conv.fp32_precision = "ieee" if precision == "fp32" else "tf32"


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


class ExactLinear(nn.Linear):
    """A linear layer that computes in its weights' own precision even under autocast: the last of actor and critic.

    bfloat16 has 8 significant bits: it would round Q values above 128 to integers, and so lose small rewards, and the
    policy's mean and log std to three digits.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not torch.is_autocast_enabled(inputs.device.type):
            return super().forward(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.to(self.weight.dtype))


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    hidden = [nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
    return nn.Sequential(*hidden, ExactLinear(hidden_dim, out_dim))


class Actor(nn.Module):
    """Policy: encoder, then an MLP to mean and log std of a tanh-squashed Gaussian."""

    def __init__(self, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], s: Settings):
        super().__init__()
        self.encoder = make_encoder(s.encoder_type, obs_shape, s.encoder_feature_dim, s.num_layers, s.num_filters)
        self.log_std_min, self.log_std_max = s.actor_log_std_min, s.actor_log_std_max
        self.trunk = mlp(self.encoder.feature_dim, s.hidden_dim, 2 * action_shape[0])
        self.apply(weight_init)

    def forward(
        self, obs: Tensor, compute_pi: bool = True, compute_log_pi: bool = True
    ) -> tuple[Tensor, Any, Any, Tensor]:
        """The policy for observations; see `policy`."""
        return self.policy(self.encoder(obs), compute_pi, compute_log_pi)

    def policy(
        self, feature: Tensor, compute_pi: bool = True, compute_log_pi: bool = True
    ) -> tuple[Tensor, Any, Any, Tensor]:
        """Mean action, sampled action, its log probability (B, 1), and log std, of features (B, D).

        Actions (B, A) are in [-1, 1]. Sample and log probability are None unless asked for. The noise of a sample is
        one `torch.randn_like` of shape (B, A).
        """
        mu, raw_log_std = self.trunk(feature).chunk(2, dim=-1)
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

    def __init__(self, obs_shape: tuple[int, ...], action_shape: tuple[int, ...], s: Settings):
        super().__init__()
        self.encoder = make_encoder(s.encoder_type, obs_shape, s.encoder_feature_dim, s.num_layers, s.num_filters)
        self.Q1 = QFunction(self.encoder.feature_dim, action_shape[0], s.hidden_dim)
        self.Q2 = QFunction(self.encoder.feature_dim, action_shape[0], s.hidden_dim)
        self.apply(weight_init)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both values, (B, 1) each, of observations and actions (B, A)."""
        return self.values(self.encoder(obs), action)

    def values(self, feature: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both values, (B, 1) each, of features (B, D) and actions (B, A)."""
        return self.Q1(feature, action), self.Q2(feature, action)


class SacAeAgent(nn.Module):
    """Networks, losses and optimisers of SAC+AE.

    With `decoder_type="identity"` there is no decoder (the paper's SAC:pixel). With `encoder_type="identity"` too,
    observations are state vectors (SAC:state). A subclass may add networks, `nn.Parameter`s and optimisers as
    attributes: `state_dict`, and so a checkpoint, holds all of these; saved models and histograms hold the networks.

    With precision bf16, layers compute in bfloat16; weights, optimisers, LayerNorm, densities, targets and losses stay
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
        super().__init__()
        self.settings = s = self.settings_class(**settings)
        self.device = torch.device(device)
        self.target_entropy = -math.prod(action_shape)  # as in SAC: minus the number of action dimensions
        set_precision(s.precision)

        self.actor = Actor(obs_shape, action_shape, s)
        self.critic = Critic(obs_shape, action_shape, s)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor.encoder.copy_conv_weights_from(self.critic.encoder)  # actor and critic share the convolutions
        if s.freeze_encoder:
            self.critic.encoder.requires_grad_(False)
        self.decoder = make_decoder(s.decoder_type, obs_shape, s.encoder_feature_dim, s.num_layers, s.num_filters)
        if self.decoder is not None:
            self.decoder.apply(weight_init)
        # Always float64: float32 would round the many small updates of this one number.
        log_alpha = torch.tensor(math.log(s.init_temperature), dtype=torch.float64, device=self.device)
        self.log_alpha = nn.Parameter(log_alpha)
        # docs/performance.md says what this layout in memory gives on which CPU.
        # https://pytorch.org/tutorials/intermediate/memory_format_tutorial.html
        self.layout = torch.channels_last if self.device.type == "cpu" else torch.preserve_format
        self.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]

        self.critic_optimizer = self.adam(self.critic.parameters(), s.critic_lr, s.critic_beta)
        # The actor's convolutions are the critic's: `actor_loss` decides whether they get a gradient.
        self.actor_optimizer = self.adam(self.actor.parameters(), s.actor_lr, s.actor_beta)
        self.log_alpha_optimizer = self.adam([self.log_alpha], s.alpha_lr, s.alpha_beta)
        if self.decoder is not None:
            self.encoder_optimizer = self.adam(self.critic.encoder.parameters(), s.encoder_lr)
            self.decoder_optimizer = self.adam(self.decoder.parameters(), s.decoder_lr, 0.9, s.decoder_weight_lambda)
        if s.compile:
            for name in [name for name in dir(self) if name.endswith("_loss")]:
                compiled = torch.compile(getattr(type(self), name), options={"fallback_random": True})
                setattr(self, name, MethodType(compiled, self))  # bound: a deep copy of the agent has its own
        self.train()

    def adam(self, params: Iterable[Tensor], lr: float, beta1: float = 0.9, weight_decay: float = 0) -> Adam:
        """A fused Adam: one kernel updates all parameters, and a CUDA graph can hold it."""
        on_gpu = self.device.type == "cuda"
        return Adam(params, lr, (beta1, 0.999), weight_decay=weight_decay, fused=True, capturable=on_gpu)

    # The updates, in the method's order

    def update(self, replay_buffer: Any, L: Any, step: int) -> Metrics:  # noqa: N803
        """Trains on one batch: the critic, and what is due at decision `step`.

        Args:
            replay_buffer: its `sample()` gives the fields of a `Batch`, pixels of any dtype from 0 to 255.
            L: its `log(key, value, step)` gets each of the returned metrics.

        Returns detached scalars on the agent's device, under the names they are logged with.
        """
        metrics = self.update_from(replay_buffer.sample(), self.due(step))
        for key, value in metrics.items():
            L.log(key, value, step)
        return metrics

    def due(self, step: int) -> Due:
        """What the update of decision `step` trains."""
        s = self.settings
        return Due(
            actor=step % s.actor_update_freq == 0,
            target=step % s.critic_target_update_freq == 0,
            decoder=self.decoder is not None and not s.freeze_encoder and step % s.decoder_update_freq == 0,
        )

    def update_from(self, batch: Iterable[Tensor], due: Due) -> Metrics:
        """Brings the fields of a `Batch` into the networks' dtype and layout, and updates the networks with it.

        With CUDA graphs, `support/cuda_graph.py` replaces this method.
        """
        with self.layers_in_bf16():
            return self.update_networks(Batch(*map(self.to_network_input, batch)), due)

    def update_networks(self, batch: Batch, due: Due) -> Metrics:
        """An update in the method's order: critic; actor and alpha; target; decoder. A subclass may extend it.

        The batch has the networks' dtype.
        """
        metrics = {"train/batch_reward": batch.reward.mean()}
        metrics |= self.update_critic(batch)
        if due.actor or due.decoder:
            # After the critic's update, one pass of the convolutions serves actor loss and decoder loss.
            hidden = self.critic.encoder.forward_conv(batch.obs)
        if due.actor:
            metrics |= self.update_actor_and_alpha(hidden)
        if due.target:
            self.update_target()
        if due.decoder:
            if due.actor and self.settings.actor_trains_encoder:
                hidden = self.critic.encoder.forward_conv(batch.obs)  # the actor has changed the convolutions
            metrics |= self.update_decoder(batch.obs, hidden)
        return metrics

    def update_critic(self, batch: Batch) -> Metrics:
        """Trains the Q functions and, unless told otherwise, the encoder."""
        return {"train_critic/loss": self.minimise(self.critic_loss(batch), self.critic_optimizer)}

    def critic_loss(self, batch: Batch) -> Tensor:
        """Soft Bellman residual (paper, equation 2)."""
        with torch.no_grad():
            _, next_action, next_log_pi, _ = self.actor(batch.next_obs)
            target_v = torch.min(*self.critic_target(batch.next_obs, next_action)) - self.alpha * next_log_pi
            target_q = batch.reward + batch.not_done * self.settings.discount * target_v
        feature = self.critic.encoder(batch.obs)
        if not self.settings.critic_trains_encoder:
            feature = feature.detach()
        q1, q2 = self.critic.values(feature, batch.action)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)

    def update_actor_and_alpha(self, hidden: Tensor) -> Metrics:
        """Trains policy, temperature and, if told so, the convolutions, whose output for observations is `hidden`."""
        loss, log_pi, entropy = self.actor_loss(hidden)
        alpha = self.alpha.detach()  # which both losses use, before its update
        metrics = {"train_actor/loss": self.minimise(loss, self.actor_optimizer), "train_actor/entropy": entropy}
        alpha_loss = self.minimise(self.alpha_loss(log_pi), self.log_alpha_optimizer)
        return metrics | {"train_alpha/loss": alpha_loss, "train_alpha/value": alpha}

    def actor_loss(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Policy loss (paper, equation 3), log probability (B, 1) of its actions, and entropy before tanh.

        `hidden` is the output of the convolutions, which actor and critic share. The paper's KL divergence is this loss
        divided by alpha, up to a constant.
        """
        if not self.settings.actor_trains_encoder:
            hidden = hidden.detach()  # the loss does not train the convolutions (paper, section 5.2)
        _, pi, log_pi, log_std = self.actor.policy(self.actor.encoder.forward_head(hidden))
        q = torch.min(*self.critic.values(self.critic.encoder.forward_head(hidden), pi))
        loss = (self.alpha.detach() * log_pi - q).mean()
        entropy = 0.5 * log_std.shape[1] * (1 + math.log(2 * math.pi)) + log_std.detach().sum(dim=-1).mean()
        return loss, log_pi.detach(), entropy

    def alpha_loss(self, log_pi: Tensor) -> Tensor:
        """Temperature loss (SAC, arXiv 1812.05905, equation 18)."""
        return (self.alpha * (-log_pi - self.target_entropy)).mean()

    @property
    def alpha(self) -> Tensor:
        """Temperature, a float64 scalar with gradient to `log_alpha`."""
        return self.log_alpha.exp()

    def update_target(self) -> None:
        """Moves the target critic towards the critic, its encoder faster than its Q functions."""
        critic, target, s = self.critic, self.critic_target, self.settings
        soft_update_params(critic.Q1, target.Q1, s.critic_tau)
        soft_update_params(critic.Q2, target.Q2, s.critic_tau)
        soft_update_params(critic.encoder, target.encoder, s.encoder_tau)

    def update_decoder(self, obs: Tensor, hidden: Tensor) -> Metrics:
        """Trains the critic's whole encoder and the decoder; `hidden` is the convolutions' output for `obs`."""
        loss = self.decoder_loss(obs, hidden)
        return {"train_ae/ae_loss": self.minimise(loss, self.encoder_optimizer, self.decoder_optimizer)}

    def decoder_loss(self, obs: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruction loss with penalised features (paper, equation 4).

        As in the authors' code, the log-likelihood is a mean squared error over all pixels, half the squared norm of
        the features is penalised, and the penalty of the decoder's weights, lambda_theta, is the weight decay of
        `decoder_optimizer`. `hidden` is the convolutions' output for `obs`. Raises RuntimeError without a decoder.
        """
        feature = self.critic.encoder.forward_head(hidden)
        latent_loss = 0.5 * feature.pow(2).sum(1).mean()
        reconstruction_loss = F.mse_loss(self.decode(feature), preprocess_obs(obs))
        return reconstruction_loss + self.settings.decoder_latent_lambda * latent_loss

    def minimise(self, loss: Tensor, *optimizers: Optimizer) -> Tensor:
        """Lets each optimiser update its parameters once. The loss trains nothing else. Returns it detached."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        parameters = [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]
        trained = [parameter for parameter in parameters if parameter.requires_grad]  # without those that are frozen
        # Backward operations take the types of the forward ones; under autocast they would be cast once more.
        # https://docs.pytorch.org/docs/stable/amp.html#autocasting
        with torch.autocast(self.device.type, enabled=False):
            loss.backward(inputs=trained)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    # Acting

    def select_action(self, obs: np.ndarray) -> np.ndarray:
        """The policy's mean action (A,) for one observation: evaluation."""
        return self.select_actions(obs[None])[0]

    def select_actions(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        return self.actions(aligned(obs), False).cpu().numpy()

    def sample_action(self, obs: np.ndarray) -> np.ndarray:
        """An action (A,) drawn from the policy for one observation: training."""
        return self.actions(aligned(obs[None]), True)[0].cpu().numpy()

    @torch.no_grad()
    def actions(self, obs: Tensor, sample: bool) -> Tensor:
        """Actions (N, A) on the agent's device, drawn from the policy or its means, for observations (N, ...)."""
        with self.layers_in_bf16():
            mu, pi, _, _ = self.actor(self.to_network_input(obs), compute_pi=sample, compute_log_pi=False)
        return pi if sample else mu

    @torch.no_grad()
    def features(self, obs: np.ndarray) -> Tensor:
        """The critic's features (N, D) of observations (N, ...), on the agent's device."""
        with self.layers_in_bf16():
            return self.critic.encoder(self.to_network_input(torch.from_numpy(obs)))

    @torch.no_grad()
    def reconstruct(self, obs: np.ndarray) -> np.ndarray:
        """The decoder's image (N, C, H, W) of observations (N, C, H, W), both uint8 pixels.

        Raises RuntimeError if there is no decoder.
        """
        with self.layers_in_bf16():
            image = self.decode(self.features(obs))
        return ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def decode(self, feature: Tensor) -> Tensor:
        """The decoder's image (B, C, H, W) of features (B, D). Raises RuntimeError if there is no decoder."""
        if self.decoder is None:
            raise RuntimeError("there is no decoder: this agent was made with decoder_type identity")
        return self.decoder(feature)

    def to_network_input(self, tensor: Tensor) -> Tensor:
        """A tensor on the agent's device, in the dtype and memory layout of the networks' inputs."""
        pixels, weight = tensor.dim() == 4, next(self.critic.parameters())
        layout = self.layout if pixels else torch.preserve_format
        # bfloat16 holds pixels exactly: whole numbers up to 256.
        dtype = torch.bfloat16 if pixels and self.settings.precision == "bf16" else weight.dtype
        return send(tensor, self.device).to(dtype, memory_format=layout)

    def layers_in_bf16(self) -> AbstractContextManager[Any]:
        """A context in which layers compute in bfloat16, if that is the precision."""
        if self.settings.precision != "bf16":
            return nullcontext()
        # Without autocast's cache of cast weights, because weights change within an update.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    # What training changes, saved and loaded

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks, by attribute name."""
        return dict(self.named_children())

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """All optimisers, by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Optimizer)}

    def train(self, training: bool = True) -> SacAeAgent:
        """Sets training or evaluation mode of every network. Frozen ones, as the target, stay in evaluation mode."""
        self.training = training
        for network in self.networks.values():
            network.train(training and any(parameter.requires_grad for parameter in network.parameters()))
        return self

    def check_complete(self) -> None:
        """Raises TypeError, which says what to do, if `state_dict` lacks something that trains."""
        for name, value in vars(self).items():
            if name in vars(nn.Module()) or isinstance(value, Optimizer):
                continue
            leaves = tree_leaves(value)
            if any(isinstance(leaf, nn.Module | Optimizer) for leaf in leaves):
                raise TypeError(f"checkpoints lack what {name} holds: use nn.ModuleList; optimisers are attributes")
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                raise TypeError(f"checkpoints lack the tensor {name}: make it an nn.Parameter, or use nn.ParameterList")
        for name, optimizer in self.optimizers.items():
            if not set(self.parameters()).issuperset(parameters_of(optimizer)):
                raise TypeError(
                    f"{name} optimises parameters of a network that is not an attribute of the agent, "
                    "so checkpoints would lack it: use nn.ModuleList"
                )

    def get_extra_state(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The optimisers' moments, by optimiser and parameter; `state_dict` holds them. Learning rates are no part."""
        return {
            name: {key: dict(optimizer.state.get(trained, {})) for key, trained in self.trained_by(optimizer).items()}
            for name, optimizer in self.optimizers.items()
        }

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, dict[str, dict[str, Tensor]]]) -> None:
        """Copies the optimisers' moments in place; `load_state_dict` calls it.

        `Optimizer.load_state_dict` will not do: it keeps the file's layout in memory, which the fused Adam misreads
        where the parameter has another, and it replaces settings and tensors that a CUDA graph uses.
        """
        for name, optimizer in self.optimizers.items():
            for key, parameter in self.trained_by(optimizer).items():
                moments = optimizer.state[parameter]
                for moment in moments.values():
                    moment.zero_()  # as before the first update
                for kind, value in state[name][key].items():
                    like = parameter if value.shape == parameter.shape else value
                    new = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
                    moments.setdefault(kind, new).copy_(value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's. Raises UserError, and loads nothing, if it is the state of another agent."""
        mine, theirs = (
            {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
            | {name: set(moments) for name, moments in state.get("_extra_state", {}).items()}
            for state in (self.state_dict(), state_dict)
        )
        if differ := sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name)):
            raise UserError(f"it has other networks or optimisers: {', '.join(differ):.200}")
        return super().load_state_dict(state_dict, strict, assign)

    def trained_by(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What an optimiser trains, by name."""
        trained = set(parameters_of(optimizer))
        return {name: parameter for name, parameter in self.named_parameters() if parameter in trained}

    def save(self, model_dir: str | Path, step: int) -> None:
        """Writes `NAME_STEP.pt` for each network and, as `target`, the target critic with log alpha."""
        states: dict[str, dict[str, Any]] = {name: network.state_dict() for name, network in self.networks.items()}
        states["target"] = {"critic_target": states.pop("critic_target"), "log_alpha": self.log_alpha.detach()}
        for name, state in reversed(states.items()):  # the actor last: where it is, a kill has left all of them
            write_tensors(Path(model_dir) / f"{name}_{step}.pt", state)

    def load(self, model_dir: str | Path, step: int) -> None:
        """Loads what `save` or the authors' script wrote; without `target_STEP.pt` the target is the critic's copy.

        The networks' attributes (`trunk`, `Q1`, `convs`, `fc`, `ln`) have the authors' names, so that their files fit.

        Executes nothing that a file contains. Raises UserError, which leaves the agent unchanged and names the file,
        if one is missing, damaged, foreign, or of another network.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            for name, network in self.networks.items():
                if name != "critic_target":
                    with loading(Path(model_dir) / f"{name}_{step}.pt", self.device) as state:
                        network.load_state_dict(state)
            if os.path.lexists(target := Path(model_dir) / f"target_{step}.pt"):
                with loading(target, self.device) as state, torch.no_grad():
                    self.critic_target.load_state_dict(state["critic_target"])
                    self.log_alpha.copy_(state["log_alpha"])
            else:
                self.critic_target.load_state_dict(self.critic.state_dict())
        except UserError:
            self.load_state_dict(before)
            raise

    def load_encoder(self, model_dir: str | Path, step: int) -> None:
        """Takes the encoder of a critic that `save` or the authors' script wrote, for critic and target.

        Raises UserError, which leaves the agent unchanged and names the file, if it is missing or damaged, or if its
        encoder has other shapes.
        """
        path, mine = Path(model_dir) / f"critic_{step}.pt", self.critic.encoder.state_dict()
        with loading(path, self.device) as state:
            theirs = {name.removeprefix("encoder."): state[name] for name in state if name.startswith("encoder.")}
            shapes = [{name: (*value.shape,) for name, value in each.items()} for each in (mine, theirs)]
        for name in mine | theirs:
            here, there = (shape.get(name, "missing") for shape in shapes)
            if here != there:
                raise UserError(f"{path} is of another encoder: there {name} is {there}, and here it is {here}")
        for critic in (self.critic, self.critic_target):
            critic.encoder.load_state_dict(theirs)


def aligned(array: np.ndarray) -> Tensor:
    """A copy of an array in PyTorch's memory, which begins at multiples of 64 bytes.

    NumPy's begins anywhere, and the rounding of matrix products depends on that: equal runs would differ.
    https://intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2025-1/example-of-data-alignment.html
    """
    return torch.from_numpy(array).clone()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """What an optimiser trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
