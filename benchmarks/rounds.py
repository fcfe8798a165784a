"""Side-by-side timing: every variant in every round, in shuffled order, medians; ratios survive a noisy machine."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penumbra.serving.engine.quota import num_cores

RESULTS = Path(__file__).parent / "results"


def measure(variants: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of every variant over rounds."""
    return {name: statistics.median(values) for name, values in take_turns(variants, rounds=rounds).items()}


def take_turns(variants: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in each of the shuffled rounds, after one unmeasured call each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for name in order:
        variants[name]()
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def machine() -> dict[str, Any]:
    """Say what figures are measured on."""
    return {
        "machine": platform.machine(), "cores": num_cores(), "python": platform.python_version(),
        "torch": torch.__version__, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def forget_peak() -> int:
    """Let this process's peak memory begin anew; return the bytes that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the most bytes that this process has held since `forget_peak`; getrusage's peak is one since it began, or
    even of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def save(name: str, results: dict[str, Any], *, keep: bool = False) -> None:
    """Print results, and write them with what they were measured on to benchmarks/results/<name>.json.

    keep: beside what the file holds of other runs already; results are dicts then, and each says what it was measured
    on. Those that do not are older, and the file's own "on" is that of the newest of them.
    """
    RESULTS.mkdir(exist_ok=True)
    path, on = RESULTS / f"{name}.json", {"on": machine()}
    rows = results
    if keep:
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {key: on | value for key, value in results.items()}, indent=2) + "\n")
        rows = {f"{key}: {figure}": value for key, result in results.items() for figure, value in result.items()}
    else:
        path.write_text(json.dumps(on | results, indent=2) + "\n")
    show(rows)


def show(rows: dict[str, Any]) -> None:
    """Print figures by name."""
    for key, value in rows.items():
        print(f"{key:58} {value:.4g}" if isinstance(value, float) else f"{key:58} {value}")
