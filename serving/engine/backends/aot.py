"""Machine code of AOTInductor, bound to the processor or GPU it was compiled on. Loading one is running code.

The code checks nothing: from other sizes, types or memory formats it computes garbage. What it was compiled for is in
its metadata, and every call is held against that.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, flat
from penumbra.serving.engine.device import hardware_of

INPUTS = "penumbra_inputs"
FORMATS = ("contiguous", "channels_last")
"""Memory formats, by their names in `torch.memory_format`."""


class AotGraph:
    """A graph is one compiled package."""

    def __init__(self, path: Path, device: torch.device) -> None:
        index = -1 if device.type == "cpu" else device.index or 0
        # `aoti_load_package` is this and an import of two seconds. True: for one thread, and asking no event.
        self._package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
        self._inputs = json.loads(self._package.get_metadata()[INPUTS])
        self._name = path.stem

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._package.run(self._checked(inputs))
        return outputs

    def _checked(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Put inputs into the memory formats that were compiled. Raises ValueError for what cannot be computed."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"{self._name} is called with {len(inputs)} inputs; it takes {len(self._inputs)}")
        for i, (tensor, compiled) in enumerate(zip(inputs, self._inputs, strict=True)):
            fits = len(tensor.shape) == len(compiled["sizes"]) and all(
                size == fixed for size, fixed in zip(tensor.shape, compiled["sizes"], strict=True) if fixed is not None
            )
            if not fits or str(tensor.dtype) != compiled["dtype"]:
                raise ValueError(
                    f"input {i} of {self._name} is {tensor.dtype} {list(tensor.shape)}; it was compiled for "
                    f"{compiled['dtype']} {compiled['sizes']}, where None is any size"
                )
        formats = [
            torch.channels_last if w["format"] == "channels_last" else torch.contiguous_format for w in self._inputs
        ]
        return [tensor.contiguous(memory_format=kind) for tensor, kind in zip(inputs, formats, strict=True)]


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    return flat(AotGraph(path, device))


def target(device: torch.device) -> dict[str, str]:
    """Name the hardware that code is compiled for, and torch."""
    return hardware_of(device) | {"torch": torch.__version__}
