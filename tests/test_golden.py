"""The update computes the published method: against golden numbers and against the plain restatement."""

from __future__ import annotations

import os

import golden
import plain
import pytest
import torch
from agents import OneBatch, Recorder, make_agent, make_batch

from errors import UserError
from sac_ae import SacAeAgent, set_precision

LONG = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes long")
ALL_LOSSES = {"critic_loss", "actor_loss", "alpha_loss", "decoder_loss"}
EXACT = [*(f"critic.Q{i}.trunk.4" for i in (1, 2)), "actor.trunk.4"]


def agent_losses(agent, case, rs):
    return [golden.losses(metrics) for metrics in golden.updates(agent, case, rs)]


def plain_losses(agent, case, rs):
    losses = []
    for step, batch, normals, uniforms in golden.draw_batches(case, rs):
        with golden.noise(normals, uniforms):
            losses.append(agent.update(tuple(field.double() for field in batch), step))
    return losses


def plain_agent(agent):
    """The plain restatement, from the agent's parameters."""
    decoder = None if agent.decoder is None else agent.decoder.state_dict()
    return plain.PlainAgent(agent.actor.state_dict(), agent.critic.state_dict(), decoder)


def assert_near(losses, expected, rel=1e-9):
    assert [set(loss) for loss in losses] == [set(loss) for loss in expected]
    for loss, want in zip(losses, expected, strict=True):
        assert loss == pytest.approx(want, rel=rel)


def assert_final(parameters, expected):
    """Sums of many small numbers cancel: an absolute bound far below any of the terms."""
    assert set(parameters) == set(expected)
    for name, want in expected.items():
        want = golden.expected_statistics(want)
        assert golden.statistics(parameters[name]) == pytest.approx(want, rel=1e-9, abs=1e-14), name


@pytest.mark.parametrize("name", ["pixel", "state"])
def test_the_agent(name):
    data = golden.load(name)
    agent, rs = golden.start(data["case"])
    assert_near(agent_losses(agent, data["case"], rs), data["losses"])
    assert agent.log_alpha.item() == pytest.approx(data["log_alpha"], rel=1e-9)
    for network, expected in data["final"].items():
        assert_final(agent.networks[network].state_dict(), expected)


@pytest.mark.parametrize("name", ["pixel", "state"])
def test_the_plain_restatement(name):
    data = golden.load(name)
    agent, rs = golden.start(data["case"])
    restated = plain_agent(agent)
    assert_near(plain_losses(restated, data["case"], rs), data["losses"])
    assert restated.log_alpha.item() == pytest.approx(data["log_alpha"], rel=1e-9)
    final = {"critic_target": restated.target} | vars(restated)
    for network, expected in data["final"].items():
        assert_final(final[network], expected)


def test_golden_test_can_fail():
    """A discount that is off by a thousandth shows."""
    data = golden.load("state")
    agent, rs = golden.start(data["case"], discount=0.991)
    with pytest.raises(AssertionError):
        assert_near(agent_losses(agent, data["case"], rs), data["losses"])


def test_uint8_and_floating_observations_are_the_same():
    """Batches may hold pixels as they are stored or as numbers, in the networks' dtype or another."""
    results = []
    for dtype in (torch.uint8, torch.float32, torch.float64):
        agent = make_agent().double()
        obs, action, reward, next_obs, not_done = make_batch()
        results.append(
            agent.update(OneBatch((obs.to(dtype), action, reward, next_obs.to(dtype), not_done)), Recorder(), 0)
        )
    assert results[0] == results[1] == results[2]


def test_float32_stays_near_float64():
    case = golden.load("pixel")["case"] | {"updates": 4}
    double, single = (agent_losses(*start(case, dtype)) for dtype in (torch.float64, torch.float32))
    assert_near(single, double, rel=1e-4)


def start(case, dtype=torch.float32, **settings):
    """An agent of a case, with what its updates take."""
    agent, rs = golden.start(case, dtype=dtype, **settings)
    return agent, case, rs


def test_bfloat16_stays_near_float32_and_keeps_what_must_be_exact():
    """Layers in bfloat16; weights, optimisers, densities, targets and losses in float32."""
    case = golden.load("pixel")["case"] | {"updates": 2}
    agent, _, rs = start(case, precision="bf16")
    losses, expected = agent_losses(agent, case, rs), agent_losses(*start(case))
    assert_near(losses, expected, rel=0.15)  # three digits a layer, and alpha's loss is a small difference
    assert all(loss != want for loss, want in zip(losses, expected, strict=True))
    obs = torch.randint(0, 256, (4, 9, 84, 84)).float()
    with agent.layers_in_bf16():
        assert agent.critic.encoder.forward_conv(obs).dtype == torch.bfloat16
        feature = agent.critic.encoder(obs)
        outputs = [feature, *agent.actor(obs), *agent.critic(obs, torch.zeros(4, 3)), agent.decoder(feature)]
    assert {output.dtype for output in outputs} == {torch.float32}
    for optimizer in agent.optimizers.values():
        for parameter, moments in optimizer.state.items():
            assert {moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {parameter.dtype}
    assert {parameter.dtype for network in agent.networks.values() for parameter in network.parameters()} == {
        torch.float32
    }
    for name in EXACT:  # the last layers compute in float32 backwards, too
        gradient = agent.get_submodule(name).weight.grad
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_bfloat16_uses_the_weights_that_were_just_stepped():
    """Actor and decoder see the critic's new weights; a large step shows whether they do."""
    case = golden.load("pixel")["case"] | {"updates": 1, "first_step": 2}
    half, single = (agent_losses(*start(case, precision=precision, critic_lr=0.03))[0] for precision in ("bf16", None))
    assert half == pytest.approx(single, rel=0.1, abs=0.02)


@pytest.fixture
def _switches():
    yield
    set_precision(None)


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize(
    ("precision", "products", "convolutions"),
    [("fp32", "ieee", "ieee"), ("tf32", "tf32", "tf32"), ("bf16", "none", "tf32"), (None, "none", "tf32")],
)
def test_an_agent_sets_its_precision(precision, products, convolutions):
    """Whatever was set before."""
    for before in ("fp32", "tf32"):
        set_precision(before)
        make_agent("state", precision=precision)
        assert torch.backends.cuda.matmul.fp32_precision == products
        assert torch.backends.cudnn.conv.fp32_precision == convolutions
    assert torch.is_autocast_enabled("cpu") is False


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="unknown precision 'fp16': choose one of fp32, tf32, bf16"):
        make_agent("state", precision="fp16")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=LONG)])
def test_compiled_losses_are_the_same(backend, request):
    """To rounding, which float64 keeps small; compiled code draws the same noise."""
    if backend == "aot_eager":
        request.getfixturevalue("compiled")
    batch, losses = make_batch(), []
    for compiled in (False, True):
        agent = make_agent(compile=compiled).double()
        assert {name for name in vars(agent) if name.endswith("_loss")} == (ALL_LOSSES if compiled else set())
        torch.manual_seed(1)
        losses.append([agent.update(OneBatch(batch), Recorder(), step) for step in (0, 1, 2)])
        assert hasattr(agent.decoder_loss, "_torchdynamo_orig_callable") == compiled
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)


def test_a_subclass_s_loss_is_compiled(compiled):
    """Every method that is named so."""

    class WithPenalty(SacAeAgent):
        def penalty_loss(self):
            return self.log_alpha.pow(2)

    agent = make_agent("state", cls=WithPenalty, compile=True)
    assert agent.penalty_loss() == agent.log_alpha.pow(2)
    assert len(compiled) == 1
