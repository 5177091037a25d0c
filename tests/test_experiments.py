"""The paper's other experiments: who trains the encoder, an encoder that was saved, a variational autoencoder."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal

import golden
import plain
import pytest
import torch
from agents import OneBatch, Recorder, make_agent, updates
from folders import outcome
from forked import Forked, slow_disk
from runs import METHODS, TOY, assert_refused, read_log
from toy import make_toy_env

import encoder as encoder_module
import evaluate
import sac_ae
import train
from errors import UserError
from files import write_tensors
from sac_vae import SacVaeAgent
from support.checkpoint import find_models
from utils import module_hash

ALTERNATING = {"critic_trains_encoder": False, "decoder_update_freq": 3}
EXPERIMENTS = {  # keywords of the agent
    # The decoder every third time, so that the actor is due with it and without it.
    "actor": {"actor_trains_encoder": True, "decoder_update_freq": 3},
    "alternating": ALTERNATING,
    "actor, not critic": {"actor_trains_encoder": True, "critic_trains_encoder": False},
    "frozen": {"freeze_encoder": True},
    "vae": {"cls": SacVaeAgent, "beta": 0.01},
    "alternating vae": {"cls": SacVaeAgent, "beta": 0.01} | ALTERNATING,
    "joint vae": {"cls": SacVaeAgent, "beta": 0.01, "actor_trains_encoder": True},
    "frozen vae": {"cls": SacVaeAgent, "freeze_encoder": True, "beta": 0.01},
}
RUN = [*TOY, *"--init_steps 20 --num_train_steps 85 --eval_freq 40 --checkpoint_minutes 0".split()]
PARTS = {  # attributes of the agent, by what the experiments tell apart
    "convolutions": ("critic.encoder.convs", "actor.encoder.convs"),
    "encoder's head": ("critic.encoder.fc", "critic.encoder.ln"),
    "Q": ("critic.Q1", "critic.Q2"),
    "actor": ("actor.trunk",),
    "decoder": ("decoder",),
    "target's encoder": ("critic_target.encoder",),
}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(train, "make_env", make_toy_env)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has saved its models."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", make_toy_env)
        assert train.main([*RUN, "--save_model", "--seed", "2", "--work_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def of_states(tmp_path_factory):
    """A run on states that has saved its models."""
    folder = tmp_path_factory.mktemp("of_states") / "run"
    flags = [*RUN, *METHODS["sac_state"], "--num_train_steps", "1", "--save_model", "--work_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_env", make_toy_env)
        assert train.main(flags) == 0
    return folder


def flags_of(experiment, folder=None):
    """An experiment's flags; with a folder, also --load_encoder."""
    settings = dict(EXPERIMENTS[experiment])
    words = ["--agent", "sac_vae"] if settings.pop("cls", None) else []
    words += [] if folder is None else ["--load_encoder", str(folder)]
    for name, value in settings.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def plain_agent(agent, cls=None, beta=None, **flags):
    """The restatement of an agent, with the same parameters."""
    states = [network.state_dict() for network in (agent.actor, agent.critic, agent.decoder)]
    if cls is None:
        return plain.PlainAgent(*states, **flags)
    return plain.PlainVae(*states, agent.log_variance.state_dict(), beta, **flags)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_same_as_the_plain_restatement(experiment):
    """Losses and parameters, to 1e-9."""
    settings = EXPERIMENTS[experiment]
    case = golden.load("pixel")["case"] | {"size": 24, "layers": 2, "updates": 7}
    agent, rs = golden.start(case, **settings)
    restated, other = plain_agent(agent, **settings), plain_agent(agent)
    for step, batch, normals, uniforms in golden.draw_batches(case, rs):
        normals = normals[: 2 - step % 2]  # the actor's is not drawn where it is not due
        samples = [rs.standard_normal((case["batch"], case["feature"]))] if "cls" in settings else []
        floats = tuple(field.double() for field in batch)
        with golden.noise([*normals, *samples], uniforms):
            metrics = agent.update(OneBatch(batch), Recorder(), step)
        with golden.noise([*normals, *samples], uniforms):
            losses = restated.update(floats, step)
        with golden.noise(normals, uniforms):
            others = other.update(floats, step)
        metrics = {key: value.item() for key, value in metrics.items()}
        assert golden.losses(metrics | {"step": step}) == pytest.approx(losses, rel=1e-9)
    assert losses["critic_loss"] != pytest.approx(others["critic_loss"], rel=1e-6)  # the method itself differs
    assert agent.log_alpha.item() == pytest.approx(restated.log_alpha.item(), rel=1e-9)
    parts = {name: getattr(restated, name) for name in agent.networks if name != "critic_target"}
    for name, parameters in (parts | {"critic_target": restated.target}).items():
        want = {key: value.detach() for key, value in parameters.items()}
        torch.testing.assert_close(dict(getattr(agent, name).state_dict()), want, rtol=1e-9, atol=1e-12)


STILL = {"convolutions", "encoder's head", "decoder", "target's encoder"}


@pytest.mark.parametrize(
    ("experiment", "unchanged"),
    [("actor", set()), ("alternating", set()), ("vae", set()), ("frozen", STILL), ("frozen vae", STILL)],
)
def test_what_learns(experiment, unchanged):
    agent = make_agent(**EXPERIMENTS[experiment])
    before = copy.deepcopy(agent)
    updates(agent, range(4))
    for part, names in PARTS.items():
        for name in names:
            same = module_hash(agent.get_submodule(name)) == module_hash(before.get_submodule(name))
            assert same == (part in unchanged), name


@pytest.mark.parametrize("experiment", ["alternating", "alternating vae"])
def test_between_the_decoders_updates_an_alternating_encoder_stays(experiment):
    """Neither critic nor actor train it; the critic's Q functions learn."""
    agent = make_agent(**EXPERIMENTS[experiment])
    parts = {"encoder": agent.critic.encoder, "Q": agent.critic.Q1, "policy": agent.actor.trunk}
    for step in range(1, 7):
        before = {name: module_hash(part) for name, part in parts.items()}
        updates(agent, [step])
        changed = {name: module_hash(part) != before[name] for name, part in parts.items()}
        assert changed == {"encoder": step % 3 == 0, "Q": True, "policy": step % 2 == 0}


def test_features_of_a_variational_autoencoder():
    """Actor and critic get the mean, which has no noise; the decoder's loss draws anew each time."""
    agent = make_agent(**EXPERIMENTS["vae"])
    obs = torch.randint(0, 256, (8, 9, 16, 16)).float()
    feature = agent.critic.encoder(obs)
    assert torch.equal(agent.actor.encoder(obs), feature)
    assert torch.equal(agent.features(obs.byte().numpy()), feature)
    with torch.no_grad():
        losses = {agent.decoder_loss(obs, agent.critic.encoder.forward_conv(obs)).item() for _ in range(3)}
    assert len(losses) == 3


# Saved and frozen encoders


@pytest.mark.parametrize(
    ("words", "told"), [("--freeze_encoder", 1), ("--freeze_encoder --decoder_type identity", 0), ("", 0)]
)
def test_a_decoder_that_will_not_train_is_told(tmp_path, capsys, words, told):
    assert train.main([*RUN, *words.split(), "--num_train_steps", "1", "--work_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("note: the decoder will not train either") == told


def test_layers_that_were_frozen_before_stay_so(monkeypatch):
    """As pretrained ones of an encoder of one's own."""

    def make_encoder(*args):
        encoder = encoder_module.make_encoder(*args)
        encoder.convs[0].requires_grad_(False)
        return encoder

    monkeypatch.setattr(sac_ae, "make_encoder", make_encoder)
    agent = make_agent()
    before = copy.deepcopy(agent.critic.encoder)
    updates(agent, range(2))
    for layer, same in ((0, True), (1, False)):
        assert torch.equal(agent.critic.encoder.convs[layer].weight, before.convs[layer].weight) == same


@pytest.mark.parametrize("experiment", ["actor", "vae"])
def test_models_that_a_kill_leaves_incomplete_are_not_found(tmp_path, monkeypatch, experiment):
    """Whatever networks an agent has."""
    agent = make_agent(**EXPERIMENTS[experiment])
    agent.save(tmp_path / "model", 1)
    for last in range(1, len(agent.networks)):
        written = []

        def write(path, content, written=written, last=last):
            if len(written) == last:
                raise KeyboardInterrupt
            written.append(path)
            write_tensors(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(sac_ae, "write_tensors", write)
            with pytest.raises(KeyboardInterrupt):
                agent.save(tmp_path / "model", 2)
        assert find_models(tmp_path, None)[1] == 1
    agent.save(tmp_path / "model", 2)
    assert find_models(tmp_path, None)[1] == 2


@pytest.mark.parametrize(("words", "step"), [([], 85), (["--load_step", "40"], 40)])
@pytest.mark.parametrize("place", [".", "model"])
def test_an_encoder_is_loaded_for_critic_and_target(trained, tmp_path, monkeypatch, capsys, words, step, place):
    """Of the newest models or of those that are named. The actor has its convolutions; nothing else is taken."""
    monkeypatch.chdir(trained)
    flags = [*RUN, *words, "--load_encoder", place, "--save_model", "--num_train_steps", "1"]
    assert train.main([*flags, "--work_dir", str(tmp_path)]) == 0
    assert f"encoder: that of {trained / 'model'}, step {step}\n" in capsys.readouterr().out
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["load_encoder"], args["load_step"]) == (str((trained / place).resolve()), step)
    theirs = torch.load(trained / "model" / f"critic_{step}.pt")
    critic, actor, target = (torch.load(tmp_path / "model" / f"{name}_0.pt") for name in ("critic", "actor", "target"))
    for name, parameter in critic.items():
        if name.startswith("encoder."):
            assert torch.equal(parameter, theirs[name])
        elif parameter.any():  # biases begin as zeros
            assert not torch.equal(parameter, theirs[name])
        assert torch.equal(parameter, target["critic_target"][name])
        assert (".convs." not in name) or torch.equal(parameter, actor[name])
    assert not torch.equal(actor["encoder.fc.weight"], critic["encoder.fc.weight"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--load_encoder RUN --num_filters 3", ["convs.0.weight is (2, 9, 3, 3), and here it is (3, "]),
        ("--load_encoder RUN --image_size 32", ["there fc.weight is (50, 162), and here it is (50, 338)"]),
        ("--load_encoder RUN --num_layers 1", ["there fc.weight is (50, 162), and here it is (50, 242)"]),
        ("--load_encoder RUN --num_layers 3", ["there convs.2.weight is missing, and here it is (2, 2, 3, 3)"]),
        ("--load_encoder RUN --load_step 41", ["holds no models of step 41; close ones: 0, 40, 80"]),
        ("--load_encoder TMP", ["holds no models"]),
        ("--load_encoder TMP/none", ["load_encoder TMP/none is not a folder"]),
        ("--load_encoder SOME", ["holds a checkpoint, but no models"]),
        ("--load_encoder STATES", ["critic_1.pt is of another encoder: there convs.0.weight is missing"]),
        ("--load_step 40", ["load_step needs load_encoder"]),
        ("--load_encoder RUN --encoder_type identity --decoder_type identity", ["load_encoder needs encoder_type"]),
    ],
)  # fmt: skip
def test_encoders_that_are_refused(trained, of_states, tmp_path, capsys, flags, words):
    """In a line, before anything is written."""
    shutil.copytree(trained / "checkpoint", tmp_path / "some" / "checkpoint")
    places = {"RUN": str(trained), "TMP": str(tmp_path), "STATES": str(of_states), "SOME": str(tmp_path / "some")}
    given = re.sub("RUN|TMP|STATES|SOME", lambda match: places[match[0]], flags).split()
    for word in words:
        word = word.replace("TMP", str(tmp_path))
        assert_refused(capsys, [*RUN, *given, "--work_dir", str(tmp_path / "log")], word)
    assert not (tmp_path / "log").exists()


def test_a_refused_encoder_changes_nothing(trained):
    agent = make_agent(num_filters=2, encoder_feature_dim=50)  # another size of images
    before = module_hash(agent)
    with pytest.raises(UserError, match=r"critic_85\.pt is of another encoder: there fc\.weight"):
        agent.load_encoder(trained / "model", 85)
    assert module_hash(agent) == before


# Runs


@pytest.mark.parametrize("experiment", ["actor", "alternating", "frozen", "alternating vae", "joint vae"])
def test_killed_and_resumed(trained, tmp_path, experiment):
    """It comes to what a run comes to that never stopped, and plays, also if the loaded models are gone by then."""
    models = shutil.copytree(trained / "model", tmp_path / "models")
    flags = [*RUN, *flags_of(experiment, models)]
    assert train.main([*flags, "--work_dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "log"

    def start():
        slow_disk()  # the kill often meets a checkpoint that is half written
        return train.main([*flags, "--work_dir", str(folder)])

    process = Forked(start)
    assert any(line.startswith("| train | E: 2") for line in process.stdout), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    shutil.rmtree(models)
    assert train.main([*flags, "--work_dir", str(folder), "--resume"]) == 0
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert len(read_log(folder / "eval.log")) == 3
    assert evaluate.main([str(folder), "--episodes", "1", "--device", "cpu", "--eval_workers", "1"]) == 0
