"""How long work takes here, learnt from the batches that were run, and how many samples end before a deadline."""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from weakref import WeakKeyDictionary

from serving.engine.runtime import Runtime
from serving.engine.work import Job

RECENT = 0.5
"""Weight of the newest batch: one disturbance is not believed, and two are."""
SPARE = 0.8
"""Share of the time left that work which is `anytime` plans with; the rest is for stitching, writing and surprises."""


class Pace:
    """Seconds per pixel of a window by its number of samples; straight lines between what was measured, from (0, 0) on.

    The first guess for fewer samples than ever measured leaves out what a window costs without them, so it is too
    small; measuring it once corrects it. Whatever slows one number of samples down slows all.
    """

    def __init__(self) -> None:
        self._points = [(0, 0.0)]

    def learn(self, num_samples: int, seconds: float) -> None:
        known = dict(self._points)
        before = known.get(num_samples, seconds)
        now = (1 - RECENT) * before + RECENT * seconds
        known = {number: known_s * now / before for number, known_s in known.items()} | {num_samples: now}
        self._points = sorted(known.items())

    def seconds(self, num_samples: int) -> float:
        """0 while nothing is known."""
        if len(self._points) == 1:
            return 0.0
        above = min(bisect_right(self._points, (num_samples,)), len(self._points) - 1)
        (s0, t0), (s1, t1) = self._points[above - 1 : above + 1]
        return max(t0 + (t1 - t0) * (num_samples - s0) / (s1 - s0), 0.0)


class Paces:
    """The pace of every model that ran. Used by the inference thread."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Runtime, Pace] = WeakKeyDictionary()

    def learn(self, job: Job, num_windows: int, seconds: float) -> None:
        """From a batch of windows like those of a job."""
        pace = self._of.setdefault(job.work.runtime, Pace())
        pace.learn(job.num_samples, seconds / (num_windows * job.work.window_pixels))

    def seconds(self, job: Job, num_samples: int, num_windows: int) -> float:
        """That windows of a job take; 0 while nothing is known of its model."""
        pace = self._of.get(job.work.runtime)
        return num_windows * job.work.window_pixels * pace.seconds(num_samples) if pace else 0.0

    def hasten(self, jobs: Sequence[Job]) -> None:
        """Give work that is `anytime` the most samples that end in time: before its first window is run, and again,
        from the first one on, where it would be late and fewer samples would not."""
        if not any(job.work.anytime for job in jobs):
            return
        now, num_others = time.perf_counter(), len(jobs) - 1

        @cache
        def queued_s(most: int) -> float:
            """All that waits, where what can still have fewer samples has at most so many."""
            return sum(self.seconds(job, job.samples_within(most), job.untaken) for job in jobs)

        for job in jobs:
            if job.work.anytime and job.untaken:
                self._fit(job, job.work.deadline - now, queued_s=queued_s, num_others=num_others)

    def _fit(self, job: Job, left_s: float, *, queued_s: Callable[[int], float], num_others: int) -> None:
        def needed_s(num_samples: int, num_windows: int) -> float:
            """In fair turns each other request takes at most as much as this one, and all at most what they have."""
            own_s = self.seconds(job, num_samples, num_windows)
            others_s = queued_s(num_samples) - self.seconds(job, job.samples_within(num_samples), job.untaken)
            return own_s + min(others_s, own_s * num_others)

        if job.started and needed_s(job.num_samples, job.untaken) <= left_s:
            return
        choices = range(1, job.num_samples if job.started else job.work.num_samples + 1)
        fitting = bisect_right(choices, SPARE * left_s, key=lambda s: needed_s(s, job.work.num_windows))
        if fitting or not job.started:
            job.begin(max(1, fitting))
