"""TensorBoard's events, read back."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder):
    """All events under `folder / "tb"`."""
    return EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()
