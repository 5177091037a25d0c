"""Programs whose standard streams are closed or narrow, whose paths are odd, and whose disk is full."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_logger import read_events
from test_train import METHODS, SMALL, read_log

import train

ROOT = Path(__file__).parent.parent
LONG_NAME = 300 * "x"
LONG = bool(os.environ.get("LONG_TESTS"))
FAST = [*SMALL, *METHODS["sac_state"], "--action_repeat", "50"]  # episodes of 20 decisions


def run_program(program, *flags, redirect="", **environment):
    """A program's end, with the shell's redirections, from the project's folder."""
    words = [sys.executable, program, *map(str, flags)]
    command = f"exec {shlex.join(words)} {redirect}"
    return subprocess.run(
        [b"bash", b"-c", os.fsencode(command)], cwd=ROOT, env=os.environ | environment, capture_output=True
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on states with models; tests must not write there."""
    folder = tmp_path_factory.mktemp("streams") / "run"
    assert train.main([*FAST, "--save_model", "--work_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("redirect", ["2>&-", "<&- >&- 2>&-", *(["<&-", ">&-"] if LONG else [])])
def test_training_without_standard_streams(tmp_path, redirect):
    """Nothing of what would be printed gets into a file instead."""
    work_dir = tmp_path / "log"
    flags = [*FAST, "--save_tb", "--save_video", "--save_model", "--eval_workers", "2", "--work_dir", work_dir]
    result = run_program("train.py", *flags, redirect=redirect)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"done: 60 decisions" in result.stdout or ">&-" in redirect.replace("2>&-", "")
    assert [record["step"] for record in read_log(work_dir / "train.log")] == [20, 40, 60]
    assert "eval/video" in read_events(work_dir).Tags()["images"]
    assert sorted(path.suffix for path in (work_dir / "video").iterdir()) == [".mp4"] * 2


@pytest.mark.parametrize("redirect", ["<&- >&- 2>&-", *(["2>&-"] if LONG else [])])
@pytest.mark.parametrize("program", ["evaluate.py", "plot.py", "sweep.py"])
def test_other_programs_without_standard_streams(run, tmp_path, program, redirect):
    flags = {
        "evaluate.py": [run, "--episodes", 2, "--eval_workers", 2, "--device", "cpu"],
        "plot.py": [run, "--out", tmp_path / "plots"],
        "sweep.py": ["--tasks", "cartpole_swingup", "--work_dir", tmp_path / "sweep", "--dry_run"],
    }[program]
    result = run_program(program, *flags, redirect=redirect)
    assert (result.returncode, result.stderr) == (0, b"")
    if program == "plot.py":
        assert (tmp_path / "plots" / "scores.md").exists()


def test_a_closed_stream_is_not_the_next_file():
    program = (
        "from support import start; start.program()\n"
        "import os, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "assert file.fileno() > 2\n"
        "print('printed'); print('printed', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "assert os.system('echo printed; echo printed >&2') == 0"
    )
    assert run_program("-c", program, "/dev/null", redirect="<&- >&- 2>&-").returncode == 0


def test_tensorboard_with_letters_of_another_alphabet(tmp_path):
    result = run_program(
        "train.py", *FAST, "--save_tb", "--work_dir", tmp_path / "書é", PYTHONIOENCODING="ascii:strict"
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert "eval/episode_reward" in read_events(tmp_path / "書é").Tags()["scalars"]


@pytest.mark.parametrize("encoding", ["ascii:strict", *(["utf-8:strict"] if LONG else [])])
def test_paths_that_cannot_be_shown(tmp_path, encoding):
    """A byte of Latin-1 and a letter of another alphabet: everything is written, resumed, played and drawn."""
    work_dir = Path(os.fsdecode(os.fsencode(tmp_path) + "/bücher ".encode("latin-1") + "é書".encode()))
    flags = [*FAST, "--save_video", "--save_model", "--save_buffer", "--work_dir", work_dir]
    environment = {"PYTHONIOENCODING": encoding}
    refused = run_program("train.py", *flags, "--save_tb", **environment)
    assert refused.returncode == 2
    assert refused.stderr.endswith(b"TensorBoard cannot read it: leave save_tb out\n")
    assert not work_dir.exists()
    results = [
        run_program("train.py", *flags, **environment),
        run_program("train.py", *flags, "--resume", "--num_train_steps", 80, **environment),
        run_program("evaluate.py", work_dir, "--episodes", 1, "--video", work_dir / "é.mp4", **environment),
        run_program("plot.py", work_dir, "--out", work_dir / "plots", **environment),
    ]
    for result in results:
        assert (result.returncode, result.stderr) == (0, b""), result
    refused = run_program("train.py", *flags, **environment)
    assert refused.returncode == 2
    assert refused.stderr.count(b"\n") == 1
    assert json.loads((work_dir / "args.json").read_text())["work_dir"] == str(work_dir)
    assert len(read_log(work_dir / "train.log")) == 4


def test_a_home_folder_is_expanded(run, tmp_path):
    home = {"HOME": str(tmp_path)}
    (tmp_path / "there").symlink_to(run)
    for program, *flags in [
        ("train.py", *FAST, "--num_train_steps", "2", "--work_dir=~/x"),
        ("evaluate.py", "~/there", "--episodes", "1", "--video=~/videos/v.mp4"),
        ("plot.py", "~/there", "--out=~/plots"),
    ]:
        result = run_program(program, *flags, **home)
        assert result.returncode == 0, result
    made = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}  # others cache their fonts there
    assert made == {"there", "x", "videos", "plots"}
    result = run_program("sweep.py", "--tasks", "cartpole_swingup", "--work_dir=~/s", "--dry_run", **home)
    assert f"--work_dir {tmp_path}/s/" in result.stdout.decode()
    result = run_program("train.py", "--work_dir=~nobody_of_that_name/x")
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1
    assert b"no such user: ~nobody_of_that_name" in result.stderr


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("train", ["--save_tb=false"], "--save_tb/--no-save_tb: ignored explicit argument 'false'"),
        ("train", ["--save_video", "True"], "unrecognized arguments: True"),
        ("train", ["--seed", "1", "--resume", "yes", "--save_tb"], "unrecognized arguments: yes"),
        ("sweep", ["--dry_run=false"], "ignored explicit argument 'false'"),
        ("sweep", ["--dry_run", "--", "--save_tb", "True"], "unrecognized arguments: True"),
    ],
)
def test_a_value_for_a_flag_without_one(program, flags, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(program).main(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize("kilobytes", [1, 8, 32, 64])
def test_a_disk_that_is_full_is_one_line(tmp_path, kilobytes):
    """Whichever file is the first that cannot be written."""
    flags = [*FAST, "--save_tb", "--save_video", "--save_model", "--save_buffer", "--work_dir", str(tmp_path / "log")]
    command = f"ulimit -f {kilobytes}; exec {shlex.join([sys.executable, 'train.py', *flags])}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    if kilobytes == 1:
        assert result.returncode in (1, 2)
    elif result.returncode == 0:
        assert kilobytes > 8
        return
    assert result.stderr.startswith("train.py: error: ")
    assert str(tmp_path / "log") in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train", ["--work_dir", LONG_NAME]),
        ("train", ["--resume", "--work_dir", LONG_NAME]),
        ("evaluate", [LONG_NAME]),
        ("evaluate", ["somewhere", "--video", LONG_NAME]),
        ("plot", [LONG_NAME]),
        ("plot", ["somewhere", "--out", LONG_NAME]),
        ("sweep", ["--work_dir", LONG_NAME]),
        ("bench", ["all", "--out", LONG_NAME]),
    ],
)
def test_a_name_that_the_system_does_not_accept(program, flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(program).main(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "cannot be used: File name too long" in error
    assert error.count("\n") == 1
