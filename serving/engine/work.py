"""What a request wants run, and how far that is: windows, samples, turns.

`penumbra.serving.engine.scheduler` moves it on.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from penumbra.models.errors import Cancelled, DeadlineExceeded, PenumbraError
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.noise import NoiseSource
from penumbra.serving.engine.prompts import PromptSource
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.windows import Window, WindowPlan

NORMAL = 2
STRIDES = {1: 1, NORMAL: 4, 3: 16}
"""Priority -> how far a sample moves its turn: while all have work, they get 16, 4 and 1 of 21 samples."""


class Cancellation(threading.Event):
    """The word that nobody waits for an answer any longer; it wakes whoever waits for something else meanwhile."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a request wants run. deadline: a time of `time.perf_counter`; cancelled: set it to withdraw; where it is a
    `Cancellation`, at once, and else with the batch at work.

    anytime: fewer samples, the same of every window and `least_samples` of them, are better than a missed deadline.
    first_row: of windows, where the rows before it were run already. in_background: is never refused and takes no
    place in the queue from others; for the few whose number is bounded elsewhere. priority: of `STRIDES`, 1 is first.
    """

    runtime: Runtime
    image_HW3: Raster
    plan: WindowPlan
    noise: NoiseSource
    num_samples: int
    prompt: PromptSource | None = None
    cancelled: threading.Event = field(default_factory=Cancellation)
    deadline: float = float("inf")
    anytime: bool = False
    first_row: int = 0
    in_background: bool = False
    priority: int = NORMAL
    least_samples: int = 1

    @property
    def num_windows(self) -> int:
        return (len(self.plan.starts_y) - self.first_row) * len(self.plan.starts_x)

    @property
    def first_window(self) -> int:
        """Its index in the plan."""
        return self.first_row * len(self.plan.starts_x)

    @property
    def window_pixels(self) -> int:
        return self.plan.window_height * self.plan.window_width

    def reserved(self, num_windows: int, num_samples: int) -> int:
        """What so many windows count in the queue."""
        return 0 if self.in_background else num_windows * num_samples


@dataclass(frozen=True, slots=True)
class Cores:
    """How processor cores are shared out to the batches that run at a time.

    threads: all cores. lanes: batches at a time, at most. widen: whether a window has more cores while there are fewer
    windows than lanes; how many it has may change how its sums are rounded.
    """

    threads: int
    lanes: int = 1
    widen: bool = True

    @property
    def least(self) -> int:
        """The cores that every batch has."""
        return self.threads // self.lanes

    def of_batch(self, num_windows: int) -> int:
        """The cores of a batch while there are so many windows."""
        return max(self.least, self.threads // num_windows) if self.widen else self.least


@dataclass(slots=True, eq=False)
class Level:
    """The requests of one priority. turn: of the level among levels; job_turn: of the job that it served last."""

    priority: int
    turn: float = 0.0
    job_turn: float = 0.0


class Job:
    """One admitted request. Its fields are guarded by the scheduler's condition; `work`, `submitted` and `answers` need
    no guard."""

    def __init__(self, work: Work, level: Level, *, lanes: int = 1) -> None:
        self.work, self.level, self._lanes = work, level, lanes
        self.begin(work.num_samples)
        self.ahead = 0
        """Windows taken from the plan and not yet consumed by the request's thread."""
        self.turn = level.job_turn
        self.answers: queue.SimpleQueue[tuple[Window, Moments] | PenumbraError] = queue.SimpleQueue()
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.run_s = 0.0

    def begin(self, num_samples: int) -> None:
        """Take the windows from the first one on, each with this many samples."""
        self.num_samples = num_samples
        self.windows = self.work.plan.windows(self.work.first_row)
        self.untaken = self.unanswered = self.work.num_windows

    def samples_within(self, most: int) -> int:
        """The samples of a window that is still to come, where no more than `most` are taken if that can be chosen."""
        return min(most, self.work.num_samples) if self.work.anytime and not self.started else self.num_samples

    @property
    def reserved(self) -> int:
        return self.work.reserved(self.unanswered, self.num_samples)

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Windows with equal keys can share a batch: same model, number of samples, size, and all or none prompted."""
        work, plan = self.work, self.work.plan
        return id(work.runtime), self.num_samples, plan.window_height, plan.window_width, work.prompt is None

    @property
    def has_room(self) -> bool:
        """Windows for every lane and one batch more may be ahead of what was stitched."""
        return self.untaken > 0 and self.ahead <= (self._lanes + 1) * self.work.runtime.windows_per_batch

    @property
    def precedence(self) -> tuple[float, int, float]:
        """The least of all is served next."""
        return self.level.turn, self.level.priority, self.turn

    def take(self) -> Window:
        """The next window, at the cost of the job's turn and its level's."""
        self.started = self.started or time.perf_counter()
        self.level.job_turn = self.turn
        self.untaken, self.ahead, self.turn = self.untaken - 1, self.ahead + 1, self.turn + self.num_samples
        self.level.turn += self.num_samples * STRIDES[self.level.priority]
        return next(self.windows)

    def wait(self) -> tuple[Window, Moments]:
        """The next window that is ready, for the request's thread. Raises what ends the request once it is known."""
        while True:
            left_s = min(max(self.work.deadline - time.perf_counter(), 0.0), threading.TIMEOUT_MAX)
            answer: tuple[Window, Moments] | PenumbraError | None = None
            with suppress(queue.Empty):
                answer = self.answers.get(timeout=left_s)
            answer = answer or self.ending(time.perf_counter())
            if isinstance(answer, PenumbraError):
                raise answer
            if answer:
                return answer

    def ending(self, now: float) -> PenumbraError | None:
        """Why the request is over before it is answered, if it is."""
        if self.work.cancelled.is_set():
            return Cancelled("the request was cancelled")
        if now > self.work.deadline:
            return DeadlineExceeded(f"the deadline passed after {now - self.submitted:.1f} s")
        return None
