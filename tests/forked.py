"""Copies of this process, which need no imports and can be killed like any other, and what makes them die."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from programs import Process, open_streams

fsync = os.fsync


class Forked(Process):
    """Runs a function, whose value is the exit status."""

    def __init__(self, function):
        super().__init__(multiprocessing.get_context("fork"), run, function)


def run(pipes, function):
    """In the copy."""
    open_streams(pipes)
    status = function()
    sys.stdout.flush()
    os._exit(status)  # nobody may be there to read stderr


def slow_disk(seconds=0.02):
    """Whoever kills the process often meets a checkpoint that is half written."""

    def slow_fsync(descriptor):
        time.sleep(seconds)  # between the last byte and the renaming
        fsync(descriptor)

    os.fsync = slow_fsync


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


CHANGES = ("mkdir", "fsync", "rename", "replace", "unlink", "truncate")


def fail_at(count, names=CHANGES, owner=os, fail=kill, patch=setattr):
    """Calls `fail` before the `count`th call of these functions: things that this process does to the file system."""
    counter = itertools.count(1)

    def failing(function):
        def call(*args, **kwargs):
            there = function.__name__ == "mkdir" and Path(args[0]).is_dir()  # then it changes nothing
            system = any(str(arg).startswith(("/dev", "/proc")) for arg in args)
            if not there and not system and next(counter) == count:
                fail()
            return function(*args, **kwargs)

        return call

    for name in names:
        patch(owner, name, failing(getattr(owner, name)))
