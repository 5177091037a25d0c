"""Small runs, what they log, and how they are refused: shared by tests."""

from __future__ import annotations

import contextlib
import json

import pytest

import train
from support.checkpoint import Lock, parse_run
from utils import FrameStack

SMALL = (
    "--domain_name cartpole --task_name swingup --action_repeat 8 --image_size 32 --num_layers 2 --num_filters 8 "
    "--hidden_dim 32 --batch_size 8 --init_steps 25 --num_train_steps 60 --eval_freq 40 --num_eval_episodes 2 "
    "--device cpu --eval_workers 1"
).split()
METHODS = {
    "sac_ae": [],
    "sac_pixel": ["--decoder_type", "identity"],
    "sac_state": ["--encoder_type", "identity", "--decoder_type", "identity"],
}
# For environments without a simulator.
TOY = "--num_layers 2 --num_filters 2 --hidden_dim 8 --batch_size 4 --num_eval_episodes 1 --image_size 24".split()
TOY += "--device cpu --eval_workers 1".split()


def read_log(path):
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records):
    """What two runs of the same seed have in common."""
    times = ("duration", "decisions_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records]


@contextlib.contextmanager
def open_run(*flags):
    """A run as the command line makes it, before its first decision."""
    with contextlib.ExitStack() as resources:
        lock = resources.enter_context(contextlib.closing(Lock()))
        args, saved = parse_run(train.make_parser(), flags, lock)
        yield train.open_run(args, saved, lock, resources)[0]


def run_toy(tmp_path, monkeypatch, make_env, *flags, name="log"):
    """A run of the loop in an environment that observes frames; returns it after the end."""
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(make_env(), args.frame_stack))
    with open_run(*TOY, *flags, "--work_dir", str(tmp_path / name)) as run:
        train.train(run)
        run.save_checkpoint()
    return run


def assert_refused(capsys, flags, words, program=train):
    """The program says why it cannot begin, in one line, and exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        program.main(flags)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert ": error: " in printed.err
    assert printed.err.count("\n") == 1
    assert words in printed.err
