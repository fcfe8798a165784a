"""The HTTP surface in this process: routes, guard and log as a server has them; no port, no process, no BentoML."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import httpx
from starlette.applications import Starlette

from penumbra.serving.assembly import assemble
from penumbra.serving.http.admission import AccessLog, Guard, Timeout
from penumbra.serving.keys import Keys
from penumbra.serving.room import Bodies
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import Telemetry
from tests.serving.server import FIXED

ANSWER_S = 60
"""A bound of waiting, reached only when something is wrong."""


@contextmanager
def in_process(store: Path, directory: Path, **settings: object) -> Iterator[httpx.Client]:
    """A client of the surface over a store. settings: fields of `Settings`; any thread may ask."""
    chosen = Settings(store=store, jobs=directory / "jobs", threads=1, **FIXED | settings)  # type: ignore[arg-type]
    telemetry, bodies, app = Telemetry(), Bodies(chosen.limit_bodies_bytes), Starlette()
    gateway, _, jobs, watch = assemble(app, chosen, telemetry=telemetry, bodies=bodies, trusted_keys=None)
    guard = Guard(app, routes=app, telemetry=telemetry, keys=Keys(), settings=chosen, bodies=bodies)
    with ExitStack() as undo:
        for part in (gateway, jobs, watch):
            undo.callback(part.close)
        gateway.state, app.state.is_loaded = "ready", True
        jobs.start()
        watch.start()
        loop = asyncio.new_event_loop()
        thread = Thread(target=loop.run_forever, name="asgi")
        thread.start()
        undo.callback(loop.close)
        undo.callback(thread.join)
        undo.callback(loop.call_soon_threadsafe, loop.stop)
        transport = _Transport(AccessLog(Timeout(guard, chosen.timeout_s)), loop)
        yield undo.enter_context(httpx.Client(transport=transport, base_url="http://penumbra"))


class _Transport(httpx.BaseTransport):
    """Hands requests over to an application in the event loop of another thread."""

    def __init__(self, app: AccessLog, loop: asyncio.AbstractEventLoop) -> None:
        self._asgi, self._loop = httpx.ASGITransport(app, raise_app_exceptions=False), loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._ask(request, list(request.stream)), self._loop).result(ANSWER_S)  # type: ignore[arg-type]

    async def _ask(self, request: httpx.Request, chunks: list[bytes]) -> httpx.Response:
        sent = httpx.Request(request.method, request.url, headers=request.headers, stream=_Chunks(chunks))
        answer = await self._asgi.handle_async_request(sent)
        body = b"".join([chunk async for chunk in answer.stream])  # type: ignore[union-attr]
        return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(body))


class _Chunks(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk
