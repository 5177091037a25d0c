"""CUDA graphs: an update, or an action, launched at once instead of as hundreds of kernels.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from replay_buffer import ReplayBuffer
from sac_ae import Due, Metrics, SacAeAgent, TransitionSource

_WARMUP = 3  # calls before the capture, in which libraries choose algorithms and take their workspaces


class Captured:
    """A function of tensors as a graph: called again, it launches the same kernels on other values.

    Args:
        function: takes tensors on the device and gives one back; it runs a few times now, and never again.
        arguments: of the shapes and types of all calls to come.
        device: a GPU.

    Raises:
        RuntimeError: the function does what a graph cannot hold.
    """

    def __init__(self, function: Callable[..., Tensor], arguments: Sequence[Tensor], device: torch.device):
        with torch.cuda.device(device):
            self._arguments = [torch.empty_like(argument, device=device) for argument in arguments]
            self._fill(arguments)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # This context, not only the capture's own, so that whatever fails, the stream is again what it was.
            try:
                with torch.cuda.stream(stream):
                    self._capture(function, stream)
            finally:  # what the function has begun must have ended before its caller undoes it
                torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, function: Callable[..., Tensor], stream: torch.cuda.Stream) -> None:
        for _ in range(_WARMUP):
            function(*self._arguments)
        self._graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # By thread: the one that gathers the next batch goes on with its copies.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._result = function(*self._arguments)
        except RuntimeError as error:
            _leave_capture(pool)
            raise RuntimeError(*(error.__context__ or error).args) from error  # what went wrong first

    def _fill(self, arguments: Sequence[Tensor]) -> None:
        for mine, argument in zip(self._arguments, arguments, strict=True):
            mine.copy_(argument, non_blocking=True)

    def __call__(self, arguments: Sequence[Tensor]) -> Tensor:
        """The function's value; a new tensor at each call."""
        self._fill(arguments)
        self._graph.replay()
        return self._result.clone()


def _leave_capture(pool: Any) -> None:
    """Ends what a capture that failed has left open: PyTorch's generator and allocator would go on as if in it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
    with suppress(RuntimeError):  # it had ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class GraphedAgent(SacAeAgent):
    """The agent, its updates and actions captured: one graph for each combination of what a step updates.

    It computes what `SacAeAgent` computes and takes the same arguments. Where the replay lies on the GPU, gathering the
    batch is part of the graph. Gradients that stay on the parameters are those of the graph that was captured last.

    Args:
        report: is told, once and in one line, if something cannot be captured; all goes on without graphs then.
    """

    def __init__(self, *args: Any, report: Callable[[str], Any] = warnings.warn, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._report = report
        self._graphs: dict[Hashable, Captured] | None = {}
        self._names: dict[Due, list[str]] = {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the plain agent's; the graphs are captured anew, for the optimisers' memory is another."""
        super().load_state_dict(state)
        if self._graphs is not None:
            self._graphs.clear()

    def _update_from(self, replay_buffer: TransitionSource, due: Due) -> Metrics:
        if self._graphs is None:
            return super()._update_from(replay_buffer, due)
        if isinstance(replay_buffer, ReplayBuffer) and replay_buffer.frames.device.type == self.device.type:
            assemble: Callable[..., Any] = replay_buffer.assemble
            inputs, source = replay_buffer.draw_places(), replay_buffer
        else:
            inputs, assemble, source = replay_buffer.sample(), _as_they_are, None

        def update(*inputs: Tensor) -> Tensor:
            metrics = self._update(assemble(*inputs), due)
            self._names[due] = list(metrics)
            return torch.stack([value.double() for value in metrics.values()])

        graph = self._graph(("update", due, source), update, inputs)
        if graph is None:
            return self._update(assemble(*inputs), due)
        return dict(zip(self._names[due], graph(inputs).unbind(), strict=True))

    def _actions(self, obs: Tensor, sample: bool) -> Tensor:
        function = partial(super()._actions, sample=sample)
        graph = self._graph(("act", sample), function, [obs])
        return function(obs) if graph is None else graph([obs])

    def _graph(
        self, key: tuple[Hashable, ...], function: Callable[..., Tensor], arguments: Sequence[Tensor]
    ) -> Captured | None:
        """The function's graph, captured at its first call; None if graphs are not to be had."""
        if self._graphs is None:
            return None
        key += tuple((argument.shape, argument.dtype) for argument in arguments)
        if key not in self._graphs:
            with self._unchanged():
                try:
                    self._graphs[key] = Captured(function, arguments, self.device)
                except RuntimeError as error:
                    self._graphs = None
                    self._report(f"going on without CUDA graphs: {(str(error) or repr(error)).splitlines()[0]}")
                    return None
        return self._graphs[key]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Whatever is trained within it, weights, optimisers and random state are afterwards what they were."""
        before = {id(tensor): tensor.detach().clone() for tensor in self._state_tensors()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor in self._state_tensors():
                        if id(tensor) in before:
                            tensor.copy_(before[id(tensor)])
                        else:
                            tensor.zero_()  # an optimiser's that had not begun

    def _state_tensors(self) -> Iterator[Tensor]:
        for network in self.networks.values():
            yield from network.parameters()
        yield self.log_alpha
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                yield from state.values()


def _as_they_are(*batch: Tensor) -> tuple[Tensor, ...]:
    return batch
