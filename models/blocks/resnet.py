"""ResNet backbones of the segmentation papers: plain or deep stem, dilated to output stride 8 or 16.

He et al. 2016 (v1, stride on the 3x3 of a bottleneck); deep stem as in "v1c". Parameter names follow the
common public layout (`conv1`, `bn1`, `layer1.0.conv1`, ...), so published weights load by name.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.layers import conv_norm_act

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@dataclass(frozen=True, slots=True)
class ResNetConfig:
    """Shape of a backbone.

    width: channels of the first stage (64 in the papers). multi_grid: factors on the dilation of the last
    stage's blocks. ceil_pool: the stem's max-pool rounds sizes up (U2PL, AugSeg) or down (CPS).
    dilation: where a stride became a dilation, `all` blocks of the last stage have it (times multi_grid); with `rest`
    its first block has the stage before's, as in torchvision; with `none` nothing is dilated (SIPE).
    """

    depth: Literal[18, 34, 50, 101] = 50
    stem: Literal["deep", "plain"] = "deep"
    width: int = 64
    output_stride: Literal[8, 16] = 16
    multi_grid: tuple[int, int, int] = (1, 2, 4)
    ceil_pool: bool = False
    dilation: Literal["all", "rest", "none"] = "all"

    @property
    def expansion(self) -> int:
        return 4 if self.depth >= 50 else 1

    @property
    def stage_channels(self) -> list[int]:
        """Channels of what `ResNet.stages` returns."""
        return [self.width * self.expansion * 2**stage for stage in range(4)]


class ResNet(nn.Module):
    """image_B3hw -> (low_BDhw at stride 4, high_BDhw at the output stride)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        width, deep = config.width, config.stem == "deep"
        self.ceil_pool = config.ceil_pool
        self.conv1 = _deep_stem(width) if deep else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        stem_channels = 2 * width if deep else width
        self.bn1 = nn.BatchNorm2d(stem_channels)
        block = Bottleneck if config.expansion == 4 else BasicBlock
        channels = stem_channels
        strides = (1, 2, 1 if config.output_stride == 8 else 2, 1)
        for stage, (stride, dilations) in enumerate(zip(strides, _dilations(config), strict=True)):
            planes = width * 2**stage
            blocks = nn.Sequential()
            for i, dilation in enumerate(dilations):
                blocks.append(block(channels, planes, stride=stride if i == 0 else 1, dilation=dilation))
                channels = planes * config.expansion
            self.add_module(f"layer{stage + 1}", blocks)

    def forward(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor]:
        low, _, _, high = self.stages(image_B3hw)
        return low, high

    def stages(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of all four stages."""
        x = F.relu(self.bn1(self.conv1(image_B3hw)))
        first = self.layer1(F.max_pool2d(x, 3, 2, 1, ceil_mode=self.ceil_pool))
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.layer4(third)


def _deep_stem(width: int) -> nn.Sequential:
    first, second = conv_norm_act(3, width, 3, stride=2), conv_norm_act(width, width, 3)
    return nn.Sequential(*first, *second, nn.Conv2d(width, 2 * width, 3, padding=1, bias=False))


def _dilations(config: ResNetConfig) -> list[list[int]]:
    """List the dilation of every block. Stride 8: stage 3 keeps its resolution with 1, 2, 2, ... instead."""
    blocks = BLOCKS[config.depth]
    if config.dilation == "none":
        return [[1] * count for count in blocks]
    third = [1] + [2] * (blocks[2] - 1) if config.output_stride == 8 else [1] * blocks[2]
    last = 32 // config.output_stride
    if config.dilation == "rest":
        return [[1] * blocks[0], [1] * blocks[1], third, [third[-1]] + [last] * (blocks[3] - 1)]
    grid = list(config.multi_grid) + [config.multi_grid[-1]] * blocks[3]
    return [[1] * blocks[0], [1] * blocks[1], third, [last * g for g in grid[: blocks[3]]]]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, -34)."""

    def __init__(self, channels: int, planes: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(channels, planes, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the planes, and a shortcut (ResNet-50, -101)."""

    def __init__(self, channels: int, planes: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = _shortcut(channels, 4 * planes, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(channels: int, out_channels: int, *, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
