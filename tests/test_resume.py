"""Runs that are killed, stopped or out of disk go on as if nothing had been; what cannot go on says so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import termios
import threading
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
import toy
from forked import Forked
from programs import Program
from test_train import open_run, read_log, without_times

import train
from errors import UserError
from files import write_index
from support import machine
from support.signals import STOPPING
from support.work_dir import WorkDir

ROOT = Path(__file__).parent.parent
LONG = bool(os.environ.get("LONG_TESTS"))
# Episodes of 20 decisions, two of them at random; an evaluation after every third; a checkpoint after each.
RUN = (
    "--domain_name cartpole --task_name swingup --action_repeat 50 --image_size 16 --num_layers 2 --num_filters 4 "
    "--hidden_dim 16 --batch_size 8 --init_steps 40 --num_train_steps 250 --eval_freq 60 --num_eval_episodes 2 "
    "--device cpu --eval_workers 1 --checkpoint_minutes 0 --encoder_type identity --decoder_type identity"
).split()
PIXELS = ("--encoder_type", "pixel", "--decoder_type", "pixel")


def tensors_of(state, name=""):
    """All tensors in a nest of dictionaries and lists, by path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors_of(value, f"{name}/{key}").items()}


def checkpoint_of(work_dir):
    return json.loads((work_dir / "checkpoint" / "checkpoint.json").read_text())["content"]


def step_of(work_dir):
    return checkpoint_of(work_dir)["progress"]["step"]


def outcome(work_dir):
    """Log lines without their times, and the last checkpoint: numbers, and tensors with their bytes."""
    index = checkpoint_of(work_dir)
    state = torch.load(work_dir / "checkpoint" / index["state"][0], weights_only=True)
    run = {key: value for key, value in index["progress"].items() if key != "seconds"}
    run["meters"] = index["logger"]["meters"]
    replay = {key: index["replay"][key] for key in ("oldest", "draws")}
    logs = [without_times(read_log(work_dir / f"{section}.log")) for section in ("train", "eval")]
    return logs, run, replay, {path: tensor.numpy().tobytes() for path, tensor in tensors_of(state).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, toy_environment):
    """What the run of these flags comes to."""
    outcomes = {}

    def get(*flags):
        if flags not in outcomes:
            folder = tmp_path_factory.mktemp("uninterrupted") / "log"
            assert train.main([*RUN, *flags, "--work_dir", str(folder)]) == 0
            outcomes[flags] = outcome(folder)
        return outcomes[flags]

    return get


@pytest.fixture(autouse=True, scope="module")
def toy_environment():
    """All runs here but one are on an environment without a simulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", toy.make_toy_env)
        yield


def start(work_dir, *flags, prepare=forked.slow_disk):
    def run():
        prepare()
        return train.main([*RUN, *flags, "--work_dir", str(work_dir)])

    return Forked(run)


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def family(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


@pytest.mark.parametrize(
    "kind", [("--num_train_steps", "165", *PIXELS), ("--num_train_steps", "600")], ids=["pixel", "state"]
)
def test_killed_at_random_moments(tmp_path, uninterrupted, kind):
    """Again and again, among other moments in the middle of a checkpoint; it ends like one that never stopped."""
    moments, folder, kills = random.Random(len(kind)), tmp_path / "log", 0
    flags = ["--eval_workers", "2" if "pixel" in kind else "1", "--resume", *kind]
    for _ in range(20 if LONG else 3):
        process = start(folder, *flags)
        process.stdout.readline()
        time.sleep(moments.uniform(0, 1.2))
        others = family(process)
        process.kill()
        _, stderr = process.communicate()
        assert_gone(others)
        assert stderr == ""
        kills += process.returncode == -signal.SIGKILL
    assert kills >= (10 if LONG else 2)
    assert train.main([*RUN, *flags, "--eval_workers", "1", "--work_dir", str(folder)]) == 0
    assert outcome(folder) == uninterrupted(*kind)


def test_the_simulator_goes_on_as_well(tmp_path, monkeypatch):
    """A real program on a real task from pixels, stopped and killed in an episode."""
    monkeypatch.setattr(train, "make_env", toy.make_task)
    flags = [*PIXELS, *"--action_repeat 100 --init_steps 15 --num_train_steps 45 --eval_freq 40".split(), "--resume"]
    flags += ["--num_eval_episodes", "1"]
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "whole")]) == 0
    for number, status, line_before in (
        (signal.SIGTERM, 143, "| train | E: 2"),
        (signal.SIGKILL, -9, "| train | E: 3"),
    ):
        process = Program("train.py", *RUN, *flags, "--eval_workers", "2", "--work_dir", tmp_path / "log")
        for line in process.stdout:
            if line.startswith(line_before):
                break
        time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "log")]) == 0
    assert outcome(tmp_path / "log") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kill", range(1, 41) if LONG else [1, 2, 3, 4, 6, 7, 9, 14])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_killed_at_each_step_of_writing(tmp_path, uninterrupted, ended, flag, kill):
    """At the start, too, when the folder is made or another run removed from it: it can always be resumed."""
    folder, short = tmp_path / "log", ("--num_train_steps", "125")
    if flag == "--overwrite":
        shutil.copytree(ended[1], folder)
    process = start(folder, flag, *short, prepare=functools.partial(forked.die_at, kill))
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGKILL
    if flag == "--overwrite" and kill < 5:  # the other run may still be there, whole
        assert train.main([*RUN, *short, "--overwrite", "--work_dir", str(folder)]) == 0
    else:
        assert train.main([*RUN, *short, "--resume", "--work_dir", str(folder)]) == 0
    assert outcome(folder) == uninterrupted(*short)


PHASES = {
    "evaluation": lambda line: line.startswith("first an evaluation"),
    "random steps": lambda line: line.startswith("| eval"),
    "burst": lambda line: line.startswith("| train | E: 2"),
    "updates": lambda line: line.startswith("| train | E: 4"),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [*itertools.product(PHASES, (signal.SIGTERM, signal.SIGINT)), ("burst", signal.SIGHUP)],
)
def test_stopped_by_a_signal(tmp_path, uninterrupted, phase, number):
    """Soon, with a word of how to go on; and it goes on."""
    folder, kind = tmp_path / "log", ("--num_train_steps", "165", *(PIXELS if number == signal.SIGTERM else ()))
    process = start(folder, "--eval_workers", "2", *kind, "--resume")
    for line in process.stdout:
        if PHASES[phase](line):
            break
    others = family(process)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert_gone(others)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} at step" in stderr
    assert stderr.count("\n") == 1
    assert WorkDir(folder).checkpoint.exists()
    assert train.main([*RUN, *kind, "--resume", "--work_dir", str(folder)]) == 0
    assert outcome(folder) == uninterrupted(*kind)


def test_a_stop_that_nobody_can_read_of(tmp_path):
    """In `train.py 2>&1 | tee log`, Ctrl-C ends the reader, too."""
    process = start(tmp_path / "log", "--num_train_steps", "100000")
    for line in process.stdout:
        if line.startswith("| train | E: 4"):
            break
    process._stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert WorkDir(tmp_path / "log").checkpoint.exists()


def test_a_closed_terminal(tmp_path):
    """The run is told, perhaps twice, has nowhere to print to, and writes its checkpoint all the same."""
    master, slave = os.openpty()

    def own_terminal():
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(slave, descriptor)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.close(slave)
        os.close(master)

    process = start(tmp_path / "log", "--num_train_steps", "100000", prepare=own_terminal)
    os.close(slave)
    shown = b""
    while b"E: 3 " not in shown:
        shown += os.read(master, 1024)
    step = step_of(tmp_path / "log")
    os.close(master)
    assert process.wait() == 128 + signal.SIGHUP
    assert step_of(tmp_path / "log") > step


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path / "log", "--num_train_steps", "100000", "--num_eval_episodes", "50")
    for line in process.stdout:
        if line.startswith("first an evaluation"):
            break
    process.send_signal(signal.SIGSTOP)  # so that the two do not come one after the other is handled
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 143, 130)


@pytest.mark.parametrize("steps", [95, 100])
def test_more_steps_go_on_where_the_run_ended(tmp_path, uninterrupted, capsys, steps):
    """Also in the middle of an episode: it ends like one that was to be that long from the start."""
    folder = ["--work_dir", str(tmp_path / "log")]
    assert train.main([*RUN, *PIXELS, "--num_train_steps", str(steps), *folder]) == 0
    before = outcome(tmp_path / "log")
    assert train.main([*RUN, *PIXELS, "--num_train_steps", str(steps), *folder, "--resume"]) == 0
    assert f"the run has ended at step {steps}" in capsys.readouterr().out
    assert outcome(tmp_path / "log") == before
    assert train.main([*RUN, *PIXELS, *folder, "--resume"]) == 0
    assert f"note: --num_train_steps was {steps} and is now 250" in capsys.readouterr().out
    assert outcome(tmp_path / "log") == uninterrupted(*PIXELS)


def test_checkpoints_change_nothing(tmp_path, uninterrupted):
    """Nor does what is written beside."""
    flags = ["--checkpoint_minutes", "1000", "--checkpoint_freq", "70", "--save_model", "--save_buffer", "--save_tb"]
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "log")]) == 0
    assert outcome(tmp_path / "log") == uninterrupted()


@pytest.mark.parametrize(("flags", "steps"), [
    (["--checkpoint_minutes", "0"], [20, 40, 60, 80, 95]),
    (["--checkpoint_minutes", "1000"], [95]),
    (["--checkpoint_minutes", "1000", "--checkpoint_freq", "30"], [40, 80, 95]),
])  # fmt: skip
def test_when_a_checkpoint_is_taken(tmp_path, monkeypatch, flags, steps):
    """At ends of episodes, and when the run ends."""
    taken, save = [], train.Run.save_checkpoint
    monkeypatch.setattr(train.Run, "save_checkpoint", lambda run: (taken.append(run.progress.step), save(run)))
    assert train.main([*RUN, *flags, "--num_train_steps", "95", "--work_dir", str(tmp_path / "log")]) == 0
    assert taken == steps


def test_what_was_written_after_the_checkpoint_is_cut(tmp_path, monkeypatch, uninterrupted):
    """Log lines, and TensorBoard's events; videos and models are written again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, flags = tmp_path / "log", [*RUN, "--checkpoint_freq", "70", "--checkpoint_minutes", "1000"]
    flags += ["--save_tb", "--save_model", "--save_video", "--work_dir", str(tmp_path / "log")]
    log_episode = train.log_episode

    def fail(logger, now, action_repeat):
        log_episode(logger, now, action_repeat)
        if now.step == 140:
            raise UserError("a failing disk")

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_episode", fail)
        assert train.main(flags) == 1
    assert [record["step"] for record in read_log(folder / "train.log")][-1] == 140
    assert step_of(folder) == 80
    with (folder / "train.log").open("a") as file:
        file.write('{"half a li')
    assert train.main([*flags, "--resume"]) == 0
    assert outcome(folder) == uninterrupted()
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/episode_reward")]
    assert steps == [record["step"] for record in read_log(folder / "train.log")]
    assert len(list((folder / "video").iterdir())) == 5
    assert {path.name.split("_")[1] for path in (folder / "model").glob("actor_*")} == {
        "0.pt", "60.pt", "120.pt", "180.pt", "240.pt", "250.pt",
    }  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory, toy_environment):
    """A short run that has ended, and another one with other random numbers."""
    folders = []
    for seed in ("1", "2"):
        folders.append(tmp_path_factory.mktemp("ended") / "log")
        flags = [*RUN, "--num_train_steps", "95", "--seed", seed, "--work_dir", str(folders[-1])]
        assert train.main(flags) == 0
    return folders


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path, _):
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content) // 4, len(content))
    content[place] ^= 1
    path.write_bytes(content)


HARMS = {
    "one bit changed": flip,
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path, _: path.write_bytes(b""),
    "removed": lambda path, _: path.unlink(),
    "replaced by noise": lambda path, _: path.write_bytes(os.urandom(path.stat().st_size)),
    "replaced by another run's": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_checkpoints(tmp_path, ended, capsys, harm):
    """Each file in turn: one line that names it, and nothing is changed; never a wrong run."""
    files = sorted(path.relative_to(ended[0]) for path in (ended[0] / "checkpoint").iterdir())
    assert len(files) == 7  # the index, tensors, five chunks
    for file in files:
        folder = tmp_path / file.name
        shutil.copytree(ended[0], folder)
        others = [path for path in (ended[1] / "checkpoint").iterdir() if path.name[:4] == file.name[:4]]
        HARMS[harm](folder / file, others[0])
        before = contents(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            train.main([*RUN, "--resume", "--work_dir", str(folder)])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert file.name in error or (harm == "replaced by another run's" and "--seed 2 is now 1" in error)
        assert contents(folder) == before


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path, ended, capsys):
    folder = tmp_path / "log"
    shutil.copytree(ended[0], folder)
    write_index(folder / "checkpoint" / "checkpoint.json", checkpoint_of(folder) | {"version": 2})
    before = contents(folder)
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, "--resume", "--work_dir", str(folder)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "checkpoint.json is of version 2 of this program" in error
    assert error.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["train.log", "eval.log"])
def test_lost_log_lines(tmp_path, ended, capsys, name):
    shutil.copytree(ended[0], tmp_path / "log")
    os.truncate(tmp_path / "log" / name, 10)
    before = contents(tmp_path / "log")
    with pytest.raises(SystemExit):
        train.main([*RUN, "--resume", "--work_dir", str(tmp_path / "log")])
    assert f"{name} is missing or shorter than at the checkpoint" in capsys.readouterr().err
    assert contents(tmp_path / "log") == before


@pytest.mark.parametrize(("flags", "words"), [
    (["--hidden_dim", "17"], "--hidden_dim 16 is now 17"),
    (["--task_name", "balance"], "--task_name swingup is now balance"),
    (["--seed", "4", "--batch_size", "9"], "--seed 1 is now 4, --batch_size 8 is now 9"),
    (["--overwrite"], "exclude each other"),
])  # fmt: skip
def test_other_flags_are_refused(ended, capsys, flags, words):
    before = contents(ended[0])
    with pytest.raises(SystemExit):
        train.main([*RUN, *flags, "--resume", "--work_dir", str(ended[0])])
    error = capsys.readouterr().err
    assert sorted(words) == sorted(words) and all(part in error for part in words.split(", "))
    assert error.count("\n") == 1
    assert contents(ended[0]) == before


def test_flags_that_may_change_are_noted(tmp_path, ended, capsys):
    shutil.copytree(ended[0], tmp_path / "log")
    flags = ["--num_train_steps", "130", "--eval_freq", "30", "--save_model", "--resume"]
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "log")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "is now" in line]
    assert notes == [
        "note: --eval_freq was 60 and is now 30",
        "note: --num_train_steps was 95 and is now 130",
        "note: --save_model was False and is now True",
    ]
    flags = ["--num_train_steps", "130", "--no-save_model", "--resume"]
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "log")]) == 0
    assert "note: --save_model was True and is now False" in capsys.readouterr().out.splitlines()
    assert [record["step"] for record in read_log(tmp_path / "log" / "eval.log")] == [0, 60, 100, 120]


def test_resume_starts_where_there_is_nothing(tmp_path, uninterrupted, capsys):
    """An empty folder, or one whose run was killed before its first checkpoint; its flags need not be repeated."""
    folder = tmp_path / "log"
    run, resources = open_run(*RUN, "--resume", "--work_dir", str(folder))
    with resources:
        train.evaluate(run)
    assert (folder / "eval.log").exists()
    flags = "--resume --eval_workers 1 --checkpoint_minutes 5".split()
    assert train.main([*flags, "--work_dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "there is no checkpoint yet" in printed
    assert printed.count("note: --") == printed.count("note: --checkpoint_minutes was 0.0 and is now 5.0") == 1
    assert outcome(folder) == uninterrupted()


SAVING = ["--save_tb", "--save_model", "--save_buffer", "--save_video"]
# Named as no run names its files, and as only TensorBoard does, each time anew.
BESIDE = (
    *(
        "notes.txt",
        ".args.json.tmp",
        "tb/events.out.tfevents.1.mine",
        "tb/old/events",
        "video/best.mp4",
        "video/.a.tmp",
    ),
    *("model/actor_best.pt", "model/old/actor_0.pt", "buffer/notes", "buffer/.0_10.pt.tmp", "checkpoint/copy.json"),
    *("checkpoint/.a.tmp", ".checkpoint.tmp/mine"),
)
IN_THE_WAY = (
    *("video/123.mp4", "model/actor_123.pt", "model/target_0.pt", "buffer/123_456.pt", "checkpoint/0_10.pt"),
    "checkpoint/state_0.pt",
)


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def authors_run(folder):
    """As the authors' script leaves it."""
    names = ("train.log", "eval.log", "video/0.mp4", "model/actor_0.pt", "model/critic_0.pt", "buffer/0_1000.pt")
    put(folder, "args.json", *names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy_environment):
    """A run that saves all it can."""
    folder = tmp_path_factory.mktemp("saved") / "log"
    assert train.main([*RUN, *SAVING, "--num_train_steps", "65", "--seed", "2", "--work_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("state", ["ended", "no checkpoint yet"])
def test_what_others_put_beside_a_run_stays(tmp_path, saved, capsys, state):
    """All that the run has written is removed, nothing else."""
    folder, flags = tmp_path / "log", [*RUN, "--num_train_steps", "45", "--work_dir", str(tmp_path / "log")]
    shutil.copytree(saved, folder)
    flags.append("--overwrite" if state == "ended" else "--resume")
    if state != "ended":
        args = checkpoint_of(folder)["args"] | {"seed": 1} | {flag.removeprefix("--"): False for flag in SAVING}
        WorkDir(folder).checkpoint.write(args, progress=None)
    put(folder, *BESIDE)
    assert train.main(flags) == 0
    theirs = {path for path in contents(folder) if (folder / path).read_text(errors="replace") == "mine"}
    assert theirs == set(map(Path, BESIDE))
    fresh = tmp_path / "fresh"
    assert train.main([*RUN, "--num_train_steps", "45", "--work_dir", str(fresh)]) == 0

    assert contents(folder).keys() - theirs == contents(fresh).keys()
    assert outcome(folder) == outcome(fresh)


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_a_run_would_overwrite_is_refused(tmp_path, saved, capsys, name):
    """Before anything is removed, though it is named as a run's files are."""
    shutil.copytree(saved, tmp_path / "log")
    (tmp_path / "log" / name).unlink(missing_ok=True)
    record = tmp_path / "log" / ".run_files"
    record.write_text(record.read_text().replace(f"{name}\n", ""))
    put(tmp_path / "log", name)
    before = contents(tmp_path / "log")
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, *SAVING, "--overwrite", "--work_dir", str(tmp_path / "log")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"files that its run has not written ({name})" in error
    assert error.count("\n") == 1
    assert contents(tmp_path / "log") == before


@pytest.mark.parametrize("name", ["video/60.mp4", "model/critic_60.pt", "buffer/0_60.pt", "checkpoint/60_65.pt"])
def test_what_is_put_in_the_way_of_a_run_stays(tmp_path, monkeypatch, capsys, name):
    """A line, and the run can go on when it is moved away."""
    folder = tmp_path / "log"
    flags = [*RUN, *SAVING, "--num_train_steps", "65", "--work_dir", str(folder)]
    log_episode = train.log_episode

    def put_once(logger, now, action_repeat):
        log_episode(logger, now, action_repeat)
        if now.step == 60:
            put(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_episode", put_once)
        assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert (folder / name).read_text() == "mine"
    (folder / name).unlink()
    assert train.main([*flags, "--resume"]) == 0


def test_a_copy_without_the_list_of_files_goes_on(tmp_path, ended):
    """As `cp -r log/* copy` makes one: checkpoints replace each other there as in the run itself."""
    folder = tmp_path / "log"
    shutil.copytree(ended[0], folder)
    (folder / ".run_files").unlink()
    more = ["--num_train_steps", "300", "--checkpoint_freq", "25", "--resume", "--work_dir", str(folder)]
    assert train.main([*RUN, *more]) == 0
    held = [path.name for path in (folder / "checkpoint").glob("state_*.pt")]
    assert len(held) == 1


def test_a_damaged_list_of_files_is_named(tmp_path, ended, capsys):
    folder = tmp_path / "log"
    shutil.copytree(ended[0], folder)
    (folder / ".run_files").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, "--num_train_steps", "300", "--resume", "--work_dir", str(folder)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert ".run_files is damaged" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("kind", ["authors", "no list"])
def test_a_run_of_another_program_stays(tmp_path, ended, capsys, kind, flag):
    """Without a list of the run's files none counts as the run's."""
    folder = tmp_path / "log"
    if kind == "authors":
        authors_run(folder)
    else:
        shutil.copytree(ended[0], folder)
        (folder / ".run_files").unlink()
        shutil.rmtree(folder / "checkpoint")
    before = contents(folder)
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, flag, "--work_dir", str(folder)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "holds files that its run has not written (args.json, " in error
    assert error.endswith("move them away, or choose another work_dir\n")
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["no folder", "no index"])
def test_a_run_without_a_checkpoint_is_not_resumed(tmp_path, ended, capsys, kind):
    """Nothing is removed; the line says what to do, and that works."""
    folder = tmp_path / "log"
    shutil.copytree(ended[0], folder)
    shutil.rmtree(folder / "checkpoint")
    if kind == "no index":
        shutil.copytree(ended[0] / "checkpoint", folder / "checkpoint")
        (folder / "checkpoint" / "checkpoint.json").unlink()
    before = contents(folder)
    flags = [*RUN, "--num_train_steps", "45", "--work_dir"]
    with pytest.raises(SystemExit) as exit_:
        train.main([*flags, str(folder), "--resume"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "checkpoint.json is missing" in error
    assert "choose another work_dir, or --overwrite it" in error
    assert error.count("\n") == 1
    assert contents(folder) == before
    assert train.main([*flags, str(tmp_path / "other"), "--resume"]) == 0
    assert train.main([*flags, str(folder), "--overwrite"]) == 0
    assert outcome(folder) == outcome(tmp_path / "other")
    assert not (folder / "model").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Any process goes on."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    WorkDir(tmp_path / "log").lock().close()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_processes_do_not_share_a_folder(tmp_path, capsys, flag):
    """The second is refused while the first is there, and not after."""
    folder = tmp_path / "log"
    process = start(folder, "--num_train_steps", "100000")
    for line in process.stdout:
        if line.startswith("| train | E: 4"):
            break
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, flag, "--num_train_steps", "100000", "--work_dir", str(folder)])
    assert exit_.value.code == 2
    assert f"{folder} is in use by another process" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert train.main([*RUN, flag, "--work_dir", str(folder)]) == 0


def test_a_run_that_is_under_way_is_named_before_the_memory_that_it_takes(tmp_path, ended, monkeypatch, capsys):
    """Else the line would advise a smaller replay."""
    shutil.copytree(ended[0], tmp_path / "log")
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 0)
    flags = ["--resume", "--num_train_steps", "130", "--work_dir", str(tmp_path / "log")]
    for held, words in ((True, "is in use by another process"), (False, "more than can be had of host memory")):
        with WorkDir(tmp_path / "log").lock() if held else contextlib.nullcontext(), pytest.raises(SystemExit):
            train.main(flags)
        assert words in capsys.readouterr().err


def test_a_refused_overwrite_removes_nothing(tmp_path, ended, capsys, monkeypatch):
    shutil.copytree(ended[1], tmp_path / "log")
    before = contents(tmp_path / "log")

    def fail(*_):
        raise UserError("Too many open files")

    monkeypatch.setattr(train, "SideBySide", fail)
    with pytest.raises(SystemExit):
        train.main([*RUN, "--overwrite", "--work_dir", str(tmp_path / "log")])
    assert "Too many open files" in capsys.readouterr().err
    assert contents(tmp_path / "log") == before


def test_flags_that_are_not_given_stay_the_runs(tmp_path, ended, capsys):
    shutil.copytree(ended[0], tmp_path / "log")
    flags = ["--resume", "--num_train_steps", "130", "--eval_workers", "1", "--work_dir", str(tmp_path / "log")]
    assert train.main(flags) == 0
    assert "note: --num_train_steps was 95 and is now 130" in capsys.readouterr().out
    assert step_of(tmp_path / "log") == 130
    with pytest.raises(SystemExit):
        train.main(["--resume", "--num_train_steps", "129", "--work_dir", str(tmp_path / "log")])
    assert "is at step 130, beyond --num_train_steps 129" in capsys.readouterr().err


def test_changed_flags_outlive_a_kill(tmp_path, ended, monkeypatch, capsys):
    """Though no checkpoint has followed them."""
    shutil.copytree(ended[0], tmp_path / "log")
    command = ["--resume", "--eval_workers", "1", "--work_dir", str(tmp_path / "log")]

    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", killed)
        train.main([*command, "--num_train_steps", "130", "--eval_freq", "50"])
    capsys.readouterr()
    assert train.main(command) == 0
    assert "note:" not in capsys.readouterr().out
    assert step_of(tmp_path / "log") == 130
    assert [record["step"] for record in read_log(tmp_path / "log" / "eval.log")][-1] == 100


def test_starts_are_recorded(ended):
    """When, by what command, with which versions."""
    records = read_log(ended[0] / "starts.log")
    assert [record["step"] for record in records] == [0]
    assert records[0]["torch"] == torch.__version__
    assert len(records[0]["commit"]) >= 7
    assert {"time", "command", "machine", "gpu", "python", "mujoco"} <= set(records[0])


@pytest.mark.parametrize("content", ["", "{}", "[]", "noise"])
def test_damaged_index_of_a_saved_replay(tmp_path, ended, capsys, content):
    """--save_buffer finds something else in its place: a line, and it stays."""
    shutil.copytree(ended[0], tmp_path / "log")
    (tmp_path / "log" / "buffer").mkdir()
    (tmp_path / "log" / "buffer" / "replay.json").write_text(content)
    flags = [*RUN, "--resume", "--save_buffer", "--work_dir", str(tmp_path / "log")]
    assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert "replay.json was not written by this program: move it away" in error
    assert error.count("\n") == 1
    assert (tmp_path / "log" / "buffer" / "replay.json").read_text() == content


def test_overwrite_removes_the_run_and_nothing_else(tmp_path, ended, capsys):
    folder = tmp_path / "log"
    shutil.copytree(ended[1], folder)
    (folder / "notes.txt").write_text("mine")
    assert train.main([*RUN, "--num_train_steps", "95", "--overwrite", "--work_dir", str(folder)]) == 0
    assert f"removed from {folder}: args.json, starts.log, train.log, eval.log, checkpoint" in capsys.readouterr().out
    assert outcome(folder) == outcome(ended[0])
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leaves no room on a disk."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    ("owner", "place"),
    [(train.Run, "save_checkpoint"), (train, "log_episode"), (train.Run, "save_video"), (train.Run, "save_models")],
)
def test_full_disk(small_disk, uninterrupted, monkeypatch, capsys, owner, place):
    """One line; the last good checkpoint stays, and the run goes on from it when there is room again."""
    disk, calls = small_disk, []
    flags = [*RUN, "--save_video", "--save_model", "--save_tb", "--work_dir", str(disk / "log")]
    function = getattr(owner, place)

    def full(*args):
        calls.append(place)
        if len(calls) == (7 if place in ("save_checkpoint", "log_episode") else 3):
            fill(disk)
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, full)
        assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert "No space left on device: " in error or "mp4" in error
    assert error.count("\n") == 1, error
    assert step_of(disk / "log") >= 80
    (disk / "filler").unlink()
    assert train.main([*flags, "--resume"]) == 0
    assert outcome(disk / "log") == uninterrupted()


def test_read_only_disk(small_disk, uninterrupted, monkeypatch, capsys):
    disk = small_disk
    flags = [*RUN, "--work_dir", str(disk / "log")]
    log_episode = train.log_episode

    def turn_read_only(logger, now, action_repeat):
        if now.step == 120:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        log_episode(logger, now, action_repeat)

    with monkeypatch.context() as patch:
        patch.setattr(train, "log_episode", turn_read_only)
        assert train.main(flags) == 1
    assert capsys.readouterr().err.count("Read-only file system") == 1
    with pytest.raises(SystemExit):
        train.main([*flags, "--resume"])
    assert capsys.readouterr().err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert train.main([*flags, "--resume"]) == 0
    assert outcome(disk / "log") == uninterrupted()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path, monkeypatch, capsys, uninterrupted):
    """Whichever of its writes fails."""
    fsync, short = os.fsync, ("--num_train_steps", "95")
    for failing in range(1, 15):
        folder = tmp_path / str(failing)
        flags = [*RUN, *short, "--checkpoint_freq", "30", "--checkpoint_minutes", "1000", "--work_dir", str(folder)]
        calls = []

        def fail(descriptor, calls=calls, failing=failing):
            calls.append(descriptor)
            # Those of the start (two lists, checkpoint.json, args.json), of the first checkpoint, of the second one.
            if len(calls) == 8 + 12 + failing:
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            assert train.main(flags) == 1
        assert "Input/output error" in capsys.readouterr().err
        assert step_of(folder) in (40, 80)
        assert train.main([*flags, "--resume"]) == 0
        assert outcome(folder) == uninterrupted(*short)


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_programs_run_in_any_thread(tmp_path, ended, program):
    """Where Python lets nobody handle signals: in a notebook's worker, in a server."""
    import evaluate

    folder, statuses, handlers = tmp_path / "log", [], [signal.getsignal(number) for number in STOPPING]
    shutil.copytree(ended[1], folder)
    if program == "train":
        flags = [*RUN, "--num_train_steps", "95", "--overwrite", "--work_dir", str(folder)]
        work = functools.partial(train.main, flags)
    else:
        flags = ["--episodes", "1", "--device", "cpu", "--eval_workers", "2", "--video", str(tmp_path / "a.mp4")]
        work = functools.partial(evaluate.main, [str(folder), *flags])
    thread = threading.Thread(target=lambda: statuses.append(work()))
    thread.start()
    thread.join()
    assert statuses == [0]
    assert program == "evaluate" or outcome(folder) == outcome(ended[0])
    assert [signal.getsignal(number) for number in STOPPING] == handlers


@pytest.mark.parametrize(("owner", "name"), [(Path, "unlink"), (os, "truncate")])
def test_a_file_that_cannot_be_changed_is_one_line(tmp_path, ended, monkeypatch, capsys, owner, name):
    shutil.copytree(ended[0], tmp_path / "log")
    with (tmp_path / "log" / "train.log").open("a") as file:
        file.write("more")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(owner, name, refuse)
    flag = "--overwrite" if name == "unlink" else "--resume"
    with pytest.raises(SystemExit) as exit_:
        train.main([*RUN, "--num_train_steps", "95", flag, "--work_dir", str(tmp_path / "log")])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Read-only file system: " in error
    assert error.count("\n") == 1
