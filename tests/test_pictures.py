"""Pictures of observations and reconstructions, and how alike these are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pictures import quality, rgb, side_by_side, some


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (9, [6, 7, 8])])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_newest_frame_as_a_picture(kind, channels, shown):
    stack = kind(np.arange(channels, dtype=np.uint8)[:, None, None] + np.zeros((channels, 4, 5), np.uint8))
    assert rgb(stack[None])[0, :, 0, 0].tolist() == shown


def test_the_quality_of_reconstructions():
    """Of the newest frames: as defined by the mean squared error, and better for what looks more alike."""
    rng = np.random.default_rng(0)
    ramp = np.tile(np.arange(0, 128, 4, dtype=np.uint8), (5, 9, 32, 1))
    noisy = ramp + rng.integers(0, 9, ramp.shape, dtype=np.uint8)
    older = noisy.copy()
    older[:, :6] = 0
    found = quality(ramp, noisy)
    error = (ramp[:, -3:].astype(float) - noisy[:, -3:]) ** 2
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / error.mean()))
    assert quality(ramp, older) == found
    assert 0 < found["ssim"] < quality(ramp, ramp + 1)["ssim"] < 1
    assert quality(ramp, ramp) == {"psnr": np.inf, "ssim": 1.0}
    assert quality(ramp[:, :1, :4, :4], noisy[:, :1, :4, :4])["psnr"] > 20  # grey, and smaller than the usual window


@pytest.mark.parametrize("sides", [(3, 8), (5, 6), (84, 84)])
def test_the_quality_of_an_own_decoders_reconstructions(sides):
    """Which may have odd sides, or be numbers that are not rounded."""
    obs, other = np.random.default_rng(0).integers(0, 256, (2, 4, 3, *sides), np.uint8)
    assert quality(obs, other.astype(np.float32)) == pytest.approx(quality(obs, other))


def test_pictures_side_by_side():
    """Each is scaled; its pixels stay what they are, none is lost, and none changes places."""
    rng = np.random.default_rng(0)
    large, small = rng.integers(0, 256, (16, 16, 3), np.uint8), rng.integers(0, 256, (5, 7, 3), np.uint8)
    row = side_by_side([large, small], 16)
    assert (row.shape, row.dtype) == ((16, 32, 3), np.uint8)
    assert (row[:, :16] == large).all()
    assert (row[[0, 0, 15, 15], [16, 31, 16, 31]] == small[[0, 0, 4, 4], [0, 6, 0, 6]]).all()
    assert np.array_equal(np.unique(row[:, 16:].reshape(-1, 3), axis=0), np.unique(small.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(("length", "indices"), [(1, [0]), (8, range(8)), (15, range(0, 15, 2)), (9, None)])
def test_some_of_many(length, indices):
    chosen = some(range(length))
    assert chosen == list(indices) if indices else len({*chosen}) == 8
