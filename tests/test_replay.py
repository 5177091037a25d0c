"""The replay gives what naive storage gives, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import re
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import numpy as np
import plain
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import replay_buffer
import replay_files
import train
from errors import UserError
from files import unfinished, write_tensors
from support import machine
from support.prefetch import Prefetched
from utils import ReplayBuffer


class Episodes:
    """Endless episodes of random small pictures, as a loop with a frame stack hands them to a replay."""

    def __init__(self, seed, num_stacked, shape=(3, 2, 2), values=256):
        self.rng = np.random.default_rng(seed)
        self.num_stacked, self.shape, self.values = num_stacked, shape, values

    def frame(self):
        return self.rng.integers(0, self.values, self.shape, dtype=np.uint8)

    def play(self, length):
        """The transitions of an episode."""
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
    "place", ["cpu", "prefetched", pytest.param("cuda", marks=needs_gpu), pytest.param("pinned", marks=needs_gpu)]
)


def make_both(capacity, num_stacked=3, batch_size=8, shape=(3, 2, 2), place="cpu", seed=0):
    obs_shape = (num_stacked * shape[0], *shape[1:])
    replay = ReplayBuffer(obs_shape, (2,), capacity, batch_size, frame_channels=shape[0], seed=seed, **PLACES[place])
    if place in ("prefetched", "pinned"):
        replay = Prefetched(replay)
    return replay, plain.PlainReplay(obs_shape, (2,), capacity, batch_size, "cpu", seed)


def assert_same(replay, naive):
    """Everything that can be drawn equals naive storage."""
    transitions = np.arange(replay.oldest, replay.transitions_added)
    for ours, theirs in zip(replay.gather(transitions), naive.gather(transitions), strict=True):
        assert torch.equal(ours.cpu().float(), theirs)


@every_place
@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 90),
    num_stacked=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    # Few distinct pixel values make neighbouring frames equal by chance.
    values=st.sampled_from([2, 256]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_equals_naive_storage(place, capacity, num_stacked, channels, values, lengths, seed):
    shape = (channels, 1, 2)
    replay, naive = make_both(capacity, num_stacked, shape=shape, place=place)
    episodes = Episodes(seed, num_stacked, shape, values)
    for length in lengths:
        for transition in episodes.play(length):
            replay.add(*transition)
            naive.add(*transition)
            assert 1 <= len(replay) <= capacity
            assert replay.frames_added - len(replay.frames) <= replay.first_frame(replay.oldest)
        assert_same(replay, naive)


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(1, 20), count=st.integers(1, 60), seed=st.integers(0, 99), values=st.sampled_from([2, 256]))
def test_equals_naive_storage_for_unrelated_observations(capacity, count, seed, values):
    """Whatever is added comes back, even where no frame is shared."""
    replay, naive = make_both(capacity)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        obs, next_obs = rng.integers(0, values, (2, 9, 2, 2), dtype=np.uint8)
        transition = obs, rng.uniform(-1, 1, 2), rng.random(), next_obs, rng.random() < 0.5
        replay.add(*transition)
        naive.add(*transition)
    assert_same(replay, naive)


@every_place
@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 90), adds=st.lists(st.integers(0, 9), min_size=5, max_size=80), seed=st.integers(0, 99))
def test_samples_do_not_depend_on_the_place(place, capacity, adds, seed):
    """Any order of adds and samples gives the batches that naive storage gives for the same draws."""
    replay, naive = make_both(capacity, place=place, seed=seed)
    alike, _ = make_both(capacity, seed=seed)
    episodes = Episodes(seed, 3)
    transitions = (transition for length in itertools.count(1) for transition in episodes.play(length % 17 + 1))
    for count in [1, *adds]:
        for transition in itertools.islice(transitions, count):
            for storage in (replay, alike, naive):
                storage.add(*transition)
        want = naive.gather(alike.draw())
        alike.draws += 1
        batch = replay.sample()
        assert all(torch.equal(ours.cpu().float(), theirs) for ours, theirs in zip(batch, want, strict=True))


def test_prefetching_works_ahead():
    """In the loop's rhythm every batch but the first is gathered before it is asked for; in a burst none is."""
    replay, _ = make_both(50, place="prefetched")
    ahead = []
    transitions = Episodes(0, 3).play(1000)
    for transition in itertools.islice(transitions, 20):
        replay.add(*transition)
    for count in (5, *[1] * 100):
        for _ in range(count):
            ahead.append(replay._next is not None)
            replay.sample()
        replay.add(*next(transitions))
    assert ahead == [False] * 5 + [True] * 100


def test_a_transition_that_does_not_continue_is_an_error():
    """Unless it begins an episode, or the caller does not say."""
    replay, naive = make_both(50)
    first, second = (list(Episodes(seed, 3).play(4)) for seed in (1, 2))
    for index, transition in enumerate(first):
        replay.add(*transition, first=index == 0)
        naive.add(*transition)
    with pytest.raises(ValueError, match="first=True where an episode begins"):
        replay.add(*second[0], first=False)
    replay.add(*second[0], first=True)
    replay.add(*first[0])
    for transition in (second[0], first[0]):
        naive.add(*transition)
    assert_same(replay, naive)


def test_caller_may_say_where_episodes_begin():
    replay, naive = make_both(50)
    for length in (3, 5, 4):
        for index, transition in enumerate(Episodes(length, 3).play(length)):
            replay.add(*transition, first=index == 0)
            naive.add(*transition)
    assert_same(replay, naive)
    assert replay.frames_added == 4 + 6 + 5


def test_no_transition_is_lost_before_the_ring_is_full():
    """Episodes of 64 transitions and more leave room for all of the capacity."""
    replay, naive = make_both(capacity=640)
    episodes = Episodes(0, 3)
    for _ in range(25):
        for transition in episodes.play(64):
            replay.add(*transition)
            naive.add(*transition)
            assert len(replay) == min(640, replay.transitions_added)
    assert_same(replay, naive)


def test_caller_may_reuse_its_arrays():
    replay, naive = make_both(20)
    obs, next_obs = np.zeros((2, 9, 2, 2), np.uint8)
    for transition in Episodes(0, 3).play(10):
        obs[:], next_obs[:] = transition[0], transition[3]
        replay.add(obs, transition[1], transition[2], next_obs, transition[4])
        naive.add(obs, transition[1], transition[2], next_obs, transition[4])
        obs[:] = next_obs[:] = 0
    assert_same(replay, naive)
    assert replay.frames_added == 11


def test_states_are_kept_as_float32():
    replay = ReplayBuffer((4,), (2,), 10, 8, "cpu")
    rng = np.random.default_rng(0)
    states = rng.standard_normal((31, 4))
    for state, following in itertools.pairwise(states):
        replay.add(state, np.zeros(2), 0.0, following, False)
    obs, _, _, next_obs, _ = replay.gather(np.arange(20, 30))
    assert obs.dtype == torch.float32
    assert torch.equal(obs, torch.as_tensor(states[20:30]).float())
    assert torch.equal(next_obs, torch.as_tensor(states[21:31]).float())
    assert replay.frames_added == 31


def test_sample_shapes_and_types():
    replay, _ = make_both(20, batch_size=5)
    with pytest.raises(ValueError, match="empty replay"):
        replay.sample()
    for transition in Episodes(0, 3).play(10):
        replay.add(*transition)
    obs, action, reward, next_obs, not_done = replay.sample()
    assert obs.shape == next_obs.shape == (5, 9, 2, 2)
    assert obs.dtype == next_obs.dtype == torch.uint8
    assert action.shape == (5, 2)
    assert reward.shape == not_done.shape == (5, 1)
    assert action.dtype == reward.dtype == not_done.dtype == torch.float32


@every_place
def test_draws_are_uniform_and_from_what_is_stored(place):
    replay = ReplayBuffer((1,), (1,), 50, 100, seed=3, **PLACES[place])
    for index in range(120):
        replay.add(np.full(1, index), np.zeros(1), 0.0, np.full(1, index + 1), False)
    draws = np.concatenate([replay.sample()[0].cpu().numpy().ravel() for _ in range(500)]).astype(int)
    counts = np.bincount(draws, minlength=120)
    assert counts[:70].sum() == 0
    chi_square = ((counts[70:] - 1000) ** 2 / 1000).sum()
    assert chi_square < 85.4  # 0.999 quantile for 49 degrees of freedom


def test_same_seed_same_draws():
    samples = []
    for _ in range(2):
        replay, _ = make_both(20)
        for transition in Episodes(0, 3).play(10):
            replay.add(*transition)
        samples.append(replay.sample()[0])
    assert torch.equal(*samples)


def test_memory():
    """At most 1.05 times the frames of 10,000 transitions, taken at the start; episodes of 250 fill it."""
    before = psutil.Process().memory_info().rss
    replay = ReplayBuffer((9, 84, 84), (6,), 10_000, 128, "cpu")
    taken = psutil.Process().memory_info().rss - before
    assert 0.95 * replay.nbytes < taken < 1.05 * replay.nbytes
    assert replay.nbytes <= 1.05 * 10_000 * 3 * 84 * 84
    small = ReplayBuffer((3, 4, 4), (6,), 10_000, 128, "cpu", frame_channels=1)  # the same numbers of frames
    assert len(small.frames) == len(replay.frames)
    for _ in range(41):
        for obs, _, reward, next_obs, done in Episodes(0, 3, (1, 4, 4)).play(250):
            small.add(obs, np.zeros(6), reward, next_obs, done)
    assert len(small) == 10_000


@pytest.mark.parametrize("obs_shape", [(9, 84, 84), (3, 24, 30), (17,)])
def test_bytes_are_known_before(obs_shape):
    replay = ReplayBuffer(obs_shape, (6,), 130, 8, "cpu")
    taken = sum(getattr(replay, name).nbytes for name in ("frames", *replay.FIELDS))
    assert replay_buffer.replay_bytes(obs_shape, (6,), 130) == taken == replay.nbytes


@pytest.fixture
def place(monkeypatch):
    """Where a replay of a run on (9, 84, 84) pixels and 6 actions has its frames, which are not made."""
    monkeypatch.setattr(machine, "ReplayBuffer", lambda *args: args[-1])
    monkeypatch.setattr(machine, "Prefetched", lambda place: place)
    monkeypatch.setattr(machine, "update_bytes", lambda *_: 1000)
    shapes = {"observation_space": SimpleNamespace(shape=(9, 84, 84)), "action_space": SimpleNamespace(shape=(6,))}

    def place(replay_device, device, capacity=1_000_000):
        flags = ["--replay_device", replay_device, "--replay_buffer_capacity", str(capacity)]
        return machine.make_replay(train.make_parser().parse_args(flags), SimpleNamespace(**shapes), device)

    return place


GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


def test_placement(monkeypatch, place):
    """auto takes the GPU if the frames fit there, else host memory; what does not fit is refused with what would."""
    needed = replay_buffer.replay_bytes((9, 84, 84), (6,), 1_000_000)
    free = {"gpu": needed + machine.RESERVE + 1000, "host": needed + machine.RESERVE}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["gpu"], 10**12))
    monkeypatch.setattr(machine, "free_host_bytes", lambda: free["host"])
    assert place("auto", GPU) == GPU
    assert place("cpu", GPU) == CPU
    assert place("auto", CPU) == CPU
    with pytest.raises(UserError, match="needs a GPU"):
        place("cuda", CPU)
    free["gpu"] -= 1
    assert place("auto", GPU) == CPU
    with pytest.raises(UserError, match=r"of cuda:0: --replay_buffer_capacity \d+ fits$"):
        place("cuda", GPU)
    free["host"] -= 1
    for requested, device in (("auto", CPU), ("cpu", GPU)):
        with pytest.raises(UserError, match=r"of host memory: --replay_buffer_capacity \d+ fits$"):
            place(requested, device)
    free["host"] //= 2
    with pytest.raises(UserError, match=r"of cuda:0 or host memory: --replay_buffer_capacity \d+ fits$"):
        place("auto", GPU)
    free["host"] = 0
    with pytest.raises(UserError, match=r"capacity 0 fits$"):
        place("auto", CPU)


def test_small_replays_need_no_large_reserve(monkeypatch, place):
    """In host memory; on a GPU the networks beside them need it."""
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 10**8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (machine.RESERVE, 10**12))
    for device in (CPU, GPU):
        assert place("auto", device, 1000) == CPU


@pytest.mark.parametrize("capacity", [100, 1000, 123_456])
def test_the_capacity_that_is_named_fits(monkeypatch, place, capacity):
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 10**6 * capacity // 50)
    with pytest.raises(UserError) as error:
        place("cpu", CPU, capacity)
    named = int(re.search(r"capacity (\d+) fits", str(error.value))[1])
    assert 0.7 * capacity < named < capacity
    assert place("cpu", CPU, named) == CPU


@pytest.mark.parametrize(
    ("listing", "files", "free"),
    [
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "500"}, 500 - 300 + 70),
        ("0::/", {"memory.max": "400"}, 400 - 300 + 70),
        ("0::/job", {"job/memory.max": "max"}, None),
        ("5:cpu,cpuacct:/job", {}, None),
    ],
)
def test_control_groups_limit_memory(tmp_path, listing, files, free):
    """What a container or a batch system allows, with file pages that can be given up."""
    root = tmp_path / "cgroup"
    for name, limit in files.items():
        group = (root / name).parent
        group.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(limit + "\n")
        (group / "memory.current").write_text("300\n")
        (group / "memory.stat").write_text("anon 200\ninactive_file 70\n")
    (tmp_path / "listing").write_text(listing + "\n")
    left = machine.free_host_bytes(tmp_path / "listing", root)
    assert left == free if free is not None else left > 10**6


def test_free_host_memory_is_plausible():
    assert 0 < machine.free_host_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ReplayBuffer((9, 4, 4), (2,), 0, 8, "cpu"), "capacity"),
        (lambda: ReplayBuffer((8, 4, 4), (2,), 10, 8, "cpu"), "whole number of frames"),
        (
            lambda: make_both(3)[0].add(np.zeros((9, 4, 4)), np.zeros(2), 0.0, np.zeros((9, 4, 4)), False),
            "observations of shape",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@every_place
@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 60),
    num_stacked=st.integers(1, 3),
    values=st.sampled_from([2, 256]),
    chunk=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=10),
    data=st.data(),
)
def test_save_and_load_continue_as_if_nothing_had_been(
    place, capacity, num_stacked, values, chunk, lengths, data, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("replay")
    shape = (1, 1, 1) if values == 2 else (3, 2, 2)  # few different frames are often equal by chance
    replay, naive = make_both(capacity, num_stacked, shape=shape, place=place)
    episodes = Episodes(0, num_stacked, shape, values)
    for length in lengths:
        for transition in episodes.play(length):
            replay.add(*transition)
            naive.add(*transition)
            if replay.transitions_added % 3 == 0:
                replay.sample()
        action = data.draw(st.sampled_from(["nothing", "save", "load"]))
        if action != "nothing":
            with mock.patch.object(replay_files, "MAX_CHUNK", chunk):
                replay.save(folder)
            assert set(files_in(folder)) == {"replay.json", *chunk_names(folder)}
        if action == "load":
            loaded, _ = make_both(capacity, num_stacked, shape=shape, place=place)
            loaded.load(folder)
            assert (loaded.oldest, loaded.transitions_added) == (replay.oldest, replay.transitions_added)
            assert loaded.frames_added == replay.frames_added
            assert torch.equal(loaded.sample()[0], replay.sample()[0])
            larger, _ = make_both(capacity + 5, num_stacked, shape=shape, place=place)
            larger.load(folder)
            numbers = np.arange(replay.oldest, replay.transitions_added)
            assert all(map(torch.equal, larger.gather(numbers), replay.gather(numbers)))
            replay = loaded
        assert_same(replay, naive)


def chunk_names(folder):
    return [chunk[0] for chunk in json.loads((folder / "replay.json").read_text())["content"]["chunks"]]


def files_in(folder):
    """Names of the files, but that of their list."""
    return sorted(path.name for path in folder.iterdir() if path.name != replay_files.LIST)


def saved_replay(folder, seed=0):
    replay, _ = make_both(100)
    for length in (10, 20, 30):
        for transition in Episodes(seed, 3).play(length):
            replay.add(*transition)
        replay.save(folder)
    return replay


def test_a_save_writes_only_what_is_new(tmp_path):
    saved_replay(tmp_path)
    assert files_in(tmp_path) == ["0_10.pt", "10_30.pt", "30_60.pt", "replay.json"]
    assert len(torch.load(tmp_path / "30_60.pt")["frames"]) == 31


def test_another_folder_gets_everything(tmp_path):
    replay = saved_replay(tmp_path / "a")
    replay.save(tmp_path / "b")
    loaded, _ = make_both(100)
    loaded.load(tmp_path / "b")
    assert len(loaded) == 60
    for transition in Episodes(1, 3).play(5):
        loaded.add(*transition)
    loaded.save(tmp_path / "c")
    again, _ = make_both(100)
    again.load(tmp_path / "c")
    assert len(again) == 65


def test_draws_are_counted_even_if_nothing_was_added(tmp_path):
    replay = saved_replay(tmp_path)
    replay.sample()
    replay.save(tmp_path)
    loaded, _ = make_both(100)
    loaded.load(tmp_path)
    assert torch.equal(loaded.sample()[0], replay.sample()[0])


def test_a_large_save_is_cut_into_chunks(tmp_path, monkeypatch):
    """Its copy in memory stays small, and each frame is written once."""
    monkeypatch.setattr(replay_files, "MAX_CHUNK", 7)
    replay, naive = make_both(25)
    for length in (10, 1, 9, 14):
        for transition in Episodes(length, 3).play(length):
            replay.add(*transition)
            naive.add(*transition)
    replay.save(tmp_path)
    chunks = [torch.load(tmp_path / name) for name in chunk_names(tmp_path)]
    assert [len(chunk["rewards"]) for chunk in chunks] == [7, 7, 7, 4]
    assert sum(len(chunk["frames"]) for chunk in chunks) <= len(replay.frames)
    loaded, _ = make_both(25)
    loaded.load(tmp_path)
    assert_same(loaded, naive)


def test_a_failed_save_leaves_the_last_one_good_and_no_litter(tmp_path, monkeypatch):
    """A chunk, its folder or the index cannot be written: the last save stays, and the next one tidies up."""
    replay = saved_replay(tmp_path)
    fsync = os.fsync
    for failing in (1, 2, 3):
        for transition in Episodes(failing, 3).play(5):
            replay.add(*transition)
        written = []

        def fail(descriptor, written=written, failing=failing):
            written.append(descriptor)
            if len(written) == failing:
                raise OSError("no space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
            patch.setattr(os, "fsync", fail)
            replay.save(tmp_path)
        loaded, _ = make_both(100)
        loaded.load(tmp_path)
        assert loaded.transitions_added == 60
    replay.save(tmp_path)
    names = ["0_10.pt", "10_30.pt", "30_60.pt", "60_75.pt", "replay.json"]
    assert files_in(tmp_path) == names


def test_a_refused_transition_leaves_no_trace():
    replay, naive = make_both(10)
    for transition in Episodes(0, 3).play(20):
        replay.add(*transition)
        naive.add(*transition)
        with pytest.raises(ValueError, match="observations of shape"):
            replay.add(transition[0] + 1, transition[1], 0.0, np.zeros((9, 3, 3), np.uint8), False)
    assert_same(replay, naive)


def test_every_bit_of_a_state():
    replay = ReplayBuffer((1,), (1,), 4, 8, "cpu")
    for value, following in ((0.0, -0.0), (-0.0, 0.0), (float("nan"), 1.0)):
        replay.add(np.full(1, value), np.zeros(1), 0.0, np.full(1, following), False)
    obs, _, _, next_obs, _ = replay.gather(np.arange(3))
    assert torch.signbit(obs).flatten().tolist()[:2] == [False, True]
    assert torch.signbit(next_obs).flatten().tolist()[:2] == [True, False]
    assert torch.isnan(obs[2])


def test_folders_and_names(tmp_path, monkeypatch):
    """A folder is the same by whatever path; a replay may come back to its own."""
    replay = saved_replay(tmp_path / "a")
    replay.save(tmp_path / "b")
    replay.save(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    replay.save("a")
    loaded, _ = make_both(100)
    loaded.load("a")
    assert len(loaded) == 60
    other = ReplayBuffer((9, 2, 2), (5,), 100, 8, "cpu")
    with pytest.raises(ValueError, match="shapes"):
        other.load("a")


def test_a_killed_save_leaves_the_last_one_good(tmp_path):
    replay = saved_replay(tmp_path)
    index = (tmp_path / "replay.json").read_bytes()
    for transition in Episodes(5, 3).play(5):
        replay.add(*transition)
    replay.save(tmp_path)
    (tmp_path / "replay.json").write_bytes(index)  # as if killed before the index was written
    loaded, _ = make_both(100)
    loaded.load(tmp_path)
    assert loaded.transitions_added == 60
    for transition in Episodes(5, 3).play(5):
        loaded.add(*transition)
    loaded.save(tmp_path)
    again, _ = make_both(100)
    again.load(tmp_path)
    assert len(again) == 65


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *itertools.product(["10_30.pt", "replay.json"], ["truncate", "empty", "remove", "replace"]),
        ("10_30.pt", "change"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, harm):
    saved_replay(tmp_path / "a")
    path = tmp_path / "a" / name
    content = path.read_bytes()
    if harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "remove":
        path.unlink()
    elif harm == "change":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        saved_replay(tmp_path / "b", seed=1)
        path.write_bytes((tmp_path / "b" / name).read_bytes())
    replay, _ = make_both(100)
    with pytest.raises(ValueError, match=r"(10_30\.pt|0_10\.pt|replay\.json)") as error:
        replay.load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_other_replays_are_not_overwritten(tmp_path):
    saved_replay(tmp_path)
    other, _ = make_both(100)
    for transition in Episodes(0, 3).play(4):
        other.add(*transition)
    with pytest.raises(UserError, match="another replay"):
        other.save(tmp_path)
    with pytest.raises(ValueError, match="holds transitions already"):
        other.load(tmp_path)
    small, _ = make_both(59)
    with pytest.raises(ValueError, match="60 transitions with 63 frames, but this replay has room for 59 and 65"):
        small.load(tmp_path)
    assert len(chunk_names(tmp_path)) == 3


def their_file(path, content=b"theirs"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["123_456.pt", "0_10.pt", "replay.json"])
@pytest.mark.parametrize("kind", ["text", "authors", "another replay", "link"])
def test_a_first_save_is_refused_where_others_have_saved(tmp_path, name, kind):
    """Whether or not their index is there; nothing is changed, and elsewhere the replay can be saved."""
    path, folder = tmp_path / "a" / name, tmp_path / "a"
    folder.mkdir()
    if kind == "text":
        their_file(path)
    elif kind == "authors":
        torch.save([np.zeros((2, 9, 2, 2), np.uint8)] * 5, path)
    elif kind == "another replay":
        saved_replay(tmp_path / "b")
        (tmp_path / "b" / ("0_10.pt" if name != "replay.json" else name)).rename(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    replay = saved_replay(tmp_path / "c")
    before = [(path.name, path.is_symlink() or path.read_bytes()) for path in folder.iterdir()]
    with pytest.raises(UserError, match=f"{name} belongs to another replay"):
        replay.save(folder)
    assert [(path.name, path.is_symlink() or path.read_bytes()) for path in folder.iterdir()] == before


def test_saves_delete_only_what_the_replay_has_written(tmp_path):
    """Not what came later: files named like chunks or scraps, of whomever. One in the way of a chunk stays, too."""
    replay, _ = make_both(20)
    episodes = Episodes(0, 3)
    theirs = []
    for length in (10, 10, 10, 10):
        for transition in episodes.play(length):
            replay.add(*transition)
        replay.save(tmp_path)
        if not theirs:
            names = ("123_456.pt", "1_2.pt", ".1_2.pt.tmp", ".replay.json.tmp", ".10_20.pt.tmp", "notes.tmp")
            theirs = [their_file(tmp_path / name) for name in names]
            saved_replay(tmp_path / "b")
            theirs.append((tmp_path / "b" / "30_60.pt").rename(tmp_path / "30_60.pt"))
    assert not (tmp_path / "0_10.pt").exists()
    theirs.append(their_file(tmp_path / "0_10.pt"))  # the name of a file that the replay has written and removed
    replay.save(tmp_path)
    assert all(path.exists() for path in theirs)
    their_file(tmp_path / "40_45.pt")
    for transition in episodes.play(5):
        replay.add(*transition)
    with pytest.raises(UserError, match=r"40_45\.pt was not written by this program"):
        replay.save(tmp_path)
    assert (tmp_path / "40_45.pt").read_bytes() == b"theirs"
    loaded, _ = make_both(20)
    loaded.load(tmp_path)
    assert loaded.transitions_added == 40


@pytest.mark.parametrize("name", ["0_10.pt", "replay.json"])
def test_another_folder_under_the_same_name_is_not_the_replays(tmp_path, name):
    """Its own was moved away, and someone else's files lie there now."""
    replay = saved_replay(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    path = their_file(tmp_path / "a" / name)
    for transition in Episodes(5, 3).play(50):  # which drives out the first chunk
        replay.add(*transition)
        with suppress(UserError):
            replay.save(tmp_path / "a")
    assert path.read_bytes() == b"theirs"


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_first_save_that_failed_can_be_made_again(tmp_path, monkeypatch, failing):
    replay = saved_replay(tmp_path / "a")
    calls = iter(range(1, 100))

    def fail(*args):
        if next(calls) == failing:
            raise UserError("no space left on device")
        return write_tensors(*args)

    monkeypatch.setattr(replay_files, "MAX_CHUNK", 10)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
        patch.setattr(replay_files, "write_tensors", fail)
        replay.save(tmp_path / "b")
    replay.save(tmp_path / "b")
    loaded, _ = make_both(100)
    loaded.load(tmp_path / "b")
    assert loaded.transitions_added == 60


def test_what_a_killed_save_leaves_goes_with_the_next(tmp_path):
    """A chunk that no index lists yet, and half a file."""
    replay = saved_replay(tmp_path)
    index = (tmp_path / "replay.json").read_bytes()
    for transition in Episodes(5, 3).play(5):
        replay.add(*transition)
    replay.save(tmp_path)
    (tmp_path / "replay.json").write_bytes(index)
    unfinished(tmp_path / "60_65.pt").write_bytes(b"half")
    loaded, _ = make_both(100)
    loaded.load(tmp_path)
    for transition in Episodes(5, 3).play(7):
        loaded.add(*transition)
    loaded.save(tmp_path)
    assert files_in(tmp_path) == [
        "0_10.pt", "10_30.pt", "30_60.pt", "60_67.pt", "replay.json",
    ]  # fmt: skip
