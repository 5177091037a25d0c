"""Frame stacks and small helpers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from toy import CountingEnv

from utils import FrameStack, eval_mode, module_hash, preprocess_obs, set_seed_everywhere


@pytest.mark.parametrize("k", [1, 3])
def test_a_frame_stack_observes_the_last_frames(k):
    """An observation does not change after it was given away."""
    env = FrameStack(CountingEnv(limit=4), k)
    assert (env.observation_space.shape, env.observation_space.dtype) == ((3 * k, 16, 16), np.uint8)
    observations = [env.reset()[0]]
    for step in range(1, 5):
        obs, _, _, truncated, _ = env.step(np.zeros(1))
        observations.append(obs)
        assert truncated == (step == 4)
    observations.append(env.reset()[0])
    frames = [range(step + 1 - k, step + 1) for step in range(5)]
    for obs, numbers in zip(observations, [*frames, [5] * k], strict=True):
        assert (obs == np.repeat([max(0, number) for number in numbers], 3)[:, None, None]).all()


def test_eval_mode_restores_each():
    modules = [nn.Dropout(), nn.Dropout().train(False)]
    with pytest.raises(KeyError), eval_mode(*modules):
        assert [module.training for module in modules] == [False, False]
        raise KeyError
    assert [module.training for module in modules] == [True, False]


def test_preprocess_obs():
    pixels = torch.arange(256, dtype=torch.float64).repeat(50, 1)
    image = preprocess_obs(pixels)
    floor = torch.floor(pixels / 8) / 32 - 0.5
    assert ((image >= floor) & (image < floor + 1 / 32)).all()
    assert (image - floor).mean() == pytest.approx(1 / 64, rel=0.02)
    with pytest.raises(TypeError, match="floating"):
        preprocess_obs(pixels.to(torch.uint8))


class Odd(nn.Module):
    """State of several kinds: scalars as in any BatchNorm, other types and layouts, and something that is no tensor."""

    def __init__(self, extra=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.extra = extra
        for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
            self.register_buffer(f"of_{str(dtype)[6:]}", torch.ones(3, 2, dtype=dtype))
        self.register_buffer("last", torch.rand(2, 3, 4, 4, generator=torch.manual_seed(1)))

    def get_extra_state(self):
        return {"value": self.extra}


def test_module_hash_sees_every_bit():
    """The layout in memory does not count."""
    plain = module_hash(Odd())
    assert plain == module_hash(Odd()) == module_hash(Odd().to(memory_format=torch.channels_last))
    assert plain != module_hash(Odd(extra=2))
    for name in ("norm.weight", *Odd()._buffers):
        other = Odd()
        value = other.state_dict()[name].view(-1)
        value[1] = torch.nextafter(value[1], torch.tensor(10.0)) if name == "norm.weight" else 0
        assert module_hash(other) != plain, name


def test_seeds():
    draws = []
    for _ in range(2):
        set_seed_everywhere(3)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
