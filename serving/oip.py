"""The Open Inference Protocol v2 without a transport: how tensors and parameters become a call, and an answer tensors.

Inputs: `image`, UINT8 [H, W, 3] or BYTES [1] (an encoded file), and for models that take them `boxes` FP32 [N, 5]
(x0, y0, x1, y1, class id) or `tags` BYTES or INT32/INT64 [N] (names or ids). Outputs: `labels` UINT8 [H, W], and the
maps of `serving.engine.uncertainty` and the model's own, FP32 [H, W]. Request parameters are the options of
`POST /segment`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.card import MAPS, Card
from models.errors import BadImage, BadOption
from serving.engine.options import DEFAULT_MAPS, SegmentOptions, parse_options, read_box
from serving.engine.prompts import MAX_BOXES, Box
from serving.engine.segmenter import Prediction


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


IMAGE = TensorSpec("image", "UINT8", (-1, -1, 3))
PROMPTS = {
    "none": (),
    "boxes": (TensorSpec("boxes", "FP32", (-1, 5)),),
    "tags": (TensorSpec("tags", "BYTES", (-1,)),),
}
TAG_IDS = {"INT32": np.int32, "INT64": np.int64}
DEFAULT_OUTPUTS = ("labels", *DEFAULT_MAPS)


def inputs_of(card: Card) -> tuple[TensorSpec, ...]:
    """What a model reads."""
    return (IMAGE, *PROMPTS[card.prompt.kind])


def outputs_of(card: Card) -> tuple[TensorSpec, ...]:
    """What a model can answer."""
    maps = (*MAPS, *(extra.name for extra in card.extra_maps))
    return (TensorSpec("labels", "UINT8", (-1, -1)), *(TensorSpec(name, "FP32", (-1, -1)) for name in maps))


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


def read_boxes(datatype: str, shape: Sequence[int], data: bytes) -> tuple[Box, ...]:
    """The prompt in an input tensor's raw bytes. Raises BadOption."""
    if datatype != "FP32" or len(shape) != 2 or shape[1] != 5 or len(data) != 4 * math.prod(shape):
        raise BadOption(f"boxes is {datatype} {list(shape)} in {len(data)} bytes; FP32 [N, 5] is wanted")
    rows = np.frombuffer(data, "<f4").reshape(shape).tolist()
    if len(rows) > MAX_BOXES:
        raise BadOption(f"boxes has {len(rows)} entries; up to {MAX_BOXES} are possible")
    for row in rows:
        if not float(row[4]).is_integer():
            raise BadOption(f"boxes has the class {row[4]}; a class id is wanted")
    return tuple(read_box("boxes", [*row[:4], int(row[4])]) for row in rows)


def read_tags(datatype: str, shape: Sequence[int], data: bytes) -> tuple[str | int, ...]:
    """The prompt in an input tensor's raw bytes: names, each behind its 4-byte length, or ids. Raises BadOption."""
    wanted = f"tags is {datatype} {list(shape)} in {len(data)} bytes; BYTES, INT32 or INT64 [N] is wanted"
    if len(shape) != 1:
        raise BadOption(wanted)
    if datatype in TAG_IDS and len(data) == shape[0] * np.dtype(TAG_IDS[datatype]).itemsize:
        return tuple(np.frombuffer(data, TAG_IDS[datatype]).tolist())
    names: list[str | int] = []
    while datatype == "BYTES" and len(data) >= 4:
        end = 4 + int.from_bytes(data[:4], "little")
        names, data = [*names, data[4:end].decode("utf-8", "replace")], data[end:]
    if data or len(names) != shape[0]:
        raise BadOption(wanted)
    return tuple(names)


def read_output(prediction: Prediction, name: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """One requested output tensor."""
    return prediction.labels_HW if name == "labels" else prediction.maps[name]
