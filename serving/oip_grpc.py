"""gRPC: `inference.GRPCInferenceService` and `grpc.health.v1`, in the worker's event loop.

Messages come from tritonclient's own stubs, so what its clients send is what is read here.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from models.errors import BadImage, PenumbraError
from serving import VERSION
from serving.gateway import Gateway
from serving.oip import (
    DEFAULT_OUTPUTS,
    inputs_of,
    outputs_of,
    read_boxes,
    read_image,
    read_options,
    read_output,
    read_tags,
)  # fmt: skip
from serving.statuses import status_of

log = logging.getLogger("penumbra")

SERVICE = "inference.GRPCInferenceService"
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
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this request; its log says why")

    return handle


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The calls that are served; every other one is answered UNIMPLEMENTED."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def ServerLive(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=self._gateway.is_alive)

    async def ServerReady(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self._gateway.is_ready)

    async def ModelReady(self, request: Any, context: Context) -> Any:
        known = {(c.name, str(c.version)) for c in self._gateway.segmenter.cards()} | {
            (c.name, "") for c in self._gateway.segmenter.cards()
        }
        return pb.ModelReadyResponse(ready=self._gateway.is_ready and (request.name, request.version) in known)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        return pb.ServerMetadataResponse(name="penumbra", version=VERSION)

    @named_errors
    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        options = read_options(request.name, request.version, {}, ())
        card = self._gateway.segmenter.find(options.model, options.version).card
        answer = pb.ModelMetadataResponse(name=card.name, versions=[str(card.version)], platform="penumbra")
        for specs, field in ((inputs_of(card), answer.inputs), (outputs_of(card), answer.outputs)):
            for spec in specs:
                field.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return answer

    @named_errors
    async def ModelInfer(self, request: Any, context: Context) -> Any:
        names = tuple(output.name for output in request.outputs) or DEFAULT_OUTPUTS
        with self._gateway.telemetry.track("grpc", carrier=dict(context.invocation_metadata())) as tracked:
            parameters = {name: _value(parameter) for name, parameter in request.parameters.items()}
            options = read_options(request.model_name, request.model_version, parameters, names)
            tensors = _tensors(request)
            prompts: dict[str, Any] = {
                name: PROMPT_READERS[name](*tensors[name]) for name in tensors if name != "image"
            }
            picture = read_image(*tensors["image"])
            _, answer = await self._gateway.answer(
                picture, replace(options, **prompts), lambda p: _answer(p, names), request=tracked
            )
        answer.id = request.id
        return answer


def _unimplemented(name: str) -> Handler:
    async def handle(self: InferenceServicer, request: Any, context: Context) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not offered by Penumbra {VERSION}")

    return handle


for _name in vars(service_pb2_grpc.GRPCInferenceServiceServicer):
    if not _name.startswith("_") and _name not in vars(InferenceServicer):
        setattr(InferenceServicer, _name, _unimplemented(_name))


def _value(parameter: Any) -> object:
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")


PROMPT_READERS: dict[str, Callable[..., Any]] = {"boxes": read_boxes, "tags": read_tags}


def _tensors(request: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """The inputs as name -> (datatype, shape, raw bytes). Raises BadImage where they are not what is read here."""
    names = [tensor.name for tensor in request.inputs]
    if names.count("image") != 1 or len(set(names)) < len(names) or not set(names) <= {"image", *PROMPT_READERS}:
        raise BadImage(f"the inputs are {names}; one input image is wanted, and beside it at most boxes or tags")
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(names):
        raise BadImage(f"there are {len(names)} inputs and {len(raw)} raw contents; one for each is wanted")
    contents = raw or [_typed_content(tensor) for tensor in request.inputs]
    return {
        tensor.name: (tensor.datatype, list(tensor.shape), content)
        for tensor, content in zip(request.inputs, contents, strict=True)
    }


def _typed_content(tensor: Any) -> bytes:
    """A tensor's typed contents as its raw form: strings behind their length, numbers in their width."""
    contents = tensor.contents
    if tensor.datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in contents.bytes_contents)
    if tensor.datatype in NUMBERS:
        field, dtype = NUMBERS[tensor.datatype]
        return np.asarray(getattr(contents, field), dtype).tobytes()
    if max(contents.uint_contents, default=0) > 255:
        raise BadImage(f"{tensor.name} has the value {max(contents.uint_contents)}; 0 to 255 are wanted")
    return bytes(contents.uint_contents)


NUMBERS = {"FP32": ("fp32_contents", "<f4"), "INT32": ("int_contents", "<i4"), "INT64": ("int64_contents", "<i8")}


def _answer(prediction: Any, names: tuple[str, ...]) -> Any:
    """The response message, made in a request thread."""
    answer = pb.ModelInferResponse(model_name=prediction.card.name, model_version=str(prediction.card.version))
    answer.parameters["seed"].int64_param = prediction.seed
    answer.parameters["samples"].int64_param = prediction.num_samples
    if prediction.members:
        answer.parameters["members"].string_param = ",".join(prediction.members)
    if prediction.warnings:
        answer.parameters["warnings"].string_param = "; ".join(prediction.warnings)
    if prediction.abstained is not None:
        answer.parameters["abstained"].double_param = prediction.abstained
    specs = {spec.name: spec for spec in outputs_of(prediction.card)}
    for name in names:
        values = read_output(prediction, name)
        answer.outputs.add(name=name, datatype=specs[name].datatype, shape=values.shape)
        answer.raw_output_contents.append(values.tobytes())
    return answer


class GrpcServer:
    """The listening server. `start` raises RuntimeError when the port is taken."""

    def __init__(self, gateway: Gateway, *, address: str, message_bytes: int) -> None:
        self._health = HealthServicer(experimental_non_blocking=True)
        self._address = address
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # two servers on one port would share its traffic in silence
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(gateway), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

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
