"""Build TensorRT-RTX engines of the parts of a network from their ONNX graphs, on any machine: no GPU is needed."""

import math
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import tensorrt_rtx as trt
import torch
from torch.onnx import ONNXProgram

from penumbra.export.onnx import anonymous, to_onnx
from penumbra.export.parts import Part, cut
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.backends import Backend, Graph, find_format, flat
from penumbra.serving.engine.backends.engines import find_log, position_of
from penumbra.serving.engine.backends.tensorrt_rtx import target
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
FLOAT = ir.DataType.FLOAT
KINDS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
OPSET = 24
"""The first in which every operator of ours takes bf16."""
ANY_TYPE = ("Cast", "Shape", "Size")
"""Operators whose inputs may be of any type."""
REGIONS, FLAT_MAP = 9, 2**13
"""Above these a tensor is a map: pixels of its last two axes, and values per window and sample of a flattened one. The
regions of a 3x3 convolution are vectors, and so are 2048 channels."""
EVIDENCE = re.compile(r"IOMode|LayerType|Total (Activation|Weights) Memory|^WARNING")
"""Lines of a builder's log that are kept beside the engines: without a GPU nothing else tells what is in one."""


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> Backend | None:
    """Build encode.engine and decode.engine, and prompt.engine where the network takes one.

    Returns, where this machine cannot run them, the very graphs that they were built from, run by its processor.
    """
    target(device)  # refuses a GPU that could not run them, before minutes of work
    evidence, graphs = "", {}
    for part in cut(network, card, golden, precision="fp32", device=torch.device("cpu")):
        model = prepare(to_onnx(part, opset=OPSET), precision)
        plan, lines = build(model, part, card, precision=precision)
        evidence += "\n".join([f"{part.name}.engine", *filter(EVIDENCE.search, lines), ""])
        (directory / f"{part.name}.engine").write_bytes(plan)
        if device.type == "cpu":
            graphs[part.name] = open_model(model, precision)
    (directory / "engines.txt").write_text(evidence, "utf-8")
    return Backend(graphs, device=device, one_at_a_time=True) if graphs else None


def prepare(program: ONNXProgram, precision: str) -> onnx.ModelProto:
    """Make a part's program compute in a precision, between inputs and outputs in float32. It is not used after.

    They are named by position, and inputs that nothing reads are left out: TensorRT would want an address for each.
    """
    graph = program.model.graph
    _narrow(graph, KINDS.get(precision, FLOAT))
    used = [(i, value) for i, value in enumerate(graph.inputs) if value.uses()]
    graph.inputs[:] = [value for _, value in used]
    for i, value in used:
        value.name = f"input.{i}"
    for i, value in enumerate(graph.outputs):
        outer = ir.Value(name=f"output.{i}", type=ir.TensorType(FLOAT), shape=value.shape)
        graph.append(ir.node("Cast", [value], {"to": FLOAT}, outputs=[outer]))
        graph.outputs[i] = outer
    model = anonymous(program.model_proto)
    onnx.checker.check_model(model, full_check=True)
    return model


def _narrow(graph: ir.Graph, kind: ir.DataType) -> None:
    """Turn float32 into another type where maps are computed; normalisations were folded before.

    Vectors stay float32: they cost nothing, and a sum over a map may not fit into half precision.
    """
    in_type: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        own = kind if any(map(_is_map, node.outputs)) else FLOAT
        for output in node.outputs:
            output.type = ir.TensorType(own) if output.dtype == FLOAT else output.type
        if node.op_type == "Cast" and node.attributes["to"].value == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", own)
        elif node.op_type == "Clip" and len(node.inputs) == 2:
            node.op_type = "Max"  # else TensorRT prints that no upper bound does not fit a half
        scales = [node.inputs[2]] if node.op_type == "Resize" else []  # float32 by the standard
        for i, value in enumerate(node.inputs):
            if value and value.dtype in {FLOAT, kind} - {own} and value not in scales and node.op_type not in ANY_TYPE:
                if (value, own) not in in_type:
                    in_type[value, own] = _converted(value, own, graph, node)
                node.replace_input_with(i, in_type[value, own])
    for value in [each for each in graph.initializers.values() if not each.uses()]:
        del graph.initializers[str(value.name)]


def _converted(value: ir.Value, kind: ir.DataType, graph: ir.Graph, reader: ir.Node) -> ir.Value:
    """Give a value in another type: by a cast before its first reader, or as another constant.

    A single number that the type cannot hold becomes the nearest: no division by what was 1e-12.
    """
    other = ir.Value(name=f"{value.name}.{kind.name}", type=ir.TensorType(kind), shape=value.shape)
    if value.const_value is None:
        graph.insert_before(reader, ir.node("Cast", [value], {"to": kind}, outputs=[other]))
        return other
    array, limits = value.const_value.numpy(), ml_dtypes.finfo(kind.numpy())
    if array.size == 1 and array:
        array = np.copysign(np.abs(array).clip(float(limits.smallest_subnormal), float(limits.max)), array)
    other.const_value = ir.tensor(array.astype(kind.numpy()), name=other.name)
    graph.register_initializer(other)
    return other


def _is_map(value: ir.Value) -> bool:
    """Tell a map from a vector, or a row of them, by what is fixed of its sizes; its own may be free."""
    sizes = [size if isinstance(size, int) else 0 for size in value.shape or ()]
    has_pixels = len(sizes) > 3 and (sizes[-1] == 0 or sizes[-2] * sizes[-1] > REGIONS)
    return has_pixels or math.prod(filter(None, sizes)) >= FLAT_MAP


def build(model: onnx.ModelProto, part: Part, card: Card, *, precision: str) -> tuple[bytes, list[str]]:
    """Build one engine; returns it and the builder's log. Raises BadOption: what TensorRT-RTX cannot take."""
    log = find_log(trt)
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        error = parser.get_error(0)
        raise BadOption(
            f"TensorRT-RTX cannot take {part.name}: {error.node_operator()} at {error.node_name()} "
            f"({error.code().name}: {error.desc()}); choose another backend"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # an engine of the same size, and the log says all
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for entry in model.graph.input:
        profile.set_shape(entry.name, *zip(*part.ranges(position_of(entry.name), card), strict=True))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BadOption(f"TensorRT-RTX cannot build {part.name}: {log.reason()}; choose another backend")
    return bytes(plan), "\n".join(log.lines).splitlines()


def open_model(model: onnx.ModelProto, precision: str) -> Graph:
    """Open the graph of an engine on the processor; in OpenVINO for bf16, in which onnxruntime has no convolution."""
    library = find_format("penumbra.serving.engine.backends", "openvino" if precision == "bf16" else "onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        path.write_bytes(model.SerializeToString())
        run = library.open_graph(path, torch.device("cpu"), precision)
    used = [position_of(entry.name) for entry in model.graph.input]
    return flat(lambda inputs: run(*(inputs[i] for i in used)))
