"""What stands before every route: keys, bounds on time, head and body, and on what BentoML's own routes may be sent."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penumbra.models.errors import (
    BadOption,
    Cancelled,
    HeadTooLarge,
    NotReady,
    PenumbraError,
    QueueFull,
    TooLarge,
    UnsupportedMedia,
)
from penumbra.serving.keys import METRICS_PATH, Keys
from penumbra.serving.statuses import LOADING, LOADING_S, headers_of, status_of
from penumbra.serving.telemetry import CURRENT, ID, TRACE, Telemetry, begin, logged

STREAMED = ("POST", "/jobs")
"""What may be larger than memory, where it is a raw body: its handler bounds it as it comes."""
BENTO_PATHS = {"/predict": "POST", "/schema.json": "GET"}
"""Path and method of what BentoML itself answers; everything else is ours (`penumbra.serving.http.routes`)."""
HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
"""BentoML has these too, before ours and with other bodies; they go straight to ours."""
LIVE_PATHS = ("/healthz", "/livez", "/v2/health/live")
READY_PATHS = {"/readyz": {"ready": False, "state": "starting"}, "/v2/health/ready": {"ready": False}}
"""Path -> what it answers while models are loaded."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes of the line and headers, of a body, and of JSON, which takes up to forty times its size in memory."""

    head: int
    body: int
    json: int


class Bodies:
    """The bytes of all requests' bodies together, over every protocol, from their first byte to their answer.

    Any thread may call it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Yields what a request takes its bytes by, which are given back at its end. It raises QueueFull and
        TooLarge."""
        taken, has_ended = 0, False

        def take(size: int) -> None:
            nonlocal taken
            with self._lock:
                if has_ended:  # and a thread is still at work for it
                    raise Cancelled("the request was cancelled")
                if taken + size > self._limit_bytes:  # also alone, however often it is tried
                    raise TooLarge(
                        f"the body takes {taken + size:,} bytes and the limit of all bodies together is "
                        f"{self._limit_bytes:,}; send a smaller or better compressed image, or parts of it"
                    )
                if self._held_bytes + size > self._limit_bytes:
                    raise QueueFull(
                        f"the bodies of all requests have {self._held_bytes:,} bytes, this one needs {size:,} more and "
                        f"the limit is {self._limit_bytes:,}; try again in 1 s", retry_after_s=1,
                    )  # fmt: skip
                self._held_bytes, taken = self._held_bytes + size, taken + size

        try:
            yield take
        finally:
            with self._lock:
                self._held_bytes, has_ended = self._held_bytes - taken, True


class AccessLog:
    """Writes the line of every HTTP request, and gives its id and `traceparent` back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with logged(begin(scope["method"], scope["raw_path"].decode("latin-1"), headers)) as request:
            returned = {ID: request.id} | ({TRACE: headers[TRACE]} if request.trace else {})

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = message["status"]
                    MutableHeaders(scope=message).update(returned)
                await send(message)

            try:
                await self._app(scope, receive, answer)
            except Exception:
                request.status = 500
                raise


class Timeout:
    """Takes the place of BentoML's middleware, whose timers keep every request's objects until they are due.

    A request whose answer has not begun by then is cancelled, and told so.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app, self._timeout_s = app, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s) as clock:

                async def begin(message: Message) -> None:
                    if not clock.expired():
                        clock.reschedule(None)
                    await send(message)

                await self._app(scope, receive, begin)
        except TimeoutError:
            if not clock.expired():
                raise
            sentence = f"the request was not answered within {self._timeout_s:g} s; send it faster, or a smaller image"
            await JSONResponse({"error": sentence}, 504, {"Connection": "close"})(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Routes:
    """Our own routes. loaded: from when on they answer; until then the guard does."""

    app: ASGIApp
    loaded: threading.Event


class Guard:
    """Asks for a key, then reads the body up to a limit before anything parses it.

    BentoML's typed route takes JSON alone: its pickle, multipart and URL-fetching readers are closed off (415).
    """

    def __init__(
        self, app: ASGIApp, *, routes: Routes, telemetry: Telemetry, keys: Keys, bounds: Bounds, bodies: Bodies
    ) -> None:  # fmt: skip
        self._app, self._routes, self._telemetry, self._keys = app, routes, telemetry, keys
        self._bounds, self._bodies = bounds, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._bodies.room() as take:
            await self._pass(scope, receive, send, take)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, take: Callable[[int], None]) -> None:
        path, method = scope["path"], scope["method"]
        headers = dict(scope["headers"])
        answer = self._routes.app if path in HEALTH_PATHS else self._app
        try:
            self._check_head(scope)
            key = self._keys.check_path(path, headers.get(b"authorization", b"").decode("latin-1"))
            if request := CURRENT.get():
                request.key = key
            if not self._routes.loaded.is_set():
                answer = self._while_loading(method, path)
            is_form = headers.get(b"content-type", b"").lower().startswith(b"multipart/")
            has_body = method not in ("GET", "HEAD", "OPTIONS")
            if has_body:
                _check_encoding(path, headers.get(b"content-encoding", b""))
            if has_body and ((method, path) != STREAMED or is_form):
                is_bentos = BENTO_PATHS.get(path) == method
                if is_bentos and scope["query_string"]:
                    raise BadOption(f"{path} has a query; it takes its options in the JSON")
                _check_media(path, headers.get(b"content-type", b""), json_only=is_bentos)
                limit = min(self._bounds.json, self._bounds.body) if is_bentos else self._bounds.body
                declared = headers.get(b"content-length", b"")
                receive = _Replay(await _read(receive, take, declared=declared, limit=limit), receive)
        except PenumbraError as error:
            await self._refuse(error, scope, receive, send)
            return
        await answer(scope, receive, send)

    def _while_loading(self, method: str, path: str) -> ASGIApp:
        """What is answered until models are loaded. Raises NotReady."""
        if method in ("GET", "HEAD"):
            if path in LIVE_PATHS:
                return JSONResponse({"live": True})
            if path in READY_PATHS:
                return JSONResponse(READY_PATHS[path], 503, {"Retry-After": str(LOADING_S)})
            if path == METRICS_PATH:
                page, content_type = self._telemetry.page("")
                return Response(page, media_type=content_type)
        raise NotReady(LOADING)

    async def _refuse(self, error: PenumbraError, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(PenumbraError), self._telemetry.track("http"):
            raise error
        headers = {"Connection": "close"} | headers_of(error)
        await JSONResponse({"error": str(error)}, status_of(error)[0], headers)(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if size > self._bounds.head:
            raise HeadTooLarge(
                f"the request's line and headers have {size:,} bytes and the limit is {self._bounds.head:,}; send long "
                "options as form fields"
            )


def _check_encoding(path: str, encoding: bytes) -> None:
    named = encoding.strip().lower().decode("latin-1")
    if named not in ("", "identity") and not (path.startswith("/v2/") and path.endswith("/infer")):
        raise UnsupportedMedia(f"the body's Content-Encoding is {named[:60]!r}; {path[:80]} takes bodies without one")


def _check_media(path: str, content_type: bytes, *, json_only: bool) -> None:
    media = content_type.split(b";")[0].strip().lower().decode("latin-1")
    if json_only and media != "application/json":
        raise UnsupportedMedia(f"the body is {media[:60] or 'of no type'}; {path} takes application/json")
    if "pickle" in media:
        raise UnsupportedMedia(f"the body is {media[:60]}; pickles are read nowhere here")


async def _read(receive: Receive, take: Callable[[int], None], *, declared: bytes, limit: int) -> bytes:
    """The whole body. Raises TooLarge from its declared length, else as soon as more has arrived; Cancelled; QueueFull
    from `take`, which is told of every byte."""
    remedy = f"bytes and the limit is {limit:,}; send a smaller or better compressed image, or parts of it"
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise TooLarge(f"the body has {declared[:18].decode()} {remedy}")
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the caller went away before the whole body had arrived")
        chunks.append(message.get("body", b""))
        size, more = size + len(chunks[-1]), message.get("more_body", False)
        if size > limit:
            raise TooLarge(f"the body has more than {limit:,} {remedy}")
        take(len(chunks[-1]))
    return b"".join(chunks)


class _Replay:
    """A `receive` that gives a body that was read already, then whatever the connection says next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
