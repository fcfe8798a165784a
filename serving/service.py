"""How Penumbra sits in BentoML: it owns the process, packaging and lifecycle, and nothing on a request's way.

    bentoml serve penumbra.serving.service:Penumbra

One worker process per device. Every route is ours (`penumbra.serving.rest`, `penumbra.serving.oip_rest`) on a mounted
Starlette app, gRPC runs in the same event loop (`penumbra.serving.oip_grpc`), and one typed BentoML route serves
`bentoml.SyncHTTPClient`. This module is also imported by BentoML's supervisor, so torch and what imports it are
imported where the worker builds its service. BentoML's metrics, UI page, URL inputs, pickle bodies, batching and
inter-process calls are off.
"""

import asyncio
import ctypes
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any

import bentoml
import bentoml._internal.server.http.traffic as bentomls
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from penumbra.models.errors import BadArtifact, BadImage, BadOption, PenumbraError
from penumbra.serving.access import AccessLog
from penumbra.serving.build import build_facts
from penumbra.serving.engine.signature import PublicKeys, read_public_keys
from penumbra.serving.guard import Bodies, Bounds, Guard, Timeout
from penumbra.serving.head import bound_heads
from penumbra.serving.keys import read_keys, warn_if_open
from penumbra.serving.logs import set_up_logs
from penumbra.serving.settings import Settings, read_settings
from penumbra.serving.statuses import status_of
from penumbra.serving.telemetry import Telemetry
from penumbra.serving.tracing import bentoml_tracing, use_bentomls_provider

if TYPE_CHECKING:
    from penumbra.serving.gateway import Gateway
    from penumbra.serving.oip_grpc import GrpcServer

SETTINGS = read_settings()
TELEMETRY = Telemetry(latency_buckets_s=SETTINGS.latency_buckets_s)
KEYS = read_keys(SETTINGS.api_keys.get_secret_value(), SETTINGS.api_keys_file)
TRUSTED_KEYS = None if SETTINGS.trusted_keys_file is None else read_public_keys(SETTINGS.trusted_keys_file)
BODIES = Bodies(SETTINGS.limit_bodies_bytes)
PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""
APP = Starlette()
"""Carries our routes; they are filled in when the worker has built the engine."""


class PredictInput(bentoml.IODescriptor):  # type: ignore[misc]
    """What the typed route takes, and nothing else: a misspelt option is an error and not its default."""

    model_config = ConfigDict(
        extra="forbid", title="the JSON of /predict, which takes image, model, samples and seed; detail says where"
    )
    image: np.ndarray
    model: str = ""
    samples: int | None = None
    seed: int = 0


class PredictAnswer(BaseModel):
    """Answer of the typed route: nested lists [H][W]; uncertainties in nats. A map that it has not is absent."""

    labels: list[list[int]]
    confidence: list[list[float]]
    entropy: list[list[float]]
    mutual_information: list[list[float]] | None = Field(default=None, exclude_if=lambda values: values is None)


@bentoml.asgi_app(APP, path="/")
@bentoml.service(
    name="penumbra",
    workers=1,
    traffic={"timeout": SETTINGS.timeout_s + 30},
    metrics={"enabled": False},
    tracing=bentoml_tracing(SETTINGS.otlp_endpoint, SETTINGS.trace_share),
    logging={"access": {"enabled": False}},
)
class Penumbra:
    """Loads the store, then answers."""

    def __init__(self) -> None:
        gc.disable()  # until all is loaded: collecting while torch is imported takes a quarter of its time
        from penumbra.serving import jobs_rest, oip_rest
        from penumbra.serving.jobs import Jobs, job_bounds
        from penumbra.serving.oip import Inference
        from penumbra.serving.rest import ERROR_HANDLERS, routes

        logging.getLogger("penumbra").setLevel(SETTINGS.log_level)
        end_with_parent()
        if SETTINGS.otlp_endpoint:
            use_bentomls_provider()
        self.gateway = build_gateway(SETTINGS, TELEMETRY, trusted_keys=TRUSTED_KEYS)
        scheduler = self.gateway.segmenter.scheduler
        build = build_facts(SETTINGS.revision)
        TELEMETRY.describe(build, queued_windows=lambda: scheduler.queued[0])
        self.grpc: GrpcServer | None = None
        self.inference = Inference(self.gateway, store=SETTINGS.store if SETTINGS.model_control else None)
        oip_routes = oip_rest.routes(
            self.inference, body_bytes=SETTINGS.limit_body_bytes, json_bytes=SETTINGS.limit_json_bytes, bodies=BODIES
        )
        self.jobs = Jobs(SETTINGS.jobs, self.gateway, bounds=job_bounds(SETTINGS), store=SETTINGS.store)
        job_routes = jobs_rest.routes(self.jobs, TELEMETRY)
        APP.router.routes[:] = [*oip_routes, *job_routes, *routes(self.gateway, build)]
        APP.exception_handlers.update(ERROR_HANDLERS)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def begin(self) -> None:
        """Ready; on SIGTERM readiness falls first, and connections close `predrain_s` later."""
        gc.collect()
        gc.freeze()
        gc.enable()
        gc.set_threshold(50_000, 20, 100)  # what a request makes is freed by count of references
        stop = signal.getsignal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        await self._start_grpc()

        def drain(signum: int, frame: object) -> None:
            self.gateway.state = "draining"
            if self.grpc:
                self.grpc.set_serving(False)
            if callable(stop):
                loop.call_soon_threadsafe(loop.call_later, SETTINGS.predrain_s, stop, signum, None)

        signal.signal(signal.SIGTERM, drain)
        warn_if_open(KEYS, model_control=SETTINGS.model_control)
        self.gateway.state = "ready"
        self.jobs.start()

    async def _start_grpc(self) -> None:
        from penumbra.serving.oip_grpc import GrpcServer

        if SETTINGS.grpc_address:
            self.grpc = GrpcServer(
                self.inference, address=SETTINGS.grpc_address, message_bytes=SETTINGS.limit_body_bytes, keys=KEYS,
                bodies=BODIES,
            )  # fmt: skip
            await self.grpc.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def end(self) -> None:
        if self.grpc:
            await self.grpc.stop(grace_s=SETTINGS.timeout_s)
        await asyncio.to_thread(self.jobs.close)
        await asyncio.to_thread(self.gateway.close)

    @bentoml.api(input_spec=PredictInput)  # type: ignore[untyped-decorator]
    async def predict(
        self, image: np.ndarray, model: str = "", samples: int | None = None, seed: int = 0
    ) -> PredictAnswer:
        """Labels and uncertainty of one image, uint8 [H, W, 3], as arrays."""
        from penumbra.serving.engine.options import SegmentOptions
        from penumbra.serving.rest import disconnected

        options = SegmentOptions(model=model or None, samples=samples, seed=seed)
        try:
            with TELEMETRY.track("bentoml") as tracked:
                here = Penumbra.context.request  # type: ignore[attr-defined]
                _, answer = await self.gateway.answer(
                    _as_pixels(image), options, _as_lists, request=tracked, gone=lambda: disconnected(here)
                )
        except PenumbraError as error:
            return JSONResponse({"error": str(error)}, status_of(error)[0])  # type: ignore[return-value]
        return answer


def _as_pixels(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """JSON integers arrive as int64: pixel values become uint8. Raises BadImage for others; the rest is left to be
    refused."""
    if image.dtype.kind not in "iu" or not image.size:
        return image
    if image.min() < 0 or image.max() > 255:
        raise BadImage(f"the image has values from {image.min()} to {image.max()}; 0 to 255 are possible")
    return image.astype(np.uint8)


def _as_lists(prediction: Any) -> PredictAnswer:
    maps = {name: values.tolist() for name, values in prediction.maps.items()}
    return PredictAnswer(labels=prediction.labels_HW.tolist(), **maps)


def build_gateway(settings: Settings, telemetry: Telemetry, *, trusted_keys: PublicKeys | None) -> "Gateway":
    """The engine over the store, and the gateway over the engine. A store without one good model is an error."""
    import torch

    from penumbra.serving.engine.options import Limits
    from penumbra.serving.engine.runtime import Tuning
    from penumbra.serving.engine.segmenter import Segmenter
    from penumbra.serving.gateway import Gateway

    torch.set_num_threads(1)  # only the scheduler's lanes enter parallel regions; others would fight
    limits = Limits(
        settings.limit_pixels, settings.limit_windows, settings.limit_samples, settings.limit_queue_samples,
        settings.limit_window_pixels,
    )  # fmt: skip
    tuning = Tuning(
        settings.windows_per_batch, settings.samples_per_call, settings.deterministic,
        target_s=settings.target_ms / 1e3,
    )  # fmt: skip
    segmenter = Segmenter.open(
        settings.store, limits=limits, device=settings.device or None, threads=settings.threads or None,
        lanes=settings.lanes or None, tuning=tuning, observer=telemetry, trusted_keys=trusted_keys,
    )  # fmt: skip
    if not segmenter.cards():
        reasons = "; ".join(segmenter.refused.values()) or "it is empty"
        raise BadArtifact(f"the store {settings.store} has no model to serve: {reasons}")
    return Gateway(
        segmenter, telemetry, limit_requests=settings.limit_requests, timeout_s=settings.timeout_s,
        cache_bytes=settings.cache_mb * 2**20,
    )  # fmt: skip


def end_with_parent() -> None:
    """Get SIGTERM when the supervisor dies: a worker without one would keep the ports from the next server."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def check_one_worker() -> None:
    """Raises BadOption where BentoML is configured for more: they would share a device, and each /metrics page would
    tell of one of them."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    workers = BentoMLContainer.config.get().get("services", {}).get("penumbra", {}).get("workers", 1)
    if workers != 1:
        raise BadOption(f"workers is {workers!r}; a server is one worker, so start one server for each device")


check_one_worker()
bentomls.TimeoutMiddleware = lambda app, timeout: AccessLog(Timeout(app, timeout))
set_up_logs(SETTINGS.log_format)
bound_heads(SETTINGS.limit_head_bytes)
Penumbra.add_asgi_middleware(  # type: ignore[attr-defined]
    Guard, ours=APP, telemetry=TELEMETRY, keys=KEYS, bodies=BODIES,
    bounds=Bounds(SETTINGS.limit_head_bytes, SETTINGS.limit_body_bytes, SETTINGS.limit_json_bytes),
)  # fmt: skip
