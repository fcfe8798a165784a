"""A runtime that answers batches when it is told to, and requests for it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from penumbra.models.card import Card, WindowSpec
from penumbra.models.errors import ModelFault, PenumbraError
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.plan import RequestPlan
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.windows import Window, cover
from tests.conftest import toy_card

WAIT_S = 30
"""Bound of every wait: reached only when something hangs."""
SPEC = WindowSpec(4, 4, overlap=0.0)


@dataclass(eq=False)
class SteppedRuntime:
    """Answers a window with the value of its first pixel. `run` waits for `go`; `before` may raise.

    Pixel 255 makes an answer of its own: a fault. batches: the first pixels of every batch that was run.
    """

    windows_per_batch: int = 1
    lanes: int = 0
    stays_on_device: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda:1"))
    before: Callable[[list[int]], None] = lambda values: None
    card: Card = field(default_factory=lambda: toy_card("latent", window=SPEC)[0])
    batches: list[list[int]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def run(self, inputs: list[WindowInput]) -> list[Moments | ModelFault]:
        values = [int(one.image_HWC[one.window.y0 :, :][0, 0, 0]) for one in inputs]
        self.entered.set()
        assert self.go.wait(WAIT_S)
        self.before(values)
        self.batches.append(values)
        return [
            ModelFault("not finite") if value == 255
            else Moments(torch.full((4, 4, 4), float(value)), len(window.noise_SL))
            for value, window in zip(values, inputs, strict=True)
        ]  # fmt: skip


def runtime(*, going: bool = True, **options: object) -> SteppedRuntime:
    made = SteppedRuntime(**options)  # type: ignore[arg-type]
    if going:
        made.go.set()
    return made


def work(
    scheduler: Scheduler, on: SteppedRuntime, num_windows: int, *, value: int = 1, samples: int = 1,
    anytime: bool = False, priority: int = 0, **options: object,
) -> QueuedRequest:  # fmt: skip
    """num_windows windows below each other, all pixels of them `value`."""
    image = np.full((4 * num_windows, 4, 3), value, np.uint8)
    noise = SeededNoise(on.card.sampling, seed=0, num_samples=samples)
    asked = SegmentOptions(samples=samples, anytime=anytime, priority=priority)
    plan = RequestPlan(on, asked, cover(4 * num_windows, 4, SPEC), noise)  # type: ignore[arg-type]
    return QueuedRequest(scheduler, plan, Raster(image), **options)  # type: ignore[arg-type]


def consume(stream: QueuedRequest) -> list[tuple[Window, float]]:
    with stream:
        return [(window, float(moments.stats_hCw[0, 0, 0])) for window, moments in stream.finished()]


def outcome(stream: QueuedRequest) -> int | PenumbraError:
    """How many windows were answered, or what ended the request."""
    try:
        return len(consume(stream))
    except PenumbraError as error:
        return error


def in_threads(*streams: QueuedRequest) -> list[int | PenumbraError]:
    with ThreadPoolExecutor(len(streams)) as threads:
        return list(threads.map(outcome, streams, timeout=WAIT_S))
