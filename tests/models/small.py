"""A small configuration of every network, with weights from a fixed seed."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models import find_method
from models.blocks.resnet import ResNetConfig
from models.contract import Network
from models.cps.net import CpsConfig
from models.np_semiseg.net import NpConfig
from models.proto_seg.hrnet import HrnetConfig
from models.proto_seg.net import ProtoConfig
from models.self_correcting.net import SelfCorrectingConfig
from models.toy.net import ToyConfig

BACKBONE = ResNetConfig(depth=18, width=8)
SELF_CORRECTING = SelfCorrectingConfig(
    3, ResNetConfig(depth=18, stem="plain", width=4, output_stride=8, dilation="rest"),
    aspp_channels=8, low_channels=8, decoder_channels=8, correction_hidden=8,
)  # fmt: skip
HRNET = HrnetConfig(width=2, stem=4, bottlenecks=1, modules=(1, 1, 1), blocks=1)
SMALL: dict[str, Any] = {
    "toy": ToyConfig(),
    "toy latent": ToyConfig(form="latent"),
    "toy opposed": ToyConfig(form="opposed"),
    "cps": CpsConfig(3, backbone=BACKBONE, aspp_channels=16, low_channels=8, decoder_channels=16),
    "cps single": CpsConfig(3, 1, backbone=BACKBONE, aspp_channels=16, low_channels=8, decoder_channels=16),
    "np_semiseg film": NpConfig(
        3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, film_channels=16
    ),
    "np_semiseg published": NpConfig(
        3, BACKBONE, aspp_channels=16, low_channels=8, latent_length=8, hidden=16, head="published"
    ),
    "self_correcting primary": replace(SELF_CORRECTING, ancillary=False, correction="none"),
    "self_correcting ancillary": replace(SELF_CORRECTING, correction="none"),
    "self_correcting linear": SELF_CORRECTING,
    "self_correcting convolutional": replace(SELF_CORRECTING, correction="convolutional"),
    "self_correcting dropout": replace(SELF_CORRECTING, sampling="dropout"),
    "proto_seg prototype": ProtoConfig(3, num_prototypes=4, hrnet=HRNET),
    "proto_seg channel": ProtoConfig(3, num_prototypes=4, normalise="channel", hrnet=HRNET),
    "proto_seg dropout": ProtoConfig(3, num_prototypes=4, sampling="dropout", hrnet=HRNET),
    "proto_seg parametric": ProtoConfig(3, head="parametric", hrnet=HRNET),
    "proto_seg parametric-dropout": ProtoConfig(3, head="parametric", sampling="dropout", hrnet=HRNET),
}
"""Configurations by name; the first word is the method's."""


def seeded(name: str, *, seed: int = 0) -> Network:
    """The small network of that name in eval mode. Class centres are drawn too: at zero the latent sees nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = find_method(name.split()[0]).build(SMALL[name]).eval()
        for key, buffer in network.named_buffers():
            if key.endswith("_centres"):
                nn.init.normal_(buffer)
    return network
