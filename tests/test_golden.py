"""The update computes the published method: against golden numbers and against the plain restatement."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import os

import golden
import numpy as np
import plain
import pytest
import torch

from precision import layers_in
from support.machine import check_compiler

LONG = bool(os.environ.get("LONG_TESTS"))
ALL_LOSSES = {"critic_loss", "actor_loss", "alpha_loss", "decoder_loss"}
LOSSES = {
    "critic_loss": "train_critic/loss",
    "actor_loss": "train_actor/loss",
    "alpha_loss": "train_alpha/loss",
    "ae_loss": "train_ae/ae_loss",
}


@pytest.fixture(scope="module")
def compiler():
    """Skips where torch.compile does not work."""
    try:
        check_compiler("cpu")
    except ValueError as error:
        pytest.skip(str(error))


class OneBatch:
    """A replay that gives the batch it was given."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self):
        return self.batch


class Recorder:
    """A logger that remembers."""

    def __init__(self):
        self.values = {}

    def log(self, key, value, step, n=1):
        self.values[key, step] = float(value)


def agent_updates(agent, case, rs):
    """The losses of the project's updates, as the golden files have them."""
    logger = Recorder()
    losses = []
    for step, batch, normals, uniforms in golden.draw_batches(case, rs):
        with golden.noise(normals, uniforms):
            agent.update(OneBatch(batch), logger, step)
        losses.append(
            {"step": step}
            | {name: logger.values[key, step] for name, key in LOSSES.items() if (key, step) in logger.values}
        )
    return losses


def plain_agent(agent):
    """The plain restatement, from the agent's parameters."""
    decoder = None if agent.decoder is None else agent.decoder.state_dict()
    return plain.PlainAgent(agent.actor.state_dict(), agent.critic.state_dict(), decoder)


def plain_updates(agent, case, rs):
    losses = []
    for step, batch, normals, uniforms in golden.draw_batches(case, rs):
        with golden.noise(normals, uniforms):
            losses.append(agent.update(tuple(field.double() for field in batch), step))
    return losses


def approx(values):
    # Sums of many small numbers cancel: an absolute bound far below any of the terms.
    return pytest.approx(values, rel=1e-9, abs=1e-14)


def assert_losses_equal(losses, expected):
    assert [set(loss) for loss in losses] == [set(loss) for loss in expected]
    for loss, want in zip(losses, expected, strict=True):
        assert loss == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["pixel", "state"])
def test_agent_matches_golden(name):
    data = golden.load_case(name)
    rs = np.random.RandomState(data["case"]["seed"])
    agent = golden.make_agent(data["case"])
    golden.draw_parameters(agent, rs)
    assert_losses_equal(agent_updates(agent, data["case"], rs), data["losses"])
    assert agent.log_alpha.item() == approx(data["log_alpha"])
    for network, parameters in data["final"].items():
        state = getattr(agent, network).state_dict()
        assert set(state) == set(parameters)
        for parameter, want in parameters.items():
            assert golden.statistics(state[parameter]) == approx(golden.expected_statistics(want)), parameter


@pytest.mark.parametrize("name", ["pixel", "state"])
def test_plain_restatement_matches_golden(name):
    data = golden.load_case(name)
    rs = np.random.RandomState(data["case"]["seed"])
    agent = golden.make_agent(data["case"])
    golden.draw_parameters(agent, rs)
    restated = plain_agent(agent)
    assert_losses_equal(plain_updates(restated, data["case"], rs), data["losses"])
    assert restated.log_alpha.item() == approx(data["log_alpha"])
    networks = {"actor": "actor", "critic": "critic", "critic_target": "target", "decoder": "decoder"}
    for network, parameters in data["final"].items():
        state = getattr(restated, networks[network])
        for parameter, want in parameters.items():
            assert golden.statistics(state[parameter]) == approx(golden.expected_statistics(want)), parameter


def test_golden_test_can_fail():
    """A discount that is off by a thousandth shows."""
    data = golden.load_case("state")
    rs = np.random.RandomState(data["case"]["seed"])
    agent = golden.make_agent(data["case"], discount=0.991)
    golden.draw_parameters(agent, rs)
    with pytest.raises(AssertionError):
        assert_losses_equal(agent_updates(agent, data["case"], rs), data["losses"])


def test_uint8_and_floating_observations_are_the_same():
    """Batches may hold pixels as they are stored or as numbers, in the networks' dtype or another."""
    case = golden.load_case("pixel")["case"] | {"updates": 2}
    results = []
    for dtype in (torch.uint8, torch.float32, torch.float64):
        rs = np.random.RandomState(case["seed"])
        agent = golden.make_agent(case)
        golden.draw_parameters(agent, rs)
        for step, batch, normals, uniforms in golden.draw_batches(case, rs):
            obs, action, reward, next_obs, not_done = batch
            with golden.noise(normals, uniforms):
                metrics = agent.update(
                    OneBatch((obs.to(dtype), action, reward, next_obs.to(dtype), not_done)), Recorder(), step
                )
        results.append({key: float(value) for key, value in metrics.items()})
    assert results[0] == results[1] == results[2]


def test_bfloat16_uses_the_weights_that_were_just_stepped():
    """Actor and decoder see the critic's new weights; a large step shows whether they do."""
    case = golden.load_case("pixel")["case"] | {"updates": 1, "first_step": 2}
    losses = []
    for precision in (None, "bf16"):
        rs = np.random.RandomState(case["seed"])
        agent = golden.make_agent(case, precision=precision, critic_lr=0.03)
        golden.draw_parameters(agent, rs)
        for name in ("actor", "critic", "critic_target", "decoder"):
            getattr(agent, name).float()
        losses += agent_updates(agent, case, rs)
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)


def test_bfloat16_stays_near_float32_and_keeps_what_must_be_exact():
    """Layers in bfloat16; weights, optimisers, densities, targets and losses in float32."""
    case = golden.load_case("pixel")["case"] | {"updates": 2}
    losses = []
    for precision in (None, "bf16"):
        rs = np.random.RandomState(case["seed"])
        agent = golden.make_agent(case, precision=precision)
        golden.draw_parameters(agent, rs)
        for name in ("actor", "critic", "critic_target", "decoder"):
            getattr(agent, name).float()
        losses.append(agent_updates(agent, case, rs))
    for loss, want in zip(losses[1], losses[0], strict=True):
        assert loss == pytest.approx(want, rel=0.15)  # three digits a layer, and alpha's loss is a small difference
        assert loss != want
    obs = torch.randint(0, 256, (4, 9, 84, 84)).float()
    with layers_in("bf16", agent.device):
        assert agent.critic.encoder.forward_conv(obs).dtype == torch.bfloat16
        feature = agent.critic.encoder(obs)
        outputs = [feature, *agent.actor(obs), *agent.critic(obs, torch.zeros(4, 3)), agent.decoder(feature)]
    assert {output.dtype for output in outputs} == {torch.float32}
    for optimizer in (agent.critic_optimizer, agent.actor_optimizer, agent.encoder_optimizer, agent.decoder_optimizer):
        for parameter, state in optimizer.state.items():
            assert {parameter.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
    for network in (agent.critic.Q1, agent.actor):  # the last layers compute in float32 backwards, too
        gradient = network.trunk[-1].weight.grad
        assert not torch.equal(gradient, gradient.bfloat16().float())
    with pytest.raises(ValueError, match="unknown precision"):
        golden.make_agent(case, precision="fp16")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["pixel", "state"])
def test_compiled_losses_are_the_same(name):
    """To rounding, which float64 keeps small. It takes long: of pixels, the short form compiles what states lack."""
    case = golden.load_case(name)["case"] | {"updates": 3}
    losses = []
    for compiled in (False, True):
        rs = np.random.RandomState(case["seed"])
        agent = golden.make_agent(case, compile=compiled)
        assert {method for method in vars(agent) if method.endswith("_loss")} == (ALL_LOSSES if compiled else set())
        if compiled and name == "pixel" and not LONG:
            for method in ALL_LOSSES - {"decoder_loss"}:
                delattr(agent, method)  # the class's method is in force
        golden.draw_parameters(agent, rs)
        batches = [(step, batch) for step, batch, _, _ in golden.draw_batches(case, rs)]
        torch.manual_seed(1)  # compiled code draws its own noise, the same as the other's
        metrics = [agent.update(OneBatch(batch), Recorder(), step) for step, batch in batches]
        losses.append([{key: float(value) for key, value in metric.items()} for metric in metrics])
        method = agent.decoder_loss if name == "pixel" else agent.critic_loss
        assert hasattr(method, "_torchdynamo_orig_callable") == compiled
    for loss, want in zip(*losses, strict=True):
        assert loss == pytest.approx(want, rel=1e-8)


def storages(state):
    """Where in memory the tensors in a nest of dictionaries lie."""
    if isinstance(state, torch.Tensor):
        return {state.untyped_storage().data_ptr()}
    return set().union(*map(storages, state.values())) if isinstance(state, dict) else set()


def live_storages(agent):
    tensors = [parameter for network in agent.networks.values() for parameter in network.parameters()]
    states = [state for optimizer in agent.optimizers.values() for state in optimizer.state.values()]
    return storages(dict(enumerate([*tensors, agent.log_alpha, *states])))


@pytest.mark.parametrize("kind", ["pixel", "state"])
def test_agents_share_no_memory(kind):
    """Not with the state they gave, nor with the one they took: what one learns, the other does not."""
    case = golden.load_case(kind)["case"] | {"updates": 2}
    a, b = golden.make_agent(case), golden.make_agent(case)
    agent_updates(a, case, np.random.RandomState(1))
    state = a.state_dict()
    b.load_state_dict(state)
    assert not storages(state) & live_storages(a)
    assert not storages(state) & live_storages(b)
    assert not live_storages(a) & live_storages(b)
    before = copy.deepcopy(state)
    agent_updates(b, case, np.random.RandomState(2))
    agent_updates(a, case, np.random.RandomState(3))
    a.load_state_dict(state)
    for held in (state, a.state_dict()):
        torch.testing.assert_close(held, before, rtol=0, atol=0)
    steps = {float(moments["step"]) for moments in b.critic_optimizer.state.values()}
    assert steps == {4}


def set_switches(setting):
    """PyTorch's default for `default`, else what a program has set: the old switches, or new ones of one name."""
    backends = torch.backends
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for switch in (backends.cuda.matmul, backends.cudnn, backends):
        switch.fp32_precision = "none"
    name, value = setting or (None, None)
    if name == "old":
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = value
    elif name == "medium":
        torch.set_float32_matmul_precision(name)
    elif name is not None:
        operator.attrgetter(name)(torch).fp32_precision = value


def switches():
    backends = torch.backends
    each = (backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    each += (backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [switch.fp32_precision for switch in each]


def old_switches():
    """What PyTorch raises where a program has mixed them is what it must go on to raise."""
    values = []
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            values.append(read())
        except RuntimeError:
            values.append(RuntimeError)
    return values


SETTINGS = [
    None, ("old", False), ("old", True), ("medium", None),
    *itertools.product(
        ("backends", "backends.cudnn", "backends.cuda.matmul", "backends.cudnn.conv"), ("ieee", "tf32", "none")
    ),
]  # fmt: skip


@pytest.mark.parametrize("precision", [None, "fp32", "tf32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_is_the_agents_own(precision, setting, request):
    """PyTorch's switches are set while an agent computes, forwards and backwards, and put back, whoever set which."""
    request.addfinalizer(functools.partial(set_switches, None))
    set_switches(setting)
    case = golden.load_case("state")["case"]
    agent = golden.make_agent(case, precision=precision)
    before, old, seen = switches(), old_switches(), []

    def look(*_):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))

    agent.critic.register_forward_hook(look)
    agent.actor.register_forward_hook(look)
    next(agent.critic.parameters()).register_hook(look)
    agent_updates(agent, case | {"updates": 1}, np.random.RandomState(1))
    agent.select_action(np.zeros(agent.critic.encoder.feature_dim))
    expected = {"fp32": ("ieee", "ieee"), "tf32": ("tf32", "tf32")}.get(precision, (before[2], before[3]))
    assert len(seen) == 4
    assert set(seen) == {expected}
    assert (switches(), old_switches()) == (before, old)


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_switches_that_follow_another_go_on_to_follow(value, request):
    request.addfinalizer(functools.partial(set_switches, None))
    set_switches(("backends", value))
    for precision in ("fp32", "tf32"):
        with layers_in(precision, torch.device("cpu")):
            pass
    torch.backends.fp32_precision = "tf32" if value == "ieee" else "ieee"
    after = switches()[:3]
    assert after == [torch.backends.fp32_precision] * 3


def test_float32_agent_stays_near_the_float64_one():
    case = golden.load_case("pixel")["case"] | {"updates": 4}
    rs = np.random.RandomState(case["seed"])
    agent = golden.make_agent(case)
    golden.draw_parameters(agent, rs)
    single = golden.make_agent(case)
    for name in ("actor", "critic", "critic_target", "decoder"):
        getattr(single, name).load_state_dict(getattr(agent, name).state_dict())
        getattr(single, name).float()
    again = copy.deepcopy(rs)
    for loss, want in zip(agent_updates(single, case, again), agent_updates(agent, case, rs), strict=True):
        assert loss == pytest.approx(want, rel=1e-4)
