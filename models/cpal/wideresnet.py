"""WideResNet-38 (Wu, Shen, van den Hengel 2019) as weakly supervised segmentation uses it: pre-activation, stride 8.

Every channel count is a multiple of the stem's `width`, 64 in the paper. Parameter names follow the published files.
"""

from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((2, 3, 2, 2, 2), (3, 3, 2, 4, 4), (4, 6, 2, 8, 8), (5, 3, 1, 8, 16))
"""Stage, blocks, stride of the first, channels between the convolutions and at the end, in widths."""


class WideResNet(nn.Module):
    """image_B3HW -> features [B, 64 * width, h, w] at stride 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels = width
        self.blocks = [name for name, *_ in _plan()]
        for name, stride, dilations, middle, end in _plan():
            block = WideBlock(channels, middle * width, end * width, stride=stride, dilations=dilations)
            self.add_module(name, block)
            channels = end * width
        self.b6 = WideBottleneck(channels, 2 * channels, dilation=4)
        self.b7 = WideBottleneck(2 * channels, 4 * channels, dilation=4)
        self.bn7 = nn.BatchNorm2d(4 * channels)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.conv1a(image_B3HW)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return F.relu(self.bn7(self.b7(self.b6(x))))


def _plan() -> list[tuple[str, int, tuple[int, int], int, int]]:
    """List every plain block's name, stride, dilations of both convolutions, channels between them and at the end."""
    plan = []
    for stage, count, stride, middle, end in STAGES:
        dilation = 2 if stage == 5 else 1
        plan.append((f"b{stage}", stride, (1, dilation), middle, end))
        plan += [(f"b{stage}_{i}", 1, (dilation, dilation), middle, end) for i in range(1, count)]
    return plan


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3, twice. A shortcut that convolves takes the first normalised activation."""

    def __init__(
        self, channels: int, middle: int, out_channels: int, *, stride: int, dilations: tuple[int, int]
    ) -> None:
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, middle, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, out_channels, 3, 1, second, second, bias=False)
        same = channels == out_channels and stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn_branch2a(x))
        y = self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(active))))
        return y + (x if self.conv_branch1 is None else self.conv_branch1(active))


class WideBottleneck(nn.Module):
    """1x1, dilated 3x3, 1x1 to channels / 4, / 2, / 1, pre-activated. Its dropouts (.3, .5) act in training only.

    DEVIATION: they are left out here; MC dropout uses the site before the classifier.
    """

    def __init__(self, channels: int, out_channels: int, *, dilation: int) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, out_channels // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out_channels // 4)
        self.conv_branch2b1 = nn.Conv2d(
            out_channels // 4, out_channels // 2, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.bn_branch2b2 = nn.BatchNorm2d(out_channels // 2)
        self.conv_branch2b2 = nn.Conv2d(out_channels // 2, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn_branch2a(x))
        y = self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(active))))
        y = self.conv_branch2b2(F.relu(self.bn_branch2b2(y)))
        return y + self.conv_branch1(active)
