"""Encoders: from an observation to the features that actor and critic share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errors import UserError


def conv_output_shape(height: int, width: int, num_layers: int) -> tuple[int, int]:
    """Height and width (pixels) of an image after `num_layers` convolutions.

    3x3 kernels without padding, the first one with stride 2, the others with stride 1 (paper, appendix B).

    Raises UserError if a side is odd (the decoder could not restore it), or too short for the layers.
    """
    if num_layers < 1:
        raise UserError(f"num_layers must be at least 1, got {num_layers}")
    if height % 2 or width % 2:
        raise UserError(f"image sides must be even, got {height} x {width}")
    # The first convolution gives side / 2 - 1, each further one removes 2.
    out_height, out_width = (side // 2 - 1 - 2 * (num_layers - 1) for side in (height, width))
    if min(out_height, out_width) < 1:
        raise UserError(
            f"{num_layers} convolutions leave nothing of a {height} x {width} image: "
            f"take fewer layers, or at least {4 * num_layers} pixels a side"
        )
    return out_height, out_width


class PixelEncoder(nn.Module):
    """Convolutions, then linear, LayerNorm and tanh (paper, appendix B).

    Args:
        obs_shape: (C, H, W) of the stacked frames; H and W even.
        feature_dim: D, length of the feature vector.
        num_layers: number of convolutions.
        num_filters: channels of each convolution.
    """

    def __init__(self, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int, num_filters: int):
        super().__init__()
        if len(obs_shape) != 3:
            raise UserError(f"the pixel encoder takes images, got observations of shape {obs_shape}")
        channels, height, width = obs_shape
        out_height, out_width = conv_output_shape(height, width, num_layers)
        self.feature_dim = feature_dim
        self.convs = nn.ModuleList([nn.Conv2d(channels, num_filters, 3, stride=2)])
        self.convs.extend(nn.Conv2d(num_filters, num_filters, 3) for _ in range(num_layers - 1))
        self.fc = nn.Linear(num_filters * out_height * out_width, feature_dim)
        self.ln = nn.LayerNorm(feature_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """Features (B, D) in (-1, 1) of pixels 0..255 (B, C, H, W), uint8 or floating."""
        return self.forward_head(self.forward_conv(obs))

    def forward_head(self, hidden: Tensor) -> Tensor:
        """Features (B, D) of the convolutions' output (B, flat)."""
        # Under autocast, too, LayerNorm and what follows compute in the weights' own precision.
        return torch.tanh(self.ln(self.fc(hidden).to(self.ln.weight.dtype)))

    def forward_conv(self, obs: Tensor) -> Tensor:
        """The convolutions' output (B, flat) for pixels; it serves several losses."""
        # Pixels are scaled to [0, 1] by scaling the first kernels: the same product, without a pass over the images.
        first, device = self.convs[0], obs.device.type
        scaled = {"weight": first.get_parameter("weight") / 255.0, "bias": first.get_parameter("bias")}
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.fc.weight.dtype
        # functional_call, because it runs the layer's hooks: `log_networks` sets some.
        hidden = torch.relu(functional_call(first, scaled, obs.to(dtype)))
        for conv in self.convs[1:]:
            hidden = torch.relu(conv(hidden))
        return hidden.flatten(1)

    def copy_conv_weights_from(self, source: Any) -> None:
        """Ties the convolutions to those of `source`: the same parameters. Nothing else is shared."""
        for src, trg in zip(source.convs, self.convs, strict=True):
            trg.weight, trg.bias = src.weight, src.bias


class IdentityEncoder(nn.Module):
    """States (D,) are their own features: nothing to train, nothing to tie."""

    def __init__(self, obs_shape: tuple[int, ...]):
        super().__init__()
        if len(obs_shape) != 1:
            raise UserError(f"the identity encoder takes state vectors, got observations of shape {obs_shape}")
        self.feature_dim = obs_shape[0]

    def forward(self, obs: Tensor) -> Tensor:
        """States (B, D), as they are."""
        return obs

    forward_conv = forward_head = forward

    def copy_conv_weights_from(self, source: Any) -> None:
        """There are no convolutions to share."""


def make_encoder(
    encoder_type: str, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int, num_filters: int
) -> PixelEncoder | IdentityEncoder:
    """An encoder of type `pixel`, or `identity`, which has no sizes. Raises UserError, as the encoders do."""
    if encoder_type == "identity":
        return IdentityEncoder(obs_shape)
    if encoder_type != "pixel":
        raise UserError(f"unknown encoder_type {encoder_type!r}: choose one of pixel, identity")
    return PixelEncoder(obs_shape, feature_dim, num_layers, num_filters)
