"""Self-correcting networks: a primary p(y|x), an ancillary p_anc(y|x,b) that sees boxes, and their correction q.

Without boxes the primary answers alone. With boxes there are three members: primary, ancillary, corrected.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.blocks.backbone import BackboneConfig
from penumbra.models.blocks.deeplab import DeepLab, DeepLabConfig
from penumbra.models.blocks.layers import drop_channels, resize_like
from penumbra.models.blocks.resnet import ResNetConfig
from penumbra.models.card import PromptSpec, Sampling
from penumbra.models.contract import Features, Network, Prompt
from penumbra.models.errors import BadOption

BACKBONE = ResNetConfig(depth=101, stem="plain", output_stride=8, dilation="rest")
"""Backbone of the unofficial code: torchvision's ResNet-101 with the strides of its last two stages made dilations."""
KEEP = 0.5
"""Probability that what the ASPP gives survives its dropout, as in the unofficial code."""


@dataclass(frozen=True, slots=True)
class SelfCorrectingConfig(DeepLabConfig):
    """Shape of both networks and of the correction. The defaults are the unofficial code's.

    aspp_rates: the unofficial code has 6, 12, 18 at output stride 8; DeepLabv3+ has twice that there.
    ancillary: there is a network that sees boxes. correction: what joins it with the primary, if it is there;
    correction_hidden: channels of the convolutional one (the paper names none). alpha: weight of the ancillary in the
    linear one if a request names none; 0.5 is where the paper's schedule, from 30, ends.
    sampling: `dropout` makes samples of the primary; boxes are not taken then. background: the class that lies outside
    of every box (VOC's is 0); None for data without one. partial: the ancillary is taught with some of the boxes too.
    """

    backbone: BackboneConfig = BACKBONE
    ancillary: bool = True
    correction: Literal["none", "linear", "convolutional"] = "linear"
    correction_hidden: int = 128
    alpha: float = 0.5
    sampling: Literal["single", "dropout"] = "single"
    background: int | None = 0
    partial: bool = False


class SelfCorrectingNetwork(Network):
    """encode runs the primary to its stride-4 logits; take_prompt adds the ancillary's and the corrected ones.

    Features are (logits_BMKhw,), M = 1 without boxes. With the convolutional correction, which works on pixels,
    all members of a prompted window have the window's resolution.
    """

    def __init__(self, config: SelfCorrectingConfig) -> None:
        super().__init__()
        self.config = config
        self.sampling = Sampling(kind="single", members=("primary",))
        self.primary = DeepLab(config, align_corners=False)
        if config.ancillary:
            members = ("primary", "ancillary", "corrected")[: 2 if config.correction == "none" else 3]
            alpha = config.alpha if config.correction == "linear" else None
            self.prompt = PromptSpec("boxes", members, config.background, alpha, config.partial)
            self.ancillary = Ancillary(config)
            if config.correction == "convolutional":
                self.correction = nn.Sequential(
                    nn.Conv2d(2 * config.num_classes, config.correction_hidden, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(config.correction_hidden, config.num_classes, 3, padding=1),
                )

    def encode(self, image_B3hw: Tensor) -> Features:
        return (self.primary(image_B3hw)[:, None],)

    def take_prompt(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        """Add the members of boxes_BKhw, of the image's size; the linear correction takes alpha_B, or config.alpha."""
        boxes_BKhw, *alpha_B = prompt
        ancillary_B1Khw = self.ancillary(image_B3hw, boxes_BKhw)[:, None]
        members_BMKhw = torch.cat((features[0], ancillary_B1Khw), dim=1)
        if self.config.correction == "none":
            return (members_BMKhw,)
        if self.config.correction == "convolutional":
            return (correct_by_convolution(members_BMKhw, image_B3hw, self.correction),)
        default_B = torch.full_like(image_B3hw[:, 0, 0, 0], self.config.alpha)
        return (correct_linearly(members_BMKhw, alpha_B[0] if alpha_B else default_B),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return features[0].transpose(0, 1)


class DropoutNetwork(SelfCorrectingNetwork):
    """The primary with MC dropout (Gal and Ghahramani 2016) behind its ASPP; noise_SBL masks the ASPP's channels.

    DEVIATION: the unofficial code drops single elements while it trains; a mask of channels needs no random number
    per pixel. The ancillary's weights are kept, so that the same files make both networks, and are not used.
    """

    def __init__(self, config: SelfCorrectingConfig) -> None:
        super().__init__(config)
        self.sampling = Sampling(kind="dropout", noise_length=config.aspp_channels, keep=KEEP, default_samples=8)
        self.prompt = PromptSpec()
        self.channels = (config.aspp_channels, config.low_channels)

    def encode(self, image_B3hw: Tensor) -> Features:
        """Compute what no sample repeats: the first decoding convolution of low's channels, and high at its size.

        A resize keeps to its channel, so a mask of high's channels commutes with it.
        """
        low_BDhw, high_BDhw = self.primary.align(*self.primary.encode(image_B3hw))
        _, weight = self.primary.fuse[0].weight.split(self.channels, dim=1)
        return F.conv2d(low_BDhw, weight, padding=1), high_BDhw

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        """Run the rest of the DeepLabv3+, with high's channels times each mask."""
        shared_BDhw, high_BDhw = features
        weight, _ = self.primary.fuse[0].weight.split(self.channels, dim=1)
        x_NDhw = F.conv2d(drop_channels(high_BDhw, noise_SBL), weight, padding=1)
        x_SBDhw = x_NDhw.unflatten(0, noise_SBL.shape[:2]) + shared_BDhw
        logits_NKhw = self.primary.classifier(self.primary.fuse[1:](x_SBDhw.flatten(0, 1)))
        return logits_NKhw.unflatten(0, noise_SBL.shape[:2])


def build(config: SelfCorrectingConfig) -> SelfCorrectingNetwork:
    """Build the network that `config.sampling` asks for. Raises BadOption: no ancillary could be `partial`."""
    if config.partial and not config.ancillary:
        raise BadOption("config.partial is of the ancillary, which config.ancillary leaves out; one of both is wanted")
    return DropoutNetwork(config) if config.sampling == "dropout" else SelfCorrectingNetwork(config)


def correct_linearly(members_BMKhw: Tensor, alpha_B: Tensor) -> Tensor:
    """Minimise KL(q || p) + alpha KL(q || p_anc): the logits' mean (l + alpha l_anc) / (1 + alpha).

    In probabilities that is the geometric mean with weights 1 and alpha. It is linear, so it may come before a resize.
    """
    primary_B1Khw, ancillary_B1Khw = members_BMKhw.split(1, dim=1)
    alpha_B1111 = alpha_B[:, None, None, None, None]
    corrected_B1Khw = (primary_B1Khw + alpha_B1111 * ancillary_B1Khw) / (1 + alpha_B1111)
    return torch.cat((members_BMKhw, corrected_B1Khw), dim=1)


def correct_by_convolution(members_BMKhw: Tensor, image_B3hw: Tensor, correction: nn.Module) -> Tensor:
    """Return q = correction(l, l_anc) on logits of the image's size, joined by channel."""
    joint_BDhw = resize_like(members_BMKhw.flatten(1, 2), image_B3hw, align_corners=False)
    num_classes = members_BMKhw.shape[2]
    return torch.cat((joint_BDhw, correction(joint_BDhw)), dim=1).unflatten(1, (3, num_classes))


class Ancillary(nn.Module):
    """A DeepLabv3+ with a box encoder: image_B3hw, boxes_BKhw -> logits_BKhw at stride 4."""

    def __init__(self, config: SelfCorrectingConfig) -> None:
        super().__init__()
        self.deeplab = DeepLab(config, align_corners=False)
        self.low_gate = BoxGate(config.num_classes, config.backbone.stage_channels[0])
        self.high_gate = BoxGate(config.num_classes, config.aspp_channels)

    def forward(self, image_B3hw: Tensor, boxes_BKhw: Tensor) -> Tensor:
        low_BDhw, high_BDhw = self.deeplab.encode(image_B3hw)
        low_BDhw = low_BDhw * self.low_gate(boxes_BKhw, low_BDhw)
        high_BDhw = high_BDhw * self.high_gate(boxes_BKhw, high_BDhw)
        return self.deeplab.decode(low_BDhw, high_BDhw)


class BoxGate(nn.Module):
    """One scale of the box encoder: from boxes_BKhw, 1 inside a box of class k, a factor in (0, 1) for each feature."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_classes, channels, 3, padding=1)

    def forward(self, boxes_BKhw: Tensor, feature_BDhw: Tensor) -> Tensor:
        """Return factors of the shape of `feature`."""
        return torch.sigmoid(self.conv(F.interpolate(boxes_BKhw, size=feature_BDhw.shape[-2:], mode="nearest")))
