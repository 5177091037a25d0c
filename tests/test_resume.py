"""Runs that are killed, stopped or out of disk go on as if nothing had been; what cannot go on says so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import toy
from folders import assert_gone, checkpoint_of, contents, litter, outcome, step_of
from forked import Forked, fail_at, slow_disk
from programs import Program
from runs import read_log

import train
from errors import UserError
from files import write_index
from support import machine
from support.checkpoint import Lock

LONG = bool(os.environ.get("LONG_TESTS"))
# Episodes of 20 decisions, the first at random; an evaluation after every second; a checkpoint after each.
RUN = (
    "--domain_name cartpole --task_name swingup --action_repeat 50 --image_size 16 --num_layers 2 --num_filters 4 "
    "--hidden_dim 16 --batch_size 8 --init_steps 20 --num_train_steps 85 --eval_freq 40 --num_eval_episodes 2 "
    "--device cpu --eval_workers 1 --checkpoint_minutes 0 --encoder_type identity --decoder_type identity"
).split()
PIXELS = ("--encoder_type", "pixel", "--decoder_type", "pixel")
BRIEF = ("--init_steps", "10", "--num_train_steps", "25")
FOREVER = ("--num_train_steps", "100000")


def run(work_dir, *flags):
    return train.main([*RUN, *flags, "--work_dir", str(work_dir)])


def start(work_dir, *flags, prepare=slow_disk):
    """The same in a process of its own."""

    def prepared():
        prepare()
        return run(work_dir, *flags)

    return Forked(prepared)


def wait_for(process, begin):
    """Reads what a process prints up to a line that begins so."""
    assert any(line.startswith(begin) for line in process.stdout)


def assert_goes_on(work_dir, want, *flags):
    """A resumed run comes to what was wanted, and leaves no litter."""
    assert run(work_dir, *flags, "--resume") == 0
    assert outcome(work_dir) == want
    assert litter(work_dir) == set()


def refusal(capsys, work_dir, *flags):
    """The one line with which a command ends that has changed nothing."""
    before = contents(work_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(work_dir, *flags)
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1), error
    assert contents(work_dir) == before
    return error


def put(folder, *names):
    """Files of someone else."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")


@pytest.fixture(autouse=True, scope="module")
def toy_environment():
    """All runs here but one are on an environment without a simulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", toy.make_toy_env)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_environment):
    """What the run of these flags comes to if it never stops."""

    @functools.cache
    def get(*flags):
        folder = tmp_path_factory.mktemp("uninterrupted") / "log"
        assert run(folder, *flags) == 0
        return outcome(folder)

    return get


@pytest.fixture(scope="module")
def ended(tmp_path_factory, toy_environment):
    """A short run that has ended within an episode, and another one with other random numbers."""
    folders = [tmp_path_factory.mktemp("ended") / "log" for _ in range(2)]
    for seed, folder in enumerate(folders, start=1):
        assert run(folder, "--num_train_steps", "55", "--seed", str(seed)) == 0
    return folders


@pytest.fixture
def log(tmp_path, ended):
    """A copy of the run that has ended."""
    return Path(shutil.copytree(ended[0], tmp_path / "log"))


# Killed and stopped


def test_the_simulator_goes_on_as_well(tmp_path, monkeypatch):
    """A real program on a real task from pixels, stopped and killed in an episode."""
    monkeypatch.setattr(train, "make_env", toy.make_task)
    flags = [*PIXELS, *"--action_repeat 100 --init_steps 15 --num_train_steps 45 --eval_freq 40".split()]
    flags += ["--num_eval_episodes", "1"]
    assert run(tmp_path / "whole", *flags) == 0
    for number, status, episode in ((signal.SIGTERM, 143, "E: 2"), (signal.SIGKILL, -9, "E: 3")):
        process = Program("train.py", *RUN, *flags, "--resume", "--work_dir", tmp_path / "log")
        wait_for(process, f"| train | {episode}")
        time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
    assert_goes_on(tmp_path / "log", outcome(tmp_path / "whole"), *flags)


@pytest.mark.parametrize("kind", ["new", "resumed", "overwritten"])
def test_killed_at_each_step_of_writing(tmp_path, monkeypatch, uninterrupted, ended, kind):
    """Of folders, the old run's move, files, their names: it can be carried on or begun anew, and nothing is lost."""
    monkeypatch.setattr(time, "strftime", lambda _: str(time.time_ns()))  # TIME of WORK_DIR.TIME is never the same
    flags, want = BRIEF, uninterrupted(*BRIEF)
    if kind == "resumed":
        flags = ("--num_train_steps", "65")
        want = uninterrupted(*flags)
    for kill in range(1, 60) if LONG else range(1, 30, 3):
        folder = tmp_path / f"{kill}" / "log"
        if kind != "new":
            shutil.copytree(ended[kind == "overwritten"], folder)
            put(folder / "checkpoint", f"state_{10**18}.pt", ".0_20.pt.sac_ae_tmp")
            with (folder / "train.log").open("a") as file:
                file.write("a line that is c")
        before = set(contents(folder).values())
        flag = "--overwrite" if kind == "overwritten" else "--resume"
        process = start(folder, flag, *flags, prepare=functools.partial(fail_at, kill))
        assert process.communicate()[1] == ""
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        if kind == "overwritten":
            try:
                run(folder, "--resume", *flags)
            except SystemExit:  # the old run is there, or a part of it
                assert run(folder, "--overwrite", *flags) == 0
            assert before <= set(contents(folder.parent).values())
        assert_goes_on(folder, want, *flags)
    assert kill > 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["first an evaluation", "| eval", "| train | E: 1", "| train | E: 2"])
def test_killed_or_stopped_by_a_signal(tmp_path, uninterrupted, phase, number):
    """In an evaluation, the random decisions, the first updates, later; if stopped, with a word of how to go on."""
    kinds = {signal.SIGINT: PIXELS, signal.SIGKILL: ("--save_tb",)}
    folder, flags = tmp_path / "log", kinds.get(number, ())
    process = start(folder, *flags, "--eval_workers", "2" if "evaluation" in phase else "1")
    wait_for(process, phase)
    children = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGKILL:
        time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    _, error = process.communicate()
    assert_gone(children)
    if number == signal.SIGKILL:
        assert (process.returncode, error) == (-number, "")
        time.sleep(1)  # TensorBoard reads files in the order of the seconds in which they were begun
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name} at step" in error
        assert error.count("\n") == 1
    assert_goes_on(folder, uninterrupted(*flags), *flags)


def test_a_closed_terminal(tmp_path):
    """Nobody can read what it prints from then on; the checkpoint is written."""
    folder = tmp_path / "log"
    master, slave = os.openpty()

    def own_terminal():
        os.close(master)
        os.login_tty(slave)

    process = start(folder, *FOREVER, prepare=own_terminal)
    os.close(slave)
    shown = b""
    while b"E: 3 " not in shown:
        shown += os.read(master, 1024)
    step = step_of(folder)
    os.close(master)
    assert process.wait() == 128 + signal.SIGHUP
    assert step_of(folder) > step


def test_an_interrupt_that_ends_the_reader_too(tmp_path):
    """Ctrl-C in `train.py 2>&1 | tee log`."""
    process = start(tmp_path / "log", *FOREVER)
    wait_for(process, "| train | E: 3")
    step = step_of(tmp_path / "log")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    assert step_of(tmp_path / "log") > step


def test_what_was_written_after_the_checkpoint_is_cut(tmp_path, monkeypatch, uninterrupted):
    """Log lines, and TensorBoard's events; videos and models are written again."""
    folder = tmp_path / "log"
    flags = ["--checkpoint_freq", "35", "--checkpoint_minutes", "1000", "--save_tb", "--save_model", "--save_video"]

    def fail():
        raise UserError("a failing disk")

    with monkeypatch.context() as patch:
        fail_at(4, ["begin_episode"], train.Run, fail, patch.setattr)
        assert run(folder, *flags) == 1
    assert [record["step"] for record in read_log(folder / "train.log")][-1] == 60
    assert step_of(folder) == 40
    with (folder / "train.log").open("a") as file:
        file.write('{"half a li')
    assert_goes_on(folder, uninterrupted("--save_tb", "--save_video"), *flags)
    assert {path.name for path in (folder / "video").iterdir()} == {"0.mp4", "40.mp4", "80.mp4"}
    steps = {path.name.split("_")[1] for path in (folder / "model").glob("actor_*")}
    assert steps == {"0.pt", "40.pt", "80.pt", "85.pt"}


@pytest.mark.parametrize(("flags", "steps"), [
    (["--checkpoint_minutes", "0"], [0, 20, 40, 60, 80, 85]),
    (["--checkpoint_minutes", "1000"], [0, 85]),
    (["--checkpoint_minutes", "1000", "--checkpoint_freq", "30", "--save_model", "--save_buffer"],
     [0, 40, 80, 85]),
])  # fmt: skip
def test_when_checkpoints_are_written(tmp_path, monkeypatch, uninterrupted, flags, steps):
    """At the beginning, at ends of episodes, and at the end of the run: neither they nor saved models change it."""
    taken, save = [], train.Run.save_checkpoint
    monkeypatch.setattr(train.Run, "save_checkpoint", lambda run: (taken.append(run.progress.step), save(run)))
    assert run(tmp_path / "log", *flags) == 0
    assert taken == steps
    assert outcome(tmp_path / "log") == uninterrupted()


# Flags


@pytest.mark.parametrize("steps", [55, 60])
def test_more_steps_go_on_where_the_run_ended(tmp_path, uninterrupted, capsys, steps):
    """Also in the middle of an episode: it ends like one that was to be that long from the start."""
    folder = tmp_path / "log"
    assert run(folder, "--num_train_steps", str(steps)) == 0
    assert_goes_on(folder, outcome(folder), "--num_train_steps", str(steps))
    assert f"the run has ended at step {steps}" in capsys.readouterr().out
    assert_goes_on(folder, uninterrupted())
    assert f"note: --num_train_steps was {steps} and is now 85" in capsys.readouterr().out


def test_a_run_of_short_episodes_can_end_earlier(tmp_path, monkeypatch):
    """Its replay then has less room for the frames that begin episodes."""

    def fail():
        raise UserError("a failing disk")

    with monkeypatch.context() as patch:
        fail_at(4, ["begin_episode"], train.Run, fail, patch.setattr)
        assert run(tmp_path, *PIXELS, *FOREVER) == 1
    assert run(tmp_path, *PIXELS, "--resume", "--num_train_steps", "61") == 0
    assert step_of(tmp_path) == 61


def test_changed_flags_outlive_a_kill(log, monkeypatch, capsys):
    """Those that may change are noted; those that are not given stay the run's."""
    flags = ["--resume", "--eval_workers", "1", "--work_dir", str(log)]
    (log / "args.json").unlink()

    def fail(run):
        raise RuntimeError("a bug")

    def notes():
        return [line for line in capsys.readouterr().out.splitlines() if "is now" in line]

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", fail)
        with pytest.raises(RuntimeError) as failed:
            train.main([*flags, "--num_train_steps", "90", "--eval_freq", "20", "--save_model"])
    assert notes() == [
        "note: --eval_freq was 40 and is now 20",
        "note: --num_train_steps was 55 and is now 90",
        "note: --save_model was False and is now True",
    ]
    assert train.main([*flags, "--no-save_model", "--eval_workers", "2"]) == 0
    assert notes() == ["note: --eval_workers was 1 and is now 2", "note: --save_model was True and is now False"]
    assert step_of(log) == 90
    assert [record["step"] for record in read_log(log / "eval.log")] == [0, 40, 60, 80]
    assert checkpoint_of(log)["args"]["hidden_dim"] == 16
    assert failed.value.args == ("a bug",)  # which is still known to this process, but has let go of the lock
    assert (log / "args.json").exists()
    starts = read_log(log / "starts.log")
    assert [record["step"] for record in starts] == [0, 55, 55]
    assert all({"time", "command", "commit", "machine", "gpu", "python", "torch"} <= set(each) for each in starts)


def test_another_number_of_threads_is_told(log, capsys):
    """Sums are then rounded differently."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert run(log, "--resume", "--num_train_steps", "60") == 0
        assert f"note: PyTorch had {threads} threads and now has {threads + 1} " in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    assert run(log, "--resume", "--num_train_steps", "65") == 0
    assert f"note: PyTorch had {threads + 1} threads and now has {threads} " in capsys.readouterr().out
    assert run(log, "--resume", "--num_train_steps", "65") == 0
    assert "threads" not in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (["--hidden_dim", "17"], ["(--hidden_dim 16 is now 17)"]),
    (["--seed", "4", "--task_name", "balance"], ["--seed 1 is now 4", "--task_name swingup is now balance"]),
    (["--num_train_steps", "54"], ["is at step 55, beyond --num_train_steps 54"]),
])  # fmt: skip
def test_flags_that_are_refused(log, capsys, flags, words):
    error = refusal(capsys, log, "--resume", *flags)
    assert all(word in error for word in words)


# Damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {  # done to a file; the other one is of the same kind, of another run
    "one bit changed": lambda path, other: flip_a_bit(path),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "removed": lambda path, other: path.unlink(),
    "replaced by another run's": lambda path, other: path.write_bytes(other.read_bytes()),
    "replaced by other JSON": lambda path, other: path.write_text("[]"),
    "replaced by a folder": lambda path, other: path.unlink() or path.mkdir(),
    "of an older version": lambda path, other: write_index(path, {"version": 2}),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_checkpoints(tmp_path, ended, capsys, harm):
    """Each kind of file in turn: one line that names it, and nothing is changed; never a wrong run."""
    for name in ("checkpoint.json", "state_*.pt", "20_40.pt"):
        folder = Path(shutil.copytree(ended[0], tmp_path / name.strip("*")))
        path, other = (next((run / "checkpoint").glob(name)) for run in (folder, ended[1]))
        HARMS[harm](path, other)
        error = refusal(capsys, folder, "--resume")
        assert path.name in error or (harm == "replaced by another run's" and "--seed 2 is now 1" in error)
        assert ("is of version 2 of this program" in error) == (harm == "of an older version" and name[0] == "c")


@pytest.mark.parametrize("name", ["train.log", "eval.log"])
def test_lost_log_lines(log, capsys, name):
    os.truncate(log / name, 10)
    assert f"{name} is missing or shorter than at the checkpoint" in refusal(capsys, log, "--resume")


def test_files_in_checkpoint_that_are_not_the_runs(log, monkeypatch, capsys):
    """What failed saves left goes at a resume, even of one that has ended; all else stays."""
    mine = {"copy", ".nfs000001", "notes.json", "state_5.pt"}
    put(log / "checkpoint", "copy/0_20.pt", ".nfs000001", "notes.json", "state_5.pt/file")
    put(log / "checkpoint", f"state_{10**18}.pt", "0_7.pt", ".checkpoint.json.sac_ae_tmp", ".0_20.pt.sac_ae_tmp")
    assert run(log, "--resume", "--num_train_steps", "55") == 0
    assert litter(log) == mine
    assert run(log, "--resume", "--num_train_steps", "65") == 0
    assert litter(log) == mine
    assert (log / "checkpoint" / "copy" / "0_20.pt").read_text() == "my copy/0_20.pt"


# Two processes


def test_two_processes_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    """The second is refused while the first is there, before it takes memory, and not after."""
    folder = tmp_path / "log"
    process = start(folder, *FOREVER)
    wait_for(process, "| train | E: 3")
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 0)
    try:
        for flag in ("--resume", "--overwrite"):
            assert f"{folder} is in use by another process" in refusal(capsys, folder, *FOREVER, flag)
    finally:
        process.kill()
        process.communicate()
    assert "more than can be had of host memory" in refusal(capsys, folder, *FOREVER, "--resume")


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_run_that_another_process_has_carried_on_meanwhile(log, monkeypatch, uninterrupted, flag):
    """Between the start and the lock: the index is that of after it."""
    flock = fcntl.flock

    def late(*args):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert run(log, "--resume", "--num_train_steps", "65") == 0
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    assert run(log, flag) == 0
    assert outcome(log) == uninterrupted()
    if flag == "--overwrite":
        (moved,) = log.parent.glob("log.*")
        assert_goes_on(moved, uninterrupted())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, code):
    """Runs go on with a line; another error is told."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = Lock()
    with pytest.raises(UserError, match="error") if code == errno.EIO else contextlib.nullcontext():
        lock.take(tmp_path / "log")
    lock.close()
    assert capsys.readouterr().err.count("has no locks") == (code != errno.EIO)


# --overwrite


# Of any program that names files so: the authors' script, an older version of this one.
OLD = [
    "args.json", "starts.log", "train.log", "eval.log", "tb/events.1", "video/0.mp4", "model/actor_0.pt",
    "buffer/0_1000.pt", "checkpoint/checkpoint.json",
]  # fmt: skip
FOREIGN = ["notes.txt", "seed_2/args.json", "seed_2/checkpoint/checkpoint.json", ".args.json.swp", "trained.log"]


@pytest.mark.parametrize("kind", ["folder", "current folder", "link", "mount point", "parts"])
def test_overwrite_moves_the_runs_own_names(tmp_path, monkeypatch, capsys, uninterrupted, kind):
    """All are moved to WORK_DIR.TIME, which is said; nothing is deleted, and what else is in the folder stays."""
    folder = work_dir = tmp_path / "log"
    mine = OLD[2:6] if kind == "parts" else OLD
    put(folder, *mine, *FOREIGN)
    old = contents(folder)
    if kind == "current folder":
        monkeypatch.chdir(folder)
        work_dir = Path()
    elif kind == "link":
        work_dir = tmp_path / "elsewhere" / "link"
        work_dir.parent.mkdir()
        work_dir.symlink_to(folder)
    elif kind == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    assert run(work_dir, *BRIEF, "--overwrite") == 0
    (moved,) = (folder if kind == "mount point" else tmp_path).glob("log.*")  # a move to another disk could take hours
    names = ", ".join(name.partition("/")[0] for name in mine)
    assert f"moved the run that was in {work_dir} to {moved}: {names}\n" in capsys.readouterr().out
    assert contents(moved) == {name: old[name] for name in mine}
    assert {name: (folder / name).read_bytes() for name in FOREIGN} == {name: old[name] for name in FOREIGN}
    assert work_dir.is_symlink() == (kind == "link")
    assert_goes_on(work_dir, uninterrupted(*BRIEF), *BRIEF)


def test_chunks_of_another_program_stay(tmp_path, capsys):
    """The authors' script names its replay's files so. Without an index they are not of a run that was killed."""
    put(tmp_path / "log", "checkpoint/0_1000.pt")
    before = contents(tmp_path)
    assert "checkpoint.json is missing" in refusal(capsys, tmp_path / "log", *BRIEF, "--resume")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OLD)
def test_what_counts_as_a_run(tmp_path, capsys, uninterrupted, name):
    """Any of the names; without an index there is nothing to resume, except where a run was killed as it began."""
    folder = tmp_path / "log"
    put(folder, name if name != OLD[-1] else f"checkpoint/state_{10**18}.pt", "notes.txt")
    if name.startswith(("tb/", "checkpoint/")):
        assert_goes_on(folder, uninterrupted(*BRIEF), *BRIEF)
    else:
        assert "checkpoint.json is missing" in refusal(capsys, folder, *BRIEF, "--resume")


@pytest.mark.parametrize(
    ("owner", "name", "error", "flag"),
    [
        (train, "SideBySide", UserError("Too many open files"), "--overwrite"),
        (os, "mkdir", OSError(errno.EROFS, "Read-only file system"), "--overwrite"),
        (os, "truncate", OSError(errno.EROFS, "Read-only file system"), "--resume"),
    ],
)
def test_a_start_that_fails_changes_nothing(log, monkeypatch, capsys, owner, name, error, flag):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, name, fail)
    words = error.strerror if isinstance(error, OSError) else str(error)
    assert words in refusal(capsys, log, flag)
    assert not list(log.parent.glob("log.*"))


# Disks


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path, ended, monkeypatch, capsys, uninterrupted):
    """Whichever of its writes fails."""
    more = ("--num_train_steps", "65", "--checkpoint_minutes", "1000", "--checkpoint_freq", "3")

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    for failing in range(1, 40, 1 if LONG else 3):
        folder = Path(shutil.copytree(ended[0], tmp_path / str(failing)))
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            fail_at(failing, ["fsync"], os, fail, patch.setattr)
            if run(folder, *more, "--resume") == 0:
                break
        error = capsys.readouterr().err
        assert "Input/output error" in error
        assert error.count("\n") == 1
        assert step_of(folder) in (55, 60, 65)
        assert_goes_on(folder, uninterrupted("--num_train_steps", "65"), *more)
    assert failing > 12


def test_a_run_in_any_thread(tmp_path):
    """Where Python lets nobody handle signals: in a notebook's worker, in a server."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run(tmp_path / "log", *BRIEF)))
    thread.start()
    thread.join()
    assert statuses == [0]
