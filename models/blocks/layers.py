"""Small layers that every network here is made of."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_act(
    channels: int, out_channels: int, kernel: int, *, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    """Convolution that keeps the size, BatchNorm, ReLU."""
    pad = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=pad, dilation=dilation, bias=bias),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def resize_like(x_BDhw: Tensor, target_BDhw: Tensor) -> Tensor:
    """Bilinear resize to the height and width of `target`, align_corners=True as in the published nets."""
    return F.interpolate(x_BDhw, size=target_BDhw.shape[-2:], mode="bilinear", align_corners=True)
