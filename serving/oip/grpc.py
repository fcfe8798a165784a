"""The Open Inference Protocol v2 over gRPC: the calls that `penumbra.serving.oip.grpc_server` opens its door to.

Messages come from tritonclient's own stubs, so what its clients send is what is read here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2 as pb

from penumbra.models.errors import BadOption, PenumbraError, Unsupported
from penumbra.serving import VERSION
from penumbra.serving.http.admission import Bodies
from penumbra.serving.keys import SERVICE
from penumbra.serving.oip.grpc_server import Context, begun_call
from penumbra.serving.oip.protocol import (
    Answer,
    Inference,
    InferRequest,
    WantedOutput,
    strangers,
    strangers_above,
)
from penumbra.serving.oip.tensors import DTYPES, SHOWN, Tensor, join_strings
from penumbra.serving.statuses import UNEXPECTED, status_of
from penumbra.serving.telemetry import Request, logged

log = logging.getLogger("penumbra")

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
Document = Mapping[str, Any]
Handler = Callable[[bytes, Context], Awaitable[bytes]]


class Calls:
    """The calls that are served, each under its name: those on server and models answer with a document."""

    def __init__(self, inference: Inference, bodies: Bodies) -> None:
        self._inference, self._bodies = inference, bodies

    async def ServerLive(self, request: Any) -> Document:
        return {"live": self._inference.gateway.is_alive}

    async def ServerReady(self, request: Any) -> Document:
        return {"ready": self._inference.gateway.is_ready}

    async def ModelReady(self, request: Any) -> Document:
        return {"ready": self._inference.is_model_ready(request.name, request.version)}

    async def ServerMetadata(self, request: Any) -> Document:
        return self._inference.server_document()

    async def ModelMetadata(self, request: Any) -> Document:
        return self._inference.metadata(request.name, request.version)

    async def ModelConfig(self, request: Any) -> Document:
        return {"config": self._inference.config(request.name, request.version)}

    async def ModelStatistics(self, request: Any) -> Document:
        return self._inference.statistics(request.name, request.version)

    async def RepositoryIndex(self, request: Any) -> Document:
        return {"models": self._inference.index(ready_only=request.ready)}

    async def RepositoryModelLoad(self, request: Any) -> Document:
        await self._inference.load(request.model_name)
        return {}

    async def RepositoryModelUnload(self, request: Any) -> Document:
        await self._inference.unload(request.model_name)
        return {}

    async def infer(self, data: bytes, context: Context) -> bytes:
        """ModelInfer."""
        return await self._infer(lambda: parse(pb.ModelInferRequest, data), _alone, size=len(data), context=context)

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """ModelStreamInfer: answers in the order of the requests, one at a time; a failure does not end the stream."""
        call = begun_call(context)
        async for data in requests:
            yield await self._in_turn(data, replace(call), context)

    async def _in_turn(self, data: bytes, request: Request, context: Context) -> bytes:
        """One request of a stream, with a line of its own in the log."""
        message = pb.ModelInferRequest()
        with logged(request):
            try:
                with self._bodies.room() as take:
                    take(len(data))
                    message = await asyncio.to_thread(parse, pb.ModelInferRequest, data)
                    return await self._infer(lambda: message, _in_stream, size=len(data), context=context)
            except PenumbraError as error:
                request.fail(error)
                return _failed_in_stream(message.id, str(error))
            except Exception:
                log.exception("request %s of a stream failed unexpectedly", request.id)
                return _failed_in_stream(message.id, UNEXPECTED)

    async def _infer(
        self, read: Callable[[], Any], write: Callable[[Any], bytes], *, size: int, context: Context
    ) -> bytes:  # fmt: skip
        metadata = dict(context.invocation_metadata())

        def read_with_metadata() -> InferRequest:
            asked = read_request(read())
            return replace(asked, unknown=[*asked.unknown, *strangers_above(metadata, "the metadata")])

        return await self._inference.infer(
            read_with_metadata, lambda answer, _: write(message_of(answer)), size_bytes=size,
            protocol="grpc", carrier=metadata, remaining=context.time_remaining,
        )  # fmt: skip


def service_handlers(calls: Calls, bodies: Bodies) -> grpc.GenericRpcHandler:
    """Handlers of every call of the service; those that `calls` lacks are answered UNIMPLEMENTED.

    They take and give bytes: gRPC itself would answer a message that cannot be read with INTERNAL, and would read and
    write large ones in the event loop.
    """
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(calls.stream)}
    for method in DESCRIPTOR.methods:
        if method.name == "ModelInfer":
            handler: Handler = calls.infer
        elif hasattr(calls, method.name):
            handler = _document_handler(method, getattr(calls, method.name))
        else:
            handler = _unimplemented(method.name)
        handlers.setdefault(method.name, grpc.unary_unary_rpc_method_handler(_named_errors(handler, bodies)))
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _document_handler(method: Any, call: Callable[[Any], Awaitable[Document]]) -> Handler:
    asked, answered = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

    async def handle(data: bytes, _: Context) -> bytes:
        message: bytes = ParseDict(await call(parse(asked, data)), answered()).SerializeToString()
        return message

    return handle


def _unimplemented(name: str) -> Handler:
    async def handle(_: bytes, __: Context) -> bytes:
        raise Unsupported(f"{name} is not offered by Penumbra {VERSION}")

    return handle


def _named_errors(handler: Handler, bodies: Bodies) -> Handler:
    """Log a call, count its message among the bodies, and end it with the gRPC status of its PenumbraError; any other
    failure is logged and says nothing inside."""

    async def handle(data: bytes, context: Context) -> bytes:
        with logged(begun_call(context)) as request, bodies.room() as take:
            try:
                take(len(data))
                answer = await handler(data, context)
                request.status = 200
                return answer
            except PenumbraError as error:
                request.fail(error)
                await context.abort(grpc.StatusCode[status_of(error)[1]], str(error))
            except Exception:
                request.status = 500
                log.exception("call %s failed unexpectedly", request.id)
                await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)
        raise AssertionError("abort raises")

    return handle


def parse(kind: Any, data: bytes) -> Any:
    """A message from its wire form. Raises BadOption."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise BadOption(f"the {len(data)} bytes of the message are no {kind.DESCRIPTOR.name}") from None


def read_request(request: Any) -> InferRequest:
    """A request from its message. Raises BadOption."""
    wanted = [WantedOutput(output.name, classes=_classes(output)) for output in request.outputs]
    unknown = [name for one in request.inputs for name in strangers(one.parameters, (), f"input {one.name}")]
    for one in request.outputs:
        unknown += strangers(one.parameters, ("classification",), f"output {one.name}")
    return InferRequest(
        request.model_name, request.model_version, request.id, _parameters(request.parameters), _tensors(request),
        list({one.name: one for one in wanted}.values()), unknown,
    )  # fmt: skip


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise BadOption(
                f"invalid value type for '{name[:SHOWN]}' parameter, expected int64_param, bool_param, or string_param."
            )
        values[name] = getattr(parameter, choice)
    return values


def _classes(output: Any) -> int:
    """How many classes an output wants of the classification extension. Raises BadOption."""
    number = _parameters(output.parameters).get("classification", 0)
    if type(number) is not int or number < 0:
        raise BadOption(
            f"classification of output '{output.name[:SHOWN]}' is {str(number)[:SHOWN]!r}; a number of classes as "
            "int64_param is wanted"
        )
    return number


def _tensors(request: Any) -> list[Tensor]:
    """The inputs in raw form. Raises BadOption where an input has no data, or has it twice."""
    raw = iter(request.raw_input_contents)
    tensors = []
    for tensor in request.inputs:
        where = f"'{tensor.name[:SHOWN]}' for model '{request.model_name[:SHOWN]}'"
        if tensor.HasField("contents") and request.raw_input_contents:
            raise BadOption(f"contents field must not be specified when using raw_input_contents for {where}")
        data = _typed_content(tensor, where=where) if tensor.HasField("contents") else next(raw, None)
        if data is None:
            raise BadOption(f"unable to find data for input tensor {where} in request.")
        tensors.append(Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    if (extra := sum(1 for _ in raw)) > 0:
        raise BadOption(f"unexpected additional input data for model '{request.model_name[:SHOWN]}' ({extra} tensors)")
    return tensors


CONTENTS = {
    "bool_contents": ("BOOL",), "int_contents": ("INT32", "INT8", "INT16"), "int64_contents": ("INT64",),
    "uint_contents": ("UINT32", "UINT8", "UINT16"), "uint64_contents": ("UINT64",), "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",), "bytes_contents": ("BYTES",),
}  # fmt: skip
"""Field of a message's typed contents -> the datatypes it carries; an error names the first."""


def _typed_content(tensor: Any, *, where: str) -> bytes:
    """A tensor's typed contents in raw form. Raises BadOption for the wrong field, or values that do not fit."""
    data = b""
    for field, values in tensor.contents.ListFields():
        carried = CONTENTS[field.name]
        if tensor.datatype not in carried:
            expected = tensor.datatype if tensor.datatype in {*DTYPES, "BYTES"} else "<invalid>"
            raise BadOption(
                f"unexpected explicit tensor data for input tensor {where} of type '{carried[0]}', expected datatype "
                f"'{expected}'"
            )
        data = _raw(values, tensor.datatype, where=where)
    return data


def _raw(values: Sequence[Any], datatype: str, *, where: str) -> bytes:
    if datatype == "BYTES":
        return join_strings(values)
    numbers = np.asarray(values)
    fitting = numbers.astype(DTYPES[datatype])
    if numbers.dtype.kind in "iu" and not np.array_equal(numbers, fitting):
        wrong = numbers[numbers != fitting][0]
        raise BadOption(f"explicit tensor data for input tensor {where} has the value {wrong}, which is no {datatype}")
    return fitting.tobytes()


def message_of(answer: Answer) -> Any:
    """The response message, made in a request thread."""
    message = pb.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    for name, value in answer.parameters.items():
        field = {str: "string_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], field, value)
    for output in answer.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        message.raw_output_contents.append(bytes(output.raw))
    return message


def _alone(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _in_stream(message: Any) -> bytes:
    message.parameters["triton_final_response"].bool_param = True
    return _alone(pb.ModelStreamInferResponse(infer_response=message))


def _failed_in_stream(request_id: str, sentence: str) -> bytes:
    answer = pb.ModelInferResponse(id=request_id)
    return _alone(pb.ModelStreamInferResponse(error_message=sentence, infer_response=answer))
