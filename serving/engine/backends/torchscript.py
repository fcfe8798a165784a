"""TorchScript: frozen graphs, channels-last. Loading one is running code: only our own are loaded."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.contract import Features, Prompt
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import DTYPES


class TorchScriptBackend:
    """Graphs that take features as one tuple."""

    def __init__(self, card: Card, directory: Path, device: torch.device) -> None:
        assert card.export
        self.device, self.dtype = device, DTYPES[card.export.precision]
        with warnings.catch_warnings():
            # Deprecated upstream; it stays because it needs no library beside torch and runs on every device.
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
        image = image_B3hw.to(self.device, torch.float32, memory_format=torch.channels_last)
        features: Features = self._encode(image)
        return features

    @torch.inference_mode()
    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        image = image_B3hw.to(self.device, torch.float32, memory_format=torch.channels_last)
        prompted: Features = self._prompt[0](image, features, tuple(p.to(self.device, torch.float32) for p in prompt))
        return prompted

    @torch.inference_mode()
    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        logits_SBKhw: Tensor = self._decode(features, noise_SBL.to(self.device, torch.float32))
        return logits_SBKhw


load = TorchScriptBackend


def target(_: torch.device) -> dict[str, str]:
    """It runs anywhere."""
    return {}
