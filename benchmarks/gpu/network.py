"""What is measured: the published NP-SemiSeg net on its U2PL host, ResNet-50, 512x512, 21 classes, and its floor.

Weights are random: speed does not depend on them, but the accuracy of half precisions does, so the export's gate is
measured and not held (tests/gpu/test_formats.py holds it on trained networks). The floor of a call is what its
multiplications take at the rate of a large matrix product, or its weights, input and output at the rate of a copy,
whichever is longer; both rates are measured in the same run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.sheet import Sheet
from benchmarks.rounds import measure
from penumbra.export.bundle import export_network
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.contract import Features
from penumbra.models.np_semiseg.net import NpConfig, NpNetwork, u2pl
from penumbra.serving.engine.backends import DTYPES
from tests.models.small import PUBLISHED, calibrate

ROUNDS, WARM = 5, 3
SPELL_S = 0.03
"""A variant is run over and over for so long before it is waited for: starting and waiting are not what is measured."""
SIZE, QUICK_SIZE = 512, 64
CLASSES = 21


@dataclass(frozen=True)
class Rates:
    """What the device does at best, measured: FLOP/s of a matrix product and bytes/s of a copy, read and written."""

    flops_per_s: float
    bytes_per_s: float


class Subject:
    """A subject is the network of one configuration in one precision on the sheet's device.

    head: `published`, or `film`, our own.
    """

    def __init__(self, sheet: Sheet, precision: str, *, head: str = "published") -> None:
        self.device, self.precision, self.dtype = sheet.device, precision, DTYPES[precision]
        self.size = QUICK_SIZE if sheet.quick else SIZE
        config: NpConfig = replace(PUBLISHED if sheet.quick else u2pl(CLASSES), head=head)  # type: ignore[arg-type]
        self.length = config.latent_length
        self.source = build(config)
        self.network = build(config).to(self.device, self.dtype).to(memory_format=torch.channels_last)
        classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(config.num_classes))
        self.card = Card(
            f"np-{head}", 1, "np_semiseg", asdict(config), classes, InputSpec(), WindowSpec(self.size, self.size),
            self.network.sampling, Readout(),
        )  # fmt: skip

    def image(self, num_windows: int) -> Tensor:
        return torch.randn(num_windows, 3, self.size, self.size, device=self.device)

    def noise(self, num_samples: int, num_windows: int) -> Tensor:
        return torch.randn(num_samples, num_windows, self.length, device=self.device)

    def encode(self, image_B3hw: Tensor) -> Features:
        return self.network.encode(image_B3hw.to(self.dtype, memory_format=torch.channels_last))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.network.decode(features, noise_SBL.to(self.dtype))

    def export(self, store: Path, *, backend: str = "torchscript") -> Path:
        """Write an artifact whose gate is measured and not held: random weights in half precision do not pass it."""
        with patch("penumbra.export.bundle.check_parity"):
            return export_network(
                self.source, self.card, store, backend=backend, precision=self.precision, device=str(self.device)
            )

    @cached_property
    def flop(self) -> dict[str, int]:
        """Count the FLOP of one window and of one sample."""
        counted = {}
        image, noise = self.image(1), self.noise(1, 1)
        features = self.encode(image)
        for part, work in (("encode", lambda: self.encode(image)), ("decode", lambda: self.decode(features, noise))):
            with FlopCounterMode(display=False) as counter:
                work()
            counted[part] = counter.get_total_flops()
        return counted

    def floor_s(self, part: str, count: int, moved: int, rates: Rates) -> float:
        """The least time that `count` windows or samples can take with `moved` bytes in and out."""
        weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
        return max(self.flop[part] * count / rates.flops_per_s, (weights + moved) / rates.bytes_per_s)


def build(config: NpConfig) -> NpNetwork:
    """Make a network whose activations neither fade nor grow, and whose maps have contrast."""
    torch.manual_seed(0)
    network = NpNetwork(config)
    with torch.no_grad():
        calibrate(network)
    network = network.eval().requires_grad_(False)
    network.head.classifier.weight *= 10
    return network


def seconds(sheet: Sheet, variants: dict[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of one run of each variant, which take turns; a turn lasts SPELL_S at least."""
    device, rounds = sheet.device, 1 if sheet.quick else rounds
    counts = {}
    for name, work in variants.items():
        for _ in range(1 if sheet.quick else WARM):
            work()
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        counts[name] = max(1, int(SPELL_S * (not sheet.quick) / (time.perf_counter() - started)))

    def spell(name: str) -> None:
        for _ in range(counts[name]):
            variants[name]()
        wait(device)

    taken = measure({name: lambda name=name: spell(name) for name in variants}, rounds=rounds)  # type: ignore[misc]
    return {name: taken[name] / counts[name] for name in variants}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(sheet: Sheet, dtype: torch.dtype) -> Rates:
    """Measure a matrix product on random data and a copy of a gigabyte, and note both."""
    side, num_bytes = (256, 2**20) if sheet.quick else (8192, 2**30)
    one, other = torch.randn(2, side, side, device=sheet.device, dtype=dtype)
    block = torch.empty(num_bytes, dtype=torch.uint8, device=sheet.device)
    copy = torch.empty_like(block)
    taken = seconds(sheet, {"product": lambda: one @ other, "copy": lambda: copy.copy_(block)})
    found = Rates(2 * side**3 / taken["product"], 2 * num_bytes / taken["copy"])
    sheet.put("matrix product, TFLOP/s", found.flops_per_s / 1e12)
    sheet.put("copy, TB/s", found.bytes_per_s / 1e12)
    return found
