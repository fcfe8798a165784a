"""Small layers that every network here is made of, and the noise that they take."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.card import Sampling


def conv_norm_act(
    channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Sequential:
    """Build a convolution that keeps the size, up to its stride, BatchNorm, ReLU."""
    pad = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, stride, pad, dilation, bias=bias),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def resize_like(x_BDhw: Tensor, target_BDhw: Tensor, *, align_corners: bool = True) -> Tensor:
    """Resize bilinearly to the height and width of `target`."""
    return F.interpolate(x_BDhw, size=target_BDhw.shape[-2:], mode="bilinear", align_corners=align_corners)


def drop_channels(x_BDhw: Tensor, mask_SBD: Tensor) -> Tensor:
    """Drop channels as Dropout2d, with masks (0 or 1 / keep) as an input: [S*B, D, h, w], sample-major."""
    return (x_BDhw * mask_SBD[..., None, None]).flatten(0, 1)


def draw_masks(shape: tuple[int, ...], keep: float, generator: torch.Generator) -> Tensor:
    """Draw masks for `drop_channels`: 1 / keep with probability `keep`, else 0, each entry by itself, with mean 1."""
    return (torch.rand(shape, generator=generator) < keep).float() / keep


def draw_noise(sampling: Sampling, num_samples: int, num_images: int, generator: torch.Generator) -> Tensor:
    """Draw noise_SBL of the distribution that a network declares: dropout masks, or standard normal by its law."""
    shape = (num_samples, num_images, sampling.noise_length)
    if sampling.kind == "dropout":
        return torch.cat([draw_masks((*shape[:2], length), keep, generator) for length, keep in sampling.masks], dim=2)
    if sampling.law == "independent":
        return torch.randn(shape, generator=generator)
    half_SBL = torch.randn((num_samples + 1) // 2, *shape[1:], generator=generator)
    return torch.stack((half_SBL, -half_SBL), dim=1).flatten(0, 1)[:num_samples]


def weighted_sums(x_D: Tensor, weight_OD: Tensor) -> Tensor:
    """Multiply [..., D] by a matrix to [..., O], as multiply and sum: for small matrices on single vectors.

    A matrix product rounds one row alone otherwise than the same row among others. These were the only operations
    of our networks that did, so without them a window's result has the same bytes in every batch on a CPU.
    """
    return (x_D[..., None, :] * weight_OD).sum(-1)


def convolve_pooled(x_BD11: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a bias-free 1x1 convolution to a pooled map."""
    return weighted_sums(x_BD11[:, :, 0, 0], conv.weight[:, :, 0, 0])[:, :, None, None]


class VectorLinear(nn.Linear):
    """nn.Linear for few vectors, with the same bytes for each whatever stands beside it."""

    def forward(self, input: Tensor) -> Tensor:
        # One axis more: behind a sum of three, OpenVINO (2026.4) adds the bias along the wrong one.
        return weighted_sums(input[..., None, :], self.weight)[..., 0, :] + self.bias
