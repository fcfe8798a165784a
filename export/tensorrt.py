"""Build TensorRT engines of the parts of a network, by torch-tensorrt for the GPU that is here.

What is used of torch-tensorrt exists in 2.11 (TensorRT 10.15) as in 2.13 (TensorRT 11): graphs are typed, and a
precision is a cast network, never a builder's flag.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from penumbra.export.parts import Part, cut, is_open
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Build:
    """The source of one engine: a program whose inputs are named by position, and the sizes of each input."""

    name: str
    program: ExportedProgram
    inputs: dict[str, torch_tensorrt.Input]


class _Used(nn.Module):
    """A part that takes only those of its inputs that it uses: TensorRT has no place for others."""

    def __init__(self, part: Part, used: Sequence[int]) -> None:
        super().__init__()
        leaves, self.structure = pytree.tree_flatten(part.example)
        self.part = part.module
        self.unused = [None if i in used else leaf for i, leaf in enumerate(leaves)]

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        leaves = [inputs.get(str(i), leaf) for i, leaf in enumerate(self.unused)]
        return self.part(*pytree.tree_unflatten(leaves, self.structure))


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Build encode.engine and decode.engine, and prompt.engine where the network takes one: minutes each."""
    for _, source in prepare(network, card, golden, precision=precision, device=device):
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            source.program,
            inputs=[source.inputs],
            disable_tf32=precision != "tf32",
            device=f"cuda:{device.index or 0}",  # without an index torch-tensorrt would have none
        )
        (directory / f"{source.name}.engine").write_bytes(engine)


def prepare(
    network: Network, card: Card, golden: Golden, *, precision: str, device: torch.device
) -> list[tuple[Part, Build]]:
    """Do all that can be done without a GPU. Raises BadOption where windows differ in size."""
    if is_open(card):
        raise BadOption(
            f"{card.name} takes windows of any size, and an engine is built for one; choose another backend"
        )
    parts = cut(network, card, golden, precision=precision.replace("tf", "fp"), device=device)
    return [(part, build(part, card)) for part in parts]


@torch.no_grad()
def build(part: Part, card: Card) -> Build:
    """Prepare a part for TensorRT: without its idle inputs, with names and sizes."""
    example, other = (pytree.tree_leaves(call) for call in (part.example, part.other))
    placeholders = [node for node in part.program().graph.nodes if node.op == "placeholder"][-len(example) :]
    used = [i for i, node in enumerate(placeholders) if node.users]
    calls = [({str(i): leaves[i] for i in used},) for leaves in (example, other)]
    program = _unguarded(Part(part.name, _Used(part, used), *calls).program())
    program = _unguarded(program.run_decompositions(RULES))
    return Build(part.name, program, {str(i): _profile(part, i, card) for i in used})


def _select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """Write one slice; torch-tensorrt 2.13's own rule turns the index -1 into an empty range, and fails."""
    start = index % x.shape[dim]
    return torch.slice_scatter(x, source.unsqueeze(dim), dim, start, start + 1)


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat by expanding: torch's own rule leaves `broadcast_in_dim`, without a converter, at a free count."""
    shape = [1] * (len(repeats) - x.ndim) + list(x.shape)
    apart: list[int] = []
    tiled: list[int] = []
    for times, size in zip(repeats, shape, strict=True):
        once = isinstance(times, int) and times == 1
        apart += [size] if once else [1, size]
        tiled += [size] if once else [times, size]
    return x.reshape(apart).expand(tiled).reshape([times * size for times, size in zip(repeats, shape, strict=True)])


def _max_pool2d(
    x: Tensor, kernel: list[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """Pool without the ceil mode, which the converter lacks: what a last step reaches beyond the map is -inf."""
    stride = stride or kernel
    beyond: list[int] = []
    for axis in (1, 0):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        lacking = (reach - x.shape[2 + axis] - 2 * padding[axis]) % stride[axis]
        beyond += [0, lacking if lacking < reach - padding[axis] else 0]  # no step begins beyond the map
    if ceil_mode and any(beyond):
        x = F.pad(x, beyond, value=float("-inf"))
    pooled: Tensor = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation)[0]
    return pooled


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute both plainly: torch's own rule leaves `broadcast_in_dim`, without a converter, at a free size."""
    axes = list(dim or range(x.ndim))
    count = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares do not fit half precision
    mean = wide.mean(axes, keepdim=True)
    variance = (wide - mean).square().sum(axes, keepdim=keepdim) / count
    return variance.to(x.dtype), (mean if keepdim else wide.mean(axes)).to(x.dtype)


RULES = {
    torch.ops.aten.select_scatter.default: _select_scatter,
    torch.ops.aten.repeat.default: _repeat,
    torch.ops.aten.max_pool2d.default: _max_pool2d,
    torch.ops.aten.var_mean.correction: _var_mean,
}
"""Operators that are decomposed before torch-tensorrt sees them."""


def _unguarded(program: ExportedProgram) -> ExportedProgram:
    """Drop the checks of a program's input sizes: an engine has its own, and torch 2.13 may fail to decompose them."""
    program.module = partial(program.module, check_guards=False)  # type: ignore[method-assign]
    return program


def _profile(part: Part, position: int, card: Card) -> torch_tensorrt.Input:
    least, best, most = zip(*part.ranges(position, card), strict=True)
    dtype = pytree.tree_leaves(part.example)[position].dtype
    return torch_tensorrt.Input(min_shape=least, opt_shape=best, max_shape=most, dtype=dtype)
