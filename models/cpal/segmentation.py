"""The segmentation networks that are trained on pseudo masks: an image in, logits out, no labels.

DeepLabV2-R101-MSC (Chen et al. 2017; the public code of kazuto1011), whose passes at several scales are members, and
DeepLabV1 on WideResNet-38 (Wu et al. 2019; the public code of YudeWang), with a dropout site before its classifier.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.efficientnet import EfficientNet, EfficientNetConfig
from penumbra.models.blocks.layers import drop_channels, resize_like
from penumbra.models.blocks.resnet import BLOCKS
from penumbra.models.card import Sampling
from penumbra.models.contract import Features, Network
from penumbra.models.cpal.config import CpalConfig, choose_sampling
from penumbra.models.cpal.wideresnet import WideResNet

RATES = (6, 12, 18, 24)
"""Dilations of the four 3x3 convolutions whose sum is DeepLabV2's answer."""
FIELD_DILATION = 12
"""Dilation of DeepLabV1's large-field-of-view convolution."""
KEEP = 0.5
"""1 - p of the dropout before DeepLabV1's classifier."""


class DeepLabV2Network(Network):
    """encode runs the base at every scale and resizes its logits to the map of the first; decode stacks the members.

    Members: `max` over the scales (the published answer), or each scale by its name.
    """

    def __init__(self, config: CpalConfig) -> None:
        super().__init__()
        self.scales, self.members = config.scales, config.members
        self.names = tuple(f"scale{scale:g}" for scale in config.scales)
        self.sampling = choose_sampling(config, ("max", *self.names))
        self.base = LiteDeepLabV2(config.lite, config.num_classes) if config.lite else DeepLabV2(config)

    def encode(self, image_B3HW: Tensor) -> Features:
        # Positions follow `scale` exactly, not the rounded size, as torch >= 1.6 reads a scale factor.
        resize = partial(F.interpolate, image_B3HW, mode="bilinear", align_corners=False)
        logits = [self.base(image_B3HW if scale == 1 else resize(scale_factor=scale)) for scale in self.scales]
        logits = [resize_like(each, logits[0], align_corners=False) for each in logits]
        answers = dict(zip(self.names, logits, strict=True))
        if "max" in self.members:
            answers["max"] = torch.stack(logits).amax(0)
        return tuple(answers[member] for member in self.members)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return torch.stack(features)


class DeepLabV2(nn.Module):
    """image_B3HW -> logits_BKhw at stride 8. Strides are on a stage's first 1x1 convolution, as in Caffe."""

    def __init__(self, config: CpalConfig) -> None:
        super().__init__()
        width = config.width
        self.layer1 = nn.Sequential(OrderedDict(conv1=conv_norm(3, width, 7, stride=2, padding=3)))
        channels = width
        for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            blocks = nn.Sequential()
            for i in range(BLOCKS[config.depth][stage]):
                block = CaffeBottleneck(channels, width * 2**stage, stride=stride if i == 0 else 1, dilation=dilation)
                blocks.add_module(f"block{i + 1}", block)
                channels = 4 * width * 2**stage
            self.add_module(f"layer{stage + 2}", blocks)
        self.aspp = SumOfRates(channels, config.num_classes)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.layer1(image_B3HW)), 3, 2, 1, ceil_mode=True)
        for stage in (2, 3, 4, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.aspp(x)


class LiteDeepLabV2(nn.Module):
    """The same head on an EfficientNet, whose last feature is joined at stride 8 with the one of that stride."""

    def __init__(self, config: EfficientNetConfig, num_classes: int) -> None:
        super().__init__()
        _, middle, _, last = config.stage_channels
        self.backbone = EfficientNet(config)
        self.aspp = SumOfRates(middle + last, num_classes)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        _, middle, _, last = self.backbone.stages(image_B3HW)
        return self.aspp(torch.cat((middle, resize_like(last, middle)), dim=1))


def conv_norm(channels: int, out_channels: int, kernel: int, **how: int) -> nn.Sequential:
    """Build a convolution and a BatchNorm under the names of the published files. how: as `nn.Conv2d` has it."""
    conv = nn.Conv2d(channels, out_channels, kernel, bias=False, **how)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class CaffeBottleneck(nn.Module):
    """1x1 with the stride, 3x3, 1x1 to four times the planes, and a shortcut where the shape changes."""

    def __init__(self, channels: int, planes: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.reduce = conv_norm(channels, planes, 1, stride=stride)
        self.conv3x3 = conv_norm(planes, planes, 3, padding=dilation, dilation=dilation)
        self.increase = conv_norm(planes, 4 * planes, 1)
        self.shortcut = None if channels == 4 * planes else conv_norm(channels, 4 * planes, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.increase(F.relu(self.conv3x3(F.relu(self.reduce(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class SumOfRates(nn.Module):
    """DeepLabV2's head: the sum of dilated 3x3 convolutions to the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        for i, rate in enumerate(RATES):
            self.add_module(f"c{i}", nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate))

    def forward(self, x: Tensor) -> Tensor:
        c0, c1, c2, c3 = (conv(x) for conv in self.children())
        return c0 + c1 + c2 + c3


class Wrn38Network(Network):
    """encode ends before the dropout of the classifier, decode is the rest. Logits at stride 8."""

    def __init__(self, config: CpalConfig) -> None:
        super().__init__()
        channels, hidden = 64 * config.width, 8 * config.width
        self.sampling = choose_sampling(config, ("logits",))
        if config.sampling == "dropout":
            self.sampling = Sampling(kind="dropout", noise_length=hidden, keep=KEEP, default_samples=8)
        self.backbone = WideResNet(config.width)
        self.conv_fov = nn.Conv2d(channels, hidden, 3, padding=FIELD_DILATION, dilation=FIELD_DILATION, bias=False)
        self.bn_fov = nn.BatchNorm2d(hidden)
        self.conv_fov2 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.bn_fov2 = nn.BatchNorm2d(hidden)
        self.cls_conv = nn.Conv2d(hidden, config.num_classes, 1)

    def encode(self, image_B3HW: Tensor) -> Features:
        x = F.relu(self.bn_fov(self.conv_fov(self.backbone(image_B3HW))))
        return (F.relu(self.bn_fov2(self.conv_fov2(x))),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        (x_BDhw,) = features
        if self.sampling.kind == "single":
            return self.cls_conv(x_BDhw)[None]
        logits = self.cls_conv(drop_channels(x_BDhw, noise_SBL))
        return logits.unflatten(0, (noise_SBL.shape[0], noise_SBL.shape[1]))
