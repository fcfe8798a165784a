"""HTTP of jobs: `POST /jobs` takes what `POST /segment` takes, of any size, and answers with an id at once.

An id is hard to guess and is all that a caller needs; there is no list of jobs.
"""

import asyncio
import time
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from penumbra.models.errors import BadOption, Cancelled, TooLarge
from penumbra.serving.http.upload import is_raw, read_query, read_upload, refuse_options
from penumbra.serving.jobs import Jobs
from penumbra.serving.objects import fetch
from penumbra.serving.render import choose_format
from penumbra.serving.spool import disk
from penumbra.serving.telemetry import Telemetry

CHUNK_BYTES = 2**20
OBJECTS = ("source", "target")
"""Options of a query that name objects: of the picture instead of a body, and of a copy of the result."""


def routes(jobs: Jobs, telemetry: Telemetry) -> list[BaseRoute]:
    surface = JobSurface(jobs, telemetry)
    return [
        Route("/jobs", surface.create, methods=["POST"]),
        Route("/jobs/{id}", surface.status),
        Route("/jobs/{id}", surface.remove, methods=["DELETE"]),
        Route("/jobs/{id}/result", surface.result),
    ]


class JobSurface:
    """The handlers."""

    def __init__(self, jobs: Jobs, telemetry: Telemetry) -> None:
        self._jobs, self._telemetry = jobs, telemetry

    async def create(self, request: Request) -> Response:
        with self._telemetry.track("http") as tracked:
            media = choose_format(request.headers.get("accept", ""))
            source, target, fields = _objects_of(request)
            self._jobs.check(media, fields)
            if source:
                self._jobs.objects.check("source", source)
            if target:
                await run_in_threadpool(self._jobs.objects.check_target, target)
            place = await run_in_threadpool(self._jobs.begin)
            try:
                if source:
                    limit = self._jobs.settings.limit_job_bytes
                    await run_in_threadpool(fetch, source, place / "image", limit_bytes=limit)
                else:
                    fields = await self._receive(request, place / "image")
                    fields = {name: text for name, text in fields.items() if not (target and name == "target")}
                tracked.arrived = time.perf_counter()  # how long a picture is under way says nothing of the server
                job = await run_in_threadpool(self._jobs.submit, place, media, fields, target)
            except BaseException:  # also when the caller goes away
                await asyncio.shield(asyncio.to_thread(self._jobs.abandon, place))
                raise
        return JSONResponse(job, 202, headers={"Location": job["url"]})

    async def status(self, request: Request) -> Response:
        refuse_options(request)
        return JSONResponse(self._jobs.status(request.path_params["id"]))

    async def result(self, request: Request) -> Response:
        refuse_options(request)
        path, job = self._jobs.result(request.path_params["id"])
        return FileResponse(path, headers=job.headers, media_type=job.media)

    async def remove(self, request: Request) -> Response:
        refuse_options(request)
        await run_in_threadpool(self._jobs.remove, request.path_params["id"])
        return Response(status_code=204)

    async def _receive(self, request: Request, path: Path) -> dict[str, str]:
        """The picture into a file, and the options. A form is read whole; a raw body goes to the disk in pieces."""
        if not is_raw(request):
            data, fields = await read_upload(request)
            with disk():
                await run_in_threadpool(path.write_bytes, data)
            return fields
        size, limit = 0, self._jobs.settings.limit_job_bytes
        pieces = bytearray()
        with disk(), path.open("wb") as file:
            try:
                async for piece in request.stream():
                    size += len(piece)
                    if size > limit:
                        raise TooLarge(f"the body has more than {limit:,} bytes; send a better compressed image")
                    pieces += piece
                    if len(pieces) >= CHUNK_BYTES or not piece:
                        await run_in_threadpool(file.write, pieces)
                        pieces = bytearray()
            except ClientDisconnect:
                raise Cancelled("the caller went away before the whole body had arrived") from None
        return read_query(request)


def _objects_of(request: Request) -> tuple[str, str, dict[str, str]]:
    """Read the objects of a query, and its other options. Raises BadOption for a source beside a body."""
    fields = read_query(request)
    source, target = (fields.pop(name, "") for name in OBJECTS)
    if source and (request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers):
        raise BadOption("the picture is in the body and in the option source; send one of them")
    return source, target, fields
