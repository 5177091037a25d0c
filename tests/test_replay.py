"""The replay gives what naive storage gives, bit for bit; its files survive kills; a run finds room for it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import plain
import psutil
import pytest
import torch
from folders import contents
from forked import fail_at
from hypothesis import given, settings
from hypothesis import strategies as st

import replay_buffer
from errors import UserError
from files import unfinished
from support.prefetch import Prefetched
from utils import ReplayBuffer


class Episodes:
    """Episodes of random small frames, as a loop with a frame stack hands them to a replay: of pixels, or of states."""

    def __init__(self, seed, num_stacked=3, frame=(3, 2, 2), values=256):
        self.rng, self.num_stacked, self.shape, self.values = np.random.default_rng(seed), num_stacked, frame, values

    def frame(self):
        if len(self.shape) == 1:
            few = self.rng.choice([0.0, -0.0, 0.1, np.nan], self.shape)
            return few if self.values < 256 else self.rng.standard_normal(self.shape)
        return self.rng.integers(0, self.values, self.shape, dtype=np.uint8)

    def play(self, *lengths):
        """The transitions of episodes of these lengths."""
        for length in lengths:
            stack = [self.frame()] * self.num_stacked
            for index in range(length):
                following = [*stack[1:], self.frame()]
                done = index == length - 1 and self.rng.random() < 0.5
                action = self.rng.uniform(-1, 1, 2).astype(np.float32)
                yield np.concatenate(stack), action, float(self.rng.random()), np.concatenate(following), done
                stack = following


# Where frames lie and samples go. With prefetching on the CPU its logic is tested without a GPU, too.
PLACES = {
    "cpu": {"device": "cpu"},
    "prefetched": {"device": "cpu"},
    "cuda": {"device": "cuda", "frames_device": "cuda"},
    "pinned": {"device": "cuda", "frames_device": "cpu"},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
every_place = pytest.mark.parametrize(
    "place", ["cpu", "prefetched", *(pytest.param(place, marks=needs_gpu) for place in ("cuda", "pinned"))]
)
# Frames in a stack, and a frame: pixels of one and of three channels, states.
KINDS = st.one_of(st.tuples(st.integers(1, 4), st.sampled_from([(1, 1, 2), (3, 2, 2)])), st.just((1, (2,))))
VALUES = st.sampled_from([2, 256])  # few distinct values make neighbouring frames equal by chance
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
PARTS = st.lists(st.integers(0, 40), min_size=3, max_size=8)
property_test = settings(max_examples=60, deadline=None)


def make(capacity=100, num_stacked=3, frame=(3, 2, 2), place="cpu", batch_size=8, seed=0):
    obs_shape = (num_stacked * frame[0], *frame[1:])
    replay = ReplayBuffer(obs_shape, (2,), capacity, batch_size, frame_channels=frame[0], seed=seed, **PLACES[place])
    return Prefetched(replay) if place in ("prefetched", "pinned") else replay


def make_naive(num_stacked=3, frame=(3, 2, 2)):
    return plain.PlainReplay((num_stacked * frame[0], *frame[1:]), (2,), 1000, 8, "cpu")


def fill(transitions, *storages):
    for transition in transitions:
        for storage in storages:
            storage.add(*transition)


def filled(*lengths, seed=0, **more):
    """A replay, and naive storage of the same transitions."""
    replay, naive = make(**more), make_naive()
    fill(Episodes(seed).play(*lengths), replay, naive)
    return replay, naive


def equal(batch, want):
    """Whether all bits are equal, those of NaN and -0.0, too."""
    pairs = [[part.cpu().float().numpy() for part in parts] for parts in zip(batch, want, strict=True)]
    return all(ours.shape == his.shape and ours.tobytes() == his.tobytes() for ours, his in pairs)


def same(replay, naive):
    """Whether everything that can be drawn equals naive storage."""
    transitions = np.arange(replay.oldest, replay.transitions_added)
    return replay.transitions_added == naive.added and equal(replay.gather(transitions), naive.gather(transitions))


def assert_nothing_is_dropped_in_vain(replay, capacity):
    """The transition before the oldest has no row or lacks a frame."""
    assert 1 <= len(replay) <= capacity
    if replay.oldest > 0 and len(replay) < capacity:
        newest = replay.newest[(replay.oldest - 1) % capacity]
        assert newest - replay.num_stacked < replay.frames_added - len(replay.frames)


@every_place
@property_test
@given(st.integers(1, 90), KINDS, VALUES, LENGTHS, st.lists(st.integers(0, 2), min_size=1), st.booleans())
def test_equals_naive_storage(place, capacity, kind, values, lengths, samples, told):
    """With any episodes and any rhythm of samples, whether or not the caller says where episodes begin.

    Draws depend on the seed and the transitions alone. The caller may use its arrays again.
    """
    replay, alike = make(capacity, *kind, place=place, seed=5), make(capacity, *kind, seed=5)
    naive, episodes, samples, frames = make_naive(*kind), Episodes(0, *kind, values), itertools.cycle(samples), 0
    with pytest.raises(ValueError, match="empty replay"):
        replay.sample()
    for length in lengths:
        for index, transition in enumerate(episodes.play(length)):
            for storage in (replay, alike):
                storage.add(*transition, first=index == 0 if told else None)
            naive.add(*transition)
            for array in (transition[0], transition[1], transition[3]):
                array.fill(0)
            assert_nothing_is_dropped_in_vain(replay, capacity)
            for _ in range(next(samples)):
                want = naive.gather(alike.draw())
                alike.draws += 1
                assert equal(replay.sample(), want)
        assert same(replay, naive)
        frames += length + replay.num_stacked
        # Where it is not told, a first frame may look like the one before.
        assert replay.frames_added == frames if told else replay.frames_added <= frames
    observations = torch.uint8 if len(replay.obs_shape) == 3 else torch.float32
    types = [part.dtype for part in replay.sample()]
    assert types == [observations, torch.float32, torch.float32, observations, torch.float32]


def test_prefetching_works_ahead():
    """In the loop's rhythm every batch but the first is gathered before it is asked for; in a burst none is."""
    replay, transitions, ahead = make(50, place="prefetched"), Episodes(0).play(1000), []
    fill(itertools.islice(transitions, 20), replay)
    for count in (5, *[1] * 100):
        for _ in range(count):
            ahead.append(replay._next is not None)
            replay.sample()
        replay.add(*next(transitions))
    assert ahead == [False] * 5 + [True] * 100


@every_place
@pytest.mark.parametrize(("change", "words"), [
    ({"obs": np.zeros((9, 3, 3), np.uint8)}, "observations must have shape"),
    ({"next_obs": np.zeros((9, 3, 3), np.uint8)}, "observations must have shape"),
    ({"action": np.zeros(3)}, "actions must have shape"),
    ({"reward": "much"}, "could not convert"),
    ({"next_obs": np.ones((9, 2, 2), np.uint8)}, "does not continue the one before"),
    ({"obs": np.ones((9, 2, 2), np.uint8), "first": False}, "say first=True where an episode begins"),
])  # fmt: skip
def test_a_refused_transition_leaves_no_trace(place, change, words):
    replay, naive = make(10, place=place), make_naive()
    for transition in Episodes(0).play(14, 9):
        with pytest.raises(ValueError, match=words):
            replay.add(**dict(zip(("obs", "action", "reward", "next_obs", "done"), transition, strict=True)) | change)
        fill([transition], replay, naive)
        replay.sample()
    assert same(replay, naive)


def test_draws_are_uniform_and_from_what_is_stored():
    replay = make(50, batch_size=100)
    fill(Episodes(0).play(120), replay)
    draws = []
    for _ in range(500):
        draws.append(replay.draw())
        replay.draws += 1
    counts = np.bincount(np.concatenate(draws), minlength=120)
    assert counts[:70].sum() == 0
    assert ((counts[70:] - 1000) ** 2 / 1000).sum() < 85.4  # 0.999 quantile of chi-square for 49 degrees of freedom


@pytest.mark.parametrize(
    ("obs_shape", "frame_channels", "capacity", "words"),
    [((9, 4, 4), 3, 0, "capacity"), ((8, 4, 4), 3, 9, "whole number of frames"), ((9, 4, 4), 2, 9, "whole number")],
)
def test_a_replay_that_cannot_be(obs_shape, frame_channels, capacity, words):
    with pytest.raises(ValueError, match=words):
        ReplayBuffer(obs_shape, (2,), capacity, 8, "cpu", frame_channels=frame_channels)


@pytest.mark.parametrize("obs_shape", [(9, 84, 84), (3, 24, 30), (17,)])
def test_memory(obs_shape):
    """Taken at the start, and known before: at most 22 GB for a million transitions of pixels.

    There is room for the frames of short episodes: of states for any, of pixels as the class says.
    """
    before = psutil.Process().memory_info().rss
    replay = ReplayBuffer(obs_shape, (6,), 10_000, 128, "cpu")
    taken = psutil.Process().memory_info().rss - before
    assert replay_buffer.replay_bytes(obs_shape, (6,), 10_000) == replay.nbytes
    assert sum(getattr(replay, name).nbytes for name in ("frames", *replay_buffer.FIELDS)) == replay.nbytes
    if replay.nbytes > 10**8:  # less may come from memory that tests before have given back
        assert 0.95 * replay.nbytes < taken < 1.05 * replay.nbytes
    assert len(replay.frames) >= (20_000 if len(obs_shape) == 1 else 10_312)
    assert 21e9 < replay_buffer.replay_bytes((9, 84, 84), (6,), 1_000_000) < 22e9


# Files.


def listed(folder):
    """Names of the chunks that belong to the save."""
    return [chunk[0] for chunk in json.loads((folder / "replay.json").read_text())["content"]["chunks"]]


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def loaded(folder, **more):
    replay = make(**more)
    replay.load(folder)
    return replay


@every_place
@property_test
@given(st.integers(1, 60), KINDS, VALUES, LENGTHS, PARTS, st.integers(1, 80))
def test_a_loaded_replay_continues_as_if_nothing_had_been(
    place, tmp_path_factory, capacity, kind, values, lengths, parts, other_capacity
):
    """Exactly; one of another capacity, with room for the transitions, has those whose frames it has room for."""
    folder, transitions = tmp_path_factory.mktemp("replay"), Episodes(0, *kind, values).play(*lengths)
    replay, alike, naive = make(capacity, *kind, place=place), make(capacity, *kind), make_naive(*kind)
    fill(itertools.islice(transitions, 1), replay, alike, naive)
    for part in parts:
        fill(itertools.islice(transitions, part), replay, alike, naive)
        assert equal(replay.sample(), alike.sample())
        with mock.patch.object(replay_buffer, "MAX_CHUNK", 1 + part // 3), mock.patch.object(os, "fsync"):
            replay.save(folder)
        assert names_in(folder) == {"replay.json", *listed(folder)}
        other = make(max(len(replay), other_capacity), *kind, place=place)
        other.load(folder)
        assert same(other, naive)
        if other.oldest > replay.oldest:
            assert_nothing_is_dropped_in_vain(other, other.capacity)
        if part % 2:
            replay = make(capacity, *kind, place=place)
            replay.load(folder)
        assert (replay.oldest, replay.frames_added) == (alike.oldest, alike.frames_added)
        assert same(replay, naive)


def test_a_save_writes_only_what_is_new(tmp_path, monkeypatch):
    """In chunks of limited size; to another folder all. A folder is the same by whatever path."""
    monkeypatch.setattr(replay_buffer, "MAX_CHUNK", 20)
    monkeypatch.chdir(tmp_path)
    replay, naive = make(), make_naive()
    replay.save("a")
    assert not Path("a").exists()  # nothing of an empty replay
    for length, folder in ((10, "a"), (50, tmp_path / "a"), (0, "b/c"), (0, "b/../a")):
        fill(Episodes(length).play(length), replay, naive)
        replay.sample()
        replay.save(folder)
        assert same(loaded(folder), naive)
        assert equal(loaded(folder).sample(), replay.gather(replay.draw()))  # draws are counted
    assert listed(tmp_path / "a") == ["0_10.pt", "10_30.pt", "30_50.pt", "50_60.pt"]
    assert len(torch.load("a/30_50.pt")["frames"]) == 20 + 3
    assert listed(tmp_path / "b/c") == ["0_20.pt", "20_40.pt", "40_60.pt"]


class Killed(BaseException):
    """In place of SIGKILL: nothing tidies up."""


def save_failing(replay, folder, error, *when):
    """Raises the error at a change of the disk."""

    def fail():
        raise error

    with pytest.MonkeyPatch.context() as patch:
        fail_at(*when, fail=fail, patch=patch.setattr)
        replay.save(folder)


@pytest.mark.parametrize("case", ["first save", "later save", "save after the checkpoint"])
def test_a_save_that_is_killed(tmp_path, monkeypatch, case):
    """At any change of the disk: the save before it is whole, or the new one. The resumed run can save again."""
    monkeypatch.setattr(replay_buffer, "MAX_CHUNK", 7)
    for number in itertools.count(1):
        buffer, checkpoint = tmp_path / str(number) / "buffer", tmp_path / str(number) / "checkpoint"
        replay, naive = filled(15, capacity=30)
        buffered = None  # what is in the buffer before the save that is killed
        if case != "first save":
            replay.save(buffer)
            buffered = filled(15)[1]
        if case == "later save":
            fill(Episodes(1).play(20), replay, naive)  # the first chunk is no longer needed
        index = json.loads(json.dumps(replay.save_chunks(checkpoint, [])))
        if case == "save after the checkpoint":
            fill(Episodes(2).play(24), replay, buffered)  # the first chunk is deleted
            replay.save(buffer)
        fill(Episodes(3).play(4), naive)
        killed = None
        for error in (Killed(), Killed(), None):  # it is killed twice
            replay = make(30)
            replay.load_chunks(checkpoint, index)
            fill(Episodes(3).play(4), replay)  # it goes on otherwise than before
            try:
                save_failing(replay, buffer, error, number if error else 0)
            except Killed as raised:
                killed = raised
            if buffered or ((buffer / "replay.json").exists() and listed(buffer)):
                left = loaded(buffer, capacity=30)
                assert same(left, naive) or (killed and same(left, buffered))
        assert same(loaded(buffer, capacity=30), naive)
        assert not list(buffer.glob(".*"))  # unfinished files
        if not killed:
            break
    assert number > 8
    assert names_in(buffer) == {"replay.json", *listed(buffer)}


def test_a_folder_of_a_run_that_went_on_otherwise(tmp_path):
    """It was killed, resumed from before, and resumed once more beyond the folder's end: its transitions are others."""
    replay, naive = filled(20)
    replay.save(tmp_path / "first")
    fill(Episodes(1).play(15), replay)
    replay.save(tmp_path / "buffer")
    replay = loaded(tmp_path / "first")
    fill(Episodes(2).play(30), replay, naive)
    replay.save(tmp_path / "second")
    replay = loaded(tmp_path / "second")
    fill(Episodes(3).play(5), replay, naive)
    replay.save(tmp_path / "buffer")
    assert same(loaded(tmp_path / "buffer"), naive)
    assert names_in(tmp_path / "buffer") == {"replay.json", *listed(tmp_path / "buffer")}
    replay.save(tmp_path / "second")
    assert listed(tmp_path / "second") == ["0_50.pt", "50_55.pt"]  # where nobody else went on


def test_a_save_that_fails_leaves_no_litter(tmp_path, monkeypatch):
    """The disk is full at any file: the save before stays, and the next one tidies up."""
    monkeypatch.setattr(replay_buffer, "MAX_CHUNK", 4)
    replay, naive = filled(10, 20)
    replay.save(tmp_path)
    before = filled(10, 20)[1]
    for failing in range(1, 6):
        fill(Episodes(failing).play(3), replay, naive)
        with pytest.raises(UserError, match="no space"):
            save_failing(replay, tmp_path, OSError("no space left on device"), failing, ["replace"])
        assert same(loaded(tmp_path), before)
    replay.save(tmp_path)
    assert names_in(tmp_path) == {"replay.json", *listed(tmp_path)}
    assert same(loaded(tmp_path), naive)


def test_a_save_whose_end_is_not_sure_to_be_on_the_disk(tmp_path):
    """The index is in place, but the system fails to bring its folder to the disk: nothing that it lists is deleted."""
    replay, naive = filled(10)
    replay.save(tmp_path)
    for number in range(1, 5):
        fill(Episodes(number).play(3), replay, naive)
        before = filled(10)[1]
        fill(itertools.chain(*(Episodes(each).play(3) for each in range(1, number))), before)
        with pytest.raises(UserError, match="input/output"):
            save_failing(replay, tmp_path, OSError("input/output error"), number, ["fsync"])
        left = loaded(tmp_path)
        assert same(left, naive if number == 4 else before)
        if number < 4:
            replay.save(tmp_path)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "occupy",
    [
        lambda folder: (folder / "replay.json").write_text("theirs"),
        lambda folder: (folder / "0_10.pt").write_text("theirs"),
        lambda folder: (folder / "replay.json").symlink_to("nowhere"),
        lambda folder: filled(5, seed=1)[0].save(folder),
    ],
)
def test_a_first_save_needs_an_empty_folder(tmp_path, occupy, moved):
    """Even where the replay was saved before, if that was moved away. Elsewhere it can be saved, and loaded."""
    replay, naive = filled(10)
    if moved:
        replay.save(tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    occupy(tmp_path / "a")
    before = contents(tmp_path), set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"belongs to another replay: save to an empty folder|replay\.json is damaged"):
        replay.save(tmp_path / "a")
    assert (contents(tmp_path), set(tmp_path.rglob("*"))) == before
    (tmp_path / "a").rename(tmp_path / "c")
    replay.save(tmp_path / "a")
    assert same(loaded(tmp_path / "a"), naive)


def test_saves_delete_and_replace_only_what_the_replay_has_written(tmp_path):
    """Not what came later, however it is named, even where a chunk is due."""
    replay, naive = make(20), make_naive()
    late = ("123_456.pt", "1_2.pt", ".1_2.pt.tmp", ".notes", "notes.tmp", "30_40.pt", "0_10.pt")
    for turn in range(6):
        fill(Episodes(turn).play(10), replay, naive)
        replay.save(tmp_path)
        if turn == 2:
            for name in late:
                (tmp_path / name).write_text("theirs")
            unfinished(tmp_path / "31_33.pt").touch()  # which only this program writes
    assert all((tmp_path / name).read_text() == "theirs" for name in late)
    assert names_in(tmp_path) == {"replay.json", *late, *listed(tmp_path)}
    assert same(loaded(tmp_path, capacity=20), naive)


@pytest.mark.parametrize(
    ("replay", "words"),
    [
        (lambda: filled(4)[0], "holds transitions already"),
        (lambda: make(59), "holds 60 transitions, more than the replay's capacity, 59"),
        (lambda: make(frame=(3, 2, 4)), "shapes"),
        (lambda: ReplayBuffer((9, 2, 2), (5,), 100, 8, "cpu"), "shapes"),
        (lambda: ReplayBuffer((9, 2, 2), (2,), 100, 8, "cpu", frame_channels=9), "shapes"),
    ],
)
def test_a_replay_that_cannot_take_a_save(tmp_path, replay, words):
    filled(60)[0].save(tmp_path)
    replay = replay()
    count = len(replay)
    with pytest.raises(UserError, match=words):
        replay.load(tmp_path)
    assert len(replay) == count
