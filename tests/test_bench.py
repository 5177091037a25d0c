"""Benches measure what they say, and on a GPU every variant that they have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import bench
from errors import UserError
from support import cuda_graph


def no_compiler():
    raise UserError("there is nothing to compile for")


def test_updates_on_a_gpu(gpu, monkeypatch, capsys):
    """Every variant runs; torch.compile has none to compile for."""
    settings = {"ON_GPU": True, "DEVICE": torch.device("cuda"), "WARMUP": cuda_graph.WARMUP, "CAPACITY": 200}
    for name, value in (settings | {"check_compiler": no_compiler}).items():
        monkeypatch.setattr(bench, name, value)
    flags = bench.flags
    small = "--device=cuda --hidden_dim=32".split()
    monkeypatch.setattr(bench, "flags", lambda kind, *more: flags(kind, *small, *more))
    bench.bench_update("state", rounds=1)
    printed = capsys.readouterr().out
    variants = ["this", "this, bf16", "this, fp32", "this, tf32", "this, without CUDA graphs", "plain"]
    assert [line.split("|")[1].strip() for line in printed.splitlines() if "times as long" in line] == variants
    assert "Not measured: there is nothing to compile for" in printed


def test_warming_up_takes_none_of_a_table_s_time(monkeypatch, capsys):
    """Compiling takes longer than all that is measured."""
    clock = [0.0]

    def call():
        clock[0] += 100 if clock[0] < 100 * bench.WARMUP else 1

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(bench, "WARMUP", 5)
    bench.compare("", {"call": call}, rounds=100)
    assert clock[0] == 500 + bench.MOST_SECONDS
    assert "| call | 1,000,000 (1,000,000 to 1,000,000) | 1.00 times as long |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["act", "env", "train"])
def test_benches_run(monkeypatch, capsys, name):
    monkeypatch.setattr(bench, "CAPACITY", 200)
    bench.main([name, "--kind", "state", "--rounds", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "times as long" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["this", "plain"]
