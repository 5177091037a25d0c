"""SAC+VAE: SAC on a variational autoencoder, which the paper compares SAC+AE with (sections 4.3 and 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from sac_ae import ExactLinear, NonNegative, SacAeAgent, Settings, setting, weight_init
from utils import preprocess_obs


@dataclass(frozen=True, kw_only=True)
class VaeSettings(Settings):
    """Keywords of `SacVaeAgent`: those of `SacAeAgent`, and the weight of the KL divergence."""

    beta: NonNegative = setting(1e-6, "weight of the KL divergence, with --agent sac_vae")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "identity" in (self.encoder_type, self.decoder_type):
            raise UserError("the agent sac_vae needs encoder_type pixel and decoder_type pixel")
        if self.decoder_latent_lambda != Settings.decoder_latent_lambda:
            raise UserError("the agent sac_vae has no decoder_latent_lambda: beta takes its place")


class SacVaeAgent(SacAeAgent):
    """SAC on the features of a beta-VAE: for each observation a normal distribution (arXiv 1312.6114).

    The encoder gives its mean, from which actor and critic learn. `log_variance`, a linear layer beside the encoder's
    own, gives the rest. The decoder gets samples. The mean keeps SAC+AE's LayerNorm and tanh.
    """

    settings_class = VaeSettings
    settings: VaeSettings

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        encoder: Any = self.critic.encoder
        s = self.settings
        self.log_variance = ExactLinear(encoder.fc.in_features, encoder.feature_dim).to(self.device)
        self.log_variance.apply(weight_init)
        self.encoder_optimizer = self.adam([*encoder.parameters(), *self.log_variance.parameters()], s.encoder_lr)
        self.actor.encoder = encoder  # all of it: the actor has no linear layer of its own
        trained = self.actor if s.actor_trains_encoder else self.actor.trunk
        self.actor_optimizer = self.adam(trained.parameters(), s.actor_lr, s.actor_beta)

    def decoder_loss(self, obs: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruction loss from a sample, and beta times the KL divergence from N(0, 1) (paper, section 3.3).

        As in SAC+AE, the log-likelihood is a mean squared error over all pixels. `hidden` is the convolutions' output
        for `obs`.
        """
        mean, log_variance = self.critic.encoder.forward_head(hidden), self.log_variance(hidden)
        feature = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - log_variance - 1).sum(1).mean()
        return F.mse_loss(self.decode(feature), preprocess_obs(obs)) + self.settings.beta * kl
