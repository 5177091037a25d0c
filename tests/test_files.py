"""Files are whole or not there, whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import stat

import psutil
import pytest
from folders import largest_file
from runs import METHODS, TOY
from toy import make_toy_env

import train
from errors import UserError
from files import write_atomically, write_index, write_json


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_of_fsync(tmp_path, monkeypatch, kind, number):
    """Some file systems cannot sync a folder; any other error means that the file may be lost."""
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (kind == "folder"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    harmless = kind == "folder" and number in (errno.EINVAL, errno.ENOTSUP)
    open_files = psutil.Process().num_fds()
    with contextlib.nullcontext() if harmless else pytest.raises(UserError, match=f"{tmp_path}/new/file"):
        write_atomically(tmp_path / "new" / "file", b"content")
    assert psutil.Process().num_fds() == open_files
    assert [path.name for path in (tmp_path / "new").iterdir()] == (["file"] if kind == "folder" else [])


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_disk_that_is_full_keeps_what_was_there(tmp_path, old):
    path = tmp_path / "file.json"
    if old:
        path.write_bytes(old)
    with largest_file(10), pytest.raises(UserError, match=f"{path}"):
        write_json(path, {"flag": 12345678901})
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_the_flags_of_a_run_are_whole_or_missing(tmp_path, monkeypatch, capsys, flags):
    """The disk is full after the first checkpoint, or at a resume; with room the run goes on."""
    monkeypatch.setattr(train, "make_env", make_toy_env)
    command = [*TOY, *METHODS["sac_state"], *"--init_steps 100 --num_train_steps 20 --work_dir".split(), str(tmp_path)]
    if flags:
        assert train.main(command) == 0

    def write_index_and_fill_the_disk(*content):
        write_index(*content)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    with largest_file(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr("support.checkpoint.write_index", write_index_and_fill_the_disk)
        with pytest.raises(SystemExit):
            train.main([*command, "--num_train_steps", "30", *flags])
    args = tmp_path / "args.json"
    assert str(args) in capsys.readouterr().err
    assert json.loads(args.read_text())["num_train_steps"] == 20 if flags else not args.exists()
    assert train.main([*command, "--num_train_steps", "30", "--resume"]) == 0
    assert json.loads(args.read_text())["num_train_steps"] == 30
