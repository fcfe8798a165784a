"""Room for the bytes of all requests together: those of their bodies, and of what is made of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from penumbra.models.errors import Cancelled, QueueFull, TooLarge


class Room:
    """Room has a limit, and requests take bytes of it until their end. Any thread may call it.

    too_large, full: the sentences of a refusal, with places for `size`, `held` and `limit`.
    """

    too_large: str
    full: str

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Yield what a request takes its bytes by, which are given back at its end. It raises QueueFull and
        TooLarge."""
        taken, has_ended = 0, False

        def take(size: int) -> None:
            nonlocal taken
            with self._lock:
                if has_ended:  # and a thread is still at work for it
                    raise Cancelled("the request was cancelled")
                if taken + size > self._limit_bytes:  # also alone, however often it is tried
                    raise TooLarge(self.too_large.format(size=taken + size, limit=self._limit_bytes))
                if self._held_bytes + size > self._limit_bytes:
                    sentence = self.full.format(held=self._held_bytes, size=size, limit=self._limit_bytes)
                    raise QueueFull(sentence, retry_after_s=1)
                self._held_bytes, taken = self._held_bytes + size, taken + size

        try:
            yield take
        finally:
            with self._lock:
                self._held_bytes, has_ended = self._held_bytes - taken, True


class Bodies(Room):
    """The bytes of all requests' bodies together, over every protocol, from their first byte to their answer."""

    too_large = (
        "the body takes {size:,} bytes and the limit of all bodies together is {limit:,}; send a smaller or better "
        "compressed image, or parts of it"
    )
    full = (
        "the bodies of all requests have {held:,} bytes, this one needs {size:,} more and the limit is {limit:,}; try "
        "again in 1 s"
    )


class Memory(Room):
    """The memory that all requests at work take together, by `RequestPlan.num_bytes`, from before their pictures are
    decoded until their answers are written."""

    too_large = (
        "the picture, its canvas and its answer take {size:,} bytes of memory and the limit of all requests together "
        "(limit_memory_bytes) is {limit:,}; send a smaller image or parts of it, ask for fewer maps, or make it a job"
    )
    full = (
        "the requests at work take {held:,} bytes of memory, this one needs {size:,} more and the limit "
        "(limit_memory_bytes) is {limit:,}; try again in 1 s"
    )
