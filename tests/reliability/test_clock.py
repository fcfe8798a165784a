"""The time of day jumps by a week, forwards and back, while a server has requests, deadlines and a job at work."""

import asyncio
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
import tritonclient.grpc.aio as triton

from loadtests.pictures import picture
from loadtests.run import scrape
from tests.reliability.load import HEADERS, Callers
from tests.reliability.test_drain import infer
from tests.serving.server import MEASURED, Server, serving, until

pytestmark = pytest.mark.slow
WEEK_S = 7 * 86_400
DEADLINE_MS = 120_000
"""Much longer than the work takes, much shorter than the jump."""


def set_jump(file: Path, seconds: int) -> None:
    with file.open("r+b") as opened:
        opened.write(struct.pack("l", seconds))


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says how far off the clock of servers started from now on is."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("there is no C compiler")
    library, file = tmp_path / "clock.so", tmp_path / "jump"
    file.write_bytes(struct.pack("l", 0))
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_JUMP", str(file))
    return file


async def ask_while_it_jumps(server: Server, jump: Path) -> list[int]:
    asked = picture("large", 9)
    statuses = []
    async with (
        Callers(server, asked, deadline_ms=DEADLINE_MS, overlap=0.8) as callers,
        triton.InferenceServerClient(server.grpc_address) as rpc,
    ):
        for seconds in (WEEK_S, -WEEK_S, 0):
            over_http, over_grpc = (
                asyncio.ensure_future(callers.ask()),
                asyncio.ensure_future(infer(rpc, asked, overlap=0.8)),
            )
            await asyncio.to_thread(until, lambda: scrape(server)["penumbra_inflight"] == 2)
            set_jump(jump, seconds)
            statuses.append((await over_http).status)
            await over_grpc
    return statuses


def test_no_request_and_no_job_ends_or_waits_because_the_clock_jumps(store: Path, tmp_path: Path, jump: Path) -> None:
    with (
        serving(store, tmp_path, predrain_s=0, job_keep_s=10 * WEEK_S, **MEASURED) as server,
        server.client() as client,
    ):
        assert asyncio.run(ask_while_it_jumps(server, jump)) == [200, 200, 200]
        set_jump(jump, WEEK_S)
        answer = client.post("/jobs?model=toy-pointwise&overlap=0.5", content=picture("large", 9).png, headers=HEADERS)
        assert answer.json()["created"] - time.time() == pytest.approx(WEEK_S, abs=600), "the clock did jump"
        set_jump(jump, -WEEK_S)
        until(lambda: client.get(answer.json()["url"]).json()["finished"])
        assert client.get(answer.json()["url"]).json()["state"] == "done"
        assert client.get("/readyz").status_code == 200
