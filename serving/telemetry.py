"""What a server tells of its requests: a line of the log for each, Prometheus metrics, and OpenTelemetry traces.

On its way everybody writes what becomes known of a request into one `Request`. No pixels, file names or options are in
a line. The metrics have a registry of their own, in one worker process: BentoML's label by raw path, which any client
can flood. A trace is one span for a request and one for each of its phases, below the span that BentoML makes of the
caller's `traceparent`.
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

# BentoML sets this for its own metrics; at its first import prometheus_client would switch to shared files.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

from opentelemetry import propagate, trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from penumbra.models.errors import PenumbraError
from penumbra.serving.keys import HEALTH, METRICS_PATH, OPEN_CALLS

if TYPE_CHECKING:
    from penumbra.serving.compare import Compared
    from penumbra.serving.engine.answer import Prediction

CURRENT: ContextVar["Request | None"] = ContextVar("request", default=None)
"""The request that this task works for."""
ID, TRACE = "x-request-id", "traceparent"
SAFE_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")
SAFE_TRACE = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
LONGEST_PATH = 120
CANCELLED = 499
"""Status of a request whose caller went away before an answer began."""
QUIET = {*HEALTH, METRICS_PATH, *OPEN_CALLS}
"""Paths that machines ask every few seconds: their lines are at level DEBUG where they are answered."""
SECONDS = partial(
    Histogram, buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
)
NATS = partial(Histogram, buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3))
ABSTAINED = partial(Histogram, buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1))
NOVELTY = partial(Histogram, buckets=(0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1))
RATIO = partial(Histogram, buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1))
POWERS = partial(Histogram, buckets=(1, 2, 4, 8, 16, 32, 64))
ONE, TWO = ("model",), ("model", "version")
METRICS: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "request_seconds": (SECONDS, "From a request's body to its answer.", (*ONE, "protocol", "status")),
    "phase_seconds": (SECONDS, "Time of a request in a phase.", ("phase",)),
    "batch_windows": (POWERS, "Windows per batch.", ONE),
    "batch_fill_ratio": (RATIO, "Share of a batch's capacity used.", ONE),
    "queue_windows": (Gauge, "Windows accepted and not yet answered.", ()),
    "inflight": (Gauge, "Requests being worked on.", ()),
    "rejected": (Counter, "Requests refused or failed, by kind of error.", ("reason",)),
    "cancelled": (Counter, "Requests whose caller went away.", ()),
    "cache_hits": (Counter, "Requests answered with an answer that was kept.", ()),
    "cache_misses": (Counter, "Requests whose answer was not kept, where answers are.", ()),
    "oom": (Counter, "Batches that did not fit and were run in halves.", ONE),
    "windows": (Counter, "Windows run.", ONE),
    "samples": (Counter, "Samples drawn: windows x S.", ONE),
    "model_load_seconds": (Gauge, "Time to open, check and warm up.", ONE),
    "model_loads": (Counter, "Loads of a model, the first and those after it was evicted.", ONE),
    "model_evictions": (Counter, "Times that a model left memory for another.", ONE),
    "models_in_memory": (Gauge, "Models in memory.", ()),
    "model_bytes": (Gauge, "Bytes of the files of the models in memory.", ()),
    "models_refused": (Gauge, "Models whose newest version in the store is refused.", ()),
    "entropy_mean": (NATS, "Mean entropy of an answer, nats.", ONE),
    "abstain_ratio": (ABSTAINED, "Share of pixels withheld.", ONE),
    "expected_error": (ABSTAINED, "Share of an answer's pixels that is wrong, as far as the model can tell.", ONE),
    "novelty": (NOVELTY, "Share of the model's reference pictures that were less strange than an answer's.", ONE),
    "tls_not_after_seconds": (Gauge, "When the certificate ends, seconds since 1970; 0 without TLS.", ()),
    "shadow_requests": (Counter, "Live requests taken for a version in the shadow.", (*TWO, "outcome")),
    "shadow_pixels": (Counter, "Pixels whose labels were compared.", TWO),
    "shadow_flipped_pixels": (Counter, "Those with another label than served.", TWO),
    "shadow_entropy_shift": (Gauge, "Sum of the pictures' shifts of mean entropy, nats.", TWO),
    "shadow_seconds": (Counter, "Processor time for pictures.", (*TWO, "of")),
    "build": (Info, "The server's version and commit.", ()),
}
"""Every metric: its kind, what it says, and its labels."""


@dataclass(slots=True)
class Request:
    """What becomes known of a request while it is worked on; empty until it is.

    method: of HTTP, else GRPC or JOB. path: without the query, or the gRPC method. key: the name of the caller's key.
    trace: the id of the trace that it belongs to. model: of those that are loaded. size: of the picture, [H, W].
    num_windows: that were run. arrived: when it was there, by `perf_counter`; its deadline counts from then. started:
    when its first phase did. timing_ms: milliseconds by phase. error: the class of what it was refused for.
    """

    method: str = ""
    path: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    trace: str = ""
    key: str = ""
    model: str = ""
    size: tuple[int, ...] = ()
    num_windows: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    status: int = CANCELLED

    def answered(self, prediction: "Prediction", timing_ms: Mapping[str, float]) -> None:
        """Note what was answered, and how long the phases of that took."""
        self.size, self.num_windows, self.timing_ms = prediction.labels_HW.shape, prediction.num_windows, timing_ms

    def fail(self, error: Exception) -> None:
        """Note what the request ended with."""
        self.status, self.error = 500, type(error).__name__
        if isinstance(error, PenumbraError):
            self.status, self.key = error.http_status, self.key or error.caller

    def fields(self, milliseconds: float) -> dict[str, object]:
        """What the log's line has of the request, by name and in its order."""
        known: dict[str, object] = {
            "method": self.method, "path": self.path, "status": self.status, "ms": round(milliseconds, 1),
            "model": self.model, "size": "x".join(map(str, reversed(self.size))), "windows": self.num_windows or "",
        }  # fmt: skip
        if spent_ms := self.timing_ms:
            known["queue_ms"] = round(spent_ms.get("wait", 0.0) + spent_ms.get("queue", 0.0), 1)
            known["run_ms"] = round(spent_ms.get("run", 0.0), 1)
        return known | {"error": self.error, "key": self.key, "request_id": self.id, "trace_id": self.trace}


def begin(method: str, path: str, headers: Mapping[str, str]) -> Request:
    """A request from its line and headers, or its call and metadata; an id or trace that is none is not taken over."""
    request = Request(method, re.sub(r"^/jobs/[^/]+", "/jobs/{id}", re.sub("[^!-~]", "?", path))[:LONGEST_PATH])
    if SAFE_ID.fullmatch(sent := headers.get(ID, "")):
        request.id = sent
    if parent := SAFE_TRACE.fullmatch(headers.get(TRACE, "")):
        request.trace = parent[1]
    return request


@contextmanager
def logged(request: Request) -> Iterator[Request]:
    """Make a request the current one of the block, and write its line at the end."""
    before, began = CURRENT.set(request), time.perf_counter()
    try:
        yield request
    finally:
        CURRENT.reset(before)
        is_quiet = request.path in QUIET and request.status not in (401, 403, 500)
        fields = request.fields(1e3 * (time.perf_counter() - began))
        _write_line("access", logging.DEBUG if is_quiet else logging.INFO, fields)


def audit(action: str, model: str, *, by: str = "", version: str | int = "", outcome: str = "done") -> None:
    """Write the line of who did what to a model, and how it ended. by: who, where it was no caller."""
    request = CURRENT.get()
    _write_line("audit", logging.INFO, {
        "audit": action, "model": re.sub("[^!-~]", "?", model)[:LONGEST_PATH], "version": version, "outcome": outcome,
        "by": by or (request.key if request else "") or "anybody", "request_id": request.id if request else "",
    })  # fmt: skip


def _write_line(logger: str, level: int, fields: Mapping[str, object]) -> None:
    """Write what is known, as text and for `penumbra.serving.process.JsonLines`; what is empty is not there."""
    known = {name: value for name, value in fields.items() if value != ""}
    line = " ".join(f"{name}={value}" for name, value in known.items())
    logging.getLogger(f"penumbra.{logger}").log(level, "%s", line, extra={"fields": known})


@contextmanager
def audited(action: str, model: str, *, by: str = "") -> Iterator[dict[str, int]]:
    """Write that line when the block has ended; errors pass through. Yields what the block may add to it: `version`."""
    known: dict[str, int] = {}
    try:
        yield known
    except Exception as error:
        audit(action, model, by=by, outcome=type(error).__name__)
        raise
    audit(action, model, by=by, **known)  # type: ignore[arg-type]


class Telemetry:
    """Counts and times; the engine's `Observer`. Safe from any thread.

    Label values come from loaded models and fixed lists only.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = {
            name: kind(name, about, labels, namespace="penumbra", registry=self.registry)
            for name, (kind, about, labels) in METRICS.items()
        }
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def name_build(self, build: Mapping[str, str]) -> None:
        """Say which version this is, and which commit if it is known."""
        self._metrics["build"].info({"commit": ""} | dict(build))

    def follow(self, gauge: str, find: Callable[[], float]) -> None:
        """Let a gauge have what is found whenever it is read."""
        self._metrics[gauge].set_function(find)

    def _of(self, name: str, *labels: str) -> Any:
        return self._metrics[name].labels(*labels)

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        self._of("batch_windows", model).observe(windows)
        self._of("batch_fill_ratio", model).observe(windows / max(capacity, windows))
        self._of("windows", model).inc(windows)
        self._of("samples", model).inc(samples)

    def out_of_memory(self, model: str) -> None:
        self._of("oom", model).inc()

    def model_loaded(self, model: str, *, seconds: float) -> None:
        self._of("model_load_seconds", model).set(seconds)
        self._of("model_loads", model).inc()
        self._of("oom", model).inc(0)  # Prometheus sees no increase in a series that begins with its first shortage

    def model_evicted(self, model: str) -> None:
        self._of("model_evictions", model).inc()

    def cache_asked(self, *, hit: bool) -> None:
        self._metrics["cache_hits" if hit else "cache_misses"].inc()

    def shadowed(self, candidate: tuple[str, str], outcome: str = "", compared: "Compared | None" = None) -> None:
        """Count a request taken for a candidate, by model and version; without an outcome begin all of them at 0."""
        for known in ("compared", "failed", "dropped"):
            self._of("shadow_requests", *candidate, known).inc(known == outcome)
        if compared:
            self._of("shadow_pixels", *candidate).inc(compared.num_pixels)
            self._of("shadow_flipped_pixels", *candidate).inc(compared.num_flipped)
            self._of("shadow_entropy_shift", *candidate).inc(compared.entropy_nats)
            for name, seconds in zip(("served", "shadow"), compared.seconds, strict=True):
                self._of("shadow_seconds", *candidate, name).inc(seconds)

    @contextmanager
    def track(self, protocol: str, *, carrier: Mapping[str, str] | None = None) -> Iterator[Request]:
        """Count, time and trace what happens in the block as one request, and log it where no one else does; errors
        pass through.

        carrier: headers that may name the caller's span, where no middleware has read them.
        """
        with ExitStack() as stack:
            request = CURRENT.get() or stack.enter_context(logged(Request(protocol.upper())))
            request.arrived = time.perf_counter()
            request.status, request.error = CANCELLED, "Cancelled"
            self._metrics["inflight"].inc()
            try:
                yield request
                request.status, request.error = 200, ""
            except Exception as error:
                request.fail(error)
                raise
            finally:
                self._metrics["inflight"].dec()
                seconds = time.perf_counter() - request.arrived
                self._of("request_seconds", request.model, protocol, str(request.status)).observe(seconds)
                if request.error == "Cancelled":
                    self._metrics["cancelled"].inc()
                elif request.error:
                    self._of("rejected", request.error).inc()
                recorded = _record_spans(request, protocol, carrier)
                request.trace = request.trace or recorded

    def answered(self, prediction: "Prediction", timing_ms: Mapping[str, float]) -> None:
        """Count the phases of an answer, and its own uncertainty: drift of the input shows there first."""
        for phase, milliseconds in timing_ms.items():
            if phase != "total":
                self._of("phase_seconds", phase).observe(milliseconds / 1e3)
        if prediction.scores.means:
            self._of("entropy_mean", prediction.card.name).observe(prediction.scores.means[0])
        if prediction.abstained is not None:
            self._of("abstain_ratio", prediction.card.name).observe(prediction.abstained)
        for name, score in prediction.shares.items():
            self._of(name, prediction.card.name).observe(score)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics page and its content type: OpenMetrics where the scraper asks for it."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


def tracer_provider() -> Any:
    """The SDK's own provider of spans, which samples as OTEL_TRACES_SAMPLER says; BentoML's does not."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    return TracerProvider(resource=Resource.create({"service.name": "penumbra"}).merge(OTELResourceDetector().detect()))


def export_traces(provider: Any, endpoint: str) -> None:
    """Send a provider's spans to an OTLP collector over gRPC, and ours to the provider."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def _record_spans(request: Request, protocol: str, carrier: Mapping[str, str] | None) -> str:
    """Record a request that ended just now, below the current span or the one that `carrier` (headers) names. Returns
    its trace's id, empty where it is not recorded."""
    now_s, now_ns = time.perf_counter(), time.time_ns()

    def clock_ns(moment_s: float) -> int:
        return now_ns - int(1e9 * (now_s - moment_s))

    tracer = trace.get_tracer("penumbra")
    parent = propagate.extract(carrier) if carrier is not None else None
    attributes: dict[str, str | int] = {
        "penumbra.model": request.model, "penumbra.protocol": protocol, "penumbra.status": request.status,
    }  # fmt: skip
    span = tracer.start_span("penumbra.request", parent, attributes=attributes, start_time=clock_ns(request.arrived))
    recorded = ""
    if span.is_recording():
        recorded = trace.format_trace_id(span.get_span_context().trace_id)
        inside = trace.set_span_in_context(span)
        for name, start_ms, milliseconds in phase_intervals(request.timing_ms):
            start_s = request.started + start_ms / 1e3
            phase = tracer.start_span(f"penumbra.{name}", inside, start_time=clock_ns(start_s))
            phase.end(clock_ns(start_s + milliseconds / 1e3))
    span.end(now_ns)
    return recorded


def phase_intervals(timing_ms: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Name, start and length of each phase in milliseconds after the first one's start. Some alternate, window by
    window: their spans start together and last as long as each was busy."""
    start_ms = 0.0
    for name in ("wait", "decode", "queue"):
        yield name, start_ms, timing_ms.get(name, 0.0)
        start_ms += timing_ms.get(name, 0.0)
    for name in ("run", "stitch", "read_out"):
        yield name, start_ms, timing_ms.get(name, 0.0)
    engine_ms = timing_ms.get("total", 0.0) - timing_ms.get("queue", 0.0)
    yield "write", start_ms + engine_ms, timing_ms.get("write", 0.0)
