"""Cut a program where its dropout begins, so that MC dropout (Gal & Ghahramani 2016) costs the encoder once.

`mask_dropouts` makes the dropouts of a program an input, once, when a network is imported. `partition` splits such a
program by what depends on that input: encode is what does not, decode is the rest, for all samples in one call.

A mask is of channels, as in the other methods here, so that a sample is one network for a whole picture of any size.
DEVIATION: nn.Dropout drops elements while it trains. What one pixel keeps has the same distribution either way;
neighbours share their mask here.
"""

import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from penumbra.models.card import Sampling
from penumbra.models.errors import BadOption
from penumbra.models.plain.cut import ancestors, is_windows, kind_of
from penumbra.models.plain.programs import pick

aten = torch.ops.aten
DROPOUTS = ("dropout", "feature_dropout")
REFUSED = ("alpha_dropout", "feature_alpha_dropout", "native_dropout", "bernoulli")
CHANNELS_SECOND = ("conv1d", "conv2d", "conv_transpose2d", "batch_norm", "group_norm", "instance_norm")
CHANNELS_LAST = ("linear", "layer_norm", "rms_norm", "matmul")
MOVING = ("permute", "transpose", "t", "view", "reshape", "flatten", "unflatten")
"""Operations behind which an axis has another place."""
DEFAULT_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Masked:
    """A program of (image_BChw, noise_BL), what its noise is, and in words what became of every dropout."""

    program: ExportedProgram
    sampling: Sampling
    notes: tuple[str, ...]


def mask_dropouts(program: ExportedProgram, image_BChw: Tensor) -> Masked:
    """Make the dropouts of a program a second input, noise_BL: masks of their channels, each 0 or 1 / keep.

    program: of one picture, in eval mode. image_BChw: an example of it.
    Raises BadOption: no dropout, or none that a mask can stand for; training mode; a number of pictures that is fixed.
    """
    module = program.module(check_guards=False)
    nodes = list(module.graph.nodes)
    (image,) = (node for node in nodes if node.op == "placeholder")
    _check(nodes, image)
    by_value = {id(node.meta["val"]): node for node in nodes[-1].args[0]}
    outputs = tree_unflatten([node.meta["val"] for node in nodes[-1].args[0]], program.call_spec.out_spec)
    logits = by_value[id(pick(outputs))]
    used = ancestors([logits])
    with module.graph.inserting_after(image):
        noise_BL = module.graph.placeholder("noise_BL")
    masks, notes = list[tuple[int, float]](), list[str]()
    for node in [node for node in nodes if kind_of(node) in DROPOUTS and node.args[1]]:
        axes = _find_axes(node, image, used)
        if isinstance(axes, str):
            node.replace_all_uses_with(node.args[0])
            notes.append(f"{_place(node)} is left out: {axes}")
        else:
            first, channels = sum(channels for channels, _ in masks), node.meta["val"].shape[axes[1]]
            _insert_mask(noise_BL, node, slice(first, first + channels), axes)
            masks.append((channels, 1 - node.args[1]))
            notes.append(f"{_place(node)} is a mask of {channels} channels")
        module.graph.erase_node(node)
    if not masks:
        raise BadOption("; ".join(notes) or "the program holds no dropout, or only with p = 0")
    nodes[-1].args = (logits,)
    module.graph.set_codegen(fx.graph.CodeGen())
    sampling = sampling_of(masks)
    masked = _export(fx.GraphModule(module, module.graph), image, image_BChw, sampling.noise_length)
    return Masked(masked, sampling, tuple(notes))


def sampling_of(masks: Sequence[tuple[int, float]]) -> Sampling:
    """Declare the noise of masks in turn, each of so many channels with a keep rate."""
    runs = [(sum(channels for channels, _ in run), keep) for keep, run in groupby(masks, key=lambda mask: mask[1])]
    length = sum(channels for channels, _ in runs)
    keep = sum(channels * keep for channels, keep in runs) / length if len(runs) > 1 else runs[0][1]
    keeps = tuple(runs) if len(runs) > 1 else ()
    return Sampling("dropout", length, keep=keep, keeps=keeps, default_samples=DEFAULT_SAMPLES)


def _check(nodes: Sequence[fx.Node], image: fx.Node) -> None:
    if isinstance(image.meta["val"].shape[0], int):
        raise BadOption("the program takes a fixed number of pictures; export it with a dynamic first axis")
    for node in nodes:
        if kind_of(node) == "batch_norm" and node.args[5]:
            raise BadOption("the program normalises by its batch, as in training; export it after model.eval()")
        if kind_of(node) in REFUSED:
            raise BadOption(f"{_place(node)} is {kind_of(node)}, which no mask of channels can stand for")


def _place(node: fx.Node) -> str:
    """Say where in its network a dropout is, and what it drops."""
    path = [path for path, _ in node.meta.get("nn_module_stack", {}).values()][-1:]
    return f"{'.'.join(path) or node.name} (p = {node.args[1]:.6g})"


def _find_axes(node: fx.Node, image: fx.Node, used: Container[fx.Node]) -> tuple[int, int] | str:
    """Find the axes of windows and of channels in what is dropped, or say why no mask can stand for the dropout."""
    shape = node.meta["val"].shape
    windows = [axis for axis in range(len(shape)) if is_windows(node, image, axis)]
    channel_axis = 1 if kind_of(node) == "feature_dropout" else _channel_axis(node)
    if (node.args[0] if _in_place(node) else node) not in used:
        return "no logits depend on it"
    if node.args[1] == 1:
        return "it drops everything"
    if channel_axis is None:
        return "attention weights have no channels"
    if not windows or not isinstance(shape[channel_axis], int):
        return f"of its {len(shape)} axes none is of windows, or that of channels has no fixed size"
    return windows[0], channel_axis


def _channel_axis(node: fx.Node) -> int | None:
    """Find the axis of channels by what computed a tensor, else by what reads it; None for attention weights."""
    last = node.meta["val"].dim() - 1
    for step in (lambda node: node.all_input_nodes, lambda node: node.users):
        queue = [node]
        for other in (other for near in queue for other in step(near)):  # type: ignore[no-untyped-call]
            kind = kind_of(other)
            if kind in ("softmax", *CHANNELS_SECOND, *CHANNELS_LAST):
                return None if kind == "softmax" else 1 if kind in CHANNELS_SECOND else last
            same = kind not in ("", *MOVING) and other.meta["val"].shape == node.meta["val"].shape
            queue += [other] if same and other not in queue else []
    return 1 if last == 3 else last


def _in_place(node: fx.Node) -> bool:
    return str(node.target).endswith("_.default")


def _insert_mask(noise_BL: fx.Node, node: fx.Node, share: slice, axes: tuple[int, int]) -> None:
    """Put a product with a share of the noise in the place of a dropout."""
    graph, (window_axis, channel_axis) = node.graph, axes
    shape = [1] * node.meta["val"].dim()
    shape[window_axis], shape[channel_axis] = -1, share.stop - share.start
    with graph.inserting_before(node):
        mask = graph.call_function(aten.slice.Tensor, (noise_BL, 1, share.start, share.stop))
        if channel_axis < window_axis:
            mask = graph.call_function(aten.t.default, (mask,))
        mask = graph.call_function(aten.reshape.default, (mask, shape))
        times = aten.mul_.Tensor if _in_place(node) else aten.mul.Tensor
        node.replace_all_uses_with(graph.call_function(times, (node.args[0], mask)))


def _export(module: fx.GraphModule, image: fx.Node, image_BChw: Tensor, length: int) -> ExportedProgram:
    """Export a module of picture and noise, with the picture's axes as free as they were."""
    sizes = image.meta["val"].shape
    free = {axis: Dim.AUTO if isinstance(size, torch.SymInt) else Dim.STATIC for axis, size in enumerate(sizes)}
    examples = image_BChw[:1].repeat(2, 1, 1, 1), torch.ones(2, length)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of its own names
        program = torch.export.export(module, examples, dynamic_shapes=(free, {0: Dim.AUTO, 1: Dim.STATIC}))
        return program.run_decompositions({})  # type: ignore[no-any-return]
