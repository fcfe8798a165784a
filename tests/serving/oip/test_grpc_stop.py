"""gRPC's health and its stop: whoever only waits for news takes no thread, and is not waited for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penumbra.serving.keys import SERVICE, Keys
from penumbra.serving.oip.grpc_server import GrpcServer
from penumbra.serving.telemetry import Telemetry
from tests.serving.server import free_port

WAIT_S, GRACE_S = 30, 600
"""Bound of a whole test, and a grace far above it: whoever waited for the grace would hang."""
NOT_SERVING, SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse(status=status) for status in ("NOT_SERVING", "SERVING", "SERVICE_UNKNOWN")
)
NUM_THREADS = 2


def run(scenario: Callable[[GrpcServer, grpc.aio.Channel], Awaitable[None]]) -> None:
    """Run a scenario with a started server and a channel to it, in a loop of few threads."""

    async def whole() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_THREADS))
        address = f"127.0.0.1:{free_port()}"
        server = GrpcServer(address=address, message_bytes=2**20, keys=Keys(), telemetry=Telemetry())
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            await scenario(server, channel)

    asyncio.run(asyncio.wait_for(whole(), WAIT_S))


def watch(channel: grpc.aio.Channel, service: str = "") -> grpc.aio.UnaryStreamCall:
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))


def test_more_watches_than_threads_leave_threads_to_others_and_each_is_told() -> None:
    async def scenario(server: GrpcServer, channel: grpc.aio.Channel) -> None:
        watches = [watch(channel, service) for service in ("", SERVICE) * NUM_THREADS]
        assert [await each.read() for each in watches] == [NOT_SERVING] * len(watches)
        assert await watch(channel, "another").read() == UNKNOWN
        assert await asyncio.to_thread(lambda: "free") == "free"
        check = health_pb2_grpc.HealthStub(channel).Check
        assert await check(health_pb2.HealthCheckRequest(service=SERVICE)) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="there is no service 'another'"):
            await check(health_pb2.HealthCheckRequest(service="another"))
        leaving = watches.pop()
        leaving.cancel()  # and takes no other with it
        assert await leaving.code() is grpc.StatusCode.CANCELLED
        server.health.set_serving(True)
        assert [await each.read() for each in watches] == [SERVING] * len(watches)
        await server.stop(GRACE_S)

    run(scenario)


def test_a_stop_ends_watches_and_idle_streams_at_once_and_gives_a_call_in_flight_its_grace() -> None:
    async def scenario(server: GrpcServer, channel: grpc.aio.Channel) -> None:
        began, finish = asyncio.Event(), asyncio.Event()

        async def infer(data: bytes, _: object) -> bytes:
            began.set()
            await finish.wait()
            return data

        async def stream(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
            async for data in requests:
                yield data

        handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
        }
        server.open(grpc.method_handlers_generic_handler(SERVICE, handlers))
        watched, streamed = watch(channel), channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await streamed.write(b"one")
        await reflected.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert await watched.read() == SERVING and await streamed.read() == b"one" and await reflected.read()
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"two")
        await began.wait()
        stop = asyncio.ensure_future(server.stop(GRACE_S))
        assert [await each.read() for each in (watched, streamed, reflected)] == [grpc.aio.EOF] * 3
        assert not stop.done()
        finish.set()
        assert await call == b"two"
        await stop

    run(scenario)


def test_what_a_stream_was_sent_before_the_stop_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penumbra.serving.oip.grpc_server.SENT_S", 20.0)

    async def scenario(server: GrpcServer, channel: grpc.aio.Channel) -> None:
        began, finish = asyncio.Event(), asyncio.Event()

        async def stream(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
            async for data in requests:
                began.set()
                await finish.wait()
                yield data

        handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream)}
        server.open(grpc.method_handlers_generic_handler(SERVICE, handlers))
        streamed = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
        for data in (b"one", b"two", b"three"):
            await streamed.write(data)
        await streamed.done_writing()
        await began.wait()
        stop = asyncio.ensure_future(server.stop(GRACE_S))
        await asyncio.sleep(0.1)
        finish.set()
        assert [await streamed.read() for _ in range(4)] == [b"one", b"two", b"three", grpc.aio.EOF]
        await stop

    run(scenario)
