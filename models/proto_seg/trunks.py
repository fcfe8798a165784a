"""Trunks, which make one feature map x_BDhw of a picture: HRNetV2 (Wang et al. 2020), DeepLabV3, and EfficientNet-lite.

HRNet's branches of strides 4, 8, 16 and 32 keep their resolution and exchange what they see. Module names equal the
published keys (`stage3.1.fuse_layers.0.2.0`, ...), so weights load by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.deeplab import Aspp
from penumbra.models.blocks.efficientnet import EfficientNet, EfficientNetConfig
from penumbra.models.blocks.layers import conv_norm_act, resize_like
from penumbra.models.blocks.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig

RATES = (12, 24, 36)
"""Dilations of DeepLabV3's pyramid."""


@dataclass(frozen=True, slots=True)
class HrnetConfig:
    """Shape of the backbone; the defaults are HRNetV2-W48.

    width: channels of the stride-4 branch; every further branch has twice as many. stem: channels of the two strided
    convolutions. bottlenecks: blocks of the first stage. modules: of stages 2, 3, 4. blocks: per branch and module.
    """

    width: int = 48
    stem: int = 64
    bottlenecks: int = 4
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4

    @property
    def branch_channels(self) -> tuple[int, int, int, int]:
        return (self.width, 2 * self.width, 4 * self.width, 8 * self.width)


class HrnetTrunk(nn.Module):
    """image_B3hw -> x_BDhw at stride 4: all branches at the size of the first, joined, and a 3x3 convolution."""

    def __init__(self, config: HrnetConfig) -> None:
        super().__init__()
        channels = sum(config.branch_channels)
        self.backbone = Hrnet(config)
        self.neck = conv_norm_act(channels, channels, 3, bias=True)

    def forward(self, image_B3hw: Tensor) -> Tensor:
        first, *deeper = self.backbone(image_B3hw)
        return self.neck(torch.cat([first, *(resize_like(x, first) for x in deeper)], dim=1))


class Hrnet(nn.Module):
    """image_B3hw -> four maps x_BDhw at strides 4, 8, 16 and 32, sizes rounded up."""

    def __init__(self, config: HrnetConfig) -> None:
        super().__init__()
        stem, channels = config.stem, config.branch_channels
        self.conv1 = nn.Conv2d(3, stem, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        self.layer1 = nn.Sequential(
            *(Bottleneck(4 * stem if i else stem, stem, stride=1, dilation=1) for i in range(config.bottlenecks))
        )
        self.transition1 = _transition((4 * stem,), channels[:2])
        self.stage2 = _stage(config.modules[0], channels[:2], config.blocks)
        self.transition2 = _transition(channels[:2], channels[:3])
        self.stage3 = _stage(config.modules[1], channels[:3], config.blocks)
        self.transition3 = _transition(channels[:3], channels)
        self.stage4 = _stage(config.modules[2], channels, config.blocks)

    def forward(self, image_B3hw: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(image_B3hw)))
        branches = [self.layer1(F.relu(self.bn2(self.conv2(x))))]
        branches = self.stage2(_extend(self.transition1, branches))
        branches = self.stage3(_extend(self.transition2, branches))
        return self.stage4(_extend(self.transition3, branches))


class Exchange(nn.Module):
    """One module of a stage: residual blocks on every branch alone, then every branch is a sum over all.

    Output i = ReLU(sum over j of f_ij(branch j)): the identity for j = i; for j > i a 1x1 convolution, resized up;
    for j < i as many strided convolutions as there are octaves between them.
    """

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(c, c, stride=1, dilation=1) for _ in range(blocks))) for c in channels
        )
        places = range(len(channels))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(_path(channels, j, i) for j in places) for i in places)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        own = [blocks(x) for blocks, x in zip(self.branches, branches, strict=True)]
        return [self._fuse(own, i) for i in range(len(own))]

    def _fuse(self, branches: list[Tensor], i: int) -> Tensor:
        parts = [path(x) for path, x in zip(self.fuse_layers[i].children(), branches, strict=True)]
        total = parts[0]
        for j, part in enumerate(parts[1:], start=1):
            total = total + (resize_like(part, branches[i]) if j > i else part)
        return F.relu(total)


def _path(channels: Sequence[int], j: int, i: int) -> nn.Module:
    """Lead from branch j's channels to branch i's; the resizing up is left to the caller."""
    if j == i:
        return nn.Identity()
    if j > i:
        return conv_norm_act(channels[j], channels[i], 1)[:2]
    steps = [conv_norm_act(channels[j], channels[j], 3, stride=2) for _ in range(i - j - 1)]
    return nn.Sequential(*steps, conv_norm_act(channels[j], channels[i], 3, stride=2)[:2])


def _stage(modules: int, channels: Sequence[int], blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Exchange(channels, blocks) for _ in range(modules)))


def _transition(channels: Sequence[int], new_channels: Sequence[int]) -> nn.ModuleList:
    """Keep an old branch, or make a new one from the last of the old, per expected branch."""
    kept = [
        nn.Identity() if have == want else conv_norm_act(have, want, 3)
        for have, want in zip(channels, new_channels, strict=False)
    ]
    return nn.ModuleList([*kept, nn.Sequential(conv_norm_act(channels[-1], new_channels[-1], 3, stride=2))])


def _extend(transition: nn.ModuleList, branches: list[Tensor]) -> list[Tensor]:
    """Return the old branches and one more."""
    return [module(x) for module, x in zip(transition, [*branches, branches[-1]], strict=True)]


@dataclass(frozen=True, slots=True)
class DeepLabConfig:
    """depth, width: of the ResNet. channels: of the pyramid and of what is scored."""

    depth: Literal[18, 34, 50, 101] = 101
    width: int = 64
    channels: int = 512


class DeepLab(nn.Module):
    """DeepLabV3 on a dilated ResNet, as in the ProtoSeg repository, its second parametric baseline.

    image_B3hw -> x_BDhw at stride 8. The last BatchNorm has no ReLU behind it.
    """

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__()
        resnet = ResNetConfig(
            config.depth, width=config.width, output_stride=8, multi_grid=(1, 1, 1), ceil_pool=True, dilation="rest"
        )
        self.backbone = ResNet(resnet)
        self.aspp = Aspp(resnet.stage_channels[-1], config.channels, RATES, project_kernel=3)
        self.refine = conv_norm_act(config.channels, config.channels, 3)[:2]

    def forward(self, image_B3hw: Tensor) -> Tensor:
        _, high = self.backbone(image_B3hw)
        return self.refine(self.aspp(high))


LITE2 = EfficientNetConfig("efficientnet_lite")


@dataclass(frozen=True, slots=True)
class LiteConfig:
    """backbone: shape of the EfficientNet. channels: of what is scored."""

    backbone: EfficientNetConfig = LITE2
    channels: int = 128


class LiteTrunk(nn.Module):
    """image_B3hw -> x_BDhw at stride 4, as of an HRNet (OURS): all features at the size of the first, joined."""

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        channels = config.channels
        self.backbone = EfficientNet(config.backbone)
        self.join = conv_norm_act(sum(config.backbone.stage_channels), channels, 1)
        self.neck = conv_norm_act(channels, channels, 3)

    def forward(self, image_B3hw: Tensor) -> Tensor:
        first, *deeper = self.backbone.stages(image_B3hw)
        return self.neck(self.join(torch.cat([first, *(resize_like(x, first) for x in deeper)], dim=1)))
