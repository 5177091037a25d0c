"""Decoder: from features back to the image, the method's auxiliary task."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from encoder import conv_output_shape
from errors import UserError


class PixelDecoder(nn.Module):
    """The encoder's mirror image: linear, then `num_layers` transposed convolutions (paper, appendix B).

    Arguments are the encoder's; `num_filters` are the channels of each convolution but the last, which has C.
    """

    def __init__(self, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int, num_filters: int):
        super().__init__()
        channels, height, width = obs_shape
        self.in_shape = (num_filters, *conv_output_shape(height, width, num_layers))
        self.fc = nn.Linear(feature_dim, math.prod(self.in_shape))
        self.deconvs = nn.ModuleList(nn.ConvTranspose2d(num_filters, num_filters, 3) for _ in range(num_layers - 1))
        # From side / 2 - 1 to side; without the padding it would be one pixel short.
        self.deconvs.append(nn.ConvTranspose2d(num_filters, channels, 3, stride=2, output_padding=1))

    def forward(self, feature: Tensor) -> Tensor:
        """Features (B, D) to an image (B, C, H, W), trained towards `utils.preprocess_obs(obs)`."""
        hidden = torch.relu(self.fc(feature)).view(-1, *self.in_shape)
        for deconv in self.deconvs[:-1]:
            hidden = torch.relu(deconv(hidden))
        return self.deconvs[-1](hidden).to(feature.dtype)  # under autocast it is bfloat16


def make_decoder(
    decoder_type: str, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int, num_filters: int
) -> PixelDecoder | None:
    """A decoder of type `pixel`, or none for type `identity`. Raises UserError: unknown type, or no images."""
    if decoder_type == "identity":
        return None
    if decoder_type != "pixel":
        raise UserError(f"unknown decoder_type {decoder_type!r}: choose pixel or identity")
    if len(obs_shape) != 3:
        raise UserError("decoder_type pixel needs encoder_type pixel: states are not reconstructed")
    return PixelDecoder(obs_shape, feature_dim, num_layers, num_filters)
