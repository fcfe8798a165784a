"""What stands before every route: a bound on the body, and on what BentoML's own routes may be sent."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BENTO_PATHS = ("/predict", "/schema.json")
"""Routes that BentoML itself answers; everything else is ours (`serving.rest`)."""


class Guard:
    """Reads a request's body up to a limit before anything parses it, and refuses larger ones with 413.

    BentoML's typed route takes JSON alone: its pickle, multipart and URL-fetching readers are closed off (415).
    """

    def __init__(self, app: ASGIApp, *, body_bytes: int) -> None:
        self._app, self._body_bytes = app, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["path"] in BENTO_PATHS and media != b"application/json":
            sentence = f"the body is {media[:60].decode('latin-1') or 'of no type'}; {scope['path']} takes application/json"
            await JSONResponse({"error": sentence}, 415)(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        body = None if size > self._body_bytes else await self._read(receive)
        if body is None:
            sentence = (
                f"the body has {f'{size:,}' if size else f'more than {self._body_bytes:,}'} bytes and the limit is "
                f"{self._body_bytes:,}; send a smaller or better compressed image, or parts of it"
            )
            await JSONResponse({"error": sentence}, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _Replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None when it is longer than the limit."""
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(chunks)
            size += len(message.get("body", b""))
            if size > self._body_bytes:
                return None
            chunks.append(message.get("body", b""))
            if not message.get("more_body"):
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
