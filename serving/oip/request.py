"""One request of the Open Inference Protocol: both transports bring theirs as a JSON document and raw tensors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any, TypeVar

from penumbra.models.errors import BadOption
from penumbra.serving.oip.tensors import SHOWN, Tensor, pack

ReadRaw = Callable[[str, Mapping[str, Any]], bytes | memoryview | None]
"""Gives the raw data of an input, by its name and parameters, where it has any; called for each input in turn."""
KINDS: dict[type, str] = {
    list: "an array", dict: "an object", str: "a string", bool: "true or false", int: "a whole number from 0",
}  # fmt: skip
REQUEST_MEMBERS = ("id", "parameters", "inputs", "outputs")
INPUT_MEMBERS = ("name", "datatype", "shape", "parameters", "data", "binary_data_size")
OUTPUT_MEMBERS = ("name", "datatype", "shape", "parameters", "binary_data", "classification")
"""Names that mean something in a request, and in an input or output or its parameters."""
MOST_CLASSES = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """Names an output of a request. classes: how many of the classification extension; 0 for the tensor itself."""

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Holds a request as a transport read it; no outputs stands for the default ones, an empty version for the newest.

    unknown: what it has besides, where no one looks for it: "seed in the headers".
    binary: of the default outputs.
    """

    model: str
    version: str = ""
    id: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[Tensor] = ()
    outputs: Sequence[RequestedOutput] = ()
    unknown: Sequence[str] = ()
    binary: bool = False


def read_request(head: Any, raw: ReadRaw, *, model: str, version: str, unknown: Sequence[str]) -> InferRequest:
    """Read a request from its document. Raises BadOption.

    unknown: names that mean nothing where they stand, outside of the document.
    """
    parameters = _parameters(head)
    names = unknown_names(head, REQUEST_MEMBERS, "the request")
    binary = member(parameters, "binary_data_output", bool, False)
    inputs: list[Tensor] = []
    outputs: dict[str, RequestedOutput] = {}
    for one in member(head, "inputs", list):
        own = _parameters(one)
        inputs.append(_read_input(one, own, raw))
        names += unknown_names(one | own, INPUT_MEMBERS, f"input {inputs[-1].name}")
    for one in member(head, "outputs", list, []):
        name, own = member(one, "name", str), _parameters(one)
        classes = member(own, "classification", int, 0)
        if classes > MOST_CLASSES:  # each is a string, which no limit of memory counts
            raise BadOption(f"classification is {classes}; up to {MOST_CLASSES:,} are possible")
        outputs[name] = RequestedOutput(name, member(own, "binary_data", bool, binary), classes)
        names += unknown_names(one | own, OUTPUT_MEMBERS, f"output {name}")
    return InferRequest(
        model, version, member(head, "id", str, ""),
        {name: value for name, value in parameters.items() if name != "binary_data_output"},
        inputs, list(outputs.values()), [*names, *unknown], binary,
    )  # fmt: skip


def _read_input(one: Any, parameters: Mapping[str, Any], raw: ReadRaw) -> Tensor:
    name, datatype, sizes = member(one, "name", str), member(one, "datatype", str), member(one, "shape", list)
    shape = tuple(member({"shape": size}, "shape", int) for size in sizes)
    data = raw(name, parameters)
    if (data is None) == ("data" not in one):
        has = "no data" if data is None else "its data twice"
        raise BadOption(f"the input {name[:SHOWN]!r} has {has}; send only one of values and raw bytes")
    if data is None:
        data = pack(member(one, "data", list), name, datatype)
    return Tensor(name, datatype, shape, data)


def _parameters(document: Any) -> dict[str, Any]:
    parameters = member(document, "parameters", dict, {})
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise BadOption(f"the parameter {name[:SHOWN]!r} is no string, number, true or false; send one of these")
    if "shared_memory_region" in parameters:
        raise BadOption("shared memory is not offered; send tensors in the request, and take them from the answer")
    return parameters


def member(document: Any, name: str, kind: type[T], default: T | None = None) -> T:
    """Return a member of a JSON object, of a kind; without a default it must be there. Raises BadOption."""
    if not isinstance(document, dict):
        raise BadOption(f"{shortened(document)[:SHOWN]} stands where an object with the member {name} should")
    value = document.get(name, default)
    if type(value) is kind and not (isinstance(value, int) and value < 0):
        return value
    raise BadOption(
        f"{name} is {shortened(value)[:SHOWN]}; {KINDS[kind]} is wanted"
        if name in document
        else f"there is no {name} where {KINDS[kind]} of this name is needed"
    )


def unknown_names(given: Iterable[str], known: Collection[str], place: str) -> list[str]:
    """List the names in a part of a request that mean nothing there, for its warnings."""
    return [f"{name} in {place}" for name in given if name not in known]
