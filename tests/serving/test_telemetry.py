"""Metrics and traces of a real server: they equal what was sent, and nothing a caller does makes them grow."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from tritonclient.utils import InferenceServerException

from penumbra.serving.telemetry import Telemetry, phase_intervals
from tests.conftest import picture
from tests.serving.http.asking import PNG, ask, metrics, total
from tests.serving.server import ROOT, Server, serving, until

NUM_WINDOWS = 4
"""Of the picture that every call here sends, 45x70 px."""
IMAGE = picture(np.random.Generator(np.random.PCG64(5)), 45, 70)
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = {"wait", "decode", "queue", "run", "stitch", "read_out", "write"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(self, request: Any, _: Any) -> Any:
        self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace]


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    kept = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def traced(
    toy_store: Path, tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]
) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        directory = tmp_path_factory.mktemp("traced")
        settings = {"otlp_endpoint": collector[1], "limit_body_bytes": 100_000}
        with serving(toy_store, directory, predrain_s=0, **settings) as started:
            yield started


Call = tuple[Callable[[], object], tuple[str, str, str], str]
"""What to do, then the model, protocol and status it is to be counted under, and the reason of a refusal."""


def calls_to(server: Server, client: httpx.Client, rpc: triton.InferenceServerClient) -> list[Call]:
    """A mix of good and bad requests with what each shall be counted as."""

    def infer(model: str = "toy-latent", **parameters: object) -> None:
        tensor = triton.InferInput("image", list(IMAGE.shape), "UINT8")
        tensor.set_data_from_numpy(IMAGE)
        try:
            rpc.infer(model, [tensor], parameters=parameters, client_timeout=30)
        except InferenceServerException:
            assert parameters.get("samples") == 0 or model == "unheard"

    def post(data: bytes = PNG, **options: object) -> Callable[[], object]:
        return lambda: ask(client, data, **({"model": "toy-latent", "samples": 3} | options))

    pickle = {"Content-Type": "application/vnd.bentoml+pickle"}
    return [
        *[(post(), ("toy-latent", "http", "200"), "")] * 20,
        *[(lambda: infer(samples=3), ("toy-latent", "grpc", "200"), "")] * 15,
        *[(post(samples="x"), ("", "http", "400"), "BadOption")] * 7,
        *[(post(samples=0), ("toy-latent", "http", "400"), "BadOption")] * 3,
        *[(lambda: infer(samples=0), ("toy-latent", "grpc", "400"), "BadOption")] * 5,
        *[(lambda: infer("unheard"), ("", "grpc", "404"), "UnknownModel")] * 4,
        *[(post(b"GIF89a"), ("toy-latent", "http", "400"), "BadImage")] * 6,
        *[(post(bytes(100_001)), ("", "http", "413"), "TooLarge")] * 2,
        *[(lambda: client.post("/predict", content=b"x", headers=pickle), ("", "http", "415"), "UnsupportedMedia")] * 3,
    ]  # fmt: skip


def by_labels(samples: dict[Any, float], name: str, *labels: str) -> Counter[tuple[str, ...]]:
    wanted = {
        tuple(dict(have)[label] for label in labels): int(value)
        for (n, have), value in samples.items()
        if n == f"penumbra_{name}"
    }
    return Counter(wanted)


def test_a_mixed_load_over_both_protocols_is_counted_exactly(traced: Server) -> None:
    with traced.client() as client, triton.InferenceServerClient(traced.grpc_address) as rpc:
        calls = calls_to(traced, client, rpc)
        order = np.random.Generator(np.random.PCG64(3)).permutation(len(calls))
        before = metrics(client)

        def timed(index: int) -> float:
            started = time.perf_counter()
            calls[index][0]()
            return time.perf_counter() - started

        with ThreadPoolExecutor(8) as threads:
            client_seconds = sum(threads.map(timed, order.tolist()))
        after = metrics(client)

    def grown(name: str, *labels: str) -> Counter[tuple[str, ...]]:
        return by_labels(after, name, *labels) - by_labels(before, name, *labels)

    assert grown("request_seconds_count", "model", "protocol", "status") == Counter(key for _, key, _ in calls)
    assert grown("rejected_total", "reason") == Counter((reason,) for _, _, reason in calls if reason)
    answered = sum(key[2] == "200" for _, key, _ in calls)
    assert grown("windows_total", "model") == {("toy-latent",): answered * NUM_WINDOWS}
    assert grown("samples_total", "model") == {("toy-latent",): answered * NUM_WINDOWS * 3}
    assert grown("batch_windows_sum", "model") == {("toy-latent",): answered * NUM_WINDOWS}
    assert grown("phase_seconds_count", "phase") == {(phase,): answered for phase in PHASES}
    assert grown("entropy_mean_count", "model") == {("toy-latent",): answered}
    assert total(after, "inflight") == total(after, "queue_windows") == 0
    assert total(after, "cancelled_total") == total(before, "cancelled_total")
    server_seconds = total(after, "request_seconds_sum") - total(before, "request_seconds_sum")
    assert 0 < server_seconds <= client_seconds


def test_the_latency_histograms_have_buckets_from_a_millisecond_to_five_minutes(traced: Server) -> None:
    with traced.client() as client:
        ask(client, model="toy-latent")
        samples = metrics(client)
    for name in ("request_seconds_bucket", "phase_seconds_bucket"):
        bounds = {dict(have)["le"] for (n, have) in samples if n == f"penumbra_{name}"}
        assert len(bounds) == 17 and {"0.001", "0.1", "300.0", "+Inf"} < bounds
    whole = by_labels(samples, "request_seconds_bucket", "model", "protocol", "status", "le")
    counts = by_labels(samples, "request_seconds_count", "model", "protocol", "status")
    assert {key[:3]: count for key, count in whole.items() if key[3] == "+Inf"} == counts


def test_what_the_engine_reports_is_counted() -> None:
    telemetry = Telemetry()
    telemetry.out_of_memory("m")
    telemetry.batch_done("m", windows=3, capacity=4, samples=12)
    telemetry.batch_done("m", windows=4, capacity=2, samples=4)
    telemetry.model_loaded("m", seconds=2.5)
    page = telemetry.page("")[0].decode()
    for line in (
        'oom_total{model="m"} 1.0', 'batch_windows_sum{model="m"} 7.0', 'batch_fill_ratio_sum{model="m"} 1.75',
        'windows_total{model="m"} 7.0', 'samples_total{model="m"} 16.0', 'model_load_seconds{model="m"} 2.5',
    ):  # fmt: skip
        assert f"penumbra_{line}\n" in page


def test_what_one_event_may_alert_of_begins_at_zero_before_it_for_an_increase_is_seen_of_nothing_else() -> None:
    telemetry = Telemetry()
    telemetry.model_loaded("m", seconds=2.5)
    telemetry.shadowed(("m", "2"))

    def counts() -> list[float | None]:
        found = telemetry.registry.get_sample_value
        outcomes = ({"model": "m", "version": "2", "outcome": name} for name in ("compared", "failed", "dropped"))
        requests = [found("penumbra_shadow_requests_total", labels) for labels in outcomes]
        return [found("penumbra_oom_total", {"model": "m"}), *requests]

    assert counts() == [0, 0, 0, 0]
    telemetry.out_of_memory("m")
    telemetry.model_loaded("m", seconds=2.5)
    telemetry.shadowed(("m", "2"), "failed")
    assert counts() == [1, 0, 1, 0]


def test_the_documented_metrics_are_exactly_those_there_are() -> None:
    documented = re.findall(
        r"^\| `(penumbra_\w+)", (ROOT / "docs" / "operate" / "metrics.md").read_text(), re.MULTILINE
    )
    suffix = {"counter": "_total", "info": "_info"}
    families = [f for f in Telemetry().registry.collect() if f.name.startswith("penumbra_")]
    assert sorted(documented) == sorted(f.name + suffix.get(f.type, "") for f in families)


def test_two_servers_on_one_host_count_their_own_requests(traced: Server, toy_store: Path, tmp_path: Path) -> None:
    with serving(toy_store, tmp_path, predrain_s=0) as other, other.client() as second, traced.client() as first:
        before = [total(metrics(client), "request_seconds_count") for client in (first, second)]
        for client, count in ((first, 5), (second, 3)):
            for _ in range(count):
                ask(client, model="toy-latent")
        after = [total(metrics(client), "request_seconds_count") for client in (first, second)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 3]


def imported(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ | environment
    )


def test_a_second_worker_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tmp_path / "bentoml.yaml"
    config.write_text("services:\n  penumbra:\n    workers: 2\n")
    done = imported("import serving.service", BENTOML_CONFIG=str(config))
    assert (
        done.returncode and "workers is 2; a server is one worker, so start one server for each device" in done.stderr
    )


def test_without_an_endpoint_nothing_is_traced_and_no_exporter_imported() -> None:
    done = imported(
        "import sys, serving.service; from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider;"
        "print('opentelemetry.exporter' in sys.modules, isinstance(get_tracer_provider(), ProxyTracerProvider))"
    )
    assert done.stdout.strip() == "False True", done.stderr


def test_opentelemetrys_own_variables_say_which_share_is_traced_and_whose_the_spans_are() -> None:
    code = (
        "import serving.service; from bentoml._internal.container import BentoMLContainer;"
        "provider = BentoMLContainer.tracer_provider.get();"
        "print(provider.sampler.get_description(), provider.resource.attributes['service.name'])"
    )
    endpoint = {"PENUMBRA_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
    done = imported(code, **endpoint, OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.25")
    assert done.stdout.strip() == "TraceIdRatioBased{0.25} penumbra", done.stderr
    done = imported(code, **endpoint, OTEL_SERVICE_NAME="north")
    assert done.stdout.startswith("ParentBased{root:AlwaysOnSampler") and done.stdout.strip().endswith(" north")


def test_a_callers_trace_leads_to_a_span_for_every_phase(traced: Server, collector: tuple[Collector, str]) -> None:
    kept = collector[0]
    unsampled, over_grpc = TRACE.replace("0a", "0b"), TRACE.replace("0a", "0c")
    tensor = triton.InferInput("image", list(IMAGE.shape), "UINT8")
    tensor.set_data_from_numpy(IMAGE)
    with traced.client() as client, triton.InferenceServerClient(traced.grpc_address) as rpc:
        for trace, flag in ((unsampled, "00"), (TRACE, "01")):
            client.headers["traceparent"] = f"00-{trace}-{CALLER}-{flag}"
            assert ask(client, model="toy-latent").status_code == 200
        rpc.infer("toy-latent", [tensor], headers={"traceparent": f"00-{over_grpc}-{CALLER}-01"}, client_timeout=30)
    until(lambda: len(kept.of(over_grpc)) == 1 + len(PHASES))
    assert not kept.of(unsampled)
    by_name = {span.name: span for span in kept.of(TRACE)}
    parents = {span.span_id.hex() for span in kept.of(TRACE)} | {CALLER}
    assert all(span.parent_span_id.hex() in parents for span in kept.of(TRACE))
    assert by_name["penumbra.request"].parent_span_id.hex() != CALLER, "BentoML's span of the route stands between"
    assert {a.key: a.value.string_value or a.value.int_value for a in by_name["penumbra.request"].attributes} == {
        "penumbra.model": "toy-latent", "penumbra.protocol": "http", "penumbra.status": 200,
    }  # fmt: skip
    for trace in (TRACE, over_grpc):
        spans = {span.name: span for span in kept.of(trace)}
        request = spans["penumbra.request"]
        phases = {name.removeprefix("penumbra."): span for name, span in spans.items() if span is not request}
        assert phases.keys() >= PHASES
        for phase in (phases[name] for name in PHASES):
            assert phase.parent_span_id == request.span_id
            assert request.start_time_unix_nano <= phase.start_time_unix_nano <= phase.end_time_unix_nano
            assert phase.end_time_unix_nano <= request.end_time_unix_nano
    assert kept.of(over_grpc)[-1].name == "penumbra.request" and kept.of(over_grpc)[-1].parent_span_id.hex() == CALLER


def test_phases_that_alternate_start_together_when_the_queue_ends() -> None:
    timing_ms = {"wait": 1.0, "decode": 2.0, "queue": 4.0, "run": 20.0, "stitch": 5.0, "read_out": 3.0, "total": 32.0}
    assert list(phase_intervals(timing_ms | {"write": 6.0})) == [
        ("wait", 0, 1), ("decode", 1, 2), ("queue", 3, 4), ("run", 7, 20), ("stitch", 7, 5), ("read_out", 7, 3),
        ("write", 35, 6),
    ]  # fmt: skip
