"""Every export format against eager and against the processor's own peak, in one run: R50 and the zoo's nets.

    python -m benchmarks.engines [--rounds N] [--only NAME] [--threads N]

All variants take turns in shuffled order, and medians count. `eager` runs in a process of its own with the allocator as
it comes, as a notebook would run the checkpoint; `eager, kept memory` and all formats run as the server does, with
freed memory kept (`penumbra.serving.engine.allocator`). The peak is a loop of fused multiply-adds on registers, on all
threads; `product` is torch's of two matrices, which is what memory and caches leave of it. R50 is the
published DeepLabv3+ of `penumbra.models.cps` at 512x512 with random weights, whose normalisations have the statistics
of noise.
"""

import ctypes
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.overhead import serving_alike
from benchmarks.rounds import measure, save
from penumbra.export.bundle import export_network, find_writer
from penumbra.export.golden import ask
from penumbra.export.zoo import ZOO
from penumbra.models.card import Card, ClassInfo, ExportFacts, InputSpec, Parity, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.cps.net import CpsConfig, CpsNetwork
from penumbra.serving.engine.allocator import keep_freed_memory
from penumbra.serving.engine.backends import Backend, find_format, load_backend
from penumbra.serving.engine.quota import num_cores

R50 = "cps R50"
FORMATS = (
    ("torchscript", "fp32"), ("onnx", "fp32"), ("openvino", "fp32"), ("aot", "fp32"),
    ("torchscript", "bf16"), ("openvino", "bf16"), ("aot", "bf16"),
)  # fmt: skip
LOOP = """
typedef float vector __attribute__((vector_size(64)));
float fused(long rounds) {
    vector sum[16], factor, term;
    for (int j = 0; j < 16; j++) factor[j] = 0.999f, term[j] = 0.001f;
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) sum[i][j] = i + 2;
    for (long r = 0; r < rounds; r++)
        for (int i = 0; i < 16; i++) sum[i] = sum[i] * factor + term;
    float all = 0;
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) all += sum[i][j];
    return all;
}
"""
PRODUCT = 2048
"""Rows and columns of the matrices: 16 MiB each, and a tenth of a second."""
LOOP_ROUNDS = 2**25
"""A quarter of a second, long enough for the processor's clock to settle."""


def load_network(name: str) -> tuple[Card, Network]:
    """A zoo checkpoint, or the R50."""
    if name != R50:
        return load_checkpoint(ZOO / f"{name}.safetensors")
    torch.manual_seed(0)
    config = CpsConfig(21, branches=1)
    network = CpsNetwork(config)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.encode(torch.randn(2, 3, 256, 256))
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(21))
    card = Card(
        "r50", 1, "cps", dataclasses.asdict(config), classes, InputSpec(), WindowSpec(512, 512), network.sampling,
        Readout(),
    )  # fmt: skip
    return card, network.eval().requires_grad_(False)


def one_call(graphs: Network | Backend, card: Card, num_windows: int) -> Callable[[], Tensor]:
    """Make a call about windows with as many samples as are usual."""
    sampling, generator = card.sampling, torch.Generator().manual_seed(0)
    image_B3hw = torch.randn(num_windows, 3, card.window.height, card.window.width, generator=generator)
    noise_SBL = torch.randn(sampling.default_samples, num_windows, sampling.noise_length, generator=generator)

    def call() -> Tensor:
        with torch.inference_mode():
            return graphs.decode(graphs.encode(image_B3hw), noise_SBL)

    return call


def build(network: Network, card: Card, backend: str, precision: str, place: Path) -> Backend:
    """Graphs without their gate, which random weights in half precision do not pass."""
    directory = place / f"{backend}-{precision}"
    directory.mkdir()
    facts = ExportFacts(backend, precision, torch.__version__, {}, Parity(0, 0, 0, 0, 0))
    cpu = torch.device("cpu")
    facts = dataclasses.replace(facts, built_for=find_format("penumbra.serving.engine.backends", backend).target(cpu))
    card = dataclasses.replace(card, export=facts)
    find_writer(backend, precision).write(network, card, ask(network, card), directory, precision=precision, device=cpu)
    return load_backend(card, directory, cpu)


@contextmanager
def plain_eager(name: str, num_windows: int, threads: int) -> Iterator[Callable[[], object]]:
    """The checkpoint's network in a process of its own; every call of what is yielded runs it once there."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.engines",
        "--answer",
        name,
        str(num_windows),
        "--threads",
        str(threads),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout

        def call() -> bytes:
            process.stdin.write(b"\n")
            return process.stdout.readline()

        try:
            yield call
        finally:
            process.stdin.close()


def answer(name: str, num_windows: int) -> None:
    """The other side of `plain_eager`."""
    card, network = load_network(name)
    call = one_call(network, card, num_windows)
    for _ in sys.stdin:
        call()
        print(flush=True)


def peak_loop(place: Path, threads: int) -> Callable[[], object]:
    """Fused multiply-adds on all threads at once."""
    (place / "loop.c").write_text(LOOP)
    library = place / "loop.so"
    command = ["cc", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-o", library, place / "loop.c"]
    subprocess.run(command, check=True)
    fused = ctypes.CDLL(str(library)).fused
    fused.argtypes, fused.restype = [ctypes.c_long], ctypes.c_float
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(fused, [LOOP_ROUNDS] * threads))


def compare(name: str, num_windows: int, *, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds, and ratios to eager and to the peak."""
    card, network = load_network(name)
    call = one_call(network, card, num_windows)
    with FlopCounterMode(display=False) as counter:
        call()
    flops, results = counter.get_total_flops(), {}
    with tempfile.TemporaryDirectory() as folder, plain_eager(name, num_windows, threads) as plain:
        place = Path(folder)
        one, other = torch.randn(2, PRODUCT, PRODUCT)
        variants: dict[str, Callable[[], object]] = {
            "peak": peak_loop(place, threads), "product": lambda: one @ other,
            "eager": plain, "eager, kept memory": call,
        }  # fmt: skip
        for backend, precision in FORMATS:
            started = time.perf_counter()
            graphs = build(network, card, backend, precision, place)
            results[f"{backend} {precision}: export, s"] = time.perf_counter() - started
            variants[f"{backend} {precision}"] = one_call(graphs, card, num_windows)
        seconds = measure(variants, rounds=rounds)
    peak = 2 * 16 * 16 * LOOP_ROUNDS * threads / seconds.pop("peak")
    product = 2 * PRODUCT**3 / seconds.pop("product")
    results |= {"GFLOP": flops / 1e9, "peak fp32, GFLOP/s": peak / 1e9, "product fp32, GFLOP/s": product / 1e9}
    for variant, took in seconds.items():
        results[f"{variant}: ms"] = 1e3 * took
        results[f"{variant}: times eager"] = seconds["eager"] / took
        results[f"{variant}: share of the fp32 peak"] = flops / took / peak
    best = min(took for variant, took in seconds.items() if variant.endswith("fp32"))
    half = min(took for variant, took in seconds.items() if variant.endswith("bf16"))
    results["best fp32: share of the peak (bar 0.97 for R50)"] = flops / best / peak
    results["best fp32: over the product"] = flops / best / product
    results["best fp32 over eager (bar 2.9 for the zoo)"] = seconds["eager"] / best
    results["best bf16 over eager fp32 (bar 2.1)"] = seconds["eager"] / half
    return results


def cold_start(backend: str) -> float:
    """Seconds from `penumbra serve` to ready with the R50 alone in the store."""
    card, network = load_network(R50)
    with tempfile.TemporaryDirectory() as folder:
        export_network(network, card, Path(folder), backend=backend)
        started = time.perf_counter()
        with serving_alike(Path(folder)):
            return time.perf_counter() - started


@click.command()
@click.option("--rounds", default=11, show_default=True)
@click.option("--only", help="One network: 'cps R50', or one of the zoo.")
@click.option("--threads", default=num_cores(), show_default=True)
@click.option("--answer", "asked", nargs=2, type=(str, int), hidden=True)
def main(rounds: int, only: str | None, threads: int, asked: tuple[str, int] | None) -> None:
    torch.set_num_threads(threads)
    if asked:
        return answer(*asked)
    keep_freed_memory()
    zoo = [path.stem for path in sorted(ZOO.glob("*.safetensors"))]
    for name, num_windows in [(R50, 1), *((name, count) for name in zoo for count in (1, 4))]:
        if only in (None, name):
            found = compare(name, num_windows, rounds=rounds, threads=threads) | {"threads": threads}
            save("engines", {f"{name}, {num_windows} windows": found}, keep=True)
    if only in (None, R50):
        starts = {backend: cold_start(backend) for backend in ("torchscript", "onnx")}
        save("engines", {f"{R50}, cold start to ready, s (bar 5)": starts}, keep=True)


if __name__ == "__main__":
    main()
