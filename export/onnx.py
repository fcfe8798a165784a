"""Write the parts of a network as ONNX graphs: data and no code, with every axis free that needs to be."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxscript  # noqa: F401  (torch's exporter needs both, and either may be the one that is missing)
import torch
from onnx import checker, compose, version_converter
from torch import Tensor, nn
from torch.onnx import ONNXProgram

from penumbra.export.onnx_program import free_batch, inputs_of
from penumbra.export.parts import Part, cut
from penumbra.models.card import Card, dump_card
from penumbra.models.contract import Features, Network
from penumbra.models.ensemble.net import EnsembleNetwork
from penumbra.models.errors import BadOption, first_line
from penumbra.models.plain.net import PlainNetwork
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32",)
_last: dict[tuple[str, str], dict[str, bytes]] = {}
"""The graphs that were written last, by checkpoint and card: `penumbra tune` writes the same in several formats."""


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Save encode.onnx and decode.onnx, and prompt.onnx where the network takes one; in fp32 for every precision."""
    assert card.export
    key = card.export.checkpoint, dump_card(replace(card, export=None))
    graphs = _last.get(key)
    if graphs is None:
        parts = cut(network, card, golden, precision="fp32", device=torch.device("cpu"))
        graphs = {part.name: anonymous(_model(network, part)).SerializeToString() for part in parts}
        _last.clear()
        if card.export.checkpoint:  # else it is of a network in memory
            _last[key] = graphs
    for name, graph in graphs.items():
        (directory / f"{name}.onnx").write_bytes(graph)


def _model(network: Network, part: Part) -> onnx.ModelProto:
    """Convert a part, unless it is a graph already, or of an ensemble of graphs."""
    if part.name == "encode" and "torchscript" not in (network.formats or ("torchscript",)):
        return _graph(network, part.example, part.other)
    return to_onnx(part).model_proto


def _graph(network: Any, *calls: tuple[Tensor, ...]) -> onnx.ModelProto:
    """Take the graph of a program, or join those of an ensemble's members, between two that torch writes.

    calls: pictures that differ in every axis that is free.
    """
    if isinstance(network, PlainNetwork):
        return free_batch(network.as_bytes())
    programs, first, last = [member.network for member in network.members], _First(network), _Last(network)
    _, *shown = zip(*(first(*call) for call in calls), strict=True)  # by member, then by call
    answers = [tuple(program.encode(own)[0] for own in owns) for program, owns in zip(programs, shown, strict=True)]
    answered = [(*call, answer) for call, answer in zip(calls, zip(*answers, strict=True), strict=True)]
    around = [to_onnx(part).model_proto for part in (Part("first", first, *calls), Part("last", last, *answered))]
    graphs = [_graph(program, *((own,) for own in owns)) for program, owns in zip(programs, shown, strict=True)]
    return _join([around[0], *graphs, around[1]])


class _First(nn.Module):
    """Hands the picture on, and makes of it what each member of an ensemble sees."""

    def __init__(self, network: EnsembleNetwork) -> None:
        super().__init__()
        self.members: Any = network.members

    def forward(self, image_BChw: Tensor, answers: tuple[Tensor, ...] = ()) -> Features:
        return (image_BChw, *(member.renormalise(image_BChw) for member in self.members))


class _Last(_First):
    """Makes an ensemble's feature of the picture and the answers of its members' graphs."""

    def forward(self, image_BChw: Tensor, answers: tuple[Tensor, ...] = ()) -> Features:
        none_1B0 = image_BChw.new_zeros(1, image_BChw.shape[0], 0)
        pairs = zip(self.members, answers, strict=True)
        read = [one.read_out(one.network.decode((answer,), none_1B0), image_BChw) for one, answer in pairs]
        return (torch.cat(read).transpose(0, 1),)


def _join(models: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """Lead all answers of the first graph but one through the graphs between, and all into the last. Raises BadOption.

    Graphs of other opsets become graphs of the newest.
    """
    opset, ir_version = (max(map(version, models)) for version in (_opset, lambda model: model.ir_version))
    named = []
    try:
        for i, model in enumerate(map(anonymous, models)):
            newest = model if _opset(model) == opset else version_converter.convert_version(model, opset)
            newest.ir_version = ir_version
            named.append(compose.add_prefix(newest, f"{i}."))
        joined, *members, last = named
        for answer, member in zip([*joined.graph.output][1:], members, strict=True):
            joined = compose.merge_models(joined, member, [(answer.name, inputs_of(member.graph)[0].name)])
        pairs = zip(joined.graph.output, last.graph.input, strict=True)
        return compose.merge_models(joined, last, [(answer.name, read.name) for answer, read in pairs])
    except (RuntimeError, ValueError, checker.ValidationError, version_converter.ConvertError) as error:
        raise BadOption(
            f"the members' graphs cannot be joined ({first_line(error)}); export all with one opset"
        ) from None


def _opset(model: onnx.ModelProto) -> int:
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


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
