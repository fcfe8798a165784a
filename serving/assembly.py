"""Everything that answers, built from the settings: the engine over the store, and what the transports ask.

`penumbra.serving.service` gives it a process; importing this module imports torch.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from starlette.applications import Starlette

import penumbra.serving.oip.grpc  # noqa: F401  (for the event loop)
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.signature import PublicKeys
from penumbra.serving.engine.store import find_artifact, find_promoted
from penumbra.serving.gateway import Gateway
from penumbra.serving.http import jobs as job_routes
from penumbra.serving.http import v2
from penumbra.serving.http.routes import ERROR_HANDLERS, routes
from penumbra.serving.jobs import Jobs
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.process import build_facts, lock, own_directory
from penumbra.serving.room import Bodies
from penumbra.serving.settings import Settings
from penumbra.serving.shadow import Shadow
from penumbra.serving.telemetry import Telemetry, audit
from penumbra.serving.watch import StoreWatch, look


def assemble(
    app: Starlette, settings: Settings, *, telemetry: Telemetry, bodies: Bodies, trusted_keys: PublicKeys | None,
    typed: str = "",
) -> tuple[Gateway, Inference, Jobs, StoreWatch]:  # fmt: skip
    """Load the store and give the app its routes. typed: what the document says of BentoML's. Raises PenumbraError."""
    if "jobs" not in settings.model_fields_set:
        own_directory(settings.jobs)  # it is where anybody may make one
    lock(settings.jobs).close()  # a place that cannot be used is told before models are loaded
    before = look(settings.store)
    find = find_promoted if settings.shadow_share else find_artifact
    gateway = _gateway(settings, telemetry, find=find, trusted_keys=trusted_keys)
    segmenter, build = gateway.segmenter, build_facts(settings.revision)
    telemetry.name_build(build)
    telemetry.follow("queue_windows", lambda: segmenter.scheduler.queued[0])
    telemetry.follow("models_refused", lambda: len(segmenter.refused))
    telemetry.follow("models_in_memory", lambda: segmenter.residency.resident[0])
    telemetry.follow("model_bytes", lambda: segmenter.residency.resident[1])
    inference = Inference(gateway, store=settings.store if settings.model_control else None, find=find)
    if settings.shadow_share:
        gateway.shadow = Shadow(settings.shadow_share, segmenter, telemetry)
        for card in segmenter.cards():
            inference.load_newest(card.name, settings.store)
    oip_routes = v2.routes(
        inference, body_bytes=settings.limit_body_bytes, json_bytes=settings.limit_json_bytes, bodies=bodies
    )
    watch = StoreWatch(settings.store, before, every_s=settings.watch_store_s, inference=inference)
    jobs = Jobs(settings, gateway)
    own_routes = routes(gateway, build, bodies=bodies, typed=typed)
    app.router.routes[:] = [*oip_routes, *job_routes.routes(jobs, telemetry), *own_routes]
    app.exception_handlers.update(ERROR_HANDLERS)
    return gateway, inference, jobs, watch


def _gateway(
    settings: Settings, telemetry: Telemetry, *, find: Callable[[Path, str], Path], trusted_keys: PublicKeys | None
) -> Gateway:
    """The engine over the store, and the gateway over the engine. A store without one good model is an error.

    find: the version of a model that is served, which is the newest unless it has to be promoted.
    """
    torch.set_num_threads(1)  # only the scheduler's lanes enter parallel regions; others would fight
    fixed = settings.model_dump(include={"windows_per_batch", "samples_per_call", "deterministic", "cuda_graphs"})
    tuning = Tuning(**fixed, target_s=settings.target_ms / 1e3)
    segmenter = Segmenter.open(
        settings.store, find=find, limits=settings.limits, device=settings.device,
        threads=settings.threads, lanes=settings.lanes, tuning=tuning, observer=telemetry, trusted_keys=trusted_keys,
    )  # fmt: skip
    for card in segmenter.cards():
        audit("load", card.name, by="start", version=card.version)
    for name in segmenter.refused:
        audit("load", name, by="start", outcome="BadArtifact")
    if not segmenter.cards():
        reasons = "; ".join(segmenter.refused.values()) or "it is empty"
        raise BadArtifact(f"the store {settings.store} has no model to serve: {reasons}")
    return Gateway(
        segmenter, telemetry, limit_requests=settings.limit_requests, timeout_s=settings.timeout_s,
        cache_bytes=settings.cache_mb * 2**20,
    )  # fmt: skip
