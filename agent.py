"""Base class of agents: acting, updating from a replay, saving, loading."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from errors import UserError
from files import check_alike, read_state, write_tensors
from precision import layers_in
from replay_buffer import send
from settings import Settings

Metrics = dict[str, Tensor]


class Agent:
    """Acts, updates, saves and loads. A subclass sets these attributes; its networks and optimisers are found."""

    settings: Settings
    device: torch.device
    training: bool
    layout: torch.memory_format  # of pixels and kernels in memory
    actor: Any
    critic: Any
    critic_target: Any
    decoder: Any
    log_alpha: Tensor
    actions: Callable[..., Tensor]  # (obs, sample) -> actions on the device, drawn from the policy or its means
    due: Callable[[int], Any]  # what the update of a decision trains; hashable
    update_networks: Callable[..., Metrics]  # (obs, action, reward, next_obs, not_done, due) -> losses

    def _held(self, kind: type) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, kind)}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All modules, by attribute name."""
        return self._held(nn.Module)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """All optimisers, by attribute name."""
        return self._held(Optimizer)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Trained tensors outside modules, such as `log_alpha`, by attribute name; not the networks' parameters."""
        return {name: tensor for name, tensor in self._held(Tensor).items() if tensor.requires_grad}

    def check_attributes(self) -> None:
        """Raises TypeError if a network, a trained tensor or an optimiser is no attribute: states would lack it."""
        for name, value in vars(self).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if any(isinstance(each, nn.Module | Optimizer) for each in inside):
                raise TypeError(f"{name} holds networks or optimisers: use nn.ModuleList; optimisers are attributes")
        held = {*self.parameters.values()}.union(*(network.parameters() for network in self.networks.values()))
        for name, optimizer in self.optimizers.items():
            if not held.issuperset(_parameters(optimizer)):
                raise TypeError(f"{name} trains what is in no attribute: put networks in an nn.ModuleList, not a list")

    def adam(self, params: Iterable[Tensor], lr: float, beta1: float = 0.9, weight_decay: float = 0) -> Adam:
        """A fused Adam: one kernel updates all parameters, and a CUDA graph can hold it."""
        on_gpu = self.device.type == "cuda"
        return Adam(params, lr, (beta1, 0.999), weight_decay=weight_decay, fused=True, capturable=on_gpu)

    def select_action(self, obs: np.ndarray) -> np.ndarray:
        """The policy's mean action (A,) for one observation: evaluation."""
        return self.select_actions(obs[None])[0]

    def select_actions(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        return self.actions(torch.from_numpy(obs), False).cpu().numpy()

    def sample_action(self, obs: np.ndarray) -> np.ndarray:
        """An action (A,) drawn from the policy for one observation: training."""
        return self.actions(torch.from_numpy(obs[None]), True)[0].cpu().numpy()

    def update(self, replay_buffer: Any, L: Any, step: int) -> Metrics:  # noqa: N803
        """All updates that are due at decision `step`, on one batch.

        Args:
            replay_buffer: its `sample()` gives obs (any dtype, 0..255 for pixels), action, reward, next_obs, not_done.
            L: its `log(key, value, step)` gets each of the returned metrics.

        Returns detached scalars on the agent's device, under the names they are logged with.
        """
        metrics = self.update_from(replay_buffer.sample(), self.due(step))
        for key, value in metrics.items():
            L.log(key, value, step)
        return metrics

    def update_from(self, batch: Iterable[Tensor], due: Any) -> Metrics:
        """An update from the batch of a replay. A CUDA graph holds the whole update."""
        with layers_in(self.settings.precision, self.device):
            return self.update_networks(*map(self.to_network_input, batch), due)

    def to_network_input(self, tensor: Tensor) -> Tensor:
        """A tensor on the agent's device, in the dtype and memory layout of the networks' inputs."""
        pixels, weight = tensor.dim() == 4, next(self.critic.parameters())
        layout = self.layout if pixels else torch.preserve_format
        # bfloat16 holds pixels exactly: whole numbers up to 256.
        dtype = torch.bfloat16 if pixels and self.settings.precision == "bf16" else weight.dtype
        return send(tensor, self.device).to(dtype, memory_format=layout)

    def minimise(self, loss: Tensor, *optimizers: Optimizer, inputs: list[Tensor] | None = None) -> Tensor:
        """One update by each optimiser. Only `inputs` get gradients; None: all tensors. Returns the loss, detached."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Backward operations take the types of the forward ones; under autocast they would be cast once more.
        # https://docs.pytorch.org/docs/stable/amp.html#autocasting
        with torch.autocast(self.device.type, enabled=False):
            loss.backward(inputs=inputs)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    def train(self, training: bool = True) -> None:
        """Sets training or evaluation mode of every network. A frozen network stays in evaluation mode."""
        self.training = training
        for network in self.networks.values():
            network.train(training and any(parameter.requires_grad for parameter in network.parameters()))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """A copy of all that updates change: networks, parameters, and the optimisers' moments."""
        state: dict[str, Any] = {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizers": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
        }
        return copy.deepcopy(state)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Copies a `state_dict` into the existing tensors. Settings such as learning rates stay.

        Raises UserError, and changes nothing, if it is the state of other networks.
        """
        mine = self.state_dict()
        try:
            for part in ("networks", "parameters"):
                check_alike(state[part], mine[part])
            if state["optimizers"].keys() != mine["optimizers"].keys():
                raise ValueError("it has other optimisers")
            for name, optimizer in self.optimizers.items():
                _check_moments(name, optimizer, state["optimizers"][name])
        except ValueError as error:
            raise UserError(f"the checkpoint is of another agent than this code's: {error}") from None
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        for name, optimizer in self.optimizers.items():
            _load_moments(optimizer, state["optimizers"][name])

    def saved_states(self) -> dict[str, dict[str, Any]]:
        """What `save` writes, by the NAMEs of its files: the authors', and `target`."""
        states: dict[str, dict[str, Any]] = {name: network.state_dict() for name, network in self.networks.items()}
        target = {"critic_target": states.pop("critic_target"), "log_alpha": self.log_alpha.detach()}
        return states | {"target": target}

    def save(self, model_dir: str | Path, step: int) -> None:
        """Writes `NAME_STEP.pt` for each network and, as `target`, the target critic with log alpha."""
        for name, state in self.saved_states().items():
            write_tensors(Path(model_dir) / f"{name}_{step}.pt", state)

    @torch.no_grad()
    def load(self, model_dir: str | Path, step: int) -> None:
        """Loads what `save` or the authors' script wrote; without `target_STEP.pt` the target is the critic's copy.

        Executes nothing that a file contains. Raises UserError, which leaves the agent unchanged and names the file,
        if one is missing, damaged, foreign, or of another network.
        """
        mine = self.saved_states()
        paths = {name: Path(model_dir) / f"{name}_{step}.pt" for name in mine}
        if not os.path.lexists(paths["target"]):
            del paths["target"]
        states = {name: read_state(path, mine[name], self.device) for name, path in paths.items()}
        target = states.pop("target", {"critic_target": states["critic"]})
        for name, state in states.items():
            getattr(self, name).load_state_dict(state)
        self.critic_target.load_state_dict(target["critic_target"])
        self.log_alpha.copy_(target.get("log_alpha", self.log_alpha))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_moments(name: str, optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Raises ValueError if a state is not of this optimiser's parameters."""
    shapes = dict(enumerate(parameter.shape for parameter in _parameters(optimizer)))
    for index, moments in state.items():
        if any(value.dim() and value.shape != shapes.get(index) for value in moments.values()):
            raise ValueError(f"{name} trains other parameters")


def _load_moments(optimizer: Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Copies an optimiser's moments in place, by parameter: a CUDA graph uses their memory."""
    mine, parameters = dict(optimizer.state), _parameters(optimizer)
    optimizer.state.clear()
    for index, moments in state.items():
        parameter = parameters[index]
        optimizer.state[parameter] = held = mine.get(parameter, {})
        for key, value in moments.items():
            # A new one takes the parameter's own layout in memory.
            like = parameter if value.shape == parameter.shape else value
            if key not in held:
                held[key] = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            held[key].copy_(value)
