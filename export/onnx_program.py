"""Read an ONNX program, and make an artifact's graph of it: the program itself, and logits behind it."""

import ast
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from penumbra.export.bring import REMEDIES, Brought, Given, load_of, read_file
from penumbra.export.given import Facts, find_facts
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.models.plain.net import LEAST
from penumbra.models.plain.programs import PREFERRED, Onnx

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of the operators that onnxruntime has."""
FEW = 8
"""Channels, at most, of a picture whose channels could be its last axis."""

PREFIX = "penumbra_"
"""How the names of the values begin that are added."""


def read_onnx(source: str, given: Given, _: Facts) -> Brought:
    """Read an ONNX file. Raises BadCheckpoint: it takes something else than one picture in float32, has operators that
    nobody has, or is damaged; BadOption: there is no such tensor."""
    program, origin = read_file(source, "onnx")
    try:
        model = onnx.load(source)  # with weights in files beside it
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BadCheckpoint(f"{source} is no ONNX file, or lacks a part ({str(error).partition(chr(10))[0]})") from None
    graph = model.graph
    picture = _the_picture(graph, source)
    own = {function.domain for function in model.functions}
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in {*DOMAINS, *own}})
    if foreign:
        raise BadCheckpoint(f"{source} has the custom operation {foreign[0]}, which onnxruntime lacks; export it with "
                            "operations of ONNX alone, or bring the module itself: penumbra import module")  # fmt: skip
    notes = _choose_output(graph, given.tensor, source)
    if notes or len(program) < model.ByteSize():
        program = model.SerializeToString()
    body = load_of("onnx", program, source)

    def in_batches(image_BChw: Tensor) -> Tensor:
        session = Onnx(encode_graph(program, "logits").SerializeToString()).session
        return torch.from_numpy(session.run(None, {picture.name: image_BChw.numpy()})[0])

    channels, height, width = (axis.dim_value or None for axis in picture.type.tensor_type.shape.dim[1:])
    return Brought(
        "onnx", program, Path(source), origin, body, in_batches, channels, height, width, _metadata(model),
        _remedies(graph), notes,
    )  # fmt: skip


def _the_picture(graph: GraphProto, source: str) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    names = ", ".join(value.name for value in inputs)
    if len(inputs) != 1:
        raise BadCheckpoint(f"{source} takes {len(inputs)} inputs ({names}); a network of one picture is wanted")
    kind = inputs[0].type.tensor_type
    if not kind.HasField("shape"):
        raise BadCheckpoint(f"{source} does not say how many axes {names} has; export it with a picture [B, C, h, w]")
    shape = [axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim]
    if len(shape) != 4 or (isinstance(shape[3], int) and shape[3] <= FEW and shape[1] not in range(1, FEW + 1)):
        raise BadCheckpoint(f"{source} takes {names} {shape}; export it with a picture [B, C, h, w], channels second")
    if kind.elem_type != TensorProto.FLOAT:
        found = TensorProto.DataType.Name(kind.elem_type).lower()
        raise BadCheckpoint(f"{source} takes {names} in {found}; export it in float32, and choose the precision later")
    picture: onnx.ValueInfoProto = inputs[0]
    return picture


def _choose_output(graph: GraphProto, tensor: str | None, source: str) -> tuple[str, ...]:
    """Leave the graph one output: the named one, which may be any tensor inside of it, or its first."""
    outputs = {value.name: value for value in graph.output}
    inner = {name for node in graph.node for name in node.output}
    if tensor is not None and tensor not in inner | outputs.keys():
        raise BadOption(f"{source} has no tensor {tensor!r}; its outputs are {', '.join(outputs)}")
    name = tensor or next((name for name in PREFERRED if name in outputs), next(iter(outputs)))
    if [*outputs] == [name]:
        return ()
    del graph.output[:]
    graph.output.append(outputs.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return (f"of its outputs {', '.join(outputs)}, {name} is taken; --tensor names another",) if not tensor else (
        f"its answer is the tensor {name}",)  # fmt: skip


def _remedies(graph: GraphProto) -> dict[str, str]:
    scores = [node.input[0] for node in graph.node if node.op_type == "ArgMax"]
    argmax = f"add --tensor {scores[-1]}, which goes into its ArgMax" if scores else REMEDIES["argmax"]
    return {"argmax": argmax, "batch": "export it with a first axis that is free (dynamic_axes={'image': {0: 'B'}})"}


def _metadata(model: ModelProto) -> Facts:
    """Read what the file says of itself; values are JSON, or Python's literals, or text."""
    content: Facts = {}
    for entry in model.metadata_props:
        try:
            content[entry.key] = ast.literal_eval(entry.value)
        except (ValueError, SyntaxError):
            content[entry.key] = entry.value
    return find_facts(content)


def encode_graph(program: bytes, output: str) -> ModelProto:
    """Free the batch axis of a program, and let it give logits, as `penumbra.models.plain.net.as_logits` does."""
    model = onnx.load_model_from_string(program)
    graph = model.graph
    del graph.value_info[:]
    (given,) = graph.output
    given.type.tensor_type.ClearField("shape")
    constants = {tensor.name for tensor in graph.initializer}
    for value in (value for value in graph.input if value.name not in constants):
        value.type.tensor_type.shape.dim[0].dim_param = "windows"
    if output != "logits":
        graph.node.extend(_as_logits(given.name, output))
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info(f"{PREFIX}logits", TensorProto.FLOAT, None))
    return model


def _as_logits(given: str, output: str) -> list[NodeProto]:
    """List the nodes behind an answer of one kind."""
    p, other, both, least = given, f"{PREFIX}other", f"{PREFIX}both", f"{PREFIX}least"
    nodes = []
    if output == "sigmoid logit":
        return [
            helper.make_node("Sub", [p, p], [other]),
            helper.make_node("Concat", [other, p], [f"{PREFIX}logits"], axis=1),
        ]
    if output == "sigmoid":
        nodes = [
            _constant(f"{PREFIX}one", 1.0),
            helper.make_node("Sub", [f"{PREFIX}one", p], [other]),
            helper.make_node("Concat", [other, p], [both], axis=1),
        ]
        p = both
    return [
        *nodes,
        _constant(least, LEAST),
        helper.make_node("Max", [p, least], [f"{PREFIX}positive"]),
        helper.make_node("Log", [f"{PREFIX}positive"], [f"{PREFIX}logits"]),
    ]


def _constant(name: str, value: float) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
