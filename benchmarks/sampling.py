"""What T samples cost: full passes, encoder once, the exact split, and our own head; ResNet-50, 512x512, CPU.

    python -m benchmarks.sampling

The published NP-SemiSeg net on its U2PL host with 21 classes and random weights: speed does not depend on them.
Peak memory is the growth of the process' resident set while decoding T samples in chunks of one.
"""

import resource
from dataclasses import replace

import torch

from benchmarks.rounds import measure, save
from models.card import Readout
from models.np_semiseg.heads import PublishedHead
from models.np_semiseg.net import NpConfig, NpNetwork, u2pl
from serving.engine.allocator import keep_freed_memory
from serving.engine.moments import accumulate, empty_sums

SIZE, CLASSES, ROUNDS = 512, 21, 3


def build(config: NpConfig) -> NpNetwork:
    torch.manual_seed(0)
    return NpNetwork(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def decode_all(network: NpNetwork, image: torch.Tensor, noise: torch.Tensor, *, moments: bool = False) -> None:
    """Encode once, decode sample by sample as the runtime does on a CPU, optionally with the moments."""
    features = network.encode(image)
    sums = empty_sums(CLASSES, SIZE, SIZE)
    for noise_1BL in noise.split(1):
        logits = network.decode(features, noise_1BL)
        if moments:
            accumulate(logits[:, 0], *sums, readout=Readout(), spread=map)


def decode_plainly(network: NpNetwork, image: torch.Tensor, noise: torch.Tensor) -> None:
    assert isinstance(network.head, PublishedHead)
    network.head.decode_plain(network.host(image), noise)


@torch.inference_mode()
def main() -> None:
    keep_freed_memory()
    published = build(u2pl(CLASSES))
    own = build(replace(u2pl(CLASSES), head="film"))
    image = torch.randn(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(20, 1, 32)
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
    peaks = []
    for samples in (1, 20, 60):
        decode_all(published, image, noise.repeat(3, 1, 1)[:samples], moments=True)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    save("sampling", {
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "T=5 split over five full passes (bar 0.38)": seconds["split_5"] / (5 * seconds["full_1"]),
        "T=5 split over encoder once": seconds["split_5"] / seconds["once_5"],
        "T=20 over T=1, published head (bar 4.0)": seconds["split_20"] / seconds["split_1"],
        "T=20 over T=1, own head (bar 1.3)": seconds["own_20"] / seconds["own_1"],
        "T=20 over T=1, own head with moments (bar 2.2)": seconds["own_20_moments"] / seconds["own_1_moments"],
        "peak MB after T=1, T=20, T=60": [round(p) for p in peaks],
    })  # fmt: skip


if __name__ == "__main__":
    main()
