"""Pictures of observations and of what the decoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def rgb(obs: Any) -> Any:
    """The newest frame in pixels (..., C, H, W), an array or a tensor, as a picture (..., 3, H, W).

    These are the last three channels; of fewer, the first one three times, as grey.
    """
    return obs[..., -3:, :, :] if obs.shape[-3] >= 3 else obs[..., [0, 0, 0], :, :]


def some(items: Sequence[Any], count: int = 8) -> list[Any]:
    """At most `count` of the items, evenly spread."""
    return [items[index] for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def quality(obs: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """How alike the newest frames of pixels (N, C, H, W), uint8, and of their reconstructions are.

    `psnr` is the peak signal-to-noise ratio in dB, over all pixels of all frames; infinite if they are equal. `ssim` is
    the mean structural similarity, 1 if they are equal.
    """
    from skimage import metrics  # only here: states need no pictures

    frames, images = rgb(obs), rgb(reconstruction)
    window = min(7, *(side - 1 | 1 for side in frames.shape[2:]))  # odd; 7 is the usual one
    # Each channel of each frame counts as a channel of one picture, so that one call gives the mean of all.
    flat, flat_images = (each.reshape(-1, *frames.shape[2:]) for each in (frames, images))
    with np.errstate(divide="ignore"):
        psnr = metrics.peak_signal_noise_ratio(frames, images, data_range=255)
    ssim = metrics.structural_similarity(flat, flat_images, win_size=window, channel_axis=0, data_range=255)
    return {"psnr": float(psnr), "ssim": float(ssim)}


def side_by_side(pictures: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Pictures (H, W, 3), uint8, in a row, each scaled to `size` pixels a side, with its own pixels to be seen."""
    from skimage import transform, util

    scaled = [transform.resize(each, (size, size), order=0, preserve_range=True) for each in pictures]
    return util.montage(scaled, grid_shape=(1, len(scaled)), channel_axis=-1).astype(np.uint8)
