"""Make the graph of an artifact from an ONNX program that was brought: the program itself, and logits behind it."""

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from penumbra.models.plain.net import LEAST

PREFIX = "penumbra_"
"""How the names of the values begin that are added."""


def encode_graph(program: bytes, output: str) -> ModelProto:
    """Free the batch axis of a program, and let it give logits, as `penumbra.models.plain.net.as_logits` does."""
    model = onnx.load_model_from_string(program)
    graph = model.graph
    del graph.value_info[:]
    (given,) = graph.output
    given.type.tensor_type.ClearField("shape")
    free_batch(graph)
    if output != "logits":
        graph.node.extend(_as_logits(given.name, output))
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info(f"{PREFIX}logits", TensorProto.FLOAT, None))
    return model


def free_batch(graph: onnx.GraphProto) -> None:
    """Name the first axis of the picture instead of giving it a size."""
    constants = {tensor.name for tensor in graph.initializer}
    for value in (value for value in graph.input if value.name not in constants):
        value.type.tensor_type.shape.dim[0].dim_param = "windows"


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
