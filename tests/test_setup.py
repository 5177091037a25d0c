"""Setting up: which Pythons are taken and which are refused, and what pip is asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]


def pretends(folder, version, implementation="cpython", maxsize=2**63 - 1, free_threaded=0):
    """A Python that says it is another one, and writes down the commands that are more than a look at it."""
    fake = folder / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import sys, sysconfig, types\n"
        "if sys.argv[1] != '-c':\n"
        f"    open({str(folder / 'commands')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "    sys.exit(1)\n"
        f"sys.version_info = (*{version!r}, 0, 'final', 0)\n"
        f"sys.implementation = types.SimpleNamespace(**{{**vars(sys.implementation), 'name': {implementation!r}}})\n"
        f"sys.maxsize = {maxsize}\n"
        f"sysconfig.get_config_var = {{'Py_GIL_DISABLED': {free_threaded}}}.get\n"
        "exec(sys.argv[2])\n"
    )
    fake.chmod(0o755)
    return fake


def set_up(folder, python=""):
    """What setup.sh says, and the commands that the pretended Python was given; nothing can be installed by apt."""
    apt = folder / "bin" / "apt-get"
    if not apt.parent.exists():
        apt.parent.mkdir()
        apt.symlink_to("/bin/false")
    command = ["./setup.sh", folder / "venv", "requirements.txt", *([python] if python else [])]
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    commands = folder / "commands"
    return result, commands.read_text().splitlines() if commands.exists() else []


@pytest.mark.parametrize(
    "kind",
    [
        {"version": (2, 7)},
        {"version": (3, 10)},
        {"version": (3, 15)},
        {"version": (4, 0)},
        {"version": (3, 13), "implementation": "pypy"},
        {"version": (3, 13), "maxsize": 2**31 - 1},
        {"version": (3, 14), "free_threaded": 1},
    ],
)
def test_a_python_that_cannot_work_is_refused_before_anything_happens(tmp_path, kind):
    python = pretends(tmp_path, **kind)
    result, commands = set_up(tmp_path, python)
    assert result.returncode == 1
    assert (result.stdout, commands) == ("", [])
    assert result.stderr.count("\n") == 1
    assert "Python 3.11 to 3.14" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bin", python.name}


def test_a_python_that_is_not_there_is_refused_alike(tmp_path):
    result, _ = set_up(tmp_path, "no-such-python")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("no-such-python will not do")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_python_that_works_makes_the_environment(tmp_path, version):
    result, commands = set_up(tmp_path, pretends(tmp_path, tuple(map(int, version.split(".")))))
    assert "will not do" not in result.stderr
    assert commands == [f"-m venv --clear {tmp_path / 'venv'}"]


def test_an_environment_of_another_python_or_half_made_is_made_anew(tmp_path):
    python = pretends(tmp_path, (3, 12))
    venv.create(tmp_path / "venv", symlinks=True)
    made_anew = f"-m venv --clear {tmp_path / 'venv'}"
    _, commands = set_up(tmp_path, python)
    assert commands == [made_anew]  # it has no pip yet

    pip = next((tmp_path / "venv" / "lib").glob("python*/site-packages")) / "pip.py"
    pip.write_text("if __name__ == '__main__': raise SystemExit('pip was called')\n")
    result, commands = set_up(tmp_path, python)
    assert (result.stderr, commands) == ("pip was called\n", [made_anew])  # it was made of the same
    result, _ = set_up(tmp_path)
    assert result.stderr == "pip was called\n"

    python.write_text(python.read_text().replace("exec(", "sys.base_prefix = '/another'\nexec("))
    _, commands = set_up(tmp_path, python)
    assert commands == [made_anew, made_anew]


def test_a_python_that_is_named_to_make_is_looked_at_each_time():
    # Not as a make below the one that runs the tests, which would say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "PYTHON=some-python", "train"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines()[0] == "./setup.sh .venv requirements.txt some-python"


def markers(name):
    """Each requirement of a file, and of those it includes, by its name in pip's spelling."""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            yield from markers(line[3:])
        elif line and not line.startswith("#"):
            yield re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"), line


FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def test_dm_controls_needs_are_listed_and_labmaze_is_asked_for_nowhere():
    wanted = {re.match(r"[\w.-]+", need)[0].lower() for need in requires("dm_control") if "extra ==" not in need}
    assert wanted - {"labmaze", "setuptools"} <= dict(markers("requirements-env.txt")).keys()
    for name in FILES:
        assert "labmaze" not in dict(markers(name))
        if name != "requirements-suite.txt":
            assert "dm-control" not in dict(markers(name))
    assert list(dict(markers("requirements-suite.txt"))) == ["dm-control"]


def test_everything_is_pinned_once():
    lines = [line for name in FILES for line in (ROOT / name).read_text().splitlines() if re.match(r"\w", line)]
    names = [re.match(r"[\w.-]+", line)[0].lower() for line in lines]
    assert sorted(names) == sorted(set(names))
    assert [line for line in lines if not re.fullmatch(r"[\w.\[\]-]+==[\w.]+", line) and " @ file:" not in line] == []


def test_the_environments_part_asks_for_no_pytorch():
    assert "torch" not in dict(markers("requirements-env.txt"))
    assert "torch" in dict(markers("requirements.txt"))


@pytest.mark.parametrize(
    ("version", "implementation", "refused"),
    [("3.10", "cpython", True), ("3.15", "cpython", True), ("3.13", "pypy", True)]
    + [(version, "cpython", False) for version in VERSIONS],
)
def test_pip_by_itself_refuses_the_same(version, implementation, refused):
    """The first requirement is a file that is nowhere, for the Pythons that cannot work."""
    from packaging.requirements import Requirement

    name, line = next(markers("requirements.txt"))
    requirement = Requirement(line)
    assert name == "sac-ae"
    assert "Python-3.11-to-3.14" in requirement.url
    assert not Path(requirement.url.removeprefix("file://")).exists()
    python = {"python_version": version, "implementation_name": implementation}
    assert requirement.marker.evaluate(python) == refused


def test_readme_conda_and_ci_name_the_same_versions():
    readme = (ROOT / "README.md").read_text()
    assert "Python 3.11 to 3.14" in readme
    for name in ("requirements.txt", "requirements-suite.txt", "requirements-dev.txt", "conda_env.yml"):
        assert name in readme
    assert re.findall(r"3\.\d+", (ROOT / "conda_env.yml").read_text()) == ["3.12", "3.11", "3.13", "3.14"]
    assert f"for version in {' '.join(VERSIONS)}; do" in (ROOT / ".ci" / "pythons").read_text()


def test_a_folder_that_is_no_environment_is_not_emptied(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("mine")
    result, commands = set_up(tmp_path, pretends(tmp_path, (3, 12)))
    assert result.returncode == 1
    assert "is no virtual environment" in result.stderr
    assert commands == []
    assert (tmp_path / "venv" / "mine.txt").read_text() == "mine"
