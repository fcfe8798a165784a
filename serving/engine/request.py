"""One admitted request: its windows, its virtual time in the queue, its answers, and the bands that they become.

`penumbra.serving.engine.scheduler` runs its windows; whoever iterates it gets the rows of the answer.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from penumbra.models.errors import Cancelled, DeadlineExceeded, PenumbraError
from penumbra.serving.engine.canvas import Landing, Surface, read_band, stitch
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.plan import RequestPlan
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.scale import at_size
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.uncertainty import Band, counted, withhold_classes, withhold_void
from penumbra.serving.engine.windows import Window

NORMAL = 2
"""The priority of a request that names none."""
STRIDES = {1: 1, NORMAL: 4, 3: 16}
"""Priority -> how far a sample moves its virtual time: while all have work, they get 16, 4 and 1 of 21 samples."""

Progress = Callable[[int, int], object]
"""Takes how many windows are done, and how many there are."""
Finished = tuple[Window, Moments | Landing]
Run = Callable[["QueuedRequest", Progress], Generator[Band]]
"""Gives a request's bands from the first that is due: `QueuedRequest.bands` here, and others on other machines."""


class Cancellation(threading.Event):
    """A cancellation says that nobody waits for an answer any longer; it wakes whoever waits for something else."""

    def __init__(self) -> None:
        super().__init__()
        self._wakes: list[Callable[[], object]] = []

    def set(self) -> None:
        super().set()
        for wake in list(self._wakes):
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], object]) -> Iterator[None]:
        """Call `wake`, from whatever thread says it, if that is said within the `with` block or was before."""
        self._wakes.append(wake)
        try:
            if self.is_set():
                wake()
            yield
        finally:
            self._wakes.remove(wake)


@dataclass(slots=True, eq=False)
class PriorityClass:
    """The requests of one priority share a class.

    virtual_time: of the class among the classes. request_time: what one that comes now begins with: what those that
    are there have been served, per share. due: what the window that was taken last adds to it.
    """

    priority: int
    virtual_time: float = 0.0
    request_time: float = 0.0
    due: float = 0.0


class Queue(Protocol):
    """What a request asks of the scheduler that runs its windows."""

    def submit(self, request: "QueuedRequest") -> "QueuedRequest": ...

    def consumed(self, request: "QueuedRequest") -> None: ...

    def withdraw(self, request: "QueuedRequest") -> None: ...

    def cancel(self, request: "QueuedRequest") -> None: ...


class QueuedRequest(AbstractContextManager["QueuedRequest"]):
    """A request runs while it is iterated. It enters the queue with the first band, and what has not run leaves
    it when the caller stops, so that nothing stays there that nobody waits for. Iterate once.

    Bands are the answer's rows as they become final. Where it is `anytime`, fewer samples can be found to be enough
    while it runs; bands then come from the first one again, and those before are void. Pixels without a measurement
    have the label IGNORE, and NaN for maps and probabilities.

    timing_ms: milliseconds by phase; `total` is clocked by whoever iterates. num_samples: of the answer so far. What
    comes from `enter` on is the queue's, guarded by the scheduler's condition; all before is for the request's thread.
    """

    def __init__(
        self, scheduler: Queue, plan: RequestPlan, image_HWC: Raster, *,
        cancelled: threading.Event | None = None, deadline: float = float("inf"), from_y: int | None = None,
    ) -> None:  # fmt: skip
        """cancelled: set it to withdraw; where it is a `Cancellation`, at once, and else with the batch at work.
        deadline: a time of `time.perf_counter`. from_y: of long work, the row of the image whose band is the first;
        it is never refused and takes no place in the queue from others, so its number is bounded elsewhere.
        """
        assert image_HWC.shape[:2] == plan.windows.size
        self.plan, self.image_HWC = plan, image_HWC
        self._scaled_HWC = at_size(image_HWC, (plan.windows.height, plan.windows.width))
        self.cancelled, self.deadline = cancelled or Cancellation(), deadline
        self.in_background = from_y is not None
        self.timing_ms = dict.fromkeys(("queue", "run", "stitch", "read_out", "total"), 0.0)
        self.first_y = plan.windows.band_of(from_y or 0)
        self._first_row = plan.windows.row_before(self.first_y)
        self.withheld = {*plan.wanted.withheld} if self.first_y else set[int]()
        """Those of the classes withheld altogether that occur, or may: what lies above `from_y` is not seen again."""
        self._scheduler, self._listening = scheduler, ExitStack()
        self.surface: Surface | None = None
        """Its canvas, made with the first window: by its own thread, or on a GPU by the lane, which stitches there."""
        self.restart(plan.num_samples)

    def __iter__(self) -> Iterator[Band]:
        return self.bands()

    def bands(self, progress: Progress = lambda num_done, num_windows: None) -> Generator[Band]:
        """Run the request and yield its bands. progress: called at first and after every window.

        Raises any PenumbraError.
        """
        with self._scheduler.submit(self):
            progress(self.first_window, self.plan.windows.num_windows)
            for window, answer in self.finished():
                progress(window.index + 1, self.plan.windows.num_windows)
                for band in self._stitch(window, answer):
                    withhold_void(band)
                    self.withheld |= withhold_classes(band, self.plan.wanted.withheld)
                    yield counted(band)
        assert self.started
        self.timing_ms["queue"] = 1e3 * (self.started - self.submitted)
        self.timing_ms["run"] = 1e3 * self.run_s

    def _stitch(self, window: Window, answer: Moments | Landing) -> Iterator[Band]:
        """Yield the bands that a window finishes. What a GPU answers with was stitched there."""
        if isinstance(answer, Landing):
            yield from answer.bands()
            return
        card, plan = self.plan.card, self.plan
        if window.index == self.first_window:
            self.surface = plan.runtime.surface(self.image_HWC, plan.windows, plan.wanted, first_y=self.first_y)
        assert self.surface
        with self.clock("stitch"):
            if (window.height, window.width) == self._scaled_HWC.shape[:2]:  # there is nothing to blend it with
                self.surface.canvas_RCW = answer.stats_hCw
                if answer.num_samples > 1:
                    answer.stats_hCw.numpy()[:, : card.num_classes + 1] *= np.float32(1 / answer.num_samples)
            else:
                stitch(answer.stats_hCw[None], [(self.surface, window)], card, answer.num_samples)
        for rows in self.surface.pieces(window):
            with self.clock("read_out"):
                laid_out = self.surface.lay_out(rows, card, answer.num_samples)
                band = read_band(self.surface.rows_of(rows, card), *laid_out, card)
            yield band

    def finished(self) -> Iterator[Finished]:
        """Yield finished windows in the plan's order, once the request is submitted.

        Where the moments have another number of samples than those before, windows come from the first one on again.
        """
        num_samples, due = 0, self.first_window
        early: dict[int, Finished] = {}
        """Windows that another lane had ready before those that come first."""
        while due < self.plan.windows.num_windows:
            window, moments = self._wait()
            if moments.num_samples != num_samples:
                for _ in early:
                    self._scheduler.consumed(self)
                num_samples, due, early = moments.num_samples, self.first_window, {}
            early[window.index] = window, moments
            while due in early:
                self._scheduler.consumed(self)
                yield early.pop(due)
                due += 1

    def _wait(self) -> Finished:
        """Wait for the next window that is ready. Raises what ends the request once it is known."""
        while True:
            left_s = min(max(self.deadline - time.perf_counter(), 0.0), threading.TIMEOUT_MAX)
            answer: Finished | PenumbraError | None = None
            with suppress(queue.Empty):
                answer = self.answers.get(timeout=left_s)
            answer = answer or self.ending(time.perf_counter())
            if isinstance(answer, PenumbraError):
                try:
                    raise answer
                finally:
                    del answer  # it knows this frame: a circle, which would keep the picture until it is collected
            if answer:
                return answer

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time spent in a `with` block to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing_ms[phase] += 1e3 * (time.perf_counter() - started)

    def __exit__(self, *_: object) -> None:
        """Withdraw what has not run."""
        self._listening.close()
        self._scheduler.withdraw(self)

    def enter(self, priority_class: PriorityClass, *, lanes: int) -> None:
        """Take a place in the queue."""
        self.priority_class, self._lanes = priority_class, lanes
        self.virtual_time = priority_class.request_time
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.run_s = 0.0
        self.ahead = 0
        """Windows taken from the plan and not yet consumed by the request's thread."""
        self.answers: queue.SimpleQueue[Finished | PenumbraError] = queue.SimpleQueue()
        if isinstance(self.cancelled, Cancellation):
            self._listening.enter_context(self.cancelled.waking(partial(self._scheduler.cancel, self)))

    def restart(self, num_samples: int) -> None:
        """Take the windows from the first one on, each with this many samples."""
        self.num_samples = num_samples
        self._windows = self.plan.windows.windows(self._first_row)
        self.untaken = self.unanswered = self.num_windows

    @property
    def num_windows(self) -> int:
        """Count the windows to run."""
        return self.plan.windows.num_windows - self.first_window

    @property
    def first_window(self) -> int:
        """Give the first window's index in the plan."""
        return self._first_row * len(self.plan.windows.starts_x)

    @property
    def window_pixels(self) -> int:
        """Count the pixels that are run for a window: views take as long as other windows do, one after another."""
        return self.plan.windows.window_height * self.plan.windows.window_width * self.plan.num_views

    def samples_within(self, most: int) -> int:
        """Count the samples of a coming window, if no more than `most` are taken where that can be chosen."""
        return min(most, self.plan.num_samples) if self.plan.is_anytime and not self.started else self.num_samples

    @property
    def reserved(self) -> int:
        """Count what the request takes of the queue: windows x samples x views without an answer."""
        return 0 if self.in_background else self.unanswered * self.num_members

    @property
    def num_members(self) -> int:
        """Count what a window costs and its answer holds: every sample in every view."""
        return self.num_samples * self.plan.num_views

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Windows with equal keys can share a batch: same model, samples, views and size, and all or none prompted."""
        windows = self.plan.windows
        size = windows.window_height, windows.window_width
        return id(self.plan.runtime), self.num_samples, self.plan.views, size, self.plan.prompt is None

    @property
    def has_room(self) -> bool:
        """Tell whether a window may run: those for every lane and one batch more may be ahead of what was stitched."""
        return self.untaken > 0 and self.ahead <= (self._lanes + 1) * self.plan.runtime.windows_per_batch

    @property
    def precedence(self) -> tuple[float, int, float]:
        """Rank the request; the least of all is served next."""
        return self.priority_class.virtual_time, self.priority_class.priority, self.virtual_time

    def input_of(self, window: Window, num_samples: int) -> WindowInput:
        """Give what a lane runs for a window. Called in the plan's order."""
        plan = self.plan
        if window.index == self.first_window and plan.runtime.stays_on_device:
            self.surface = plan.runtime.surface(self.image_HWC, plan.windows, plan.wanted, first_y=self.first_y)
        noise_SL = plan.noise.draw(window.index)[:num_samples]
        wanted = plan.wanted if plan.windows.num_windows == 1 and not plan.windows.answer else None
        return WindowInput(
            self._scaled_HWC, window, plan.windows, noise_SL, plan.prompt, self.surface, plan.views, wanted
        )  # fmt: skip

    def take(self, shares: int) -> Window:
        """Take the next window, at the cost of the request's virtual time and its class's. shares: of all requests of
        its class that have windows left; whoever comes now begins later, so that it keeps its part of them."""
        self.started = self.started or time.perf_counter()
        self.untaken -= 1
        self.ahead += 1
        self.virtual_time += self.num_members / self.plan.share
        its_class = self.priority_class
        its_class.request_time += its_class.due
        its_class.due = self.num_members / shares
        its_class.virtual_time += self.num_members * STRIDES[its_class.priority]
        return next(self._windows)

    def ending(self, now: float) -> PenumbraError | None:
        """Say why the request is over before it is answered, if it is."""
        if self.cancelled.is_set():
            return Cancelled("the request was cancelled")
        if now > self.deadline:
            return DeadlineExceeded(f"the deadline passed after {now - self.submitted:.1f} s")
        return None
