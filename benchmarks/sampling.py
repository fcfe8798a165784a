"""What T samples cost: full passes, encoder once, the exact split, and our own head; ResNet-50, 512x512, CPU.

    python -m benchmarks.sampling

The published NP-SemiSeg net on its U2PL host with 21 classes and random weights: speed does not depend on them.
Peak memory is the most that the process holds while it decodes T samples in chunks of one, before anything else runs.
The paper's claim that its samples cost less than MC dropout's is measured through the serving engine, on one host with
one dropout site.
"""

import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import forget_peak, measure, peak_memory, save
from penumbra.export.bundle import export_network
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.np_semiseg.heads import NORM_EPS, PublishedHead
from penumbra.models.np_semiseg.net import NpConfig, NpNetwork, u2pl
from penumbra.serving.engine import operators
from penumbra.serving.engine.allocator import keep_freed_memory
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter

SIZE, CLASSES, ROUNDS = 512, 21, 3


def build(config: NpConfig) -> NpNetwork:
    torch.manual_seed(0)
    return NpNetwork(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def decode_all(network: NpNetwork, image: torch.Tensor, noise: torch.Tensor, *, moments: bool = False) -> None:
    """Encode once, decode sample by sample as the runtime does on a CPU, optionally with the moments."""
    features = network.encode(image)
    stats_BhCw = torch.empty(1, image.shape[2], CLASSES + 1, image.shape[3])
    for s, noise_1BL in enumerate(noise.split(1)):
        logits = network.decode(features, noise_1BL)
        if moments:
            operators.accumulate(logits, stats_BhCw, Readout(), first=s == 0)


def decode_plain(head: PublishedHead, x_BDhw: Tensor, noise_SBL: Tensor) -> Tensor:
    """Decode in the released form, sample by sample, nothing shared: the oracle for encode and decode."""
    mean_BL, sigma_BL, context_BL = head.latent(x_BDhw)
    size = (-1, -1, x_BDhw.shape[2], x_BDhw.shape[3])
    context = context_BL[:, :, None, None].expand(size)
    logits = []
    for noise_BL in noise_SBL:
        z = (mean_BL + sigma_BL * noise_BL)[:, :, None, None].expand(size)
        y = F.relu(F.instance_norm(head.conv1(torch.cat((z, x_BDhw, context), dim=1)), eps=NORM_EPS))
        y = F.relu(F.instance_norm(head.conv2(y), eps=NORM_EPS))
        logits.append(head.classifier(y))
    return torch.stack(logits)


def decode_plainly(network: NpNetwork, image: torch.Tensor, noise: torch.Tensor) -> None:
    assert isinstance(network.head, PublishedHead)
    decode_plain(network.head, network.host(image), noise)


def peak_mb(network: NpNetwork, image: torch.Tensor, noise: torch.Tensor) -> int:
    forget_peak()
    decode_all(network, image, noise, moments=True)
    return round(peak_memory() / 2**20)


def engine_seconds(configs: dict[str, NpConfig], num_samples: int) -> dict[str, float]:
    """Median seconds of one 512x512 image with T samples through the serving engine, by name of the model."""
    image = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    classes = tuple(ClassInfo(f"class {k}", (k, k, k)) for k in range(CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            network = build(config)
            network.head.classifier.weight *= 100  # fresh weights give a map without contrast, which the gate refuses
            card = Card(
                name, 1, "np_semiseg", asdict(config), classes, InputSpec(), WindowSpec(SIZE, SIZE),
                network.sampling, Readout(),
            )  # fmt: skip
            export_network(network, card, Path(folder))
        with Segmenter.open(Path(folder), device="cpu", tuning=Tuning(1, 1)) as segmenter:
            ask = {name: SegmentOptions(name, samples=num_samples) for name in configs}
            asked = {name: partial(segmenter.segment, image, options) for name, options in ask.items()}
            return measure(asked, rounds=ROUNDS)  # type: ignore[arg-type]


@torch.inference_mode()
def main() -> None:
    keep_freed_memory()
    published = build(u2pl(CLASSES))
    own = build(replace(u2pl(CLASSES), head="film"))
    image = torch.randn(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(20, 1, 32)
    peaks = [peak_mb(published, image, noise.repeat(3, 1, 1)[:samples]) for samples in (1, 20, 60)]
    seconds = measure(
        {
            "full_1": lambda: decode_plainly(published, image, noise[:1]),
            "once_5": lambda: decode_plainly(published, image, noise[:5]),
            "split_1": lambda: decode_all(published, image, noise[:1]),
            "split_5": lambda: decode_all(published, image, noise[:5]),
            "split_20": lambda: decode_all(published, image, noise),
            "encode": lambda: published.encode(image),
            "own_1": lambda: decode_all(own, image, noise[:1]),
            "own_20": lambda: decode_all(own, image, noise),
            "own_1_moments": lambda: decode_all(own, image, noise[:1], moments=True),
            "own_20_moments": lambda: decode_all(own, image, noise, moments=True),
        },
        rounds=ROUNDS,
    )
    dropout = replace(u2pl(CLASSES), sampling="dropout")
    served = engine_seconds({
        "latent": u2pl(CLASSES), "latent-own": replace(u2pl(CLASSES), head="film"),
        "dropout": dropout, "dropout-own": replace(dropout, head="film"),
    }, 5)  # fmt: skip
    save("sampling", {
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "T=5 split over five full passes (bar 0.38)": seconds["split_5"] / (5 * seconds["full_1"]),
        "T=5 split over encoder once": seconds["split_5"] / seconds["once_5"],
        "T=20 over T=1, published head (bar 4.0)": seconds["split_20"] / seconds["split_1"],
        "T=20 over T=1, own head (bar 1.3)": seconds["own_20"] / seconds["own_1"],
        "T=20 over T=1, own head with moments (bar 2.2)": seconds["own_20_moments"] / seconds["own_1_moments"],
        **{f"seconds/served T=5 {name}": value for name, value in served.items()},
        "served T=5: latent over MC dropout, published head (bar 0.33)": served["latent"] / served["dropout"],
        "served T=5: latent over MC dropout, own head (bar 0.33)": served["latent-own"] / served["dropout-own"],
        "served T=5 latent, published head, over five full passes": served["latent"] / (5 * seconds["full_1"]),
        "peak MB in T=1, T=20, T=60": peaks,
    })  # fmt: skip


if __name__ == "__main__":
    main()
