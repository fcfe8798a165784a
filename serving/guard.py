"""What stands before every route: a bound on the body, and on what BentoML's own routes may be sent."""

from contextlib import suppress

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import Cancelled, PenumbraError, TooLarge, UnsupportedMedia
from serving.statuses import status_of
from serving.telemetry import Telemetry

BENTO_PATHS = {"/predict": "POST", "/schema.json": "GET"}
"""Path and method of what BentoML itself answers; everything else is ours (`serving.rest`)."""
HEALTH_PATHS = ("/healthz", "/livez", "/readyz")
"""BentoML has these too, before ours and with other bodies; they go straight to ours."""


class Guard:
    """Reads a request's body up to a limit before anything parses it, and refuses larger ones with 413.

    BentoML's typed route takes JSON alone: its pickle, multipart and URL-fetching readers are closed off (415).
    """

    def __init__(self, app: ASGIApp, *, ours: ASGIApp, telemetry: Telemetry, body_bytes: int) -> None:
        self._app, self._ours, self._telemetry, self._body_bytes = app, ours, telemetry, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            app = self._ours if scope.get("path") in HEALTH_PATHS else self._app
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if BENTO_PATHS.get(scope["path"]) == scope["method"]:
                self._check_media(scope["path"], headers.get(b"content-type", b""))
            body = await self._read(receive, declared=headers.get(b"content-length", b""))
        except PenumbraError as error:
            with suppress(PenumbraError), self._telemetry.track("http"):
                raise error
            refusal = JSONResponse({"error": str(error)}, status_of(error)[0], {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        await self._app(scope, _Replay(body, receive), send)

    def _check_media(self, path: str, content_type: bytes) -> None:
        media = content_type.split(b";")[0].strip().lower().decode("latin-1")
        if media != "application/json":
            raise UnsupportedMedia(f"the body is {media[:60] or 'of no type'}; {path} takes application/json")

    async def _read(self, receive: Receive, *, declared: bytes) -> bytes:
        """The whole body. Raises TooLarge from its declared length, else as soon as more has arrived; Cancelled."""
        limit = self._body_bytes
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
