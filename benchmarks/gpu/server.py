"""The server under load: 16 callers over HTTP, and the share of the time that the GPU works.

The share is what the driver says of it: of each of its sampling periods, the time in which a kernel ran. Beside it
stand the same pictures through the engine in this process, without HTTP and files, and the network alone.
"""

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np

from benchmarks.gpu.network import Subject, seconds
from benchmarks.gpu.sheet import NotHere, Sheet
from benchmarks.overhead import caller, pictures
from penumbra.serving.engine.backends import load_backend
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from penumbra.serving.engine.windows import cover

CALLERS, LOAD_S, ENGINE_S, QUICK_S = 16, 20.0, 5.0, 1.0
SETTLE_S = 3.0
"""Of load that is not measured: the server's batches find their size, and the driver's period is a second at most."""
WORKING_BAR = 0.9
NEEDS = ("bentoml", "starlette", "pydantic_settings", "tritonclient", "orjson")
"""What the server has and the engine does without."""
Ask = Callable[[int], int]
"""Asks for the picture of that turn; the windows that the answer took."""


def run(sheet: Sheet) -> None:
    missing = [name for name in NEEDS if find_spec(name) is None]
    subject = Subject(sheet, "bf16")
    with tempfile.TemporaryDirectory() as folder:
        directory = subject.export(Path(folder) / "store")
        engine = in_process(sheet, directory)
        network = alone(sheet, subject, directory)
        if missing:
            raise NotHere(f"the server needs {', '.join(missing)}, which this Python has not")
        served = under_load(sheet, directory, Path(folder))
    sheet.put("served over the engine alone", served / engine)
    sheet.put("served over the network alone", served / network)


def alone(sheet: Sheet, subject: Subject, directory: Path) -> float:
    """Windows per second of encode and decode, with the card's number of samples."""
    graphs = load_backend(open_artifact(directory).card, directory, sheet.device)
    size = 2 if sheet.quick else 16
    image, noise = subject.image(size), subject.noise(subject.card.sampling.default_samples, size)
    rate = size / seconds(sheet, {"": lambda: graphs.decode(graphs.encode(image), noise)})[""]
    sheet.put("the network alone, windows/s", rate)
    return rate


def in_process(sheet: Sheet, directory: Path) -> float:
    """Windows per second of the same callers and pictures without HTTP and files."""
    images = [pixels for pixels, _ in asked(sheet)]
    with Segmenter(device=str(sheet.device)) as segmenter:
        segmenter.load(directory)

        def ask(turn: int) -> int:
            return segmenter.segment(images[turn % len(images)], SegmentOptions()).num_windows

        calls = Calls([ask] * CALLERS)
        took, counted = calls.during(QUICK_S if sheet.quick else ENGINE_S)
    rate = counted / took
    sheet.put("the engine alone, windows/s", rate)
    return rate


def asked(sheet: Sheet) -> list[tuple[np.ndarray, bytes]]:
    """The pictures, as arrays and as JPEG files."""
    return pictures()[: 1 if sheet.quick else None]


def under_load(sheet: Sheet, directory: Path, folder: Path) -> float:
    """Note what the callers of a server see, and how the GPU is used meanwhile; windows per second."""
    from tests.serving.server import MEASURED, serving  # not at the top: httpx may be missing where the engine runs

    images, bodies = map(list, zip(*asked(sheet), strict=True))
    window = open_artifact(directory).card.window
    counts = [cover(*pixels.shape[:2], window).num_windows for pixels in images]
    settings = {"device": sheet.device, "threads": 0, "log_level": "WARNING", "predrain_s": 0, **MEASURED}
    with serving(directory.parents[1], folder, **settings) as server, watching(sheet) as use:
        port = int(server.url.rpartition(":")[2])
        calls = Calls([caller(port, "/segment", bodies, counts) for _ in range(CALLERS)])
        calls.during(QUICK_S if sheet.quick else SETTLE_S)
        use.clear()
        calls.latencies_s.clear()
        took, counted = calls.during(QUICK_S if sheet.quick else LOAD_S)
        working = list(use)
    p50, p99 = np.percentile(calls.latencies_s, (50, 99))
    sheet.put(f"served to {CALLERS} callers, windows/s", counted / took)
    sheet.put("served, pictures/s", len(calls.latencies_s) / took)
    sheet.put("p50, ms", 1e3 * float(p50))
    sheet.put("p99, ms", 1e3 * float(p99))
    if working:
        sheet.bar("share of the time that the GPU works", float(np.mean(working)), at_least=WORKING_BAR)
    else:
        sheet.unmeasured("share of the time that the GPU works", "there is no nvidia-smi that says it")
    return counted / took


class Calls:
    """Callers in a closed loop, each in a thread of its own, for a time. Used by one thread."""

    def __init__(self, asks: list[Ask]) -> None:
        self.asks = asks
        self.latencies_s: list[float] = []

    def during(self, load_s: float) -> tuple[float, int]:
        """Ask for so long; the seconds until the last answer, and the windows. Raises what a caller met."""
        failed, begun = threading.Event(), time.perf_counter()

        def call(turn: int) -> int:
            windows, ask = 0, self.asks[turn]
            while (now := time.perf_counter()) < begun + load_s and not failed.is_set():
                try:
                    windows += ask(turn)
                except Exception:  # whoever waits for this caller gets it, and the others end
                    failed.set()
                    raise
                self.latencies_s.append(time.perf_counter() - now)
                turn += 1
            return windows

        with ThreadPoolExecutor(len(self.asks)) as callers:
            windows = sum(callers.map(call, range(len(self.asks))))
        return time.perf_counter() - begun, windows


@contextmanager
def watching(sheet: Sheet) -> Iterator[list[float]]:
    """Ask the driver four times a second for the share of its last period in which kernels ran; empty without one."""
    found: list[float] = []
    command = [
        "nvidia-smi", f"--id={sheet.device.index or 0}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
        "--loop-ms=250",
    ]  # fmt: skip
    if not which(command[0]):
        yield found
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=lambda: found.extend(shares(process)))
        reader.start()
        try:
            yield found
        finally:
            process.kill()
            reader.join()


def shares(process: subprocess.Popen[str]) -> Iterator[float]:
    """Read what nvidia-smi says, line by line, until it ends; a card that does not say it gives none."""
    assert process.stdout
    return (int(line) / 100 for line in process.stdout if line.strip().isdigit())
