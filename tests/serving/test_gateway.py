"""The gateway: bounds, states, and failures that say nothing of the inside."""

import asyncio
import gzip
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import pytest
from PIL import Image
from rasterio.transform import from_origin
from starlette import requests
from starlette.applications import Starlette
from starlette.responses import StreamingResponse

from penumbra.export.bundle import export_network
from penumbra.models.card import ScaleRule, WindowSpec
from penumbra.models.errors import (
    BadOption,
    Cancelled,
    DeadlineExceeded,
    ModelFault,
    NotReady,
    QueueFull,
    TooLarge,
    UnknownModel,
)
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.http import v2
from penumbra.serving.http.routes import ERROR_HANDLERS
from penumbra.serving.http.stream import stream
from penumbra.serving.jobs import Jobs
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.room import Bodies
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import Request, Telemetry
from tests.conftest import FIXED, picture, toy_card
from tests.serving.engine.tiffs import tiff
from tests.toys import INPUT

OPTIONS = SegmentOptions(model="toy-pointwise")
IMAGE = picture(np.random.Generator(np.random.PCG64(0)), 20, 30)
WAIT_S = 30


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=FIXED) as opened:
        yield opened


def gateway(segmenter: Segmenter, *, limit_requests: int = 2, timeout_s: float = 60) -> Gateway:
    made = Gateway(segmenter, Telemetry(), limit_requests=limit_requests, timeout_s=timeout_s)
    made.state = "ready"
    return made


def labels(prediction: Prediction) -> np.ndarray:
    return prediction.labels_HW


def test_an_answer_is_written_timed_and_named(segmenter: Segmenter) -> None:
    request = Request()
    prediction, written = asyncio.run(gateway(segmenter).answer(IMAGE, OPTIONS, labels, request=request))
    assert written is prediction.labels_HW and request.model == "toy-pointwise"
    assert {"wait", "decode", "queue", "run", "stitch", "read_out", "total"} == set(prediction.timing_ms)


def test_while_starting_nothing_is_answered(segmenter: Segmenter) -> None:
    starting = gateway(segmenter)
    starting.state = "starting"
    assert not starting.is_ready and starting.is_alive
    with pytest.raises(NotReady, match="still loading"):
        asyncio.run(starting.answer(IMAGE, OPTIONS, labels, request=Request()))


class Watched(Bodies):
    """Knows the threads that counted bytes."""

    def __init__(self) -> None:
        super().__init__(2**30)
        self.threads: set[int] = set()

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        with super().room() as take:

            def watched(size: int) -> None:
                self.threads.add(threading.get_ident())
                take(size)

            yield watched


@pytest.mark.parametrize(("state", "status"), [("ready", 400), ("starting", 503)])
def test_a_small_body_is_unpacked_off_the_event_loop_and_only_once_its_request_is_admitted(
    segmenter: Segmenter, state: Literal["ready", "starting"], status: int
) -> None:
    bodies, inference = Watched(), Inference(gateway(segmenter))
    inference.gateway.state = state
    routes = v2.routes(inference, body_bytes=2**20, json_bytes=2**20, bodies=bodies)
    transport = httpx.ASGITransport(Starlette(routes=routes, exception_handlers=ERROR_HANDLERS))

    async def send() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            body, headers = gzip.compress(bytes(2**20)), {"Content-Encoding": "gzip"}
            return (await client.post("/v2/models/toy-latent/infer", content=body, headers=headers)).status_code

    assert asyncio.run(send()) == status
    assert threading.get_ident() not in bodies.threads and bool(bodies.threads) == (state == "ready")


def test_an_unknown_model_is_refused_and_its_name_is_no_label(segmenter: Segmenter) -> None:
    request = Request()
    with pytest.raises(UnknownModel):
        asyncio.run(gateway(segmenter).answer(IMAGE, SegmentOptions(model="x"), labels, request=request))
    assert request.model == ""


def test_requests_over_the_limit_are_refused_and_their_places_come_back(segmenter: Segmenter) -> None:
    writing, go = threading.Event(), threading.Event()

    def slow(prediction: Prediction) -> np.ndarray:
        writing.set()
        assert go.wait(WAIT_S)
        return prediction.labels_HW

    async def scenario() -> None:
        one = gateway(segmenter, limit_requests=1)
        first = asyncio.create_task(one.answer(IMAGE, OPTIONS, slow, request=Request()))
        await asyncio.to_thread(writing.wait, WAIT_S)
        with pytest.raises(QueueFull, match="1 requests are being worked on and the limit is 1") as refusal:
            await one.answer(IMAGE, OPTIONS, labels, request=Request())
        assert refusal.value.retry_after_s >= 1
        go.set()
        await first
        await one.answer(IMAGE, OPTIONS, labels, request=Request())

    asyncio.run(scenario())


def test_the_memory_that_requests_will_take_is_counted_before_their_pictures_are_decoded(toy_store: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(buffer, "PNG")
    cut_off = buffer.getvalue()[:60]  # what is known of it is its header

    def answer(image: bytes | np.ndarray, options: SegmentOptions = OPTIONS) -> Prediction:
        return asyncio.run(bounded.answer(image, options, lambda _: meet(), request=Request()))[0]

    def meet() -> None:
        if not writing.is_set():
            writing.set()
            assert go.wait(WAIT_S)

    writing, go = threading.Event(), threading.Event()
    with Segmenter(threads=1, device="cpu", tuning=FIXED, limits=Limits(memory_bytes=70_000)) as opened:
        opened.load(toy_store / "toy-pointwise" / "1")
        bounded = gateway(opened)
        with pytest.raises(TooLarge, match=r"takes 1,981,184 bytes .*limit_memory_bytes\) together is 70,000; send"):
            answer(cut_off)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(answer, IMAGE)
            assert writing.wait(WAIT_S)
            with pytest.raises(QueueFull, match=r"have (\d+,\d{3}) bytes, this one needs \1 more"):
                answer(IMAGE)
            assert answer(IMAGE, replace(OPTIONS, outputs=())).num_windows == 1, "labels alone have room beside it"
            go.set()
            first.result(WAIT_S)
        assert answer(IMAGE).num_windows == 1


def test_what_is_predicted_for_a_request_is_what_its_arrays_have(segmenter: Segmenter) -> None:
    options = SegmentOptions("toy-latent", outputs=("default", PROBABILITIES), samples=4)
    image = picture(np.random.Generator(np.random.PCG64(0)), 300, 400)
    prediction, predicted = segmenter.segment(image, options), segmenter.plan(300, 400, options).num_bytes(1)
    assert prediction.prob_KHW is not None
    arrays = [image, prediction.labels_HW, prediction.prob_KHW, *prediction.maps.values()]
    rest = predicted - sum(array.nbytes for array in arrays)
    assert 0 < rest < predicted / 4, "the canvas, and windows on their way to it"
    assert predicted == segmenter.plan(300, 400, replace(options, samples=64)).num_bytes(1)


def test_a_raster_of_finer_pixels_than_the_models_is_judged_as_it_is_run(tmp_path: Path) -> None:
    spec = replace(INPUT, resolution=ScaleRule("gsd", 10))
    card, network = toy_card("bright", name="coarse", spec=spec, window=WindowSpec(0, 0))
    export_network(network, card, tmp_path / "store")
    data = tiff(picture(np.random.Generator(np.random.PCG64(0)), 60, 80), transform=from_origin(5e5, 5.8e6, 1, 1))
    limits = Limits(window_pixels=100)
    with Segmenter.open(tmp_path / "store", threads=1, device="cpu", tuning=FIXED, limits=limits) as opened:
        made = gateway(opened)
        answer = asyncio.run(made.answer(data, SegmentOptions(), labels, request=Request()))[0]
        assert answer.labels_HW.shape == (60, 80) and "run at 0.1 times its size" in answer.warnings[0]
        jobs = Jobs(Settings(jobs=tmp_path / "jobs", store=tmp_path / "store"), made)
        place = jobs.begin()
        (place / "image").write_bytes(data)
        assert jobs.submit(place, "image/png", {})["state"] == "queued"
        jobs.close()


def test_an_unforeseen_failure_is_a_fault_without_its_text(
    segmenter: Segmenter, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Prediction) -> None:
        raise RuntimeError("secret place")

    with pytest.raises(ModelFault) as fault:
        asyncio.run(gateway(segmenter).answer(IMAGE, OPTIONS, fail, request=Request()))
    assert "secret" not in str(fault.value) and fault.value.__cause__ is None
    assert "secret place" in caplog.text


def test_a_caller_who_is_gone_is_not_worked_for(segmenter: Segmenter) -> None:
    async def gone() -> None:
        return

    big = np.broadcast_to(IMAGE[:1, :1], (3000, 100, 3))
    with pytest.raises(Cancelled):
        asyncio.run(
            gateway(segmenter).answer(big, SegmentOptions(model="toy-latent"), labels, request=Request(), gone=gone)
        )
    assert segmenter.scheduler.queued == (0, 0)


def test_a_request_that_takes_too_long_expires(segmenter: Segmenter) -> None:
    impatient = gateway(segmenter, timeout_s=1e-9)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(impatient.answer(IMAGE, OPTIONS, labels, request=Request()))


@pytest.mark.parametrize(("timeout_s", "deadline_ms"), [(60, 1e-6), (1e-9, 60_000)])
def test_the_earlier_of_its_callers_and_the_servers_deadline_ends_a_request(
    segmenter: Segmenter, timeout_s: float, deadline_ms: float
) -> None:
    asked = replace(OPTIONS, deadline_ms=deadline_ms)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(gateway(segmenter, timeout_s=timeout_s).answer(IMAGE, asked, labels, request=Request()))
    assert segmenter.scheduler.queued == (0, 0)


def test_a_request_within_its_deadline_is_answered(segmenter: Segmenter) -> None:
    asked = replace(OPTIONS, deadline_ms=60_000)
    prediction, _ = asyncio.run(gateway(segmenter).answer(IMAGE, asked, labels, request=Request()))
    assert prediction.labels_HW.shape == IMAGE.shape[:2]


def test_a_deadline_that_has_passed_already_is_refused(segmenter: Segmenter) -> None:
    with pytest.raises(BadOption, match="deadline_ms is 0; a number of milliseconds above 0 is wanted"):
        asyncio.run(gateway(segmenter).answer(IMAGE, replace(OPTIONS, deadline_ms=0), labels, request=Request()))


def asked_for_lines(*bodies: bytes) -> requests.Request:
    """A request for lines with a picture that arrives, or never does."""
    arriving = list(bodies)

    async def receive() -> dict[str, object]:
        if not arriving:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": arriving.pop(), "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/segment", "query_string": b"model=toy-pointwise"}
    return requests.Request(scope | {"headers": [(b"content-type", b"image/png")]}, receive)


@pytest.mark.parametrize("limit_bytes", [2**20, 100])
def test_lines_that_wait_for_a_slow_caller_count_as_bodies_do(segmenter: Segmenter, limit_bytes: int) -> None:
    file, bodies, made = io.BytesIO(), Bodies(limit_bytes), gateway(segmenter)
    Image.fromarray(IMAGE).save(file, "PNG")

    async def scenario() -> list[bytes]:
        response = await stream(made, bodies, asked_for_lines(file.getvalue()))
        assert isinstance(response, StreamingResponse)
        while made._inflight:
            await asyncio.sleep(0.01)
        with bodies.room() as other, pytest.raises(QueueFull, match="the bodies of all requests have"):
            other(limit_bytes)
        return [bytes(line) async for line in response.body_iterator]

    lines = asyncio.run(scenario())
    assert (b"the limit of all bodies together is 100" in lines[-1]) == (limit_bytes == 100)
    with bodies.room() as later:
        later(limit_bytes)


def test_a_caller_who_is_cancelled_before_the_first_line_leaves_no_work(segmenter: Segmenter) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(WAIT_S):
            task = asyncio.create_task(stream(gateway(segmenter), Bodies(100), asked_for_lines()))
            while len(asyncio.all_tasks()) < 3:
                await asyncio.sleep(0)
            task.cancel()
            while asyncio.all_tasks() != {asyncio.current_task()}:
                await asyncio.sleep(0)

    asyncio.run(scenario())
