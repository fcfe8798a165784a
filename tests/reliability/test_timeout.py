"""The bound on a request's time: it ends those that have no answer, and keeps nothing of those that have one."""

import asyncio
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from penumbra.serving.http.admission import Timeout
from tests.serving.server import ROOT

FOREVER_S = 10_000
BEGIN: Message = {"type": "http.response.start", "status": 200, "headers": []}


SCOPE = {"type": "http", "method": "POST", "path": "/segment", "headers": []}


class Kept:
    """An object of a request."""


def ask(app: Any, timeout_s: float, body: Iterable[Message] = (), **scope: Any) -> list[Message]:
    """What an application sends to one request, whose caller says nothing after `body`."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return next(given) or await asyncio.Future()

    given = itertools.chain(body, itertools.repeat(None))
    asyncio.run(Timeout(app, timeout_s)({**SCOPE, **scope}, receive, send))
    return sent


def test_a_request_that_has_no_answer_in_time_is_cancelled_and_told_so() -> None:
    ended = []

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        finally:
            ended.append(True)

    begun, body = ask(waiting, 0.05)
    assert ended == [True] and begun["status"] == 504
    assert "0.05 s" in json.loads(body["body"])["error"]


def test_an_upload_has_its_time_from_message_to_message_and_whatever_is_done_between_them_has_none() -> None:
    waits_s = iter((0.02, 0.02, 0.02, 0.05))

    async def uploads(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            await asyncio.sleep(next(waits_s))
        await asyncio.sleep(next(waits_s))
        await send(BEGIN)

    piece, last = ({"type": "http.request", "body": b"", "more_body": more} for more in (True, False))
    assert ask(uploads, 0.04, [piece, piece, piece, last], path="/jobs") == [BEGIN]
    waits_s = iter((0.0, 0.0))
    begun, body = ask(uploads, 0.04, [piece, piece], path="/jobs")
    assert (
        begun["status"] == 504
        and "the rest of the body did not come within 0.04 s" in json.loads(body["body"])["error"]
    )


def test_a_form_of_a_job_has_no_more_time_than_any_other_request() -> None:
    async def reads_slowly(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            await asyncio.sleep(0.03)

    piece, last = ({"type": "http.request", "body": b"", "more_body": more} for more in (True, False))
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    begun, _ = ask(reads_slowly, 0.05, [*[piece] * 10, last], path="/jobs", headers=form)
    assert begun["status"] == 504


def test_an_answer_that_has_begun_is_not_cut_off() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send(BEGIN)
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"whole"})

    assert ask(slow, 0.02)[-1]["body"] == b"whole"


def test_a_time_that_ran_out_inside_is_none_of_its_business() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        ask(fails, FOREVER_S)


def test_nothing_of_an_answered_request_is_kept() -> None:
    async def both() -> bool:
        async def answers(scope: Scope, receive: Receive, send: Send) -> None:
            await send(BEGIN)

        async def send(message: Message) -> None:
            pass

        async def request() -> weakref.ref[Kept]:
            scope = {**SCOPE, "kept": Kept()}
            await Timeout(answers, FOREVER_S)(scope, send, send)  # type: ignore[arg-type]
            return weakref.ref(scope["kept"])  # type: ignore[type-var]

        kept = await asyncio.create_task(request())
        return kept() is None

    assert asyncio.run(both())


@pytest.mark.slow
def test_the_server_uses_it() -> None:
    program = (
        "import serving.service; from penumbra.serving.http.admission import Timeout;"
        "app = serving.service.Penumbra.to_asgi();"
        "made = [m.cls(None, *m.args, **m.kwargs) for m in app.user_middleware];"
        "assert [type(one._app) for one in made if hasattr(one, '_app')].count(Timeout) == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
