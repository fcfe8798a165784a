"""Stores of toys in windows of 256x256: enough work per request to load a server with few callers."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.run import fill


@pytest.fixture(autouse=True)
def _callers_are_not_stopped_by_the_suite() -> Iterator[None]:
    """Callers live in this process, with all that a suite has left in it: looking through gigabytes for garbage stops
    them for seconds, in which they seem not to be answered and then ask all at once."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reliable")
    fill(made)
    return made
