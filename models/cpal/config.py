"""Configurations of CPAL's networks: the pseudo-mask network and the two segmentation networks trained on its masks."""

from dataclasses import dataclass
from typing import Literal

from penumbra.models.blocks.efficientnet import EfficientNetConfig
from penumbra.models.card import Sampling
from penumbra.models.errors import BadOption


@dataclass(frozen=True, slots=True)
class CpalConfig:
    """Shape of one network. num_classes counts the background, which is class 0, where there is one.

    net: `cam` makes pseudo masks from image-level labels; `deeplabv2` and `wrn38` segment without labels.
    width: channels of the first stage (64 in the papers); depth: of the ResNets.
    scales: passes of `cam` and `deeplabv2`; flip: every pass of `cam` also sees the mirrored image.
    members: what the sample axis holds; one member is a single pass.
        cam: `cam`, `is_cam`, and with context `pacam`. deeplabv2: `max`, `scale1`, `scale0.5`, ... wrn38: `logits`.
    sampling: `dropout` gives `wrn38` MC dropout at its last dropout site.

    Of `cam` alone. The public record of CPAL names the parts below but not these values; all defaults are OURS.
    background: whether class 0 is what no tag names and no object covers; without, tags name every class.
    tag_threshold: a class without a tag is present when sigmoid(score) is above it.
    context: N_p, context prototypes of a class; 0 is SIPE. context_channels: D of the projection head.
    neighbours: K, context prototypes that take part in a class's map. instance_threshold: tau on the CAM.
    positiveness_scale: factor on the dot products before their softmax; 128 ** -0.5, as in attention.
    lite: the encoder of `cam` and `deeplabv2` in place of a ResNet; width then is that of `cam`'s side outputs alone.
    """

    num_classes: int
    net: Literal["cam", "deeplabv2", "wrn38"] = "cam"
    depth: Literal[18, 34, 50, 101] = 50
    width: int = 64
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    members: tuple[str, ...] = ("cam", "is_cam")
    sampling: Literal["single", "dropout"] = "single"
    background: bool = True
    tag_threshold: float = 0.5
    context: int = 0
    context_channels: int = 128
    neighbours: int = 5
    instance_threshold: float = 0.3
    positiveness_scale: float = 0.088388
    lite: EfficientNetConfig | None = None

    @property
    def num_foreground(self) -> int:
        """Classes that tags name."""
        return self.num_classes - self.background


def sipe(num_classes: int) -> CpalConfig:
    """Configure the published localisation network with its evaluation: four scales with flips, IS-CAM alone."""
    return CpalConfig(num_classes, scales=(1.0, 0.5, 1.5, 2.0), flip=True, members=("is_cam",))


def deeplabv2(num_classes: int) -> CpalConfig:
    """Configure DeepLabV2-R101-MSC as published: the maximum over its scales."""
    return CpalConfig(num_classes, net="deeplabv2", depth=101, scales=(1.0, 0.5, 0.75), members=("max",))


def wrn38(num_classes: int) -> CpalConfig:
    """Configure DeepLabV1 on WideResNet-38."""
    return CpalConfig(num_classes, net="wrn38", members=("logits",))


def choose_sampling(config: CpalConfig, offered: tuple[str, ...]) -> Sampling:
    """Choose the sample axis that `config.members` asks for, of those that its network offers.

    Raises BadOption naming the first value that fits no network, or not this one.
    """
    net, members = config.net, config.members
    failures = {
        f"members are {', '.join(members) or 'empty'}; of {', '.join(offered)}, each once, are wanted":
            not members or len(set(members)) < len(members) or not set(members) <= set(offered),
        f"scales are {config.scales}; one or more positive ones, each once, are wanted":
            min(config.scales, default=0) <= 0 or len(set(config.scales)) < len(config.scales),
        f"tag_threshold is {config.tag_threshold}; a probability between 0 and 1 is wanted":
            not 0 < config.tag_threshold < 1,
        f"neighbours is {config.neighbours}; 1 or more are wanted": config.neighbours < 1,
        f"the network {net!r} has no dropout; sampling 'single' is wanted":
            net != "wrn38" and config.sampling != "single",
        f"the network {net!r} has neither flips nor context": net != "cam" and (config.flip or config.context != 0),
        f"the network {net!r} takes every class alike; background true is wanted":
            net != "cam" and not config.background,
        f"the network {net!r} on an EfficientNet, whose pictures are normalised otherwise, has the scale 1 alone":
            net == "cam" and config.lite is not None and config.scales != (1.0,),
        f"the network {net!r} stands on a WideResNet; lite null is wanted": net == "wrn38" and config.lite is not None,
        f"depth is {config.depth}, and the network {net!r} has no ResNet; leave it out":
            config.depth != 50 and (net == "wrn38" or config.lite is not None),
        f"width is {config.width}, which no part of the network {net!r} has; leave it out":
            config.width != 64 and net == "deeplabv2" and config.lite is not None,
        f"the network {net!r} has the scale 1 alone": net == "wrn38" and config.scales != (1.0,),
    }  # fmt: skip
    for sentence, failed in failures.items():
        if failed:
            raise BadOption(sentence)
    if len(members) == 1:
        return Sampling(kind="single", members=() if len(offered) == 1 else members)
    return Sampling(kind="members", members=members, default_samples=len(members))
