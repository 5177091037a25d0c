"""Saved models play: the same episodes as in training, videos, models of the authors' script, files that are none."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from programs import Program
from test_train import METHODS, SMALL, read_log
from toy import make_sliding_env, make_task

import dmc2gym
import evaluate
import train
import video
from randomness import seed_of
from support import machine
from video import is_whole, write_video

ROOT = Path(__file__).parent.parent
# Episodes of 20 decisions, of the simulator and of the toy.
RUN = [*SMALL, *"--action_repeat 50 --num_train_steps 30 --eval_freq 20 --num_eval_episodes 2 --save_model".split()]
NETWORKS = ["actor", "critic", "decoder", "target"]
MODEL_FLAGS = [*SMALL[: SMALL.index("--batch_size")], "--action_repeat", "50"]
CPU = ["--device", "cpu", "--eval_workers", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each method, made once; tests must not write there."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", make_sliding_env)
        for name, flags in METHODS.items():
            assert train.main([*RUN, *flags, "--work_dir", str(folder / name)]) == 0
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run with a decoder."""
    return Path(shutil.copytree(runs / "sac_ae", tmp_path / "run"))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Pixels without a simulator: rendering would take most of the time."""
    monkeypatch.setattr(train, "make_env", make_sliding_env)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])


def play(*flags):
    """Returns of an evaluation, to the last bit."""
    evaluation = evaluation_of(*flags)
    with contextlib.closing(evaluation.envs):
        return evaluation.play().tolist()


def evaluation_of(*flags):
    return evaluate.Evaluation(*evaluate.make_parser().parse_known_args([*CPU, *map(str, flags)]))


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(capsys, folder, *flags, words):
    """One line that says the words, status 2, and not a file or folder more or less than before."""
    capsys.readouterr()
    before, paths = files_in(folder), set(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([*CPU, *map(str, flags)])
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("evaluate.py: error: ")
    for word in words if isinstance(words, tuple) else (words,):
        assert str(word) in output.err
    assert (files_in(folder), set(folder.rglob("*"))) == (before, paths)


def test_what_it_prints(runs, capsys):
    assert evaluate.main([*CPU, str(runs / "sac_ae"), "--episodes", "3", "--seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"models: {runs / 'sac_ae' / 'model'}, step 30"
    returns = play(runs / "sac_ae", "--episodes", 3, "--seed", 5)
    assert len(set(returns)) == 3
    for episode, value in enumerate(returns):
        seed = np.random.SeedSequence((5, episode)).generate_state(1)[0]
        assert lines[1 + episode] == f"episode {episode}, seed {seed}: return {value:.4f}"
    assert lines[4:] == [f"mean {np.mean(returns):.4f}, standard deviation {np.std(returns):.4f}"]


def test_defaults():
    args = evaluate.make_parser().parse_args(["somewhere"])
    training = train.make_parser().parse_args([])
    assert (args.episodes, args.step, args.video, args.precision) == (10, None, None, None)
    assert (args.device, args.eval_workers) == (training.device, training.eval_workers)
    assert args.seed != training.seed


def give_training_seeds(monkeypatch, step):
    monkeypatch.setattr(
        evaluate,
        "episode_seed",
        lambda _, episode: seed_of(1, "evaluation", step, episode),
    )


def test_the_same_as_in_training_with_the_simulator(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_env", make_task)
    flags = "--action_repeat 400 --num_train_steps 1".split()
    assert train.main([*RUN, *flags, "--work_dir", str(tmp_path / "run")]) == 0
    give_training_seeds(monkeypatch, 0)
    returns = play(tmp_path / "run", "--episodes", 2)
    assert np.sum(returns) / 2 == read_log(tmp_path / "run" / "eval.log")[0]["episode_reward"] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 20])
def test_the_same_as_in_training(runs, monkeypatch, method, step):
    """Given the same seeds, to the last bit."""
    give_training_seeds(monkeypatch, step)
    returns = play(runs / method, "--episodes", 2, "--step", step)
    logged = {record["step"]: record["episode_reward"] for record in read_log(runs / method / "eval.log")}
    assert np.sum(returns) / 2 == logged[step]
    assert logged[0] != logged[20]


def test_a_run_in_bfloat16_is_played_in_it(runs, run, monkeypatch):
    monkeypatch.setattr(machine, "bf16_ratio", lambda *_: 0.5)
    flags = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(flags | {"precision": "bf16"}))
    in_bf16 = play(run, "--episodes", 2)
    assert in_bf16 == play(runs / "sac_ae", "--episodes", 2, "--precision", "bf16")
    assert in_bf16 != play(run, "--episodes", 2, "--precision", "fp32") == play(runs / "sac_ae", "--episodes", 2)


def test_bfloat16_is_refused_where_it_is_slower(runs, run, capsys, monkeypatch):
    monkeypatch.setattr(machine, "bf16_ratio", lambda *_: 10.6)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(runs / "sac_ae"), "--precision", "bf16", *CPU])
    assert exit_.value.code == 2
    assert "takes 10.6 times as long" in capsys.readouterr().err
    assert len(play(runs / "sac_ae", "--episodes", 1, "--precision", "fp32")) == 1


def test_a_simulation_that_diverges_ends_an_episode(runs, capsys, monkeypatch):
    step = dmc2gym.DMCWrapper.step

    def diverge(env, action):
        env.physics.data.qvel[:] = 1e12
        return step(env, action)

    monkeypatch.setattr(dmc2gym.DMCWrapper, "step", diverge)
    assert evaluate.main([str(runs / "sac_state"), "--episodes", "2", *CPU]) == 0
    output = capsys.readouterr()
    assert "mean 0.0000" in output.out
    assert [line.split(", which")[0] for line in output.err.splitlines()] == [
        f"warning: the simulation diverged at episode {episode}, decision 1" for episode in (0, 1)
    ]


def test_processes_change_nothing(runs, tmp_path):
    results = []
    for workers in (1, 2):
        video = tmp_path / f"{workers}.mp4"
        results.append(play(runs / "sac_ae", "--episodes", 3, "--eval_workers", workers))
        assert evaluate.main([str(runs / "sac_ae"), *"--device cpu --episodes 3 --eval_workers".split(), str(workers),
                              "--video", str(video)]) == 0  # fmt: skip
        results.append(video.read_bytes())
    assert results[:2] == results[2:]


def test_seeds(runs):
    first, other = (play(runs / "sac_ae", "--episodes", 2, "--seed", seed) for seed in (1, 2))
    assert first == play(runs / "sac_ae", "--episodes", 2, "--seed", 1)
    assert not set(first) & set(other)


def test_springs_are_those_of_the_run(tmp_path, monkeypatch):
    """LQR draws them from the seed of the run, which is another one than that of the episodes."""
    seeds = []
    monkeypatch.setattr(train, "make_env", lambda args, seed: seeds.append(seed) or make_task(args, seed))
    flags = [*RUN, *METHODS["sac_state"], *"--domain_name lqr --task_name lqr_2_1 --num_train_steps 5 --seed 3".split()]
    assert train.main([*flags, "--work_dir", str(tmp_path / "lqr")]) == 0
    play(tmp_path / "lqr", "--episodes", 2)
    assert set(seeds) == {3}


def test_the_replay_is_not_made(runs, monkeypatch):
    def replay(*_, **__):
        raise AssertionError("a replay")

    monkeypatch.setattr(train, "make_replay", replay)
    assert len(play(runs / "sac_state", "--episodes", 1)) == 1


def test_choice_of_models(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("actor_9.pt", "actor_10.pt", "critic_10.pt", "critic_x.pt", "actor_99.pt.tmp", "other_100.pt"):
        (model / name).touch()
    for folder in (tmp_path, model):
        assert evaluate.find_models(folder, None) == (model, 10)
        assert evaluate.find_models(folder, 9) == (model, 9)
        with pytest.raises(ValueError, match=r"model holds no models of step 8; close ones: 9, 10$"):
            evaluate.find_models(folder, 8)


def test_a_checkpoint_serves_where_no_models_were_saved(run, capsys):
    """The run's end is both: the same returns."""
    saved = play(run)
    shutil.rmtree(run / "model")
    assert evaluate.find_models(run, None) == (run / "checkpoint", 30)
    assert play(run) == play(run, "--step", "30") == saved
    assert_refused(capsys, run, run, "--step", "20", words="checkpoint holds no models of step 20; close ones: 30")
    state = next((run / "checkpoint").glob("state_*.pt"))
    state.write_bytes(state.read_bytes()[:100])
    assert_refused(capsys, run, run, words=(state, "its content has changed\n"))  # and no advice about flags
    (run / "checkpoint" / "checkpoint.json").write_text("{}")
    assert_refused(capsys, run, run, words="checkpoint.json is damaged, or was not written by this program")


def test_folders_without_models(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert_refused(capsys, tmp_path, "", words="work_dir: is empty")
    assert_refused(capsys, tmp_path, tmp_path / "none", words=(tmp_path / "none", "is not a folder"))
    assert_refused(capsys, tmp_path, tmp_path / "file", words=(tmp_path / "file", "is not a folder"))
    assert_refused(capsys, tmp_path, tmp_path / "run", words=(tmp_path / "run", "holds no models", "--save_model"))


def test_the_model_folder_itself(runs):
    """It finds the flags of its run, also from within."""
    want = play(runs / "sac_ae", "--episodes", 2)
    assert play(runs / "sac_ae" / "model", "--episodes", 2) == want
    before = Path.cwd()
    os.chdir(runs / "sac_ae" / "model")
    try:
        assert play(".", "--episodes", 2) == want
    finally:
        os.chdir(before)


@pytest.fixture
def authors(runs, tmp_path):
    """A folder as the authors' script leaves it, in the file format of its time."""
    folder = tmp_path / "authors"
    folder.mkdir()
    for name in ("actor", "critic", "decoder"):
        state = torch.load(runs / "sac_ae" / "model" / f"{name}_30.pt")
        torch.save(state, folder / f"{name}_30.pt", _use_new_zipfile_serialization=False)
    return folder


def test_models_of_the_authors_script(runs, authors, capsys):
    want = play(runs / "sac_ae", "--episodes", 2)
    assert play(authors, *MODEL_FLAGS, "--episodes", 2) == want
    # With its args.json, which lacks the flags that are this program's own.
    held = json.loads((runs / "sac_ae" / "args.json").read_text())
    for name in ("device", "precision", "eval_workers", "compile", "cuda_graph"):
        del held[name]
    (authors / "args.json").write_text(json.dumps(held))
    assert play(authors, "--episodes", 2) == want


def test_other_networks_than_the_flags_say(authors, capsys):
    hint = "without an args.json give the flags"
    left_out = MODEL_FLAGS.copy()
    place = left_out.index("--hidden_dim")
    del left_out[place : place + 2]  # then it is train.py's default
    words = ("actor_30.pt is not of this network: trunk.0.weight has shape (32, 50)", "has shape (1024, 50)", hint)
    assert_refused(capsys, authors, authors, *left_out, words=words)
    assert_refused(
        capsys, authors, authors, *MODEL_FLAGS, "--num_layers", 3, words=("encoder.convs.2.weight is missing", hint)
    )
    assert_refused(capsys, authors, authors, *MODEL_FLAGS, "--image_size", 33, words="even")
    (authors / "decoder_30.pt").unlink()
    assert_refused(capsys, authors, authors, *MODEL_FLAGS, words=(authors / "decoder_30.pt", "is missing", hint))
    assert len(play(authors, *MODEL_FLAGS, "--decoder_type", "identity", "--episodes", 1)) == 1


def test_flags_override_the_runs(runs, capsys):
    folder = runs / "sac_ae"
    want = play(folder, "--episodes", 2)
    assert play(folder, *MODEL_FLAGS, "--episodes", 2) == want  # these say the same
    flags = evaluate.training_flags(folder, ["--action_repeat", "100"])
    assert (flags.action_repeat, flags.hidden_dim) == (100, 32)
    words = ("trunk.0.weight has shape (32, 50)", "the flags given replace those of", "args.json")
    assert_refused(capsys, folder, folder, "--hidden_dim", 64, words=words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged or does not belong here"),
        (b"\xff\xfe\x00", "is damaged or does not belong here"),
        (b"[1]", "is damaged: it holds no flags"),
        (b"[" * 100_000, "is damaged or does not belong here"),
        (b'{"image_size": "x"}', "is damaged: argument --image_size: invalid int value: 'x'"),
        (b'{"image_size": 0}', "is damaged: argument --image_size: must be at least 1"),
        (b'{"encoder_type": "vit"}', "is damaged: argument --encoder_type: invalid choice"),
    ],
)
def test_bad_flags_of_a_run(run, capsys, content, words):
    (run / "args.json").write_bytes(content)
    assert_refused(capsys, run, run, words=(run / "args.json", words))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_files(good, evil_path):
    """Files that are no weights of a network, or of another network, and what is said about each."""
    damaged = "is damaged, or holds something else"
    state = torch.load(good)
    missing, other = "is missing; the network's has shape", "; the network's has shape"
    return {
        "missing": (lambda path: path.unlink(), "is missing"),
        "folder": (lambda path: path.unlink() or path.mkdir(), "cannot be read: Is a directory"),
        "empty": (lambda path: path.write_bytes(b""), damaged),
        "truncated": (lambda path: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]), damaged),
        "text": (lambda path: path.write_text("hello\nworld\n"), damaged),
        "noise": (lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)), damaged),
        "module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), damaged),
        "pickle of code": (lambda path: path.write_bytes(pickle.dumps(Evil(evil_path))), damaged),
        "code": (lambda path: torch.save(Evil(evil_path), path), damaged),
        "code among weights": (lambda path: torch.save(state | {"x": Evil(evil_path)}, path), damaged),
        "list": (lambda path: torch.save([1, 2], path), missing),
        "number": (lambda path: torch.save(dict.fromkeys(state, 3), path), other),
        "integers": (lambda path: torch.save({key: torch.arange(3) for key in state}, path), other),
        "other names": (lambda path: torch.save({1: torch.zeros(2)} | state, path), "1 has shape (2,); the "),
        "fewer": (lambda path: torch.save({key: state[key] for key in list(state)[1:]}, path), missing),
    }  # fmt: skip


BAD = [
    "missing", "folder", "empty", "truncated", "text", "noise", "module", "pickle of code", "code",
    "code among weights", "list", "number", "integers", "other names", "fewer",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(run, tmp_path, capsys, kind):
    """Of each network: a line that names the file; the code in it is not executed; no video is begun."""
    for name in NETWORKS:
        path = run / "model" / f"{name}_30.pt"
        if kind == "missing" and name == "target":
            continue  # then it is the critic's copy
        kept, evil_path = tmp_path / "kept.pt", tmp_path / "evil"
        shutil.copy(path, kept)
        make, words = bad_files(kept, evil_path)[kind]
        make(path)
        assert_refused(capsys, tmp_path, run, "--video", tmp_path / "v" / "a.mp4", words=(path, words))
        assert not evil_path.exists()
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        shutil.move(kept, path)
    assert len(play(run, "--episodes", 1)) == 1


def test_that_the_code_would_be_executed(tmp_path):
    """By a loader that trusts files; or the test above showed nothing."""
    torch.save(Evil(tmp_path / "evil"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_other_shapes(run, capsys, name):
    path = run / "model" / f"{name}_30.pt"
    state = torch.load(path)
    weights = state.get("critic_target", state)
    key = list(weights)[-1]
    weights[key] = torch.zeros(77)
    torch.save(state, path)
    assert_refused(capsys, run, run, words=(path, f"{key} has shape (77,); the network's has "))


def test_a_failed_load_leaves_the_agent_as_it_was(run):
    evaluation = evaluation_of(run, "--step", 0)
    evaluation.envs.close()
    agent = evaluation.agent
    before = {name: value.clone() for name, value in agent.critic.state_dict().items()}
    (run / "model" / "decoder_30.pt").write_text("text")
    with pytest.raises(ValueError, match=r"decoder_30.pt is damaged"):
        agent.load(run / "model", 30)
    assert all(torch.equal(value, before[name]) for name, value in agent.critic.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows something only where there is no GPU")
def test_models_saved_on_a_gpu(runs, run):
    """Files that say their tensors lie on a GPU."""
    for name in NETWORKS:
        path = run / "model" / f"{name}_30.pt"
        with zipfile.ZipFile(path) as archive:
            content = {member: archive.read(member) for member in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in content.items():
                archive.writestr(member, data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path)
    assert play(run, "--episodes", 2) == play(runs / "sac_ae", "--episodes", 2)


@pytest.mark.parametrize(("method", "panels"), [("sac_ae", 3), ("sac_pixel", 2), ("sac_state", 1)])
def test_video(runs, tmp_path, method, panels):
    evaluation = evaluation_of(runs / method, "--episodes", 2, "--video", tmp_path / "a.mp4")
    evaluation.play()
    write_video(evaluation.video, evaluation.frames())
    evaluation.envs.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    frames = iio.imread(tmp_path / "a.mp4")
    assert frames.shape == (21, 256, 256 * panels, 3)

    # The first episode again, by itself.
    env = make_sliding_env(evaluation.flags, 1)
    observations = [env.reset(seed=evaluation.seeds[0])[0]]
    scenes = [env.render()]
    over = False
    while not over:
        obs, _, *ends, _ = env.step(evaluation.agent.select_action(observations[-1]))
        observations.append(obs)
        scenes.append(env.render())
        over = any(ends)
    env.close()

    def assert_close(column, pictures):
        shown = frames[:, :, 256 * column : 256 * (column + 1)].astype(float)
        differences = np.array([[np.abs(frame - picture).mean() for picture in pictures] for frame in shown])
        assert differences.diagonal().max() < 6
        return differences

    differences = assert_close(0, scenes)
    if panels > 1:
        newest = [obs[-3:].repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0) for obs in observations]
        for measured in (differences, assert_close(1, newest)):
            assert (measured.argmin(axis=1) == np.arange(21)).all()  # each is closest to its own picture
    if panels > 2:
        agent = evaluation.agent
        with torch.no_grad():
            images = agent.decoder(agent.critic.encoder(torch.as_tensor(np.stack(observations))))[:, -3:]
        pixels = ((images + 0.5) * 255).clamp(0, 255).numpy()
        assert_close(2, [image.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0) for image in pixels])
        assert np.abs(pixels[0] - observations[0][-3:]).mean() > 12  # else the panel could be the observation's


def test_scaling_where_sizes_do_not_divide():
    frame = np.arange(3 * 84 * 84).reshape(3, 84, 84)
    picture = evaluate.scaled(frame.transpose(1, 2, 0))
    assert picture.shape == (256, 256, 3)
    assert np.array_equal(np.unique(picture), np.arange(3 * 84 * 84))  # no pixel is lost
    assert np.array_equal(picture[[0, 0, 255, 255], [0, 255, 0, 255]], frame[:, [0, 0, 83, 83], [0, 83, 0, 83]].T)


def test_a_video_changes_nothing(runs, tmp_path):
    video = ["--video", tmp_path / "a.mp4"]
    assert play(runs / "sac_ae", "--episodes", 2, *video) == play(runs / "sac_ae", "--episodes", 2)
    assert not list(tmp_path.iterdir())  # not written yet


def test_videos_that_cannot_be(runs, tmp_path, capsys, monkeypatch):
    run = runs / "sac_ae"
    (tmp_path / "a.mp4").write_text("precious")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere")
    for name, words in {
        "a.mp4": "exists already",
        "link.mp4": "exists already",
        "a.avi": "must end in .mp4",
        "a.mp4/b.mp4": "is not a folder",
        300 * "x" + ".mp4": "File name too long",
    }.items():
        assert_refused(capsys, tmp_path, run, "--video", tmp_path / name, words=words)
    import imageio_ffmpeg

    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    assert_refused(capsys, tmp_path, run, "--video", tmp_path / "b.mp4", words="videos need ffmpeg")


def test_a_video_that_fails_leaves_nothing(runs, tmp_path, capsys, monkeypatch):
    """Whether a picture fails, or someone else has made the file by now; the returns are printed before."""
    path = tmp_path / "new" / "a.mp4"
    command = [*CPU, str(runs / "sac_ae"), "--episodes", "1", "--video", str(path)]
    frames = evaluate.Evaluation.frames

    def someone_else(evaluation):
        yield from frames(evaluation)
        path.parent.mkdir()
        path.write_text("precious")

    for patch, words, left in (
        (lambda: monkeypatch.setattr(video, "is_whole", lambda _: False), r"is the disk full\?", []),
        (lambda: monkeypatch.setattr(evaluate.Evaluation, "frames", someone_else), "is not overwritten", ["a.mp4"]),
    ):
        patch()
        assert evaluate.main(command) == 1
        monkeypatch.setattr(video, "is_whole", is_whole)
        output = capsys.readouterr()
        assert re.fullmatch(rf"evaluate.py: error: (video )?{path}.*{words}\n", output.err)
        assert "\nmean " in output.out
        assert [file.name for file in path.parent.glob("*")] == left
    assert path.read_text() == "precious"


def test_a_bad_action(run, tmp_path, capsys):
    path = run / "model" / "actor_30.pt"
    state = torch.load(path)
    state["trunk.4.bias"][0] = float("nan")
    torch.save(state, path)
    assert evaluate.main([*CPU, str(run), "--video", str(tmp_path / "new" / "a.mp4")]) == 1
    output = capsys.readouterr()
    want = "evaluate.py: error: the policy's action is NaN or infinite: the models of step 30 have diverged\n"
    assert output.err == want
    assert "return" not in output.out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", ["--episodes 0", "--step -1", "--seed x", "--device cuda:77"])
def test_bad_input(runs, capsys, flags):
    assert_refused(capsys, runs, runs / "sac_ae", *flags.split(), words=flags.split()[0].strip("-"))


def test_interrupt(runs):
    process = Program("evaluate.py", runs / "sac_state", "--episodes", "20", *CPU)
    assert process.stdout.readline().startswith("models: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "evaluate.py: stopped by SIGINT\n"
