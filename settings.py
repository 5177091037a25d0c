"""The agent's settings, each written once: name, range, default, and the help text of its flag."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_args

Kind = Literal["pixel", "identity"]
Precision = Literal["fp32", "tf32", "bf16"]


class Limits(NamedTuple):
    """A range of numbers, from `low` to `high`; without `low` itself if `exclusive`."""

    low: float = -math.inf
    high: float = math.inf
    exclusive: bool = False


Count = Annotated[int, Limits(1)]
Rate = Annotated[float, Limits(0, exclusive=True)]  # a learning rate, a temperature
Beta = Annotated[float, Limits(0, 0.9999999)]  # of Adam: below 1
Fraction = Annotated[float, Limits(0, 1)]
Weight = Annotated[float, Limits(0)]


def setting(default: Any, text: str) -> Any:
    """A field of a dataclass of settings: its default, and the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keywords of `SacAeAgent`, which are also flags of train.py."""

    hidden_dim: Count = setting(1024, "units of the hidden layers of actor and critic")
    discount: Fraction = setting(0.99, "discount per decision")
    init_temperature: Rate = setting(0.1, "alpha at the start")
    alpha_lr: Rate = setting(1e-4, "learning rate of log alpha")
    alpha_beta: Beta = setting(0.5, "Adam's beta1 for log alpha")
    actor_lr: Rate = setting(1e-3, "learning rate of the actor")
    actor_beta: Beta = setting(0.9, "Adam's beta1 for the actor")
    actor_log_std_min: float = setting(-10, "lower bound of log std")
    actor_log_std_max: float = setting(2, "upper bound of log std")
    actor_update_freq: Count = setting(2, "decisions per update of actor and alpha")
    critic_lr: Rate = setting(1e-3, "learning rate of the critic")
    critic_beta: Beta = setting(0.9, "Adam's beta1 for the critic")
    critic_tau: Fraction = setting(0.01, "tau of the target's Q functions (soft update)")
    critic_target_update_freq: Count = setting(2, "decisions per update of the target")
    encoder_type: Kind = setting("pixel", "identity: observations are states")
    encoder_feature_dim: Count = setting(50, "length of the feature vector")
    encoder_lr: Rate = setting(1e-3, "learning rate of the encoder under the decoder's loss")
    encoder_tau: Fraction = setting(0.05, "tau of the target's encoder (soft update)")
    decoder_type: Kind = setting("pixel", "identity: no decoder")
    decoder_lr: Rate = setting(1e-3, "learning rate of the decoder")
    decoder_update_freq: Count = setting(1, "decisions per update of the decoder")
    decoder_latent_lambda: Weight = setting(1e-6, "weight of the features' L2 penalty")
    decoder_weight_lambda: Weight = setting(1e-7, "weight decay of the decoder")
    num_layers: Count = setting(4, "convolutions of the encoder, and of the decoder")
    num_filters: Count = setting(32, "channels of a convolution")
    precision: Precision | None = setting(None, "precision of layers; without it fp32, but tf32 in GPU convolutions")
    compile: bool = setting(False, "compile the losses by torch.compile, which takes a minute at first")

    def __post_init__(self) -> None:
        if self.precision not in (None, *get_args(Precision)):
            raise ValueError(f"unknown precision {self.precision!r}: choose one of {', '.join(get_args(Precision))}")
