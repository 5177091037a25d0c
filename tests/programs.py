"""Programs of the project without their imports: forked from a server that has imported what they need.

A fork runs the program's file as `__main__`, with its own streams, environment and session. The server never renders
and has one thread, unlike the process of the tests, so that a fork of it can render. What imports do before a
program begins is not tested by it; a test of that starts a real process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
IMPORTED = "train evaluate plot sweep dm_control.suite torch._dynamo torch.utils.tensorboard imageio_ffmpeg".split()


class Process:
    """Calls `target(pipes, *args)` in another process; `open_streams(pipes)` there makes them stdout and stderr.

    Its methods are those of subprocess.Popen that tests need.
    """

    def __init__(self, context, target, *args, stderr=None):
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        if stderr is not None:
            os.dup2(stderr, pipes[1][1].fileno())
        self._process = context.Process(target=target, args=(pipes, *args), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(there.fileno())) for there, _ in pipes)
        close(pipes)

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=60):
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError
        return self.returncode

    def communicate(self, timeout=60):
        """What it prints from now on. After the timeout, all of its session is killed, and TimeoutError raised.

        The pipes are open as long as any process holds them, one that outlives the program, too.
        """
        timer = threading.Timer(timeout, self._kill_all)
        timer.start()
        try:
            printed = self.stdout.read(), self.stderr.read()
            if timer.finished.is_set():
                raise TimeoutError
            return printed
        finally:
            timer.cancel()
            self.wait(timeout)
            self.stdout.close()
            self.stderr.close()

    def _kill_all(self):
        self.kill()
        with contextlib.suppress(ProcessLookupError):  # it leads no session
            os.killpg(self.pid, signal.SIGKILL)


class Program(Process):
    """`python NAME FLAGS`, started in the project's folder.

    Args:
        closed: standard streams, by number, that are closed.
        largest_file: bytes; a write beyond fails as on a disk that is full.
        stderr: a file descriptor to use instead of a pipe.
        environment: variables on top of this process's.
    """

    def __init__(self, name, *flags, closed=(), largest_file=None, stderr=None, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}):
            forkserver.ensure_running()
        argv = [str(ROOT / name), *map(str, flags)]
        super().__init__(context, run, argv, os.environ | environment, closed, largest_file, stderr=stderr)


def run_program(name, *flags, **options):
    """A program's end, as subprocess.run gives it."""
    process = Program(name, *flags, **options)
    stdout, stderr = process.communicate(timeout=100)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def run(pipes, argv, environment, closed, largest_file):
    """In the fork: what a shell and Python's start do, and then the program."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    open_streams(pipes, closed, environment.get("PYTHONIOENCODING", "utf-8:strict"))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def open_streams(pipes, closed=(), encoding="utf-8:strict"):
    """Makes pipes this process's stdout and stderr, except those that are closed. Its stdin is empty."""
    with Path(os.devnull).open("rb") as null:
        for descriptor, source in enumerate((null, *(here for _, here in pipes))):
            os.dup2(source.fileno(), descriptor)
    close(pipes)
    encoding, _, errors = encoding.partition(":")
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if descriptor in closed:
            os.close(descriptor)
            setattr(sys, name, None)
        else:
            buffering = 1 if name == "stderr" else -1
            setattr(sys, name, open(descriptor, mode, buffering, encoding, errors, closefd=False))  # noqa: SIM115


def close(pipes):
    for ends in pipes:
        for end in ends:
            end.close()
