"""Atrous spatial pyramid pooling (Chen et al. 2017, DeepLabv3)."""

import torch
from torch import Tensor, nn

from penumbra.models.blocks.layers import conv_norm_act, convolve_pooled


class Aspp(nn.Module):
    """x_BDhw -> [B, out_channels, h, w]: every branch normalised alone, the pooled one last, a projection of all."""

    def __init__(self, channels: int, out_channels: int, rates: tuple[int, ...], *, project_kernel: int = 1) -> None:
        super().__init__()
        branches = [conv_norm_act(channels, out_channels, 1)]
        branches += [conv_norm_act(channels, out_channels, 3, dilation=rate) for rate in rates]
        self.branches = nn.ModuleList(branches)
        self.pool = conv_norm_act(channels, out_channels, 1)
        self.project = conv_norm_act(out_channels * (len(rates) + 2), out_channels, project_kernel)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        conv, norm, activate = self.pool
        pooled = activate(norm(convolve_pooled(x_BDhw.mean((2, 3), keepdim=True), conv)))
        pooled = pooled.expand(-1, -1, x_BDhw.shape[2], x_BDhw.shape[3])
        return self.project(torch.cat([branch(x_BDhw) for branch in self.branches] + [pooled], dim=1))
