"""WideResNet-38 (Wu, Shen, van den Hengel 2019) as weakly supervised segmentation uses it: pre-activation, stride 8.

Every channel count is a multiple of the stem's `width`, 64 in the paper. Parameter names follow the published files.
"""

from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((2, 3, 2, 2, 2), (3, 3, 2, 4, 4), (4, 6, 2, 8, 8), (5, 3, 1, 8, 16))
"""Stage, blocks, stride of the first, channels between the convolutions and at the end, in widths."""
BOTTLENECKS = {"b6": 32, "b7": 64}
"""Channels at the end, in widths."""

Convolutions = list[tuple[str, int, int, int, int]]
"""The convolutions of a block in turn: name, channels, kernel, stride and dilation of each."""


class WideResNet(nn.Module):
    """image_B3HW -> features [B, 64 * width, h, w] at stride 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels, plan = width, _plan(width)
        for name, convolutions in plan.items():
            self.add_module(name, WideBlock(channels, convolutions))
            channels = convolutions[-1][1]
        self.bn7 = nn.BatchNorm2d(channels)
        self.blocks = list(plan)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = self.conv1a(image_B3HW)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return F.relu(self.bn7(x))


def _plan(width: int) -> dict[str, Convolutions]:
    """List the convolutions of every block: two of 3x3 or, in the bottlenecks, 1x1, a dilated 3x3, and 1x1.

    DEVIATION: the bottlenecks' dropouts (.3, .5), which act in training only, are left out here; MC dropout uses the
    site before the classifier.
    """
    plan: dict[str, Convolutions] = {}
    for stage, count, stride, middle, end in STAGES:
        dilation = 2 if stage == 5 else 1
        for i in range(count):
            step = (1, dilation) if i else (stride, 1)
            convolutions = [("2a", middle * width, 3, *step), ("2b1", end * width, 3, 1, dilation)]
            plan[f"b{stage}_{i}" if i else f"b{stage}"] = convolutions
    for name, end in BOTTLENECKS.items():
        quarter = end * width // 4
        plan[name] = [("2a", quarter, 1, 1, 1), ("2b1", 2 * quarter, 3, 1, 4), ("2b2", 4 * quarter, 1, 1, 1)]
    return plan


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a convolution, several times. A shortcut that convolves takes the first activation."""

    def __init__(self, channels: int, convolutions: Convolutions) -> None:
        super().__init__()
        self.names, inside, total_stride = [name for name, *_ in convolutions], channels, 1
        for name, outside, kernel, stride, dilation in convolutions:
            pad = dilation * (kernel // 2)
            self.add_module(f"bn_branch{name}", nn.BatchNorm2d(inside))
            self.add_module(f"conv_branch{name}", nn.Conv2d(inside, outside, kernel, stride, pad, dilation, bias=False))
            inside, total_stride = outside, total_stride * stride
        same = channels == inside and total_stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(channels, inside, 1, total_stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, first = x, None
        for name in self.names:
            active = F.relu(self.get_submodule(f"bn_branch{name}")(y))
            first = active if first is None else first
            y = self.get_submodule(f"conv_branch{name}")(active)
        return y + (x if self.conv_branch1 is None else self.conv_branch1(first))
