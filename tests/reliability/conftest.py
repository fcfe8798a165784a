"""Stores of toys in windows of 256x256: enough work per request to load a server with few callers."""

from pathlib import Path

import pytest

from loadtests.run import fill


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reliable")
    fill(made)
    return made
