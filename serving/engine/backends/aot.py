"""Machine code of AOTInductor, bound to the processor or GPU it was compiled on. Loading one is running code.

The code checks nothing: from other sizes, types or memory formats it computes garbage. What it was compiled for is in
its metadata, and every call is held against that.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penumbra.serving.engine.backends import Graph, flat
from penumbra.serving.engine.device import hardware_of

INPUTS = "penumbra_inputs"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    """Load one compiled package."""
    index = -1 if device.type == "cpu" else device.index or 0
    # `aoti_load_package` is this and an import of two seconds. True: for one thread, and asking no event.
    package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
    compiled = json.loads(package.get_metadata()[INPUTS])
    return flat(lambda inputs: package.run(_checked(inputs, compiled, path.stem)))


def _checked(inputs: Sequence[Tensor], compiled: Sequence[dict[str, Any]], name: str) -> list[Tensor]:
    """Put inputs into the memory formats that were compiled. Raises ValueError for what cannot be computed."""
    if len(inputs) != len(compiled):
        raise ValueError(f"{name} is called with {len(inputs)} inputs; it takes {len(compiled)}")
    for i, (tensor, one) in enumerate(zip(inputs, compiled, strict=True)):
        fits = len(tensor.shape) == len(one["sizes"]) and all(
            size == fixed for size, fixed in zip(tensor.shape, one["sizes"], strict=True) if fixed is not None
        )
        if not fits or str(tensor.dtype) != one["dtype"]:
            raise ValueError(
                f"input {i} of {name} is {tensor.dtype} {list(tensor.shape)}; it was compiled for "
                f"{one['dtype']} {one['sizes']}, where None is any size"
            )
    return [x.contiguous(memory_format=FORMATS[one["format"]]) for x, one in zip(inputs, compiled, strict=True)]


def target(device: torch.device) -> dict[str, str]:
    """Name the hardware that code is compiled for, and torch."""
    return hardware_of(device) | {"torch": torch.__version__}
