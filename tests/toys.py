"""The card of a toy network, for stores whose every answer is known: tests, benchmarks, load tests."""

import dataclasses
from typing import Any

from penumbra.models.card import RGB, Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.classes import color_of
from penumbra.models.toy.net import ToyConfig, ToyNetwork

CLASSES = (ClassInfo("red", (200, 0, 0)), ClassInfo("green", (0, 200, 0)), ClassInfo("blue", (0, 0, 200)))
INPUT = InputSpec(mean=(0, 0, 0), std=(1, 1, 1))


def toy_card(
    form: Any, *, name: str | None = None, window: WindowSpec | None = None, spec: InputSpec = INPUT
) -> tuple[Card, ToyNetwork]:  # fmt: skip
    """Make a network of a form of `penumbra.models.toy.net` and its card; by default with tiny windows.

    spec: other bands than red, green and blue have classes of their names, and one band has a second class, `rest`.
    """
    names = (*spec.bands, "rest")[: max(2, spec.num_bands)]
    classes = tuple(ClassInfo(band, color_of(k)) for k, band in enumerate(names, 1))
    network = ToyNetwork(ToyConfig(len(names), form))
    card = Card(
        name=name or f"toy-{form}", version=1, method="toy", config=dataclasses.asdict(network.config),
        classes=CLASSES if spec.bands == RGB else classes, input=spec, window=window or WindowSpec(32, 48),
        sampling=network.sampling, readout=Readout(), prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip
    return card, network
