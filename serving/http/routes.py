"""HTTP: `POST /segment`, the models, health and metrics. Parsing and formatting only; the rest is the gateway's."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping
from html import escape
from urllib.parse import quote

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from penumbra.models.card import Card
from penumbra.models.errors import BadImage, BadOption, PenumbraError, UnsupportedMedia
from penumbra.serving import playground
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.admission import BENTO_PATHS
from penumbra.serving.http.openapi import describe
from penumbra.serving.render import choose_format, parse_request, render_with_notes
from penumbra.serving.statuses import UNEXPECTED, headers_of, status_of

PRINTABLE = bytes(range(0x20, 0x7F)).decode().replace("%", "")
"""What text in a header is not percent-encoded: any other character, a line's end above all, would break the answer."""
MAX_FIELDS, MAX_FIELD_BYTES = 16, 64 * 1024


def routes(gateway: Gateway, build: Mapping[str, str]) -> list[BaseRoute]:
    """All of Penumbra's own HTTP routes over a gateway. build: version and commit of the server."""
    surface = Surface(gateway, build)
    return [
        *playground.routes(),
        Route("/docs", surface.docs_page),
        Route("/segment", surface.segment, methods=["POST"]),
        Route("/models", surface.models),
        Route("/models/{name}", surface.model),
        Route("/healthz", surface.alive),
        Route("/livez", surface.alive),
        Route("/readyz", surface.ready),
        Route("/metrics", surface.metrics),
        Route("/version", surface.version),
        Route("/docs.json", surface.openapi),
        Elsewhere("/{path:path}", surface.elsewhere, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    ]


class Elsewhere(Route):
    """Matches everything but what BentoML answers, also the wrong methods of known paths."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_bentos = BENTO_PATHS.get(scope["path"], "") == scope.get("method")
        return (Match.NONE, {}) if is_bentos else super().matches(scope)


class Surface:
    """The handlers."""

    def __init__(self, gateway: Gateway, build: Mapping[str, str]) -> None:
        self._gateway, self._build = gateway, build

    async def segment(self, request: Request) -> Response:
        with self._gateway.telemetry.track("http") as tracked:
            media = choose_format(request.headers.get("accept", ""))
            data, fields = await read_upload(request)
            options, style = parse_request(media, fields)
            prediction, (body, notes) = await self._gateway.answer(
                data, options, lambda answer: render_with_notes(answer, media, style), request=tracked,
                gone=lambda: disconnected(request),
            )  # fmt: skip
        prediction = dataclasses.replace(prediction, warnings=prediction.warnings + notes)
        return Response(body, media_type=media, headers=answer_headers(prediction, tracked.timing_ms))

    async def models(self, request: Request) -> Response:
        refuse_options(request)
        gateway = self._gateway
        return JSONResponse({
            "models": [summary(card) for card in gateway.segmenter.cards()],
            "refused": [{"name": name, "error": why} for name, why in gateway.segmenter.refused.items()],
        })  # fmt: skip

    async def model(self, request: Request) -> Response:
        refuse_options(request)
        card = self._gateway.segmenter.find(request.path_params["name"]).card
        return JSONResponse(dataclasses.asdict(card))

    async def alive(self, _: Request) -> Response:
        return JSONResponse({"live": self._gateway.is_alive}, 200 if self._gateway.is_alive else 503)

    async def ready(self, _: Request) -> Response:
        return JSONResponse(
            {"ready": self._gateway.is_ready, "state": self._gateway.state}, 200 if self._gateway.is_ready else 503
        )

    async def metrics(self, request: Request) -> Response:
        page, content_type = self._gateway.telemetry.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})

    async def version(self, _: Request) -> Response:
        return JSONResponse(self._build)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(describe(self._build))

    async def docs_page(self, _: Request) -> Response:
        return HTMLResponse(_docs_html(describe(self._build)))

    async def elsewhere(self, request: Request) -> Response:
        """405 where the path takes another method, else 404."""
        path, method = request.url.path, request.method
        partial = [
            r for r in request.app.routes if isinstance(r, Route) and r.matches(request.scope)[0] is Match.PARTIAL
        ]
        allowed = sorted({m for route in partial for m in route.methods or ()} | set(BENTO_PATHS.get(path, "").split()))
        if allowed:
            takes = ", ".join(allowed)
            return error_response(405, f"{path[:80]} does not take {method}; it takes {takes}", {"Allow": takes})
        return error_response(404, f"there is no {method} {path[:80]}; /docs.json lists what there is")


async def read_upload(request: Request) -> tuple[bytes, dict[str, str]]:
    """The picture's bytes and the options, from a raw body or a multipart form, plus the query.

    Raises UnsupportedMedia, BadImage and BadOption.
    """
    fields = read_query(request)
    if is_raw(request):
        return await request.body(), fields
    media = _media_of(request)
    if media != "multipart/form-data":
        raise UnsupportedMedia(
            f"the body is {media[:60] or 'of no type'!r}; send multipart/form-data with a file field image, "
            "or an image/* body"
        )
    body = await request.body()
    try:
        form = await run_in_threadpool(parse_form, request.headers, body)
    except MultiPartException as error:
        raise BadImage(f"the multipart body cannot be read: {error.message}") from None
    except UnicodeError:
        raise BadImage("the multipart body cannot be read: its names are not in its charset; send UTF-8") from None
    upload = form.get("image")
    if upload is None or isinstance(upload, str):
        raise BadImage("the form has no file field image; add one that holds the picture")
    texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    with upload.file as file:
        return file.read(), fields | unique(texts, beside=fields)


def read_query(request: Request) -> dict[str, str]:
    """The options in a query. Raises BadOption for one that is given twice, or in a header that only answers have."""
    for name in request.headers:
        if name.startswith("x-penumbra-"):
            raise BadOption(f"the header {name[:60]} is of answers; send options in the query or as form fields")
    return unique(request.query_params.multi_items())


def is_raw(request: Request) -> bool:
    """Whether the body is a picture's bytes and nothing else."""
    return _media_of(request).startswith("image/") or _media_of(request) == "application/octet-stream"


def _media_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class InMemoryParser(MultiPartParser):
    """Keeps files in memory: the guard has bounded the body already, and a container may have no place for others."""

    spool_max_size = 2**63 - 1
    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


def parse_form(headers: Headers, body: bytes) -> FormData:
    """Parse a whole multipart body, off the event loop: 50 MB take a quarter of a second.

    A preamble and an epilogue are passed over (RFC 2046 5.1.1). A body that ends before its closing boundary was cut
    off, and its last field with it. Raises MultiPartException and UnicodeError.
    """
    boundary = parse_options_header(headers["content-type"])[1].get(b"boundary", b"")
    start = 0 if body.startswith(b"--" + boundary) else body.find(b"\r\n--" + boundary)
    if not body:
        return FormData()
    if not boundary:
        raise MultiPartException("its Content-Type names no boundary")
    if start < 0:
        raise MultiPartException("the boundary that its Content-Type names does not occur in it")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body[start:]
        if not parser.has_ended:
            raise MultiPartException("it ends before its closing boundary; send all of it")

    limits = {"max_files": 1, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    parser = InMemoryParser(headers, stream(), **limits)
    return asyncio.run(parser.parse())


def unique(items: list[tuple[str, str]], *, beside: Mapping[str, str] | None = None) -> dict[str, str]:
    """Options by name. Raises BadOption where one is given twice."""
    fields: dict[str, str] = {}
    for name, value in items:
        if name in fields or name in (beside or {}):
            raise BadOption(f"the option {name[:40]!r} is given twice; once is enough")
        fields[name] = value
    return fields


def refuse_options(request: Request) -> None:
    """Raises BadOption for a query to a path that takes none: ?version=2 would be answered with the newest."""
    for name in request.query_params:
        raise BadOption(f"{request.url.path[:80]} takes no option {name[:40]!r}; leave the query out")


async def disconnected(request: Request) -> None:
    """Returns when the caller has gone away. Takes what the connection says from here on."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def answer_headers(prediction: Prediction, timing_ms: Mapping[str, float] | None = None) -> dict[str, str]:
    """Which model answered, with what seed and members, what to know, and how long each phase took.

    Texts are percent-encoded as UTF-8 where they are not printable ASCII, and so are the commas in members' names.
    """
    optional = {
        "X-Penumbra-Members": ",".join(encoded(name).replace(",", "%2C") for name in prediction.members),
        "X-Penumbra-Warning": encoded("; ".join(prediction.warnings)),
        "X-Penumbra-Samples-Asked": str(prediction.num_asked or ""),
        "Age": "" if prediction.age_s is None else f"{prediction.age_s:.0f}",
        "X-Penumbra-Abstained": "" if prediction.abstained is None else f"{prediction.abstained:.6f}",
    }
    return {name: text for name, text in optional.items() if text} | {
        **{f"X-Penumbra-{name.title()}": str(fact) for name, fact in prediction.origin.items()},
        "Server-Timing": server_timing(timing_ms or prediction.timing_ms),
    }


def encoded(text: str) -> str:
    """A text as a header can hold it."""
    return quote(text, PRINTABLE, errors="replace")


def server_timing(timing_ms: Mapping[str, float]) -> str:
    """Milliseconds by phase, as the header of that name has them."""
    return ", ".join(f"{phase};dur={ms:.2f}" for phase, ms in timing_ms.items())


def summary(card: Card) -> dict[str, object]:
    """What a list of models says of each."""
    return {
        "name": card.name, "version": card.version, "method": card.method,
        "classes": [c.name for c in card.classes], "sampling": dataclasses.asdict(card.sampling),
        "prompt": card.prompt.kind, "maps": maps_by_samples(card),
        "extra_maps": [extra.name for extra in card.extra_maps],
        "risks": list(card.calibration.risks) if card.calibration else [],
        "window": [card.window.height, card.window.width], "data": card.provenance.data,
        "licence": card.provenance.licence, "metrics": card.provenance.metrics,
    }  # fmt: skip


def maps_by_samples(card: Card) -> dict[str, list[str]]:
    """The maps that can be asked for of a `single` sample and of `several`, as far as the model takes them."""
    counts = {card.sampling_with(prompt=prompt).default_samples for prompt in (False, True)}
    if card.sampling.kind in ("latent", "dropout"):
        counts.add(1)
    return {"single" if count == 1 else "several": list(card.maps(count)) for count in sorted(counts)}


def error_response(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers=dict(headers or {}))


async def on_penumbra_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, PenumbraError)
    return error_response(status_of(error)[0], str(error), headers_of(error))


async def on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), error.headers)


async def on_any_error(_: Request, __: Exception) -> Response:
    return error_response(500, UNEXPECTED)


ERROR_HANDLERS = {PenumbraError: on_penumbra_error, HTTPException: on_http_error, Exception: on_any_error}


def _docs_html(document: dict[str, object]) -> str:
    """The OpenAPI document as one plain page without external resources."""
    rows = [
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td><td>{escape(operation['summary'])}</td></tr>"
        for path, methods in document["paths"].items()  # type: ignore[attr-defined]
        for method, operation in methods.items()
    ]
    return (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Penumbra</title>"
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:46rem;margin:2rem auto;"
        "padding:0 1rem}td{padding:.3rem 1rem .3rem 0;vertical-align:top}</style><h1>Penumbra</h1>"
        f"<p>Segmentation that says, per pixel, how sure it is. Machine-readable: <a href=docs.json>docs.json</a>, "
        f"<a href=models>models</a>, <a href=metrics>metrics</a>.</p><table>{''.join(rows)}</table>"
    )
