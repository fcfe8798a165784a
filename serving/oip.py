"""The Open Inference Protocol v2 without a transport: how tensors and parameters become a call, and an answer tensors.

Inputs: `image`, UINT8 [H, W, 3] or BYTES [1] (an encoded file). Outputs: `labels` UINT8 [H, W] and the maps of
`serving.engine.uncertainty`, FP32 [H, W]. Request parameters are the options of `POST /segment`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.errors import BadImage, BadOption
from serving.engine.options import DEFAULT_MAPS, SegmentOptions, parse_options
from serving.engine.segmenter import Prediction
from serving.engine.uncertainty import MAPS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


INPUTS = (TensorSpec("image", "UINT8", (-1, -1, 3)),)
OUTPUTS = (TensorSpec("labels", "UINT8", (-1, -1)), *(TensorSpec(name, "FP32", (-1, -1)) for name in MAPS))
DEFAULT_OUTPUTS = ("labels", *DEFAULT_MAPS)


def read_options(model: str, version: str, parameters: Mapping[str, object], outputs: Sequence[str]) -> SegmentOptions:
    """Options of one request. Raises BadOption: an unknown parameter, output, or a version that is no number."""
    for name in ("model", "version", "outputs"):
        if name in parameters:
            raise BadOption(f"{name} is not a parameter here; it has its own field in the request")
    fields = {name: str(value) for name, value in parameters.items()} | ({"version": version} if version else {})
    maps = tuple(name for name in outputs or DEFAULT_OUTPUTS if name != "labels")
    return replace(parse_options(fields), model=model, outputs=maps)


def read_image(datatype: str, shape: Sequence[int], data: bytes) -> bytes | NDArray[np.uint8]:
    """The picture in an input tensor's raw bytes: pixels, or an encoded file. Raises BadImage."""
    if datatype == "UINT8" and len(shape) == 3 and shape[2] == 3 and min(shape) > 0:
        if len(data) != math.prod(shape):
            raise BadImage(f"image {list(shape)} has {len(data)} bytes; {math.prod(shape)} are wanted")
        return np.frombuffer(data, np.uint8).reshape(shape)
    if datatype == "BYTES" and list(shape) == [1]:
        if len(data) < 4 or len(data) != 4 + int.from_bytes(data[:4], "little"):
            raise BadImage(f"image BYTES [1] has {len(data)} bytes that do not fit its 4-byte length prefix")
        return data[4:]
    raise BadImage(f"image is {datatype} {list(shape)}; UINT8 [height, width, 3] or BYTES [1] is wanted")


def read_output(prediction: Prediction, name: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """One requested output tensor."""
    return prediction.labels_HW if name == "labels" else prediction.maps[name]
