"""Served throughput over a bare loop: 16 clients with pictures of mixed sizes against the same artifact.

    python -m benchmarks.overhead [--model np_semiseg-camvid]

The bare loop runs the same windows with the same batch size and samples through the same runtime, in as many
lanes, without decoding, scheduling, stitching, writing or HTTP. Both take turns on this machine; the clients' own
work counts against the server.

    python -m benchmarks.overhead --core-time --model supervised-camvid [--beside CHECKOUT]

What a request costs beside its network, in milliseconds of one core: a JPEG of one window in, its labels as an indexed
PNG out. It is the time that all threads of the server are on a core, by the kernel's own count, less that of the bare
network: encode and decode of the same artifact in as many lanes. The network and the servers (that of another checkout
beside this one's) take turns. It is told by phase: the event loop has the process' first thread, requests have the
threads that come with the first request, and the lanes are there before it. Time on a core hardly depends on who waits
for whom, but whoever else uses the caches adds to it, and never takes away: what counts is the quietest round of each.
"""

import http.client
import io
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
from PIL import Image

from benchmarks.lanes import in_lanes
from benchmarks.rounds import save
from penumbra.serving.engine.canvas import Wanted
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.engine.windows import cover

SIZES = ((240, 320), (360, 480), (360, 640), (480, 640), (720, 960))
CLIENTS, REQUESTS, ROUNDS = 16, 48, 7
ROOT = Path(__file__).parents[1]
ONE_SIZE = (360, 480)
PHASES = ("loop", "request threads", "lanes")
FIXED = {"windows_per_batch": 1, "samples_per_call": 4}
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
        wanted = Wanted(()) if plan.num_windows == 1 else None  # what a server asks of a picture's only window
        inputs += [WindowInput(Raster(image), window, plan, noise, wanted=wanted) for window in plan]

    size = runtime.windows_per_batch
    batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    started = time.perf_counter()
    in_lanes(segmenter.cores, [partial(runtime.run, batch) for batch in batches])
    return len(inputs) / (time.perf_counter() - started)


@contextmanager
def serving_alike(store: Path, checkout: Path = ROOT) -> Iterator[tuple[int, int]]:
    """A server of a checkout, gRPC too, with the sizes and threads that the engine has here: its process and port."""
    from tests.serving.server import serving  # not at the top: httpx may be missing where pictures alone are wanted

    settings = FIXED | {"threads": 0, "log_level": "WARNING", "predrain_s": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(store.absolute(), Path(folder), root=checkout, **settings) as server,
    ):
        yield server.process.pid, int(server.url.rpartition(":")[2])


def caller(port: int, path: str, bodies: list[bytes], windows: list[int]) -> Callable[[int], int]:
    """Make a caller with a connection of its own, who asks for a turn's label map. windows: those of each picture."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "image/jpeg", "Accept": "image/png"}

    def ask(turn: int) -> int:
        connection.request("POST", path, bodies[turn % len(bodies)], headers)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body.decode()
        return windows[turn % len(bodies)]

    return ask


def served(port: int, name: str, bodies: list[bytes], windows: list[int]) -> float:
    """Windows per second over HTTP with all clients at work."""
    own = threading.local()

    def connect() -> None:
        own.ask = caller(port, f"/segment?model={name}&scale=1", bodies, windows)

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS, initializer=connect) as clients:
        counted = sum(clients.map(lambda turn: own.ask(turn), range(REQUESTS)))
    return counted / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Worker:
    """A server's worker process, with the threads that it had before the first request."""

    process: int
    before: frozenset[int]

    @classmethod
    def of(cls, server: int) -> "Worker":
        """The process among a server's that has used most of the processor so far: it has loaded the model."""
        worker = max(family_of(server), key=lambda one: sum(core_seconds(one).values()))
        return cls(worker, frozenset(core_seconds(worker)))

    def spent(self) -> np.ndarray:
        """Seconds on a core so far, by `PHASES`."""
        seconds = np.zeros(len(PHASES))
        for thread, spent_s in core_seconds(self.process).items():
            seconds[0 if thread == self.process else 2 if thread in self.before else 1] += spent_s
        return seconds


def family_of(process: int) -> list[int]:
    """A process and all that it and its own have started, parents first."""
    family = [process]
    for one in family:
        with suppress(OSError):  # one has ended
            of_threads = Path(f"/proc/{one}/task").glob("*/children")
            family += [int(child) for children in of_threads for child in children.read_text().split()]
    return family


def core_seconds(process: int) -> dict[int, float]:
    """Seconds that each thread of a process was on a core."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return {int(thread.name): int((thread / "schedstat").read_text().split()[0]) / 1e9 for thread in threads}


def network_s(segmenter: Segmenter, name: str, image: np.ndarray) -> float:
    """Core seconds of a window through the network alone, in lanes."""
    runtime = segmenter.find(name)
    card = runtime.card
    noise = SeededNoise(card.sampling, seed=0, num_samples=card.sampling.default_samples).draw(0)
    plan = cover(*image.shape[:2], card.window)
    inputs = [WindowInput(Raster(image), window, plan, noise) for window in plan]
    assert len(inputs) == 1
    image_1chw, noise_S1L = runtime._steps.cut(inputs), runtime._steps.noise(inputs)
    spent = []

    def work() -> None:
        started = time.thread_time()
        features = runtime._backend.encode(image_1chw)
        runtime._backend.decode(features, noise_S1L)
        spent.append(time.thread_time() - started)

    in_lanes(segmenter.cores, [work] * REQUESTS)
    return sum(spent) / REQUESTS


def measure_core_time(model: str, store: Path, checkouts: dict[str, Path]) -> dict[str, object]:
    """Core milliseconds of a request by server and phase, and what of them is not the network."""
    image, body = next((image, body) for image, body in pictures() if image.shape[:2] == ONE_SIZE)
    found: dict[str, list[np.ndarray]] = {name: [] for name in checkouts}
    networks, shuffler = list[float](), random.Random(0)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving_alike(store, checkout)) for name, checkout in checkouts.items()}
        workers = {name: Worker.of(process) for name, (process, _) in servers.items()}
        segmenter = stack.enter_context(Segmenter(tuning=Tuning(**FIXED)))
        segmenter.load(find_artifact(store, model))

        def take_turn(name: str) -> None:
            if name == "network":
                networks.append(network_s(segmenter, model, image))
                return
            before = workers[name].spent()
            served(servers[name][1], model, [body], [1])
            found[name].append((workers[name].spent() - before) / REQUESTS)

        for _ in range(2 * ROUNDS + 1):
            for name in shuffler.sample(["network", *servers], len(servers) + 1):
                take_turn(name)
    network_ms = 1e3 * np.array(networks[1:])  # the first round only warms up
    results: dict[str, object] = {"the network alone, core-ms": network_ms.min()}
    for name, rounds in found.items():
        phases_ms = 1e3 * np.array(rounds[1:]) - network_ms.min() * (np.array(PHASES) == "lanes")
        results[f"{name}: all that is not the network, core-ms (bar 8)"] = phases_ms.sum(1).min()
        for phase, spent_ms in zip(PHASES, phases_ms[phases_ms.sum(1).argmin()], strict=True):
            results[f"{name}: {phase}{', less the network' * (phase == 'lanes')}"] = spent_ms
        paired_ms = phases_ms.sum(1) - network_ms + network_ms.min()
        results[f"{name}: the same, median of pairs"] = float(np.median(paired_ms))
        results[f"{name}: every round"] = phases_ms.sum(1).round(1).tolist()
    return results


@click.command()
@click.option("--core-time", is_flag=True, help="Measure what one request costs beside its network.")
@click.option("--beside", type=click.Path(path_type=Path, exists=True), help="Another checkout, with --core-time.")
@click.option("--model", default="np_semiseg-camvid", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), default=Path("store"), show_default=True)
def main(core_time: bool, beside: Path | None, model: str, store: Path) -> None:
    if core_time:
        checkouts = {"here": ROOT} | ({"beside": beside.absolute()} if beside else {})
        about = {"model": model, "clients": CLIENTS}
        save("core_time", about | measure_core_time(model, store.absolute(), checkouts))
        return
    images, bodies = map(list, zip(*pictures(), strict=True))
    with serving_alike(store) as (_, port), Segmenter(tuning=Tuning(**FIXED)) as segmenter:
        card = segmenter.load(find_artifact(store, model))
        windows = [cover(*image.shape[:2], card.window).num_windows for image in images]
        served(port, model, bodies, windows)
        bare, through = [], []
        for _ in range(ROUNDS):
            bare.append(bare_loop(segmenter, model, images))
            through.append(served(port, model, bodies, windows))
    save("overhead", {
        "model": model, "samples": card.sampling.default_samples, "clients": CLIENTS,
        "windows per batch": FIXED["windows_per_batch"],
        "bare loop, windows/s": statistics.median(bare), "served, windows/s": statistics.median(through),
        "served over bare, median of paired rounds (bar 0.93)":
            statistics.median(s / b for s, b in zip(through, bare, strict=True)),
        "every round": [round(s / b, 3) for s, b in zip(through, bare, strict=True)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
