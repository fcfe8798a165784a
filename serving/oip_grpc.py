"""The Open Inference Protocol v2 over gRPC, with health and reflection, in the worker's event loop.

Messages come from tritonclient's own stubs, so what its clients send is what is read here.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from models.errors import BadOption, PenumbraError
from serving import VERSION
from serving.keys import Keys
from serving.oip import DEFAULT_OUTPUTS, Answer, Inference, InferRequest, WantedOutput
from serving.oip_tensors import DTYPES, SHOWN, Tensor, join_strings
from serving.statuses import status_of
from serving.telemetry import Telemetry

log = logging.getLogger("penumbra")

SERVICE = "inference.GRPCInferenceService"
UNEXPECTED = "the server failed on this request; its log says why"
Context = Any
Handler = Callable[["InferenceServicer", Any, Context], Awaitable[Any]]


def named_errors(handler: Handler) -> Handler:
    """End a call with the gRPC status of its PenumbraError; any other failure is logged and says nothing inside."""

    async def handle(self: "InferenceServicer", request: Any, context: Context) -> Any:
        try:
            return await handler(self, request, context)
        except PenumbraError as error:
            await context.abort(grpc.StatusCode[status_of(error)[1]], str(error))
        except Exception:
            log.exception("a call failed unexpectedly")
            await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)

    return handle


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The calls that are served; every other one is answered UNIMPLEMENTED."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def ServerLive(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=self._inference.gateway.is_alive)

    async def ServerReady(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self._inference.gateway.is_ready)

    @named_errors
    async def ModelReady(self, request: Any, context: Context) -> Any:
        return pb.ModelReadyResponse(ready=self._inference.is_model_ready(request.name, request.version))

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        return ParseDict(self._inference.server_document(), pb.ServerMetadataResponse())

    @named_errors
    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        return ParseDict(self._inference.metadata(request.name, request.version), pb.ModelMetadataResponse())

    @named_errors
    async def ModelConfig(self, request: Any, context: Context) -> Any:
        document = {"config": self._inference.config(request.name, request.version)}
        return ParseDict(document, pb.ModelConfigResponse())

    @named_errors
    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        return ParseDict(self._inference.statistics(request.name, request.version), pb.ModelStatisticsResponse())

    @named_errors
    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        return ParseDict({"models": self._inference.index(ready_only=request.ready)}, pb.RepositoryIndexResponse())

    @named_errors
    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        await self._inference.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @named_errors
    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        await self._inference.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @named_errors
    async def ModelInfer(self, request: Any, context: Context) -> Any:
        return await self._infer(request, context)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Answers in the order of the requests, one at a time; a request that fails does not end the stream."""
        async for request in requests:
            try:
                answer = await self._infer(request, context)
                answer.parameters["triton_final_response"].bool_param = True
                yield pb.ModelStreamInferResponse(infer_response=answer)
            except PenumbraError as error:
                yield _failed(request, str(error))
            except Exception:
                log.exception("a request of a stream failed unexpectedly")
                yield _failed(request, UNEXPECTED)

    async def _infer(self, request: Any, context: Context) -> Any:
        return await self._inference.infer(
            lambda: read_request(request), write_answer, size_bytes=request.ByteSize(), protocol="grpc",
            carrier=dict(context.invocation_metadata()),
        )  # fmt: skip


def _unimplemented(name: str) -> Handler:
    async def handle(self: InferenceServicer, request: Any, context: Context) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not offered by Penumbra {VERSION}")

    return handle


for _name in vars(service_pb2_grpc.GRPCInferenceServiceServicer):
    if not _name.startswith("_") and _name not in vars(InferenceServicer):
        setattr(InferenceServicer, _name, _unimplemented(_name))


def _failed(request: Any, sentence: str) -> Any:
    return pb.ModelStreamInferResponse(
        error_message=sentence, infer_response=pb.ModelInferResponse(id=request.id)
    )  # fmt: skip


def read_request(request: Any) -> InferRequest:
    """A request from its message. Raises BadOption."""
    wanted = [
        WantedOutput(output.name, classes=_parameters(output.parameters).get("classification", 0))
        for output in request.outputs
    ]
    return InferRequest(
        request.model_name, request.model_version, request.id, _parameters(request.parameters), _tensors(request),
        list({one.name: one for one in wanted}.values()) or [WantedOutput(name) for name in DEFAULT_OUTPUTS],
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


def write_answer(answer: Answer, _: InferRequest) -> Any:
    """The response message, made in a request thread."""
    message = pb.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    for name, value in answer.parameters.items():
        field = {str: "string_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], field, value)
    for output in answer.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        message.raw_output_contents.append(bytes(output.raw))
    return message


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends calls that the caller's key is not for before their message is read."""

    def __init__(self, keys: Keys, telemetry: Telemetry) -> None:
        self._keys, self._telemetry = keys, telemetry

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        sent = dict(call.invocation_metadata).get("authorization", "")
        try:
            self._keys.check_call(call.method, sent)
        except PenumbraError as error:
            refusal = error

            async def refuse(_: Any, context: Context) -> None:
                with suppress(PenumbraError), self._telemetry.track("grpc"):
                    raise refusal
                await context.abort(grpc.StatusCode[status_of(refusal)[1]], str(refusal))

            return grpc.stream_stream_rpc_method_handler(refuse)  # ends calls of any kind
        return await continuation(call)


class GrpcServer:
    """The listening server. `start` raises RuntimeError when the port is taken."""

    def __init__(self, inference: Inference, *, address: str, message_bytes: int, keys: Keys) -> None:
        self._health = health.HealthServicer(experimental_non_blocking=True)
        self._address = address
        self._server = grpc.aio.server(
            interceptors=[KeyInterceptor(keys, inference.gateway.telemetry)],
            options=[
                ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic in silence
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(inference), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        self._server.add_insecure_port(self._address)
        await self._server.start()
        self.set_serving(True)

    def set_serving(self, serving: bool) -> None:
        """What `grpc.health.v1` says; readiness of `ServerReady` follows the gateway by itself."""
        status = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
