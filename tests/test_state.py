"""What an agent's state holds, how it is loaded, saved and copied, and which networks are in which mode."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import golden
import pytest
import torch
from agents import WithDropout, assert_equal, make_agent, updates
from torch import nn
from torch.utils._pytree import tree_leaves

from errors import UserError
from sac_ae import SacAeAgent
from support.cuda_graph import Graphs
from utils import eval_mode, module_hash

NETWORKS = ["actor", "critic", "critic_target", "decoder"]


class Bigger(SacAeAgent):
    """Has a tensor, a network and an optimiser more."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.scale = nn.Parameter(torch.ones(3))
        self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])
        self.heads_optimizer = self.adam([self.scale, *self.heads.parameters()], 1e-3)


def tensors(agent):
    """What training changes, by identity."""
    return [id(leaf) for leaf in tree_leaves(agent.state_dict(keep_vars=True))]


def memory(values):
    return {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(values)}


def train_on(agent, case, seed=1):
    """Updates with the case's noise."""
    rs = golden.np.random.RandomState(seed)
    return list(golden.updates(agent, case, rs))


@pytest.mark.parametrize("kind", ["pixel", "state"])
@pytest.mark.parametrize("from_file", [True, False])
def test_an_agent_that_was_loaded_is_the_same_and_shares_no_memory(kind, from_file):
    case = golden.load(kind)["case"] | {"updates": 2}
    (one, _), (other, _) = golden.start(case), golden.start(case | {"seed": 2})
    train_on(one, case)
    state = one.state_dict()
    if from_file:  # as in a checkpoint
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    assert not memory(other.state_dict()) & memory(one.state_dict())
    results = [(train_on(agent, case, seed=2), agent) for agent in (one, other)]
    assert_equal(*results)
    assert {float(each["step"]) for each in other.critic_optimizer.state.values()} == {4}


@pytest.mark.parametrize("layouts", [("contiguous_format", "channels_last"), ("channels_last", "contiguous_format")])
def test_moments_survive_another_layout_in_memory(layouts):
    """A GPU's checkpoint is resumed on a CPU, and the reverse."""
    case, agents = golden.load("pixel")["case"] | {"updates": 3}, []
    for layout in layouts:
        agent, _ = golden.start(case)
        agent.layout = getattr(torch, layout)
        agents.append(agent.to(memory_format=agent.layout))
    one, other = agents
    assert one.critic.encoder.convs[1].weight.stride() != other.critic.encoder.convs[1].weight.stride()
    train_on(one, case)
    other.load_state_dict(one.state_dict())
    for parameter, moments in other.critic_optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
    results = [(train_on(agent, case, seed=2), agent) for agent in agents]
    assert_equal(*results, rtol=1e-7, atol=1e-12)


def test_loading_is_in_place_and_leaves_the_optimisers_settings():
    """CUDA graphs use the tensors; moments that are not there yet are made, others become zero."""
    saved, other = make_agent(cls=Bigger), make_agent(cls=Bigger)
    fresh = copy.deepcopy(saved.state_dict())
    updates(saved, range(3))
    updates(other, range(5))
    for optimizer in other.optimizers.values():
        optimizer.param_groups[0].update(lr=0.5, capturable=True)
    before = tensors(other)
    for agent in (other, make_agent(cls=Bigger)):
        agent.load_state_dict(saved.state_dict())
        assert_equal(([], saved), ([], agent))
    for optimizer in other.optimizers.values():
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["capturable"]) == (0.5, True)
    other.load_state_dict(fresh)
    assert tensors(other) == before
    assert module_hash(other.critic) == module_hash(make_agent().critic)
    assert not any(tensor.any() for tensor in tree_leaves(other.get_extra_state()))


def retrained(agent, *parameters):
    agent.heads_optimizer = agent.adam(parameters, 1e-3)


OTHERS = {  # what makes another agent of `Bigger`, and what is said if it takes the state of `Bigger`
    "fewer optimisers": (
        lambda agent: delattr(agent, "heads_optimizer"),
        "or optimisers: heads_optimizer",
    ),
    "more optimisers": (
        lambda agent: setattr(agent, "more", agent.adam([agent.scale], 1)),
        "or optimisers: more",
    ),
    "fewer parameters": (lambda agent: retrained(agent, agent.scale), "or optimisers: heads_optimizer"),
    "more parameters": (
        lambda agent: retrained(agent, *agent.parameters()),
        "or optimisers: heads_optimizer",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_other_optimisers_is_refused_before_anything_is_loaded(name):
    change, words = OTHERS[name]
    agent, other = make_agent("state", cls=Bigger), make_agent("state", cls=Bigger)
    change(other)
    (agent.scale.sum() + agent.heads[0].weight.sum()).backward()
    agent.heads_optimizer.step()
    updates(agent, [0], "state")
    before = module_hash(other)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(agent.state_dict())
    assert module_hash(other) == before


INCOMPLETE = {  # what an agent has besides, and what is said
    "networks in a dict of lists": (lambda agent: {"nets": {"a": [nn.Linear(2, 2)]}}, "lack what nets holds"),
    "optimisers in a list": (lambda agent: {"_mine": [agent.adam([agent.scale], 1)]}, "lack what _mine holds"),
    "a tensor": (lambda agent: {"weight": torch.ones(1, requires_grad=True)}, "tensor weight: make it an nn.Param"),
    "tensors in a list": (lambda agent: {"weights": [nn.Parameter(torch.ones(1))]}, "tensor weights.*ParameterList"),
    "a foreign network": (lambda agent: {"mine": agent.adam(nn.Linear(2, 2).parameters(), 1)}, "mine optimises param"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_what_checkpoints_would_lack_is_refused(name):
    agent, (more, words) = make_agent("state", cls=Bigger), INCOMPLETE[name]
    agent.check_complete()
    for key, value in more(agent).items():
        setattr(agent, key, value)
    with pytest.raises(TypeError, match=words):
        agent.check_complete()


def test_networks_that_do_not_train_stay_in_evaluation_mode():
    """The target, and what is frozen: after `train`, and after an evaluation."""
    agent = make_agent("state", cls=WithDropout)
    for _ in range(2):
        assert agent.train() is agent
        for name, network in agent.networks.items():
            assert {module.training for module in network.modules()} == {name not in ("critic_target", "frozen")}
        with eval_mode(agent):
            assert not any(module.training for module in agent.modules())
        assert agent.training


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_of_convolutions_that_differ_the_critics_are_taken(tmp_path, way):
    """Actor and critic share them; files of two runs may be mixed."""
    one, two, agent = make_agent(), make_agent(), make_agent()
    updates(one, range(3))
    if way == "load":
        one.save(tmp_path, 0)
        two.save(tmp_path, 1)
        (tmp_path / "actor_1.pt").replace(tmp_path / "actor_0.pt")
        agent.load(tmp_path, 0)
    else:
        actor = {name: value for name, value in two.state_dict().items() if name.startswith("actor")}
        agent.load_state_dict(one.state_dict() | actor)
    assert module_hash(agent.critic) == module_hash(one.critic) != module_hash(two.critic)
    assert module_hash(agent.actor.trunk) == module_hash(two.actor.trunk) != module_hash(one.actor.trunk)
    assert agent.actor.encoder.convs[0].weight is agent.critic.encoder.convs[0].weight


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_is_an_agent_of_its_own(recorded, copied, graphs):
    """Its optimisers train its own networks; graphs, which use the original's memory, are no part of it."""
    agent = make_agent(graphs=graphs)
    assert list(agent.state_dict()) == list(make_agent().state_dict())
    assert list(agent.networks) == NETWORKS
    updates(agent, range(3))
    if graphs:
        agent.update_from.__self__._captured["a graph"] = io.BytesIO().getbuffer()  # cannot be copied
    other = copied(agent)
    assert graphs == isinstance(getattr(other.update_from, "__self__", None), Graphs)
    assert not memory(other.state_dict()) & memory(agent.state_dict())
    before, results = module_hash(agent), []
    for each in (other, agent):
        torch.manual_seed(0)
        assert module_hash(agent) == before
        results.append((updates(each, range(3)), each))
    assert_equal(*results)


def test_a_copy_computes_its_own_compiled_losses(compiled):
    agent, log_pi = make_agent("state", compile=True), torch.zeros(8, 1)
    other = copy.deepcopy(agent)
    with torch.no_grad():
        other.log_alpha.add_(1)
    assert other.alpha_loss(log_pi) > agent.alpha_loss(log_pi)
    assert compiled


@pytest.mark.parametrize("decoder_type", ["pixel", "identity"])
@pytest.mark.parametrize("of_authors", [False, True])
def test_save_and_load(tmp_path, decoder_type, of_authors):
    """What the authors' script saved lacks target and temperature: the target becomes the critic's copy."""
    agent, other, fresh = (make_agent(decoder_type=decoder_type) for _ in range(3))
    updates(agent, range(3))
    agent.save(tmp_path, 7)
    names = {"actor", "critic", "target"} | ({"decoder"} if decoder_type == "pixel" else set())
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_7.pt" for name in names}
    if of_authors:
        (tmp_path / "target_7.pt").unlink()
        agent.critic_target.load_state_dict(agent.critic.state_dict())
    other.load(tmp_path, 7)
    for name, network in agent.networks.items():
        assert module_hash(other.networks[name]) == module_hash(network)
    assert agent.log_alpha.item() != fresh.log_alpha.item()
    assert other.log_alpha.item() == (fresh if of_authors else agent).log_alpha.item()


class Uncopyable(SacAeAgent):
    """Has an attribute that cannot be copied, and a head that its target lacks."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.lock = threading.Lock()
        self.critic.head = nn.Linear(2, 2)


def test_models_of_an_agent_that_cannot_be_copied(tmp_path):
    saved, other = make_agent(cls=Uncopyable), make_agent(cls=Uncopyable)
    updates(saved, range(3))
    saved.save(tmp_path, 1)
    before = copy.deepcopy(other.state_dict())
    target = tmp_path / "target_1.pt"
    content = target.read_bytes()
    target.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"target_1\.pt"):
        other.load(tmp_path, 1)
    assert all(map(torch.equal, tree_leaves(other.state_dict()), tree_leaves(before)))
    target.write_bytes(content)
    other.load(tmp_path, 1)
    assert all(module_hash(saved.networks[name]) == module_hash(other.networks[name]) for name in NETWORKS)
