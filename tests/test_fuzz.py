"""Any command line is accepted, or refused in one line, with nothing written."""

from __future__ import annotations

import itertools
import os
import sys
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train

FLAGS = [action for action in train.make_parser()._actions if action.dest != "help"]
ODD = "0 1 2 3 5 -1 84 1e3 0.5 -0 nan inf -inf 1_0 0x10 1e999 -- - = cuda:7 meta walker walk".split()
WORDS = st.one_of(
    st.sampled_from([*ODD, "", " ", "\n", "\r", "\0", "ä" * 300, "~", "gs://bucket"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=20),
)


def flag_and_value(flag):
    if flag.nargs == 0:
        return st.just([f"--{flag.dest}"])
    right = [str(value) for value in flag.choices or [flag.default]]
    return st.one_of(st.sampled_from(right), WORDS).map(lambda value: [f"--{flag.dest}", value])


PART = st.one_of(*[st.sampled_from(FLAGS).flatmap(flag_and_value)] * 9, WORDS.map(lambda word: [word]))


@settings(
    max_examples=2000 if os.environ.get("LONG_TESTS") else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parts=st.lists(PART, min_size=1, max_size=4))
def test_any_command_line(tmp_path, monkeypatch, capsys, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # Accepted, the run would make its agent, and then its replay. Their sizes are drawn, too, and may take all memory.
    monkeypatch.setattr(train, "make_agent", mock.Mock(side_effect=InterruptedError))
    with pytest.raises((InterruptedError, SystemExit)) as end:
        train.main(["--domain_name=cartpole", "--task_name=swingup", "--image_size=16", *itertools.chain(*parts)])
    errors = capsys.readouterr().err
    refused = end.type is SystemExit
    assert not refused or (end.value.code == 2 and errors.startswith("train.py: error: "))
    assert errors.count("\n") == refused, errors
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
