"""DeepLabV3 on a dilated ResNet, as in the ProtoSeg repository: its second parametric baseline, at stride 8."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from penumbra.models.blocks.deeplab import Aspp
from penumbra.models.blocks.resnet import ResNet, ResNetConfig

RATES = (12, 24, 36)


@dataclass(frozen=True, slots=True)
class DeepLabConfig:
    """depth, width: of the ResNet. channels: of the pyramid and of what is scored."""

    depth: Literal[18, 34, 50, 101] = 101
    width: int = 64
    channels: int = 512


class DeepLab(nn.Module):
    """image_B3hw -> x_BDhw at stride 8. The last BatchNorm has no ReLU behind it."""

    def __init__(self, config: DeepLabConfig) -> None:
        super().__init__()
        resnet = ResNetConfig(
            config.depth, width=config.width, output_stride=8, multi_grid=(1, 1, 1), ceil_pool=True, dilation="rest"
        )
        self.backbone = ResNet(resnet)
        self.aspp = Aspp(resnet.high_channels, config.channels, RATES, project_kernel=3)
        self.refine = nn.Sequential(
            nn.Conv2d(config.channels, config.channels, 3, padding=1, bias=False), nn.BatchNorm2d(config.channels)
        )

    def forward(self, image_B3hw: Tensor) -> Tensor:
        _, high = self.backbone(image_B3hw)
        return self.refine(self.aspp(high))
