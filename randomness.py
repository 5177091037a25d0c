"""Counter-based randomness: a draw depends on seed, purpose and counters, not on earlier draws."""

from __future__ import annotations

from typing import Any

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A new generator for these numbers. Different purposes never share one."""
    return np.random.default_rng(np.random.SeedSequence((seed, *numbers), spawn_key=tuple(purpose.encode())))


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for an episode."""
    return int(generator(seed, purpose, *numbers).bit_generator.seed_seq.generate_state(1)[0])


def random_action(space: Any, seed: int, step: int) -> np.ndarray:
    """A uniform action (A,) of a Box."""
    return generator(seed, "random action", step).uniform(space.low, space.high).astype(space.dtype)
