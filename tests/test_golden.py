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
ALL_LOSSES = {"critic_loss", "actor_loss", "alpha_loss", "decoder_loss", "penalty_loss"}
EXACT = [*(f"critic.Q{i}.trunk.4" for i in (1, 2)), "actor.trunk.4"]


def agent_losses(agent, case, rs):
    return [golden.losses(metrics) for metrics in golden.updates(agent, case, rs)]


def plain_losses(agent, case, rs):
    losses = []
    for step, batch, normals, uniforms in golden.draw_batches(case, rs):
        with golden.noise(normals, uniforms):
            losses.append(agent.update(tuple(field.double() for field in batch), step))
    return losses


def assert_near(losses, expected, rel):
    assert [set(loss) for loss in losses] == [set(loss) for loss in expected]
    for loss, want in zip(losses, expected, strict=True):
        assert loss == pytest.approx(want, rel=rel)


@pytest.mark.parametrize("restated", [False, True])
@pytest.mark.parametrize("name", ["pixel", "state"])
def test_golden_numbers(name, restated):
    """Of the agent, and of the plain restatement."""
    data = golden.load(name)
    agent, rs = golden.start(data["case"])
    final = {network: getattr(agent, network).state_dict() for network in data["final"]}
    if restated:
        agent = plain.PlainAgent(final["actor"], final["critic"], final.get("decoder"))
        final = {"critic_target": agent.target} | vars(agent)
    assert_near((plain_losses if restated else agent_losses)(agent, data["case"], rs), data["losses"], rel=1e-9)
    assert agent.log_alpha.item() == pytest.approx(data["log_alpha"], rel=1e-9)
    for network, expected in data["final"].items():
        assert set(final[network]) == set(expected)
        for parameter, want in expected.items():
            want = [want["sum"], want["sum_of_squares"], *want["first"]]
            # Sums of many small numbers cancel: an absolute bound far below any of the terms.
            assert statistics(final[network][parameter]) == pytest.approx(want, rel=1e-9, abs=1e-14), parameter


def statistics(tensor):
    """What the golden files keep of a final parameter."""
    flat = tensor.detach().reshape(-1)
    return [flat.sum().item(), flat.square().sum().item(), *flat[:3].tolist()]


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
        assert torch.equal(agent.features(obs.byte().numpy()), feature)
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


class WithPenalty(SacAeAgent):
    """Has a loss of its own: every method that is named so is compiled."""

    def update_networks(self, batch, due):
        return super().update_networks(batch, due) | {"train/penalty_loss": self.penalty_loss().detach()}

    def penalty_loss(self):
        return self.log_alpha.pow(2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=LONG)])
def test_compiled_losses_are_the_same(backend, request):
    """To rounding, which float64 keeps small; compiled code draws the same noise."""
    calls = request.getfixturevalue("compiled") if backend == "eager" else []
    batch, losses = make_batch(), []
    for compiled in (False, True):
        agent = make_agent(compile=compiled, cls=WithPenalty).double()
        assert {name for name in vars(agent) if name.endswith("_loss")} == (ALL_LOSSES if compiled else set())
        torch.manual_seed(1)
        losses.append([agent.update(OneBatch(batch), Recorder(), step) for step in (0, 1, 2)])
        assert hasattr(agent.decoder_loss, "_torchdynamo_orig_callable") == compiled
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    assert len(calls) in (0, 2 * 5 + 3)
