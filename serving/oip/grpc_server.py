"""The gRPC server: its port, keys and health, and what it says until `penumbra.serving.oip.grpc` has its calls ready.

It listens before any model is loaded, so nothing here imports the engine.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penumbra.models.errors import UNEXPECTED, BadOption, NotReady, PenumbraError
from penumbra.serving.following import Followed
from penumbra.serving.keys import SERVICE, Keys
from penumbra.serving.telemetry import CURRENT, ID, Request, Telemetry, begin, logged
from penumbra.serving.tls import Certificate

log = logging.getLogger("penumbra")

WHILE_LOADING = {f"/{SERVICE}/ServerLive": b"\x08\x01", f"/{SERVICE}/ServerReady": b""}
"""What is answered while models are loaded: messages in wire form that say live, and not ready."""
SENT_S = 1.0
"""After the server begins to stop: in which time a request that was sent before must have come."""
HEALTHY = ("", SERVICE)
"""Services whose health can be asked; the first is the server as a whole."""
Context = Any
Handler = Callable[[Any, Context], Awaitable[Any]]


def begun_call(context: Context) -> Request:
    """Return the request that the interceptor has begun for this call; its id goes back at the call's end."""
    request = CURRENT.get()
    assert request
    context.set_trailing_metadata(((ID, request.id),))
    return request


def named_errors(handler: Handler) -> Handler:
    """Log a call, and end it with the gRPC status of its PenumbraError; any other failure is logged and says nothing
    from inside."""

    async def handle(data: Any, context: Context) -> Any:
        with logged(begun_call(context)) as request:
            try:
                answer = await handler(data, context)
                request.status = 200
                return answer
            except PenumbraError as error:
                request.fail(error)
                told = tuple((name.lower(), value) for name, value in error.headers.items())
                await context.abort(grpc.StatusCode[error.grpc_status], str(error), ((ID, request.id), *told))
            except Exception as error:
                request.fail(error)
                log.exception("call %s failed unexpectedly", request.id)
                await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)

    return handle


def refusing(error: PenumbraError, telemetry: Telemetry) -> grpc.RpcMethodHandler:
    """Return a handler that counts and ends calls of any kind."""

    async def refuse(_: Any, __: Context) -> None:
        with telemetry.track("grpc"):
            raise error

    return grpc.stream_stream_rpc_method_handler(named_errors(refuse))


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers `grpc.health.v1` in the event loop; `ServerReady` follows the gateway by itself.

    Of the package's own servicers one takes a thread for every Watch, and the other forgets all watches of a service
    when one of them ends. stopping: is done before the last change, which ends every Watch. is_alive: whether the
    server's threads are; a Watch hears of it at the next change.
    """

    def __init__(self, stopping: asyncio.Future[None]) -> None:
        self._is_serving, self._changed, self._stopping = False, asyncio.Event(), stopping
        self.is_alive: Callable[[], bool] = lambda: True

    def set_serving(self, serving: bool) -> None:
        self._changed.set()
        self._is_serving, self._changed = serving, asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in HEALTHY:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r}")
        return self._status(request.service)

    async def Watch(self, request: Any, _: Context) -> AsyncIterator[Any]:
        while not self._stopping.done():
            changed = self._changed
            yield self._status(request.service)
            await changed.wait()

    def _status(self, service: str) -> Any:
        is_serving = self._is_serving and self.is_alive()
        status = "SERVICE_UNKNOWN" if service not in HEALTHY else "SERVING" if is_serving else "NOT_SERVING"
        return health_pb2.HealthCheckResponse(status=status)


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Begins every call, and ends those that the caller's key is not for before their message is read.

    handlers: come later; until then the server lives, and every other call of the service is UNAVAILABLE. stopping: a
    stream of requests ends with it as if its caller had sent them all.
    """

    def __init__(self, keys: Keys, telemetry: Telemetry, stopping: asyncio.Future[None]) -> None:
        self.handlers: grpc.GenericRpcHandler | None = None
        self._keys, self._telemetry, self._stopping = keys, telemetry, stopping

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        metadata = dict(call.invocation_metadata)
        request = begin("GRPC", call.method, metadata)
        CURRENT.set(request)  # this task is the call's own
        try:
            request.key = self._keys.check(call.method, metadata.get("authorization", ""))
            if not call.method.startswith(f"/{SERVICE}/"):
                return self._ending(await continuation(call))
            if self.handlers:
                return self._ending(self.handlers.service(call))
            if call.method not in WHILE_LOADING:
                raise NotReady()
        except PenumbraError as error:
            return refusing(error, self._telemetry)

        async def answer(_: Any, context: Context) -> None:
            await context.write(WHILE_LOADING[call.method])

        return grpc.stream_stream_rpc_method_handler(named_errors(answer))  # answers calls of any kind

    def _ending(self, handler: grpc.RpcMethodHandler | None) -> grpc.RpcMethodHandler | None:
        if handler is None or not handler.stream_stream:
            return handler

        async def answer(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async for message in handler.stream_stream(_until(self._stopping, requests), context):
                yield message

        return grpc.stream_stream_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


async def _until(stopping: asyncio.Future[None], requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield requests as they come, until there are no more, or none that was sent before the server began to stop."""
    while True:
        coming = asyncio.ensure_future(anext(aiter(requests), None))
        try:
            await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((coming,), timeout=SENT_S)
        finally:
            coming.cancel()
        if not coming.done() or (request := coming.result()) is None:
            return
        yield request


def credentials_of(certificate: Followed[Certificate]) -> grpc.ServerCredentials:
    """Return credentials whose new connections get the newest certificate; those that are open keep theirs."""

    def newest() -> grpc.ServerCertificateConfiguration:
        found = certificate.now()
        return grpc.ssl_server_certificate_configuration([(found.key, found.chain)])

    return grpc.dynamic_ssl_server_credentials(newest(), newest)


class GrpcServer:
    """Listens; its calls come with `open`."""

    def __init__(
        self, *, address: str, message_bytes: int, keys: Keys, telemetry: Telemetry,
        certificate: Followed[Certificate] | None = None,
    ) -> None:  # fmt: skip
        """certificate: for TLS; without one the port is in the clear."""
        self._certificate = certificate
        self._stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.health = Health(self._stopping)
        self._address, self._door = address, Door(keys, telemetry, self._stopping)
        sizes = [("grpc.max_receive_message_length", message_bytes), ("grpc.max_send_message_length", -1)]
        alone = [("grpc.so_reuseport", 0)]  # two servers on one port would share its traffic in silence
        self._server = grpc.aio.server(interceptors=[self._door], options=sizes + alone)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Listen. Raises BadOption where the address cannot be had."""
        try:
            if self._certificate:
                self._server.add_secure_port(self._address, credentials_of(self._certificate))
            else:
                self._server.add_insecure_port(self._address)
        except RuntimeError:
            raise BadOption(
                f"gRPC cannot listen on {self._address}; end the process that has this port, or give another"
            ) from None
        await self._server.start()

    def open(self, handlers: grpc.GenericRpcHandler) -> None:
        """Answer calls from now on."""
        self._door.handlers = handlers
        self.health.set_serving(True)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, end those that wait for something to come, and give the others their time."""
        self._stopping.set_result(None)
        self.health.set_serving(False)
        await self._server.stop(grace_s)
