"""CUDA graphs of a network's parts: a call that was captured is one launch, instead of one for every kernel.

Its memory is its own: inputs are copied into it, and outputs stay in it until the next call of these sizes overwrites
them. So whatever reads a call's outputs has to be queued, on the same stream, before that next call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Recorder:
    """A recorder captures calls of one network's parts while it `is_on`. They share a pool of memory: it has what the
    largest call needs and the outputs of all, and what one part gives is read by the next where it lies."""

    def __init__(self, device: torch.device) -> None:
        self.is_on, self.num_captures = True, 0
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outputs: dict[int, Tensor] = {}
        """Those of all captures by their `id`, which no other tensor can have while they are here."""

    def captured(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Make a part that gives the same bits, and is replayed where a call was captured with inputs of these shapes
        and types, or with the very outputs of another capture."""
        captures: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

        def call(*arguments: Any) -> Any:
            inputs = pytree.tree_leaves(arguments)
            key = tuple(id(x) if id(x) in self._outputs else (x.shape, x.dtype) for x in inputs)
            if self.is_on and key not in captures:
                captures[key] = self._capture(run, arguments)
            if key not in captures:
                return run(*arguments)
            graph, own, outputs = captures[key]
            for static, given in zip(own, inputs, strict=True):
                static.copy_(given)  # which does nothing where they are the same
            graph.replay()
            return outputs

        return call

    def _capture(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, list[Tensor], Any]:
        """Capture one call. Raises RuntimeError where that cannot be, or where there is no memory for it."""
        own = pytree.tree_map(lambda x: x if id(x) in self._outputs else x.clone(), arguments)
        current, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # also brings the current one back where a capture fails
            for _ in range(3):  # libraries choose and allocate in the first, and TorchScript compiles in the second
                run(*own)
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):  # other threads may allocate
                outputs = run(*own)
        current.wait_stream(self._stream)
        self.num_captures += 1
        self._outputs |= {id(x): x for x in pytree.tree_leaves(outputs)}
        return graph, pytree.tree_leaves(own), outputs
