"""What a large picture's share of the turns (PENUMBRA_LARGE_SHARE) costs small ones, and what it is worth to itself.

    python -m benchmarks.shares [--share 1 --share 4]

The scheduler's real lanes and queue run a network that takes a fixed time for a window, and sleeps meanwhile: what is
left is who waits for whom, in times of a window, whatever else the machine does. 16 callers with pictures of mixed
sizes each send one, wait for its answer, send the next. Then all but one send small pictures. Then one sends small
ones, alone and beside one of a thousand windows.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import click
import numpy as np

from benchmarks.overhead import SIZES
from benchmarks.peers.traffic import CLIENTS
from benchmarks.rounds import save
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.errors import DeadlineExceeded
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.throughput import Cores
from penumbra.serving.engine.windows import count_windows
from tests.serving.engine.stepped import SteppedRuntime, consume, work
from tests.serving.server import ROOT

WINDOW_S, TURNS, FEW, ALONE, LARGE, HUGE, PATIENCE = 0.02, 15, 3, 20, 9, 1000, 500
LANES = 2


def answer(scheduler: Scheduler, runtime: SteppedRuntime, num_windows: int, share: int, **options: Any) -> float:
    """Give how long a picture took, in times of a window."""
    request = work(scheduler, runtime, num_windows, **options)
    request.plan = replace(request.plan, share=min(num_windows, share))
    begun = time.perf_counter()
    consume(scheduler.submit(request))
    return (time.perf_counter() - begun) / WINDOW_S


def mixed(ask: Callable[[int], float], sizes: list[int]) -> dict[str, Any]:
    """Callers in a closed loop; client i begins with picture i."""

    def client(number: int) -> list[tuple[int, float]]:
        asked = [sizes[turn % len(sizes)] for turn in range(number, number + TURNS)]
        return [(size, ask(size)) for size in asked]

    with ThreadPoolExecutor(CLIENTS) as threads:
        took = [one for client_took in threads.map(client, range(CLIENTS)) for one in client_took]
    times = [time for _, time in took]
    by_size = {size: [time for own, time in took if own == size] for size in sorted(set(sizes))}
    return {
        "p50": round(float(np.percentile(times, 50)), 1), "p99": round(float(np.percentile(times, 99)), 1),
        "median by windows": {size: round(float(np.median(own)), 1) for size, own in by_size.items()},
    }  # fmt: skip


def among_small(ask: Callable[..., float]) -> dict[str, float]:
    """Medians of a large picture that is sent again and again, and of the small ones that all others send."""
    is_over = threading.Event()

    def client() -> list[float]:
        times = []
        while not is_over.is_set():
            times.append(ask(1))
        return times

    with ThreadPoolExecutor(CLIENTS) as threads:
        small = [threads.submit(client) for _ in range(CLIENTS - 1)]
        try:
            large = [ask(LARGE, deadline=time.perf_counter() + PATIENCE * WINDOW_S) for _ in range(FEW)]
        except DeadlineExceeded:
            large = [float("inf")]
        is_over.set()
        small_times = [one for client_times in small for one in client_times.result()]
    return {"large": round(float(np.median(large)), 1), "small": round(float(np.median(small_times)), 1)}


def beside_huge(ask: Callable[..., float]) -> dict[int, float]:
    """The median of small pictures beside a huge one, over that alone, by their windows."""
    alone = {size: np.median([ask(size) for _ in range(ALONE)]) for size in (1, 2)}
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        huge = threads.submit(ask, HUGE, cancelled=cancelled)
        beside = {size: np.median([ask(size) for _ in range(ALONE)]) for size in (1, 2)}
        assert not huge.done(), "it was at work all the time"
        cancelled.set()
        huge.exception()
    return {size: round(float(beside[size] / alone[size]), 2) for size in alone}


@click.command()
@click.option("--share", "shares", type=int, multiple=True, default=(1, 2, 4, 8), show_default=True)
def main(shares: tuple[int, ...]) -> None:
    card, _ = load_checkpoint(ROOT / "models/zoo/supervised-camvid.safetensors")
    sizes = [count_windows(*size, card.window) for size in SIZES]
    runtime, figures = SteppedRuntime(before=lambda _: time.sleep(WINDOW_S)), {}
    runtime.go.set()
    for share in shares:
        scheduler = Scheduler(queue_samples=10**6, cores=Cores(LANES, LANES))
        ask = partial(answer, scheduler, runtime, share=share)
        others = {"among small ones": among_small(ask), "beside a huge one over alone": beside_huge(ask)}
        figures[f"share {share}"] = mixed(ask, sizes) | others
        scheduler.close()
    save("shares", {"windows by size": sizes, "callers": CLIENTS, "lanes": LANES} | figures)


if __name__ == "__main__":
    main()
