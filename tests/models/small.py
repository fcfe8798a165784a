"""A small configuration of every network, with weights from a fixed seed."""

import copy
import warnings
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from penumbra.models import find_method
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import InputSpec, Readout
from penumbra.models.contract import Network, Prompt
from penumbra.models.cpal.config import CpalConfig
from penumbra.models.cps.net import CpsConfig
from penumbra.models.ensemble.net import EnsembleConfig, MemberConfig
from penumbra.models.np_semiseg.net import NpConfig
from penumbra.models.proto_seg.deeplab import DeepLabConfig
from penumbra.models.proto_seg.hrnet import HrnetConfig
from penumbra.models.proto_seg.net import ProtoConfig
from penumbra.models.self_correcting.net import SelfCorrectingConfig
from penumbra.models.toy.net import ToyConfig

BACKBONE = ResNetConfig(depth=18, width=8)
SELF_CORRECTING = SelfCorrectingConfig(
    3, ResNetConfig(depth=18, stem="plain", width=4, output_stride=8, dilation="rest"),
    aspp_channels=8, low_channels=8, decoder_channels=8, correction_hidden=8,
)  # fmt: skip
HRNET = HrnetConfig(width=2, stem=4, bottlenecks=1, modules=(1, 1, 1), blocks=1)
PUBLISHED = NpConfig(3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, head="published")
SMALL_CPS = CpsConfig(3, backbone=BACKBONE, aspp_channels=16, low_channels=8, decoder_channels=16)
SMALL: dict[str, Any] = {
    "toy": ToyConfig(),
    "toy latent": ToyConfig(form="latent"),
    "toy dropout": ToyConfig(form="dropout"),
    "toy opposed": ToyConfig(form="opposed"),
    "toy boxed": ToyConfig(form="boxed"),
    "toy tagged": ToyConfig(form="tagged"),
    "toy bright": ToyConfig(form="bright"),
    "cps": SMALL_CPS,
    "cps single": replace(SMALL_CPS, branches=1),
    "np_semiseg film": NpConfig(
        3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, film_channels=16
    ),
    "np_semiseg published": PUBLISHED,
    "np_semiseg dropout": replace(PUBLISHED, dropout=0.1, sampling="dropout"),
    "ensemble": EnsembleConfig(
        3,
        InputSpec(),
        (
            MemberConfig("cps", "cps", asdict(SMALL_CPS), InputSpec(), Readout()),
            MemberConfig("np", "np_semiseg", asdict(PUBLISHED), InputSpec(order="BGR"), Readout(temperature=2.0)),
        ),
    ),
    "self_correcting primary": replace(SELF_CORRECTING, ancillary=False, correction="none"),
    "self_correcting ancillary": replace(SELF_CORRECTING, correction="none"),
    "self_correcting linear": SELF_CORRECTING,
    "self_correcting convolutional": replace(SELF_CORRECTING, correction="convolutional"),
    "self_correcting dropout": replace(SELF_CORRECTING, sampling="dropout"),
    "proto_seg prototype": ProtoConfig(3, num_prototypes=4, hrnet=HRNET),
    "proto_seg channel": ProtoConfig(3, num_prototypes=4, normalise="channel", hrnet=HRNET),
    "proto_seg dropout": ProtoConfig(3, num_prototypes=4, sampling="dropout", hrnet=HRNET),
    "proto_seg deeplab": ProtoConfig(3, "parametric", trunk="deeplab", deeplab=DeepLabConfig(50, width=2, channels=8)),
    "proto_seg parametric": ProtoConfig(3, head="parametric", hrnet=HRNET),
    "proto_seg parametric-dropout": ProtoConfig(3, head="parametric", sampling="dropout", hrnet=HRNET),
    "cpal cam": CpalConfig(3, depth=18, width=4),
    "cpal scales": CpalConfig(3, depth=18, width=4, scales=(1.0, 0.5, 1.5), flip=True, members=("is_cam",)),
    "cpal context": CpalConfig(
        3, depth=18, width=4, flip=True, members=("cam", "pacam"), context=4, context_channels=8, neighbours=2
    ),
    "cpal everywhere": CpalConfig(
        3, depth=18, width=4, members=("cam", "pacam"), background=False, context=4, context_channels=8, neighbours=2
    ),
    "cpal deeplabv2": CpalConfig(3, "deeplabv2", width=2, scales=(1.0, 0.5, 0.75), members=("max",)),
    "cpal deeplabv2-scales": CpalConfig(3, "deeplabv2", width=2, scales=(1.0, 0.5), members=("scale1", "scale0.5")),
    "cpal wrn38": CpalConfig(3, "wrn38", width=1, members=("logits",)),
    "cpal wrn38-dropout": CpalConfig(3, "wrn38", width=1, members=("logits",), sampling="dropout"),
}
"""Configurations by name; the first word is the method's."""


def fresh(name: str, *, seed: int = 0) -> Network:
    """The small network of that name in train mode as it is made, but for class centres, which are drawn: at zero the
    latent sees nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find_method(name.split()[0]).build(SMALL[name])
        for key, buffer in network.named_buffers():
            if key.endswith("_centres"):
                nn.init.normal_(buffer)
    return network.train()


def seeded(name: str, *, seed: int = 0) -> Network:
    """The same in eval mode, with normalisations that have the statistics of noise: else activations fade. It is the
    caller's own.
    """
    return copy.deepcopy(_calibrated(name, seed))


@cache
def _calibrated(name: str, seed: int) -> Network:
    with torch.inference_mode(False), torch.random.fork_rng(), torch.no_grad():
        network = fresh(name, seed=seed)
        torch.manual_seed(seed)
        calibrate(network)
    return network.eval()


def calibrate(network: Network) -> None:
    """Give every BatchNorm the mean and variance of a batch of noise."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    sampling = network.sampling
    image_B3hw = torch.randn(4, 3, 96, 96)
    features = network.encode(image_B3hw)
    network.decode(features, torch.ones(max(len(sampling.members), 1), 4, sampling.noise_length))
    if network.prompt.kind == "boxes":
        network.take_prompt(image_B3hw, features, (torch.ones(4, 3, 96, 96), torch.ones(4)))
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()  # checkpoints do not store it


def traced(network: Network, image_B3hw: Tensor, noise_SBL: Tensor, prompt: Prompt = ()) -> Any:
    """encode, decode and, with a prompt, take_prompt as TorchScript, traced with these examples alone."""
    features = network.encode(image_B3hw)
    calls: dict[str, Any] = {"encode": (image_B3hw,), "decode": (features, noise_SBL)}
    if prompt:
        calls["take_prompt"] = (image_B3hw, features, prompt)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace_module(network, calls, check_trace=False)
