"""Frame stacks and small helpers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from toy import CountingEnv

from utils import (
    FrameStack,
    eval_mode,
    make_dir,
    module_hash,
    preprocess_obs,
    set_seed_everywhere,
    soft_update_params,
)


def frame_numbers(obs):
    """The frames in a stack of CountingEnv, oldest first."""
    assert (obs.reshape(-1, 3 * 16 * 16) == obs[::3, 0, 0][:, None]).all()
    return obs[::3, 0, 0].tolist()


def test_frame_stack_counts():
    env = FrameStack(CountingEnv(limit=4), 3)
    assert env.observation_space.shape == (9, 16, 16)
    assert env.observation_space.dtype == np.uint8
    obs, _ = env.reset()
    assert frame_numbers(obs) == [0, 0, 0]
    stacks = [env.step(np.zeros(1)) for _ in range(4)]
    assert [frame_numbers(stack[0]) for stack in stacks] == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert [stack[3] for stack in stacks] == [False, False, False, True]
    assert frame_numbers(env.reset()[0]) == [5, 5, 5]
    assert frame_numbers(obs) == [0, 0, 0], "an observation changed after it was given away"


@pytest.mark.parametrize("k", [1, 2, 5])
def test_any_number_of_frames(k):
    env = FrameStack(CountingEnv(), k)
    env.reset()
    for _ in range(4):
        obs = env.step(np.zeros(1))[0]
    assert frame_numbers(obs) == [max(0, i) for i in range(5 - k, 5)]


def test_eval_mode_restores_each():
    trained, not_trained = nn.Dropout(), nn.Dropout().train(False)
    with pytest.raises(KeyError), eval_mode(trained, not_trained):
        assert not trained.training
        raise KeyError
    assert trained.training
    assert not not_trained.training


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
    assert (image >= floor).all()
    assert (image < floor + 1 / 32).all()
    assert image.min() >= -0.5
    assert image.max() < 0.5
    assert (image - floor).mean() == pytest.approx(1 / 64, rel=0.02)
    with pytest.raises(TypeError, match="floating"):
        preprocess_obs(pixels.to(torch.uint8))


def test_module_hash_sees_every_bit():
    torch.manual_seed(0)
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert module_hash(module) != module_hash(other)
    other.load_state_dict(module.state_dict())
    assert module_hash(module) == module_hash(other)
    with torch.no_grad():
        other.weight[1, 2] = torch.nextafter(other.weight[1, 2], torch.tensor(10.0))
    assert module_hash(module) != module_hash(other)


class Odd(nn.Module):
    """State of every kind: numbers of all types, none of them, any layout in memory, and something else."""

    def __init__(self, extra=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.extra = extra
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64):
            self.register_buffer(f"of_{str(dtype)[6:]}", torch.ones(3, 2, dtype=dtype))
            self.register_buffer(f"one_{str(dtype)[6:]}", torch.ones((), dtype=dtype))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("transposed", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("last", torch.rand(2, 3, 4, 4, generator=torch.manual_seed(1)))
        self.register_buffer("conjugate", torch.full((2,), 1 + 2j).conj())
        self.register_buffer("negative", torch.full((2,), 1 + 2j).conj().imag)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())

    def get_extra_state(self):
        return {"value": self.extra, "tensors": [torch.ones(2), torch.tensor(self.extra)]}

    def set_extra_state(self, state):
        self.extra = state["value"]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_module_hash_takes_any_module():
    """Scalars as in any BatchNorm; the layout in memory does not count, every entry does."""
    assert module_hash(Odd()) == module_hash(Odd())
    assert module_hash(Odd()) == module_hash(Odd().to(memory_format=torch.channels_last))
    assert module_hash(Odd()) != module_hash(Odd(extra=2))
    for name in Odd()._buffers:
        other = Odd()
        value = other._buffers[name]
        other._buffers[name] = ~value if value.dtype == torch.bool else value * 3
        assert (module_hash(Odd()) == module_hash(other)) is (name == "empty"), name
    model = nn.BatchNorm1d(3)
    before = module_hash(model)
    model(torch.ones(2, 3))
    assert module_hash(model) != before


def test_seeds_and_folders(tmp_path):
    draws = []
    for _ in range(2):
        set_seed_everywhere(3)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert make_dir(tmp_path / "a" / "b").is_dir()
    assert make_dir(tmp_path / "a" / "b").is_dir()
