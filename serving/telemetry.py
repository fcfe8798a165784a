"""Prometheus metrics and the one log line per request.

Our own registry, in one worker process: BentoML's metrics label by raw path, which any client can flood.
"""

import logging
from collections.abc import Mapping

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from serving.engine.observer import Observer
from serving.engine.segmenter import Prediction, Segmenter

log = logging.getLogger("penumbra")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3)
RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1)
POWERS = (1, 2, 4, 8, 16, 32, 64)


class Telemetry(Observer):
    """Counts and times; safe from any thread. Label values come from loaded models and fixed lists only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "penumbra"}
        self._request_seconds = Histogram("request_seconds", "From the request's body to the answer's.", ["model", "protocol", "status"], buckets=SECONDS, **own)  # type: ignore[arg-type]
        self._phase_seconds = Histogram("phase_seconds", "Time of one request in one phase.", ["phase"], buckets=SECONDS, **own)  # type: ignore[arg-type]
        self._batch_windows = Histogram("batch_windows", "Windows per batch.", ["model"], buckets=POWERS, **own)  # type: ignore[arg-type]
        self._batch_fill = Histogram("batch_fill_ratio", "Windows per batch over the batch's capacity.", ["model"], buckets=RATIO, **own)  # type: ignore[arg-type]
        self._queue_windows = Gauge("queue_windows", "Windows accepted and not yet answered.", **own)  # type: ignore[arg-type]
        self._inflight = Gauge("inflight", "Requests being worked on.", **own)  # type: ignore[arg-type]
        self._rejected = Counter("rejected", "Requests refused or failed, by kind of error.", ["reason"], **own)  # type: ignore[arg-type]
        self._cancelled = Counter("cancelled", "Requests whose caller went away.", **own)  # type: ignore[arg-type]
        self._oom = Counter("oom", "Batches that did not fit and were run in halves.", ["model"], **own)  # type: ignore[arg-type]
        self._windows = Counter("windows", "Windows run.", ["model"], **own)  # type: ignore[arg-type]
        self._samples = Counter("samples", "Samples drawn: windows x S.", ["model"], **own)  # type: ignore[arg-type]
        self._load_seconds = Gauge("model_load_seconds", "Open, check, warm up.", ["model"], **own)  # type: ignore[arg-type]
        self._entropy = Histogram("entropy_mean", "Mean entropy of an answer, nats.", ["model"], buckets=NATS, **own)  # type: ignore[arg-type]
        self._build = Info("build", "Version of the server.", **own)  # type: ignore[arg-type]
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def describe_build(self, version: str, segmenter: Segmenter) -> None:
        self._build.info({"version": version})
        self._queue_windows.set_function(lambda: segmenter.scheduler.queued[0])

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        self._batch_windows.labels(model).observe(windows)
        self._batch_fill.labels(model).observe(windows / max(capacity, windows))
        self._windows.labels(model).inc(windows)
        self._samples.labels(model).inc(samples)

    def out_of_memory(self, model: str) -> None:
        self._oom.labels(model).inc()

    def model_loaded(self, model: str, *, seconds: float) -> None:
        self._load_seconds.labels(model).set(seconds)

    def request_started(self) -> None:
        self._inflight.inc()

    def request_ended(self, *, model: str, protocol: str, status: int, seconds: float, reason: str | None) -> None:
        """Close a request: `model` is empty when none was found; `reason` is the error's class, if any."""
        self._inflight.dec()
        self._request_seconds.labels(model, protocol, str(status)).observe(seconds)
        if reason == "Cancelled":
            self._cancelled.inc()
        elif reason:
            self._rejected.labels(reason).inc()
        log.info("%s %d %.1f ms%s%s", protocol, status, 1e3 * seconds, f" {model}" if model else "", f" {reason}" if reason else "")

    def answered(self, prediction: Prediction, timing_ms: Mapping[str, float]) -> None:
        """Phases of an answer, and its own uncertainty: drift of the input shows there first."""
        for phase, milliseconds in timing_ms.items():
            if phase != "total":
                self._phase_seconds.labels(phase).observe(milliseconds / 1e3)
        if "entropy" in prediction.maps:
            self._entropy.labels(prediction.card.name).observe(float(np.mean(prediction.maps["entropy"])))

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics page and its content type: OpenMetrics where the scraper asks for it."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type
