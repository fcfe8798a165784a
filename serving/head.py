"""uvicorn's HTTP protocol with what it has not by itself: a bound and a clock on the request's line and headers, and an
end to callers who do not read their answer.

A whole head that is over the limit is refused by `penumbra.serving.guard` with a sentence; here are those that do not
end.
"""

import socket
from asyncio import TimerHandle, Transport
from functools import partial

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 30.0
"""Longer than any caller takes who means it; a proxy before the server may be stricter."""
STALL_S = 60.0
"""Without the caller taking a byte of its answer, which else is kept for ever for one that does not read."""
REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b'content-length: 71\r\n\r\n{"error":"the headers do not end within the limit; send fewer of them"}'
)


class BoundedHead(HttpToolsProtocol):
    """One connection. The clock runs from the connection, or the first byte of a later request, to the head's end."""

    def __init__(self, *arguments: object, limit_bytes: int, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._limit_bytes, self._head_bytes = limit_bytes, 0
        self._clock: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_S, transport.close)
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1e3 * STALL_S))

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


def bound_heads(limit_bytes: int) -> None:
    """Let uvicorn use this protocol for every server that it starts in this process."""
    HTTP_PROTOCOLS["auto"] = partial(BoundedHead, limit_bytes=limit_bytes)  # type: ignore[assignment]
