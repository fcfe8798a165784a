"""The backbones that a DeepLab, or any network of its kind, can stand on; a configuration's `kind` chooses."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from penumbra.models.blocks.efficientnet import EfficientNet, EfficientNetConfig
from penumbra.models.blocks.resnet import ResNet, ResNetConfig
from penumbra.models.strict import CHOSEN


def _choose(data: Any) -> str:
    return f"{CHOSEN}{'EfficientNetConfig' if isinstance(data, dict) and 'kind' in data else 'ResNetConfig'}"


BackboneConfig = Annotated[
    Annotated[ResNetConfig, Tag(f"{CHOSEN}ResNetConfig")]
    | Annotated[EfficientNetConfig, Tag(f"{CHOSEN}EfficientNetConfig")],
    Discriminator(_choose),
]
"""A ResNet unless the data names a kind."""


def build_backbone(config: ResNetConfig | EfficientNetConfig) -> ResNet | EfficientNet:
    """Build image_B3hw -> (low_BDhw at stride 4, high_BDhw at the output stride), with fresh weights."""
    return EfficientNet(config) if isinstance(config, EfficientNetConfig) else ResNet(config)
