"""What all tests of the surfaces ask: one server process, and the HTTP surface in this process."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.in_process import in_process
from tests.serving.server import Server, serving

BODY_BYTES, PIXELS, QUEUE_SAMPLES = 800_000, 260_000, 45_000
SETTINGS = {
    "deterministic": True, "predrain_s": 0, "limit_body_bytes": BODY_BYTES, "limit_pixels": PIXELS,
    "limit_queue_samples": QUEUE_SAMPLES,
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A client asks the surface in this process, and in `make test-all` a server too; a test that has the server itself
    asks that one alone."""
    if "reached" in metafunc.fixturenames:
        both = ["here", pytest.param("server", marks=pytest.mark.slow)]
        metafunc.parametrize("reached", ["server"] if "server" in metafunc.fixturenames else both, scope="session")


@pytest.fixture(scope="session")
def server(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(toy_store, tmp_path_factory.mktemp("server"), **SETTINGS) as started:
        yield started


@pytest.fixture(scope="session")
def surface(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with in_process(toy_store, tmp_path_factory.mktemp("surface"), **SETTINGS) as client:
        yield client


@pytest.fixture
def client(reached: str, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    if reached == "here":
        yield request.getfixturevalue("surface")
        return
    with request.getfixturevalue("server").client() as opened:
        yield opened
