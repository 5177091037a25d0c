"""What is in the folders of runs, and whether processes that worked there are gone: shared by tests."""

from __future__ import annotations

import contextlib
import json
import resource
import time

import psutil
import torch
from events import read_events
from runs import read_log, without_times

TIMES = ("duration", "decisions_per_second")


def contents(folder):
    """The bytes of all files, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint_of(work_dir):
    """The index of the checkpoint."""
    return json.loads((work_dir / "checkpoint" / "checkpoint.json").read_text())["content"]


def step_of(work_dir):
    """The step from which the run would continue."""
    return checkpoint_of(work_dir)["progress"]["step"]


def litter(work_dir):
    """The names in `checkpoint` that are not of the checkpoint."""
    index = checkpoint_of(work_dir)
    mine = {"checkpoint.json", index["state"][0], *(chunk[0] for chunk in index["replay"]["chunks"])}
    return {path.name for path in (work_dir / "checkpoint").iterdir()} - mine


def tensors_of(state, name=""):
    """All tensors in a nest of dictionaries and lists, by path."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors_of(value, f"{name}/{key}").items()}


def events_of(work_dir):
    """TensorBoard's events, by tag, without times; of a run that has written none, nothing."""
    if not (work_dir / "tb").exists():
        return {}
    events = read_events(work_dir)
    tags = events.Tags()
    shown = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {tag: [(each.step, each.histogram_value) for each in events.Histograms(tag)] for tag in tags["histograms"]}
    shown |= {tag: [(each.step, each.encoded_image_string) for each in events.Images(tag)] for tag in tags["images"]}
    return {tag: values for tag, values in shown.items() if not tag.endswith(TIMES)}


def outcome(work_dir):
    """What a run comes to, without times: log lines, events, and the checkpoint's numbers and tensors' bytes."""
    index = checkpoint_of(work_dir)
    state = torch.load(work_dir / "checkpoint" / index["state"][0], weights_only=True)
    progress = {key: value for key, value in index["progress"].items() if key != "seconds"}
    replay = {key: index["replay"][key] for key in ("oldest", "transitions_added", "draws")}
    logs = [without_times(read_log(work_dir / f"{section}.log")) for section in ("train", "eval")]
    tensors = {path: tensor.numpy().tobytes() for path, tensor in tensors_of(state).items()}
    return logs, events_of(work_dir), progress, index["logger"]["meters"], replay, tensors


@contextlib.contextmanager
def largest_file(size):
    """Nothing can be written beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_gone(processes):
    """Fails if a process is still there after a while. It may be a zombie, which nobody has waited for."""
    deadline = time.monotonic() + 20
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process):
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
