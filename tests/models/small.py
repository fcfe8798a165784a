"""A small configuration of every network, with weights from a fixed seed."""

from typing import Any

import torch
from torch import nn

from models import find_method
from models.blocks.resnet import ResNetConfig
from models.contract import Network
from models.cps.net import CpsConfig
from models.np_semiseg.net import NpConfig
from models.toy.net import ToyConfig

BACKBONE = ResNetConfig(depth=18, width=8)
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
