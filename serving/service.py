"""How Penumbra sits in BentoML: it owns the process, packaging and lifecycle, and nothing on a request's way.

    bentoml serve penumbra.serving.service:Penumbra

One worker process per device. Every route is ours (`penumbra.serving.http`) on a mounted
Starlette app, gRPC runs in the same event loop (`penumbra.serving.oip.grpc`), and one typed BentoML route serves
`bentoml.SyncHTTPClient`. This module is also imported by BentoML's supervisor, so torch and what imports it are
imported in the thread that loads. BentoML's metrics, UI page, URL inputs, pickle bodies, batching and
inter-process calls are off.
"""

import asyncio
import gc
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import bentoml
import bentoml._internal.server.http.traffic as bentomls
import numpy as np
from bentoml._internal.container import BentoMLContainer
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from penumbra.models.errors import BadImage, BadOption, PenumbraError
from penumbra.serving.http.admission import AccessLog, Guard, Timeout, refusal
from penumbra.serving.http.head import bound_heads, serve_securely
from penumbra.serving.process import end_with_parent, end_with_workers, give_up, set_up_logs
from penumbra.serving.room import Bodies
from penumbra.serving.settings import check_settings
from penumbra.serving.telemetry import Telemetry, export_traces, tracer_provider

if TYPE_CHECKING:
    from penumbra.serving.gateway import Gateway
    from penumbra.serving.jobs import Jobs
    from penumbra.serving.oip.grpc_server import GrpcServer
    from penumbra.serving.oip.protocol import Inference
    from penumbra.serving.watch import StoreWatch

log = logging.getLogger("penumbra")

try:
    SETTINGS, KEYS, TRUSTED_KEYS, CERTIFICATE = check_settings()
except BadOption as error:  # in the supervisor, which BentoML would let end in a traceback
    raise SystemExit(f"penumbra: {error}") from None
TELEMETRY = Telemetry()
BODIES = Bodies(SETTINGS.limit_bodies_bytes)
APP = Starlette()
"""The application of our routes, which are filled in when the worker has built the engine."""
APP.state.is_loaded = False
TRACING = {"sample_rate": 0.0} | ({} if SETTINGS.otlp_endpoint else {"excluded_urls": ".*"})
"""BentoML's spans, of which ours are children. Where nobody collects them, each would be made and thrown away."""
TYPED = "The same as arrays in JSON, for bentoml.SyncHTTPClient."
"""What the OpenAPI document says of the typed route."""


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
    """The answer of the typed route: nested lists [H][W]; uncertainties in nats. A map that it has not is absent.

    warnings: sentences about what the caller should know of it; absent where there is none. scores: of the picture,
    null where there is none.
    """

    labels: list[list[int]]
    confidence: list[list[float]]
    entropy: list[list[float]]
    mutual_information: list[list[float]] | None = Field(default=None, exclude_if=lambda values: values is None)
    warnings: tuple[str, ...] = Field(default=(), exclude_if=lambda sentences: not sentences)
    scores: dict[str, float | None] = Field(default_factory=dict)


@bentoml.asgi_app(APP, path="/")
@bentoml.service(
    name="penumbra", workers=1, traffic={"timeout": SETTINGS.timeout_s + 30}, metrics={"enabled": False},
    tracing=TRACING, logging={"access": {"enabled": False}},
)  # fmt: skip
class Penumbra:
    """Says at once that it lives, loads the store meanwhile, then answers."""

    def __init__(self) -> None:
        gc.disable()  # until all is loaded: collecting while torch is imported takes a quarter of its time
        logging.getLogger("penumbra").setLevel(SETTINGS.log_level)
        logging.getLogger("penumbra.audit").setLevel("INFO")  # at every level: it says who changed what is served
        end_with_parent()
        if SETTINGS.otlp_endpoint:
            export_traces(BentoMLContainer.tracer_provider.get(), SETTINGS.otlp_endpoint)
        self.gateway: Gateway | None = None
        self.jobs: Jobs | None = None
        self.watch: StoreWatch | None = None
        self.grpc: GrpcServer | None = None

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def supervise() -> None:
        """BentoML calls this in the supervisor alone."""
        end_with_workers()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def begin(self) -> None:
        """Listen, and load; on SIGTERM readiness falls first, and connections close `predrain_s` later."""
        loop, stop = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

        def drain(signum: int, frame: object) -> None:
            if self.gateway:
                self.gateway.state = "draining"
            if self.grpc:
                loop.call_soon_threadsafe(self.grpc.health.set_serving, False)
            Timeout.ends_at = loop.time() + SETTINGS.timeout_s
            if callable(stop):
                delay_s = SETTINGS.predrain_s if self.gateway else 0
                loop.call_soon_threadsafe(loop.call_later, delay_s, stop, signum, None)

        signal.signal(signal.SIGTERM, drain)
        if SETTINGS.grpc_address:
            from penumbra.serving.oip.grpc_server import GrpcServer

            self.grpc = GrpcServer(
                address=SETTINGS.grpc_address, message_bytes=SETTINGS.limit_body_bytes, keys=KEYS, telemetry=TELEMETRY,
                certificate=CERTIFICATE,
            )  # fmt: skip
            try:
                await self.grpc.start()
            except BadOption as error:
                give_up(str(error))
        if not KEYS:
            also = ", load models and unload them" if SETTINGS.model_control else ""
            log.warning("NO API KEYS ARE SET: whoever reaches the ports of this server may use it%s; see "
                        "docs/operate/security.md", also)  # fmt: skip
        threading.Thread(target=self._load, args=(loop,), name="load", daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load everything, or end the server, in a thread of its own while the event loop says so."""
        try:
            from penumbra.serving.assembly import assemble

            loaded = assemble(APP, SETTINGS, telemetry=TELEMETRY, bodies=BODIES, trusted_keys=TRUSTED_KEYS, typed=TYPED)
            gc.collect()
            gc.freeze()
            gc.enable()
            gc.set_threshold(50_000, 20, 100)  # what a request makes is freed by count of references
        except (PenumbraError, OSError) as error:
            give_up(str(error))
        except Exception:
            log.exception("loading failed unexpectedly")
            give_up("loading failed unexpectedly, as is said above")
        loop.call_soon_threadsafe(self._open, *loaded)

    def _open(self, gateway: "Gateway", inference: "Inference", jobs: "Jobs", watch: "StoreWatch") -> None:
        """Answer from now on. Called in the event loop."""
        from penumbra.serving.oip.grpc import Calls, service_handlers

        self.gateway, self.jobs, self.watch = gateway, jobs, watch
        gateway.state = "ready"
        APP.state.is_loaded = True
        jobs.start()
        watch.start()
        if self.grpc:
            self.grpc.health.is_alive = lambda: gateway.is_alive
            self.grpc.open(service_handlers(Calls(inference, BODIES, KEYS)))
        place = BentoMLContainer.remote_runner_mapping.get().get("penumbra", "http://").partition("//")[2]
        url = f"{'https' if CERTIFICATE else 'http'}://{place}"
        models = ", ".join(card.name for card in gateway.segmenter.cards())
        log.info("ready: %s/ and gRPC on %s, with %s", url, SETTINGS.grpc_address or "no port", models)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def end(self) -> None:
        if not self.gateway or not self.jobs or not self.watch:
            os._exit(0)  # nothing was accepted, and the thread that loads may be anywhere
        if self.grpc:
            await self.grpc.stop(grace_s=SETTINGS.timeout_s)
        for part in (self.watch, self.jobs, self.gateway):
            await asyncio.to_thread(part.close)

    @bentoml.api(input_spec=PredictInput)  # type: ignore[untyped-decorator]
    async def predict(
        self, image: np.ndarray, model: str = "", samples: int | None = None, seed: int = 0
    ) -> PredictAnswer:
        """Labels and uncertainty of one image, uint8 [H, W, 3], as arrays."""
        from penumbra.serving.engine.options import SegmentOptions
        from penumbra.serving.http.upload import disconnected

        assert self.gateway  # the guard lets nothing through before
        options = SegmentOptions(model=model or None, samples=samples, seed=seed)
        here = Penumbra.context.request  # type: ignore[attr-defined]
        try:
            with TELEMETRY.track("bentoml") as tracked:
                _, answer = await self.gateway.answer(
                    _as_pixels(image), options, _as_lists, request=tracked, gone=lambda: disconnected(here)
                )
        except PenumbraError as error:
            return refusal(error)  # type: ignore[return-value]
        return answer


def _as_pixels(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixel values as uint8; JSON's integers arrive as int64. Raises BadImage for others, and leaves what is no array
    of integers to be refused."""
    if image.dtype.kind not in "iu" or not image.size:
        return image
    if image.min() < 0 or image.max() > 255:
        raise BadImage(f"the image has values from {image.min()} to {image.max()}; 0 to 255 are possible")
    return image.astype(np.uint8)


def _as_lists(prediction: Any) -> PredictAnswer:
    maps = {name: values.tolist() for name, values in prediction.maps.items()}
    return PredictAnswer(
        labels=prediction.labels_HW.tolist(), warnings=prediction.warnings, scores=prediction.scored, **maps
    )


def shared(app: ASGIApp) -> ASGIApp:
    """Let pages of the named origins ask an application, send whatever they like, and read all of its answers."""
    origins, all_of = SETTINGS.cors_origins.split(), ["*"]
    if not origins:
        return app
    return CORSMiddleware(app, origins, allow_methods=all_of, allow_headers=all_of, expose_headers=all_of)


if SETTINGS.otlp_endpoint:
    BentoMLContainer.tracer_provider.set(tracer_provider())
workers = BentoMLContainer.config.get().get("services", {}).get("penumbra", {}).get("workers", 1)
if workers != 1:  # they would share a device, and each /metrics page would tell of one of them
    raise BadOption(f"workers is {workers!r}; a server is one worker, so start one server for each device")
bentomls.TimeoutMiddleware = lambda app, timeout: AccessLog(shared(Timeout(app, timeout)))
set_up_logs(SETTINGS.log_format, framework="bentoml")
bound_heads(SETTINGS.limit_head_bytes)
if CERTIFICATE:
    serve_securely(CERTIFICATE)
    newest = CERTIFICATE.now
    TELEMETRY.follow("tls_not_after_seconds", lambda: newest().ends)
Penumbra.add_asgi_middleware(  # type: ignore[attr-defined]
    Guard, routes=APP, telemetry=TELEMETRY, keys=KEYS, settings=SETTINGS, bodies=BODIES
)
