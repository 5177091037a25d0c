"""What the paper's figure compares: its methods, and its tasks with their action repeats."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A method of the published figure: its title there, and the types that make it."""

    title: str
    encoder_type: str
    decoder_type: str


METHODS = {
    "sac_ae": Method("SAC+AE:pixel", "pixel", "pixel"),
    "sac_pixel": Method("SAC:pixel", "pixel", "identity"),
    "sac_state": Method("SAC:state", "identity", "identity"),
}
# Action repeats by task (paper, table 2).
REPEATS = {
    ("cartpole", "swingup"): 8,
    ("reacher", "easy"): 4,
    ("cheetah", "run"): 4,
    ("ball_in_cup", "catch"): 4,
    ("finger", "spin"): 2,
    ("walker", "walk"): 2,
}
