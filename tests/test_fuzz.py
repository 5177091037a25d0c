"""Any command line: it is accepted, or refused in one line, with nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from unittest import mock

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import train
from support import machine

FLAGS = {action.dest: action for action in train.make_parser()._actions if action.dest != "help"}
NUMBERS = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "3", "5", "-1", "84", "1e3", "0.5", "-0", "nan", "inf", "-inf", "1_0", "0x10", "1e999"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
)
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", " ", "--", "-", "=", "cuda:7", "meta", "\n", "\0", "ä" * 300])
)


class Accepted(Exception):  # noqa: N818  # no error
    """The run would begin now."""


def values(flag):
    """Values of a flag: right ones and others."""
    if flag.nargs == 0:
        return st.just([])
    known = {"domain_name": ["cartpole", "walker", "lqr"], "task_name": ["swingup", "walk", "lqr_2_1"]}
    right = [str(choice) for choice in flag.choices or known.get(flag.dest, [])]
    return st.one_of(NUMBERS, TEXTS, *([st.sampled_from(right)] * 2 if right else [])).map(lambda value: [value])


def flag_and_value():
    return st.sampled_from(sorted(FLAGS)).flatmap(
        lambda name: values(FLAGS[name]).map(lambda value: [f"--{name}", *value])
    )


COMMANDS = st.lists(st.one_of(flag_and_value(), flag_and_value(), TEXTS.map(lambda text: [text])), max_size=5)


def refuse_at_the_end(*_):
    raise Accepted


@settings(
    max_examples=2000 if os.environ.get("LONG_TESTS") else 300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(command=COMMANDS, small=st.booleans())
def test_any_command_line(command, small, tmp_path, monkeypatch):
    """Networks and replay are not made: their sizes are drawn, too, and some that can be had take all there is."""
    monkeypatch.chdir(tmp_path)
    argv = [*("--domain_name cartpole --task_name swingup --image_size 16 --num_layers 2".split() if small else [])]
    argv += [word for words in command for word in words]
    errors = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["train.py"]),
        mock.patch.object(train, "make_agent", return_value=mock.Mock(device=torch.device("cpu"))),
        mock.patch.object(machine, "ReplayBuffer"),
        mock.patch.object(train, "Run", refuse_at_the_end),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            train.main(argv)
        except Accepted:
            status = None
        except SystemExit as exit_:
            status = exit_.code
    event("accepted" if status is None else "refused")
    assert status in (None, 2)
    assert errors.getvalue().count("\n") == (0 if status is None else 1), errors.getvalue()
    assert errors.getvalue().startswith("" if status is None else "train.py: error: ")
    assert list(tmp_path.iterdir()) == []
