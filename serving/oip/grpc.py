"""The Open Inference Protocol v2 over gRPC: the calls that `penumbra.serving.oip.grpc_server` opens its door to.

Messages come from tritonclient's own stubs, so what its clients send is what is read here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from inspect import isawaitable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2 as pb

from penumbra.models.errors import UNEXPECTED, BadOption, PenumbraError, TooLarge, Unsupported
from penumbra.serving import VERSION
from penumbra.serving.keys import SERVICE, STREAM, Keys
from penumbra.serving.oip.grpc_server import Context, Handler, begun_call, named_errors
from penumbra.serving.oip.protocol import Inference, InferResponse, unknown_above
from penumbra.serving.oip.request import InferRequest, read_request
from penumbra.serving.oip.tensors import SHOWN
from penumbra.serving.room import Bodies
from penumbra.serving.telemetry import Request, logged

log = logging.getLogger("penumbra")

MOST_QUESTION = 2**16
"""Bytes of a message that asks for no inference."""

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""Datatypes, each with the field of a message's typed contents that carries its values."""


class Calls:
    """Answers the calls of the service. documents: what those on server and models answer, by name of the call."""

    def __init__(self, inference: Inference, bodies: Bodies, keys: Keys | None = None) -> None:
        """keys: against which each request of a stream counts; the interceptor asks them for every other call."""
        self._inference, self._bodies, self._keys = inference, bodies, keys or Keys()
        gateway = inference.gateway
        self.documents: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda _: {"live": gateway.is_alive},
            "ServerReady": lambda _: {"ready": gateway.is_ready},
            "ModelReady": lambda request: {"ready": inference.is_model_ready(request.name, request.version)},
            "ServerMetadata": lambda _: inference.server_document(),
            "ModelMetadata": lambda request: inference.metadata(request.name, request.version),
            "ModelConfig": lambda request: {"config": inference.config(request.name, request.version)},
            "ModelStatistics": lambda request: inference.statistics(request.name, request.version),
            "RepositoryIndex": lambda request: {"models": inference.index(ready_only=request.ready)},
            "RepositoryModelLoad": lambda request: inference.load(request.model_name),
            "RepositoryModelUnload": lambda request: inference.unload(request.model_name),
        }

    def document(self, method: Any) -> Handler:
        """Return the handler of a call on server and models; one that is not offered is UNIMPLEMENTED."""
        question, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

        async def handle(data: bytes, _: Context) -> bytes:
            with self._bodies.room() as take:
                take(len(data))
                if method.name not in self.documents:
                    raise Unsupported(f"{method.name} is not offered by Penumbra {VERSION}")
                if len(data) > MOST_QUESTION:  # it is read in the event loop
                    raise TooLarge(
                        f"the message has {len(data):,} bytes and the limit of {method.name} is {MOST_QUESTION:,}"
                    )
                document = self.documents[method.name](parse(question, data))
                if isawaitable(document):
                    document = await document
                message: bytes = ParseDict(document or {}, answer()).SerializeToString()
                return message

        return handle

    async def infer(self, data: bytes, context: Context) -> bytes:
        """Answer ModelInfer; the answer is counted until the call is over, when the caller has taken it."""
        answer, held = await self._infer(data, context, write=write_response), ExitStack()
        held.enter_context(self._bodies.holding(len(answer)))
        context.add_done_callback(lambda _: held.close())
        return answer

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answer ModelStreamInfer in the order of its requests, one at a time; a failure does not end the stream."""
        call, is_paid = begun_call(context), True
        async for data in requests:
            answer = await self._in_turn(data, replace(call), context, is_paid=is_paid)
            with self._bodies.holding(len(answer)):
                yield answer
            is_paid = False

    async def _in_turn(self, data: bytes, request: Request, context: Context, *, is_paid: bool) -> bytes:
        """Answer one request of a stream, with a line of its own in the log. is_paid: it counts as the call itself."""
        with logged(request):
            try:
                return await self._infer(data, context, write=_in_stream, is_paid=is_paid)
            except PenumbraError as error:
                request.fail(error)
                sentence = str(error)
            except Exception as error:
                request.fail(error)
                log.exception("request %s of a stream failed unexpectedly", request.id)
                sentence = UNEXPECTED
            return await asyncio.to_thread(_failed_in_stream, data, sentence)

    async def _infer(
        self, data: bytes, context: Context, *, write: Callable[[InferResponse], bytes], is_paid: bool = True
    ) -> bytes:
        metadata = dict(context.invocation_metadata())
        unknown = unknown_above(metadata, "the metadata")
        with self._bodies.room() as take:
            take(len(data))
            with self._inference.gateway.telemetry.track("grpc", carrier=metadata) as tracked:
                if not is_paid:
                    self._keys.check(STREAM, metadata.get("authorization", ""))
                return await self._inference.infer(
                    lambda: read_message(parse(pb.ModelInferRequest, data), unknown),
                    write, tracked=tracked, size_bytes=len(data), timeout_s=context.time_remaining(),
                )  # fmt: skip


def service_handlers(calls: Calls) -> grpc.GenericRpcHandler:
    """Return handlers of every call of the service.

    They take and give bytes: gRPC itself would answer a message that cannot be read with INTERNAL, and would read and
    write large ones in the event loop.
    """
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(calls.stream)}
    for method in DESCRIPTOR.methods:
        handler = calls.infer if method.name == "ModelInfer" else calls.document(method)
        handlers.setdefault(method.name, grpc.unary_unary_rpc_method_handler(named_errors(handler)))
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def parse(kind: Any, data: bytes) -> Any:
    """Read a message from its wire form. Raises BadOption."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadOption(f"the {len(data)} bytes of the message are no {kind.DESCRIPTOR.name}") from None


def read_message(message: Any, unknown: Sequence[str] = ()) -> InferRequest:
    """Read a request from its message. Raises BadOption."""
    raws = iter(message.raw_input_contents)
    head = {
        "id": message.id, "parameters": _parameters(message),
        "inputs": [
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            | {"parameters": _parameters(tensor)} | _typed_contents(tensor) for tensor in message.inputs
        ],
        "outputs": [{"name": output.name, "parameters": _parameters(output)} for output in message.outputs],
    }  # fmt: skip
    request = read_request(
        head, lambda *_: next(raws, None), model=message.model_name, version=message.model_version, unknown=unknown
    )
    if (extra := sum(1 for _ in raws)) > 0:
        raise BadOption(f"{extra} raw contents follow the last input; send one for each")
    return request


def _parameters(part: Any) -> dict[str, Any]:
    """Return parameters by name; one without a value has None, which is refused where they are read."""
    values: dict[str, Any] = {}
    for name, parameter in part.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = choice and getattr(parameter, choice)
    return values


def _typed_contents(tensor: Any) -> dict[str, list[Any]]:
    """Return a tensor's values where they come one by one. Raises BadOption for a field that is another datatype's."""
    if not tensor.HasField("contents"):
        return {}
    expected = CONTENTS.get(tensor.datatype, "raw_input_contents")
    for field, _ in tensor.contents.ListFields():
        if field.name != expected:
            raise BadOption(
                f"the input {tensor.name[:SHOWN]!r} has {field.name}; a {tensor.datatype[:SHOWN]} comes in {expected}"
            )
    return {"data": list(getattr(tensor.contents, expected, ()))}


def write_response(response: InferResponse) -> bytes:
    """Write the response message, in a request thread. Its raw contents are put behind the rest: protobuf would copy
    them three times, and let no other thread run meanwhile."""
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        field = {str: "string_param", int: "int64_param", float: "double_param", bool: "bool_param"}[type(value)]
        setattr(message.parameters[name], field, value)
    for output in response.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    parts: list[bytes | memoryview] = [message.SerializeToString()]
    for output in response.outputs:
        parts += [_head(pb.ModelInferResponse, "raw_output_contents", len(output.raw)), output.raw]
    return b"".join(parts)


def _in_stream(response: InferResponse) -> bytes:
    data = write_response(replace(response, parameters={**response.parameters, "triton_final_response": True}))
    return b"".join([_head(pb.ModelStreamInferResponse, "infer_response", len(data)), data])


def _head(kind: Any, field: str, length: int) -> bytes:
    """Write what stands before the bytes of a message's field: its number, and how many they are."""
    written = bytearray()
    for number in (kind.DESCRIPTOR.fields_by_name[field].number << 3 | 2, length):  # 2: so many bytes follow
        while number > 127:
            written.append(number & 127 | 128)
            number >>= 7
        written.append(number)
    return bytes(written)


def _failed_in_stream(data: bytes, sentence: str) -> bytes:
    answer = pb.ModelInferResponse()
    with suppress(BadOption):
        answer.id = parse(pb.ModelInferRequest, data).id
    message: bytes = pb.ModelStreamInferResponse(error_message=sentence, infer_response=answer).SerializeToString()
    return message
