"""Callers in a closed loop: each sends a picture, waits for its label map, sends the next."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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

    Client i begins with picture i, so that sizes are mixed at any time. Raises what a client met first. Changes `into`.
    """
    latencies: list[list[float]] = [[] for _ in range(CLIENTS)]
    faults: list[BaseException] = []
    asks = [connect() for _ in range(CLIENTS)]
    started = time.perf_counter()

    def client(number: int) -> None:
        try:
            for turn in range(number, number + requests):
                if faults:
                    return
                begun = time.perf_counter()
                asks[number](jpegs[turn % len(jpegs)])
                latencies[number].append(time.perf_counter() - begun)
        except Exception as error:  # handed to the caller, who raises it
            faults.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    into.seconds += time.perf_counter() - started
    for one in latencies:
        into.answers += len(one)
        into.latencies_s += one
