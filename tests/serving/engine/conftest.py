"""A scheduler of one lane, and pixels."""

from collections.abc import Iterator

import numpy as np
import pytest

from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.throughput import Cores
from tests.conftest import picture


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(queue_samples=10_000, cores=Cores(1))
    yield made
    made.close()


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return picture(rng, 40, 60)
