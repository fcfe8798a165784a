"""OpenTelemetry traces of requests: one span each, and one per phase in it. Off unless there is an endpoint.

BentoML makes the provider and, for HTTP, the span that a caller's `traceparent` leads to; ours hang below it.
"""

import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from opentelemetry import propagate, trace

from penumbra.models.errors import BadOption

INTERLEAVED = ("run", "stitch", "read_out")
"""Phases that alternate, window by window: their spans start together and last as long as each was busy."""


def bentoml_tracing(endpoint: str, share: float) -> dict[str, Any]:
    """BentoML's `tracing` option: spans of a share of the requests go to an OTLP collector over gRPC.

    Raises BadOption where the exporter is not installed.
    """
    if not endpoint:
        return {"sample_rate": 0.0}
    if find_spec("opentelemetry.exporter") is None:
        raise BadOption(
            f"PENUMBRA_OTLP_ENDPOINT is {endpoint!r} and the exporter is not installed; "
            "`pip install 'penumbra-serving[otlp]'` brings it"
        )
    otlp = {"protocol": "grpc", "endpoint": endpoint, "grpc": {"insecure": not endpoint.startswith("https://")}}
    return {"exporter_type": "otlp", "sample_rate": share, "otlp": otlp}


def use_bentomls_provider() -> None:
    """Make BentoML's provider the one of `record_request`; it is not the global one by itself."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    trace.set_tracer_provider(BentoMLContainer.tracer_provider.get())


def record_request(
    attributes: Mapping[str, str | int], *, began_s: float, worked_from_s: float, timing_ms: Mapping[str, float],
    carrier: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Record a request that ended just now, below the current span or the one that `carrier` (headers) names. Returns
    its trace's id, empty where it is not recorded.

    began_s, worked_from_s: times of `perf_counter`, of the request's arrival and of the start of its first phase.
    """
    now_s, now_ns = time.perf_counter(), time.time_ns()

    def clock_ns(moment_s: float) -> int:
        return now_ns - int(1e9 * (now_s - moment_s))

    tracer = trace.get_tracer("penumbra")
    parent = propagate.extract(carrier) if carrier is not None else None
    span = tracer.start_span("penumbra.request", parent, attributes=attributes, start_time=clock_ns(began_s))
    if span.is_recording():
        inside = trace.set_span_in_context(span)
        for name, start_ms, milliseconds in phase_intervals(timing_ms):
            start_s = worked_from_s + start_ms / 1e3
            phase = tracer.start_span(f"penumbra.{name}", inside, start_time=clock_ns(start_s))
            phase.end(clock_ns(start_s + milliseconds / 1e3))
    recorded = trace.format_trace_id(span.get_span_context().trace_id) if span.is_recording() else ""
    span.end(now_ns)
    return recorded


def phase_intervals(timing_ms: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Name, start and length of each phase in milliseconds after the first one's start."""
    start_ms = 0.0
    for name in ("wait", "decode", "queue"):
        yield name, start_ms, timing_ms.get(name, 0.0)
        start_ms += timing_ms.get(name, 0.0)
    for name in INTERLEAVED:
        yield name, start_ms, timing_ms.get(name, 0.0)
    engine_ms = timing_ms.get("total", 0.0) - timing_ms.get("queue", 0.0)
    yield "write", start_ms + engine_ms, timing_ms.get("write", 0.0)
