"""An update computes no more than it did."""

from __future__ import annotations

import pytest
from count import count

LAYERS = 4


@pytest.mark.parametrize(
    ("encoder", "decoder", "actor", "gflop", "passes", "backward"),
    [
        # Next observations through actor and target, observations through the critic, and once more for actor and
        # decoder. The decoder makes a pass of its own. Losses of critic and decoder go back.
        ("pixel", "pixel", True, 128.40, 4 + 1, 2 + 1),
        ("pixel", "pixel", False, 124.90, 4 + 1, 2 + 1),
        ("pixel", "identity", True, 72.38, 4, 1),
        ("pixel", "identity", False, 58.06, 3, 1),
        ("identity", "identity", True, 4.38, 0, 0),
        ("identity", "identity", False, 2.46, 0, 0),
    ],
)
def test_an_update(encoder, decoder, actor, gflop, passes, backward):
    expected = pytest.approx(gflop, abs=0.005), passes * LAYERS, backward * LAYERS
    assert count(encoder, decoder, actor) == expected
