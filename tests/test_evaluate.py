"""Saved models play: the same episodes as in training, videos, models of the authors' script, files that are none."""

from __future__ import annotations

import functools
import json
import pickle
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents
from programs import Program
from runs import METHODS, SMALL, read_log
from toy import BarEnv, SlidingEnv, make_sliding_env

import evaluate
import train
from errors import UserError
from randomness import seed_of
from support import checkpoint

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
    return Path(shutil.copytree(runs / "sac_ae", tmp_path / "run"))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Pixels without a simulator: rendering would take most of the time."""
    monkeypatch.setattr(train, "make_env", make_sliding_env)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])


def player_of(resources, *flags):
    args, words = evaluate.make_parser().parse_known_args([*CPU, *map(str, flags)])
    return evaluate.Player(args, words, resources)


def play(*flags):
    """Returns of an evaluation, to the last bit."""
    with ExitStack() as resources:
        return player_of(resources, *flags).play().tolist()


def main(*flags):
    return evaluate.main([*CPU, *map(str, flags)])


def change_flags(run, **changes):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(capsys, folder, flags, *words):
    """One line that says the words, status 2, and not a file or folder more or less than before."""
    capsys.readouterr()
    before = contents(folder), set(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(*flags)
    output = capsys.readouterr()
    assert (exit_.value.code, output.out, output.err.count("\n")) == (2, "", 1), output
    assert output.err.startswith("evaluate.py: error: ")
    for word in words:
        assert str(word) in output.err
    assert (contents(folder), set(folder.rglob("*"))) == before


def test_what_it_prints(runs, capsys, monkeypatch):
    """The returns of episodes that the seed selects, by default others than in training."""
    monkeypatch.delattr(train, "make_replay")  # it takes no memory for a replay
    assert main(runs / "sac_ae", "--episodes", 3, "--seed", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"models: {runs / 'sac_ae' / 'model'}, step 30"
    returns, others = (play(runs / "sac_ae", "--episodes", 3, "--seed", seed) for seed in (5, 6))
    assert len({*returns, *others}) == 6
    for episode, value in enumerate(returns):
        seed = np.random.SeedSequence((5, episode)).generate_state(1)[0]
        assert lines[1 + episode] == f"episode {episode}, seed {seed}: return {value:.4f}"
    assert lines[4] == f"mean {np.mean(returns):.4f}, standard deviation {np.std(returns):.4f}"
    assert re.fullmatch(r"reconstruction: PSNR \d+\.\d\d dB, SSIM -?0\.\d{4}", lines[5])
    assert len(lines) == 6
    assert evaluate.make_parser().get_default("seed") != train.make_parser().get_default("seed")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_in_training(runs, monkeypatch, method):
    """Given the same seeds, to the last bit."""
    logged = {record["step"]: record["episode_reward"] for record in read_log(runs / method / "eval.log")}
    assert logged[0] != logged[20]
    for step, value in logged.items():
        seeds = [seed_of(1, "evaluation", step, episode) for episode in range(2)]
        monkeypatch.setattr(evaluate, "episode_seed", lambda _, episode, seeds=seeds: seeds[episode])
        assert np.sum(play(runs / method, "--episodes", 2, "--step", step)) / 2 == value > 0


def test_bfloat16(runs, run, capsys, monkeypatch):
    """A run's precision is kept wherever it is played; asked for, it is refused where it is emulated."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    change_flags(run, precision="bf16")
    in_fp32 = play(runs / "sac_ae", "--episodes", 2)
    assert play(run, "--episodes", 2) != in_fp32 == play(run, "--episodes", 2, "--precision", "fp32")
    assert_refused(capsys, run, [runs / "sac_ae", "--precision", "bf16"], "precision bf16 is slow on")


def test_a_simulation_that_diverges_ends_an_episode(runs, capsys, monkeypatch):
    def diverge(env, action):
        return env.reset()[0], 0.0, True, False, {"physics_error": "why"}

    monkeypatch.setattr(BarEnv, "step", diverge)
    assert main(runs / "sac_ae", "--episodes", 2) == 0
    words = "warning: the simulation diverged at episode {}, decision 1, which ends the episode: why\n"
    assert capsys.readouterr().err == words.format(0) + words.format(1)


def test_choice_of_models(tmp_path):
    """The newest step, or the one that is named, of which all networks are there: a killed run may lack some."""
    model = tmp_path / "model"
    model.mkdir()
    names = ["critic_x.pt", "actor_99.pt.tmp", "actor_30.pt", "critic_30.pt", "actor_40.pt", "other_60.pt"]
    names += ["best_actor_9.pt"]  # a copy that somebody has made
    for name in names + [f"{name}_{step}.pt" for step in (9, 10) for name in ("actor", "critic", "decoder", "more")]:
        (model / name).touch()
    for folder in (tmp_path, model):
        assert evaluate.find_models(folder, None) == (model, 10, None)
        assert evaluate.find_models(folder, 9) == (model, 9, None)
        with pytest.raises(UserError, match=r"model holds no models of step 30; close ones: 9, 10$"):
            evaluate.find_models(folder, 30)


def test_a_run_may_be_in_a_folder_named_model(run):
    """Its args.json counts, not one in the folder above."""
    moved = run.rename(run.parent / "model")
    (run.parent / "args.json").write_text("{}")
    assert evaluate.run_folder(moved) == evaluate.run_folder(moved / "model") == moved


def test_a_checkpoint_serves_where_no_models_were_saved(run, capsys, monkeypatch):
    """The run's end is both: the same returns. Its index is read once."""
    saved, read, folders = play(run), checkpoint.read_checkpoint, []
    shutil.rmtree(run / "model")
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda folder: folders.append(folder) or read(folder))
    assert main(run) == 0
    assert folders == [run]
    assert f"models: {run / 'checkpoint'}, step 30\n" in capsys.readouterr().out
    assert play(run) == play(run, "--step", 30) == saved
    assert_refused(capsys, run, [run, "--step", 20], "holds no models of step 20")
    assert_refused(capsys, run, [run, "--hidden_dim", 64], "is of another agent", "those given replace them")


def test_the_model_folder_itself(runs, monkeypatch):
    """It finds the flags of its run, also from within."""
    want = play(runs / "sac_ae", "--episodes", 2)
    monkeypatch.chdir(runs / "sac_ae" / "model")
    assert play(".", "--episodes", 2) == want


def test_models_of_the_authors_script(runs, tmp_path, capsys):
    """In the file format of their time, saved on a GPU, without an args.json, or with one that lacks newer flags."""
    folder = tmp_path / "authors"
    folder.mkdir()
    for name in ("actor", "critic", "decoder"):
        path = folder / f"{name}_30.pt"
        state = torch.load(runs / "sac_ae" / "model" / path.name)
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    command, want = [folder, *MODEL_FLAGS], play(runs / "sac_ae", "--episodes", 2)
    assert play(*command, "--episodes", 2) == want

    hint = "without an args.json give the flags"
    assert_refused(capsys, folder, [*command, "--hidden_dim", 64], folder / "actor_30.pt", "trunk.0.weight", hint)
    assert_refused(capsys, folder, [*command, "--num_layers", 3], "encoder.convs.2.weight", hint)

    flags = json.loads((runs / "sac_ae" / "args.json").read_text())
    for name in ("device", "precision", "eval_workers", "compile", "cuda_graph", "agent"):
        del flags[name]
    (folder / "args.json").write_text(json.dumps(flags | {"transform1": "crop"}))
    assert play(folder, "--episodes", 2) == want
    words = f"the flags are those of {folder / 'args.json'}, and those given replace them"
    assert_refused(capsys, folder, [folder, "--hidden_dim", 64], words)

    (folder / "decoder_30.pt").unlink()
    assert_refused(capsys, folder, [folder], folder / "decoder_30.pt", "is missing")
    assert len(play(folder, "--decoder_type", "identity", "--episodes", 1)) == 1


def test_flags_of_a_run_are_values(run, monkeypatch):
    """They keep their types, as no text would; those that are given replace them."""
    change_flags(run, task_name="--help", seed=3, hidden_dim=0)
    read = evaluate.training_flags(run / "args.json", ["--hidden_dim", "100"])
    assert (read.task_name, read.num_layers, read.hidden_dim) == ("--help", 2, 100)
    seeds = []  # tasks may draw from it what all episodes share, as LQR its springs
    monkeypatch.setattr(train, "make_env", lambda args, seed: seeds.append(seed) or make_sliding_env(args, seed))
    change_flags(run, hidden_dim=32)
    play(run, "--episodes", 2, "--seed", 4)
    assert set(seeds) == {3}


@pytest.mark.parametrize(("name", "value"), [
    ("image_size", "x"), ("image_size", True), ("image_size", 16.5), ("image_size", float("inf")), ("agent", []),
    ("encoder_type", "vit"), ("num_eval_episodes", 0), ("alpha_lr", 0.0), ("init_temperature", 0), ("critic_beta", 1.0),
    ("actor_update_freq", -1), ("compile", "yes"),
])  # fmt: skip
def test_values_that_no_flag_can_have(run, capsys, name, value):
    """The authors' script takes any: the default serves in their place, with a note, or what is given, without one."""
    want, good = play(run, "--episodes", 1), json.loads((run / "args.json").read_text())[name]
    change_flags(run, **{name: value})
    note = f"note: {name} cannot be {value!r}, as in {run / 'args.json'}: without --{name} its default is used\n"
    assert getattr(evaluate.training_flags(run / "args.json", []), name) == train.make_parser().get_default(name)
    assert capsys.readouterr().err == note
    words = ["--no-compile"] if name == "compile" else [f"--{name}", good]
    assert play(run, "--episodes", 1, *words) == want
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]", b"3", b"[" * 100_000])
def test_flags_that_are_no_json_object(run, capsys, content):
    (run / "args.json").write_bytes(content)
    assert_refused(capsys, run, [run], run / "args.json", "is damaged")


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed(change):
    """Saves what `change` makes of the state that a file holds."""
    return lambda path, evil: torch.save(change(torch.load(path), evil), path)


DAMAGED = "is damaged or does not belong here"
BAD_FILES = {
    "folder": (lambda path, _: path.unlink() or path.mkdir(), "cannot be read: Is a directory"),
    "truncated": (lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), DAMAGED),
    "pickle of code": (lambda path, evil: path.write_bytes(pickle.dumps(evil)), DAMAGED),
    "code among weights": (changed(lambda state, evil: state | {"x": evil}), DAMAGED),
    "list": (changed(lambda *_: [1, 2]), DAMAGED),
    "fewer": (changed(lambda state, _: dict(list(state.items())[1:])), DAMAGED),
    "other shape": (changed(lambda state, _: state | {max(state): torch.zeros(77)}), DAMAGED),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(runs, tmp_path, capsys, kind):
    """Of each network: a line that names the file; the code in it is not executed; no video is begun."""
    harm, words = BAD_FILES[kind]
    for name in NETWORKS:
        run = shutil.copytree(runs / "sac_ae", tmp_path / name)
        path = run / "model" / f"{name}_30.pt"
        harm(path, Evil(tmp_path / "evil"))
        flags = [run, "--step", 30, "--video", tmp_path / "v" / "a.mp4"]
        assert_refused(capsys, tmp_path, flags, path, words)
        assert not (tmp_path / "evil").exists()


def test_a_bad_action(run, tmp_path, capsys):
    path = run / "model" / "actor_30.pt"
    torch.save(torch.load(path) | {"trunk.4.bias": torch.full((2,), float("nan"))}, path)
    assert main(run, "--video", tmp_path / "new" / "a.mp4") == 1
    output = capsys.readouterr()
    assert "the policy's action is NaN or infinite: the models of step 30 have diverged\n" in output.err
    assert "return" not in output.out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("flags", "words"), [
    ("--image_size RUN", "--image_size"), ("32 RUN", "32 is not a folder: first name a run's folder"),
    ("RUN --load_step 0", "load_step: only a new run loads an encoder; --step chooses the models to play"),
    ("RUN --episodes 0", "--episodes"), ("RUN --step -1", "--step"),
    ("RUN --device cuda:77", "device cuda:77"), ("RUN --image_size 33", "even"),
    ("FOLDER/none", "none is not a folder"), ("FOLDER/file.mp4", "file.mp4 is not a folder"),
    ("FOLDER/empty", "empty holds no models (actor_STEP.pt, ...): train.py writes them with --save_model"),
    ("RUN --video FOLDER/file.mp4", "exists already"), ("RUN --video FOLDER/link.mp4", "exists already"),
    ("RUN --video FOLDER/a.avi", "must end in .mp4"), ("RUN --video FOLDER/file.mp4/b.mp4", "Not a directory"),
    (f"RUN --video FOLDER/{252 * 'a'}.mp4", "File name too long"), ("RUN --video /proc/new/a.mp4", "/proc/new/a.mp4"),
])  # fmt: skip
def test_what_is_refused(runs, tmp_path, capsys, flags, words):
    (tmp_path / "file.mp4").write_text("precious")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty" / "model").mkdir(parents=True)
    flags = flags.replace("RUN", str(runs / "sac_ae")).replace("FOLDER", str(tmp_path))
    assert_refused(capsys, tmp_path, flags.split(), words)


@pytest.mark.parametrize(("method", "panels"), [("sac_ae", 3), ("sac_pixel", 2)])
def test_pictures_of_a_video(runs, tmp_path, method, panels):
    """Of the first episode: the scene, what is observed, and what the decoder makes of it, side by side."""
    with ExitStack() as resources:
        player = player_of(resources, runs / method, "--episodes", 11, "--video", tmp_path / "a.mp4")
        assert player.play().tolist() == play(runs / method, "--episodes", 11)
        pictures = np.stack(list(player.pictures()))
    scenes, stacks = np.stack(player.scenes), np.stack(player.seen)
    assert scenes[:, 0, 0, 1].tolist() == [12 * decision for decision in range(21)]
    assert stacks[:, -3:].min(axis=(1, 2, 3)).tolist() == [10 * decision for decision in range(21)]
    args = evaluate.training_flags(runs / method / "args.json", [])
    assert np.array_equal(stacks[0], make_sliding_env(args, 1).reset(seed=player.seeds[0])[0])

    def enlarged(stacks):
        return stacks[:, -3:].repeat(8, axis=2).repeat(8, axis=3).transpose(0, 2, 3, 1)

    assert pictures.shape == (21, 256, 256 * panels, 3)
    assert np.array_equal(pictures[:, :, :512], np.concatenate([scenes, enlarged(stacks)], axis=2))
    if panels == 3:
        with torch.no_grad():
            images = player.agent.decoder(player.agent.critic.encoder(torch.as_tensor(stacks)))
        pixels = ((images + 0.5) * 255).clamp(0, 255).numpy()
        assert np.abs(pictures[:, :, 512:] - enlarged(pixels)).max() < 1
        assert np.abs(pixels - stacks).mean() > 12  # else the panel could be the observation's


def linear_task(count, noise=0.0):
    """Features and states: a linear map with noise, and a state that stays; and which rows serve the fit: the first."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((count, 4)) * [1e-3, 1, 10, 0] + 5
    states = features[:, :2] @ [[1e3, 0], [0, -2]] + 7 + noise * rng.standard_normal((count, 2))
    return features, np.column_stack([states, np.full(count, 0.1)]), np.arange(count) < count // 2


def test_a_linear_fit():
    """Its score is that of rows that it has not seen, whatever the size and the number of the features."""
    assert evaluate.linear_fit(*linear_task(120)) == pytest.approx([1, 1, np.nan], abs=1e-4, nan_ok=True)
    features, states, fit = linear_task(1600, noise=0.5)
    scores = evaluate.linear_fit(features, states, fit)[:2]
    assert scores == pytest.approx([1 / 1.25, 4 / 4.25], abs=0.02)  # the part of the signal in signal and noise
    twice = evaluate.linear_fit(*(np.concatenate([each, each]) for each in (features, states, fit)))[:2]
    assert twice == pytest.approx(scores, rel=1e-9)
    for rows in (fit, ~fit):  # features of other rows
        others = features.copy()
        others[rows] = features[rows][::-1]
        assert (evaluate.linear_fit(others, states, fit)[:2] < 0.1).all()
    # A feature that stays in the rows of the fit, but for its last digit, and moves in the others.
    more = np.where(fit, 1 + 1e-7 * (np.arange(len(fit)) % 2), 2)
    in_float32 = np.column_stack([features, more]).astype(np.float32)
    assert evaluate.linear_fit(in_float32, states, fit)[:2] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_probe(runs, capsys, monkeypatch, workers):
    """Each observation's features, with the state that it shows, of episodes of different lengths in several waves."""
    monkeypatch.setattr(evaluate, "MAX_ENVS", 2)
    step = SlidingEnv.step

    def shorter(env, action):  # by where the episode began
        env.first = env.position if env.steps == 0 else env.first
        obs, reward, _, truncated, info = step(env, action)
        return obs, reward, env.steps == 5 + int(5 * abs(env.first)), truncated, info

    monkeypatch.setattr(SlidingEnv, "step", shorter)
    flags = [runs / "sac_ae", "--episodes", 5, "--probe", "--eval_workers", workers]
    with ExitStack() as resources:
        player = player_of(resources, *flags)
        # In place of the encoder: the column of the bar in the newest frame.
        player.agent.features = lambda obs: torch.from_numpy(obs[:, -1, :1].argmax(axis=2))
        player.untrained.features = lambda obs: torch.zeros(len(obs), 1)
        player.play()
        lines = list(player.probe())
    episodes, features, states = zip(*player.probed, strict=True)
    lengths = np.bincount(episodes)
    assert len(lengths) == 5
    assert len(set(lengths)) > 1
    assert [int((position + 1) / 2 * 28) for position, _ in states] == [column for (column,), _ in features]
    assert {size for _, size in states} == {32}
    position, deviation = re.findall(r"^position/0: R2 (.*), of the untrained encoder .*; .* (\S+)$", lines[0])[0]
    assert float(position) > 0.98
    first, columns, states = np.array(episodes) < 3, np.array(features)[:, 0], np.array(states)
    assert position == f"{evaluate.linear_fit(columns, states, first)[0]:.4f}"
    assert position != f"{evaluate.linear_fit(columns, states, ~first)[0]:.4f}"
    assert float(deviation) == pytest.approx(states[~first].std(axis=0)[0], rel=1e-3)
    assert lines[1] == "size/0: does not change; standard deviation 0"
    assert lines[2].startswith(f"mean: R2 {position}, of the untrained encoder ")
    assert lines[3].startswith(f"median: R2 {position}, of the untrained encoder ")
    assert lines[4] == "fit on 3 of 5 episodes; R2 and standard deviation are of the others"
    capsys.readouterr()
    assert main(*flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5 + 2 + 5


def test_the_untrained_encoder_is_the_run_s_own(run, capsys):
    """That of its first models; so both scores of these are the same."""
    assert main(run, "--episodes", 4, "--probe", "--step", 0) == 0
    scores = re.findall(r"R2 ([-.\d]+), of the untrained encoder ([-.\d]+)", capsys.readouterr().out)
    assert [trained for trained, _ in scores] == [untrained for _, untrained in scores]
    assert len(scores) == 3
    assert main(run, "--episodes", 4, "--probe") == 0
    after = re.findall(r"R2 ([-.\d]+), of the untrained encoder ([-.\d]+)", capsys.readouterr().out)
    assert {trained for trained, _ in after}.isdisjoint(untrained for _, untrained in after)


def test_what_cannot_be_probed(runs, tmp_path, capsys, monkeypatch):
    refused = functools.partial(assert_refused, capsys, tmp_path)
    refused([runs / "sac_ae", "--probe", "--episodes", 1], "probe needs at least 2 episodes")
    refused([runs / "sac_state", "--probe"], "probe has nothing to fit: this run observes states")
    for name, value in (("state_names", ()), ("state_names", ("one",)), ("current_state", np.zeros(3))):
        with monkeypatch.context() as patch:
            patch.setattr(SlidingEnv, name, value)
            refused([runs / "sac_ae", "--probe"], "this environment has no state_names for its current_state")
    monkeypatch.delattr(SlidingEnv, "state_names")
    refused([runs / "sac_ae", "--probe"], "this environment has no state_names for its current_state")


def test_states_and_features_that_are_no_numbers(runs, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SlidingEnv, "current_state", np.array([0, np.nan]))
        assert main(runs / "sac_ae", "--probe") == 1
    assert capsys.readouterr().err == "evaluate.py: error: the task's state is NaN or infinite\n"
    path = run / "model" / "critic_30.pt"
    torch.save(torch.load(path) | {"encoder.fc.bias": torch.full((50,), float("nan"))}, path)
    assert main(run, "--probe") == 1
    assert capsys.readouterr().err == "evaluate.py: error: a feature by the models of step 30 is NaN or infinite\n"


def test_without_ffmpeg_nothing_is_played(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    assert_refused(capsys, tmp_path, [runs / "sac_ae", "--video", tmp_path / "v" / "a.mp4"], tmp_path / "v" / "a.mp4")


def test_someone_elses_file_is_not_overwritten_by_a_video(runs, tmp_path, capsys, monkeypatch):
    """Which appears while episodes are played. The returns are printed before."""
    path = tmp_path / "a.mp4"

    def put_in_the_way(player):
        path.write_text("precious")
        return [np.zeros((16, 16, 3), np.uint8)]

    monkeypatch.setattr(evaluate.Player, "pictures", put_in_the_way)
    assert main(runs / "sac_ae", "--episodes", 1, "--video", path) == 1
    output = capsys.readouterr()
    assert output.err == f"evaluate.py: error: {path} exists already, and is not overwritten\n"
    assert "\nmean " in output.out
    assert contents(tmp_path) == {"a.mp4": b"precious"}


def test_interrupt(runs):
    process = Program("evaluate.py", runs / "sac_state", "--episodes", "20", *CPU)
    assert process.stdout.readline().startswith("models: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "evaluate.py: stopped by SIGINT\n"
