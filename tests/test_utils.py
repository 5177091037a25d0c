"""Frame stacks and small helpers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from toy import CountingEnv

import utils
from utils import FrameStack, eval_mode, module_hash, preprocess_obs, rgb, set_seed_everywhere, soft_update_params


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


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (9, [6, 7, 8])])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_the_newest_frame_as_a_picture(kind, channels, shown):
    stack = kind(np.arange(channels, dtype=np.uint8)[:, None, None] + np.zeros((channels, 4, 5), np.uint8))
    assert rgb(stack)[:, 0, 0].tolist() == shown
    assert tuple(rgb(stack[None]).shape) == (1, 3, 4, 5)


def test_eval_mode_restores_each():
    modules = [nn.Dropout(), nn.Dropout().train(False)]
    with pytest.raises(KeyError), eval_mode(*modules):
        assert [module.training for module in modules] == [False, False]
        raise KeyError
    assert [module.training for module in modules] == [True, False]


def test_soft_update():
    net, target = nn.Linear(3, 2), nn.Linear(3, 2)
    want = [0.1 * a + 0.9 * b for a, b in zip(net.parameters(), target.parameters(), strict=True)]
    soft_update_params(net, target, 0.1)
    for value, expected in zip(target.parameters(), want, strict=True):
        assert torch.allclose(value, expected)


def test_preprocess_obs():
    pixels = torch.arange(256, dtype=torch.float64).repeat(50, 1)
    image = preprocess_obs(pixels)
    floor = torch.floor(pixels / 8) / 32 - 0.5
    assert ((image >= floor) & (image < floor + 1 / 32)).all()
    assert (image - floor).mean() == pytest.approx(1 / 64, rel=0.02)
    with pytest.raises(TypeError, match="floating"):
        preprocess_obs(pixels.to(torch.uint8))


class Odd(nn.Module):
    """State of every kind: scalars as in any BatchNorm, other types and layouts, none of it, and something else."""

    def __init__(self, extra=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.extra = extra
        for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64):
            self.register_buffer(f"of_{str(dtype)[6:]}", torch.ones(3, 2, dtype=dtype))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("last", torch.rand(2, 3, 4, 4, generator=torch.manual_seed(1)))
        self.register_buffer("negative", torch.full((2,), 1 + 2j).conj().imag)
        self.register_buffer("sparse", torch.eye(3).to_sparse())

    def get_extra_state(self):
        return {"value": self.extra}


def test_module_hash_sees_every_bit_of_any_module():
    """The layout in memory does not count."""
    plain = module_hash(Odd())
    assert plain == module_hash(Odd()) == module_hash(Odd().to(memory_format=torch.channels_last))
    assert plain != module_hash(Odd(extra=2))
    for name in Odd()._buffers:
        other = Odd()
        value = other._buffers[name]
        other._buffers[name] = ~value if value.dtype == torch.bool else value * 3
        assert (module_hash(other) == plain) is (name == "empty"), name
    other = Odd()
    weight = other.norm.weight.data
    weight[1] = torch.nextafter(weight[1], torch.tensor(10.0))
    assert module_hash(other) != plain


def test_seeds_and_folders(tmp_path):
    draws = []
    for _ in range(2):
        set_seed_everywhere(3)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    for _ in range(2):
        assert utils.make_dir(tmp_path / "a" / "b").is_dir()
