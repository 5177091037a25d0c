"""Counts the products and convolutions of an update at default sizes: `python tests/count.py` prints a table."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from sac_ae import Due, SacAeAgent

SHAPES = {"pixel": (9, 84, 84), "identity": (17,)}  # of observations, by the type of their encoder
SAMPLES = 2  # of a small batch that is computed: the operations are proportional to its size
CONVOLUTIONS = torch.ops.aten.convolution, torch.ops.aten.convolution_backward


def count(encoder: str, decoder: str, actor: bool) -> tuple[float, int, int]:
    """GFLOP of an update at batch 128, with or without actor and target; its convolutions, forwards and backwards."""
    agent = SacAeAgent(SHAPES[encoder], (6,), "cpu", encoder_type=encoder, decoder_type=decoder)
    obs, number = torch.zeros(SAMPLES, *SHAPES[encoder]), torch.zeros(SAMPLES, 1)
    flop = FlopCounterMode(display=False)
    calls = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(CONVOLUTIONS, lambda *_args, **_kwargs: 1))
    with flop, calls:
        agent.update_from((obs, torch.zeros(SAMPLES, 6), number, obs, number), Due(actor, actor, decoder == "pixel"))
    made = calls.get_flop_counts()["Global"]
    forward, backward = (made.get(op, 0) for op in CONVOLUTIONS)
    return flop.get_total_flops() * 128 / SAMPLES / 1e9, forward, backward


if __name__ == "__main__":
    print("| encoder | decoder | actor, target | GFLOP | convolutions | backwards |\n|---|---|---|---|---|---|")
    for encoder, decoder in (("pixel", "pixel"), ("pixel", "identity"), ("identity", "identity")):
        for actor in (True, False):
            gflop, forward, backward = count(encoder, decoder, actor)
            print(f"| {encoder} | {decoder} | {actor} | {gflop:.2f} | {forward} | {backward} |")
