"""Decoder: from features back to the image, the method's auxiliary task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoder import conv_output_shape


class PixelDecoder(nn.Module):
    """The encoder's mirror image: linear, then transposed convolutions (paper, appendix B.1).

    Args:
        obs_shape: (C, H, W) of the stacked frames; H and W even.
        feature_dim: D, length of the feature vector.
        num_layers: number of transposed convolutions, the encoder's number of convolutions.
        num_filters: channels of each but the last.
    """

    def __init__(self, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int = 2, num_filters: int = 32):
        super().__init__()
        channels, height, width = obs_shape
        self.num_filters = num_filters
        self.in_height, self.in_width = conv_output_shape(height, width, num_layers)
        self.fc = nn.Linear(feature_dim, num_filters * self.in_height * self.in_width)
        self.deconvs = nn.ModuleList(nn.ConvTranspose2d(num_filters, num_filters, 3) for _ in range(num_layers - 1))
        self.deconvs.append(nn.ConvTranspose2d(num_filters, channels, 3, stride=2, output_padding=1))

    def forward(self, feature: Tensor) -> Tensor:
        """Features (B, D) to an image (B, C, H, W), trained to lie where `utils.preprocess_obs` puts it."""
        hidden = torch.relu(self.fc(feature))
        hidden = hidden.view(-1, self.num_filters, self.in_height, self.in_width)
        for deconv in self.deconvs[:-1]:
            hidden = torch.relu(deconv(hidden))
        return self.deconvs[-1](hidden).to(feature.dtype)  # under autocast it is bfloat16


def make_decoder(
    decoder_type: str, obs_shape: tuple[int, ...], feature_dim: int, num_layers: int, num_filters: int
) -> PixelDecoder | None:
    """A decoder of type `pixel`, or none for type `identity`.

    Raises:
        ValueError: unknown type, or observations that are no image.
    """
    if decoder_type == "identity":
        return None
    if decoder_type != "pixel":
        raise ValueError(f"unknown decoder_type {decoder_type!r}: choose pixel or identity")
    if len(obs_shape) != 3:
        raise ValueError(f"decoder_type pixel needs images, got observations of shape {obs_shape}")
    return PixelDecoder(obs_shape, feature_dim, num_layers, num_filters)
