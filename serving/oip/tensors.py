"""Tensors of the Open Inference Protocol v2: what a model reads and writes, and whether a request's tensors are that.

Both transports bring their tensors into the protocol's raw form (little-endian, row-major, strings behind a 4-byte
length) and have them checked here, by rules and in words that are Triton's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import MAX_BOXES, PROBABILITIES, Box, read_box

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2",
}  # fmt: skip
"""Datatype -> how numpy reads its raw form; BYTES has no fixed width and is read by `split_strings`."""
SHOWN = 60
"""Characters of a caller's text that an error repeats; gRPC carries errors in a header of a few kilobytes."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input of a request in raw form."""

    name: str
    datatype: str
    shape: Shape
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model; -1 is any size. also: further datatypes that are read, each with its shape."""

    name: str
    datatype: str
    shape: Shape
    optional: bool = False
    also: tuple[tuple[str, Shape], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One output of an answer: an array, or strings. binary: whether it follows the JSON of HTTP in raw form."""

    name: str
    datatype: str
    values: NDArray[np.uint8] | NDArray[np.float32] | tuple[bytes, ...]
    binary: bool = False

    @property
    def shape(self) -> Shape:
        return (len(self.values),) if isinstance(self.values, tuple) else self.values.shape

    @property
    def raw(self) -> memoryview:
        """The raw form; an array is not copied."""
        if isinstance(self.values, tuple):
            return memoryview(join_strings(self.values))
        return np.ascontiguousarray(self.values).data.cast("B")


IMAGE = TensorSpec("image", "UINT8", (-1, -1, 3), also=(("BYTES", (1,)),))
PROMPTS = {
    "none": (),
    "boxes": (TensorSpec("boxes", "FP32", (-1, 5), optional=True),),
    "tags": (TensorSpec("tags", "BYTES", (-1,), optional=True, also=(("INT32", (-1,)), ("INT64", (-1,)))),),
}


def inputs_of(card: Card) -> tuple[TensorSpec, ...]:
    """What a model reads."""
    return (IMAGE, *PROMPTS[card.prompt.kind])


def outputs_of(card: Card) -> tuple[TensorSpec, ...]:
    """What a model answers by default; the parameter `samples` and a prompt may change which maps it has."""
    maps = card.maps(card.sampling.default_samples)
    return (
        TensorSpec("labels", "UINT8", (-1, -1)),
        *(TensorSpec(name, "FP32", (-1, -1)) for name in maps),
        TensorSpec(PROBABILITIES, "FP32", (card.num_classes, -1, -1)),
    )


def check_inputs(
    tensors: Sequence[Tensor], specs: Sequence[TensorSpec], *, model: str, request_id: str
) -> dict[str, Tensor]:
    """A request's tensors by name, when they are what the model reads. Raises BadOption."""
    said = f"[request id: {request_id[:SHOWN] or '<id_unknown>'}] "
    given: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name in given:
            raise BadOption(f"{said}input '{tensor.name[:SHOWN]}' already exists in request")
        given[tensor.name] = tensor
    known = {spec.name: spec for spec in specs}
    required = [spec.name for spec in specs if not spec.optional]
    missing, unknown = [n for n in required if n not in given], [n for n in given if n not in known]
    if not len(required) <= len(given) <= len(specs) or (missing and not unknown):
        wanted = "" if len(required) == len(specs) else f"number of inputs between {len(required)} and "
        raise BadOption(
            f"{said}expected {wanted}{len(specs)}{'' if wanted else ' inputs'} but got {len(given)} inputs for model "
            f"'{model}'. Got input(s) {_quoted(given)}, but missing required input(s) {_quoted(missing)}. Please "
            "provide all required input(s)."
        )
    if unknown:
        raise BadOption(f"unexpected inference input '{unknown[0][:SHOWN]}' for model '{model}'")
    for tensor in given.values():
        _check_form(tensor, known[tensor.name], model=model, said=said)
        _check_size(tensor, model=model, said=said)
    return given


def _quoted(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name[:SHOWN]}'" for name in list(names)[:16]) + "]"


def _check_form(tensor: Tensor, spec: TensorSpec, *, model: str, said: str) -> None:
    """Raises BadOption: a datatype that is not read, or a shape that is not of the datatype read."""
    forms = {spec.datatype: spec.shape, **dict(spec.also)}
    if tensor.datatype not in forms:
        datatype = tensor.datatype if tensor.datatype in {*DTYPES, "BYTES"} else "<invalid>"
        raise BadOption(
            f"{said}inference input '{tensor.name}' data-type is '{datatype}', but model '{model}' expects "
            f"'{spec.datatype}'"
        )
    wanted = forms[tensor.datatype]
    fits = len(wanted) == len(tensor.shape) and all(
        size >= 0 and want in (-1, size) for want, size in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        raise BadOption(
            f"{said}unexpected shape for input '{tensor.name}' for model '{model}'. Expected {_shown(wanted)}, got "
            f"{_shown(tensor.shape)}"
        )


def _shown(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape[:8])) + ("" if len(shape) <= 8 else ",...") + "]"


def _check_size(tensor: Tensor, *, model: str, said: str) -> None:
    """Raises BadOption: more or fewer bytes, or strings, than the shape has elements."""
    count = math.prod(tensor.shape)
    if tensor.datatype != "BYTES":
        size = count * np.dtype(DTYPES[tensor.datatype]).itemsize
        if len(tensor.data) != size:
            raise BadOption(
                f"{said}input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {size}, got "
                f"{len(tensor.data)}"
            )
        return
    found = 0
    for _ in split_strings(tensor, model=model, said=said):
        found += 1
        if found > count:
            raise BadOption(
                f"{said}unexpected number of string elements {found} for inference input '{tensor.name}' for model "
                f"'{model}', expecting {count}"
            )
    if found < count:
        raise BadOption(
            f"{said}expected {count} string elements for inference input '{tensor.name}' for model '{model}', got "
            f"{found}"
        )


def split_strings(tensor: Tensor, *, model: str = "", said: str = "") -> Iterator[bytes]:
    """The strings of a BYTES tensor. Raises BadOption where a length does not fit what follows."""
    rest = memoryview(tensor.data)
    while rest:
        if len(rest) < 4:
            raise BadOption(
                f"{said}incomplete string length indicator for inference input '{tensor.name}' for model '{model}', "
                f"expecting 4 bytes but only {len(rest)} bytes available. Please make sure the string length "
                "indicator is in one buffer."
            )
        length, rest = int.from_bytes(rest[:4], "little"), rest[4:]
        if length > len(rest):
            raise BadOption(
                f"incomplete string data for inference input '{tensor.name}', expecting string of length {length} "
                f"but only {len(rest)} bytes available"
            )
        yield bytes(rest[:length])
        rest = rest[length:]


def join_strings(strings: Iterable[bytes]) -> bytes:
    """Strings in raw form: each behind its length."""
    return b"".join(part for string in strings for part in (len(string).to_bytes(4, "little"), string))


def read_image(tensor: Tensor) -> bytes | NDArray[np.uint8]:
    """The picture in a checked tensor: pixels, or an encoded file."""
    if tensor.datatype == "BYTES":
        return next(split_strings(tensor))
    return np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)


def read_boxes(tensor: Tensor) -> tuple[Box, ...]:
    """The prompt in a checked tensor. Raises BadOption."""
    if tensor.shape[0] > MAX_BOXES:
        raise BadOption(f"boxes has {tensor.shape[0]} entries; up to {MAX_BOXES} are possible")
    rows = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).tolist()
    for row in rows:
        if not float(row[4]).is_integer():
            raise BadOption(f"boxes has the class {row[4]}; a class id is wanted")
    return tuple(read_box("boxes", [*row[:4], int(row[4])]) for row in rows)


def read_tags(tensor: Tensor) -> tuple[str | int, ...]:
    """The prompt in a checked tensor: class names, or ids."""
    if tensor.datatype == "BYTES":
        return tuple(name.decode("utf-8", "replace") for name in split_strings(tensor))
    return tuple(np.frombuffer(tensor.data, DTYPES[tensor.datatype]).tolist())


def classify(output: Output, count: int) -> Output:
    """The classification extension: the `count` largest values of an output as "value:index" strings, largest first.

    Values that are not a number, of pixels without a measurement, come last.
    """
    assert not isinstance(output.values, tuple)
    flat = output.values.ravel()
    top = np.argsort(np.nan_to_num(flat, nan=-np.inf), kind="stable")[::-1][:count]
    return replace(output, datatype="BYTES", values=tuple(f"{flat[i]:f}:{i}".encode() for i in top))
