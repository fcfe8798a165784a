"""kill -9, of the process that answers and of the one that watches over it."""

import asyncio
import time
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton

from loadtests.pictures import picture
from tests.reliability.load import LOST, Callers, Outcome, closed_loop
from tests.serving.server import MEASURED, Server, serving, until

pytestmark = pytest.mark.slow
USERS, KILLS = 4, 2


def worker_of(server: Server) -> psutil.Process:
    """The process that answers: the supervisor's only child."""
    until(lambda: psutil.Process(server.process.pid).children())
    (worker,) = psutil.Process(server.process.pid).children()
    return worker


async def kill(server: Server) -> tuple[float, float]:
    """When the worker was gone, and how long it took from its kill until another was ready."""
    dead = worker_of(server)
    killed = time.perf_counter()
    dead.kill()

    def is_back() -> bool:
        with server.client() as client:
            return client.get("/readyz").status_code == 200

    dead.wait(60)
    gone = time.perf_counter()
    await asyncio.to_thread(until, is_back)
    return gone, time.perf_counter() - killed


async def ask_until_taken(callers: Callers) -> Outcome:
    """As the server asks of its callers while it loads: come again after Retry-After."""
    while (outcome := await callers.ask()).status == 503:
        await asyncio.sleep(2)
    return outcome


def test_a_killed_worker_loses_what_it_was_at_and_nothing_else(store: Path, tmp_path: Path) -> None:
    async def load_and_kill(server: Server) -> tuple[list, list]:
        kills: list[tuple[float, float]] = []
        async with Callers(server, picture("medium", 1)) as callers:
            users = asyncio.ensure_future(
                closed_loop(lambda: ask_until_taken(callers), users=USERS, until=lambda: len(kills) == KILLS)
            )
            for _ in range(KILLS):
                await asyncio.sleep(2)
                kills.append(await kill(server))
            return kills, await users

    with serving(store, tmp_path, predrain_s=0, **MEASURED) as server:
        kills, outcomes = asyncio.run(load_and_kill(server))
        with triton.InferenceServerClient(server.grpc_address) as client:
            assert client.is_server_ready()
    lost = [outcome for outcome in outcomes if outcome.status == LOST]
    print(f"{KILLS} kills: {len(lost)} of {len(outcomes)} lost; ready after", [f"{s:.1f} s" for _, s in kills])
    assert {outcome.status for outcome in outcomes} <= {200, LOST}
    assert len(lost) <= KILLS * USERS
    for outcome in lost:
        assert any(outcome.began <= gone <= outcome.began + outcome.seconds for gone, _ in kills), (
            "it was not in flight"
        )


def test_a_worker_whose_supervisor_is_killed_finishes_its_work_and_ends(store: Path, tmp_path: Path) -> None:
    async def ask_and_kill(server: Server) -> int:
        async with Callers(server, picture("large", 1), overlap=0.8) as callers:
            asked = asyncio.ensure_future(callers.ask())
            with server.client() as client:
                await asyncio.to_thread(until, lambda: "penumbra_inflight 1.0" in client.get("/metrics").text)
            server.process.kill()
            return (await asked).status

    with serving(store, tmp_path, predrain_s=0.5, **MEASURED) as server:
        worker = worker_of(server)
        assert asyncio.run(ask_and_kill(server)) == 200
        gone, alive = psutil.wait_procs([worker], timeout=30)
        for orphan in alive:
            orphan.kill()
        assert gone == [worker]
