"""The ProtoSeg network: a trunk, which makes one feature map x_BDhw of a picture, and a head that scores it.

`head="prototype"` classifies by the nearest of several prototypes per class, `head="parametric"` is the paper's
baseline, a 1x1 convolution (see `penumbra.models.proto_seg.heads`). `sampling="dropout"` draws the masks of the dropout
in front of the head, which training uses (Dropout2d, p = 0.1), also at inference: MC dropout (Gal & Ghahramani 2016).
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from penumbra.models.blocks.layers import drop_channels
from penumbra.models.card import Sampling
from penumbra.models.contract import Features, Network
from penumbra.models.errors import BadOption
from penumbra.models.proto_seg.heads import ParametricHead, PrototypeHead
from penumbra.models.proto_seg.trunks import DeepLab, DeepLabConfig, HrnetConfig, HrnetTrunk, LiteConfig, LiteTrunk

KEEP = 0.9
"""Share of channels that the published dropout keeps."""


@dataclass(frozen=True, slots=True)
class ProtoConfig:
    """Shape of the network; the defaults are the published HRNet-W48.

    num_prototypes: per class, prototype head only. normalise: over what the projected features have unit length
    before they are compared: `width` as published, `channel` as in the paper. hrnet, deeplab, lite: shapes of the
    trunks, the last on an EfficientNet.
    """

    num_classes: int
    head: Literal["prototype", "parametric"] = "prototype"
    num_prototypes: int = 10
    normalise: Literal["width", "channel"] = "width"
    sampling: Literal["single", "dropout"] = "single"
    trunk: Literal["hrnet", "deeplab", "lite"] = "hrnet"
    hrnet: HrnetConfig = field(default_factory=HrnetConfig)
    deeplab: DeepLabConfig = field(default_factory=DeepLabConfig)
    lite: LiteConfig = field(default_factory=LiteConfig)

    @property
    def channels(self) -> int:
        """D of x_BDhw."""
        if self.trunk == "hrnet":
            return sum(self.hrnet.branch_channels)
        return self.deeplab.channels if self.trunk == "deeplab" else self.lite.channels


class ProtoNetwork(Network):
    """One pass: encode runs to the logits."""

    def __init__(self, config: ProtoConfig) -> None:
        super().__init__()
        self.sampling = Sampling(kind="single")
        self.trunk = build_trunk(config)
        self.head: PrototypeHead | ParametricHead
        if config.head == "parametric":
            self.head = ParametricHead(config.num_classes, config.channels, bias=config.trunk == "deeplab")
        else:
            self.head = PrototypeHead(
                config.num_classes, config.num_prototypes, config.channels, normalise=config.normalise
            )
        self.extra_maps = self.head.extra_maps

    def encode(self, image_B3hw: Tensor) -> Features:
        score_BKhw = self.head.score(self.trunk(image_B3hw))
        return (self.head.logits(score_BKhw), *self.head.extras(score_BKhw))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return features[0][None]


class ProtoDropoutNetwork(ProtoNetwork):
    """Many passes through the head: noise_SBL is a channel mask, 0 or 1 / keep, L = D. Extras are without dropout."""

    def __init__(self, config: ProtoConfig) -> None:
        super().__init__(config)
        self.sampling = Sampling(kind="dropout", noise_length=config.channels, keep=KEEP, default_samples=8)

    def encode(self, image_B3hw: Tensor) -> Features:
        x_BDhw = self.trunk(image_B3hw)
        return (x_BDhw, *self.head.extras(self.head.score(x_BDhw)))

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        score = self.head.score(drop_channels(features[0], noise_SBL))
        return self.head.logits(score).unflatten(0, (noise_SBL.shape[0], noise_SBL.shape[1]))


def build_trunk(config: ProtoConfig) -> HrnetTrunk | DeepLab | LiteTrunk:
    """Build the trunk that a configuration names."""
    if config.trunk == "lite":
        return LiteTrunk(config.lite)
    return DeepLab(config.deeplab) if config.trunk == "deeplab" else HrnetTrunk(config.hrnet)


def build_network(config: ProtoConfig) -> ProtoNetwork:
    """Build the network of a configuration. Raises BadOption: dropout of a trunk that is trained without."""
    if config.sampling == "single":
        return ProtoNetwork(config)
    if config.trunk == "deeplab":
        raise BadOption(
            "sampling is 'dropout'; DeepLabV3 has no dropout in front of its head, only 'single' is possible"
        )
    return ProtoDropoutNetwork(config)
