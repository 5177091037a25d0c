"""The layout: imports go inwards, without circles, and the method runs by itself."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# 0 is the method: every other module at the root. No program of layer 3 imports another.
LAYERS = {"support": 1, **dict.fromkeys(("train", "logger", "video", "dmc2gym"), 2)}
LAYERS |= dict.fromkeys(("evaluate", "sweep", "plot", "bench"), 3)
PATHS = [path for pattern in ("*.py", "support/*.py", "dmc2gym/*.py") for path in ROOT.glob(pattern)]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}


def layer(name):
    return LAYERS.get(name.split(".")[0], 0)


def imports(name):
    """The project's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys() - {name}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_inwards(name):
    assert [other for other in imports(name) if layer(other) > layer(name) or layer(other) == 3] == []


def test_there_are_no_circles():
    list(graphlib.TopologicalSorter({name: imports(name) for name in FILES}).static_order())


def test_the_method_needs_no_environment():
    code = "import sys, sac_ae; print([name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    others = ["gym", "gymnasium", "dm_control", "mujoco", *LAYERS]
    assert subprocess.check_output([sys.executable, "-c", code, *others], cwd=ROOT, text=True) == "[]\n"
