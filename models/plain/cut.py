"""Cut a program of a picture and masks where the masks begin: what is in front runs once for all samples.

`partition` splits the graph by what depends on the masks; what is rewritten besides is what a trace would stumble over.
"""

from collections.abc import Container, Sequence

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten
BROADCAST = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def partition(program: ExportedProgram) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a program of `mask_dropouts`: encode(image_BChw) -> features, decode(*features, noise_SBL) -> logits_SBKhw.

    Features are the tensors that what depends on the noise reads of what does not. Each half has the weights that it
    uses. What has no window axis in front, or holds no floats, is not handed over: decode computes it again.
    """
    module = program.module(check_guards=False)
    graph = module.graph
    make_traceable(graph)
    image, noise = (node for node in graph.nodes if node.op == "placeholder")
    for number in [user for user in noise.users if is_size(user)]:
        number.args = (image, 0)  # they are as many
    shown, drawn = _divide(graph, image, noise)
    features = _read_by(drawn, shown)
    decode, needs_size = _decode(graph, noise, drawn, shown)
    with graph.inserting_after(image):
        plane = graph.call_function(aten.slice.Tensor, (image, 1, 0, 1))
    encode, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node not in drawn:
            copies[node] = encode.node_copy(node, copies.__getitem__)
    encode.output(tuple(copies[node] for node in (*features, *[plane] * needs_size)))
    encode.eliminate_dead_code()
    return fx.GraphModule(module, encode), fx.GraphModule(module, decode)


def kind_of(node: fx.Node) -> str:
    """Name the aten operation of a node, without its overload or whether it works in place; empty where it is none."""
    return str(node.target).split(".")[1].rstrip("_") if isinstance(node.target, torch._ops.OpOverload) else ""


def is_size(node: fx.Node) -> bool:
    """Tell whether a node is a number that follows from the sizes of the input."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Find all that nodes are computed from, and themselves."""
    found, queue = set(nodes), list(nodes)
    for near in queue:
        new = [other for other in near.all_input_nodes if other not in found]
        found.update(new)
        queue.extend(new)
    return found


def is_windows(node: fx.Node, image: fx.Node, axis: int = 0) -> bool:
    """Tell whether an axis is as long as there are windows, however many."""
    size, num_windows = node.meta["val"].shape[axis], image.meta["val"].shape[0]
    return isinstance(size, torch.SymInt) and bool(size.node.expr == num_windows.node.expr)


def size_of(x: Tensor, axis: int) -> int:
    """Return a size so that a trace knows where it comes from."""
    return x.shape[axis]


def take(x: Tensor, axis: int = 0, first: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    """Slice along an axis, as aten's `slice` does."""
    return x[(slice(None),) * (axis % x.dim()) + (slice(first, end, step),)]


def make_traceable(graph: fx.Graph) -> None:
    """Have torch's own functions take the sizes in a graph: to a trace, what an operator takes is a constant."""
    _tidy(graph)
    for node in graph.nodes:
        kind = kind_of(node)
        if kind == "sym_size":
            node.target = size_of
        elif kind == "slice":
            node.target = take
        elif any(map(is_size, node.all_input_nodes)):
            space = next((space for space in (torch, torch._C._nn) if hasattr(space, kind)), None)
            if space:
                node.target = getattr(space, kind)
            elif kind and hasattr(Tensor, kind):
                node.op, node.target = "call_method", kind


def _tidy(graph: fx.Graph) -> None:
    """Undo what torch.export did to a graph without mutation.

    A view needs the strides of the export. Only a whole normalisation is folded into the convolution before it.
    """
    for node in list(graph.nodes):
        kind = kind_of(node)
        if kind in ("view", "_unsafe_view"):
            node.target = aten.reshape.default
        elif kind == "detach" or (kind == "clone" and not node.kwargs):
            node.replace_all_uses_with(node.args[0])
        elif kind == "_native_batch_norm_legit_no_training":
            (first,) = node.users
            first.target, first.args = aten.batch_norm.default, (*node.args[:5], False, *node.args[5:], True)
    graph.eliminate_dead_code()


def _divide(graph: fx.Graph, image: fx.Node, noise: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Find what encode computes of the picture, and what decode computes of that and the noise. Sizes are neither."""
    shown, drawn = {image}, {noise}
    for node in graph.nodes:
        read = set() if is_size(node) else {other for other in node.all_input_nodes if not is_size(other)}
        if read & drawn:
            drawn.add(node)
        elif read & shown:
            shown.add(node)
    while again := {node for node in _read_by(drawn, shown) if not _can_cross(node, image)}:
        drawn |= again
        shown -= again
    return shown, drawn


def _read_by(drawn: set[fx.Node], shown: set[fx.Node]) -> list[fx.Node]:
    """List the tensors that decode takes from encode, in the order of the program."""
    return sorted(node for node in shown if any(user in drawn and not is_size(user) for user in node.users))


def _can_cross(node: fx.Node, image: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and is_windows(node, image)


def _decode(graph: fx.Graph, noise: fx.Node, drawn: set[fx.Node], shown: set[fx.Node]) -> tuple[fx.Graph, bool]:
    """Copy what decode computes, with samples folded into windows; and tell whether it reads the picture's height."""
    decode, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    given = {node: decode.placeholder(f"feature_{i}") for i, node in enumerate(_read_by(drawn, shown))}
    plane, noise_SBL = decode.placeholder("plane_B1hw"), decode.placeholder("noise_SBL")
    folds = [decode.call_function(size_of, (noise_SBL, axis)) for axis in (0, 1)]
    for node, feature in given.items():
        times = [folds[0]] + [1] * (node.meta["val"].dim() - 1)
        copies[node] = decode.call_method("repeat", (feature, times))
    copies[noise] = decode.call_method("flatten", (noise_SBL, 0, 1))
    for node in graph.nodes:
        if node.op == "output":
            decode.output(decode.call_method("unflatten", (copies[node.args[0][0]], 0, folds)))
        elif node.target is size_of:
            of, axis = plane if node.args[1] else copies[noise], node.args[1]
            copies[node] = decode.call_function(size_of, (of, axis))
        elif node in drawn and _is_broadcast(node, noise, given):
            wide = [
                decode.call_method("unsqueeze", (given[x], 0)) if x in given
                else decode.call_method("unflatten", (copies[x], 0, folds))
                for x in node.args
            ]  # fmt: skip
            product = decode.call_function(node.target, tuple(wide), node.kwargs)
            copies[node] = decode.call_method("flatten", (product, 0, 1))
        elif node not in copies and (node in drawn or node not in shown):
            copies[node] = decode.node_copy(node, copies.__getitem__)
    decode.eliminate_dead_code()
    needs_size = bool(plane.users)
    if not needs_size:
        decode.erase_node(plane)
    return decode, needs_size


def _is_broadcast(node: fx.Node, noise: fx.Node, features: Container[fx.Node]) -> bool:
    """Tell whether a node joins a feature with a tensor of samples of the same axes, so that none need be repeated."""
    nodes = [x for x in node.args if isinstance(x, fx.Node)]
    if node.target not in BROADCAST or len(nodes) != len(node.args):
        return False
    left, right = sorted(nodes, key=lambda x: x in features)
    same = left.meta["val"].dim() == right.meta["val"].dim()
    return left not in features and right in features and same and is_windows(left, noise)
