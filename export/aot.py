"""Write the parts of a network as machine code for this very machine: AOTInductor's .pt2 packages."""

import dataclasses
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penumbra.export.parts import cut
from penumbra.models.card import Card
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.backends.aot import INPUTS
from penumbra.serving.engine.store import Golden

PRECISIONS = ("fp32", "bf16", "fp16")


def write(
    network: Network, card: Card, golden: Golden, directory: Path, *, precision: str, device: torch.device
) -> None:
    """Compile encode.pt2 and decode.pt2, and prompt.pt2 where the network takes one. Needs a C++ compiler."""
    for part in cut(network, card, golden, precision=precision, device=device):
        # code is compiled for two memory formats, and features may have any order of strides
        example = pytree.tree_map(lambda x: x if _is_channels_last(x) else x.contiguous(), part.example)
        part = dataclasses.replace(part, example=example)
        pairs = zip(*map(pytree.tree_leaves, (part.example, part.other)), strict=True)
        inputs = [_input_facts(example, other) for example, other in pairs]
        settings = {  # weights are constants of the code; threads are counted where it runs
            "freezing": True, "cpp.dynamic_threads": True, "aot_inductor.metadata": {INPUTS: json.dumps(inputs)},
        }  # fmt: skip
        package = str(directory / f"{part.name}.pt2")
        try:
            with warnings.catch_warnings(), torch.no_grad():  # with gradients, nothing is frozen
                warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own compiler's use of its own names
                build = torch._inductor.aoti_compile_and_package
                build(part.program(), package_path=package, inductor_configs=settings)
        except torch._inductor.exc.InvalidCxxCompiler:
            raise BadOption("the backend aot needs a C++ compiler, and g++ is not found; install one") from None


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _input_facts(example: Tensor, other: Tensor) -> dict[str, object]:
    """Say what the compiled code takes for granted of an input: sizes (None where free), type and memory format."""
    sizes = [size if size == size_too else None for size, size_too in zip(example.shape, other.shape, strict=True)]
    layout = "channels_last" if _is_channels_last(example) else "contiguous"
    return {"sizes": sizes, "dtype": str(example.dtype), "format": layout}
