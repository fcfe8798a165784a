"""uvicorn's HTTP protocol with what it has not by itself: a bound and a clock on the request's line and headers, an end
to callers who do not read their answer, and requests that offer another protocol read as if they did not; and TLS with
a certificate that may change.

A whole head that is over the limit is refused by `penumbra.serving.http.admission` with a sentence; here are those
that do not end.
"""

import socket
from asyncio import TimerHandle, Transport
from functools import partial
from typing import Any

import httptools
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penumbra.serving.following import Followed
from penumbra.serving.tls import Certificate, context_of

HEAD_S = 30.0
"""The time for a head, longer than any caller takes who means it; a proxy before the server may be stricter."""
STALL_S = 60.0
"""The time that a caller may take no byte of its answer, which else is kept for ever for one that does not read."""


def _refusal(status: bytes, sentence: bytes) -> bytes:
    """An answer in the form of every other error, and the connection's last."""
    body = b'{"error":"%s"}' % sentence
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


REFUSAL = _refusal(
    b"431 Request Header Fields Too Large", b"the headers do not end within the limit; send fewer of them"
)
BAD_REQUEST = _refusal(b"400 Bad Request", b"this is no HTTP/1.1 request; its line or its headers cannot be read")


class PlainParser:
    """httptools' parser, to which `Upgrade` is a header like any other (RFC 9110 7.8 lets a server pass it over).

    By itself it ends a request that offers h2c or a WebSocket behind its head, and its body is lost. Here that head is
    read once more, without the offer, and what follows is the request's body.
    """

    def __init__(self, protocol: "BoundedHead") -> None:
        self._protocol, self._parser = protocol, _new_parser(protocol)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Raises HttpParserError."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                method, version = self._parser.get_method(), self._parser.get_http_version().encode()
                if method == b"CONNECT":
                    raise httptools.HttpParserError("there is no way from here to another server") from None
                rest = rest[offer.args[0] :]
                lines = [b"%s %s HTTP/%s" % (method, self._protocol.url, version)]
                lines += [b"%s: %s" % header for header in self._protocol.headers if header[0] != b"upgrade"]
                self._parser = _new_parser(self._protocol)
                self._parser.feed_data(b"\r\n".join([*lines, b"", b""]))


def _new_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """A parser of requests with the one leniency that uvicorn gives its own."""
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class BoundedHead(HttpToolsProtocol):
    """One connection. The clock runs from the connection, or the first byte of a later request, to the head's end."""

    def __init__(self, *arguments: object, limit_bytes: int, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.parser = PlainParser(self)  # type: ignore[assignment]
        self._limit_bytes, self._head_bytes = limit_bytes, 0
        self._clock: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_S, transport.close)
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * STALL_S))

    def _should_upgrade(self) -> bool:
        """A head that offers another protocol begins no request: `PlainParser` brings it again without the offer."""
        return True

    def send_400_response(self, msg: str) -> None:
        self.transport.write(BAD_REQUEST)
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._clock = self._clock or self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        clock = self._clock
        super().data_received(data)
        if clock and clock is self._clock and not self.transport.is_closing():  # all of it is of one head
            self._head_bytes += len(data)
            if self._head_bytes > self._limit_bytes:
                self.transport.write(REFUSAL)
                self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(error)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
        self._clock = None


def serve_securely(certificate: Followed[Certificate]) -> None:
    """Let uvicorn speak TLS in every server that it starts in this process."""
    context = context_of(certificate)
    uvicorn.Config = partial(uvicorn.Config, ssl_context_factory=lambda *_: context)  # type: ignore[misc, assignment]


def bound_heads(limit_bytes: int) -> None:
    """Let uvicorn use this protocol for every server that it starts in this process."""
    HTTP_PROTOCOLS["auto"] = partial(BoundedHead, limit_bytes=limit_bytes)  # type: ignore[assignment]
