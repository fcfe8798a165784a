"""Segmenters of eager networks, whose windows stay on the device as on a GPU, wherever the device is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from penumbra.export.bundle import NOT_MEASURED
from penumbra.export.golden import ask
from penumbra.export.parts import cut
from penumbra.models.card import Card, ExportFacts
from penumbra.models.contract import Network
from penumbra.serving.engine import runtime as runtimes
from penumbra.serving.engine import segmenter as segmenters
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import Artifact

Models = Mapping[str, tuple[Card, Network]]


def artifact_of(card: Card, network: Network) -> Artifact:
    card = replace(card, export=ExportFacts("torchscript", "fp32", torch.__version__, {}, NOT_MEASURED))
    with torch.inference_mode():
        return Artifact(Path(card.name), card, ask(network, card), b"")


def backend_of(card: Card, network: Network, artifact: Artifact, *, precision: str = "fp32") -> Backend:
    """The parts as they are exported, run eagerly."""
    parts = cut(network, card, artifact.golden, precision=precision, device=torch.device("cpu"))
    graphs: dict[str, Callable[..., object]] = {part.name: part.module for part in parts}
    return Backend(graphs, device=torch.device("cpu"), one_at_a_time=False)


@contextmanager
def opened(models: Models, *, staying: bool, tuning: Tuning | None = None) -> Iterator[Segmenter]:
    """A segmenter on the CPU. staying: windows go the way that they go on a GPU."""
    artifacts = {name: artifact_of(card, network) for name, (card, network) in models.items()}
    backends = {name: backend_of(*models[name], artifact) for name, artifact in artifacts.items()}
    with ExitStack() as stack:
        for module in (runtimes, segmenters):
            stack.enter_context(patch.object(module, "stays_on", lambda device: staying))
        stack.enter_context(patch.object(segmenters, "open_artifact", lambda path, **_: artifacts[path.name]))
        stack.enter_context(patch.object(runtimes, "load_backend", lambda card, *_: backends[card.name]))
        segmenter = stack.enter_context(Segmenter(threads=2, device="cpu", tuning=tuning or Tuning(3, 2)))
        for name in models:
            segmenter.load(Path(name))
        yield segmenter
