"""What the integrations ask: a server over the toys, whose answers are known."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.in_process import in_process
from tests.serving.server import Server, serving

SETTINGS = {"deterministic": True, "predrain_s": 0, "limit_jobs": 4, "limit_pixels": 300_000}


@pytest.fixture(scope="session")
def server(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(toy_store, tmp_path_factory.mktemp("server"), **SETTINGS) as started:
        yield started


@pytest.fixture(scope="session")
def surface(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with in_process(toy_store, tmp_path_factory.mktemp("surface"), **SETTINGS) as opened:
        yield opened
