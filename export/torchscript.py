"""Write the parts of a network as frozen TorchScript graphs with B and S free."""

import io
import warnings
from pathlib import Path

import torch

from penumbra.export.parts import cut
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32", "bf16", "fp16")


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Trace, freeze and save encode.ts and decode.ts, and prompt.ts where the network takes one; channels-last.

    The example's B and S are 2 or more: a size of 1 would be taken for a constant. The graphs are saved
    before any `optimize_for_inference`, which loses their weights silently.
    """
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        # Tracing guesses which sizes may be wrong constants; the parity gate runs other sizes, and knows.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        for part in cut(network, card, golden, precision=precision, device=device):
            traced = torch.jit.trace(part.module, part.example, check_trace=False)  # type: ignore[no-untyped-call]
            save_script(torch.jit.freeze(traced), directory / f"{part.name}.ts")


def save_script(graph: torch.jit.ScriptModule, path: Path) -> None:
    """Write a graph. Raises OSError."""
    buffer = io.BytesIO()
    torch.jit.save(graph, buffer)
    path.write_bytes(buffer.getvalue())
