"""Write the parts of a network as ONNX graphs: data and no code, with every axis free that needs to be."""

import logging
import warnings
from pathlib import Path

import onnx
import onnxscript  # noqa: F401  (torch's exporter needs both, and either may be the one that is missing)
import torch
from torch.onnx import ONNXProgram

from penumbra.export.onnx_program import free_batch
from penumbra.export.parts import Part, cut
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.models.plain.net import PlainNetwork
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32",)


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Save encode.onnx and decode.onnx, and prompt.onnx where the network takes one; in fp32 for every precision."""
    for part in cut(network, card, golden, precision="fp32", device=torch.device("cpu")):
        (directory / f"{part.name}.onnx").write_bytes(anonymous(_model(network, part)).SerializeToString())


def _model(network: Network, part: Part) -> onnx.ModelProto:
    """Convert a part, unless it is a graph already."""
    if isinstance(network, PlainNetwork) and network.config.form == "onnx" and part.name == "encode":
        return free_batch(network.as_bytes())
    return to_onnx(part).model_proto


def to_onnx(part: Part, *, opset: int | None = None) -> ONNXProgram:
    """Convert a part, with its free axes free and its normalisations folded into its convolutions."""
    # It misses torchvision once per operation of it.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an exporter in motion; the parity gate judges what comes out
        program = torch.onnx.export(part.program(), dynamo=True, optimize=True, verbose=False, opset_version=opset)
    assert program
    return program


def anonymous(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the traces of where a graph was made; returns the same model."""
    graph = model.graph
    for piece in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del piece.metadata_props[:]
    return model
