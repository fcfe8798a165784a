"""All paths of HTTP but those of jobs and of the Open Inference Protocol, and how an error is told on any of them."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from html import escape
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route

from penumbra.models.card import Card
from penumbra.models.errors import ModelFault, PenumbraError
from penumbra.serving import playground
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.admission import BENTO_PATHS, health, refusal
from penumbra.serving.http.openapi import document
from penumbra.serving.http.segment import segment
from penumbra.serving.http.upload import refuse_options
from penumbra.serving.room import Bodies


def routes(gateway: Gateway, build: Mapping[str, str], *, bodies: Bodies, typed: str = "") -> list[BaseRoute]:
    """The routes over a gateway. build: version and commit of the server. bodies: what lines of answers are counted in.
    typed: what BentoML's typed route does."""
    alive, described = partial(health, lambda: {"live": gateway.is_alive}, 503), document(build, typed=typed)
    return [
        *playground.routes(),
        Route("/docs", partial(docs_page, described)),
        Route("/segment", partial(segment, gateway, bodies), methods=["POST"]),
        Route("/models", partial(models, gateway)),
        Route("/models/{name}", partial(model, gateway)),
        Route("/healthz", alive),
        Route("/livez", alive),
        Route("/readyz", partial(health, lambda: {"ready": gateway.is_ready, "state": gateway.state}, 503)),
        Route("/metrics", partial(metrics, gateway)),
        Route("/version", partial(told, build)),
        Route("/docs.json", partial(told, described)),
        Route("/{path:path}", elsewhere, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    ]


async def models(gateway: Gateway, request: Request) -> Response:
    refuse_options(request)
    segmenter = gateway.segmenter
    refused = [{"name": name, "error": reason} for name, reason in segmenter.refused.items()]
    served = [
        summary(card, is_tuned_here=segmenter.is_tuned_here(card)) | {"in_memory": segmenter.is_in_memory(card)}
        for card in segmenter.cards()
    ]
    return JSONResponse({"models": served, "refused": refused})


async def model(gateway: Gateway, request: Request) -> Response:
    refuse_options(request)
    card = gateway.segmenter.find(request.path_params["name"]).card
    return JSONResponse(dataclasses.asdict(card) | {"maps": _maps_by_samples(card)})


async def metrics(gateway: Gateway, request: Request) -> Response:
    page, content_type = gateway.telemetry.page(request.headers.get("accept", ""))
    return Response(page, headers={"Content-Type": content_type})


async def told(document: Mapping[str, Any], _: Request) -> Response:
    return JSONResponse(document)


def summary(card: Card, *, is_tuned_here: bool) -> dict[str, object]:
    """What a list of models says of each."""
    tuned = card.tuned
    return {
        "name": card.name, "version": card.version, "method": card.method,
        "classes": [c.name for c in card.classes], "sampling": dataclasses.asdict(card.sampling),
        "views": card.views, "prompt": card.prompt.kind, "maps": _maps_by_samples(card),
        "extra_maps": [extra.name for extra in card.extra_maps],
        "risks": list(card.calibration.risks) if card.calibration else [],
        "class_risks": list(card.calibration.class_risks) if card.calibration else [],
        "novelty": ", ".join(card.novelty.maps) if card.novelty else None,
        "window": [card.window.height, card.window.width], "data": card.provenance.data,
        "licence": card.provenance.licence, "metrics": card.provenance.metrics,
        "tuned": tuned and {"processor": tuned.processor, "threads": tuned.threads, "is_here": is_tuned_here},
    }  # fmt: skip


def _maps_by_samples(card: Card) -> dict[str, list[str]]:
    """The maps that can be asked for of a `single` sample and of `several`, as far as the model takes them, in the
    card's views. With others a model of one sample has what several have."""
    counts = {card.sampling_with(prompt=prompt).default_samples for prompt in (False, True)}
    if card.sampling.is_stochastic:
        counts.add(1)
    members = sorted(map(card.num_members, counts))
    return {"single" if count == 1 else "several": list(card.maps(count)) for count in members}


async def docs_page(document: Mapping[str, Any], _: Request) -> Response:
    """The OpenAPI document as one plain page without external resources."""
    rows = [
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td><td>{escape(operation['summary'])}</td></tr>"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Penumbra</title>"
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:46rem;margin:2rem auto;"
        "padding:0 1rem}td{padding:.3rem 1rem .3rem 0;vertical-align:top}</style><h1>Penumbra</h1>"
        f"<p>Segmentation that says, per pixel, how sure it is. Machine-readable: <a href=docs.json>docs.json</a>, "
        f"<a href=models>models</a>, <a href=metrics>metrics</a>.</p><table>{''.join(rows)}</table>"
    )


async def elsewhere(request: Request) -> Response:
    """Refuse with 405 where the path takes another method, else with 404."""
    path, method = request.url.path, request.method
    others = [r for r in request.app.routes if isinstance(r, Route) and r.matches(request.scope)[0] is Match.PARTIAL]
    allowed = sorted({m for route in others for m in route.methods or ()} | set(BENTO_PATHS.get(path, "").split()))
    if allowed:
        takes = ", ".join(allowed)
        raise HTTPException(405, f"{path[:80]} does not take {method}; it takes {takes}", {"Allow": takes})
    raise HTTPException(404, f"there is no {method} {path[:80]}; /docs.json lists what there is")


async def tell_error(_: Request, error: Exception) -> Response:
    """The answer for any error: what it says, or, where nobody foresaw it, no more than that."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)
    return refusal(error if isinstance(error, PenumbraError) else ModelFault())


ERROR_HANDLERS = dict.fromkeys((PenumbraError, HTTPException, Exception), tell_error)
