"""The README shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def medians(results):
    if not isinstance(results, dict):
        return
    if "plain_over_this" in results and "median_us" in results:
        yield f"{results['median_us']:,.0f} ({results['low_us']:,.0f} to {results['high_us']:,.0f})"
    for value in results.values():
        yield from medians(value)


def test_figures_are_those_of_the_bench():
    """Every one of the file is in the README, and in what the bench printed."""
    figures = list(medians(json.loads((ROOT / "results" / "bench_cpu.json").read_text())))
    assert len(figures) > 20
    for page in ("README.md", "results/bench_cpu.md"):
        text = (ROOT / page).read_text()
        assert [figure for figure in figures if figure not in text] == []
