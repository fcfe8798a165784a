"""A load on the engine: callers who each wait for an answer before they ask again, and how fast they are answered."""

import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from penumbra.export.golden import read_picture
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.request import Cancellation
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import artifact_card
from penumbra.serving.files.predict import IN_MEMORY

FEW = 8
"""Pictures that callers ask for and that the gate is held on: more say little more of either, and take their time."""
LEAST_CALLERS = 8
"""Enough to fill the lanes of a small machine, with others waiting."""
Answered = tuple[float, float]
"""Seconds that a caller waited, and windows of the answer; pictures that are seen whole count by their pixels."""
Answers = Mapping[int, Sequence[Answered]]
"""What a measurement gives, by number of callers."""


class Speed(NamedTuple):
    """windows_per_s: of answers in time, the goodput. p95_ms: what 95 % of all answers took at most."""

    windows_per_s: float
    p95_ms: float

    def __str__(self) -> str:
        return f"{self.windows_per_s:.1f} windows/s, p95 {self.p95_ms:.0f} ms"


@dataclass(frozen=True, slots=True)
class Load:
    """latency: one caller alone. throughput: many. target_ms: answers that took longer do not count; 0 counts all."""

    kind: Literal["throughput", "latency"] = "throughput"
    target_ms: float = 0.0

    def callers(self, threads: int) -> tuple[int, ...]:
        """Say how many callers ask: with a target also fewer, since many make each other wait."""
        if self.kind == "latency":
            return (1,)
        many = max(LEAST_CALLERS, 2 * threads)
        return tuple(sorted({1, threads, many})) if self.target_ms else (many,)

    def measure(self, segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, seconds: float) -> Answers:
        """Have each number of callers ask for so long."""
        return {
            callers: ask(segmenter, name, pictures, callers=callers, seconds=seconds)
            for callers in self.callers(segmenter.cores.threads)
        }

    def speed(self, measurements: Sequence[Answers]) -> Speed:
        """Add measurements up, and take that number of callers, of those that asked, who got most answers in time.

        By Little's law, L = X W: so many callers always wait, each for the mean time of an answer.
        """
        speeds = []
        for callers in measurements[0]:
            seconds, windows = np.array([one for answers in measurements for one in answers[callers]]).T
            in_time = seconds <= (self.target_ms / 1e3 or math.inf)
            rate = float(callers * windows[in_time].sum() / seconds.sum())
            speeds.append(Speed(rate, 1e3 * float(np.quantile(seconds, 0.95))))
        return max(speeds)


def digest(pictures: Sequence[Pixels]) -> str:
    """Hash pictures, to tell whether others are the same."""
    return hashlib.sha256(b"".join(hashlib.sha256(one[:, :].tobytes()).digest() for one in pictures)).hexdigest()


def ask(segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, callers: int, seconds: float) -> list[Answered]:
    """Have callers ask for the pictures in turns for so long, each from another one on; all end with one that fails.

    A caller's first answer comes before the clock and is not counted: it meets sizes that are new, and a queue that is
    still filling, in which nobody waits as long as all do later. Raises any PenumbraError.
    """
    stop, pixels = Cancellation(), np.array([math.prod(one.shape[:2]) for one in pictures])
    is_whole = not segmenter.find(name).card.window.height
    sizes = pixels / pixels.mean() if is_whole else np.ones(len(pictures))

    def call(first: int) -> list[Answered]:
        answered: list[Answered] = []
        until = math.inf
        for i in itertools.count(first):
            begun, which = time.perf_counter(), i % len(pictures)
            answer = segmenter.segment(pictures[which], SegmentOptions(model=name), cancelled=stop)
            ended = time.perf_counter()
            answered.append((ended - begun, answer.num_windows * float(sizes[which])))
            if ended >= until:
                break
            until = min(until, ended + seconds)
        return answered[1:]

    pool = ThreadPoolExecutor(callers, thread_name_prefix="caller")
    try:
        return [one for own in pool.map(call, range(callers)) for one in own]
    finally:
        stop.set()
        pool.shutdown()


def few(items: Sequence[Any]) -> list[Any]:
    """Take a few, from the first to the last."""
    number = min(len(items), FEW)
    return [items[i * (len(items) - 1) // max(number - 1, 1)] for i in range(number)]


def remeasure(
    directory: Path, paths: Sequence[Path] = (), *, device: str = "", seconds: float = 3.0, threads: int = 0
) -> tuple[Speed, bool] | None:
    """Measure an artifact that was tuned once more under its load, on pictures or on its golden windows.

    Returns the speed, and whether pictures, processor and threads are those that it was tuned with.
    """
    card = artifact_card(directory)
    if not card.tuned:
        return None
    load = Load(card.tuned.load, card.tuned.target_ms)
    with Segmenter(limits=IN_MEMORY, device=device, threads=threads) as segmenter:
        segmenter.load(directory)
        pictures: list[Pixels] = [read_picture(path, card) for path in few(paths)]
        pictures = pictures or [one.image_HWC for one in segmenter.find(card.name).golden_inputs()]
        speed = load.speed([load.measure(segmenter, card.name, pictures, seconds=seconds)])
        return speed, segmenter.is_tuned_here(card) and digest(pictures) == card.tuned.pictures
