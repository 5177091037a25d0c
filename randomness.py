"""Counter-based randomness: a draw depends on seed, purpose and counters, not on earlier draws."""

from __future__ import annotations

from typing import Any

import numpy as np


def sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """The seed sequence of these numbers. Different purposes never share one."""
    return np.random.SeedSequence((seed, *numbers), spawn_key=tuple(purpose.encode()))


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A new generator."""
    return np.random.default_rng(sequence(seed, purpose, *numbers))


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for an episode."""
    return int(sequence(seed, purpose, *numbers).generate_state(1)[0])


def random_action(space: Any, seed: int, step: int) -> np.ndarray:
    """A uniform action (A,) of a Box."""
    return generator(seed, "random action", step).uniform(space.low, space.high).astype(space.dtype)
