"""Both halves of a network as frozen TorchScript graphs with B and S free."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from models.contract import Features, Network


class _Encode(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_B3hw: Tensor) -> Features:
        return self.network.encode(image_B3hw)


class _Decode(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.network.decode(features, noise_SBL)


def write_torchscript(network: Network, image_B3hw: Tensor, noise_SBL: Tensor, directory: Path) -> None:
    """Trace, freeze and save encode.ts and decode.ts, channels-last.

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
        halves = {
            "encode.ts": (_Encode(network), (image_B3hw,)),
            "decode.ts": (_Decode(network), (features, noise_SBL)),
        }
        for name, (half, example) in halves.items():
            traced = torch.jit.trace(half.eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(torch.jit.freeze(traced), directory / name)
