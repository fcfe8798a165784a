"""What np_semiseg's linear head costs beside MC dropout and one pass, and what its antithetic pairs are worth; CPU.

    python -m benchmarks.linear ../shared/camvid [--zoo np_linear-lite2-camvid]

Network time, without reading out, of one window of the zoo's networks. Label flips against the mean of 512 samples, on
every 20th frame of val and three seeds, for pairs and for independent draws.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import measure, save
from penumbra.export.golden import noise_of
from penumbra.models.card import InputSpec
from penumbra.models.checkpoint import load_checkpoint, read_card
from penumbra.models.contract import Features, Network
from penumbra.training.augment import normalise
from penumbra.training.data import load_camvid

ZOO, SIZE, ROUNDS = Path(__file__).parents[1] / "models" / "zoo", (360, 480), 9
MANY, FEW, SEEDS, EVERY = 512, (2, 4, 5, 8), (1, 2, 3), 20


def load(path: Path) -> Network:
    network: Network = load_checkpoint(path)[1].to(memory_format=torch.channels_last)
    return network


def labels(network: Network, features: Features, noise_SBL: Tensor) -> Tensor:
    """Labels of the samples' mean probability, at the window's size."""
    samples = network.decode(features, noise_SBL)
    full = (F.interpolate(logits_1Khw, SIZE, mode="bilinear", align_corners=True) for logits_1Khw in samples)
    return sum(logits_1KHW.softmax(1) for logits_1KHW in full)[0].argmax(0)


def flips(network: Network, spec: InputSpec, data: Path) -> dict[str, float]:
    """Percent of labels that are not those of many samples, by law and number of samples."""
    val, found = load_camvid(data, "val"), {}
    for i in range(0, len(val), EVERY):
        features = network.encode(normalise(val[i][0][None].float() / 255, spec))
        limit = labels(network, features, noise_of(network.sampling, num_samples=MANY))
        for law in ("antithetic", "independent"):
            sampling = replace(network.sampling, law=law)  # type: ignore[arg-type]
            for few in FEW:
                answers = [labels(network, features, noise_of(sampling, (seed,), num_samples=few)) for seed in SEEDS]
                found.setdefault(f"{law} S={few}", []).append(np.mean([(a != limit).float().mean() for a in answers]))
    return {f"% of labels flipped against S={MANY}, {name}": 100 * float(np.mean(x)) for name, x in found.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--zoo", default="np_linear-camvid", choices=("np_linear-camvid", "np_linear-lite2-camvid"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = ZOO / f"{arguments.zoo}.safetensors"
    kinds = ("np_linear", "np_semiseg", "mc_dropout")
    linear, film, dropout = (load(path.with_name(path.name.replace("np_linear", kind))) for kind in kinds)
    image = torch.randn(1, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    asked = {"linear, S=5": (linear, 5), "linear, S=8": (linear, 8), "MC dropout, S=5": (dropout, 5)}
    asked |= {"MC dropout, S=8": (dropout, 8), "film, S=1": (film, 1), "film, S=8": (film, 8)}
    noises = {name: noise_of(network.sampling, num_samples=few) for name, (network, few) in asked.items()}
    seconds = measure(
        {name: lambda name=name, network=network: network(image, noises[name]) for name, (network, _) in asked.items()},  # type: ignore[misc]
        rounds=ROUNDS,
    )
    save(arguments.zoo.replace("np_linear", "linear").removesuffix("-camvid"), {
        **{f"seconds/{name}": value for name, value in seconds.items()},
        "S=5 over MC dropout's (bar 0.6)": seconds["linear, S=5"] / seconds["MC dropout, S=5"],
        "S=8 over MC dropout's": seconds["linear, S=8"] / seconds["MC dropout, S=8"],
        "S=5 over one pass of the host (bar 1.15)": seconds["linear, S=5"] / seconds["film, S=1"],
        **flips(linear, read_card(path).input, arguments.data),
    })  # fmt: skip


if __name__ == "__main__":
    main()
