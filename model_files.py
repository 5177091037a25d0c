"""Reads the file of a saved network, and checks that it fits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError


def read_state(path: Path, like: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The file's tensors, which must have the names and shapes of `like`. Raises UserError, with the file's name."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises almost anything on a file that is not its own
        raise UserError(f"{path} is damaged, or holds something else than a network's weights") from error
    try:
        check_alike(state, like)
    except ValueError as error:
        raise UserError(f"{path} is not of this network: {error}") from None
    return state


def check_alike(state: Any, like: Any, name: str = "it") -> None:
    """Raises ValueError unless both are tensors of one shape, or dictionaries of such under the same names."""
    if isinstance(like, Mapping):
        if not isinstance(state, Mapping):
            raise ValueError(f"{name} is no dictionary of weights")
        if different := sorted(map(str, state.keys() ^ like.keys())):
            key = different[0]
            raise ValueError(f"{name} lacks {key}" if key in like else f"{name} has {key:.100}, unlike the network")
        for key in like:
            check_alike(state[key], like[key], key)
    elif not isinstance(state, Tensor) or not state.is_floating_point() or state.layout != torch.strided:
        raise ValueError(f"{name} is no tensor of floating numbers")
    elif state.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}, the network's has {tuple(like.shape)}")
