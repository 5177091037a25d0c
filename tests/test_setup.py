"""Setting up: which Pythons are taken, when the environment is made anew, and which packages are asked for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest

import train
from replay_buffer import replay_bytes

ROOT = Path(__file__).parent.parent


def pretends(folder, version, implementation="cpython"):
    """A Python that says it is another one, and writes down the commands that are more than a look at it."""
    fake = folder / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import sys, types\n"
        "if sys.argv[1] != '-c':\n"
        f"    open({str(folder / 'commands')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "    sys.exit(1)\n"
        f"sys.version_info = (*{version!r}, 0, 'final', 0)\n"
        f"sys.implementation = types.SimpleNamespace(**{{**vars(sys.implementation), 'name': {implementation!r}}})\n"
        "exec(sys.argv[2])\n"
    )
    fake.chmod(0o755)
    return fake


def set_up(folder, *python):
    """What setup.sh says, and the commands that the pretended Python was given."""
    command = ["./setup.sh", folder / "venv", "requirements.txt", *python]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    commands = folder / "commands"
    return result, commands.read_text().splitlines() if commands.exists() else []


@pytest.mark.parametrize(("version", "implementation"), [((3, 10), "cpython"), ((3, 15), "cpython"), ((3, 11), "pypy")])
def test_a_python_that_cannot_work_is_refused_before_anything_happens(tmp_path, version, implementation):
    result, commands = set_up(tmp_path, pretends(tmp_path, version, implementation))
    assert (result.returncode, result.stdout, commands) == (1, "", [])
    assert result.stderr.count("\n") == 1
    assert "3.11 to 3.14 is needed" in result.stderr


def test_an_environment_of_another_python_or_half_made_is_made_anew(tmp_path):
    python = pretends(tmp_path, (3, 11))
    made_anew = f"-m venv --clear {tmp_path / 'venv'}"
    result, commands = set_up(tmp_path, python)
    assert "will not do" not in result.stderr
    assert commands == [made_anew]
    venv.create(tmp_path / "venv", symlinks=True)
    assert set_up(tmp_path, python)[1] == 2 * [made_anew]  # it has no pip yet

    pip = next((tmp_path / "venv" / "lib").glob("python*/site-packages")) / "pip.py"
    pip.write_text("if __name__ == '__main__': raise SystemExit('pip was called')\n")
    for words in ([python], []):  # it was made by the same
        result, commands = set_up(tmp_path, *words)
        assert (result.stderr, commands) == ("pip was called\n", 2 * [made_anew])

    python.write_text(python.read_text().replace("exec(", "sys.base_prefix = '/another'\nexec("))
    assert set_up(tmp_path, python)[1] == 3 * [made_anew]


def test_a_folder_that_is_no_environment_is_not_emptied(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("mine")
    result, commands = set_up(tmp_path, pretends(tmp_path, (3, 12)))
    assert (result.returncode, commands) == (1, [])
    assert "is no virtual environment" in result.stderr
    assert (tmp_path / "venv" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("root", "answer", "asked", "help_"),
    [
        (True, 0, ["apt-get update -qq", "env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq"], False),
        (False, 1, ["sudo apt-get update -qq"], True),
    ],
)
def test_missing_packages_of_the_system(tmp_path, root, answer, asked, help_):
    """As root, by sudo, or by a command to type; on a Debian whose Python cannot make environments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "env", "sudo"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} $* >> {tools}/asked\nexit {answer}\n")
    (tools / "id").write_text(f"#!/bin/sh\necho {0 if root else 1000}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    python = pretends(tmp_path, (3, 12))
    python.write_text(python.read_text().replace("exec(", "sys.modules['ensurepip'] = None\nexec("))
    command = ["/bin/sh", "setup.sh", tmp_path / "venv", "requirements.txt", python]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = (tools / "asked").read_text().splitlines()
    assert all(line.startswith(words) for line, words in zip(lines, asked, strict=True))
    assert answer or lines[-1].endswith("python3.12-venv")
    assert ("please type: sudo apt-get install python3.12-venv" in result.stderr) == help_


def test_make_train():
    """A Python that is named is checked each time; the replay fits a machine of 8 GB."""
    # Not as a make below the one that runs the tests, which would say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "PYTHON=some-python", "train"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    first, *_, last = result.stdout.splitlines()
    assert first == "./setup.sh .venv requirements.txt some-python"
    args = train.make_parser().parse_args(shlex.split(last.partition("train.py")[2]))
    assert replay_bytes((9, 84, 84), (6,), args.num_train_steps, 3) < 6e9


def test_every_package_is_pinned_once_and_dm_controls_needs_are_among_them():
    """Except labmaze, which has no wheel for every Python, and is not needed."""
    pinned = {}
    for path in ROOT.glob("requirements*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
        names = [re.fullmatch(r"([\w.-]+)(\[\w+\])?==[\w.]+", line)[1] for line in lines]
        pinned[path.name] = [name.lower().replace("_", "-") for name in names]
    names = [name for of_file in pinned.values() for name in of_file]
    assert len(names) == len(set(names))
    needs = {re.match(r"[\w.-]+", need)[0].lower() for need in requires("dm_control") if "extra ==" not in need}
    assert needs - set(pinned["requirements-env.txt"]) == {"labmaze", "setuptools"}
    assert pinned["requirements-suite.txt"] == ["dm-control"]
    assert not {"labmaze", "torch"} & set(pinned["requirements-env.txt"])
    assert {"-r requirements.txt", "-r requirements-suite.txt"} <= set(
        re.findall("-r .*", (ROOT / "conda_env.yml").read_text())
    )


WITHOUT_THE_SUITE = """
import sys
sys.modules["dm_control"] = None
import bench, sweep, train
for program, flags in (train, []), (sweep, ["--tasks=cartpole_swingup", "--dry_run"]), (bench, ["env"]):
    try:
        program.main(flags)
    except SystemExit as exit_:
        assert exit_.code == 2
"""


def test_without_the_suite_each_program_says_what_to_install(tmp_path):
    command = [sys.executable, "-c", WITHOUT_THE_SUITE]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (0, "", [])
    assert [("--no-deps -r requirements-suite.txt" in line) for line in result.stderr.splitlines()] == [True] * 3
