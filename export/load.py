"""A load on the engine: callers who each wait for an answer before they ask again, and how fast they are answered."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.request import Cancellation
from penumbra.serving.engine.segmenter import Segmenter

LEAST_CALLERS = 8
"""Enough to fill the lanes of a small machine, with others waiting."""
Answered = tuple[float, int]
"""Seconds that a caller waited, and windows of the answer."""
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


def ask(segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, callers: int, seconds: float) -> list[Answered]:
    """Have callers ask for the pictures in turns for so long, each at least once; all end with one that fails.

    Raises any PenumbraError.
    """
    stop, until = Cancellation(), time.perf_counter() + seconds

    def call(first: int) -> list[Answered]:
        answered: list[Answered] = []
        for i in itertools.count(first, callers):
            begun = time.perf_counter()
            answer = segmenter.segment(pictures[i % len(pictures)], SegmentOptions(model=name), cancelled=stop)
            ended = time.perf_counter()
            answered.append((ended - begun, answer.num_windows))
            if ended >= until:
                break
        return answered

    pool = ThreadPoolExecutor(callers, thread_name_prefix="caller")
    try:
        return [one for own in pool.map(call, range(callers)) for one in own]
    finally:
        stop.set()
        pool.shutdown()
