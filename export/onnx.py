"""Write the parts of a network as ONNX graphs: data and no code, with every axis free that needs to be."""

import logging
import warnings
from pathlib import Path

import onnx  # noqa: F401  (torch's exporter needs both, and either may be the one that is missing)
import onnxscript  # noqa: F401
import torch

from penumbra.export.parts import cut
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32",)


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Save encode.onnx and decode.onnx, and prompt.onnx where the network takes one; in fp32 for every precision."""
    # It misses torchvision once per operation of it.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    for part in cut(network, card, golden, precision="fp32", device=torch.device("cpu")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an exporter in motion; the parity gate judges what comes out
            program = torch.onnx.export(part.program(), dynamo=True, optimize=True, verbose=False)
        assert program
        model = program.model_proto
        graph = model.graph
        for piece in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del piece.metadata_props[:]  # traces of where the graph was made
        (directory / f"{part.name}.onnx").write_bytes(model.SerializeToString())
