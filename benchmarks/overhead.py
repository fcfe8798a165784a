"""Served throughput over a bare loop: 16 clients with pictures of mixed sizes against the same artifact.

    python -m benchmarks.overhead [--model np_semiseg-camvid]

The bare loop runs the same windows with the same batch size and samples through the same runtime, in as many
lanes, without decoding, scheduling, stitching, writing or HTTP. Both take turns on this machine; the clients' own
work counts against the server.
"""

import http.client
import io
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
from PIL import Image

from benchmarks.lanes import in_lanes
from benchmarks.rounds import save
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.engine.windows import cover

SIZES = ((240, 320), (360, 480), (360, 640), (480, 640), (720, 960))
CLIENTS, REQUESTS, ROUNDS = 16, 48, 7
SIZES_FIXED = Tuning(windows_per_batch=1, samples_per_call=4)
"""The same for both sides; what warm-up would choose differs from start to start by what else the machine does."""


def pictures() -> list[tuple[np.ndarray, bytes]]:
    rng = np.random.Generator(np.random.PCG64(0))
    made = []
    for height, width in SIZES:
        small = Image.fromarray(rng.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        made.append((np.asarray(picture), buffer.getvalue()))
    return made


def bare_loop(segmenter: Segmenter, name: str, images: list[np.ndarray]) -> float:
    """Windows per second through the runtime alone, which cuts them."""
    runtime = segmenter.find(name)
    card = runtime.card
    noise = SeededNoise(card.sampling, seed=0, num_samples=card.sampling.default_samples).draw(0)
    inputs = []
    for i in range(REQUESTS):
        image = images[i % len(images)]
        plan = cover(*image.shape[:2], card.window)
        inputs += [WindowInput(Raster(image), window, plan, noise) for window in plan]

    size = runtime.windows_per_batch
    batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    started = time.perf_counter()
    in_lanes(segmenter.cores, [partial(runtime.run, batch) for batch in batches])
    return len(inputs) / (time.perf_counter() - started)


def served(port: int, name: str, bodies: list[bytes], windows: list[int]) -> float:
    """Windows per second over HTTP with all clients at work."""
    work: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(REQUESTS):
        work.put(i)
    failures: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        headers = {"Content-Type": "image/jpeg", "Accept": "image/png"}
        while True:
            try:
                i = work.get_nowait()
            except queue.Empty:
                return
            connection.request("POST", f"/segment?model={name}", bodies[i % len(bodies)], headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                failures.append(body.decode())

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert not failures, failures[0]
    return sum(windows[i % len(windows)] for i in range(REQUESTS)) / seconds


def start_server(store: Path) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "penumbra",
        "serve",
        "--store",
        str(store),
        "--port",
        str(port),
        "--grpc-port",
        "0",
    ]
    environment = os.environ | {"PENUMBRA_LOG_LEVEL": "WARNING", "PENUMBRA_PREDRAIN_S": "0"}
    environment |= {
        "PENUMBRA_WINDOWS_PER_BATCH": str(SIZES_FIXED.windows_per_batch),
        "PENUMBRA_SAMPLES_PER_CALL": str(SIZES_FIXED.samples_per_call),
    }
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    for _ in range(240):
        time.sleep(0.25)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            continue
    process.send_signal(signal.SIGTERM)
    raise SystemExit("the server did not become ready within a minute")


@click.command()
@click.option("--model", default="np_semiseg-camvid", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path("store"), show_default=True)
def main(model: str, store: Path) -> None:
    images, bodies = map(list, zip(*pictures(), strict=True))
    process, port = start_server(store)
    try:
        with Segmenter(tuning=SIZES_FIXED) as segmenter:
            segmenter.load(find_artifact(store, model))
            card = segmenter.find(model).card
            windows = [cover(*image.shape[:2], card.window).num_windows for image in images]
            served(port, model, bodies, windows)
            bare, through = [], []
            for _ in range(ROUNDS):
                bare.append(bare_loop(segmenter, model, images))
                through.append(served(port, model, bodies, windows))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    save("overhead", {
        "model": model, "samples": card.sampling.default_samples, "clients": CLIENTS,
        "windows per batch": SIZES_FIXED.windows_per_batch,
        "bare loop, windows/s": statistics.median(bare), "served, windows/s": statistics.median(through),
        "served over bare, median of paired rounds (bar 0.90)":
            statistics.median(s / b for s, b in zip(through, bare, strict=True)),
        "every round": [round(s / b, 3) for s, b in zip(through, bare, strict=True)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
