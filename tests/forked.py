"""A program in a process of its own without its imports: a copy of this one, which can be killed like any other."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback

fsync = os.fsync


class Forked:
    """Runs a function, whose value is the exit status. Its methods are those of subprocess.Popen that tests need."""

    def __init__(self, function):
        sys.stdout.flush()
        pipes = [os.pipe() for _ in range(2)]
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor, (_, write_end) in enumerate(pipes, start=1):
                os.dup2(write_end, descriptor)
            for ends in pipes:
                for end in ends:
                    os.close(end)
            sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
            os._exit(self._status_of(function))
        for _, write_end in pipes:
            os.close(write_end)
        self.stdout, self._stderr = (os.fdopen(read_end) for read_end, _ in pipes)

    @staticmethod
    def _status_of(function):
        try:
            return function()
        except SystemExit as exit_:
            return exit_.code
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=60):
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                raise TimeoutError
            else:
                time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=60):
        """What it prints from now on, and on stderr since it began."""
        try:
            return self.stdout.read(), self._stderr.read()
        finally:
            self.wait(timeout)
            self.stdout.close()
            self._stderr.close()


def slow_disk(seconds=0.02):
    """Whoever kills the process often meets a checkpoint that is half written."""

    def slow_fsync(descriptor):
        time.sleep(seconds)  # between the last byte and the renaming
        fsync(descriptor)

    os.fsync = slow_fsync


def die_at(count):
    """Kills the process before the `count`th thing that it does to the file system."""
    left = [count]

    def deadly(function):
        def call(*args, **kwargs):
            if not any(str(arg).startswith(("/dev", "/proc")) for arg in args):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "truncate"):
        setattr(os, name, deadly(getattr(os, name)))
