"""The parts of a network as frozen TorchScript graphs with B and S free."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from models.contract import Features, Network, Prompt


class _Encode(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_B3hw: Tensor) -> Features:
        return self.network.encode(image_B3hw)


class _TakePrompt(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        return self.network.take_prompt(image_B3hw, features, prompt)


class _Decode(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.network.decode(features, noise_SBL)


def write_torchscript(
    network: Network, image_B3hw: Tensor, noise_SBL: Tensor, directory: Path, *, prompt: Prompt = ()
) -> None:
    """Trace, freeze and save encode.ts and decode.ts, and prompt.ts where the network takes one; channels-last.

    The example's B and S must be 2 or more: a size of 1 would be taken for a constant. The graphs are saved
    before any `optimize_for_inference`, which loses their weights silently.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image_B3hw = image_B3hw.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        # Tracing guesses which sizes may be wrong constants; the parity gate runs other sizes, and knows.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        features = network.encode(image_B3hw)
        parts: dict[str, tuple[nn.Module, tuple[object, ...]]] = {
            "encode.ts": (_Encode(network), (image_B3hw,)),
            "decode.ts": (_Decode(network), (features, noise_SBL)),
        }
        if prompt:
            parts["prompt.ts"] = (_TakePrompt(network), (image_B3hw, features, prompt))
        for name, (part, example) in parts.items():
            traced = torch.jit.trace(part.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(torch.jit.freeze(traced), directory / name)
