"""What every protocol does with a request: count it, bound it, run it in a thread, time it, name its error.

Protocol files turn their bytes into a call of `answer` and its outcome into their bytes; nothing else differs.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar, cast

from numpy.typing import NDArray

from penumbra.models.errors import Cancelled, DeadlineExceeded, ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.cache import AnswerCache, Key, key_of
from penumbra.serving.engine.answer import Follow, Prediction, collect
from penumbra.serving.engine.decode import Header, check_array, read_header
from penumbra.serving.engine.layout import Reading
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.plan import plan_request, resolve
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import Cancellation, Progress, QueuedRequest
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.room import Memory
from penumbra.serving.shadow import Shadow
from penumbra.serving.telemetry import Request, Telemetry

log = logging.getLogger("penumbra")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task(Generic[T]):
    """A task is one request on its way through a request thread. deadline: a time of `time.perf_counter`. progress and
    follow are called in that thread."""

    image: bytes | NDArray[Any]
    runtime: Runtime
    options: SegmentOptions
    write: Callable[[Prediction], T]
    request: Request
    deadline: float
    progress: Progress = lambda num_done, num_windows: None
    follow: Follow = lambda band: None
    cancelled: Cancellation = field(default_factory=Cancellation)

    @property
    def reading(self) -> Reading:
        return Reading(self.runtime.card.input, self.options.bands)

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded where nobody waits for the answer any longer."""
        if self.cancelled.is_set():
            raise Cancelled("the request was cancelled")
        if time.perf_counter() > self.deadline:
            raise self.late

    @property
    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the deadline passed after {time.perf_counter() - self.request.arrived:.1f} s")


class Gateway:
    """A gateway stands between protocols and engine. State: starting -> ready -> draining."""

    def __init__(
        self, segmenter: Segmenter, telemetry: Telemetry, *, limit_requests: int, timeout_s: float, cache_bytes: int = 0
    ) -> None:  # fmt: skip
        """cache_bytes: of answers that are kept to be given again; 0 keeps none."""
        self.segmenter, self.telemetry = segmenter, telemetry
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self._limit_requests, self._timeout_s = limit_requests, timeout_s
        self._cache = AnswerCache(cache_bytes) if cache_bytes else None
        self.lent: set[tuple[str, int]] = set()
        """Versions that are loaded for a job alone."""
        self.lending = threading.Lock()
        """Is held by who loads a version, for a job or to stay, or gives one back."""
        self.shadow: Shadow | None = None
        """What is offered every request that was worked on and answered."""
        self._memory = Memory(segmenter.limits.memory_bytes)
        self.vital: list[Callable[[], bool]] = [lambda: segmenter.scheduler.is_alive]
        """Threads that a server cannot do without: is each of them alive?"""
        self._inflight = 0
        self._threads = ThreadPoolExecutor(limit_requests, thread_name_prefix="request")

    def give_back(self, model: str, version: int) -> None:
        """Unload a version that was loaded for a job, unless somebody has asked meanwhile for it to be served."""
        with self.lending:
            if (model, version) in self.lent:
                self.segmenter.unload(model, version)
                self.lent.discard((model, version))

    @property
    def is_ready(self) -> bool:
        return self.state == "ready" and self.is_alive

    @property
    def is_alive(self) -> bool:
        return all(is_alive() for is_alive in self.vital)

    def check_admission(self) -> None:
        """Check what a request may be refused for before it costs anything. Raises NotReady and QueueFull."""
        if self.state == "starting":
            raise NotReady()
        if self._inflight >= self._limit_requests:
            raise QueueFull(
                f"{self._inflight} requests are being worked on and the limit is {self._limit_requests}; "
                "try again in 1 s", retry_after_s=1,
            )  # fmt: skip

    async def answer(
        self, image: bytes | NDArray[Any], options: SegmentOptions, write: Callable[[Prediction], T], *,
        request: Request, gone: Callable[[], Awaitable[None]] | None = None,
        progress: Progress = lambda num_done, num_windows: None, follow: Follow = lambda band: None,
    ) -> tuple[Prediction, T]:  # fmt: skip
        """Decode, segment and write one tracked request off the event loop.

        gone: returns when the caller has gone away. That or the deadline ends the request at once, whatever its thread
        is at, and its place is free. progress, follow: called in that thread as the answer grows. Raises PenumbraError;
        any other failure is logged and becomes a ModelFault without internals.
        """
        self.check_admission()
        request.started = time.perf_counter()
        self._inflight += 1
        try:
            runtime = self.segmenter.find(options.model, options.version)
            request.model = runtime.card.name
            options = resolve(options, runtime.card, self.segmenter.limits)
            within_s = min(self._timeout_s, (options.deadline_ms or math.inf) / 1e3)
            deadline = request.arrived + within_s
            task = Task(image, runtime, options, write, request, deadline, progress, follow)
            return await self._run(task, gone)
        except PenumbraError:
            raise
        except Exception:
            log.exception("request %s failed unexpectedly", request.id)
            raise ModelFault() from None
        finally:
            self._inflight -= 1

    async def _run(self, task: "Task[T]", gone: Callable[[], Awaitable[None]] | None) -> tuple[Prediction, T]:
        """Wait for the outcome of a thread's work, or for why nobody waits for it any longer, whichever is first.

        The thread then ends by itself, at once where it waits for windows; until then its successor may wait for it.
        """
        box = [task]
        work = asyncio.wrap_future(self._threads.submit(self._work, box))
        ends: list[asyncio.Future[Any]] = [work, *([asyncio.ensure_future(gone())] if gone else [])]
        try:
            left_s = task.deadline - time.perf_counter()
            await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Cancelled("the request was cancelled") if ends[-1].done() else task.late
        finally:  # also when this coroutine is cancelled: no thread works for nobody, and their queue keeps no picture
            task.cancelled.set()
            box.clear()
            while ends:
                ends.pop().cancel()
            del work  # its exception knows this frame: a circle, which would keep the picture until it is collected

    def _work(self, box: "list[Task[T]]") -> tuple[Prediction, T]:
        """Take one image the whole way, in a request thread."""
        task = box.pop()
        request, card = task.request, task.runtime.card
        array = None if isinstance(task.image, bytes) else check_array(task.image, self.segmenter.limits, task.reading)
        key = key_of(task.image, card, task.options) if self._cache else None
        with self._alone(key, task), self._memory.room() as take:
            task.check()
            started = time.perf_counter()
            request.timing_ms = {"wait": 1e3 * (started - request.started)}
            kept = self._cache.find(key, card) if self._cache and key else None
            if key:
                self.telemetry.cache_asked(hit=kept is not None)
            prediction = replace(kept, timing_ms=request.timing_ms) if kept else self._segment(task, array, take)
            body = task.write(prediction)
            if self._cache and key and not kept:
                size = len(task.image) if isinstance(task.image, bytes) else task.image.nbytes
                self._cache.keep(key, prediction, image_bytes=size)
        if self.shadow and not kept:
            self.shadow.offer(task.image, task.options, card)
        spent_ms = sum(ms for phase, ms in prediction.timing_ms.items() if phase in ("decode", "total"))
        write_ms = 1e3 * (time.perf_counter() - started) - spent_ms
        request.answered(prediction, dict(prediction.timing_ms) | {"write": write_ms})
        self.telemetry.answered(prediction, request.timing_ms)
        return prediction, body

    def _alone(self, key: Key | None, task: "Task[T]") -> AbstractContextManager[None]:
        """Wait while an equal request is worked on, except where that could take the time of an early answer."""
        has_no_time = task.options.anytime and task.options.deadline_ms is not None
        if not self._cache or not key or has_no_time:
            return nullcontext()
        left_s = task.deadline - time.perf_counter()
        return self._cache.first(key, timeout_s=left_s, cancelled=task.cancelled)

    def _segment(self, task: "Task[T]", array: Raster | None, take: Callable[[int], None]) -> Prediction:
        """Refuse by header and options first: pixels are decoded only for requests that can be answered. take: of the
        memory for it."""
        started, limits = time.perf_counter(), self.segmenter.limits
        with (
            nullcontext(Header(array.shape[:2], array.place, lambda: array)) if array
            else read_header(cast(bytes, task.image), limits, task.reading)
        ) as header:  # fmt: skip
            plan = plan_request(task.runtime, task.options, *header.size, limits=limits, place=header.place)
            take(plan.num_bytes(self.segmenter.cores.lanes))
            image = header.read().load()
        task.request.size = image.shape[:2]
        task.check()
        before_ms = dict(task.request.timing_ms) | {"decode": 1e3 * (time.perf_counter() - started)}
        queued = QueuedRequest(self.segmenter.scheduler, plan, image, cancelled=task.cancelled, deadline=task.deadline)
        prediction = collect(queued, progress=task.progress, follow=task.follow)
        return replace(prediction, timing_ms=before_ms | prediction.timing_ms)

    def close(self) -> None:
        """Finish accepted work."""
        self.state = "draining"
        self._threads.shutdown()
        if self.shadow:
            self.shadow.close()
        self.segmenter.close()
