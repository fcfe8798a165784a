"""Tensors of the Open Inference Protocol v2: what a model reads and writes, and whether a request's tensors are that.

The raw form of a tensor is little-endian and row-major, with each string behind a 4-byte length. Values that come one
by one, in JSON or in a message's typed contents, are packed into it, so that every tensor is checked and read once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import MAX_BOXES, PROBABILITIES, Box, read_box

DTYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2",
}  # fmt: skip
"""Datatypes, each as numpy reads its raw form; BYTES has no fixed width and is read by `split_strings`."""
VALUES: dict[str, set[type]] = {"O": {str, bytes}, "b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}
"""Kinds of datatypes, as numpy calls them, each with the types of its values where they come one by one."""
NAMES = {"uint8": "UINT8", "uint16": "UINT16", "int16": "INT16", "float32": "FP32"}
"""Datatypes of pictures, by the card's type."""
SHOWN = 60
"""Characters of a caller's text that an error repeats; gRPC carries errors in a header of a few kilobytes."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Holds one input of a request in raw form."""

    name: str
    datatype: str
    shape: Shape
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Says what a tensor of a model is; -1 is any size. also: further datatypes that are read, each with its shape."""

    name: str
    datatype: str
    shape: Shape
    optional: bool = False
    also: tuple[tuple[str, Shape], ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @property
    def config(self) -> dict[str, Any]:
        """The same facts in Triton's words."""
        data_type = f"TYPE_{self.datatype.replace('BYTES', 'STRING')}"
        document = {"name": self.name, "data_type": data_type, "dims": list(self.shape)}
        return document | ({"optional": True} if self.optional else {})


@dataclass(frozen=True, slots=True)
class Output:
    """Holds one output of an answer: an array, or strings. binary: whether it follows the JSON of HTTP in raw form."""

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


def inputs_of(card: Card, bands: Sequence[str] = ()) -> tuple[TensorSpec, ...]:
    """List what a model reads. bands: those that a caller chooses for it, from a picture of any number."""
    image = replace(IMAGE, datatype=NAMES[card.input.dtype], shape=(-1, -1, -1 if bands else card.input.num_bands))
    return (image, *PROMPTS[card.prompt.kind])


def outputs_of(card: Card) -> tuple[TensorSpec, ...]:
    """List what a model answers by default; the parameters `samples` and `views` and a prompt may change its maps."""
    maps = card.maps(card.num_members(card.sampling.default_samples))
    return (
        TensorSpec("labels", "UINT8", (-1, -1)),
        *(TensorSpec(name, "FP32", (-1, -1)) for name in maps),
        TensorSpec(PROBABILITIES, "FP32", (card.num_classes, -1, -1)),
    )


def check_inputs(tensors: Sequence[Tensor], specs: Sequence[TensorSpec], *, model: str) -> dict[str, Tensor]:
    """Return a request's tensors by name, when they are what the model reads. Raises BadOption."""
    given: dict[str, Tensor] = {}
    known = {spec.name: spec for spec in specs}
    for tensor in tensors:
        if tensor.name not in known:
            raise BadOption(f"{model} has no input {tensor.name[:SHOWN]!r}; it reads {', '.join(known)}")
        if tensor.name in given:
            raise BadOption(f"the input {tensor.name} is given twice; once is enough")
        _check_tensor(tensor, known[tensor.name])
        given[tensor.name] = tensor
    for spec in specs:
        if spec.name not in given and not spec.optional:
            raise BadOption(f"the input {spec.name} is missing; {model} needs it")
    return given


def _check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    """Refuse with BadOption a datatype that is not read, a shape that is not of it, or data of another size."""
    forms = {spec.datatype: spec.shape, **dict(spec.also)}
    if tensor.datatype not in forms:
        raise BadOption(
            f"the input {tensor.name} has the datatype {tensor.datatype[:SHOWN]!r}; {' or '.join(forms)} is read"
        )
    expected = forms[tensor.datatype]
    fits = len(expected) == len(tensor.shape) and all(
        size >= 0 and want in (-1, size) for want, size in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        given = f"{[*tensor.shape[:8]]}{' ...' * (len(tensor.shape) > 8)}"
        raise BadOption(f"the input {tensor.name} has the shape {given}; {[*expected]} is read, where -1 is any size")
    count, unit = math.prod(tensor.shape), "bytes"
    if tensor.datatype == "BYTES":
        found = sum(1 for _ in islice(split_strings(tensor), min(count, len(tensor.data)) + 1))
        unit = "strings" if found <= count else "strings or more"
    else:
        found, count = len(tensor.data), count * np.dtype(DTYPES[tensor.datatype]).itemsize
    if found != count:
        raise BadOption(f"the input {tensor.name} has {found} {unit}; its shape holds {count}")


def split_strings(tensor: Tensor) -> Iterator[bytes]:
    """Yield the strings of a BYTES tensor. Raises BadOption where a length does not fit what follows."""
    rest = memoryview(tensor.data)
    while rest:
        head, rest = rest[:4], rest[4:]
        length = int.from_bytes(head, "little")
        if len(head) < 4 or length > len(rest):
            raise BadOption(
                f"the input {tensor.name} ends within a string of {length} bytes; send each behind its length in 4 "
                "bytes, little-endian"
            )
        yield bytes(rest[:length])
        rest = rest[length:]


def join_strings(strings: Iterable[bytes]) -> bytes:
    """Return the raw form of strings: each behind its length."""
    return b"".join(part for string in strings for part in (len(string).to_bytes(4, "little"), string))


def pack(values: Sequence[Any], name: str, datatype: str) -> bytes:
    """Return the raw form of an input whose values came one by one, nested or flat. Raises BadOption."""
    while values and all(type(value) is list for value in values):
        values = list(chain.from_iterable(values))
    if datatype not in {"BYTES", *DTYPES}:
        return b""  # the datatype is refused where it meets the model
    dtype = np.dtype(DTYPES.get(datatype, "O"))
    if wrong := {*map(type, values)} - VALUES[dtype.kind]:
        raise BadOption(f"the input {name[:SHOWN]!r} has a value of type {wrong.pop().__name__}; {datatype} is wanted")
    if datatype == "BYTES":
        return join_strings(value if isinstance(value, bytes) else value.encode() for value in values)
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype).tobytes()
    except OverflowError as error:
        raise BadOption(f"the input {name[:SHOWN]!r} has a value that is no {datatype}: {error}") from None


def read_image(tensor: Tensor) -> bytes | NDArray[Any]:
    """Return the picture in a checked tensor: pixels, or an encoded file."""
    if tensor.datatype == "BYTES":
        return next(split_strings(tensor))
    return np.frombuffer(tensor.data, DTYPES[tensor.datatype]).reshape(tensor.shape)


def read_boxes(tensor: Tensor) -> tuple[Box, ...]:
    """Read the boxes in a checked tensor. Raises BadOption."""
    if tensor.shape[0] > MAX_BOXES:
        raise BadOption(f"boxes has {tensor.shape[0]} entries; up to {MAX_BOXES} are possible")
    rows = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).tolist()
    for row in rows:
        if not float(row[4]).is_integer():
            raise BadOption(f"boxes has the class {row[4]}; a class id is wanted")
    return tuple(read_box("boxes", [*row[:4], int(row[4])]) for row in rows)


def read_tags(tensor: Tensor) -> tuple[str | int, ...]:
    """Read the tags in a checked tensor: class names, or ids."""
    if tensor.datatype == "BYTES":
        return tuple(name.decode("utf-8", "replace") for name in split_strings(tensor))
    return tuple(np.frombuffer(tensor.data, DTYPES[tensor.datatype]).tolist())


PROMPT_READERS: dict[str, Callable[[Tensor], Any]] = {"boxes": read_boxes, "tags": read_tags}


def classify(output: Output, count: int) -> Output:
    """Answer an output as its `count` largest values, largest first, as strings "value:index".

    Values that are not a number, of pixels without a measurement, come last.
    """
    assert not isinstance(output.values, tuple)
    flat = output.values.ravel()
    top = np.argsort(np.nan_to_num(flat, nan=-np.inf), kind="stable")[::-1][:count]
    return replace(output, datatype="BYTES", values=tuple(f"{flat[i]:f}:{i}".encode() for i in top))
