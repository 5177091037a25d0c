"""The layout: circles whose imports go only inwards, and budgets of lines that keep the project readable."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = {"train", "logger", "video", "dmc2gym"}
PROGRAMS = {"evaluate", "sweep", "plot", "bench"}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("dmc2gym/*.py")]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circle(name):
    """0 is the method, 1 what keeps a run fast and alive, 2 the script, 3 the programs around it."""
    first = name.split(".")[0]
    return 3 if first in PROGRAMS else 2 if first in SCRIPT else 1 if first == "support" else 0


def imports(path):
    """The project's modules that a file imports when it is imported itself."""
    names = {module(each) for each in FILES}
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & names) - {module(path)}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_inwards(path):
    for name in imports(path):
        assert circle(name) <= circle(module(path))
        assert not (circle(name) == circle(module(path)) == 3)  # no program imports another


def test_no_circles():
    list(graphlib.TopologicalSorter({module(path): imports(path) for path in FILES}).static_order())


def test_the_method_needs_no_environment():
    code = "import sys, sac_ae; print([name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    others = ["gym", "gymnasium", "dm_control", "mujoco", "support", *SCRIPT, *PROGRAMS]
    assert subprocess.check_output([sys.executable, "-c", code, *others], cwd=ROOT, text=True) == "[]\n"


BUDGETS = [("train", 280), ("sac_ae", 400), ("replay_buffer", 240), ("logger", 180), ("sweep", 300)]


@pytest.mark.parametrize(("name", "lines"), BUDGETS)
def test_budgets(name, lines):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= lines


@pytest.mark.parametrize("path", FILES, ids=module)
def test_nothing_is_longer_than_it_can_be_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            assert node.end_lineno - node.lineno < (200 if isinstance(node, ast.ClassDef) else 60), node.name
