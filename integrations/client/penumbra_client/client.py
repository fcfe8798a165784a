"""The two clients: one waits, the other awaits. What they say is `penumbra_client.exchange`'s."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, Unpack, cast

import httpx

from penumbra_client.answers import NPZ, Job, Model, Prediction
from penumbra_client.exchange import Call, Exchange, Exchanges, Progress, Reply, T
from penumbra_client.options import Options, Picture

PIECE_BYTES = 2**20
CONNECT_TRIES = 2
"""Again, where a connection was refused; nothing was asked then."""
CONNECT_S = 10.0
TIMEOUT_S = 330.0
"""Longer than a server takes over a request by itself (300 s), so that its own refusal arrives."""

UNREACHED = (httpx.TransportError, httpx.InvalidURL)


def _quiet(_: Job) -> None:
    """Tell nobody."""


class Client:
    """A client of one server; any thread may use it. Close it, or use it in a `with` block."""

    def __init__(
        self, url: str = "http://localhost:3000", *, key: str | None = None, patience_s: float = 60.0,
        timeout_s: float = TIMEOUT_S, transport: httpx.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        """key: an API key, where the server wants one. patience_s: how long one call may wait in all for a server that
        is full, loading or, of a job, away. timeout_s: of each read and write; a connection has 10 s of it at most."""
        self._exchanges = Exchanges(patience_s)
        self._http = httpx.Client(
            base_url=url, headers=_bearer(key), timeout=_limits(timeout_s),
            transport=transport or httpx.HTTPTransport(retries=CONNECT_TRIES),
        )  # fmt: skip

    def segment(self, image: Picture, **options: Unpack[Options]) -> Prediction:
        """Segment a picture. Raises PenumbraError."""
        return self._run(self._exchanges.segment(image, options))

    def render(self, image: Picture, media: str, **options: Unpack[Options]) -> bytes:
        """Give the answer in another form, as bytes: `image/png`, `application/geo+json`, ... Raises PenumbraError."""
        return self._run(self._exchanges.render(image, media, options))

    def submit(self, image: Picture, media: str = NPZ, **options: Unpack[Options]) -> Job:
        """Begin work on a picture of any size, which a file is best for. Raises PenumbraError."""
        return self._run(self._exchanges.submit(image, media, options))

    def run_job(self, image: Picture, progress: Progress = _quiet, **options: Unpack[Options]) -> Prediction:
        """Submit a picture, wait, fetch the answer and remove the job. Raises PenumbraError."""
        return self._run(self._exchanges.run_job(image, progress, options))

    def job(self, name: str) -> Job:
        """Ask how a job stands, by its id. Raises PenumbraError."""
        return self._run(self._exchanges.job(name))

    def wait(self, job: Job, progress: Progress = _quiet) -> Job:
        """Wait until a job is done. Raises Failed where it fails."""
        return self._run(self._exchanges.wait(job, progress))

    def result(self, job: Job) -> Prediction:
        """Fetch the answer of a job that is done. Raises PenumbraError."""
        return self._run(self._exchanges.result(job))

    def download(self, job: Job, path: str | Path) -> Path:
        """Write a job's answer, in the form it was submitted for, to a file, piece by piece. Raises PenumbraError."""
        return self._run(self._exchanges.download(job, path))

    def remove(self, job: Job) -> None:
        """Cancel a job, and remove its files from the server. Raises PenumbraError."""
        return self._run(self._exchanges.remove(job))

    def models(self) -> list[Model]:
        """List what is served. Raises PenumbraError."""
        return self._run(self._exchanges.models())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _run(self, exchange: Exchange[T]) -> T:
        reply: Any = None
        while True:
            try:
                step = exchange.send(reply)
            except StopIteration as end:
                return cast(T, end.value)
            if isinstance(step, Call):
                reply = self._send(step)
            elif callable(step):
                reply = step()
            else:
                time.sleep(step)
                reply = None

    def _send(self, call: Call) -> Reply:
        try:
            body = _read(call.body) if isinstance(call.body, Path) else call.body
            with self._http.stream(**_request(call), content=body) as answer:
                if call.target is None or not answer.is_success:
                    return Reply(answer.status_code, answer.headers, answer.read())
                with _whole(call.target) as file:
                    for piece in answer.iter_bytes(PIECE_BYTES):
                        file.write(piece)
                return Reply(answer.status_code, answer.headers, b"")
        except UNREACHED as error:
            return _unreached(self._http.base_url, error)


class AsyncClient:
    """The same for asyncio: every method of `Client`, to be awaited. Use it in an `async with` block."""

    def __init__(
        self, url: str = "http://localhost:3000", *, key: str | None = None, patience_s: float = 60.0,
        timeout_s: float = TIMEOUT_S, transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        """The arguments are those of `Client`."""
        self._exchanges = Exchanges(patience_s)
        self._http = httpx.AsyncClient(
            base_url=url, headers=_bearer(key), timeout=_limits(timeout_s),
            transport=transport or httpx.AsyncHTTPTransport(retries=CONNECT_TRIES),
        )  # fmt: skip

    async def segment(self, image: Picture, **options: Unpack[Options]) -> Prediction:
        return await self._run(self._exchanges.segment(image, options))

    async def render(self, image: Picture, media: str, **options: Unpack[Options]) -> bytes:
        return await self._run(self._exchanges.render(image, media, options))

    async def submit(self, image: Picture, media: str = NPZ, **options: Unpack[Options]) -> Job:
        return await self._run(self._exchanges.submit(image, media, options))

    async def run_job(self, image: Picture, progress: Progress = _quiet, **options: Unpack[Options]) -> Prediction:
        return await self._run(self._exchanges.run_job(image, progress, options))

    async def job(self, name: str) -> Job:
        return await self._run(self._exchanges.job(name))

    async def wait(self, job: Job, progress: Progress = _quiet) -> Job:
        return await self._run(self._exchanges.wait(job, progress))

    async def result(self, job: Job) -> Prediction:
        return await self._run(self._exchanges.result(job))

    async def download(self, job: Job, path: str | Path) -> Path:
        return await self._run(self._exchanges.download(job, path))

    async def remove(self, job: Job) -> None:
        return await self._run(self._exchanges.remove(job))

    async def models(self) -> list[Model]:
        return await self._run(self._exchanges.models())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def _run(self, exchange: Exchange[T]) -> T:
        reply: Any = None
        while True:
            try:
                step = exchange.send(reply)
            except StopIteration as end:
                return cast(T, end.value)
            if isinstance(step, Call):
                reply = await self._send(step)
            elif callable(step):
                reply = await asyncio.to_thread(step)
            else:
                await asyncio.sleep(step)
                reply = None

    async def _send(self, call: Call) -> Reply:
        body = _later(call.body) if isinstance(call.body, Path) else call.body
        try:
            async with self._http.stream(**_request(call), content=body) as answer:
                if call.target is None or not answer.is_success:
                    return Reply(answer.status_code, answer.headers, await answer.aread())
                with _whole(call.target) as file:
                    async for piece in answer.aiter_bytes(PIECE_BYTES):
                        file.write(piece)
                return Reply(answer.status_code, answer.headers, b"")
        except UNREACHED as error:
            return _unreached(self._http.base_url, error)


def _limits(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _request(call: Call) -> dict[str, Any]:
    """The arguments of a request but its body; a file's length is said, so that the server can refuse it unread."""
    length = {"Content-Length": str(call.body.stat().st_size)} if isinstance(call.body, Path) else {}
    return {"method": call.method, "url": call.path, "params": call.options, "headers": {**call.headers, **length}}


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


async def _later(path: Path) -> AsyncIterator[bytes]:
    for piece in _read(path):
        yield piece


def _unreached(url: httpx.URL, error: Exception) -> Reply:
    """Say in one sentence that the server cannot be reached, or stopped talking."""
    why = str(error) or type(error).__name__
    sentence = f"{url} cannot be asked ({why}); is a Penumbra server running there?"
    return Reply(0, {}, json.dumps({"error": sentence}).encode())


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes its name once it is whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
    os.replace(part, path)
