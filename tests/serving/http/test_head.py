"""Heads of requests: bounded in bytes and time, and nothing changes for callers who mean it."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from penumbra.serving.http import head
from tests.serving.server import until

LIMIT, LARGE = 4096, 2**26


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request's body with its length; the path /large with LARGE bytes."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = bytes(LARGE) if scope["path"] == "/large" else str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(head, "STALL_S", 2.0)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", None)
    head.bound_heads(LIMIT)
    server = uvicorn.Server(uvicorn.Config(echo, port=0, log_config=None, lifespan="off", loop="asyncio"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)


def exchange(port: int, *parts: bytes, answers: int = 1) -> bytes:
    """Everything a connection answers until it has as many answers, or closes."""
    said = b""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        for part in parts:
            connection.sendall(part)
        while said.count(b"HTTP/1.1 ") < answers or said.endswith(b"\r\n"):
            piece = connection.recv(65536)
            if not piece:
                break
            said += piece
    return said


def test_requests_one_after_the_other_and_pipelined_with_large_bodies_are_answered(port: int) -> None:
    assert exchange(port, post(1_000_000)).endswith(b"\r\n\r\n1000000")
    cut = post(50_000)
    said = exchange(port, cut[:20], cut[20:] + post(70_000)[:30], post(70_000)[30:] + post(3), answers=3)
    assert said.count(b"200 OK") == 3
    assert [b"50000" in said, b"70000" in said, said.endswith(b"3")] == [True] * 3


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13",
    "several": b"connection: upgrade\r\nUPGRADE: h2c, TLS/1.0",
}
BODIES = {
    "length": (b"Content-Length: 70000", bytes(70_000)),
    "chunked": (b"Transfer-Encoding: chunked", b"11170\r\n%s\r\n0\r\nX: trailer\r\n\r\n" % bytes(70_000)),
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("cut", [None, 1, 40, 150, 400])
def test_an_offer_of_another_protocol_is_passed_over_and_the_body_is_read(
    port: int, offer: str, body: str, cut: int | None
) -> None:
    size, content = BODIES[body]
    asked = b"POST /x HTTP/1.1\r\nHost: x\r\n%s\r\n%s\r\n\r\n%s" % (OFFERS[offer], size, content)
    said = exchange(port, asked[:cut], asked[len(asked[:cut]) :] + asked + post(3), answers=3)
    assert said.count(b"HTTP/1.1 200 OK") == 3
    assert said.count(b"\r\n\r\n70000") == 2 and said.endswith(b"\r\n\r\n3") and b"101 " not in said


def test_many_offers_in_one_packet_are_all_answered(port: int) -> None:
    asked = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert exchange(port, asked * 700, answers=700).count(b"HTTP/1.1 200 OK") == 700


@pytest.mark.parametrize(
    "asked",
    [
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_here_is_refused_and_not_read_for_ever(port: int, asked: bytes) -> None:
    said = exchange(port, asked, answers=2)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-length: %d" % len(body) in head
    assert "no HTTP/1.1 request" in json.loads(body)["error"]


@pytest.mark.parametrize("endless", [b"X: %s" % (b"a" * 1000), b"X: y\r\n" * 150])
def test_a_head_that_does_not_end_is_refused_with_431(port: int, endless: bytes) -> None:
    said = b""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        try:
            for _ in range(200):
                connection.sendall(endless)
        except OSError:
            pass  # refused while sending
        try:
            while piece := connection.recv(4096):
                said += piece
        except OSError:
            return  # the refusal was lost with the connection, which is over
    assert said.startswith(b"HTTP/1.1 431 ") and said.endswith(
        b'{"error":"the headers do not end within the limit; send fewer of them"}'
    )
    assert int(said.split(b"content-length: ")[1].split(b"\r\n")[0]) == len(said.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("parts", [(), (b"GET / HT",), (b"GET / HTTP/1.1\r\nHost: x\r\nX: ",), (post(5), b"GET /")])
def test_a_connection_whose_head_does_not_come_is_closed(
    port: int, parts: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "HEAD_S", 0.3)
    said = exchange(port, *parts, answers=2)
    assert said.count(b"HTTP/1.1 ") == (parts[0] == post(5) if parts else 0)


def test_a_slow_body_is_no_slow_head(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "HEAD_S", 0.3)
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        whole = post(10)
        connection.sendall(whole[:-1])
        connection.settimeout(3 * head.HEAD_S)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(whole[-1:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such bound")
def test_a_caller_who_does_not_read_is_given_up_and_one_who_reads_slowly_is_not(port: int) -> None:
    with (
        closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as deaf,
        closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as slow,
    ):
        for caller in (deaf, slow):
            caller.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        taken = 0

        def open_connections() -> set[int]:
            nonlocal taken
            taken += len(slow.recv(2**19))
            ours = [c for c in psutil.Process().net_connections("tcp4") if c.laddr.port == port and c.raddr]
            return {connection.raddr.port for connection in ours}

        until(lambda: deaf.getsockname()[1] not in open_connections())
        while taken < LARGE:
            taken += len(slow.recv(2**20))
