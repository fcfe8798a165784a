"""One inference thread per device: windows of all requests and models, in fair turns and shared batches.

The batch element is a window, never a request. Requests of one priority take turns by work done (windows x samples),
so a huge image cannot starve a small one; priorities share the device by `STRIDES`, so none starves another; a request
is only ever a few windows ahead of what its thread has stitched, so memory does not depend on its size. Promises: every
window of a request is answered exactly once, with its moments or with the error that ends the request; a failing batch
fails only the requests whose own windows fail; a cancelled or expired request's windows leave the queue before the
next batch.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import torch

from models.errors import Cancelled, DeadlineExceeded, ModelFault, NotReady, PenumbraError, QueueFull
from serving.engine.moments import Moments
from serving.engine.noise import NoiseSource
from serving.engine.observer import Observer
from serving.engine.prompts import PromptSource
from serving.engine.raster import Pixels
from serving.engine.runtime import Piece, Runtime, is_out_of_memory
from serving.engine.windows import Window, WindowPlan, cut

log = logging.getLogger("penumbra")
T = TypeVar("T")
Answer = Moments | PenumbraError
NORMAL = 2
STRIDES = {1: 1, NORMAL: 4, 3: 16}
"""Priority -> how far a sample moves its turn: while all have work, they get 16, 4 and 1 of 21 samples."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a request wants run. deadline: a time of `time.perf_counter`; cancelled: set it to withdraw.

    first_row: of windows, where the rows before it were run already. in_background: is never refused and takes no
    place in the queue from others; for the few whose number is bounded elsewhere. priority: of `STRIDES`, 1 is first.
    """

    runtime: Runtime
    image_HW3: Pixels
    plan: WindowPlan
    noise: NoiseSource
    num_samples: int
    prompt: PromptSource | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float = float("inf")
    first_row: int = 0
    in_background: bool = False
    priority: int = NORMAL

    @property
    def num_windows(self) -> int:
        return (len(self.plan.starts_y) - self.first_row) * len(self.plan.starts_x)

    @property
    def reserved_per_window(self) -> int:
        return 0 if self.in_background else self.num_samples

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Windows with equal keys can share a batch: same model, number of samples, size, and all or none prompted."""
        plan = self.plan
        return id(self.runtime), self.num_samples, plan.window_height, plan.window_width, self.prompt is None


@dataclass(slots=True, eq=False)
class _Level:
    """The requests of one priority. turn: of the level among levels; job_turn: of the job that it served last."""

    priority: int
    turn: float = 0.0
    job_turn: float = 0.0


class _Job:
    """One admitted request. All fields but `answers` are guarded by the scheduler's condition."""

    def __init__(self, work: Work, level: _Level) -> None:
        self.work, self.level = work, level
        self.windows = work.plan.windows(work.first_row)
        self.unanswered = work.num_windows
        self.ahead = 0
        """Windows taken from the plan and not yet consumed by the request's thread."""
        self.untaken = work.num_windows
        self.turn = level.job_turn
        self.answers: queue.SimpleQueue[tuple[Window, Moments] | PenumbraError] = queue.SimpleQueue()
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.run_s = 0.0

    @property
    def has_room(self) -> bool:
        return self.untaken > 0 and self.ahead <= 2 * self.work.runtime.windows_per_batch

    @property
    def precedence(self) -> tuple[float, int, float]:
        """The least of all is served next."""
        return self.level.turn, self.level.priority, self.turn

    def take(self) -> Window:
        """The next window, at the cost of the job's turn and its level's."""
        self.started = self.started or time.perf_counter()
        self.level.job_turn = self.turn
        self.untaken, self.ahead, self.turn = self.untaken - 1, self.ahead + 1, self.turn + self.work.num_samples
        self.level.turn += self.work.num_samples * STRIDES[self.level.priority]
        return next(self.windows)

    def ending(self, now: float) -> PenumbraError | None:
        """Why the request is over before it is answered, if it is."""
        if self.work.cancelled.is_set():
            return Cancelled("the request was cancelled")
        if now > self.work.deadline:
            return DeadlineExceeded(f"the deadline passed after {now - self.submitted:.1f} s")
        return None


class Stream:
    """A request's finished windows, in the plan's order. Leaving the `with` block withdraws the rest."""

    def __init__(self, scheduler: "Scheduler", job: _Job) -> None:
        self._scheduler, self._job = scheduler, job

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler._withdraw(self._job)

    def __iter__(self) -> Iterator[tuple[Window, Moments]]:
        for _ in range(self._job.work.num_windows):
            answer = self._job.answers.get()
            if isinstance(answer, PenumbraError):
                raise answer
            self._scheduler._consumed(self._job)
            yield answer

    @property
    def queue_s(self) -> float:
        """Seconds from submission to the start of the first window's batch."""
        return (self._job.started or time.perf_counter()) - self._job.submitted

    @property
    def run_s(self) -> float:
        """Seconds of inference so far, this request's share of its batches."""
        return self._job.run_s


class Scheduler:
    """Runs submitted work in its own thread, which is the only one that enters a torch parallel region."""

    def __init__(self, *, queue_samples: int, threads: int, observer: Observer) -> None:
        self._queue_samples, self._threads, self._observer = queue_samples, threads, observer
        self._condition = threading.Condition()
        self._jobs: list[_Job] = []
        self._calls: list[tuple[Callable[[], object], Future[object]]] = []
        self._reserved = 0
        self._levels = {priority: _Level(priority) for priority in STRIDES}
        self._turn = 0.0
        """Of the level that was served last: one that comes back after a pause does not make up for it."""
        self._samples_per_s = 0.0
        self._draining = False
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="inference", daemon=True)
        self._thread.start()

    # -- called by request threads ---------------------------------------------------------------

    def submit(self, work: Work) -> Stream:
        """Admit work. Raises QueueFull over the limit and NotReady while draining."""
        cost = work.num_windows * work.reserved_per_window
        with self._condition:
            if self._draining:
                raise NotReady("the server is draining and takes no new work; ask another replica")
            if cost and self._reserved and self._reserved + cost > self._queue_samples:
                raise QueueFull(
                    f"the queue holds {self._reserved} of {self._queue_samples} window-samples and this request "
                    f"needs {cost}; try again in {self._retry_after_s} s",
                    retry_after_s=self._retry_after_s,
                )
            self._reserved += cost
            level = self._levels[work.priority]
            level.turn = max(level.turn, self._turn)
            job = _Job(work, level)
            self._jobs.append(job)
            self._condition.notify_all()
        return Stream(self, job)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the inference thread, between batches, and return its result."""
        future: Future[T] = Future()
        with self._condition:
            if self._stopped:
                raise NotReady("the engine is closed")
            self._calls.append((function, future))  # type: ignore[arg-type]
            self._condition.notify_all()
        return future.result()

    @property
    def queued(self) -> tuple[int, int]:
        """Windows, and windows x samples, that were admitted and are not yet answered."""
        with self._condition:
            return sum(job.unanswered for job in self._jobs), self._reserved

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def drain(self) -> None:
        """Refuse new work from now on; accepted work goes on."""
        with self._condition:
            self._draining = True

    def close(self) -> None:
        """Finish accepted work, then end the thread."""
        with self._condition:
            self._draining = self._stopped = True
            self._condition.notify_all()
        self._thread.join()

    @property
    def _retry_after_s(self) -> int:
        return int(min(60, 1 + self._reserved / self._samples_per_s)) if self._samples_per_s else 1

    def _consumed(self, job: _Job) -> None:
        with self._condition:
            job.ahead -= 1
            self._condition.notify_all()

    def _withdraw(self, job: _Job) -> None:
        with self._condition:
            self._forget(job)

    # -- the inference thread ---------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while True:
                calls, batch = self._wait()
                if not calls and not batch:
                    return
                for function, future in calls:
                    _resolve(future, function)
                if batch:
                    self._run_batch(batch)
        finally:
            self._abandon()

    def _wait(self) -> tuple[list[tuple[Callable[[], object], Future[object]]], list[tuple[_Job, Window]]]:
        """Sleep until there are calls or a batch; both empty means: stopped and nothing left to do."""
        with self._condition:
            while True:
                calls, self._calls = self._calls, []
                batch = self._take()
                if calls or batch or (self._stopped and not self._jobs):
                    return calls, batch
                self._condition.wait()

    def _take(self) -> list[tuple[_Job, Window]]:
        """The next batch: the request whose turn it is, and others whose windows fit beside its own."""
        self._end_withdrawn()
        ready = [job for job in self._jobs if job.has_room]
        if not ready:
            return []
        lead = min(ready, key=lambda job: job.precedence)
        self._turn = lead.level.turn
        ready = [job for job in ready if job.work.batch_key == lead.work.batch_key]
        batch: list[tuple[_Job, Window]] = []
        while ready and len(batch) < lead.work.runtime.windows_per_batch:
            job = min(ready, key=lambda job: job.precedence)
            batch.append((job, job.take()))
            ready = [job for job in ready if job.has_room]
        return batch

    def _end_withdrawn(self) -> None:
        now = time.perf_counter()
        for job in list(self._jobs):
            error = job.ending(now)
            if error:
                self._end(job, error)

    def _run_batch(self, batch: list[tuple[_Job, Window]]) -> None:
        started = time.perf_counter()
        answers = self._answer(batch)
        seconds = time.perf_counter() - started
        runtime, num_samples = batch[0][0].work.runtime, batch[0][0].work.num_samples
        rate = len(batch) * num_samples / seconds
        with self._condition:
            self._samples_per_s = rate if not self._samples_per_s else 0.9 * self._samples_per_s + 0.1 * rate
            for (job, window), answer in zip(batch, answers, strict=True):
                job.run_s += seconds / len(batch)
                self._deliver(job, window, answer)
        self._observer.batch_done(
            runtime.card.name, windows=len(batch), capacity=runtime.windows_per_batch,
            samples=len(batch) * num_samples,
        )  # fmt: skip

    def _answer(self, batch: list[tuple[_Job, Window]]) -> list[Answer]:
        """Run a batch; on failure, in parts: halves when memory is short, else request by request."""
        runtime = batch[0][0].work.runtime
        try:
            return list(runtime.run([_piece(job.work, window) for job, window in batch]))
        except Exception as error:
            if is_out_of_memory(error) and len(batch) > 1:
                self._observer.out_of_memory(runtime.card.name)
                runtime.windows_per_batch = max(1, len(batch) // 2)
                half = len(batch) // 2
                return self._answer(batch[:half]) + self._answer(batch[half:])
            if len({job for job, _ in batch}) > 1:
                return self._answer_apart(batch)
            if isinstance(error, PenumbraError):  # the image's fault: a file that breaks off under the last rows
                return [error] * len(batch)
            log.exception("%s failed on a batch of %d windows", runtime.card.name, len(batch))
            return [ModelFault(f"{runtime.card.name} failed on this image")] * len(batch)

    def _answer_apart(self, batch: list[tuple[_Job, Window]]) -> list[Answer]:
        """Run each request's windows by themselves, and put the answers back in the batch's order."""
        answers: dict[int, Answer] = {}
        for one in dict.fromkeys(job for job, _ in batch):
            places = [i for i, (job, _) in enumerate(batch) if job is one]
            answers |= dict(zip(places, self._answer([batch[i] for i in places]), strict=True))
        return [answers[i] for i in range(len(batch))]

    def _deliver(self, job: _Job, window: Window, answer: Answer) -> None:
        if job not in self._jobs:
            return
        if isinstance(answer, PenumbraError):
            self._end(job, answer)
            return
        job.answers.put((window, answer))
        job.unanswered -= 1
        self._reserved -= job.work.reserved_per_window
        if job.unanswered == 0:
            self._jobs.remove(job)

    def _end(self, job: _Job, error: PenumbraError) -> None:
        self._forget(job)
        job.answers.put(error)

    def _forget(self, job: _Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            self._reserved -= job.unanswered * job.work.reserved_per_window

    def _abandon(self) -> None:
        """The thread ends: nobody may wait for it, whatever ended it."""
        with self._condition:
            self._draining = self._stopped = True
            for job in list(self._jobs):
                self._end(job, ModelFault("the inference thread ended before this request was answered"))
            for _, future in self._calls:
                future.set_exception(NotReady("the engine is closed"))
            self._calls = []


def _piece(work: Work, window: Window) -> Piece:
    card = work.runtime.card
    pixels = cut(work.image_HW3, window, work.plan, spec=card.window, norm=card.input)
    prompt = work.prompt.cut(window, work.plan) if work.prompt else None
    return Piece(pixels, work.noise.draw(window.index), prompt)


def _resolve(future: Future[object], function: Callable[[], object]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # handed to the caller, who re-raises it
        future.set_exception(error)
