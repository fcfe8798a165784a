"""A long, bounded load, and whether the server grows under it.

    python -m loadtests.soak [--minutes 60] [--users 4] [--output DIR]

Callers of all kinds (`loadtests.locustfile`) ask a server that is started for it. Every few seconds the memory, open
files and threads of its supervisor and its worker are read. After a warm-up, memory may rise by less than 1 MB a
minute (the slope of the least-squares line) and one step of 48 MB, so a short run finds large leaks and a long one
small ones; open files and threads not at all but for those of requests at work.
Writes DIR/soak.json with every reading; fails on what `make load` fails on, and on growth.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import psutil

from loadtests.run import SETTLE_S, ask, fill, judge, scrape
from tests.serving.server import MEASURED, serving, until

SLOPE_MB_PER_MINUTE, STEP_MB = 1.0, 48.0
"""Growth is more than a megabyte a minute over the warm part, and one step: memory that is used again but not given
back, when one large picture more is at work than ever before."""
MORE = {"open_files": 0, "threads": 3}
"""What a process may have more of at the end than ever when warm. Pools of threads grow by one whenever more is to be
done at a time than ever before, which may come late; a thread lost for every thousandth request would be more."""
WARM_UP = 0.4
"""Share of the run before memory is looked at: pools, caches and the allocator fill up first."""
EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process holds at a moment. at_s: since the start of the load."""

    process: str
    at_s: float
    rss_mb: float
    open_files: int
    threads: int


def read(name: str, process: psutil.Process, began: float) -> Reading:
    with process.oneshot():
        rss_mb = process.memory_info().rss / 1e6
        return Reading(name, time.monotonic() - began, rss_mb, process.num_fds(), process.num_threads())


@contextmanager
def watching(pid: int) -> Iterator[list[Reading]]:
    """Readings of a supervisor and its worker, once more as the block ends, when its callers have gone."""
    supervisor = psutil.Process(pid)
    (worker,) = supervisor.children()
    readings: list[Reading] = []
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while True:
            last = ended.wait(EVERY_S)
            readings.extend((read("supervisor", supervisor, began), read("worker", worker, began)))
            if last:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield readings
    finally:
        ended.set()
        thread.join()


def slope_mb_per_minute(readings: Sequence[Reading]) -> float:
    """Fit the slope of the memory after the warm-up."""
    end_s = readings[-1].at_s
    late = [reading for reading in readings if reading.at_s >= WARM_UP * end_s]
    return float(60 * np.polyfit([r.at_s for r in late], [r.rss_mb for r in late], 1)[0])


def growth(readings: Sequence[Reading]) -> list[str]:
    """What grew in one process; nothing when it is well. The last reading is of a server without callers."""
    wrong = []
    slope, last = slope_mb_per_minute(readings), readings[-1]
    warm_minutes = (1 - WARM_UP) * last.at_s / 60
    if slope >= SLOPE_MB_PER_MINUTE + STEP_MB / warm_minutes:
        wrong.append(f"the memory of the {last.process} rises by {slope:.2f} MB a minute")
    warm = [reading for reading in readings if reading.at_s < WARM_UP * last.at_s]
    for what, more in MORE.items():
        before = max(getattr(reading, what) for reading in warm)
        if getattr(last, what) > before + more:
            wrong.append(f"the {last.process} has {getattr(last, what)} {what}, and had {before} at most when warm")
    return wrong


def report(readings: Sequence[Reading]) -> str:
    first, last = readings[0], readings[-1]
    return (
        f"{last.process}: {last.at_s / 60:.1f} minutes, {first.rss_mb:.0f} -> {last.rss_mb:.0f} MB, "
        f"{slope_mb_per_minute(readings):+.3f} MB a minute when warm, open files {first.open_files} -> "
        f"{last.open_files}, threads {first.threads} -> {last.threads}"
    )


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.5), default=5.0, show_default=True)
@click.option("--users", type=click.IntRange(min=1), default=4, show_default=True, help="Of the closed loop.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/soak"), show_default=True
)
def main(minutes: float, users: int, output: Path) -> None:
    """Load a server for long and see that it does not grow."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / "store")
        with serving(Path(folder) / "store", Path(folder), **MEASURED) as server:
            with watching(server.process.pid) as readings:
                seen = ask(server, output, seconds=round(60 * minutes), users=users, classes=())
                until(lambda: not scrape(server)["penumbra_inflight"], bound_s=SETTLE_S)
            counted = scrape(server)
    of_process = [[r for r in readings if r.process == name] for name in ("supervisor", "worker")]
    wrong = judge(seen, counted) + [said for series in of_process for said in growth(series)]
    document = {"wrong": wrong, "seen": seen, "readings": [asdict(reading) for reading in readings]}
    (output / "soak.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"{seen['requests']} requests, {len(seen['errors'])} kinds of error")
    for series in of_process:
        print(report(series))
    if wrong:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
