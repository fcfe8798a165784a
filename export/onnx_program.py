"""Read an ONNX program, and make an artifact's graph of it: the program itself, for any number of windows."""

from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from penumbra.export.bring import WITHOUT_ARGMAX, Brought, read_file
from penumbra.export.given import find_facts, parse_value
from penumbra.models.errors import BadCheckpoint, BadOption, first_line
from penumbra.models.plain.programs import PREFERRED, Onnx, load_program

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of the operators that onnxruntime has."""
FEW = 8
"""Channels, at most, of a picture whose channels could be its last axis."""


def read_onnx(source: str, tensor: str | None) -> Brought:
    """Read an ONNX file. tensor: which one is the answer, if not an output of a usual name, or the first.

    Raises BadCheckpoint: it takes something else than one picture in float32, has operators that nobody has, or is
    damaged; BadOption: there is no such tensor.
    """
    program, origin = read_file(source, "onnx")
    try:
        model = onnx.load_model_from_string(program)
        onnx.load_external_data_for_model(model, str(Path(source).parent))  # weights in files beside it
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BadCheckpoint(f"it is no ONNX file, or lacks a part ({first_line(error)})") from None
    graph = model.graph
    picture = _the_picture(graph)
    own = {function.domain for function in model.functions}
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in {*DOMAINS, *own}})
    if foreign:
        raise BadCheckpoint(f"it has the custom operation {foreign[0]}, which onnxruntime lacks; export it with "
                            "operations of ONNX alone, or bring the module itself: penumbra import module")  # fmt: skip
    notes = _choose_output(graph, tensor)
    if notes or len(program) < model.ByteSize():
        program = model.SerializeToString()

    def in_batches(image_BChw: Tensor) -> Tensor:
        session = Onnx(free_batch(program).SerializeToString()).session
        return torch.from_numpy(session.run(None, {picture.name: image_BChw.numpy()})[0])

    scores = [node.input[0] for node in graph.node if node.op_type == "ArgMax"]
    channels, height, width = (axis.dim_value or None for axis in picture.type.tensor_type.shape.dim[1:])
    return Brought(
        "onnx", program, origin, load_program("onnx", program), in_batches, channels, height, width,
        facts=find_facts({entry.key: parse_value(entry.value) for entry in model.metadata_props}),
        without_argmax=f"add --tensor {scores[-1]}, which goes into its ArgMax" if scores else WITHOUT_ARGMAX,
        notes=notes,
    )  # fmt: skip


def inputs_of(graph: GraphProto) -> list[ValueInfoProto]:
    """List what a graph takes; old ones list their weights there, too."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _the_picture(graph: GraphProto) -> ValueInfoProto:
    inputs = inputs_of(graph)
    names = ", ".join(value.name for value in inputs)
    if len(inputs) != 1:
        raise BadCheckpoint(f"it takes {len(inputs)} inputs ({names}); a network of one picture is wanted")
    kind = inputs[0].type.tensor_type
    if not kind.HasField("shape"):
        raise BadCheckpoint(f"it does not say how many axes {names} has; export it with a picture [B, C, h, w]")
    shape = [axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim]
    if len(shape) != 4 or (isinstance(shape[3], int) and shape[3] <= FEW and shape[1] not in range(1, FEW + 1)):
        raise BadCheckpoint(f"it takes {names} {shape}; export it with a picture [B, C, h, w], channels second")
    if kind.elem_type != TensorProto.FLOAT:
        found = TensorProto.DataType.Name(kind.elem_type).lower()
        raise BadCheckpoint(f"it takes {names} in {found}; export it in float32, and choose the precision later")
    return inputs[0]


def _choose_output(graph: GraphProto, tensor: str | None) -> tuple[str, ...]:
    """Leave the graph one output: the named one, which may be any tensor inside of it, or its first."""
    outputs = {value.name: value for value in graph.output}
    inner = {name for node in graph.node for name in node.output}
    if tensor is not None and tensor not in inner | outputs.keys():
        raise BadOption(f"there is no tensor {tensor!r} in the graph; its outputs are {', '.join(outputs)}")
    name = tensor or next((name for name in PREFERRED if name in outputs), next(iter(outputs)))
    if [*outputs] == [name]:
        return ()
    del graph.output[:]
    graph.output.append(outputs.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    if tensor:
        return (f"its answer is the tensor {name}",)
    return (f"of its outputs {', '.join(outputs)}, {name} is taken; --tensor names another",)


def free_batch(program: bytes) -> ModelProto:
    """Make a graph of a program that takes any number of windows at once."""
    model = onnx.load_model_from_string(program)
    del model.graph.value_info[:]
    (answer,) = model.graph.output
    answer.CopyFrom(helper.make_tensor_value_info(answer.name, answer.type.tensor_type.elem_type, [None] * 4))
    for value in inputs_of(model.graph):
        value.type.tensor_type.shape.dim[0].dim_param = "windows"
    return model
