"""How long a run will take, from its first updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WARMUP, _TIMED = 5, 20  # updates
_WORTH_SAYING = 3600.0  # seconds that are left


class Pace:
    """Times the first updates and what else decisions take, to say once how long the rest of the run will take."""

    def __init__(self, device: torch.device):
        self._device = device
        self._updates: list[float] = []  # seconds of each
        self._rest: list[float] = []  # seconds of each decision without its updates
        self._said = False

    @contextmanager
    def update(self) -> Iterator[None]:
        """Times what is done within: one update, until `note` has said what is to be said."""
        if self._said:
            yield
            return
        start = self._now()
        yield
        self._updates.append(self._now() - start)

    @contextmanager
    def decision(self) -> Iterator[None]:
        """Times what is done within: one decision, until `note` has said what is to be said."""
        if self._said:
            yield
            return
        start, updates = self._now(), len(self._updates)
        yield
        self._rest.append(self._now() - start - sum(self._updates[updates:]))

    def _now(self) -> float:
        if self._device.type == "cuda":  # for these few; later nothing waits
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def note(self, updates: int, decisions: int) -> str | None:
        """A line, once, if so many updates and decisions that are left take more than an hour."""
        if self._said or len(self._updates) < _WARMUP + _TIMED or not self._rest:
            return None
        self._said = True
        timed = self._updates[_WARMUP:]
        update, rest = sum(timed) / len(timed), sum(self._rest) / len(self._rest)
        left = updates * update + decisions * rest
        if left < _WORTH_SAYING:
            return None
        time_left = f"{left / 3600:.1f} hours" if left < 48 * 3600 else f"{left / 86400:.1f} days"
        return (
            f"note: an update takes {update:.3g} s, the rest of a decision {rest:.2g} s: "
            f"{time_left} are left, evaluations not counted"
        )
