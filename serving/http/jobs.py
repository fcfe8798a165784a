"""HTTP of jobs: `POST /jobs` takes what `POST /segment` takes, of any size, and answers with an id at once.

An id is hard to guess and is all that a caller needs; there is no list of jobs.
"""

import asyncio
import time
from functools import partial
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


def routes(jobs: Jobs, telemetry: Telemetry) -> list[BaseRoute]:
    return [
        Route("/jobs", partial(create, jobs, telemetry), methods=["POST"]),
        Route("/jobs/{id}", partial(status, jobs)),
        Route("/jobs/{id}", partial(remove, jobs), methods=["DELETE"]),
        Route("/jobs/{id}/result", partial(result, jobs)),
    ]


async def create(jobs: Jobs, telemetry: Telemetry, request: Request) -> Response:
    """Take a job. The query may name objects: a source instead of a body, and a target for a copy of the result."""
    with telemetry.track("http") as tracked:
        media = choose_format(request.headers.get("accept", ""))
        fields = read_query(request)
        source, target = fields.pop("source", ""), fields.pop("target", "")
        if source and (request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers):
            raise BadOption("the picture is in the body and in the option source; send one of them")
        jobs.check(media, fields)
        if source:
            jobs.objects.check("source", source)
        if target:
            await run_in_threadpool(jobs.objects.check_target, target)
        place = await run_in_threadpool(jobs.begin)
        try:
            if source:
                limit = jobs.settings.limit_job_bytes
                await run_in_threadpool(fetch, source, place / "image", limit_bytes=limit)
            else:
                fields = await _receive(jobs, request, place / "image")
                fields = {name: text for name, text in fields.items() if not (target and name == "target")}
            tracked.arrived = time.perf_counter()  # how long a picture is under way says nothing of the server
            if target:  # again: another job may have written it while the picture came
                await run_in_threadpool(jobs.objects.check_target, target)
            job = await run_in_threadpool(jobs.submit, place, media, fields, target)
        except BaseException:  # also when the caller goes away
            await asyncio.shield(asyncio.to_thread(jobs.abandon, place))
            raise
    return JSONResponse(job, 202, headers={"Location": job["url"]})


async def status(jobs: Jobs, request: Request) -> Response:
    refuse_options(request)
    return JSONResponse(jobs.status(request.path_params["id"]))


async def result(jobs: Jobs, request: Request) -> Response:
    refuse_options(request)
    path, job = jobs.result(request.path_params["id"])
    return FileResponse(path, headers=job.headers, media_type=job.media)


async def remove(jobs: Jobs, request: Request) -> Response:
    refuse_options(request)
    await run_in_threadpool(jobs.remove, request.path_params["id"])
    return Response(status_code=204)


async def _receive(jobs: Jobs, request: Request, path: Path) -> dict[str, str]:
    """The picture into a file, and the options. A form is read whole; a raw body goes to the disk in pieces."""
    if not is_raw(request):
        data, fields = await read_upload(request)
        with disk():
            await run_in_threadpool(path.write_bytes, data)
        return fields
    size, limit = 0, jobs.settings.limit_job_bytes
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
