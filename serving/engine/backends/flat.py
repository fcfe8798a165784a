"""Graphs of formats that take and give plain lists of tensors, joined to a Backend."""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from penumbra.models.contract import Features, Prompt


class FlatGraph(Protocol):
    """One part of a network: tensors in, in the order of the contract's arguments, tensors out."""

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]: ...


class FlatBackend:
    """A Backend of the graphs `encode`, `decode` and, where the network takes one, `prompt`.

    One of them runs at a time, whatever thread calls: each brings threads of its own for all cores.
    """

    def __init__(self, graphs: Mapping[str, FlatGraph], *, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._graphs, self._alone = graphs, threading.Lock()

    @torch.inference_mode()
    def encode(self, image_B3hw: Tensor) -> Features:
        return tuple(self._run("encode", [self._here(image_B3hw)]))

    @torch.inference_mode()
    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        inputs = [self._here(image_B3hw), *features, *(self._here(p) for p in prompt)]
        return tuple(self._run("prompt", inputs))

    @torch.inference_mode()
    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        (logits_SBKhw,) = self._run("decode", [*features, self._here(noise_SBL)])
        return logits_SBKhw

    def _run(self, name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with self._alone:
            return self._graphs[name](inputs)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32)


def part_names(*, prompted: bool) -> tuple[str, ...]:
    """Names of a network's graphs, which are also their files' stems."""
    return ("encode", "decode", "prompt") if prompted else ("encode", "decode")
