"""DeepLabv3's atrous spatial pyramid (Chen et al. 2017), and DeepLabv3+, which decodes it at stride 4 (2018)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from penumbra.models.blocks.backbone import BackboneConfig, build_backbone
from penumbra.models.blocks.layers import conv_norm_act, convolve_pooled, resize_like
from penumbra.models.blocks.resnet import ResNetConfig


class Aspp(nn.Module):
    """x_BDhw -> [B, out_channels, h, w]: every branch normalised alone, the pooled one last, a projection of all."""

    def __init__(self, channels: int, out_channels: int, rates: tuple[int, ...], *, project_kernel: int = 1) -> None:
        super().__init__()
        self.branches = atrous_branches(channels, out_channels, rates)
        self.pool = conv_norm_act(channels, out_channels, 1)
        self.project = conv_norm_act(out_channels * (len(rates) + 2), out_channels, project_kernel)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        pooled_BDhw = pool_everywhere(self.pool, x_BDhw)
        return self.project(torch.cat([branch(x_BDhw) for branch in self.branches] + [pooled_BDhw], dim=1))


def atrous_branches(channels: int, out_channels: int, rates: tuple[int, ...]) -> nn.ModuleList:
    """Build a 1x1 convolution, and a dilated 3x3 convolution of every rate."""
    branches = [conv_norm_act(channels, out_channels, 1)]
    branches += [conv_norm_act(channels, out_channels, 3, dilation=rate) for rate in rates]
    return nn.ModuleList(branches)


def pool_everywhere(layers: nn.Sequential, x_BDhw: Tensor) -> Tensor:
    """Return what `conv_norm_act` makes of the mean over the map, at every pixel."""
    conv, norm, activate = layers
    pooled = activate(norm(convolve_pooled(x_BDhw.mean((2, 3), keepdim=True), conv)))
    return pooled.expand(-1, -1, x_BDhw.shape[2], x_BDhw.shape[3])


@dataclass(frozen=True, slots=True)
class DeepLabConfig:
    """Shape of a DeepLabv3+."""

    num_classes: int
    backbone: BackboneConfig = field(default_factory=ResNetConfig)
    aspp_channels: int = 256
    aspp_rates: tuple[int, int, int] = (6, 12, 18)
    low_channels: int = 48
    decoder_channels: int = 256


class DeepLab(nn.Module):
    """DeepLabv3+: image_B3hw -> logits_BKhw at stride 4. align_corners: of the resize of what the pyramid gives."""

    def __init__(self, config: DeepLabConfig, aspp: type[nn.Module] = Aspp, *, align_corners: bool) -> None:
        super().__init__()
        channels, decoder = config.aspp_channels, config.decoder_channels
        self.align_corners = align_corners
        self.backbone = build_backbone(config.backbone)
        self.aspp = aspp(config.backbone.stage_channels[-1], channels, config.aspp_rates)
        self.low = conv_norm_act(config.backbone.stage_channels[0], config.low_channels, 1)
        self.fuse = nn.Sequential(
            *conv_norm_act(channels + config.low_channels, decoder, 3), *conv_norm_act(decoder, decoder, 3)
        )
        self.classifier = nn.Conv2d(decoder, config.num_classes, 1)

    def forward(self, image_B3hw: Tensor) -> Tensor:
        return self.decode(*self.encode(image_B3hw))

    def encode(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first stage at stride 4, and what the pyramid makes of the last at the output stride."""
        low_BDhw, high_BDhw = self.backbone(image_B3hw)
        return low_BDhw, self.aspp(high_BDhw)

    def decode(self, low_BDhw: Tensor, high_BDhw: Tensor) -> Tensor:
        """Decode both features to logits_BKhw."""
        return self.classifier(self.fuse(torch.cat(self.align(low_BDhw, high_BDhw)[::-1], dim=1)))

    def align(self, low_BDhw: Tensor, high_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both features to the form in which they are joined: low with fewer channels, high at its size."""
        low_BDhw = self.low(low_BDhw)
        return low_BDhw, resize_like(high_BDhw, low_BDhw, align_corners=self.align_corners)
