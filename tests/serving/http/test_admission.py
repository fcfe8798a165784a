"""The guard alone, before an application that answers whatever it is asked."""

import asyncio
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from penumbra.serving.http.admission import PREDICT_BYTES, Guard
from penumbra.serving.keys import Keys
from penumbra.serving.room import Bodies
from penumbra.serving.settings import Settings
from penumbra.serving.telemetry import Telemetry
from tests.serving.http.asking import is_refused


def guarded(app: Any) -> Guard:
    routes = Starlette()
    routes.state.is_loaded = True
    parts = {"telemetry": Telemetry(), "keys": Keys(), "settings": Settings(), "bodies": Bodies(2**30)}
    return Guard(app, routes=routes, **parts)


def test_the_typed_route_takes_no_more_than_the_event_loop_reads_at_once_and_says_where_to_go() -> None:
    async def ask(size: int) -> httpx.Response:
        transport = httpx.ASGITransport(guarded(PlainTextResponse("taken")))
        async with httpx.AsyncClient(transport=transport, base_url="http://penumbra") as client:
            return await client.post("/predict", content=b" " * size, headers={"Content-Type": "application/json"})

    assert asyncio.run(ask(PREDICT_BYTES)).text == "taken"
    is_refused(asyncio.run(ask(PREDICT_BYTES + 1)), 413, f"{PREDICT_BYTES:,}", "send the picture to /segment")


def test_a_web_socket_is_closed_before_anything_hears_of_it_and_the_lifespan_passes() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(scope["type"])

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def ask(kind: str) -> list[str]:
        sent: list[str] = []

        async def send(message: Message) -> None:
            sent.append(message["type"])

        await guarded(app)({"type": kind, "path": "/predict", "headers": []}, receive, send)
        return sent

    assert asyncio.run(ask("websocket")) == ["websocket.close"] and asyncio.run(ask("lifespan")) == []
    assert heard == ["lifespan"]
