"""One log line for every request, at its end, whatever its protocol, and the id by which its caller finds it.

HTTP passes `AccessLog`, outside of everything else that is ours; gRPC begins its calls in `penumbra.serving.oip.grpc`.
On the way everybody writes what becomes known into one `Request`. No pixels, file names or options are in a line.
"""

import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penumbra.models.errors import PenumbraError
from penumbra.serving.statuses import status_of

log = logging.getLogger("penumbra.access")

CURRENT: ContextVar["Request | None"] = ContextVar("request", default=None)
"""The request that this task works for."""
ID, TRACE = "x-request-id", "traceparent"
SAFE_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")
SAFE_TRACE = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
LONGEST_PATH = 120
CANCELLED = 499
"""Status of a request whose caller went away before an answer began."""
QUIET = re.compile(
    r"/healthz|/livez|/readyz|/metrics|/v2/health/\w+|/inference\.GRPCInferenceService/Server(Live|Ready)"
)
"""Paths that machines ask every few seconds: their lines are at level DEBUG where they are answered."""


@dataclass(slots=True)
class Request:
    """What becomes known of a request while it is worked on; empty until it is.

    method: of HTTP, else GRPC or JOB. path: without the query, or the gRPC method. key: the name of the caller's key.
    trace: the id of the trace that it belongs to. model: of those that are loaded. size: of the picture, [H, W].
    num_windows: that were run. arrived: when it was there, by `perf_counter`; its deadline counts from then. started:
    when its first phase did. timing_ms: milliseconds by phase. error: the class of what it was refused for.
    """

    method: str = ""
    path: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    trace: str = ""
    key: str = ""
    model: str = ""
    size: tuple[int, ...] = ()
    num_windows: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    status: int = CANCELLED

    def fail(self, error: Exception) -> None:
        """Note what the request ended with."""
        self.status = status_of(error)[0] if isinstance(error, PenumbraError) else 500
        self.error = type(error).__name__


def begin(method: str, path: str, headers: Mapping[str, str]) -> Request:
    """A request by its line and headers, or its call and metadata: an id or trace that is none is not taken over."""
    request = Request(method, re.sub(r"^/jobs/[^/]+", "/jobs/{id}", re.sub("[^!-~]", "?", path))[:LONGEST_PATH])
    if SAFE_ID.fullmatch(sent := headers.get(ID, "")):
        request.id = sent
    if trace := SAFE_TRACE.fullmatch(headers.get(TRACE, "")):
        request.trace = trace[1]
    return request


@contextmanager
def logged(request: Request) -> Iterator[Request]:
    """Make a request the current one of the block, and write its line at the end."""
    before, began = CURRENT.set(request), time.perf_counter()
    try:
        yield request
    finally:
        CURRENT.reset(before)
        fields = _fields(request, 1e3 * (time.perf_counter() - began))
        is_quiet = QUIET.fullmatch(request.path) and request.status not in (401, 403, 500)
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        log.log(logging.DEBUG if is_quiet else logging.INFO, "%s", line, extra={"fields": fields})


def _fields(request: Request, milliseconds: float) -> dict[str, str | int | float]:
    """What is known, by name and in the line's order."""
    spent_ms = request.timing_ms
    known: dict[str, str | int | float] = {
        "method": request.method, "path": request.path, "status": request.status, "ms": round(milliseconds, 1),
        "model": request.model, "size": "x".join(map(str, reversed(request.size))), "windows": request.num_windows,
    }  # fmt: skip
    if spent_ms:
        known["queue_ms"] = round(spent_ms.get("wait", 0.0) + spent_ms.get("queue", 0.0), 1)
        known["run_ms"] = round(spent_ms.get("run", 0.0), 1)
    known |= {"error": request.error, "key": request.key, "request_id": request.id, "trace_id": request.trace}
    return {name: value for name, value in known.items() if value != "" and (name, value) != ("windows", 0)}


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
