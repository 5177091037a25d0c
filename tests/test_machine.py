"""What a run asks of the machine and the environment, and what a start is logged with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import gym
import numpy as np
import psutil
import pytest
import torch
from runs import METHODS, SMALL
from toy import CountingEnv, StateEnv

import replay_buffer
import train
from errors import UserError
from support import machine, report

ROOT = Path(__file__).parent.parent


def control_groups(folder, listing, files):
    """The listing of a process's control groups, and the folder of all groups, with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n")
    (folder / "listing").write_text(listing)
    return folder / "listing", folder


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_memory(tmp_path, version, nested):
    """What a container or a batch system allows, with file pages that can be given up; else what the machine has."""
    limit, used, pages = machine.MEMORY_FILES[version == 1]
    root, listing = ("memory/", "4:memory:/job/step\n3:cpu:/\n") if version == 1 else ("", "0::/job/step\n")
    files = {f"{root}{'job/' * nested}{limit}": 500, f"{root}job/step/{limit}": 2**63 - 4096 if version == 1 else "max"}
    files |= {str(Path(name).with_name(used)): 300 for name in files}
    files |= {str(Path(name).with_name("memory.stat")): f"anon 200\n{pages} 70" for name in files}
    assert machine.free_host_bytes(*control_groups(tmp_path / "groups", listing, files)) == 500 - 300 + 70
    assert 10**6 < machine.free_host_bytes(*control_groups(tmp_path, listing, {})) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("listing", "files", "cores"),
    [
        ("0::/job/step\n", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("2:cpu,cpuacct:/docker/a\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("2:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_a_quota_of_processor_time_limits_cores(tmp_path, monkeypatch, listing, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert machine.cores(*control_groups(tmp_path, listing, files)) == cores


@pytest.mark.parametrize(("chosen", "cores", "threads"), [(False, 1, 1), (True, 1, 3), (False, 8, 3)])
def test_threads_are_no_more_than_a_quota_allows(monkeypatch, chosen, cores, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    if not chosen:
        monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(3)
        train.make_agent(train.make_parser().parse_args([*SMALL, *METHODS["sac_state"]]), (3,), (1,))
        assert torch.get_num_threads() == report.provenance(torch.device("cpu"))["threads"] == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have other ways")
@pytest.mark.parametrize(("variable", "largest", "kept"), [
    ("UNRELATED", 2**30, True), ("UNRELATED", 2**25, True), ("MALLOC_TOP_PAD_", 2**30, False),
    ("GLIBC_TUNABLES", 2**30, False),
])  # fmt: skip
def test_programs_keep_memory_that_is_freed(variable, largest, kept):
    """Ten times 40 MB are 10,000 pages of 4 kB each time if the system takes them back.

    Older versions of glibc refuse a threshold above 32 MB, and then take back larger blocks.
    """
    program = (
        "import ctypes, resource, types\n"
        f"libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; size = {min(40 * 10**6, largest - 10**6)}\n"
        f"takes = lambda what, value: int(value <= {largest} and libc.mallopt(what, value))\n"
        "ctypes.CDLL = lambda _: types.SimpleNamespace(mallopt=takes)\n"
        "from support import signals; signals.start_program()\n"
        "for _ in range(10):\n"
        "    block = ctypes.c_void_p(libc.malloc(size)); ctypes.memset(block, 1, size); libc.free(block)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    environment = {name: os.environ[name] for name in os.environ if name[:6] not in ("MALLOC", "GLIBC_")} | {
        variable: ""
    }
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert (int(result.stdout) < 30_000) == kept


def test_the_commit_is_of_the_programs_own_repository(tmp_path, monkeypatch):
    """Not of one around a copy of the program, nor of the one that git's variables name."""

    def git(folder, *words):
        command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for name in ("clone", "other"):
        (tmp_path / name / "copy" / "support").mkdir(parents=True)
        git(tmp_path / name, "init")
        git(tmp_path / name, "commit", "--allow-empty", "-m", name)
    git(tmp_path / "clone", "worktree", "add", tmp_path / "worktree")
    (tmp_path / "link").symlink_to(tmp_path / "clone")
    commits = {name: git(tmp_path / "clone", "rev-parse", "HEAD") for name in ("clone", "worktree", "link")}
    for name, commit in (commits | {"other/copy": "unknown"}).items():
        monkeypatch.setattr(report, "__file__", str(tmp_path / name / "support" / "report.py"))
        for variable in (None, "GIT_DIR", "GIT_INDEX_FILE"):
            with monkeypatch.context() as patch:
                if variable:
                    patch.setenv(variable, str(tmp_path / "other" / ".git"))
                assert report.provenance(torch.device("cpu"))["commit"] == commit


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_gpu(monkeypatch, fast):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with nullcontext() if fast else pytest.raises(UserError, match="precision bf16 is slow"):
        machine.check_bf16("cuda")


NEEDED = replay_buffer.replay_bytes((9, 84, 84), (6,), 10**6) + machine.RESERVE
ENOUGH = (NEEDED + 1000, NEEDED)  # bytes free on the GPU and in host memory


@pytest.mark.parametrize(
    ("replay_device", "device", "capacity", "gpu", "host", "result"),
    [
        ("auto", "cuda:0", 10**6, *ENOUGH, "cuda:0"),
        ("cpu", "cuda:0", 10**6, *ENOUGH, "cpu"),
        ("auto", "cpu", 10**6, *ENOUGH, "cpu"),
        ("cuda", "cpu", 10**6, *ENOUGH, "needs a GPU"),
        ("auto", "cuda:0", 10**6, ENOUGH[0] - 1, ENOUGH[1], "cpu"),
        ("cuda", "cuda:0", 10**6, ENOUGH[0] - 1, ENOUGH[1], "of cuda:0: "),
        ("auto", "cpu", 10**6, ENOUGH[0], ENOUGH[1] - 1, "of host memory: "),
        ("auto", "cuda:0", 10**6, 9, 9, "of cuda:0 or host memory: --replay_buffer_capacity 0 fits$"),
        ("auto", "cpu", 100, 0, 2 * 10**6, "of host memory: "),
        # A small replay needs no large reserve of host memory; on a GPU the networks beside it do.
        ("auto", "cpu", 1000, 0, 10**8, "cpu"),
        ("auto", "cuda:0", 1000, machine.RESERVE, 10**8, "cpu"),
    ],
)
def test_placement(monkeypatch, replay_device, device, capacity, gpu, host, result):
    """auto takes the GPU if the frames fit there, else host memory; what does not fit is refused with what would."""
    monkeypatch.setattr(machine, "ReplayBuffer", lambda *args: args[-1])  # where the frames would be
    monkeypatch.setattr(machine, "Prefetched", lambda place: place)
    monkeypatch.setattr(machine, "update_bytes", lambda *_: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu, 10**12))
    monkeypatch.setattr(machine, "free_host_bytes", lambda: host)
    spaces = {"observation_space": SimpleNamespace(shape=(9, 84, 84)), "action_space": SimpleNamespace(shape=(6,))}

    def place(capacity):
        flags = ["--replay_device", replay_device, "--replay_buffer_capacity", str(capacity)]
        env = SimpleNamespace(num_stacked=3, **spaces)
        return str(machine.make_replay(train.make_parser().parse_args(flags), env, torch.device(device)))

    if result in ("cpu", "cuda:0"):
        assert place(capacity) == result
        return
    with pytest.raises(UserError, match=result) as error:
        place(capacity)
    if result.endswith(": "):
        named = int(re.search(r"--replay_buffer_capacity (\d+) fits$", str(error.value))[1])
        assert 0.7 * capacity < named < capacity
        assert place(named) in ("cpu", "cuda:0")


@pytest.mark.parametrize(("shape", "refused"), [((84, 84, 18), True), ((3, 64, 4), False)])
def test_channels_come_first(shape, refused):
    env = CountingEnv()
    env.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
    with pytest.raises(UserError, match="put channels first") if refused else nullcontext():
        machine.try_out(env, train.make_parser().parse_args([]))


class ReusingEnv(StateEnv):
    state = np.zeros(3)

    def _observe(self):
        self.state[:] = super()._observe()
        return self.state


def test_observations_must_be_new_arrays():
    with pytest.raises(UserError, match="must be new arrays"):
        machine.try_out(ReusingEnv(), train.make_parser().parse_args([]))
