"""TorchScript: frozen graphs, channels-last. Loading one is running code: only our own are loaded."""

import warnings
from pathlib import Path

import torch

from penumbra.serving.engine.backends import Graph, anywhere

target = anywhere


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    with warnings.catch_warnings():
        # Deprecated upstream; it stays because it needs no library beside torch and runs on every device.
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        graph: Graph = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    return graph
