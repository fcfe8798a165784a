"""Callers in a closed loop: each sends a picture, waits for its label map, sends the next."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from benchmarks.peers.servers import Ask

CLIENTS = 16


@dataclass(slots=True)
class Slices:
    """What several slices of one server's traffic gave. Changed by the one thread that runs them."""

    answers: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.latencies_s, (50, 99))
        return {
            "answers": self.answers, "requests/s": self.answers / self.seconds,
            "p50 ms": 1e3 * float(p50), "p99 ms": 1e3 * float(p99),
        }  # fmt: skip


def run_slice(connect: Callable[[], Ask], jpegs: list[bytes], into: Slices, *, requests: int) -> None:
    """Let every client send so many pictures: the same work for every server, whomever it answers first.

    Client i begins with picture i, so that sizes are mixed at any time. Raises what a client met. Changes `into`.
    """
    failed, asks = threading.Event(), [connect() for _ in range(CLIENTS)]

    def client(number: int) -> list[float]:
        latencies_s: list[float] = []
        for turn in range(number, number + requests):
            if failed.is_set():
                break
            begun = time.perf_counter()
            try:
                asks[number](jpegs[turn % len(jpegs)])
            except Exception:  # whoever waits for this client gets it, and the others end
                failed.set()
                raise
            latencies_s.append(time.perf_counter() - begun)
        return latencies_s

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        latencies_s = list(chain.from_iterable(clients.map(client, range(CLIENTS))))
    into.seconds += time.perf_counter() - started
    into.answers += len(latencies_s)
    into.latencies_s += latencies_s
