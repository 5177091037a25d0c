"""What the machine gives and what a start is logged with: control groups, threads, memory, the commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from runs import METHODS, SMALL

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
@pytest.mark.parametrize(
    ("variable", "kept"), [("UNRELATED", True), ("MALLOC_TOP_PAD_", False), ("GLIBC_TUNABLES", False)]
)
def test_programs_keep_memory_that_is_freed(variable, kept):
    """Ten times 40 MB are 10,000 pages of 4 kB each time if the system takes them back."""
    program = (
        "import ctypes, resource\n"
        "from support import signals; signals.start_program()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; size = 40 * 10**6\n"
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
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with contextlib.nullcontext() if fast else pytest.raises(UserError, match="precision bf16 is slow"):
        machine.check_bf16("cuda")
