"""README.md and docs/ name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
# Modules anywhere in the text, and in backticks what lies in a folder of the project or is a file of requirements.
MODULE = re.compile(r"(?<![\w/.])[\w/]+\.py\b")
NAMED = re.compile(r"`((?:support|dmc2gym|tests|results|docs|\.ci)/[\w./-]*|requirements[\w-]*\.txt|conda_env\.yml)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    paths = [page.parent / link for link in LINK.findall(text)]
    paths += [ROOT / name for pattern in (MODULE, NAMED) for name in pattern.findall(text)]
    assert paths
    assert [str(path) for path in paths if not path.exists()] == []
