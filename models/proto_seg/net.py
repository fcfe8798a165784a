"""The ProtoSeg network: HRNetV2, one joint feature map at stride 4, and a head that scores it.

`head="prototype"` classifies by the nearest of several prototypes per class, `head="parametric"` is the paper's
baseline, a 1x1 convolution (see `models.proto_seg.heads`). `sampling="dropout"` draws the masks of the dropout in
front of the head, which training uses (Dropout2d, p = 0.1), also at inference: MC dropout (Gal & Ghahramani 2016).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.blocks.layers import conv_norm_act, drop_channels, resize_like
from models.card import Sampling
from models.contract import Features, Network
from models.proto_seg.heads import ParametricHead, PrototypeHead
from models.proto_seg.hrnet import Hrnet, HrnetConfig

KEEP = 0.9
"""Share of channels that the published dropout keeps."""


@dataclass(frozen=True, slots=True)
class ProtoConfig:
    """Shape of the network; the defaults are the published HRNet-W48.

    num_prototypes: per class, prototype head only. normalise: over what the projected features have unit length
    before they are compared: `width` as published, `channel` as in the paper.
    """

    num_classes: int
    head: Literal["prototype", "parametric"] = "prototype"
    num_prototypes: int = 10
    normalise: Literal["width", "channel"] = "width"
    sampling: Literal["single", "dropout"] = "single"
    hrnet: HrnetConfig = field(default_factory=HrnetConfig)

    @property
    def channels(self) -> int:
        """Channels of the joined branches: D of x_BDhw."""
        return sum(self.hrnet.branch_channels)


class ProtoNetwork(Network):
    """One pass: encode runs to the logits."""

    def __init__(self, config: ProtoConfig) -> None:
        super().__init__()
        self.sampling = Sampling(kind="single")
        self.backbone = Hrnet(config.hrnet)
        self.neck = conv_norm_act(config.channels, config.channels, 3, bias=True)
        self.head: PrototypeHead | ParametricHead
        if config.head == "prototype":
            self.head = PrototypeHead(
                config.num_classes, config.num_prototypes, config.channels, normalise=config.normalise
            )
        else:
            self.head = ParametricHead(config.num_classes, config.channels)
        self.extra_maps = self.head.extra_maps

    def joint(self, image_B3hw: Tensor) -> Tensor:
        """x_BDhw at stride 4, as it stands before the dropout."""
        first, *deeper = self.backbone(image_B3hw)
        return self.neck(torch.cat([first, *(resize_like(x, first) for x in deeper)], dim=1))

    def encode(self, image_B3hw: Tensor) -> Features:
        score_BKhw = self.head.score(self.joint(image_B3hw))
        return (self.head.logits(score_BKhw), *self.head.extras(score_BKhw))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return features[0][None]


class ProtoDropoutNetwork(ProtoNetwork):
    """Many passes through the head: noise_SBL is a channel mask, 0 or 1 / keep, L = D. Extras are without dropout."""

    def __init__(self, config: ProtoConfig) -> None:
        super().__init__(config)
        self.sampling = Sampling(kind="dropout", noise_length=config.channels, keep=KEEP, default_samples=8)

    def encode(self, image_B3hw: Tensor) -> Features:
        x_BDhw = self.joint(image_B3hw)
        return (x_BDhw, *self.head.extras(self.head.score(x_BDhw)))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        score = self.head.score(drop_channels(features[0], noise_SBL))
        return self.head.logits(score).unflatten(0, (noise_SBL.shape[0], noise_SBL.shape[1]))


def build_network(config: ProtoConfig) -> ProtoNetwork:
    """The network of a configuration."""
    return ProtoDropoutNetwork(config) if config.sampling == "dropout" else ProtoNetwork(config)
