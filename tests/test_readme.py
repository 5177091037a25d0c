"""README.md and docs/ show what was measured, are short, and name files that exist."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
# Modules anywhere in the text, and in backticks what lies in a folder of the project or is a file of requirements.
MODULE = re.compile(r"(?<![\w/.])[\w/]+\.py\b")
NAMED = re.compile(r"`((?:support|dmc2gym|tests|results|docs|\.ci)/[\w./-]*|requirements[\w-]*\.txt|conda_env\.yml)`")


def medians(results):
    if not isinstance(results, dict):
        return
    if "plain_over_this" in results and "median_us" in results:
        yield f"{results['median_us']:,.0f} ({results['low_us']:,.0f} to {results['high_us']:,.0f})"
    for value in results.values():
        yield from medians(value)


@pytest.mark.parametrize("name", ["bench_cpu_zen5", "bench_cpu_amd"])
def test_figures_are_those_of_the_bench(name):
    """Every one of the file is in the docs, and in what the bench printed."""
    figures = list(medians(json.loads((ROOT / "results" / f"{name}.json").read_text())))
    assert len(figures) > 20
    for page in ("docs/performance.md", f"results/{name}.md"):
        text = (ROOT / page).read_text()
        assert [figure for figure in figures if figure not in text] == []


def test_results_are_those_of_the_table():
    """Every score of the figure's table stands in the README, with its seeds and beside what was published."""
    text = (ROOT / "README.md").read_text()
    with (ROOT / "results" / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["return"] != "not reached"]
    assert rows
    for row in rows:
        cells = [row["method"], row["task"].replace("_", " "), row["environment steps"], row["seeds"], row["return"]]
        assert f"| {' | '.join(cells)} | {row['published']}" in text


def test_pages_are_short():
    assert DOCS
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert [page.name for page in DOCS if len(page.read_text().splitlines()) >= 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    paths = [page.parent / link for link in LINK.findall(text)]
    paths += [ROOT / name for pattern in (MODULE, NAMED) for name in pattern.findall(text)]
    assert paths
    assert [str(path) for path in paths if not path.exists()] == []
