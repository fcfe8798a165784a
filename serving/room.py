"""Room for the bytes of all requests together: those of their bodies, and of what is made of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from penumbra.models.errors import Cancelled, QueueFull, TooLarge


class Room:
    """Room has a limit, and requests take bytes of it until their end. Any thread may call it.

    one, every: what takes the bytes, of one request and of all. remedy: what makes it fewer.
    """

    one: str
    every: str
    remedy: str

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Yield what a request takes its bytes by, which are given back at its end; a size below 0 gives some back
        before. It raises QueueFull and TooLarge, and Cancelled after the end."""
        taken, has_ended = 0, False

        def take(size: int) -> None:
            nonlocal taken
            with self._lock:
                if has_ended:  # and a thread is still at work for it
                    raise Cancelled("the request was cancelled")
                if taken + size > self._limit_bytes:  # also alone, however often it is tried
                    raise TooLarge(
                        f"{self.one} takes {taken + size:,} bytes and the limit of all {self.every} together is "
                        f"{self._limit_bytes:,}; {self.remedy}"
                    )
                if self._held_bytes + size > self._limit_bytes:
                    raise QueueFull(
                        f"the {self.every} of all requests have {self._held_bytes:,} bytes, this one needs {size:,} "
                        f"more and the limit is {self._limit_bytes:,}; try again in 1 s", retry_after_s=1,
                    )  # fmt: skip
                self._held_bytes, taken = self._held_bytes + size, taken + size

        try:
            yield take
        finally:
            with self._lock:
                self._held_bytes, has_ended = self._held_bytes - taken, True

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count bytes that are there in any case: they are refused to nobody, and leave less for others."""
        with self._lock:
            self._held_bytes += size
        try:
            yield
        finally:
            with self._lock:
                self._held_bytes -= size


class Bodies(Room):
    """Bodies are counted over every protocol, from their first byte (over gRPC a message's last) to their answer; large
    answers until taken."""

    one, every = "the body", "bodies"
    remedy = "send a smaller or better compressed image, or parts of it"


class Memory(Room):
    """Memory is counted as `RequestPlan.num_bytes` predicts it, from before a picture is decoded until its answer is
    written."""

    one, every = "the picture with its canvas and its answer", "pictures, canvases and answers (limit_memory_bytes)"
    remedy = "send a smaller image or parts of it, run it at a smaller scale, ask for fewer maps, or make it a job"
