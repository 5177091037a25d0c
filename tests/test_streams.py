"""What a shell gives a program: standard streams, words, paths, a full disk, signals."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from events import read_events
from programs import run_program
from runs import METHODS, SMALL, read_log

import train
from support import signals

ROOT = Path(__file__).parent.parent
# Three episodes of 10 decisions, evaluations at the start and after the second.
FAST = "--action_repeat 100 --init_steps 15 --num_train_steps 30 --eval_freq 20 --num_eval_episodes 2".split()
FAST = [*SMALL, *METHODS["sac_state"], *FAST]
SAVE = ["--save_tb", "--save_video", "--save_model", "--save_buffer"]


def run_process(*words, redirect):
    """A Python program's end, in a process of its own with the shell's redirections, from the project's folder."""
    command = f"exec {shlex.join([sys.executable, *map(str, words)])} {redirect}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_training_without_standard_streams(tmp_path):
    """Nothing of what would be printed gets into a file instead."""
    flags = [*FAST, *SAVE, "--eval_workers", 2, "--work_dir", tmp_path]
    assert run_process("train.py", *flags, redirect="<&- >&- 2>&-").returncode == 0
    assert [record["step"] for record in read_log(tmp_path / "train.log")] == [10, 20, 30]
    assert "eval/video" in read_events(tmp_path).Tags()["images"]


def test_a_closed_stream_is_not_the_next_file():
    program = (
        "from support import signals; signals.start_program()\n"
        "import os, sys\n"
        "assert open('/dev/null', 'w').fileno() > 2\n"
        "print('printed'); print('printed', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "assert os.system('echo printed; echo printed >&2') == 0"
    )
    assert run_process("-c", program, redirect="<&- >&- 2>&-").returncode == 0


@pytest.mark.parametrize("words", ["plot.py FOLDER --out FOLDER/plots", "sweep.py --dry_run", "bench.py act"])
def test_an_output_that_is_full_is_one_line(tmp_path, words):
    if "FOLDER" in words:
        assert train.main([*FAST, "--num_train_steps", "2", "--work_dir", str(tmp_path / "run")]) == 0
    result = run_process(*words.replace("FOLDER", str(tmp_path)).split(), redirect=">/dev/full")
    error = f"{words.split()[0]}: error: [Errno 28] No space left on device\n"
    assert (result.returncode, result.stderr) == (1, error)


@pytest.mark.parametrize("kilobytes", [1, 8, 32])
def test_a_disk_that_is_full_is_one_line(tmp_path, kilobytes):
    """Whichever file is the first that cannot be written."""
    result = run_program("train.py", *FAST, *SAVE, "--work_dir", tmp_path / "log", largest_file=1024 * kilobytes)
    if kilobytes > 8 and result.returncode == 0:
        return
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("train.py: error: ")
    assert str(tmp_path / "log") in result.stderr
    assert result.stderr.count("\n") == 1


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    flags = [*FAST, "--save_tb", "--work_dir", tmp_path / "書é"]
    result = run_program("train.py", *flags, PYTHONIOENCODING="ascii:strict")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{tmp_path}/\\u66f8\\xe9" in result.stdout
    assert "eval/episode_reward" in read_events(tmp_path / "書é").Tags()["scalars"]


def test_a_home_folder_is_expanded(tmp_path):
    assert run_program("train.py", *FAST, "--num_train_steps=2", "--work_dir=~/x", HOME=str(tmp_path)).returncode == 0
    assert (tmp_path / "x" / "args.json").exists()


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_that_asks_to_stop(monkeypatch, capsys, number):
    """The system may repeat it. After it, Ctrl-C or SIGTERM would end the program at once."""
    silenced, stop = [], signals.Stop()
    monkeypatch.setattr(signals, "silence", silenced.append)
    monkeypatch.setattr("os.isatty", lambda descriptor: descriptor == 2)
    handlers = [signal.getsignal(each) for each in signals.STOPPING]
    with stop.listen():
        stop.check()
        for _ in range(1 if number in (signal.SIGINT, signal.SIGTERM) else 3):
            signal.raise_signal(number)
        defaults = [each for each in signals.STOPPING if signal.getsignal(each) is signal.SIG_DFL]
        assert defaults == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(signals.Stopped):
            stop.check()
    assert set(silenced) == ({2} if number == signal.SIGHUP else set())
    assert [signal.getsignal(each) for each in signals.STOPPING] == handlers
    assert stop.exit_status("prog", ": more") == 128 + number
    assert capsys.readouterr().err == f"prog: stopped by {number.name}: more\n"


def test_a_signal_that_nohup_ignores_stays_ignored():
    stop = signals.Stop()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.listen():
            signal.raise_signal(signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)
