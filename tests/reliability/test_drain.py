"""SIGTERM while a hundred requests are in flight over both protocols: each is answered, then the process ends."""

import asyncio
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from loadtests.pictures import Picture, check, picture
from loadtests.run import scrape
from tests.reliability.load import CALLER_S, Callers
from tests.serving.server import MEASURED, Server, serving, until

pytestmark = pytest.mark.slow
OVER_HTTP, OVER_GRPC, IN_FLIGHT = 80, 30, 100
"""Requests that are sent at once, and how many of them are still unanswered when the signal comes."""
OPTIONS = {"overlap": 0.5}
"""Nine windows each: the first is not answered before the last has come."""


async def infer(client: triton.InferenceServerClient, asked: Picture, **options: float) -> None:
    image = triton.InferInput("image", list(asked.pixels_HW3.shape), "UINT8")
    image.set_data_from_numpy(asked.pixels_HW3)
    answer = await client.infer("toy-pointwise", [image], client_timeout=CALLER_S, parameters=OPTIONS | options)
    check(np.asarray(answer.as_numpy("labels")), asked, exact=True)


async def ask_and_end(server: Server) -> tuple[list[int], float]:
    """Statuses of the HTTP answers, and seconds from SIGTERM to the last answer; wrong and lost ones raise."""
    asked = picture("medium", 2)
    async with Callers(server, asked, **OPTIONS) as callers, triton.InferenceServerClient(server.grpc_address) as rpc:
        over_http = [asyncio.ensure_future(callers.ask()) for _ in range(OVER_HTTP)]
        over_grpc = [asyncio.ensure_future(infer(rpc, asked)) for _ in range(OVER_GRPC)]
        await asyncio.to_thread(until, lambda: scrape(server)["penumbra_inflight"] >= IN_FLIGHT)
        server.process.send_signal(signal.SIGTERM)
        signalled = time.perf_counter()
        outcomes = await asyncio.gather(*over_http)
        await asyncio.gather(*over_grpc)
        return [outcome.status for outcome in outcomes], time.perf_counter() - signalled


def test_of_a_hundred_requests_in_flight_at_sigterm_none_is_lost(store: Path, tmp_path: Path) -> None:
    with serving(
        store, tmp_path, threads=0, predrain_s=0.5, limit_requests=OVER_HTTP + OVER_GRPC, **MEASURED
    ) as server:
        statuses, seconds = asyncio.run(ask_and_end(server))
        assert statuses == [200] * OVER_HTTP
        assert server.process.wait(60) == 0
    print(f"{IN_FLIGHT} and more answered within {seconds:.1f} s of SIGTERM")
