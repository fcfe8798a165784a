"""What a device runs next: windows of all requests and models, in fair turns and shared batches.

Batches run in lanes, threads that share the cores out: on a GPU there is one, on a CPU one per core, since two windows
on a core each take less time than one after the other on both, and nobody waits for the slower half of every layer. The
batch element is a window, never a request. Requests of one priority take turns by work done (windows x samples),
so a huge image cannot starve a small one; priorities share the device by `STRIDES`, so none starves another; a request
is only ever a few windows ahead of what its thread has stitched, so memory does not depend on its size. Promises: every
window of a request is answered exactly once, with its moments or with the error that ends the request; a failing batch
fails only the requests whose own windows fail; a cancelled or expired request is told at once, also while its batch
runs, and its windows leave the queue.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch

from penumbra.models.errors import Cancelled, ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.observer import Observer
from penumbra.serving.engine.pace import Paces
from penumbra.serving.engine.runtime import Piece, Runtime, is_out_of_memory
from penumbra.serving.engine.windows import Window, cut
from penumbra.serving.engine.work import STRIDES, Cancellation, Cores, Job, Level, Work

log = logging.getLogger("penumbra")
T = TypeVar("T")
Answer = Moments | PenumbraError
Turn = tuple[int, Callable[[], object]]
"""What a lane runs next, and on how many cores."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows that are run together: of one model, with one number of samples each, on so many cores."""

    runtime: Runtime
    num_samples: int
    windows: list[tuple[Job, Window]]
    cores: int


class Stream:
    """A request's finished windows, in the plan's order. Leaving the `with` block withdraws the rest.

    Where the moments have another number of samples than those before, work that is `anytime` has begun again: windows
    come from the first one on, and those before are void.
    """

    def __init__(self, scheduler: "Scheduler", job: Job) -> None:
        self._scheduler, self._job, self._listening = scheduler, job, ExitStack()
        if isinstance(job.work.cancelled, Cancellation):
            self._listening.enter_context(job.work.cancelled.waking(partial(scheduler._cancel, job)))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()
        self._scheduler._withdraw(self._job)

    def __iter__(self) -> Iterator[tuple[Window, Moments]]:
        work = self._job.work
        num_samples, due = 0, work.first_window
        early: dict[int, tuple[Window, Moments]] = {}
        """Windows that another lane had ready before those that come first."""
        while due < work.plan.num_windows:
            answer = self._job.wait()
            if answer[1].num_samples != num_samples:
                for _ in early:
                    self._scheduler._consumed(self._job)
                num_samples, due, early = answer[1].num_samples, work.first_window, {}
            early[answer[0].index] = answer
            while due in early:
                self._scheduler._consumed(self._job)
                yield early.pop(due)
                due += 1

    @property
    def queue_s(self) -> float:
        """Seconds from submission to the start of the first window's batch."""
        return (self._job.started or time.perf_counter()) - self._job.submitted

    @property
    def run_s(self) -> float:
        """Seconds of inference so far, this request's share of its batches."""
        return self._job.run_s


class Scheduler:
    """Runs submitted work in its lanes, which are the only threads that enter a torch parallel region."""

    def __init__(self, *, queue_samples: int, cores: Cores, observer: Observer, target_s: float = 0.0) -> None:
        """target_s: of `Paces`."""
        self._queue_samples, self._cores, self._observer = queue_samples, cores, observer
        self._condition = threading.Condition()
        self._jobs: list[Job] = []
        self._calls: list[tuple[Callable[[], object], Future[object]]] = []
        self._idle, self._free = set(range(cores.lanes)), cores.threads
        """Lanes without work, and cores that no lane uses."""
        self._working, self._stepped_back, self._most_working = 0, 0, cores.lanes
        """Lanes that run something, and that wait to do so with nobody beside them; how many may run at a time."""
        self._paces = Paces(cores, target_s)
        self._levels = {priority: Level(priority) for priority in STRIDES}
        self._turn = 0.0
        """The turn of the level that was served last: one that comes back after a pause does not make up for it."""
        self._samples_per_s = 0.0
        self._draining = False
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._loop, args=(lane,), name=f"inference-{lane}", daemon=True)
            for lane in range(cores.lanes)
        ]
        for thread in self._threads:
            thread.start()

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
            job = Job(work, level, lanes=self._cores.lanes)
            self._jobs.append(job)
            self._condition.notify_all()
            return Stream(self, job)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the first lane, between batches, on all cores that are free; returns its result."""
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
        return all(thread.is_alive() for thread in self._threads)

    def drain(self) -> None:
        """Refuse new work from now on; accepted work goes on."""
        with self._condition:
            self._draining = True

    def close(self) -> None:
        """Finish accepted work, then end the lanes."""
        with self._condition:
            self._draining = self._stopped = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

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
            self._condition.notify_all()  # a lane that is to end waits until there are no jobs

    def _cancel(self, job: Job) -> None:
        with self._condition:
            if job in self._jobs:
                self._end(job, Cancelled("the request was cancelled"))
                self._condition.notify_all()

    def get_to_know(self, runtime: Runtime) -> None:
        """Measure a model's pace before its first request. Only within a `call`."""
        for num_samples, pixel_core_s in runtime.core_seconds_per_pixel():
            with self._condition:
                self._paces.of(runtime).learn(num_samples, pixel_core_s)

    def _loop(self, lane: int) -> None:
        try:
            while turn := self._wait(lane):
                cores, run = turn
                torch.set_num_threads(cores)
                run()
                with self._condition:
                    self._idle.add(lane)
                    self._free, self._working = self._free + cores, self._working - 1
                    self._condition.notify_all()
        finally:
            self._abandon()

    def _wait(self, lane: int) -> Turn | None:
        """Sleep until it is this lane's turn; None means: stopped, and nothing left to do.

        Lanes go in order, so that it is always the first that has several cores: two teams of threads slow each other
        down even while one of them rests.
        """
        with self._condition:
            while not (self._stopped and not self._jobs and not self._calls):
                if lane == min(self._idle) and self._has_place:
                    turn = self._take_call() if lane == 0 and self._calls else self._take()
                    if turn:
                        self._idle.remove(lane)
                        self._free, self._working = self._free - turn[0], self._working + 1
                        self._condition.notify_all()
                        return turn
                self._condition.wait()
        return None

    @property
    def _has_place(self) -> bool:
        """Whether one lane more may begin."""
        return self._free >= self._cores.least and self._working < self._most_working and not self._stepped_back

    def _take_call(self) -> Turn:
        function, future = self._calls.pop(0)
        return self._free, partial(_resolve, future, function)

    def _take(self) -> Turn | None:
        """The next batch: the request whose turn it is, and others whose windows fit beside its own."""
        self._end_withdrawn()
        self._paces.hasten(self._jobs)
        ready = [job for job in self._jobs if job.has_room]
        if not ready:
            return None
        lead = min(ready, key=lambda job: job.precedence)
        self._turn = lead.level.turn
        ready = [job for job in ready if job.batch_key == lead.batch_key]
        windows: list[tuple[Job, Window]] = []
        room = self._paces.room(lead)
        while ready and len(windows) < room:
            job = min(ready, key=lambda job: job.precedence)
            windows.append((job, job.take()))
            ready = [job for job in ready if job.has_room]
        cores = min(self._free, self._cores.of_batch(sum(job.work.num_windows for job in self._jobs)))
        return cores, partial(self._run, Batch(lead.work.runtime, lead.num_samples, windows, cores))

    def _end_withdrawn(self) -> None:
        now = time.perf_counter()
        for job in list(self._jobs):
            error = job.ending(now)
            if error:
                self._end(job, error)

    def _run(self, batch: Batch) -> None:
        started = time.perf_counter()
        answers = self._answer(batch)
        seconds = time.perf_counter() - started
        num_windows, model = len(batch.windows), batch.runtime.card.name
        rate = num_windows * batch.num_samples * self._cores.threads / (seconds * batch.cores)
        with self._condition:
            self._paces.learn(batch.windows[0][0], batch.num_samples, num_windows, seconds, cores=batch.cores)
            self._samples_per_s = rate if not self._samples_per_s else 0.9 * self._samples_per_s + 0.1 * rate
            self._end_withdrawn()  # a deadline that passed during its last batch is missed, too
            for (job, window), answer in zip(batch.windows, answers, strict=True):
                job.run_s += seconds / num_windows
                self._deliver(job, window, answer)
        self._observer.batch_done(
            model, windows=num_windows, capacity=batch.runtime.windows_per_batch,
            samples=num_windows * batch.num_samples,
        )  # fmt: skip

    def _answer(self, batch: Batch, *, is_alone: bool = False) -> list[Answer]:
        """Run a batch; on failure, in parts: halves when memory is short, at last alone; else request by request."""
        runtime, windows = batch.runtime, batch.windows
        try:
            return list(runtime.run([_piece(job, window, batch.num_samples) for job, window in windows]))
        except Exception as error:
            others = 0 if is_alone else self._working + self._stepped_back - 1
            short = is_out_of_memory(error) and (len(windows) > 1 or others > 0)
            if not short and len({job for job, _ in windows}) == 1:
                return [_fault_of(error, runtime.card.name)] * len(windows)
        # Here and not above, where the exception still holds the arrays of the batch that was too large.
        if not short:
            return self._answer_apart(batch)
        self._observer.out_of_memory(runtime.card.name)
        if len(windows) == 1:
            return self._answer_alone(batch)
        half = len(windows) // 2
        with self._condition:
            runtime.windows_per_batch = min(runtime.windows_per_batch, half)  # another lane may have found it shorter
        parts = (replace(batch, windows=part) for part in (windows[:half], windows[half:]))
        return [answer for part in parts for answer in self._answer(part)]

    def _answer_alone(self, batch: Batch) -> list[Answer]:
        """Run one window again with no lane beside it, and one lane less at a time from now on."""
        with self._condition:
            self._most_working = max(1, self._most_working - 1)
            self._working, self._stepped_back = self._working - 1, self._stepped_back + 1
            self._condition.notify_all()
            while self._working:
                self._condition.wait()
            self._working, self._stepped_back = self._working + 1, self._stepped_back - 1
        return self._answer(batch, is_alone=True)

    def _answer_apart(self, batch: Batch) -> list[Answer]:
        """Run each request's windows by themselves, and put the answers back in the batch's order."""
        answers: dict[int, Answer] = {}
        for one in dict.fromkeys(job for job, _ in batch.windows):
            places = [i for i, (job, _) in enumerate(batch.windows) if job is one]
            alone = replace(batch, windows=[batch.windows[i] for i in places])
            answers |= dict(zip(places, self._answer(alone), strict=True))
        return [answers[i] for i in range(len(batch.windows))]

    def _deliver(self, job: Job, window: Window, answer: Answer) -> None:
        if job not in self._jobs:
            return
        if isinstance(answer, PenumbraError):
            self._end(job, answer)
            return
        if answer.num_samples != job.num_samples:  # it began again with fewer while this one ran
            job.ahead -= 1
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
        """A lane ends, and all with it: nobody may wait for them, whatever ended it."""
        with self._condition:
            self._draining = self._stopped = True
            for job in list(self._jobs):
                self._end(job, ModelFault("the inference threads ended before this request was answered"))
            for _, future in self._calls:
                future.set_exception(NotReady("the engine is closed"))
            self._calls = []
            self._condition.notify_all()


def _piece(job: Job, window: Window, num_samples: int) -> Piece:
    work, card = job.work, job.work.runtime.card
    pixels = cut(work.image_HW3, window, work.plan, spec=card.window, norm=card.input)
    prompt = work.prompt.cut(window, work.plan) if work.prompt else None
    return Piece(pixels, work.noise.draw(window.index)[:num_samples], prompt)


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
