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
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from penumbra.models.errors import ModelFault, NotReady, PenumbraError, QueueFull
from penumbra.serving.access import Request
from penumbra.serving.cache import AnswerCache, Key, key_of
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.decode import check_array, open_image
from penumbra.serving.engine.options import SegmentOptions, check_options
from penumbra.serving.engine.raster import Pixels, Raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.telemetry import Telemetry

log = logging.getLogger("penumbra")
T = TypeVar("T")


class Gateway:
    """Stands between protocols and engine. State: starting -> ready -> draining."""

    def __init__(
        self, segmenter: Segmenter, telemetry: Telemetry, *, limit_requests: int, timeout_s: float, cache_bytes: int = 0
    ) -> None:  # fmt: skip
        """cache_bytes: of answers that are kept to be given again; 0 keeps none."""
        self.segmenter, self.telemetry = segmenter, telemetry
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self._limit_requests, self._timeout_s = limit_requests, timeout_s
        self._cache = AnswerCache(cache_bytes) if cache_bytes else None
        self.vital: list[Callable[[], bool]] = [lambda: segmenter.scheduler.is_alive]
        """Threads that a server cannot do without: is each of them alive?"""
        self._inflight = 0
        self._threads = ThreadPoolExecutor(limit_requests, thread_name_prefix="request")

    @property
    def is_ready(self) -> bool:
        return self.state == "ready" and self.is_alive

    @property
    def is_alive(self) -> bool:
        return all(is_alive() for is_alive in self.vital)

    async def answer(
        self, image: bytes | NDArray[np.uint8], options: SegmentOptions, write: Callable[[Prediction], T], *,
        request: Request, gone: Callable[[], Awaitable[None]] | None = None, in_bands: bool = False,
    ) -> tuple[Prediction, T]:  # fmt: skip
        """Decode, segment and write one tracked request off the event loop.

        in_bands: `write` takes labels and maps from the top by slices of rows, and nothing that is known at the end; it
        is then at work on the first rows while later windows run. gone: returns when the caller has gone away; its
        windows then leave the queue. Raises PenumbraError; any other failure is logged and becomes a ModelFault
        without internals.
        """
        if self.state == "starting":
            raise NotReady("the server is still loading its models; try again in a few seconds")
        if self._inflight >= self._limit_requests:
            raise QueueFull(
                f"{self._inflight} requests are being worked on and the limit is {self._limit_requests}; "
                "try again in 1 s", retry_after_s=1,
            )  # fmt: skip
        request.started, cancelled = time.perf_counter(), threading.Event()
        watch = asyncio.ensure_future(_set_when(gone, cancelled)) if gone else None
        self._inflight += 1
        try:
            request.model = self.segmenter.find(options.model, options.version).card.name
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._work, image, options, write, cancelled, request, in_bands
            )
        except PenumbraError:
            raise
        except Exception:
            log.exception("request %s failed unexpectedly", request.id)
            raise ModelFault("the server failed on this request; its log says why") from None
        finally:
            cancelled.set()  # also when this coroutine is cancelled: the thread must not work for nobody
            self._inflight -= 1
            if watch:
                watch.cancel()

    def _work(
        self, image: bytes | NDArray[np.uint8], options: SegmentOptions, write: Callable[[Prediction], T],
        cancelled: threading.Event, request: Request, in_bands: bool,
    ) -> tuple[Prediction, T]:  # fmt: skip
        """In a request thread: the whole way of one image."""
        key = self._key_of(image, options) if self._cache else None
        with self._cache.first(key, timeout_s=self._left_s(options, request)) if self._cache and key else nullcontext():
            begun = time.perf_counter()
            request.timing_ms = {"wait": 1e3 * (begun - request.started)}
            prediction = self._recall(key, options) if key else None
            if prediction:
                prediction = replace(prediction, timing_ms=request.timing_ms)
                body = write(prediction)
            else:
                prediction, body = self._make(image, options, write, cancelled, request, in_bands=in_bands)
                if self._cache and key:
                    size = len(image) if isinstance(image, bytes) else image.nbytes
                    self._cache.keep(key, prediction, image_bytes=size)
        spent_ms = sum(ms for phase, ms in prediction.timing_ms.items() if phase in ("decode", "total"))
        write_ms = 1e3 * (time.perf_counter() - begun) - spent_ms
        request.timing_ms = dict(prediction.timing_ms) | {"write": write_ms}
        request.size, request.num_windows = prediction.labels_HW.shape, prediction.num_windows
        self.telemetry.answered(prediction, request.timing_ms)
        return prediction, body

    def _left_s(self, options: SegmentOptions, request: Request) -> float:
        """Until the request's deadline."""
        within_s = min(self._timeout_s, (options.deadline_ms or math.inf) / 1e3)
        return request.started + within_s - time.perf_counter()

    def _key_of(self, image: bytes | NDArray[np.uint8], options: SegmentOptions) -> Key:
        """Raises what an image or options would be refused for."""
        card, limits = self.segmenter.find(options.model, options.version).card, self.segmenter.limits
        if not isinstance(image, bytes):
            check_array(image, limits)
        return key_of(image, card, options, num_samples=check_options(options, card, limits))

    def _recall(self, key: Key, options: SegmentOptions) -> Prediction | None:
        """What is kept of an equal request."""
        assert self._cache
        kept = self._cache.find(key, self.segmenter.find(options.model, options.version).card)
        self.telemetry.cache_asked(hit=kept is not None)
        return kept

    def _make(
        self, image: bytes | NDArray[np.uint8], options: SegmentOptions, write: Callable[[Prediction], T],
        cancelled: threading.Event, request: Request, *, in_bands: bool,
    ) -> tuple[Prediction, T]:  # fmt: skip
        decoding = time.perf_counter()
        pixels = self._decode(image, options) if isinstance(image, bytes) else image
        request.size = pixels.shape[:2]
        before_ms = dict(request.timing_ms) | {"decode": 1e3 * (time.perf_counter() - decoding)}
        deadline = time.perf_counter() + self._left_s(options, request)
        answer = self.segmenter.unfold(pixels, options, cancelled=cancelled, deadline=deadline)
        with closing(answer):
            if in_bands and not options.anytime:
                body = write(answer.begun)
                prediction = answer.finish()
                return replace(prediction, timing_ms=before_ms | prediction.timing_ms), body
            prediction = answer.finish()
        prediction = replace(prediction, timing_ms=before_ms | prediction.timing_ms)
        return prediction, write(prediction)

    def _decode(self, data: bytes, options: SegmentOptions) -> Pixels:
        """Refuse by header and options first: pixels are decoded only for requests that can be answered."""
        limits, check = self.segmenter.limits, self.segmenter.check
        image = open_image(data, limits, admit=lambda height, width: check(height, width, options))
        return image.load() if isinstance(image, Raster) else image

    def close(self) -> None:
        """Finish accepted work."""
        self.state = "draining"
        self._threads.shutdown()
        self.segmenter.close()


async def _set_when(gone: Callable[[], Awaitable[None]], event: threading.Event) -> None:
    with suppress(asyncio.CancelledError):
        await gone()
        event.set()
