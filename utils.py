"""Helpers: seeds, target updates, the decoder's target, evaluation mode, hashes."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from frame_stack import FrameStack as FrameStack  # these two for programs that import them from here
from replay_buffer import ReplayBuffer as ReplayBuffer


@contextmanager
def eval_mode(*models: Any) -> Iterator[None]:
    """Puts modules or agents into evaluation mode, and back into the mode that each was in."""
    with ExitStack() as restoring:
        for model in models:
            restoring.callback(model.train, model.training)
            model.train(False)
        yield


@torch.no_grad()
def soft_update_params(net: nn.Module, target_net: nn.Module, tau: float) -> None:
    """Sets target = tau * net + (1 - tau) * target, parameter by parameter."""
    targets: list[Tensor] = list(target_net.parameters())
    if targets:
        torch._foreach_lerp_(targets, list(net.parameters()), tau)


def set_seed_everywhere(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators, all GPUs' included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def module_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters, buffers and extra state, bit by bit: equal for equal modules on any device."""
    leaves, structure = tree_flatten(module.state_dict())
    digest = hashlib.sha256(repr(structure).encode())  # the names
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.cpu().to_dense().resolve_conj().resolve_neg().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(pickle.dumps(leaf))
    return digest.hexdigest()


def make_dir(dir_path: str | Path) -> Path:
    """Creates a folder with its parents, where it is not there yet."""
    path = Path(dir_path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def preprocess_obs(obs: Tensor, bits: int = 5) -> Tensor:
    """The decoder's target: pixels cut to `bits` bits, dithered, in [-0.5, 0.5] (Glow, arXiv 1807.03039).

    obs are floating pixels 0..255 of any shape; integers, which cannot carry the dither, raise TypeError.
    """
    if not obs.is_floating_point():
        raise TypeError(f"preprocess_obs takes floating pixels, got {obs.dtype}")
    quantised = (obs / 2 ** (8 - bits)).floor_()  # in place: these are the largest tensors of an update
    noise = torch.rand_like(obs, dtype=torch.promote_types(obs.dtype, torch.float32))
    return noise.add_(quantised).div_(2**bits).sub_(0.5)
