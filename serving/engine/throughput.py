"""The throughput model: how long work takes here, learnt from the batches that were run, and what fits into a time."""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.runtime import Runtime

RECENT = 0.5
"""Weight of the newest batch: one disturbance is not believed, and two are."""
SPARE = 0.8
"""Share of the time left that work which is `anytime` plans with; the rest is for stitching, writing and surprises."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Processor cores are shared out to the batches that run at a time.

    threads: all cores. lanes: batches at a time, at most. widen: whether a window has more cores while there are fewer
    windows than lanes; how many it has may change how its sums are rounded.
    """

    threads: int
    lanes: int = 1
    widen: bool = True

    @property
    def least(self) -> int:
        """Count the cores that every batch has."""
        return self.threads // self.lanes

    def least_of(self, lanes: int) -> int:
        """Count the cores that every batch has of a model that was tuned for so many lanes; 0 leaves it at `least`."""
        return max(self.least, self.threads // lanes) if lanes and self.widen else self.least

    def of_batch(self, num_windows: int, lanes: int = 0) -> int:
        """Count the cores of a batch while there are so many windows. lanes: those that its model was tuned for."""
        return max(self.least_of(lanes), self.threads // num_windows) if self.widen else self.least


class SecondsBySize:
    """Seconds depend on a size (of samples, or of windows) by straight lines between measurements, from (0, 0) on.

    The first guess for a size below all that were measured leaves out what any size costs, so it is too small;
    measuring it once corrects it. Whatever slows one size down slows all.
    """

    def __init__(self) -> None:
        self._known = {0: 0.0}

    def learn(self, size: int, seconds: float) -> None:
        before = self._known.get(size, seconds)
        now = (1 - RECENT) * before + RECENT * seconds
        self._known = {known: known_s * now / before for known, known_s in self._known.items()} | {size: now}

    def knows(self, size: int) -> bool:
        return size in self._known

    def seconds(self, size: int) -> float:
        """Predict the seconds of a size; 0 while nothing is known."""
        points = sorted(self._known.items())
        if len(points) == 1:
            return 0.0
        above = min(bisect_right(points, (size,)), len(points) - 1)
        (size0, seconds0), (size1, seconds1) = points[above - 1 : above + 1]
        return max(seconds0 + (seconds1 - seconds0) * (size - size0) / (size1 - size0), 0.0)


class ThroughputModel:
    """A throughput model knows the seconds of every model that ran, per pixel, so that windows of any size count.

    Guarded by the scheduler's condition. Seconds of a batch count once for every core it had. target_s: a request of
    one window is to be answered within it; 0 is no target. It meets a batch at work and is in the next one, so a batch
    may take half of that.
    """

    def __init__(self, cores: Cores, target_s: float = 0.0) -> None:
        self._cores, self._batch_s = cores, target_s / 2
        self._by_samples: WeakKeyDictionary[Runtime, SecondsBySize] = WeakKeyDictionary()
        self._by_windows: WeakKeyDictionary[Runtime, dict[int, SecondsBySize]] = WeakKeyDictionary()
        """Seconds of batches by number of windows, for each number of samples."""

    def by_samples(self, runtime: Runtime) -> SecondsBySize:
        """Find a model's seconds by number of samples, per window and pixel, times cores."""
        return self._by_samples.setdefault(runtime, SecondsBySize())

    def learn(self, request: QueuedRequest, num_samples: int, num_windows: int, seconds: float, *, cores: int) -> None:
        """Learn from a batch of windows like those of a request."""
        pixel_s = seconds / request.window_pixels
        self.by_samples(request.plan.runtime).learn(num_samples, cores * pixel_s / num_windows)
        if self._batch_s and cores == self._cores.least_of(request.plan.runtime.lanes):
            self._batches(request.plan.runtime, num_samples).learn(num_windows, pixel_s)

    def batch_size(self, request: QueuedRequest) -> int:
        """Choose how many windows a batch has that a request leads: the most that end in time.

        Sizes are tried one after another, so the first that is late was by one window, and it is not tried again until
        all have become faster.
        """
        most = request.plan.runtime.windows_per_batch
        if not self._batch_s:
            return most
        known = self._batches(request.plan.runtime, request.num_samples)
        for size in range(1, most + 1):
            if not known.knows(size):
                return size
            if known.seconds(size) * request.window_pixels > self._batch_s:
                return max(size - 1, 1)
        return most

    def _batches(self, runtime: Runtime, num_samples: int) -> SecondsBySize:
        return self._by_windows.setdefault(runtime, {}).setdefault(num_samples, SecondsBySize())

    def core_s(self, request: QueuedRequest, num_samples: int, num_windows: int) -> float:
        """Predict what windows of a request take, in seconds times cores; 0 while nothing is known of its model."""
        return num_windows * request.window_pixels * self.by_samples(request.plan.runtime).seconds(num_samples)

    def fit_samples(self, requests: Sequence[QueuedRequest]) -> None:
        """Fit the samples of requests that are `anytime` to their deadlines: the most that end in time, before its
        first window is run, and again, from the first one on, where it would be late and fewer samples would not."""
        if not any(request.plan.is_anytime for request in requests):
            return
        now, num_others = time.perf_counter(), len(requests) - 1
        shares = sum(request.plan.share for request in requests)

        @cache
        def queued_s(most: int) -> float:
            """Sum all that waits, where what can still have fewer samples has at most so many."""
            return sum(self.core_s(one, one.samples_within(most), one.untaken) for one in requests)

        for request in requests:
            if request.plan.is_anytime and request.untaken:
                turns = shares / request.plan.share - 1
                self._fit(request, request.deadline - now, queued_s=queued_s, num_others=num_others, turns=turns)

    def _fit(
        self, request: QueuedRequest, left_s: float, *, queued_s: Callable[[int], float], num_others: int, turns: float
    ) -> None:  # fmt: skip
        def needed_s(num_samples: int, num_windows: int) -> float:
            """Others take at most their turns while this one takes its own, and at most what they have; a window takes
            its time however many lanes there are."""
            own_s = self.core_s(request, num_samples, num_windows)
            waiting_s = self.core_s(request, request.samples_within(num_samples), request.untaken)
            others_s = queued_s(num_samples) - waiting_s
            shared_s = (own_s + min(others_s, own_s * turns)) / self._cores.threads
            return max(shared_s, self.core_s(request, num_samples, 1) / self._cores.of_batch(num_windows + num_others))

        if request.started and needed_s(request.num_samples, request.untaken) <= left_s:
            return
        has_mutual_information = "mutual_information" in request.plan.options.outputs
        least = 2 if has_mutual_information and request.plan.num_views == 1 else 1
        choices = range(least, request.num_samples if request.started else request.plan.num_samples + 1)
        fitting = bisect_right(choices, SPARE * left_s, key=lambda s: needed_s(s, request.num_windows))
        if fitting or not request.started:
            chosen, law = least + max(0, fitting - 1), request.plan.sampling.law
            is_unpaired = law == "antithetic" and chosen % 2 == 1 and chosen > least  # which is worse than one fewer
            request.restart(chosen - is_unpaired)
