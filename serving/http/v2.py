"""The Open Inference Protocol v2 over HTTP, under `/v2`: JSON with the binary tensor extension in both directions.

A body is JSON alone; or JSON of `Inference-Header-Content-Length` bytes and behind it the raw tensors that have a
`binary_data_size`, in their order; or, with a length of 0, nothing but an encoded picture.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router

from penumbra.models.errors import BadOption, TooLarge, Unsupported
from penumbra.serving.http.admission import Bodies
from penumbra.serving.http.routes import disconnected, server_timing
from penumbra.serving.oip.protocol import (
    LARGE_BYTES,
    OWN_FIELDS,
    PARAMETERS,
    Answer,
    Inference,
    InferRequest,
    WantedOutput,
    strangers,
    strangers_above,
)
from penumbra.serving.oip.tensors import DTYPES, SHOWN, Output, Tensor, join_strings

HEADER_LENGTH = "inference-header-content-length"
KINDS: dict[type, str] = {list: "array", dict: "object", str: "string", bool: "boolean", int: "unsigned-integer"}
WINDOW_BITS = {"gzip": 31, "deflate": 47}
"""zlib's name for an encoding; 47 reads deflate with either of the two headers that are in use."""
PLAIN = ("", "identity")
"""What a body without an encoding is called."""
PIECE_BYTES = 2**16
"""Bytes of a body that are decompressed at a time, and its growth counted."""
REQUEST_MEMBERS = ("id", "parameters", "inputs", "outputs")
INPUT_MEMBERS = ("name", "datatype", "shape", "parameters", "data", "binary_data_size")
OUTPUT_MEMBERS = ("name", "datatype", "shape", "parameters", "binary_data", "classification")
"""Names that mean something in a request, and in an input or output or its parameters."""
FAST = 1
"""zlib level: float maps hardly shrink, and higher levels take several times as long for nothing."""
T = TypeVar("T")


def routes(inference: Inference, *, body_bytes: int, json_bytes: int, bodies: Bodies) -> list[BaseRoute]:
    """Everything under /v2. body_bytes: limit of a body once it is decompressed; json_bytes: of the JSON in it.

    bodies: what decompressed bodies are counted in, beside the compressed ones.
    """
    rest = Rest(inference, body_bytes=body_bytes, json_bytes=json_bytes, bodies=bodies)
    model, versioned = "/models/{model}", "/models/{model}/versions/{version}"
    verbs = {"": rest.metadata, "/ready": rest.model_ready, "/config": rest.config, "/stats": rest.statistics}
    inner: list[BaseRoute] = [
        Route("/health/live", rest.live),
        Route("/health/ready", rest.ready),
        Route("/models/stats", rest.statistics),
        *(Route(path + verb, handler) for path in (model, versioned) for verb, handler in verbs.items()),
        *(Route(f"{path}/infer", rest.infer, methods=["POST"]) for path in (model, versioned)),
        *(Route(f"{path}/index", rest.index, methods=["POST"]) for path in ("/repository", "/repository/{name}")),
        Route("/repository/models/{model}/load", rest.load, methods=["POST"]),
        Route("/repository/models/{model}/unload", rest.unload, methods=["POST"]),
    ]
    return [Route("/v2", rest.server), Mount("/v2", app=Router(inner, redirect_slashes=False))]


class Rest:
    """The handlers."""

    def __init__(self, inference: Inference, *, body_bytes: int, json_bytes: int, bodies: Bodies) -> None:
        self._inference, self._body_bytes, self._json_bytes = inference, body_bytes, json_bytes
        self._bodies = bodies

    async def server(self, _: Request) -> Response:
        return JSONResponse(self._inference.server_document())

    async def live(self, _: Request) -> Response:
        live = self._inference.gateway.is_alive
        return JSONResponse({"live": live}, 200 if live else 400)

    async def ready(self, _: Request) -> Response:
        ready = self._inference.gateway.is_ready
        return JSONResponse({"ready": ready}, 200 if ready else 400)

    async def model_ready(self, request: Request) -> Response:
        model, version = _model(request)
        if not self._inference.is_model_ready(model, version):
            return JSONResponse({"error": "Model version not ready"}, 400)
        return JSONResponse({"name": model, "ready": True})

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(self._inference.metadata(*_model(request)))

    async def config(self, request: Request) -> Response:
        return JSONResponse(self._inference.config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        model = _model(request) if "model" in request.path_params else ("", "")
        return JSONResponse(self._inference.statistics(*model))

    async def index(self, request: Request) -> Response:
        body = await request.body()
        wanted = _parse(body, limit_bytes=self._json_bytes) if body else {}
        ready_only = "ready" in wanted and _member(wanted, "ready", bool)
        return JSONResponse(self._inference.index(ready_only=ready_only))

    async def load(self, request: Request) -> Response:
        await self._inference.load(request.path_params["model"])
        return Response(media_type="application/json")

    async def unload(self, request: Request) -> Response:
        await self._inference.unload(request.path_params["model"])
        return Response(media_type="application/json")

    async def infer(self, request: Request) -> Response:
        model, version = _model(request)
        body = await request.body()
        headers, taken = request.headers, _accepted_encoding(request.headers.get("accept-encoding", ""))
        encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
        misplaced = [*strangers(request.query_params, (), "the query"), *strangers_above(headers, "the headers")]

        def write(answer: Answer, asked: InferRequest) -> Response:
            return write_answer(answer, encoding=taken)

        with self._bodies.room() as take:

            def read() -> InferRequest:
                self._inference.find(model, version)  # an unknown model is the first thing to say, whatever the body is
                plain = decompress(body, encoding, limit_bytes=self._body_bytes, take=take)
                length, json_bytes = headers.get(HEADER_LENGTH), self._json_bytes
                asked = read_request(plain, model=model, version=version, header_length=length, json_bytes=json_bytes)
                return replace(asked, unknown=[*asked.unknown, *misplaced])

            size_bytes = len(body) if encoding in PLAIN else LARGE_BYTES  # which may be a small bomb
            return await self._inference.infer(
                read, write, size_bytes=size_bytes, protocol="v2", gone=lambda: disconnected(request)
            )


def _model(request: Request) -> tuple[str, str]:
    """The model and version of a path. Raises BadOption for an option in the query, where it would mean nothing."""
    version = request.path_params.get("version", "")
    if version and not (version.isascii() and version.isdigit()):
        raise HTTPException(404, "Not Found")
    for name in request.query_params:
        if name in PARAMETERS or name in OWN_FIELDS:
            raise BadOption(f"{name} is in the query; send it in the request's JSON")
    return request.path_params["model"], version


def decompress(
    body: bytes, encoding: str, *, limit_bytes: int, take: Callable[[int], None] = lambda size: None
) -> bytes:  # fmt: skip
    """The body as it was before its encoding; gzip may have several members (RFC 1952).

    take: is told of the bytes as they come. Raises Unsupported, TooLarge, BadOption, and QueueFull from `take`.
    """
    if encoding in PLAIN:
        return body
    if encoding not in WINDOW_BITS:
        raise Unsupported(f"Unsupported compression type {encoding[:SHOWN]!r}; gzip and deflate are read")
    stream = zlib.decompressobj(WINDOW_BITS[encoding])
    pieces, size = [], 0
    for start in range(0, len(body), PIECE_BYTES):
        rest = body[start : start + PIECE_BYTES]
        while rest:
            if stream.eof and encoding == "deflate":
                raise BadOption("the deflate body goes on behind its end; send one stream")
            stream = zlib.decompressobj(WINDOW_BITS[encoding]) if stream.eof else stream
            try:
                pieces.append(stream.decompress(rest, limit_bytes - size + 1))
            except zlib.error as error:
                raise BadOption(f"the body is not {encoding}, as its Content-Encoding says ({error})") from None
            size += len(pieces[-1])
            if size > limit_bytes:
                raise TooLarge(
                    f"the body has more than {limit_bytes:,} bytes when decompressed, which is the limit; send less"
                )
            take(len(pieces[-1]))
            rest = stream.unused_data
    if not stream.eof:
        raise BadOption(f"the {encoding} body ends too early; send all of it")
    return b"".join(pieces)


def read_request(
    body: bytes, *, model: str, version: str, header_length: str | None, json_bytes: int
) -> InferRequest:  # fmt: skip
    """A request from its decompressed body. Raises BadOption, TooLarge."""
    length = len(body) if header_length is None else _leading_integer(header_length)
    if not 0 <= length <= len(body):
        raise BadOption(f"inference header size should be in range (0, {len(body)}), got: {length}")
    if length == 0 and header_length is not None:
        picture = Tensor("image", "BYTES", (1,), join_strings([body]))
        return InferRequest(model, version, inputs=[picture], binary=True)
    head, rest = _parse(memoryview(body)[:length], limit_bytes=json_bytes), memoryview(body)[length:]
    parameters = _parameters(head)
    binary = _member(parameters, "binary_data_output", bool) if "binary_data_output" in parameters else False
    inputs: list[Tensor] = []
    unknown = strangers(head, REQUEST_MEMBERS, "the request")
    for one in _member(head, "inputs", list):
        tensor, rest = _read_input(_object(one), rest, model=model)
        inputs.append(tensor)
        unknown += strangers({**one, **_parameters(one)}, INPUT_MEMBERS, f"input {tensor.name}")
    if rest:
        raise BadOption(f"unexpected additional input data for model '{model}'")
    wanted = []
    for one in _optional(head, "outputs", list, []):
        wanted.append(_read_output(_object(one), binary=binary))
        unknown += strangers({**one, **_parameters(one)}, OUTPUT_MEMBERS, f"output {wanted[-1].name}")
    return InferRequest(
        model, version, _optional(head, "id", str, ""),
        {name: value for name, value in parameters.items() if name != "binary_data_output"},
        inputs, list({one.name: one for one in wanted}.values()), unknown, binary,
    )  # fmt: skip


def _leading_integer(text: str) -> int:
    """The number that a text begins with, else 0, which is how Triton reads this header."""
    match = re.match(r"\s*[+-]?[0-9]{1,18}", text)
    return int(match.group()) if match else 0


def _parse(text: bytes | memoryview, *, limit_bytes: int) -> dict[str, Any]:
    if len(text) > limit_bytes:  # parsed, JSON takes up to forty times its size
        raise TooLarge(f"the JSON has {len(text):,} bytes and the limit is {limit_bytes:,}; send binary tensors")
    try:
        return _object(orjson.loads(text))
    except orjson.JSONDecodeError as error:
        raise BadOption(f"failed to parse the request JSON buffer: {error}") from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadOption("failed to parse the request JSON buffer: attempt to access JSON non-object as object")
    return value


def _member(document: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A member that must be there, of a kind; integers are 0 or more. Raises BadOption."""
    if name not in document:
        raise BadOption(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    return _of_kind(document[name], name, kind)


def _optional(document: Mapping[str, Any], name: str, kind: type[T], default: T) -> T:
    return _of_kind(document[name], name, kind) if name in document else default


def _of_kind(value: Any, name: str, kind: type[T]) -> T:
    if type(value) is kind and not (isinstance(value, int) and value < 0):
        return value
    raise BadOption(f"Unable to parse '{name}': attempt to access JSON non-{KINDS[kind]} as {KINDS[kind]}")


def _parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _optional(document, "parameters", dict, {})
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise BadOption(
                f"parameter '{name[:SHOWN]}' has invalid type. It should be either 'int', 'bool', 'string' or 'double'."
            )
    return parameters


def _read_input(one: dict[str, Any], rest: memoryview, *, model: str) -> tuple[Tensor, memoryview]:
    """One input, and what remains of the binary part. Raises BadOption."""
    name, datatype = _member(one, "name", str), _member(one, "datatype", str)
    shape = tuple(_of_kind(size, "shape", int) for size in _member(one, "shape", list))
    parameters = _parameters(one)
    sources = [place for place, there in (
        ("'data'", "data" in one), ("'binary_data_size' in 'parameters'", "binary_data_size" in parameters),
        ("'shared_memory_region' in 'parameters'", "shared_memory_region" in parameters),
    ) if there]  # fmt: skip
    if len(sources) != 1:
        raise BadOption(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {' and '.join(sources) or 'no field'} is set"
        )
    if "shared_memory_region" in parameters:
        raise BadOption(f"shared memory is not offered; send '{name[:SHOWN]}' as 'data' or with 'binary_data_size'")
    if "data" in one:
        return Tensor(name, datatype, shape, _from_json(_member(one, "data", list), datatype, shape)), rest
    size = _member(parameters, "binary_data_size", int)
    if size > len(rest):
        raise BadOption(
            f"unexpected size for input '{name[:SHOWN]}', expecting {size - len(rest)} additional bytes for model "
            f"'{model}'"
        )
    return Tensor(name, datatype, shape, rest[:size]), rest[size:]


JSON_TYPES: dict[str, tuple[set[type], str, str]] = {
    "string": ({str}, "string", "string"), "b": ({bool}, "boolean", "boolean"),
    "u": ({int}, "unsigned-integer", "unsigned-integer"), "i": ({int}, "signed-integer", "signed-integer"),
    "f": ({int, float}, "number", "double"),
}  # fmt: skip
"""Kind of a datatype -> the types of its values in JSON, and the two words that an error has for them."""


def _from_json(data: list[Any], datatype: str, shape: tuple[int, ...]) -> bytes:
    """Values of a JSON tensor, nested or flat, in raw form. Raises BadOption."""
    while data and all(type(item) is list for item in data):
        data = list(chain.from_iterable(data))
    if datatype not in {"BYTES", *DTYPES}:
        return b""  # the datatype is refused where it meets the model
    if len(data) != math.prod(shape):
        raise BadOption("Unable to parse 'data': Shape does not match true shape of 'data' field")
    kind = "string" if datatype == "BYTES" else np.dtype(DTYPES[datatype]).kind
    types, wanted, said = JSON_TYPES[kind]
    wrong = BadOption(f"Unable to parse 'data': attempt to access JSON non-{wanted} as {said}")
    if not types.issuperset(map(type, data)):
        raise wrong
    if datatype == "BYTES":
        return join_strings(text.encode() for text in data)
    try:
        with np.errstate(over="ignore"):
            return np.array(data, DTYPES[datatype]).tobytes()
    except OverflowError:
        raise wrong from None


def _read_output(one: dict[str, Any], *, binary: bool) -> WantedOutput:
    parameters = _parameters(one)
    if "shared_memory_region" in parameters:
        raise BadOption("shared memory is not offered; ask for 'binary_data' or JSON")
    return WantedOutput(
        _member(one, "name", str), _optional(parameters, "binary_data", bool, binary),
        _optional(parameters, "classification", int, 0),
    )  # fmt: skip


def write_answer(answer: Answer, *, encoding: str) -> Response:
    """The response: JSON, and behind it the outputs that are wanted in raw form."""
    head: dict[str, Any] = {"id": answer.id} if answer.id else {}
    head |= {"model_name": answer.model, "model_version": answer.version, "parameters": answer.parameters}
    tails = [output.raw if output.binary else None for output in answer.outputs]
    head["outputs"] = [_describe(output, tail) for output, tail in zip(answer.outputs, tails, strict=True)]
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Content-Type": "application/json", "Server-Timing": server_timing(answer.timing_ms)}
    if any(output.binary for output in answer.outputs):
        headers |= {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    content = b"".join([text, *filter(None, tails)])
    if encoding:
        packer = zlib.compressobj(FAST, wbits=31 if encoding == "gzip" else 15)
        content, headers["Content-Encoding"] = packer.compress(content) + packer.flush(), encoding
    return Response(content, headers=headers)


def _describe(output: Output, tail: memoryview | None) -> dict[str, Any]:
    document: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
    if tail is not None:
        return document | {"parameters": {"binary_data_size": len(tail)}}
    if isinstance(output.values, tuple):
        return document | {"data": [text.decode() for text in output.values]}
    return document | {"data": np.ascontiguousarray(output.values).reshape(-1)}


def _accepted_encoding(accept: str) -> str:
    """The first of gzip and deflate that an Accept-Encoding header names and does not rule out; empty for none."""
    for part in accept.lower().split(","):
        name, _, quality = part.partition(";")
        if name.strip() in WINDOW_BITS and not re.fullmatch(r"\s*q=0(\.0*)?\s*", quality):
            return name.strip()
    return ""
