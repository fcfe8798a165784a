"""How long work takes here, learnt from the batches that were run, and what therefore fits into a time."""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from weakref import WeakKeyDictionary

from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.work import Cores, Job

RECENT = 0.5
"""Weight of the newest batch: one disturbance is not believed, and two are."""
SPARE = 0.8
"""Share of the time left that work which is `anytime` plans with; the rest is for stitching, writing and surprises."""


class Pace:
    """Seconds by size (of samples, or of windows); straight lines between what was measured, from (0, 0) on.

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
        """0 while nothing is known."""
        points = sorted(self._known.items())
        if len(points) == 1:
            return 0.0
        above = min(bisect_right(points, (size,)), len(points) - 1)
        (size0, seconds0), (size1, seconds1) = points[above - 1 : above + 1]
        return max(seconds0 + (seconds1 - seconds0) * (size - size0) / (size1 - size0), 0.0)


class Paces:
    """The pace of every model that ran, per pixel, so that windows of any size tell of each other.

    Guarded by the scheduler's condition. Seconds of a batch count once for every core it had. target_s: a request of
    one window is to be answered within it; 0 is no target. It meets a batch at work and is in the next one, so a batch
    may take half of that.
    """

    def __init__(self, cores: Cores, target_s: float = 0.0) -> None:
        self._cores, self._batch_s = cores, target_s / 2
        self._of: WeakKeyDictionary[Runtime, Pace] = WeakKeyDictionary()
        self._of_batches: WeakKeyDictionary[Runtime, dict[int, Pace]] = WeakKeyDictionary()
        """Paces by number of samples."""

    def of(self, runtime: Runtime) -> Pace:
        """The pace of a model by number of samples, per window and pixel, times cores."""
        return self._of.setdefault(runtime, Pace())

    def learn(self, job: Job, num_samples: int, num_windows: int, seconds: float, *, cores: int) -> None:
        """From a batch of windows like those of a job."""
        pixel_s = seconds / job.work.window_pixels
        self.of(job.work.runtime).learn(num_samples, cores * pixel_s / num_windows)
        if self._batch_s and cores == self._cores.least:
            self._batches(job.work.runtime, num_samples).learn(num_windows, pixel_s)

    def room(self, job: Job) -> int:
        """Windows of a batch that a job leads: the most that end in time.

        Sizes are tried one after another, so the first that is late was by one window, and it is not tried again until
        all have become faster.
        """
        most = job.work.runtime.windows_per_batch
        if not self._batch_s:
            return most
        pace = self._batches(job.work.runtime, job.num_samples)
        for size in range(1, most + 1):
            if not pace.knows(size):
                return size
            if pace.seconds(size) * job.work.window_pixels > self._batch_s:
                return max(size - 1, 1)
        return most

    def _batches(self, runtime: Runtime, num_samples: int) -> Pace:
        return self._of_batches.setdefault(runtime, {}).setdefault(num_samples, Pace())

    def core_s(self, job: Job, num_samples: int, num_windows: int) -> float:
        """That windows of a job take; 0 while nothing is known of its model."""
        return num_windows * job.work.window_pixels * self.of(job.work.runtime).seconds(num_samples)

    def hasten(self, jobs: Sequence[Job]) -> None:
        """Give work that is `anytime` the most samples that end in time: before its first window is run, and again,
        from the first one on, where it would be late and fewer samples would not."""
        if not any(job.work.anytime for job in jobs):
            return
        now, num_others = time.perf_counter(), len(jobs) - 1

        @cache
        def queued_s(most: int) -> float:
            """All that waits, where what can still have fewer samples has at most so many."""
            return sum(self.core_s(job, job.samples_within(most), job.untaken) for job in jobs)

        for job in jobs:
            if job.work.anytime and job.untaken:
                self._fit(job, job.work.deadline - now, queued_s=queued_s, num_others=num_others)

    def _fit(self, job: Job, left_s: float, *, queued_s: Callable[[int], float], num_others: int) -> None:
        def needed_s(num_samples: int, num_windows: int) -> float:
            """In fair turns each other request takes at most as much as this one, and all at most what they have; a
            window takes its time however many lanes there are."""
            own_s = self.core_s(job, num_samples, num_windows)
            others_s = queued_s(num_samples) - self.core_s(job, job.samples_within(num_samples), job.untaken)
            shared_s = (own_s + min(others_s, own_s * num_others)) / self._cores.threads
            return max(shared_s, self.core_s(job, num_samples, 1) / self._cores.of_batch(num_windows + num_others))

        if job.started and needed_s(job.num_samples, job.untaken) <= left_s:
            return
        least = job.work.least_samples
        choices = range(least, job.num_samples if job.started else job.work.num_samples + 1)
        fitting = bisect_right(choices, SPARE * left_s, key=lambda s: needed_s(s, job.work.num_windows))
        if fitting or not job.started:
            job.begin(least + max(0, fitting - 1))
