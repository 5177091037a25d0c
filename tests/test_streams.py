"""Programs whose standard streams are closed or narrow, whose paths are odd, and whose disk is full."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_program
from test_logger import read_events
from test_train import METHODS, SMALL, read_log

import train

ROOT = Path(__file__).parent.parent
LONG_NAME = 300 * "x"
LONG = bool(os.environ.get("LONG_TESTS"))
# Three episodes of 10 decisions, evaluations at the start and after the second.
FAST = [
    *SMALL,
    *METHODS["sac_state"],
    *"--action_repeat 100 --init_steps 15 --num_train_steps 30 --eval_freq 20".split(),
]
FAST += ["--num_eval_episodes", "1"]


def run_process(program, *flags, redirect=""):
    """A program's end, in a process of its own with the shell's redirections, from the project's folder."""
    words = [sys.executable, program, *map(str, flags)]
    return subprocess.run(
        ["bash", "-c", f"exec {shlex.join(words)} {redirect}"], cwd=ROOT, capture_output=True, text=True
    )


def run_closed(program, *flags, closed, real=LONG):
    """A program's end whose standard streams of these numbers are closed; `real` does without the short cut."""
    if real:
        return run_process(program, *flags, redirect=" ".join(f"{number}>&-" for number in closed))
    return run_program(program, *flags, closed=closed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on states with models; tests must not write there."""
    folder = tmp_path_factory.mktemp("streams") / "run"
    assert train.main([*FAST, "--save_model", "--work_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("closed", "real"),
    [((0, 1, 2), True), ((2,), LONG), *([((0,), True), ((1,), True)] if LONG else [])],
)
def test_training_without_standard_streams(tmp_path, closed, real):
    """Nothing of what would be printed gets into a file instead."""
    work_dir = tmp_path / "log"
    workers = 2 if real else 1
    flags = [
        *FAST,
        "--save_tb",
        "--save_video",
        "--save_model",
        "--num_eval_episodes",
        workers,
        "--eval_workers",
        workers,
    ]
    flags += ["--work_dir", work_dir]
    result = run_closed("train.py", *flags, closed=closed, real=real)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("done: 30 decisions" in result.stdout) == (1 not in closed)
    assert [record["step"] for record in read_log(work_dir / "train.log")] == [10, 20, 30]
    assert "eval/video" in read_events(work_dir).Tags()["images"]
    assert sorted(path.suffix for path in (work_dir / "video").iterdir()) == [".mp4"] * 2


@pytest.mark.parametrize("closed", [(0, 1, 2), *([(2,)] if LONG else [])])
@pytest.mark.parametrize("program", ["evaluate.py", "plot.py", "sweep.py"])
def test_other_programs_without_standard_streams(run, tmp_path, program, closed):
    flags = {
        "evaluate.py": [run, "--episodes", 2, "--eval_workers", 2, "--device", "cpu"],
        "plot.py": [run, "--out", tmp_path / "plots"],
        "sweep.py": ["--tasks", "cartpole_swingup", "--work_dir", tmp_path / "sweep", "--dry_run"],
    }[program]
    result = run_closed(program, *flags, closed=closed)
    assert (result.returncode, result.stderr) == (0, "")
    if program == "plot.py":
        assert (tmp_path / "plots" / "scores.md").exists()


@pytest.mark.parametrize("words", ["plot.py FOLDER --out FOLDER/plots", "sweep.py --dry_run", "bench.py act"])
def test_an_output_that_is_full_is_one_line(run, tmp_path, words):
    shutil.copytree(run, tmp_path / "run")
    result = run_process(*words.replace("FOLDER", str(tmp_path)).split(), redirect=">/dev/full")
    program = words.split()[0]
    error = f"{program}: error: [Errno 28] No space left on device\n"
    assert (result.returncode, result.stderr) == (1, error)


def test_a_closed_stream_is_not_the_next_file():
    program = (
        "from support import signals; signals.start_program()\n"
        "import os, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "assert file.fileno() > 2\n"
        "print('printed'); print('printed', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "assert os.system('echo printed; echo printed >&2') == 0"
    )
    assert run_process("-c", program, "/dev/null", redirect="<&- >&- 2>&-").returncode == 0


def test_tensorboard_with_letters_of_another_alphabet(tmp_path):
    result = run_program(
        "train.py", *FAST, "--save_tb", "--work_dir", tmp_path / "書é", PYTHONIOENCODING="ascii:strict"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "eval/episode_reward" in read_events(tmp_path / "書é").Tags()["scalars"]


@pytest.mark.parametrize("encoding", ["ascii:strict", *(["utf-8:strict"] if LONG else [])])
def test_paths_that_cannot_be_shown(tmp_path, encoding):
    """A byte of Latin-1 and a letter of another alphabet: everything is written, resumed, played and drawn."""
    work_dir = Path(os.fsdecode(os.fsencode(tmp_path) + "/bücher ".encode("latin-1") + "é書".encode()))
    flags = [*FAST, "--save_video", "--save_model", "--save_buffer", "--work_dir", work_dir]
    environment = {"PYTHONIOENCODING": encoding}
    refused = run_program("train.py", *flags, "--save_tb", **environment)
    assert refused.returncode == 2
    assert refused.stderr.endswith("TensorBoard cannot read it: leave save_tb out\n")
    assert not work_dir.exists()
    results = [
        run_program("train.py", *flags, **environment),
        run_program("train.py", *flags, "--resume", "--num_train_steps", 40, **environment),
        run_program("evaluate.py", work_dir, "--episodes", 1, "--video", work_dir / "é.mp4", **environment),
        run_program("plot.py", work_dir, "--out", work_dir / "plots", **environment),
    ]
    for result in results:
        assert (result.returncode, result.stderr) == (0, ""), result
    refused = run_program("train.py", *flags, **environment)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
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
    assert f"--work_dir {tmp_path}/s/" in result.stdout
    result = run_program("train.py", "--work_dir=~nobody_of_that_name/x")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no such user: ~nobody_of_that_name" in result.stderr


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("train", ["--save_tb=false"], "--save_tb takes no value, not false: write --save_tb or --no-save_tb"),
        ("train", ["--save_video", "True"], "--save_video takes no value, not True: write --save_video or --no-"),
        ("train", ["--seed", "1", "--resume", "yes", "--save_tb"], "write --resume or --no-resume"),
        ("train", ["--no-save_model=1"], "--no-save_model takes no value, not 1"),
        ("sweep", ["--dry_run=false"], "write --dry_run or --no-dry_run"),
        ("sweep", ["--dry_run", "True"], "write --dry_run or --no-dry_run"),
        ("sweep", ["--dry_run", "--", "--save_tb", "True"], "write --save_tb or --no-save_tb"),
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
    result = run_program("train.py", *flags, largest_file=1024 * kilobytes)
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
