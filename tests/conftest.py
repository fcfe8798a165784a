"""Shared by all tests: a store of toy artifacts, whose answers are known in closed form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from penumbra.export.bundle import export_network
from penumbra.models.toy.net import ToyConfig
from penumbra.serving.engine.decode import open_image, read_header
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.runtime import Tuning
from tests.toys import CLASSES, toy_card

# A busy machine is no failure, and what failed here fails everywhere.
settings.register_profile("penumbra", deadline=None, derandomize=True)
settings.load_profile("penumbra")

__all__ = ["CLASSES", "FIXED", "GAIN", "decode_image", "measured", "picture", "toy_card"]
GAIN = ToyConfig().gain
FIXED = Tuning(windows_per_batch=4, samples_per_call=4)
"""Sizes that are the same everywhere, of more than one: measuring them takes 0.3 s a model."""


def pytest_configure() -> None:
    """Small networks, and one process of tests for every core: a second thread costs more in waiting than it saves."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for form in ("pointwise", "latent", "opposed", "boxed", "tagged", "bright", "nan"):
        card, network = toy_card(form)
        export_network(network, card, store)
    return store


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 230, (height, width, 3), dtype=np.uint8)


def measured(source: bytes | Path) -> tuple[int, int]:
    """Height and width by an encoded picture's header."""
    with read_header(source, Limits()) as header:
        return header.size


def decode_image(data: bytes, limits: Limits) -> np.ndarray:
    """All pixels of an encoded picture."""
    return open_image(data, limits)[:, :]
