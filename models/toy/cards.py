"""The card of a toy network, for stores whose every answer is known: tests, benchmarks, load tests."""

import dataclasses
from typing import Any

from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.toy.net import ToyConfig, ToyNetwork

CLASSES = (ClassInfo("red", (200, 0, 0)), ClassInfo("green", (0, 200, 0)), ClassInfo("blue", (0, 0, 200)))


def toy_card(form: Any, *, name: str | None = None, window: WindowSpec | None = None) -> tuple[Card, ToyNetwork]:
    """Make a network of a form of `penumbra.models.toy.net` and its card; by default with tiny windows."""
    network = ToyNetwork(ToyConfig(form=form))
    card = Card(
        name=name or f"toy-{form}", version=1, method="toy", config=dataclasses.asdict(network.config), classes=CLASSES,
        input=InputSpec(mean=(0, 0, 0), std=(1, 1, 1)), window=window or WindowSpec(32, 48),
        sampling=network.sampling, readout=Readout(), prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip
    return card, network
