"""The NP-SemiSeg network: a DeepLabv3+ host, whose classifier is a neural process.

Published layout (hosts U2PL and AugSeg, Wang et al. 2023): `head="published"`. Our own layout, in which the
latent enters late and cannot be normalised away: `head="film"` (see `models.np_semiseg.heads`).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks.layers import conv_norm_act, convolve_pooled, resize_like
from models.blocks.resnet import ResNet, ResNetConfig
from models.card import Sampling
from models.contract import Features, Network
from models.np_semiseg.heads import FilmHead, PublishedHead


@dataclass(frozen=True, slots=True)
class NpConfig:
    """Shape of host and head. `u2pl` and `augseg` give the published hosts.

    fuse_kernel: of the convolution behind the joined ASPP branches. hidden: channels of the head's
    convolutions. film_channels: channels in which the film head's latent acts.
    """

    num_classes: int
    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    aspp_channels: int = 256
    aspp_rates: tuple[int, int, int] = (6, 12, 18)
    fuse_kernel: Literal[1, 3] = 1
    low_channels: int = 48
    head: Literal["published", "film"] = "film"
    latent_length: int = 32
    hidden: int = 256
    film_channels: int = 64


def u2pl(num_classes: int, depth: Literal[50, 101] = 50) -> NpConfig:
    """The published net on its U2PL host: output stride 8, rates 12/24/36, 512 decoder channels."""
    backbone = ResNetConfig(depth=depth, output_stride=8, ceil_pool=True)
    return NpConfig(num_classes, backbone, aspp_rates=(12, 24, 36), fuse_kernel=3, low_channels=256, head="published")


def augseg(num_classes: int, depth: Literal[50, 101] = 50) -> NpConfig:
    """The published net on its AugSeg host: output stride 16, rates 6/12/18, 304 decoder channels."""
    backbone = ResNetConfig(depth=depth, output_stride=16, ceil_pool=True)
    return NpConfig(num_classes, backbone, head="published")


class NpNetwork(Network):
    """encode runs host, aggregators and the sample-independent part of the head; decode draws from the latent.

    noise_SBL is standard normal, L = latent_length: one draw per sample and image.
    """

    def __init__(self, config: NpConfig) -> None:
        super().__init__()
        self.sampling = Sampling(kind="latent", noise_length=config.latent_length, default_samples=8)
        self.encoder = ResNet(config.backbone)
        self.aspp = Aspp(config.backbone.high_channels, config.aspp_channels, config.aspp_rates)
        joined = config.aspp_channels * (len(config.aspp_rates) + 2)
        self.fuse = conv_norm_act(joined, config.aspp_channels, config.fuse_kernel)
        self.low = conv_norm_act(config.backbone.low_channels, config.low_channels, 1, bias=True)
        head = PublishedHead if config.head == "published" else FilmHead
        self.head = head(config, channels=config.low_channels + config.aspp_channels)

    def host(self, image_B3hw: Tensor) -> Tensor:
        """The host's decoder feature x_BDhw at stride 4: low-level channels first, then the ASPP's."""
        low, high = self.encoder(image_B3hw)
        low = self.low(low)
        return torch.cat((low, resize_like(self.fuse(self.aspp(high)), low)), dim=1)

    def encode(self, image_B3hw: Tensor) -> Features:
        return self.head.encode(self.host(image_B3hw))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.head.decode(features, noise_SBL)


class Aspp(nn.Module):
    """Atrous spatial pyramid as in U2PL and AugSeg: the pooled branch first, every branch normalised alone."""

    def __init__(self, channels: int, out_channels: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.pool = conv_norm_act(channels, out_channels, 1)
        branches = [conv_norm_act(channels, out_channels, 1)]
        branches += [conv_norm_act(channels, out_channels, 3, dilation=rate) for rate in rates]
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, activate = self.pool
        pooled = activate(norm(convolve_pooled(x.mean((2, 3), keepdim=True), conv)))
        pooled = pooled.expand(-1, -1, x.shape[2], x.shape[3])
        return torch.cat([pooled] + [branch(x) for branch in self.branches], dim=1)
