"""What a device runs next: windows of all requests and models, in fair order and shared batches.

Batches run in lanes, threads that share the cores out: on a CPU one per core, since two windows on a core each take
less time than one after the other on both, and nobody waits for the slower half of every layer; on a GPU two, since one
batch is queued there while another runs. The batch element is a window, never a request. Requests of one priority take
turns by work done (windows x samples x views, over `RequestPlan.share`), so a huge image cannot starve a small one, nor
small ones that keep coming a large one; priorities share the device by `STRIDES`, so none starves another; a request is
only ever a few windows ahead of what its thread has stitched, so memory does not depend on its size. Promises: every
window of a request is answered exactly once, with its moments, its rows or the error that ends the request; a failing
batch fails only the requests whose own windows fail; a cancelled or expired request is told at once, also while its
batch runs, and its windows leave the queue.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch

from penumbra.models.errors import Cancelled, ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.engine.canvas import Landing
from penumbra.serving.engine.moments import not_finite
from penumbra.serving.engine.request import NORMAL, STRIDES, PriorityClass, QueuedRequest
from penumbra.serving.engine.residency import Observer, Residency
from penumbra.serving.engine.runtime import Runtime, is_out_of_memory, settle
from penumbra.serving.engine.steps import Answer
from penumbra.serving.engine.throughput import Cores, ThroughputModel
from penumbra.serving.engine.windows import Window

log = logging.getLogger("penumbra")
T = TypeVar("T")
Run = tuple[int, Callable[[], object]]
"""What a lane runs next, and on how many cores."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch is windows that are run together: of one model, with one number of samples each, on so many cores."""

    runtime: Runtime
    num_samples: int
    windows: list[tuple[QueuedRequest, Window]]
    cores: int


class Scheduler:
    """A scheduler runs windows in its lanes, which are the only threads that enter a torch parallel region."""

    def __init__(
        self, *, queue_samples: int, cores: Cores, observer: Observer | None = None, target_s: float = 0.0,
        in_order: bool = False, residency: Residency | None = None,
    ) -> None:  # fmt: skip
        """target_s: of `ThroughputModel`. in_order: batches are begun one after another, as they were taken: of a GPU,
        on which one runs while a lane has the next one queued behind it. residency: of the models; else all are in."""
        self._queue_samples, self._cores, self._observer = queue_samples, cores, observer
        self._residency = residency or Residency()
        self._condition = self._residency.condition
        self._requests: list[QueuedRequest] = []
        self._calls: list[tuple[Callable[[], object], Future[object]]] = []
        self._idle, self._free = set(range(cores.lanes)), cores.threads
        """Lanes without work, and cores that no lane uses."""
        self._working, self._stepped_back, self._most_working = 0, 0, cores.lanes
        """Lanes that run something, and that wait to do so with nobody beside them; how many may run at a time."""
        self._in_order, self._beginning = in_order, False
        """Whether batches begin one after another, and whether one is beginning."""
        self._throughput = ThroughputModel(cores, target_s)
        self._classes = {priority: PriorityClass(priority) for priority in STRIDES}
        self._virtual_time = 0.0
        """That of the class which was served last: one that comes back after a pause does not make up for it."""
        self._samples_per_s = 0.0
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._loop, args=(lane,), name=f"inference-{lane}", daemon=True)
            for lane in range(cores.lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: QueuedRequest) -> QueuedRequest:
        """Admit a request. Raises QueueFull over the limit and NotReady while draining."""
        with self._condition:
            if self._stopped:
                raise NotReady("the server is draining and takes no new work; ask another replica")
            cost, reserved = request.reserved, self._reserved
            if cost and reserved and reserved + cost > self._queue_samples:
                raise QueueFull(
                    f"the queue holds {reserved} of {self._queue_samples} window-samples and this request "
                    f"needs {cost}; try again in {self._retry_after_s} s", retry_after_s=self._retry_after_s,
                )  # fmt: skip
            its_class = self._classes[request.plan.options.priority or NORMAL]
            its_class.virtual_time = max(its_class.virtual_time, self._virtual_time)
            self._requests.append(request)
            request.enter(its_class, lanes=self._cores.lanes)
            self._condition.notify_all()
            return request

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
        """Count windows, and windows x samples x views, that were admitted and are not yet answered."""
        with self._condition:
            return sum(request.unanswered for request in self._requests), self._reserved

    @property
    def is_busy(self) -> bool:
        """Tell whether a request has windows that wait or run."""
        return bool(self._requests)

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Refuse new work from now on, finish what was accepted, then end the lanes."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def _reserved(self) -> int:
        return sum(request.reserved for request in self._requests)

    @property
    def _retry_after_s(self) -> int:
        return int(min(60, 1 + self._reserved / self._samples_per_s)) if self._samples_per_s else 1

    def consumed(self, request: QueuedRequest) -> None:
        """Note that a request's thread took a window's moments, so that it has room for another one."""
        with self._condition:
            request.ahead -= 1
            self._condition.notify_all()

    def withdraw(self, request: QueuedRequest) -> None:
        """Forget a request that nobody reads any longer."""
        with self._condition:
            if request in self._requests:
                self._requests.remove(request)
            self._condition.notify_all()  # a lane that is to end waits until there are no requests

    def cancel(self, request: QueuedRequest) -> None:
        """End a request whose caller has left, also while its batch runs."""
        with self._condition:
            if request in self._requests:
                self._end(request, Cancelled("the request was cancelled"))
                self._condition.notify_all()

    def record_speed(self, runtime: Runtime) -> None:
        """Measure a model's initial speed, before its first request. Only within a `call`."""
        for num_samples, pixel_core_s in runtime.core_seconds_per_pixel():
            with self._condition:
                self._throughput.by_samples(runtime).learn(num_samples, pixel_core_s)

    def _loop(self, lane: int) -> None:
        try:
            while next_run := self._wait(lane):
                cores, run = next_run
                torch.set_num_threads(cores)
                run()
                del next_run, run  # an idle lane would keep the pictures of its last batch
                with self._condition:
                    self._idle.add(lane)
                    self._free, self._working = self._free + cores, self._working - 1
                    self._condition.notify_all()
        finally:
            self._abandon()

    def _wait(self, lane: int) -> Run | None:
        """Sleep until there is something for this lane to run; None means: stopped, and nothing left to do.

        Lanes go in order, so that it is always the first that has several cores: two teams of threads slow each other
        down even while one of them rests.
        """
        with self._condition:
            while not (self._stopped and not self._requests and not self._calls):
                if lane == min(self._idle) and self._may_begin:
                    self._end_withdrawn()
                    if self._residency.choose(self._requests):
                        self._calls.append((self._swap, Future()))
                        self._condition.notify_all()
                    next_run = self._take_call() if lane == 0 and self._calls else self._take()
                    if next_run:
                        self._idle.remove(lane)
                        self._free, self._working = self._free - next_run[0], self._working + 1
                        self._condition.notify_all()
                        return next_run
                self._condition.wait()
        return None

    @property
    def _may_begin(self) -> bool:
        """Tell whether one lane more may begin."""
        is_free = self._free >= self._cores.least and self._working < self._most_working
        return is_free and not self._stepped_back and not self._beginning

    def _take_call(self) -> Run:
        function, future = self._calls.pop(0)
        cores = self._cores.least if function == self._swap else self._free  # models that are in memory go on
        return cores, partial(_resolve, future, function)

    def _take(self) -> Run | None:
        """Make the next batch: of the request that is served next, and of others whose windows fit beside its own."""
        self._throughput.fit_samples(self._requests)
        ready = [one for one in self._requests if one.has_room and self._residency.may_run(one.plan.runtime)]
        if not ready:
            return None
        lead = min(ready, key=lambda request: request.precedence)
        self._virtual_time = lead.priority_class.virtual_time
        ready = [request for request in ready if request.batch_key == lead.batch_key]
        windows: list[tuple[QueuedRequest, Window]] = []
        size, shares = self._throughput.batch_size(lead), Counter[PriorityClass]()
        for request in self._requests:
            shares[request.priority_class] += request.plan.share if request.untaken else 0
        while ready and len(windows) < size:
            request = min(ready, key=lambda request: request.precedence)
            windows.append((request, request.take(shares[request.priority_class])))
            ready = [request for request in ready if request.has_room]
        self._beginning = self._in_order
        self._residency.count_batch(lead.plan.runtime, 1)
        num_windows = sum(request.num_windows for request in self._requests)
        cores = min(self._free, self._cores.of_batch(num_windows, lead.plan.runtime.lanes))
        return cores, partial(self._run, Batch(lead.plan.runtime, lead.num_samples, windows, cores))

    def _swap(self) -> None:
        """Bring a model back to memory. Where that cannot be, the requests that wait for it end."""
        coming, why = self._residency.swap()
        with self._condition:
            for request in [one for one in self._requests if why and one.plan.runtime is coming]:
                self._end(request, NotReady(why))

    def _end_withdrawn(self) -> None:
        now = time.perf_counter()
        for request in list(self._requests):
            error = request.ending(now)
            if error:
                self._end(request, error)

    def _run(self, batch: Batch) -> None:
        started = time.perf_counter()
        answers = _settled(self._begin(batch), batch.runtime)
        seconds = time.perf_counter() - started
        num_windows, model = len(batch.windows), batch.runtime.card.name
        num_samples = num_windows * batch.num_samples * batch.windows[0][0].plan.num_views
        rate = num_samples * self._cores.threads / (seconds * batch.cores)
        if self._observer:  # before whoever waits for an answer can look at the figures
            capacity = batch.runtime.windows_per_batch
            self._observer.batch_done(model, windows=num_windows, capacity=capacity, samples=num_samples)
        with self._condition:
            self._residency.count_batch(batch.runtime, -1)
            self._throughput.learn(batch.windows[0][0], batch.num_samples, num_windows, seconds, cores=batch.cores)
            self._samples_per_s = rate if not self._samples_per_s else 0.9 * self._samples_per_s + 0.1 * rate
            self._end_withdrawn()  # a deadline that passed during its last batch is missed, too
            for (request, window), answer in zip(batch.windows, answers, strict=True):
                request.run_s += seconds / num_windows
                self._deliver(request, window, answer)

    def _begin(self, batch: Batch) -> list[Answer]:
        """Run a batch, or have it queued on a GPU; then another one may begin.

        Clipped windows are smaller, and run by themselves: what a part that fails runs again is that part.
        """
        sizes = groupby(batch.windows, lambda pair: (pair[1].height, pair[1].width))
        parts = [replace(batch, windows=list(alike)) for _, alike in sizes]
        try:
            return [answer for part in parts for answer in self._answer(part)]
        finally:
            with self._condition:
                self._beginning = False
                self._condition.notify_all()

    def _answer(self, batch: Batch, *, is_alone: bool = False) -> list[Answer]:
        """Run a batch; on failure, in parts: halves when memory is short, at last alone; else request by request."""
        runtime, windows = batch.runtime, batch.windows
        most = runtime.windows_per_batch
        if len(windows) > most:  # as memory was found too short for, by a part of this batch or in another lane
            parts = [replace(batch, windows=windows[i : i + most]) for i in range(0, len(windows), most)]
            return [answer for part in parts for answer in self._answer(part)]
        try:
            return list(runtime.run([request.input_of(window, batch.num_samples) for request, window in windows]))
        except Exception as error:
            short = is_out_of_memory(error) and not is_alone
            if not short and len({request for request, _ in windows}) == 1:
                return [_fault_of(error, runtime)] * len(windows)
        # Here and not above, where the exception still holds the arrays of the batch that was too large.
        if not short:
            return self._answer_apart(batch)
        if self._observer:
            self._observer.out_of_memory(runtime.card.name)
        if len(windows) == 1:
            return self._answer_alone(batch)
        with self._condition:
            runtime.windows_per_batch = min(runtime.windows_per_batch, len(windows) // 2)
        return self._answer(batch)

    def _answer_alone(self, batch: Batch) -> list[Answer]:
        """Run one window again with no lane beside it; where that is what it took, with one lane less from now on.

        Also where none works beside it now: the one that took the memory may have ended just before.
        """
        with self._condition:
            self._working, self._stepped_back = self._working - 1, self._stepped_back + 1
            self._condition.notify_all()
            while self._working > 0:
                self._condition.wait()
            self._working += 1
        answers = self._answer(batch, is_alone=True)
        with self._condition:  # until here none may begin
            self._stepped_back -= 1
            if not any(isinstance(one, PenumbraError) for one in answers):
                self._most_working = max(1, self._most_working - 1)
            self._condition.notify_all()
        return answers

    def _answer_apart(self, batch: Batch) -> list[Answer]:
        """Run each request's windows by themselves, and put the answers back in the batch's order."""
        answers: dict[int, Answer] = {}
        for one in dict.fromkeys(request for request, _ in batch.windows):
            positions = [i for i, (request, _) in enumerate(batch.windows) if request is one]
            alone = replace(batch, windows=[batch.windows[i] for i in positions])
            answers |= dict(zip(positions, self._answer(alone), strict=True))
        return [answers[i] for i in range(len(batch.windows))]

    def _deliver(self, request: QueuedRequest, window: Window, answer: Answer) -> None:
        if request not in self._requests:
            return
        if isinstance(answer, PenumbraError):
            self._end(request, answer)
            return
        if answer.num_samples != request.num_members:  # it began again with fewer while this one ran
            request.ahead -= 1
            return
        request.answers.put((window, answer))
        request.unanswered -= 1
        if request.unanswered == 0:
            self._requests.remove(request)

    def _end(self, request: QueuedRequest, error: PenumbraError) -> None:
        self._requests.remove(request)
        request.answers.put(error)

    def _abandon(self) -> None:
        """End all lanes with one that ends: nobody may wait for them, whatever ended it."""
        with self._condition:
            self._stopped, self._working = True, 0  # a lane that waits to be alone goes on
            for request in list(self._requests):
                self._end(request, ModelFault("the inference threads ended before this request was answered"))
            for _, future in self._calls:
                future.set_exception(NotReady("the engine is closed"))
            self._calls = []
            self._condition.notify_all()


def _settled(answers: Sequence[Answer], runtime: Runtime) -> list[Answer]:
    """Wait for what is on its way from a GPU: a fault where a window's values are not finite, or where it failed."""
    try:
        settle(answers)
    except Exception as error:
        return [_fault_of(error, runtime)] * len(answers)
    fault = not_finite(runtime.card)
    return [fault if isinstance(one, Landing) and not one.is_finite else one for one in answers]


def _fault_of(error: Exception, runtime: Runtime) -> PenumbraError:
    """Choose whose fault ends a request: the image's, as a file that breaks off under the last rows, or the model's."""
    if isinstance(error, PenumbraError):
        return error
    if isinstance(error, torch.AcceleratorError):
        torch.cuda.synchronize(runtime.device)  # raises where nothing runs there: the lanes end, the server is not live
    model = runtime.card.name
    log.error("%s failed on a batch of windows", model, exc_info=error)
    return ModelFault(f"{model} failed on this image")


def _resolve(future: Future[object], function: Callable[[], object]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # handed to the caller, who re-raises it
        future.set_exception(error)
