"""What runs a graph. Formats are interchangeable behind one small protocol."""

import warnings
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.card import Card
from models.contract import Features, Prompt
from models.errors import BadArtifact


class Backend(Protocol):
    """Both halves of a network, on one device in one precision (see `models.contract`)."""

    device: torch.device
    dtype: torch.dtype

    def encode(self, image_B3hw: Tensor) -> Features: ...

    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features: ...

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor: ...


class TorchScriptBackend:
    """Frozen TorchScript graphs, channels-last. Loading one is running code: only our own are loaded."""

    def __init__(self, card: Card, directory: Path, device: torch.device) -> None:
        self.device, self.dtype = device, torch.float32
        with warnings.catch_warnings():
            # Deprecated upstream; the format stays until its successors are exported too.
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
            names = ["encode.ts", "decode.ts"] + ["prompt.ts"] * (card.prompt.kind != "none")
            try:
                self._encode, self._decode, *self._prompt = (
                    torch.jit.load(directory / name, map_location=device)  # type: ignore[no-untyped-call]
                    for name in names
                )
            except RuntimeError:
                raise BadArtifact(f"{directory} holds TorchScript that this torch cannot load") from None

    @torch.inference_mode()
    def encode(self, image_B3hw: Tensor) -> Features:
        image = image_B3hw.to(self.device, self.dtype, memory_format=torch.channels_last)
        features: Features = self._encode(image)
        return features

    @torch.inference_mode()
    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        image = image_B3hw.to(self.device, self.dtype, memory_format=torch.channels_last)
        prompted: Features = self._prompt[0](image, features, tuple(p.to(self.device, self.dtype) for p in prompt))
        return prompted

    @torch.inference_mode()
    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        logits_SBKhw: Tensor = self._decode(features, noise_SBL.to(self.device, self.dtype))
        return logits_SBKhw


BACKENDS = {"torchscript": TorchScriptBackend}


def load_backend(card: Card, directory: Path, device: torch.device) -> Backend:
    """The artifact's graphs, ready to run. Raises BadArtifact."""
    assert card.export
    if card.export.backend not in BACKENDS:
        raise BadArtifact(
            f"{directory} is exported for {card.export.backend!r}; this server runs {', '.join(BACKENDS)}"
        )
    return BACKENDS[card.export.backend](card, directory, device)
