"""What stands before every route: the log's line, keys, bounds on time, head and body, and on what BentoML's own routes
may be sent."""

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import ClassVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from penumbra.models.errors import (
    BadOption,
    Cancelled,
    DeadlineExceeded,
    HeadTooLarge,
    NotReady,
    PenumbraError,
    TooLarge,
    UnsupportedMedia,
)
from penumbra.serving.keys import HEALTH, METRICS_PATH, Keys
from penumbra.serving.room import Bodies
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import CURRENT, ID, TRACE, Telemetry, begin, logged

STREAMED = ("POST", "/jobs")
"""What may be larger than memory, where it is a raw body: its handler bounds it as it comes."""
BENTO_PATHS = {"/predict": "POST", "/schema.json": "GET"}
"""Path and method of what BentoML itself answers; everything else is ours (`penumbra.serving.http.routes`)."""
PREDICT_BYTES = 2**20
"""A body of BentoML's typed route is read in the event loop, and its answer of several times the size written there."""
LAST = {"Connection": "close"}
"""Header of an answer to a request whose body may not have been read."""
SMALL_BYTES = 2**16
"""A message of an answer that is no larger is not counted: the connection's own buffer in uvicorn holds as much."""


def refusal(error: PenumbraError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that an error is told in: its status, its sentence, and when to come again or whom to send."""
    return JSONResponse({"error": str(error)}, error.http_status, {**error.headers, **(headers or {})})


async def health(find: Callable[[], dict[str, object]], otherwise: int, _: Request) -> Response:
    """Say what is found, with 200 where the first value of it is true, else with the status `otherwise`."""
    found = find()
    return JSONResponse(found, 200 if next(iter(found.values())) else otherwise)


class AccessLog:
    """A middleware that writes the line of every HTTP request, and gives its id and `traceparent` back."""

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
    """A middleware in the place of BentoML's, whose timers keep every request's objects until they are due.

    A request whose answer has not begun by then is cancelled, and told so. One whose body is streamed may be as long as
    it likes: of it each wait for the caller is timed, and nothing else. ends_at: on the loop's clock, when the last of
    these waits ends, however little is waited for; a server that is told to stop sets it.
    """

    ends_at: ClassVar[float] = math.inf

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app, self._timeout_s = app, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        media = Headers(scope=scope).get("content-type", "").lower().strip()
        is_streamed = (scope["method"], scope["path"]) == STREAMED and not media.startswith("multipart/")
        try:
            async with asyncio.timeout(None if is_streamed else self._timeout_s) as clock:

                async def hear() -> Message:
                    clock.reschedule(min(asyncio.get_running_loop().time() + self._timeout_s, self.ends_at))
                    message = await receive()
                    if not clock.expired():
                        clock.reschedule(None)
                    return message

                async def begin(message: Message) -> None:
                    if not clock.expired():
                        clock.reschedule(None)
                    await send(message)

                await self._app(scope, hear if is_streamed else receive, begin)
        except TimeoutError:
            if not clock.expired():
                raise
            what = "the rest of the body did not come" if is_streamed else "the request was not answered"
            late = DeadlineExceeded(f"{what} within {self._timeout_s:g} s; send it faster, or a smaller image")
            await refusal(late, LAST)(scope, receive, send)


class Guard:
    """A middleware that asks for a key, then reads the body up to a limit before anything parses it.

    BentoML's typed route takes JSON alone: its pickle, multipart and URL-fetching readers are closed off (415).
    """

    def __init__(
        self, app: ASGIApp, *, routes: Starlette, telemetry: Telemetry, keys: Keys, settings: Settings, bodies: Bodies
    ) -> None:  # fmt: skip
        """routes: our own; `state.is_loaded` says from when on they answer, and until then the guard does."""
        self._app, self._routes, self._telemetry, self._keys = app, routes, telemetry, keys
        self._settings, self._bodies = settings, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nobody has asked the others for a key
            await (self._app if scope["type"] == "lifespan" else WebSocketClose())(scope, receive, send)
            return
        with self._bodies.room() as take:
            try:
                answer = self._admit(scope)
                receive = await self._read_body(scope, receive, take)
            except PenumbraError as error:
                with suppress(PenumbraError), self._telemetry.track("http"):
                    raise
                answer = refusal(error, LAST)

            async def count(message: Message) -> None:
                if (size := len(message.get("body", b""))) <= SMALL_BYTES:
                    return await send(message)
                with self._bodies.holding(size):
                    await send({**message, "more_body": True})  # only what is sent behind it waits for the caller
                    await send({**message, "body": b""})

            await answer(scope, receive, count)

    def _admit(self, scope: Scope) -> ASGIApp:
        """What answers a request, by its line and headers: our routes, unless it is BentoML's. Raises PenumbraError."""
        path, size = scope["path"], len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._settings.limit_head_bytes:
            raise HeadTooLarge(
                f"the request's line and headers have {size:,} bytes and the limit is "
                f"{self._settings.limit_head_bytes:,}; send long options as form fields"
            )
        key = self._keys.check(path, Headers(scope=scope).get("authorization", ""))
        if request := CURRENT.get():
            request.key = key
        if not path.isprintable():  # routers and those who ask for keys could read it differently
            raise BadOption(f"the path is {path[:80]!r}; send one of printable characters")
        if self._routes.state.is_loaded:
            return self._app if BENTO_PATHS.get(path) == scope["method"] else self._routes
        if scope["method"] in ("GET", "HEAD"):
            if HEALTH.get(path) == "live":
                return JSONResponse({"live": True})
            if path in HEALTH:
                return JSONResponse({"ready": False, "state": "starting"}, 503, NotReady.headers)
            if path == METRICS_PATH:
                page, content_type = self._telemetry.page("")
                return Response(page, media_type=content_type)
        raise NotReady()

    async def _read_body(self, scope: Scope, receive: Receive, take: Callable[[int], None]) -> Receive:
        """The request's body, read ahead unless its handler streams it. Raises PenumbraError."""
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if method in ("GET", "HEAD", "OPTIONS"):
            return receive
        encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
        if encoding not in ("", "identity") and not (path.startswith("/v2/") and path.endswith("/infer")):
            raise UnsupportedMedia(
                f"the body's Content-Encoding is {encoding[:60]!r}; {path[:80]} takes bodies without one"
            )
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if (method, path) == STREAMED and not media.startswith("multipart/"):
            return receive
        limit, remedy = self._settings.limit_body_bytes, "send a smaller or better compressed image, or parts of it"
        if BENTO_PATHS.get(path) == method:
            limit, remedy = min(PREDICT_BYTES, self._settings.limit_json_bytes, limit), "send the picture to /segment"
            if scope["query_string"]:
                raise BadOption(f"{path} has a query; it takes its options in the JSON")
            if media != "application/json":
                raise UnsupportedMedia(f"the body is {media[:60] or 'of no type'}; {path} takes application/json")
        if "pickle" in media:
            raise UnsupportedMedia(f"the body is {media[:60]}; pickles are read nowhere here")
        declared = headers.get("content-length", "")
        remedy = f"bytes and the limit is {limit:,}; {remedy}"
        return _replayed(await _read(receive, take, declared=declared, limit=limit, remedy=remedy), receive)


async def _read(receive: Receive, take: Callable[[int], None], *, declared: str, limit: int, remedy: str) -> bytes:
    """The whole body. Raises TooLarge from its declared length, else as soon as more has arrived; Cancelled; QueueFull
    from `take`, which is told of every byte."""
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise TooLarge(f"the body has {declared[:18]} {remedy}")
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


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then whatever the connection says next."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
