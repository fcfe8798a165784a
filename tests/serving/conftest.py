"""One server process for all tests of the HTTP surface."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.server import Server, serving

BODY_BYTES, PIXELS, QUEUE_SAMPLES = 800_000, 260_000, 45_000


@pytest.fixture(scope="session")
def server(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        toy_store, tmp_path_factory.mktemp("server"), deterministic=True, predrain_s=0,
        limit_body_bytes=BODY_BYTES, limit_pixels=PIXELS, limit_queue_samples=QUEUE_SAMPLES,
    ) as started:  # fmt: skip
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened
