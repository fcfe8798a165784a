"""Shared by all tests: a store of toy artifacts, whose answers are known in closed form."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from export.bundle import export_network
from models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from models.toy.net import ToyConfig, ToyNetwork

settings.register_profile("penumbra", deadline=None)  # a busy machine is no failure
settings.load_profile("penumbra")

GAIN = 8.0
CLASSES = (ClassInfo("red", (200, 0, 0)), ClassInfo("green", (0, 200, 0)), ClassInfo("blue", (0, 0, 200)))


def toy_card(form: str, *, name: str | None = None, window: WindowSpec | None = None) -> tuple[Card, ToyNetwork]:
    config = ToyConfig(form=form, gain=GAIN)
    network = ToyNetwork(config)
    card = Card(
        name=name or f"toy-{form}", version=1, method="toy", config=dataclasses.asdict(config), classes=CLASSES,
        input=InputSpec(mean=(0, 0, 0), std=(1, 1, 1)), window=window or WindowSpec(32, 48),
        sampling=network.sampling, readout=Readout(), prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip
    return card, network


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Small nets on a busy machine: a second thread costs more in waiting than it saves."""
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
