"""What a GPU makes of it: engines side by side, batches of windows and samples, the floor, graphs, copies.

    python -m benchmarks.gpu [--device cuda] [--precision bf16 --precision fp32] [--quick]

The published NP-SemiSeg net on its U2PL host, ResNet-50, 512x512, 21 classes, random weights: speed does not depend on
them, but the accuracy of half precisions does, and `tests/gpu` measures it on trained weights. The floor of a call is
what its multiplications take at the speed of a large matmul, or its weights, input and output at the speed of a copy,
whichever is longer; both are measured in the same run. Without a GPU it says so and ends; `--device cpu --quick` runs
the same code on small shapes to show that it works.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rounds import measure, save
from penumbra.export.bundle import NOT_MEASURED, ask, find_writer
from penumbra.export.parity import measure_parity
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import Card, ClassInfo, ExportFacts, InputSpec, Readout, WindowSpec
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption, ParityFailed
from penumbra.models.np_semiseg.net import NpConfig, NpNetwork, u2pl
from penumbra.serving.engine.backends import DTYPES, open_backend
from penumbra.serving.engine.runtime import is_out_of_memory
from penumbra.serving.engine.store import Golden

WINDOWS, SAMPLES, MOST = (1, 2, 4, 8, 16, 32, 64), (1, 2, 5, 10, 20, 50), 800
"""Of one call; products of windows and samples above MOST are left out."""
ENGINES = ("compile", "torchscript", "aot", "tensorrt")
"""Beside eager."""
ROUNDS, BATCHES = 5, 12
QUICK = NpConfig(
    3, ResNetConfig(depth=18, width=8), aspp_channels=16, low_channels=8, latent_length=8, hidden=16, head="published"
)
Results = dict[str, Any]


class Bench:
    """One network in one precision on one device, with all that is measured of it. Keeps what it has found so far."""

    def __init__(self, device: torch.device, precision: str, *, quick: bool) -> None:
        config = QUICK if quick else u2pl(21)
        self.device, self.precision, self.dtype = device, precision, DTYPES[precision]
        self.size = 64 if quick else 512
        self.windows, self.samples = ((1, 2), (1, 3)) if quick else (WINDOWS, SAMPLES)
        self.matmul, self.copied = (256, 2**20) if quick else (8192, 2**30)
        self.source = _network(config)
        self.network = _network(config).to(device, self.dtype).to(memory_format=torch.channels_last)
        self.length = config.latent_length
        classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(config.num_classes))
        self.card = Card(
            "np", 1, "np_semiseg", asdict(config), classes, InputSpec(), WindowSpec(self.size, self.size),
            self.network.sampling, Readout(),
        )  # fmt: skip
        self.found: Results = {}

    def image(self, num_windows: int) -> Tensor:
        return torch.randn(num_windows, 3, self.size, self.size, device=self.device)

    def noise(self, num_samples: int, num_windows: int) -> Tensor:
        return torch.randn(num_samples, num_windows, self.length, device=self.device)

    def eager_encode(self, image_B3hw: Tensor) -> Features:
        return self.network.encode(image_B3hw.to(self.dtype, memory_format=torch.channels_last))

    def eager_decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.network.decode(features, noise_SBL.to(self.dtype))

    def finished(self, work: Callable[[], object]) -> Callable[[], None]:
        """The work, waited for."""

        def call() -> None:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return call

    def seconds(self, variants: dict[str, Callable[[], object]]) -> dict[str, float]:
        return measure({name: self.finished(work) for name, work in variants.items()}, rounds=ROUNDS)

    def floor(self) -> None:
        """FLOP/s of a matmul and bytes/s of a copy, and the FLOP of a window and of a sample."""
        square = torch.randn(self.matmul, self.matmul, device=self.device, dtype=self.dtype)
        block = torch.empty(self.copied, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(block)
        times = self.seconds({"matmul": lambda: square @ square, "copy": lambda: copy.copy_(block)})
        self.found |= {
            "flops_per_s": 2 * self.matmul**3 / times["matmul"],
            "bytes_per_s": 2 * self.copied / times["copy"],
        }
        features = self.eager_encode(self.image(1))
        for name, work in (
            ("encode", partial(self.eager_encode, self.image(1))),
            ("decode", partial(self.eager_decode, features, self.noise(1, 1))),
        ):
            with FlopCounterMode(display=False) as counter:
                work()
            self.found[f"{name} flop"] = counter.get_total_flops()
        self.found["weight bytes"] = sum(p.numel() * p.element_size() for p in self.network.parameters())

    def floor_s(self, part: str, count: int, moved: int) -> float:
        """The least time that `count` windows or samples can take with `moved` bytes in and out."""
        arithmetic_s = self.found[f"{part} flop"] * count / self.found["flops_per_s"]
        return max(arithmetic_s, (self.found["weight bytes"] + moved) / self.found["bytes_per_s"])

    def engines(self, names: Sequence[str], folder: Path) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
        """encode and decode of everything that can be had here; what cannot is recorded with its reason."""
        found: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            "eager": (self.eager_encode, self.eager_decode)
        }
        if "compile" in names:
            found["compile"] = torch.compile(self.eager_encode), torch.compile(self.eager_decode)
        golden = ask(self.source, self.card)
        for name in [name for name in names if name != "compile"]:
            started = time.perf_counter()
            try:
                backend = self.exported(name, golden, folder)
            except Exception as error:  # a vendor's library may fail in any way; the others are still to be measured
                self.found[f"{name} refused"] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            self.found[f"{name} export s"] = time.perf_counter() - started
            self.found[f"{name} parity"] = self.parity(backend, golden)
            found[name] = (backend.encode, backend.decode)
        return found

    def exported(self, name: str, golden: Golden, folder: Path) -> Any:
        """A backend, loaded without the parity gate: random weights would not pass it in half precisions."""
        if name == "tensorrt" and self.device.type != "cuda":
            raise BadOption("TensorRT needs a CUDA GPU")
        place = folder / f"{name}-{self.precision}"
        place.mkdir()
        writer = find_writer(name, self.precision)
        writer.write(self.source, self.card, golden, place, precision=self.precision, device=self.device)
        facts = ExportFacts(name, self.precision, torch.__version__, {}, NOT_MEASURED)
        return open_backend(replace(self.card, export=facts), place, self.device)

    def parity(self, backend: Any, golden: Golden) -> Results | str:
        """Against the same network in float32 on the CPU, with the same noise."""
        logits = backend.decode(backend.encode(golden.image_B3hw), golden.plain.noise_SBL).float().cpu()
        try:
            figures = measure_parity(golden.plain.logits_SBKhw, logits, self.card, height=self.size, width=self.size)
        except ParityFailed as error:
            return str(error)
        return asdict(figures)

    def sweep(self, engines: dict[str, tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
        """Windows per second by B, and samples per second by B and S; the floor's share of the time."""
        item = torch.finfo(self.dtype).bits // 8
        for num_windows in self.windows:
            image = self.image(num_windows)
            self.record("encode", num_windows, f"B={num_windows}", image.numel() * 4, {
                name: partial(encode, image) for name, (encode, _) in engines.items()
            })  # fmt: skip
            for num_samples in self.samples:
                if num_windows * num_samples > MOST:
                    continue
                noise = self.noise(num_samples, num_windows)
                with self.spared(f"decode B={num_windows} S={num_samples}"):
                    features = {name: encode(image) for name, (encode, _) in engines.items()}
                    moved = sum(x.numel() for x in features["eager"]) * item
                    self.record("decode", num_windows * num_samples, f"B={num_windows} S={num_samples}", moved, {
                        name: partial(decode, features[name], noise) for name, (_, decode) in engines.items()
                    })  # fmt: skip

    def record(self, part: str, count: int, sizes: str, moved: int, variants: dict[str, Callable[[], object]]) -> None:
        for name, work in list(variants.items()):
            with self.spared(f"{part} {sizes} {name}"):
                self.finished(work)()
                continue
            del variants[name]
        for name, seconds in self.seconds(variants).items():
            self.found[f"{part} {sizes} {name} per s"] = count / seconds
            self.found[f"{part} {sizes} {name} floor share"] = self.floor_s(part, count, moved) / seconds

    @contextmanager
    def spared(self, what: str) -> Iterator[None]:
        """One failure does not end the run: it is recorded, and memory is freed."""
        try:
            yield
        except Exception as error:
            kind = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error)[:200]}"
            self.found[f"{what} failed"] = kind
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def graphs(self) -> None:
        """A CUDA graph of the eager network against launching its kernels one by one; the bits must be the same."""
        for num_samples in (1, 8):
            image, noise = self.image(1), self.noise(num_samples, 1)

            def work(image: Tensor = image, noise: Tensor = noise) -> Tensor:
                return self.eager_decode(self.eager_encode(image), noise)

            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):  # libraries choose and allocate before the recording
                for _ in range(3):
                    work()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded = work()
            times = self.seconds({"eager": work, "graph": graph.replay})
            self.found[f"graph S={num_samples} speed-up"] = times["eager"] / times["graph"]
            self.found[f"graph S={num_samples} ms"] = 1000 * times["graph"]
            self.found[f"graph S={num_samples} difference"] = float((recorded - work()).abs().max())

    def copies(self) -> None:
        """Pictures to the GPU from pageable and from pinned memory, and copied in a stream of their own."""
        num_windows = self.windows[-1] // 4
        hosts = [torch.randn(num_windows, 3, self.size, self.size) for _ in range(BATCHES)]
        pinned = [host.pin_memory() for host in hosts]
        moved = hosts[0].numel() * 4
        kinds = {"pageable": hosts[0], "pinned": pinned[0]}
        times = self.seconds({kind: partial(host.to, self.device, non_blocking=True) for kind, host in kinds.items()})
        self.found |= {f"copy {name} bytes_per_s": moved / seconds for name, seconds in times.items()}
        times = self.seconds({"in turn": partial(self.in_turn, pinned), "beside": partial(self.beside, pinned)})
        self.found |= {f"windows per s, copies {name}": len(hosts) * num_windows / s for name, s in times.items()}

    def in_turn(self, pinned: list[Tensor]) -> None:
        for host in pinned:
            self.eager_encode(host.to(self.device, non_blocking=True))

    def beside(self, pinned: list[Tensor]) -> None:
        """The next batch is copied while the last one is computed."""
        compute, copier = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        for host in pinned:
            with torch.cuda.stream(copier):
                image = host.to(self.device, non_blocking=True)
            compute.wait_stream(copier)
            image.record_stream(compute)
            self.eager_encode(image)


def _network(config: NpConfig) -> NpNetwork:
    torch.manual_seed(0)
    network = NpNetwork(config).eval().requires_grad_(False)
    network.head.classifier.weight *= 100  # fresh weights give maps without contrast
    return network


def describe(device: torch.device) -> Results:
    if device.type != "cuda":
        return {"device": str(device)}
    facts = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        driver = "unknown"
    return {
        "device": facts.name, "memory GiB": facts.total_memory / 2**30, "multiprocessors": facts.multi_processor_count,
        "compute capability": f"{facts.major}.{facts.minor}", "driver, clock, power": driver,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("bf16", "fp32"), show_default=True)
@click.option("--engine", "names", multiple=True, type=click.Choice(ENGINES), default=ENGINES, show_default=True)
@click.option("--quick", is_flag=True, help="Small shapes, to show that it runs.")
def main(device: str, precisions: tuple[str, ...], names: tuple[str, ...], quick: bool) -> None:
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        return click.echo("there is no CUDA GPU here; nothing is measured")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    results: Results = describe(where)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for precision in precisions:
            bench = Bench(where, precision, quick=quick)
            steps = [bench.floor, lambda bench=bench: bench.sweep(bench.engines(names, Path(folder)))]
            for step in steps + [bench.graphs, bench.copies] * (where.type == "cuda"):
                with bench.spared(getattr(step, "__name__", "step")):
                    step()
                results |= {f"{precision} {name}": value for name, value in bench.found.items()}
                if not quick:
                    save("gpu", results)
    if quick:
        click.echo(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
