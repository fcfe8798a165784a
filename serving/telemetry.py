"""Prometheus metrics.

Our own registry, in one worker process: BentoML's metrics label by raw path, which any client can flood.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

# BentoML sets this for its own metrics; at its first import prometheus_client would switch to shared files.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from penumbra.serving.access import CANCELLED, CURRENT, Request, logged
from penumbra.serving.engine.observer import Observer
from penumbra.serving.settings import SECONDS
from penumbra.serving.tracing import record_request

if TYPE_CHECKING:
    from penumbra.serving.engine.answer import Prediction

NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3)
ABSTAINED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1)
POWERS = (1, 2, 4, 8, 16, 32, 64)


class Telemetry(Observer):
    """Counts and times; safe from any thread. Label values come from loaded models and fixed lists only.

    latency_buckets_s: upper bounds of the histograms of seconds.
    """

    def __init__(self, *, latency_buckets_s: Sequence[float] = SECONDS) -> None:
        self.registry = CollectorRegistry()
        histogram = partial(Histogram, namespace="penumbra", registry=self.registry)
        counter = partial(Counter, namespace="penumbra", registry=self.registry)
        gauge = partial(Gauge, namespace="penumbra", registry=self.registry)
        of_request = ["model", "protocol", "status"]
        self._request_seconds = histogram(
            "request_seconds", "From a request's body to its answer.", of_request, buckets=latency_buckets_s
        )
        self._phase_seconds = histogram(
            "phase_seconds", "Time of a request in a phase.", ["phase"], buckets=latency_buckets_s
        )
        self._batch_windows = histogram("batch_windows", "Windows per batch.", ["model"], buckets=POWERS)
        self._batch_fill = histogram("batch_fill_ratio", "Share of a batch's capacity used.", ["model"], buckets=RATIO)
        self._queue_windows = gauge("queue_windows", "Windows accepted and not yet answered.")
        self._inflight = gauge("inflight", "Requests being worked on.")
        self._rejected = counter("rejected", "Requests refused or failed, by kind of error.", ["reason"])
        self._cancelled = counter("cancelled", "Requests whose caller went away.")
        self._cache_hits = counter("cache_hits", "Requests answered with an answer that was kept.")
        self._cache_misses = counter("cache_misses", "Requests whose answer was not kept, where answers are.")
        self._oom = counter("oom", "Batches that did not fit and were run in halves.", ["model"])
        self._windows = counter("windows", "Windows run.", ["model"])
        self._samples = counter("samples", "Samples drawn: windows x S.", ["model"])
        self._load_seconds = gauge("model_load_seconds", "Time to open, check and warm up.", ["model"])
        self._refused = gauge("models_refused", "Models whose newest version in the store is refused.")
        self._entropy = histogram("entropy_mean", "Mean entropy of an answer, nats.", ["model"], buckets=NATS)
        self._abstained = histogram(
            "abstain_ratio", "Share of pixels withheld for max_risk.", ["model"], buckets=ABSTAINED
        )
        self._build = Info(
            "build", "Version of the server, and its commit.", namespace="penumbra", registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def describe(
        self, build: Mapping[str, str], *, queued_windows: Callable[[], int], refused_models: Callable[[], int]
    ) -> None:  # fmt: skip
        """Facts that are known once the engine stands."""
        self._build.info({"commit": ""} | dict(build))
        self._queue_windows.set_function(queued_windows)
        self._refused.set_function(refused_models)

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        self._batch_windows.labels(model).observe(windows)
        self._batch_fill.labels(model).observe(windows / max(capacity, windows))
        self._windows.labels(model).inc(windows)
        self._samples.labels(model).inc(samples)

    def out_of_memory(self, model: str) -> None:
        self._oom.labels(model).inc()

    def model_loaded(self, model: str, *, seconds: float) -> None:
        self._load_seconds.labels(model).set(seconds)

    @contextmanager
    def track(self, protocol: str, *, carrier: Mapping[str, str] | None = None) -> Iterator[Request]:
        """Count, time and trace what happens in the block as one request, and log it where no one else does; errors
        pass through.

        carrier: headers that may name the caller's span, where no middleware has read them.
        """
        with ExitStack() as stack:
            request = CURRENT.get() or stack.enter_context(logged(Request(protocol.upper())))
            yield from self._follow(request, protocol, carrier)

    def _follow(self, request: Request, protocol: str, carrier: Mapping[str, str] | None) -> Iterator[Request]:
        started = request.arrived = time.perf_counter()
        request.status, request.error = CANCELLED, "Cancelled"
        self._inflight.inc()
        try:
            yield request
            request.status, request.error = 200, ""
        except Exception as error:
            request.fail(error)
            raise
        finally:
            self._inflight.dec()
            status, reason = request.status, request.error
            seconds = time.perf_counter() - started
            self._request_seconds.labels(request.model, protocol, str(status)).observe(seconds)
            if reason == "Cancelled":
                self._cancelled.inc()
            elif reason:
                self._rejected.labels(reason).inc()
            attributes: dict[str, str | int] = {
                "penumbra.model": request.model,
                "penumbra.protocol": protocol,
                "penumbra.status": status,
            }
            traced = record_request(
                attributes, began_s=started, worked_from_s=request.started, timing_ms=request.timing_ms, carrier=carrier
            )
            request.trace = request.trace or traced

    def answered(self, prediction: "Prediction", timing_ms: Mapping[str, float]) -> None:
        """Phases of an answer, and its own uncertainty: drift of the input shows there first."""
        for phase, milliseconds in timing_ms.items():
            if phase != "total":
                self._phase_seconds.labels(phase).observe(milliseconds / 1e3)
        measured = prediction.labels_HW.size - prediction.num_void
        if "entropy" in prediction.maps and measured:
            mean = float(np.nansum(prediction.maps["entropy"], dtype=np.float64) / measured)
            self._entropy.labels(prediction.card.name).observe(mean)
        if prediction.abstained is not None:
            self._abstained.labels(prediction.card.name).observe(prediction.abstained)

    def cache_asked(self, *, hit: bool) -> None:
        (self._cache_hits if hit else self._cache_misses).inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics page and its content type: OpenMetrics where the scraper asks for it."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type
