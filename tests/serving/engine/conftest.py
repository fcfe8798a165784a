"""A scheduler of one lane."""

from collections.abc import Iterator

import pytest

from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.throughput import Cores


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(queue_samples=10_000, cores=Cores(1))
    yield made
    made.close()
