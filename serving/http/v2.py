"""The Open Inference Protocol v2 over HTTP, under `/v2`: JSON with the binary tensor extension in both directions.

A body is JSON alone; or JSON of `Inference-Header-Content-Length` bytes and behind it the raw tensors that have a
`binary_data_size`, in their order; or, with a length of 0, nothing but an encoded picture.
"""

import math
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router

from penumbra.models.errors import BadOption, TooLarge, UnsupportedMedia
from penumbra.serving.http.admission import health
from penumbra.serving.http.segment import server_timing
from penumbra.serving.http.upload import disconnected
from penumbra.serving.oip.protocol import LARGE_BYTES, OWN_FIELDS, PARAMETERS, Inference, InferResponse, unknown_above
from penumbra.serving.oip.request import InferRequest, member, read_request, unknown_names
from penumbra.serving.oip.tensors import SHOWN, Output, Tensor, join_strings
from penumbra.serving.room import Bodies

HEADER_LENGTH = "inference-header-content-length"
WINDOW_BITS = {"gzip": 31, "deflate": 47}
"""zlib's window bits for an encoding; 47 reads deflate with either of the two headers that are in use."""
PLAIN = ("", "identity")
"""What a body without an encoding is called."""
PIECE_BYTES = 2**16
"""Bytes of a body that are decompressed at a time, and its growth counted."""
MOST_NUMBERS = 2**24
"""Numbers of outputs in JSON at most; to write these takes half a second in which no other thread runs."""
FAST = 1
"""zlib level: float maps hardly shrink, and higher levels take several times as long for nothing."""


def routes(inference: Inference, *, body_bytes: int, json_bytes: int, bodies: Bodies) -> list[BaseRoute]:
    """Return every route under /v2. body_bytes: limit of a body once it is decompressed; json_bytes: of the JSON in it.

    bodies: what decompressed bodies are counted in, beside the compressed ones.
    """
    model, control = ("/models/{model}", "/models/{model}/versions/{version}"), "/repository/models/{model}"
    documents: dict[str, Callable[[str, str], Any]] = {
        "": inference.metadata, "/ready": partial(readiness, inference), "/config": inference.config,
        "/stats": inference.statistics,
    }  # fmt: skip
    answer = partial(infer, inference, bodies, body_bytes, json_bytes)
    list_models = partial(index, inference, json_bytes)
    inner: list[BaseRoute] = [
        Route("/health/live", partial(health, lambda: {"live": inference.gateway.is_alive}, 400)),
        Route("/health/ready", partial(health, lambda: {"ready": inference.gateway.is_ready}, 400)),
        Route("/models/stats", partial(tell, inference.statistics)),
        *(Route(path + verb, partial(tell, find)) for path in model for verb, find in documents.items()),
        *(Route(f"{path}/infer", answer, methods=["POST"]) for path in model),
        *(Route(f"/repository{path}/index", list_models, methods=["POST"]) for path in ("", "/{name}")),
        Route(f"{control}/load", partial(change, inference.load), methods=["POST"]),
        Route(f"{control}/unload", partial(change, inference.unload), methods=["POST"]),
        Route(f"{control}/promote", partial(promote, inference, json_bytes), methods=["POST"]),
    ]
    server = partial(tell, lambda *_: inference.server_document())
    return [Route("/v2", server), Mount("/v2", app=Router(inner, redirect_slashes=False))]


async def tell(find: Callable[[str, str], Any], request: Request) -> Response:
    """Answer with a document about the model and version in the path."""
    return JSONResponse(find(*_model(request)))


def _model(request: Request) -> tuple[str, str]:
    """Return the model and version of a path, empty where it has none. Raises BadOption for an option in the query,
    where it would mean nothing."""
    if "model" not in request.path_params:
        return "", ""
    version = request.path_params.get("version", "")
    if version and not (version.isascii() and version.isdigit()):
        raise HTTPException(404, "Not Found")
    for name in request.query_params:
        if name in PARAMETERS or name in OWN_FIELDS:
            raise BadOption(f"{name} is in the query; send it in the request's JSON")
    return request.path_params["model"], version


def readiness(inference: Inference, model: str, version: str) -> dict[str, Any]:
    """Say that a model is ready. Raises BadOption for one that is not, which is the protocol's status for it."""
    if not inference.is_model_ready(model, version):
        raise BadOption(f"{model[:SHOWN]!r} is not ready; POST /v2/repository/index says which models are")
    return {"name": model, "ready": True}


async def index(inference: Inference, json_bytes: int, request: Request) -> Response:
    body = await request.body()
    document = _parse(body, limit_bytes=json_bytes) if body else {}
    return JSONResponse(inference.index(ready_only=member(document, "ready", bool, False)))


async def change(act: Callable[[str], Awaitable[None]], request: Request) -> Response:
    """Load or unload a model."""
    await act(request.path_params["model"])
    return Response(media_type="application/json")


async def promote(inference: Inference, json_bytes: int, request: Request) -> Response:
    document = _parse(await request.body(), limit_bytes=json_bytes)
    conditions = member(document, "if", list)
    if not conditions or not all(isinstance(text, str) for text in conditions):
        raise BadOption('if is a list of conditions, one or more, as in {"if": ["flips < 0.5 %"]}')
    return JSONResponse({"promoted": await inference.promote(request.path_params["model"], conditions)})


async def infer(inference: Inference, bodies: Bodies, body_bytes: int, json_bytes: int, request: Request) -> Response:
    model, version = _model(request)
    body, headers = await request.body(), request.headers
    accepted = _accepted_encoding(headers.get("accept-encoding", ""))
    encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
    unknown = unknown_names(request.query_params, (), "the query") + unknown_above(headers, "the headers")
    size_bytes = len(body) if encoding in PLAIN else LARGE_BYTES  # which may be a small bomb

    def read() -> InferRequest:
        inference.find(model, version)  # an unknown model is the first thing to say, whatever the body is
        plain = decompress(body, encoding, limit_bytes=body_bytes, take=take)
        return read_body(
            plain, model=model, version=version, header_length=headers.get(HEADER_LENGTH),
            json_bytes=json_bytes, unknown=unknown,
        )  # fmt: skip

    with bodies.room() as take, inference.gateway.telemetry.track("v2") as tracked:
        return await inference.infer(
            read, partial(write_response, encoding=accepted), tracked=tracked, size_bytes=size_bytes,
            gone=lambda: disconnected(request),
        )  # fmt: skip


def decompress(
    body: bytes, encoding: str, *, limit_bytes: int, take: Callable[[int], None] = lambda size: None
) -> bytes:  # fmt: skip
    """Return the body as it was before its encoding; gzip may have several members (RFC 1952).

    take: counts the bytes as they come. Raises UnsupportedMedia, TooLarge, BadOption, and QueueFull from `take`.
    """
    if encoding in PLAIN:
        return body
    if encoding not in WINDOW_BITS:
        raise UnsupportedMedia(f"the Content-Encoding is {encoding[:SHOWN]!r}; gzip and deflate are read")
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


def read_body(
    body: bytes, *, model: str, version: str, header_length: str | None, json_bytes: int, unknown: Sequence[str] = ()
) -> InferRequest:  # fmt: skip
    """Read a request from its decompressed body. Raises BadOption, TooLarge."""
    try:
        length = len(body) if header_length is None else int(header_length)
    except ValueError:
        length = -1
    if not 0 <= length <= len(body):
        shown = str(header_length)[:SHOWN]
        raise BadOption(f"Inference-Header-Content-Length is {shown!r}; 0 to {len(body)}, all of the body, is possible")
    rest = memoryview(body)[length:]
    if length == 0 and header_length is not None:
        picture = Tensor("image", "BYTES", (1,), join_strings([body]))
        return InferRequest(model, version, inputs=[picture], unknown=unknown, binary=True)

    def raw(name: str, parameters: Mapping[str, Any]) -> memoryview | None:
        nonlocal rest
        if "binary_data_size" not in parameters:
            return None
        size = member(parameters, "binary_data_size", int)
        if size > len(rest):
            raise BadOption(f"the input {name[:SHOWN]!r} has {size} bytes by its binary_data_size; {len(rest)} follow")
        data, rest = rest[:size], rest[size:]
        return data

    head = _parse(memoryview(body)[:length], limit_bytes=json_bytes)
    request = read_request(head, raw, model=model, version=version, unknown=unknown)
    if rest:
        raise BadOption(f"{len(rest)} bytes follow the last input; name every input's binary_data_size")
    return request


def _parse(text: bytes | memoryview, *, limit_bytes: int) -> Any:
    if len(text) > limit_bytes:  # parsed, JSON takes up to forty times its size
        raise TooLarge(f"the JSON has {len(text):,} bytes and the limit is {limit_bytes:,}; send binary tensors")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadOption(f"the JSON cannot be read: {error}") from None


def write_response(response: InferResponse, *, encoding: str) -> Response:
    """Write the response: JSON, and behind it the outputs that were requested in raw form."""
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head |= {"model_name": response.model, "model_version": response.version, "parameters": response.parameters}
    num_values = sum(math.prod(output.shape) for output in response.outputs if not output.binary)
    if num_values > MOST_NUMBERS:
        raise TooLarge(f"the outputs have {num_values:,} numbers and the limit of JSON is {MOST_NUMBERS:,}; ask for "
                       "binary_data")  # fmt: skip
    tails = [output.raw if output.binary else None for output in response.outputs]
    head["outputs"] = [_output_document(output, tail) for output, tail in zip(response.outputs, tails, strict=True)]
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Content-Type": "application/json", "Server-Timing": server_timing(response.timing_ms)}
    if any(output.binary for output in response.outputs):
        headers |= {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    content = b"".join([text, *filter(None, tails)])
    if encoding:
        packer = zlib.compressobj(FAST, wbits=31 if encoding == "gzip" else 15)
        content, headers["Content-Encoding"] = packer.compress(content) + packer.flush(), encoding
    return Response(content, headers=headers)


def _output_document(output: Output, tail: memoryview | None) -> dict[str, Any]:
    document: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
    if tail is not None:
        return document | {"parameters": {"binary_data_size": len(tail)}}
    if isinstance(output.values, tuple):
        return document | {"data": [text.decode() for text in output.values]}
    return document | {"data": np.ascontiguousarray(output.values).reshape(-1)}


def _accepted_encoding(accept: str) -> str:
    """Return the first of gzip and deflate that an Accept-Encoding header allows; empty for none."""
    for part in accept.lower().split(","):
        name, _, quality = part.partition(";")
        if name.strip() in WINDOW_BITS and not re.fullmatch(r"\s*q=0(\.0*)?\s*", quality):
            return name.strip()
    return ""
