"""A model is replaced two hundred times while it answers; versions that are broken change nothing."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree, rmtree

import httpx
import psutil
import pytest

from loadtests.pictures import picture
from tests.reliability.load import Callers, Outcome, closed_loop, percentile
from tests.reliability.test_crash import worker_of
from tests.serving.server import Server, serving

pytestmark = pytest.mark.slow
MODEL, RELOADS, USERS = "toy-pointwise", 200, 2
BROKEN: list[tuple[str, Callable[[Path], object]]] = [
    ("was changed after its export", lambda place: (place / "decode.ts").write_bytes(b"another graph")),
    ("golden.safetensors", lambda place: (place / "golden.safetensors").unlink()),
    ("card is not valid JSON", lambda place: (place / "card.json").write_text("{")),
]
MEMORY_MIB = 32
"""What 150 reloads may add after the first 50: a kept version of this toy is some 300 KiB, a kept thread as much."""


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    copytree(store / MODEL, tmp_path / "store" / MODEL)
    return tmp_path / "store"


@pytest.fixture
def server(own_store: Path, tmp_path: Path) -> Iterator[Server]:
    fixed = {"windows_per_batch": 1, "samples_per_call": 1}  # nothing is measured at a load, so it is quick
    with serving(own_store, tmp_path, threads=0, model_control=True, predrain_s=0, **fixed) as started:
        yield started


def add_version(store: Path, number: int) -> Path:
    first, place = store / MODEL / "1", store / MODEL / str(number)
    copytree(first, place)
    card = (first / "card.json").read_text()
    (place / "card.json").write_text(card.replace('"version": 1', f'"version": {number}', 1))
    return place


def load(client: httpx.Client) -> httpx.Response:
    return client.post(f"/v2/repository/models/{MODEL}/load")


def newest(client: httpx.Client) -> int:
    return int(client.get(f"/models/{MODEL}").json()["version"])


def reload_all(server: Server, store: Path) -> list[tuple[int, int]]:
    """Resident bytes and threads of the worker after each reload."""
    worker, sizes = worker_of(server), []
    with server.client() as client:
        for number in range(2, RELOADS + 2):
            if number % 20 == 0:
                what, break_it = BROKEN[number // 20 % len(BROKEN)]
                place = add_version(store, number)
                break_it(place)
                refused = load(client)
                assert refused.status_code == 500 and what in refused.json()["error"]
                assert newest(client) == number - 1
                rmtree(place)
            place = add_version(store, number)
            loaded = load(client)
            assert loaded.status_code == 200, loaded.text
            assert newest(client) == number
            rmtree(place)
            sizes.append((worker.memory_info().rss, worker.num_threads()))
    return sizes


async def reload_under_load(server: Server, store: Path) -> tuple[list[Outcome], list[tuple[int, int]]]:
    done = threading.Event()
    async with Callers(server, picture("small", 5)) as callers:
        users = asyncio.ensure_future(closed_loop(callers.ask, users=USERS, until=done.is_set))
        try:
            sizes = await asyncio.to_thread(reload_all, server, store)
        finally:
            done.set()
        return await users, sizes


def test_two_hundred_reloads_under_load_fail_no_request_and_keep_no_memory(server: Server, own_store: Path) -> None:
    outcomes, sizes = asyncio.run(reload_under_load(server, own_store))
    early, late = sizes[49][0], sizes[-1][0]
    early_threads, late_threads = (min(threads for _, threads in part) for part in (sizes[:50], sizes[-50:]))
    print(
        f"{RELOADS} reloads, {len(outcomes)} requests, {sum(o.status != 200 for o in outcomes)} failed, "
        f"p99 {percentile(outcomes, 99):.3f} s; the last 150 took {(late - early) / 2**20:+.1f} MiB"
    )
    assert {outcome.status for outcome in outcomes} == {200}
    assert late - early < MEMORY_MIB * 2**20
    assert late_threads <= early_threads + 3, "pools grow late by a thread or two; one that a reload kept would be 150"
    assert psutil.pid_exists(server.process.pid)
