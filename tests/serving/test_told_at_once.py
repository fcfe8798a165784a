"""Whoever leaves or is late is told at once, whatever the request's thread is at, over every protocol."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from penumbra.models.errors import BadOption, Cancelled, DeadlineExceeded, PenumbraError, TooLarge
from penumbra.serving import gateway as gateways
from penumbra.serving.cache import AnswerCache, key_of
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.request import Cancellation
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.http import routes as rest
from penumbra.serving.http import v2
from penumbra.serving.keys import Keys
from penumbra.serving.oip.grpc import Calls, service_handlers
from penumbra.serving.oip.grpc_server import GrpcServer
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.render import parse_request, render
from penumbra.serving.room import Bodies
from penumbra.serving.telemetry import Request, Telemetry
from tests.conftest import FIXED, picture, toy_card
from tests.serving.server import free_port, until

WAIT_S = 30
"""Bound of every wait: reached only when something hangs."""
SOON_MS = 20.0
OPTIONS = SegmentOptions(model="toy-pointwise")
IMAGE = picture(np.random.Generator(np.random.PCG64(0)), 20, 30)


@dataclass
class Gate:
    """Holds whoever passes, once it is closed."""

    reached: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: object, **options: object) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return function(*args, **options)

        return held


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


@pytest.fixture
def gateway(toy_store: Path, gate: Gate) -> Iterator[Gateway]:
    segmenter = Segmenter(threads=1, device="cpu", tuning=FIXED)
    for name in ("toy-pointwise", "toy-latent"):
        segmenter.load(toy_store / name / "1")
    made = Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=60, cache_bytes=2**20)
    made.state = "ready"
    yield made
    gate.open.set()
    made.close()


def png(image: np.ndarray) -> bytes:
    return bytes(render(_prediction(image), "image/png", parse_request("image/png", {})[1]))


def _prediction(image: np.ndarray) -> Prediction:
    labels_HW = image[..., 0] // 128
    return Prediction(toy_card("pointwise")[0], 0, 1, 1, (), (), labels_HW, {}, {}, image=image)


PICTURE = png(IMAGE)


def hold(place: str, gate: Gate, patch: pytest.MonkeyPatch) -> Callable[[Prediction], object]:
    """Close the gate at a place on a request's way; returns how an answer is written."""
    if place == "decoding":
        patch.setattr(gateways, "read_header", gate.before(gateways.read_header))
    if place == "its batch":
        patch.setattr(Runtime, "run", gate.before(Runtime.run))
    return gate.before(np.shape) if place == "writing" else lambda _: None


async def _reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, WAIT_S)


async def _late(gateway: Gateway, gate: Gate, write: Callable[[Prediction], object]) -> None:
    asked = replace(OPTIONS, deadline_ms=SOON_MS)
    with pytest.raises(DeadlineExceeded, match="the deadline passed after"):
        await gateway.answer(PICTURE, asked, write, request=Request())


async def _gone(gateway: Gateway, gate: Gate, write: Callable[[Prediction], object]) -> None:
    with pytest.raises(Cancelled):
        await gateway.answer(PICTURE, OPTIONS, write, request=Request(), gone=lambda: _reached(gate))


async def _ended(gateway: Gateway, gate: Gate, write: Callable[[Prediction], object]) -> None:
    """As gRPC ends a call whose caller is gone."""
    call = asyncio.ensure_future(gateway.answer(PICTURE, OPTIONS, write, request=Request()))
    await _reached(gate)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("leave", [_late, _gone, _ended])
@pytest.mark.parametrize("place", ["decoding", "its batch", "writing"])
def test_a_request_is_told_and_its_place_is_free_while_its_thread_is_still_held(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch, place: str,
    leave: Callable[[Gateway, Gate, Any], Awaitable[None]],
) -> None:  # fmt: skip
    write = hold(place, gate, monkeypatch)

    async def scenario() -> object:
        await leave(gateway, gate, write)
        assert gateway._inflight == 0 and not gate.open.is_set()
        following = asyncio.ensure_future(gateway.answer(IMAGE, OPTIONS, np.shape, request=Request()))
        await asyncio.sleep(0)
        assert gateway._inflight == 1
        gate.open.set()
        return (await following)[0].labels_HW.shape

    assert asyncio.run(scenario()) == (20, 30)
    assert gateway.segmenter.scheduler.queued == (0, 0)


@pytest.mark.parametrize("leave", [_late, _gone])
def test_a_request_that_leaves_while_its_batch_runs_gives_its_thread_back_at_once(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch, leave: Callable[..., Awaitable[None]]
) -> None:
    asyncio.run(leave(gateway, gate, hold("its batch", gate, monkeypatch)))
    gateway._threads.submit(lambda: None).result(WAIT_S)
    assert gateway.segmenter.scheduler.queued == (0, 0) and not gate.open.is_set()


def test_a_request_that_waits_for_a_thread_is_told_at_once_and_its_picture_is_let_go(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, images = hold("decoding", gate, monkeypatch), [IMAGE.copy()]
    alive = weakref.ref(images[0])

    async def scenario() -> None:
        await _gone(gateway, gate, write)
        with pytest.raises(DeadlineExceeded):
            await gateway.answer(images.pop(), replace(OPTIONS, deadline_ms=SOON_MS), np.shape, request=Request())

    asyncio.run(scenario())
    gc.collect()
    assert alive() is None and not gate.open.is_set()


@pytest.mark.parametrize(("error", "options"), [
    (TooLarge, {"overlap": 0.9, "samples": 64}), (DeadlineExceeded, {"deadline_ms": SOON_MS}),
])  # fmt: skip
def test_the_picture_of_a_request_that_fails_is_let_go_without_a_collection(
    gateway: Gateway, error: type[Exception], options: dict[str, Any]
) -> None:
    images = [np.zeros((1500, 1500, 3), np.uint8)]
    alive = weakref.ref(images[0])

    async def scenario() -> None:
        try:
            await gateway.answer(images.pop(), SegmentOptions("toy-latent", **options), np.shape, request=Request())
        except error:
            return
        raise AssertionError("it did not fail")

    gc.collect()
    gc.disable()
    try:
        asyncio.run(scenario())
        until(lambda: alive() is None, bound_s=WAIT_S)
    finally:
        gc.enable()


def test_an_option_that_is_wrong_is_refused_before_it_is_late(gateway: Gateway) -> None:
    with pytest.raises(BadOption, match="deadline_ms is -5"):
        asyncio.run(gateway.answer(PICTURE, replace(OPTIONS, deadline_ms=-5), np.shape, request=Request()))


# -- equal requests --------------------------------------------------------------------------------


def test_an_equal_request_that_leaves_does_not_wait_for_the_first(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway._limit_requests, gateway._threads._max_workers = 3, 3
    write = hold("its batch", gate, monkeypatch)

    async def scenario() -> None:
        first = asyncio.ensure_future(gateway.answer(PICTURE, OPTIONS, write, request=Request()))
        await _reached(gate)
        await _late(gateway, gate, write)
        await _gone(gateway, gate, write)
        assert gateway._inflight == 1
        busy = [gateway._threads.submit(lambda: None) for _ in range(2)]
        assert await asyncio.to_thread(lambda: [one.result(WAIT_S) for one in busy]) == [None, None]
        gate.open.set()
        await first

    asyncio.run(scenario())


def test_where_the_first_of_equal_requests_is_cancelled_one_takes_its_place_and_the_rest_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, key = AnswerCache(2**20), key_of(IMAGE, toy_card("latent")[0], OPTIONS)
    working, most, lock = 0, 0, threading.Lock()
    release = {name: threading.Event() for name in "abc"}
    entered, waits, wait = threading.Semaphore(0), threading.Semaphore(0), cache._changed.wait
    monkeypatch.setattr(cache._changed, "wait", lambda seconds: (waits.release(), wait(seconds)))
    order: list[str] = []

    def ask(name: str, outcome: PenumbraError | None) -> None:
        nonlocal working, most
        with suppress(PenumbraError), cache.first(key, timeout_s=WAIT_S):
            with lock:
                working, most = working + 1, max(most, working + 1)
                order.append(name)
            entered.release()
            assert release[name].wait(WAIT_S)
            with lock:
                working -= 1
            if outcome:
                raise outcome

    threads = [threading.Thread(target=ask, args=("a", Cancelled("gone")))]
    threads[0].start()
    assert entered.acquire(timeout=WAIT_S)
    for name in "bc":
        threads.append(threading.Thread(target=ask, args=(name, None)))
        threads[-1].start()
        assert waits.acquire(timeout=WAIT_S)
    release["a"].set()
    assert entered.acquire(timeout=WAIT_S) and waits.acquire(timeout=WAIT_S)
    release[order[1]].set()
    assert entered.acquire(timeout=WAIT_S)
    release[order[2]].set()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(order) == ["a", "b", "c"] and most == 1 and not cache._in_work


def test_what_is_set_before_or_while_somebody_waits_wakes_them_and_nobody_else() -> None:
    cancelled, heard = Cancellation(), list[str]()
    with cancelled.waking(lambda: heard.append("left before")):
        pass
    with cancelled.waking(lambda: heard.append("waits")):
        cancelled.set()
    with cancelled.waking(lambda: heard.append("comes after")):
        pass
    assert heard == ["waits", "comes after"]


# -- protocols -------------------------------------------------------------------------------------


def _application(gateway: Gateway) -> Starlette:
    served = v2.routes(Inference(gateway), body_bytes=2**20, json_bytes=2**20, bodies=Bodies(2**30))
    own = rest.routes(gateway, {}, bodies=Bodies(2**30))
    return Starlette(routes=[*served, *own], exception_handlers=rest.ERROR_HANDLERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["decoding", "its batch"])
@pytest.mark.parametrize("whose", ["the caller's", "the server's"])
def test_http_tells_504_while_the_thread_is_held(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch, place: str, whose: str
) -> None:
    hold(place, gate, monkeypatch)
    options = {"model": "toy-pointwise"} | ({"deadline_ms": SOON_MS} if whose == "the caller's" else {})
    gateway._timeout_s = 60 if whose == "the caller's" else SOON_MS / 1e3
    values = {"name": "image", "datatype": "UINT8", "shape": IMAGE.shape, "data": IMAGE.ravel().tolist()}
    parameters = {name: value for name, value in options.items() if name != "model"}

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(_application(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://penumbra") as client:
            return [
                await client.post("/segment", params=options, content=PICTURE, headers={"Content-Type": "image/png"}),
                await client.post(
                    "/v2/models/toy-pointwise/infer", json={"parameters": parameters, "inputs": [values]}
                ),
            ]

    for answer in asyncio.run(scenario()):
        assert answer.status_code == 504 and "the deadline passed after" in answer.json()["error"]
    assert not gate.open.is_set()


def test_grpc_tells_deadline_exceeded_and_cancelled_while_a_batch_runs(
    gateway: Gateway, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold("its batch", gate, monkeypatch)
    message = pb.ModelInferRequest(model_name="toy-pointwise")
    message.inputs.add(name="image", datatype="UINT8", shape=IMAGE.shape)
    message.raw_input_contents.append(IMAGE.tobytes())
    hurried = pb.ModelInferRequest.FromString(message.SerializeToString())
    hurried.parameters["deadline_ms"].double_param = SOON_MS

    async def scenario() -> None:
        address = f"127.0.0.1:{free_port()}"
        server = GrpcServer(address=address, message_bytes=2**20, keys=Keys(), telemetry=gateway.telemetry)
        await server.start()
        bodies = Bodies(2**30)
        server.open(service_handlers(Calls(Inference(gateway), bodies)))
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.ModelInfer(hurried)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "the deadline passed after" in late.value.details()
            gate.reached.clear()
            call = stub.ModelInfer(message)
            while not gateway._inflight:
                await asyncio.sleep(0.001)
            call.cancel()
            while gateway._inflight:
                await asyncio.sleep(0.001)
        assert not gate.open.is_set()
        await server.stop(0)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
