"""The CPS network: independent DeepLabv3+ branches of equal shape; their disagreement is the uncertainty.

The published evaluation uses branch1 alone (`branches=1`); both branches make two members.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.deeplab import DeepLab, DeepLabConfig
from penumbra.models.blocks.layers import convolve_pooled
from penumbra.models.card import Sampling
from penumbra.models.contract import Features, Network


@dataclass(frozen=True, slots=True)
class CpsConfig(DeepLabConfig):
    """Shape of the branches. The defaults are the published ResNet-50 net (81 M parameters in two branches)."""

    branches: int = 2


class CpsNetwork(Network):
    """encode runs every branch to its stride-4 logits; decode stacks them as members."""

    def __init__(self, config: CpsConfig) -> None:
        super().__init__()
        names = tuple(f"branch{i + 1}" for i in range(config.branches))
        kind: Literal["members", "single"] = "members" if len(names) > 1 else "single"
        self.sampling = Sampling(kind=kind, members=names, default_samples=len(names))
        for name in names:
            self.add_module(name, DeepLab(config, Aspp, align_corners=True))
        self.names = names

    def encode(self, image_B3hw: Tensor) -> Features:
        return tuple(self.get_submodule(name)(image_B3hw) for name in self.names)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return torch.stack(features)


class Aspp(nn.Module):
    """Atrous spatial pyramid as in CPS: one BatchNorm over the joined branches, the pooled branch is added.

    LeakyReLU slope 0.01; no dropout anywhere in this network.
    """

    def __init__(self, channels: int, out_channels: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, out_channels, 1, bias=False)]
        convs += [nn.Conv2d(channels, out_channels, 3, padding=r, dilation=r, bias=False) for r in rates]
        self.map_convs = nn.ModuleList(convs)
        self.map_bn = nn.BatchNorm2d(out_channels * len(convs))
        self.red_conv = nn.Conv2d(out_channels * len(convs), out_channels, 1, bias=False)
        self.global_pooling_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.global_pooling_bn = nn.BatchNorm2d(out_channels)
        self.pool_red_conv = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.red_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([conv(x) for conv in self.map_convs], dim=1)
        local = self.red_conv(F.leaky_relu(self.map_bn(joined), 0.01))
        pooled = convolve_pooled(x.mean((2, 3), keepdim=True), self.global_pooling_conv)
        pooled = F.leaky_relu(self.global_pooling_bn(pooled), 0.01)
        pooled = convolve_pooled(pooled, self.pool_red_conv)
        return F.leaky_relu(self.red_bn(local + pooled), 0.01)
