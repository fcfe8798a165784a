"""One inference thread per device: windows of all requests and models, in fair turns and shared batches.

The batch element is a window, never a request. Requests of one priority take turns by work done (windows x samples),
so a huge image cannot starve a small one; priorities share the device by `STRIDES`, so none starves another; a request
is only ever a few windows ahead of what its thread has stitched, so memory does not depend on its size. Promises: every
window of a request is answered exactly once, with its moments or with the error that ends the request; a failing batch
fails only the requests whose own windows fail; a cancelled or expired request's windows leave the queue before the
next batch.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

import torch

from models.errors import ModelFault, NotReady, PenumbraError, QueueFull
from serving.engine.moments import Moments
from serving.engine.observer import Observer
from serving.engine.pace import Paces
from serving.engine.runtime import Piece, Runtime, is_out_of_memory
from serving.engine.windows import Window, cut
from serving.engine.work import STRIDES, Job, Level, Work

log = logging.getLogger("penumbra")
T = TypeVar("T")
Answer = Moments | PenumbraError


class Stream:
    """A request's finished windows, in the plan's order. Leaving the `with` block withdraws the rest.

    Where the moments have another number of samples than those before, work that is `anytime` has begun again: windows
    come from the first one on, and those before are void.
    """

    def __init__(self, scheduler: "Scheduler", job: Job) -> None:
        self._scheduler, self._job = scheduler, job

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler._withdraw(self._job)

    def __iter__(self) -> Iterator[tuple[Window, Moments]]:
        num_samples, missing = 0, 1
        while missing:
            answer = self._job.answers.get()
            if isinstance(answer, PenumbraError):
                raise answer
            if answer[1].num_samples != num_samples:
                num_samples, missing = answer[1].num_samples, self._job.work.num_windows
            missing -= 1
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

    def __init__(self, *, queue_samples: int, threads: int, observer: Observer, target_s: float = 0.0) -> None:
        """target_s: of `Paces`."""
        self._queue_samples, self._threads, self._observer = queue_samples, threads, observer
        self._condition = threading.Condition()
        self._jobs: list[Job] = []
        self._calls: list[tuple[Callable[[], object], Future[object]]] = []
        self._paces = Paces(target_s)
        self._levels = {priority: Level(priority) for priority in STRIDES}
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
        cost = work.reserved(work.num_windows, work.num_samples)
        with self._condition:
            if self._draining:
                raise NotReady("the server is draining and takes no new work; ask another replica")
            reserved = self._reserved
            if cost and reserved and reserved + cost > self._queue_samples:
                raise QueueFull(
                    f"the queue holds {reserved} of {self._queue_samples} window-samples and this request "
                    f"needs {cost}; try again in {self._retry_after_s} s",
                    retry_after_s=self._retry_after_s,
                )
            level = self._levels[work.priority]
            level.turn = max(level.turn, self._turn)
            job = Job(work, level)
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
    def _reserved(self) -> int:
        return sum(job.reserved for job in self._jobs)

    @property
    def _retry_after_s(self) -> int:
        return int(min(60, 1 + self._reserved / self._samples_per_s)) if self._samples_per_s else 1

    def _consumed(self, job: Job) -> None:
        with self._condition:
            job.ahead -= 1
            self._condition.notify_all()

    def _withdraw(self, job: Job) -> None:
        with self._condition:
            self._forget(job)

    def get_to_know(self, runtime: Runtime) -> None:
        """Measure a model's pace before its first request. Only within a `call`."""
        for num_samples, pixel_s in runtime.seconds_per_pixel():
            self._paces.of(runtime).learn(num_samples, pixel_s)

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

    def _wait(self) -> tuple[list[tuple[Callable[[], object], Future[object]]], list[tuple[Job, Window]]]:
        """Sleep until there are calls or a batch; both empty means: stopped and nothing left to do."""
        with self._condition:
            while True:
                calls, self._calls = self._calls, []
                batch = self._take()
                if calls or batch or (self._stopped and not self._jobs):
                    return calls, batch
                self._condition.wait()

    def _take(self) -> list[tuple[Job, Window]]:
        """The next batch: the request whose turn it is, and others whose windows fit beside its own."""
        self._end_withdrawn()
        self._paces.hasten(self._jobs)
        ready = [job for job in self._jobs if job.has_room]
        if not ready:
            return []
        lead = min(ready, key=lambda job: job.precedence)
        self._turn = lead.level.turn
        ready = [job for job in ready if job.batch_key == lead.batch_key]
        batch: list[tuple[Job, Window]] = []
        room = self._paces.room(lead)
        while ready and len(batch) < room:
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

    def _run_batch(self, batch: list[tuple[Job, Window]]) -> None:
        started = time.perf_counter()
        answers = self._answer(batch)
        seconds = time.perf_counter() - started
        job = batch[0][0]
        runtime, num_samples = job.work.runtime, job.num_samples
        rate = len(batch) * num_samples / seconds
        self._paces.learn(job, len(batch), seconds)
        with self._condition:
            self._samples_per_s = rate if not self._samples_per_s else 0.9 * self._samples_per_s + 0.1 * rate
            self._end_withdrawn()  # a deadline that passed during its last batch is missed, too
            for (job, window), answer in zip(batch, answers, strict=True):
                job.run_s += seconds / len(batch)
                self._deliver(job, window, answer)
        self._observer.batch_done(
            runtime.card.name, windows=len(batch), capacity=runtime.windows_per_batch,
            samples=len(batch) * num_samples,
        )  # fmt: skip

    def _answer(self, batch: list[tuple[Job, Window]]) -> list[Answer]:
        """Run a batch; on failure, in parts: halves when memory is short, else request by request."""
        runtime = batch[0][0].work.runtime
        try:
            return list(runtime.run([_piece(job, window) for job, window in batch]))
        except Exception as error:
            in_halves = is_out_of_memory(error) and len(batch) > 1
            if not in_halves and len({job for job, _ in batch}) == 1:
                return [_fault_of(error, runtime.card.name)] * len(batch)
        # Here and not above, where the exception still holds the arrays of the batch that was too large.
        if not in_halves:
            return self._answer_apart(batch)
        self._observer.out_of_memory(runtime.card.name)
        half = runtime.windows_per_batch = len(batch) // 2
        return self._answer(batch[:half]) + self._answer(batch[half:])

    def _answer_apart(self, batch: list[tuple[Job, Window]]) -> list[Answer]:
        """Run each request's windows by themselves, and put the answers back in the batch's order."""
        answers: dict[int, Answer] = {}
        for one in dict.fromkeys(job for job, _ in batch):
            places = [i for i, (job, _) in enumerate(batch) if job is one]
            answers |= dict(zip(places, self._answer([batch[i] for i in places]), strict=True))
        return [answers[i] for i in range(len(batch))]

    def _deliver(self, job: Job, window: Window, answer: Answer) -> None:
        if job not in self._jobs:
            return
        if isinstance(answer, PenumbraError):
            self._end(job, answer)
            return
        job.answers.put((window, answer))
        job.unanswered -= 1
        if job.unanswered == 0:
            self._jobs.remove(job)

    def _end(self, job: Job, error: PenumbraError) -> None:
        self._forget(job)
        job.answers.put(error)

    def _forget(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)

    def _abandon(self) -> None:
        """The thread ends: nobody may wait for it, whatever ended it."""
        with self._condition:
            self._draining = self._stopped = True
            for job in list(self._jobs):
                self._end(job, ModelFault("the inference thread ended before this request was answered"))
            for _, future in self._calls:
                future.set_exception(NotReady("the engine is closed"))
            self._calls = []


def _piece(job: Job, window: Window) -> Piece:
    work, card = job.work, job.work.runtime.card
    pixels = cut(work.image_HW3, window, work.plan, spec=card.window, norm=card.input)
    prompt = work.prompt.cut(window, work.plan) if work.prompt else None
    return Piece(pixels, work.noise.draw(window.index)[: job.num_samples], prompt)


def _fault_of(error: Exception, model: str) -> PenumbraError:
    """What a request is told: the image's own fault, as a file that breaks off under the last rows, or the model's."""
    if isinstance(error, PenumbraError):
        return error
    log.error("%s failed on a batch of windows", model, exc_info=error)
    return ModelFault(f"{model} failed on this image")


def _resolve(future: Future[object], function: Callable[[], object]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # handed to the caller, who re-raises it
        future.set_exception(error)
