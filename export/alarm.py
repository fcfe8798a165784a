"""Blocks that end at a time, whatever they are at: with an interrupt, which no library takes for a fault of its own."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN_S = 1.0
"""Seconds after which the end of the time is said once more, should a library or a finaliser have swallowed it."""


@contextmanager
def until(ends: float, interrupt: type[KeyboardInterrupt] = KeyboardInterrupt) -> Iterator[None]:
    """End the block with Ctrl-C, or at a time, as if somebody had pressed it then; what follows the block goes on.

    interrupt: what ends it at that time. One block may stand in another that ends later.
    """

    def ring(*_: object) -> None:
        raise interrupt

    before = signal.signal(signal.SIGALRM, ring)
    left_s, again_s = signal.setitimer(signal.ITIMER_REAL, max(ends - time.perf_counter(), AGAIN_S), AGAIN_S)
    begun = time.perf_counter()  # after the other block's time was read, which may end late and never early
    try:
        yield
    except interrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.perf_counter() - begun), 1e-3), again_s)


class Overdue(KeyboardInterrupt):
    """A candidate has taken its share of the time. Like Ctrl-C, no library takes it for a fault of its own."""
