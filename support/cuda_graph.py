"""CUDA graphs: an update, or an action, launched at once instead of as hundreds of kernels.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from replay_buffer import pinned
from sac_ae import Metrics, SacAeAgent

WARMUP = 3  # calls of a kind before its capture, in which libraries choose algorithms and take their workspaces


class Capture:
    """A function of tensors as a graph: capture records its kernels, each call launches them.

    Args:
        function: takes tensors on the device, and gives one. What a graph cannot hold raises RuntimeError.
        arguments: of the shapes and types of all calls to come.
        device: a GPU.
        pool: of memory, shared by all graphs of an agent; graphs that share one must not run at the same time.
    """

    def __init__(self, function: Callable[..., Tensor], arguments: Sequence[Tensor], device: torch.device, pool: Any):
        # Each graph takes one of PyTorch's 32 streams, and frees the stream's workspaces when it is destroyed. Those of
        # agents that are gone go first: https://github.com/pytorch/pytorch/issues/193402
        gc.collect()
        with torch.cuda.device(device):
            self._graph = torch.cuda.CUDAGraph()
            self._arguments = [torch.empty_like(argument, device=device) for argument in arguments]
            stream = torch.cuda.Stream()
            try:
                # The outer context restores the stream if the capture fails. "thread_local": the thread that gathers
                # the next batch may copy meanwhile.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    self._result = function(*self._arguments)
            except RuntimeError as error:
                # PyTorch's generator and allocator would still act as in a capture.
                current = torch.cuda.current_device()
                generator = torch.cuda.default_generators[current]
                generator.graphsafe_set_state(generator.clone_state())
                with suppress(RuntimeError):  # it had ended
                    torch._C._cuda_endAllocateToPool(current, pool)
                raise RuntimeError(*(error.__context__ or error).args) from error  # what went wrong first

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's value; a new tensor at each call."""
        for mine, argument in zip(self._arguments, arguments, strict=True):
            mine.copy_(pinned(argument, mine.device), non_blocking=True)
        self._graph.replay()
        return self._result.clone()


class Graphs:
    """Has an agent, of any class, launch its updates and actions as graphs, one for each kind of update or action.

    The first calls of a kind run as usual, the next one is captured, and from that one on all calls launch the graph.
    If a capture fails, `report` gets one line, once, and all further calls run without graphs.
    """

    def __init__(self, agent: SacAeAgent, report: Callable[[str], Any]):
        self._agent, self._report = agent, report
        self._update, self._actions = agent.update_from, agent.actions
        self._captured: dict[Any, Capture] = {}
        self._calls: Counter[Any] = Counter()
        self._names: dict[Any, list[str]] = {}  # of an update's metrics
        self._pool: Any = None
        agent.update_from = self.update_from  # type: ignore[method-assign, assignment]
        agent.actions = self.actions  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the agent captures graphs of its own."""
        return vars(self) | {"_captured": {}, "_calls": Counter(), "_pool": None}

    def update_from(self, batch: Sequence[Tensor], due: Any) -> Metrics:
        """As the agent's."""

        def update(*batch: Tensor) -> Tensor:
            metrics = self._update(batch, due)
            self._names[due] = list(metrics)
            self._agent.zero_grad()  # graphs overwrite the gradients' memory, and histograms would be wrong
            return torch.stack([value.double() for value in metrics.values()])

        values = self._call(("update", due), update, batch)
        return dict(zip(self._names[due], values.unbind(), strict=True))

    def actions(self, obs: Tensor, sample: bool) -> Tensor:
        """As the agent's."""
        return self._call(("act", sample), lambda obs: self._actions(obs, sample), [obs])

    def _call(self, kind: tuple[Any, ...], function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Tensor:
        key = kind + tuple((argument.shape, argument.dtype) for argument in arguments)
        self._calls[key] += 1
        if self._calls[key] <= WARMUP:
            return function(*arguments)
        if key not in self._captured:
            device = self._agent.device
            if self._pool is None and device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            try:
                self._captured[key] = Capture(function, arguments, device, self._pool)
            except RuntimeError as error:
                self._agent.update_from, self._agent.actions = self._update, self._actions  # type: ignore[method-assign]
                self._captured.clear()  # they will not be launched again
                self._report(f"continuing without CUDA graphs: {(str(error) or repr(error)).splitlines()[0]}")
                return function(*arguments)
        return self._captured[key](*arguments)
