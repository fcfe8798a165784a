"""Every published network at 512x512 on this CPU: parameters, encode, decode per sample, split over plain, memory.

    python -m benchmarks.methods [NAME...]

Weights are random: speed does not depend on them. Each network runs in a process of its own, whose growth from the
built network to its end is its peak memory. "split over plain" is encode + decode of S = 1 (or of the fixed members)
over one undivided forward pass of the same network; both take turns, and the median of their ratios counts.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.rounds import forget_peak, peak_memory, save, take_turns
from benchmarks.sampling import decode_plain
from penumbra.models import find_method
from penumbra.models.contract import Network, Prompt
from penumbra.models.cpal.config import CpalConfig, deeplabv2, sipe, wrn38
from penumbra.models.cps.net import CpsConfig
from penumbra.models.np_semiseg.heads import PublishedHead
from penumbra.models.np_semiseg.net import NpNetwork, augseg, u2pl
from penumbra.models.proto_seg.net import ProtoConfig
from penumbra.models.self_correcting.net import SelfCorrectingConfig

SIZE, ROUNDS = 512, 5
NETWORKS: dict[str, Any] = {
    "np_semiseg U2PL R50": u2pl(21),
    "np_semiseg U2PL R50, MC dropout": replace(u2pl(21), sampling="dropout"),
    "np_semiseg AugSeg R50": augseg(21),
    "cps R50, both branches": CpsConfig(21),
    "cps R50, branch1": CpsConfig(21, branches=1),
    "proto_seg HRNet-W48": ProtoConfig(19),
    "proto_seg HRNet-W48, MC dropout": ProtoConfig(19, sampling="dropout"),
    "proto_seg HRNet-W48 parametric": ProtoConfig(19, head="parametric"),
    "self_correcting R101, primary": SelfCorrectingConfig(21),
    "self_correcting R101, with boxes": SelfCorrectingConfig(21, correction="convolutional"),
    "cpal SIPE R50, one scale": CpalConfig(21, flip=True),
    "cpal SIPE R50, four scales": sipe(21),
    "cpal PACAM R50": CpalConfig(21, flip=True, members=("cam", "pacam"), context=10),
    "cpal DeepLabV2-R101-MSC": deeplabv2(21),
    "cpal DeepLabV1-WRN38": wrn38(21),
}


def plain_forward(network: Network, image: torch.Tensor, noise_SBL: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    """From image to logits in one go; for NP-SemiSeg as released, with nothing shared between samples."""
    if isinstance(network, NpNetwork) and isinstance(network.head, PublishedHead) and network.sampling.kind == "latent":
        return decode_plain(network.head, network.host(image), noise_SBL)
    if prompt:
        return network.decode(network.take_prompt(image, network.encode(image), prompt), noise_SBL)
    return network(image, noise_SBL)


@torch.inference_mode()
def measure_one(name: str) -> dict[str, float]:
    """In this process: one network's figures."""
    torch.manual_seed(0)
    config = NETWORKS[name]
    network: Network = find_method(name.split()[0]).build(config).eval()
    network = network.requires_grad_(False).to(memory_format=torch.channels_last)
    num_samples = max(len(network.sampling.members), 1)
    image = torch.randn(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    prompt: Prompt = ()
    if name.endswith("with boxes"):
        prompt, num_samples = (torch.ones(1, config.num_classes, SIZE, SIZE),), len(network.prompt.members)
    noise_SBL = torch.ones(num_samples, 1, network.sampling.noise_length)
    before = forget_peak()

    def encode() -> Any:
        features = network.encode(image)
        return network.take_prompt(image, features, prompt) if prompt else features

    features = encode()
    network.decode(features, noise_SBL)
    peak = peak_memory()
    seconds = take_turns({
        "encode": encode, "decode": lambda: network.decode(features, noise_SBL),
        "plain": lambda: plain_forward(network, image, noise_SBL, prompt),
    }, rounds=ROUNDS).values()  # fmt: skip
    encodes, decodes, plains = map(statistics.median, seconds)
    return {
        "parameters, M": sum(p.numel() for p in network.parameters()) / 1e6,
        "encode, ms": 1e3 * encodes,
        "decode, ms per sample": 1e3 * decodes / num_samples,
        "plain forward, ms": 1e3 * plains,
        "split over plain (bar 1.05)": statistics.median((e + d) / p for e, d, p in zip(*seconds, strict=True)),
        "peak memory, MB": (peak - before) / 2**20,
    }


def main() -> None:
    names = sys.argv[1:] or list(NETWORKS)
    if len(sys.argv) == 3 and sys.argv[2] == "--here":
        print(json.dumps(measure_one(sys.argv[1])))
        return
    for name in names:
        command = [sys.executable, "-m", "benchmarks.methods", name, "--here"]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        save("methods", {name: figures}, keep=True)


if __name__ == "__main__":
    main()
