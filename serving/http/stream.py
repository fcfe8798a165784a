"""`POST /segment` for `application/x-ndjson`: the rows of an answer as they become final, one JSON object a line."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from penumbra.models.card import Card
from penumbra.models.errors import PenumbraError
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.upload import read_upload
from penumbra.serving.render import parse_request
from penumbra.serving.render.pictures import GREY, PngWriter, blocks, quantised, range_of
from penumbra.serving.room import Bodies

LINES = "application/x-ndjson"


@dataclass(slots=True)
class Lines:
    """The lines of one answer, made in its request's thread. send: takes each."""

    send: Callable[[bytes], object]
    card: Card
    levels: int
    end_y: int = 0

    def progress(self, num_done: int, num_windows: int) -> None:
        self._add({"windows_done": num_done, "windows": num_windows})

    def follow(self, band: Band) -> None:
        self._add_rows(band.y0, band.labels, band.maps)

    def finish(self, prediction: Prediction) -> None:
        """Add what no band brought, as of an answer that was kept, and then the facts of the whole."""
        for rows in blocks(prediction.labels_HW.shape[0]):
            if rows.start >= self.end_y:
                maps = {name: values[rows] for name, values in prediction.maps.items()}
                self._add_rows(rows.start, prediction.labels_HW[rows], maps)
        self._add(prediction.facts)

    def _add_rows(self, y0: int, labels_hW: NDArray[np.uint8], maps: dict[str, FloatArray]) -> None:
        shown: dict[str, Any] = {}
        for name, values_hW in maps.items():
            black, white = range_of(name, self.card, values_hW)
            grey = quantised(values_hW, slice(None), black=black, white=white, levels=self.levels)
            shown[name] = {"white": white, "black": black, "png": _png(grey)}
        self.end_y = y0 + len(labels_hW)
        self._add({"y0": y0, "rows": len(labels_hW), "labels": _png(labels_hW), "maps": shown})

    def _add(self, line: dict[str, Any]) -> None:
        self.send(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def _png(grey_hW: NDArray[Any]) -> str:
    """A grey PNG of 8 or 16 bits, in base64."""
    height, width = grey_hW.shape
    file = io.BytesIO()
    png = PngWriter(file, (height, width), color=GREY, depth=8 * grey_hW.dtype.itemsize)
    png.add(grey_hW)
    png.end()
    return base64.b64encode(file.getvalue()).decode()


async def stream(gateway: Gateway, bodies: Bodies, request: Request) -> Response:
    """Answer one picture line by line. Raises PenumbraError for what is known before the first line."""
    lines = _made(gateway, bodies, request)
    return StreamingResponse(_told(await anext(lines), lines), media_type=LINES)


async def _made(gateway: Gateway, bodies: Bodies, request: Request) -> AsyncGenerator[bytes]:
    """Yield lines as the request's thread makes them. They count as bodies do until they are taken, for a thread may be
    done long before a slow caller. Whoever takes no more of them ends the work. Raises PenumbraError."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[bytes | None] = asyncio.Queue()
    with bodies.room() as take:

        def send(line: bytes) -> None:
            take(len(line))
            loop.call_soon_threadsafe(lines.put_nowait, line)

        async def work() -> None:
            try:
                with gateway.telemetry.track("http") as tracked:
                    data, fields = await read_upload(request)
                    options, style = parse_request(LINES, fields)
                    made = Lines(send, gateway.segmenter.find(options.model, options.version).card, style.levels)
                    await gateway.answer(
                        data, options, made.finish, request=tracked, progress=made.progress, follow=made.follow
                    )  # fmt: skip
            finally:
                loop.call_soon(lines.put_nowait, None)  # after what the thread has sent

        task = asyncio.create_task(work())
        try:
            while line := await lines.get():
                take(-len(line))
                yield line
            await task
        finally:
            task.cancel()


async def _told(line: bytes, lines: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Pass lines on, and at the end what went wrong, if anything did."""
    async with aclosing(lines):
        try:
            yield line
            async for line in lines:
                yield line
        except PenumbraError as error:
            yield orjson.dumps({"error": str(error)}, option=orjson.OPT_APPEND_NEWLINE)
