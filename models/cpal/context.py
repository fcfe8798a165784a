"""Context-aware maps: features are compared with prototypes of other images (CPAL, Tang et al. 2024).

Rebuilt from the paper's description, for no code of it is published. N foreground classes, P context
prototypes p_i of each class, all in the D channels of the projection head v:

    instance prototype   P_n = mean of v(feature) where M_n > tau, moved by the class's shift delta_n
    positiveness         w_ni = softmax_i(scale * P_n . p_ni)                 over the P candidates
    PACAM                M'_n(j) = ReLU(sum over the top K of w_ni cos(f_j + delta_n, p_ni))

OURS, where the record is open: the values of tau, P, K and scale, the softmax, and that the top K are weighted by their
share among themselves.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from penumbra.models.cpal.config import CpalConfig

EPS = 1e-8
"""Shortest length that a cosine divides by."""


class Context(nn.Module):
    """The projection head v, and what a support bank left behind: context_centres_NPD and shift_ND.

    Both are filled by `adopt`, from `penumbra.models.cpal.bank.summarise`.
    """

    def __init__(self, config: "CpalConfig", channels: int) -> None:
        super().__init__()
        num_foreground, length = config.num_foreground, config.context_channels
        self.threshold, self.scale = config.instance_threshold, config.positiveness_scale
        self.neighbours = min(config.neighbours, config.context)
        self.project = nn.Conv2d(channels, length, 1, bias=False)
        self.context_centres = nn.Buffer(torch.zeros(num_foreground, config.context, length))
        self.shift = nn.Buffer(torch.zeros(num_foreground, length))

    def forward(self, feature_BDhw: Tensor, cam_BNhw: Tensor) -> Tensor:
        """PACAM_BNhw of the foreground classes, from hierarchical features and their CAM."""
        projected_BDhw = self.project(feature_BDhw)
        instances_BND = gather_instances(projected_BDhw, cam_BNhw, self.threshold)
        weights_BNP = positiveness(instances_BND + self.shift, self.context_centres, self.scale)
        weights_BNP = keep_neighbours(weights_BNP, self.neighbours)
        return activate(projected_BDhw, self.context_centres, weights_BNP, self.shift)

    def instances(self, feature_BDhw: Tensor, cam_BNhw: Tensor) -> Tensor:
        """instances_BND as a support bank takes them, not shifted."""
        return gather_instances(self.project(feature_BDhw), cam_BNhw, self.threshold)

    @torch.no_grad()
    def adopt(self, context_centres_NPD: Tensor, shift_ND: Tensor) -> None:
        """Take over a bank's summary. Changes the buffers; training calls it between steps."""
        self.context_centres.copy_(context_centres_NPD)
        self.shift.copy_(shift_ND)


def gather_instances(projected_BDhw: Tensor, cam_BNhw: Tensor, threshold: float) -> Tensor:
    """instances_BND: mean of the features where the class's CAM is above the threshold; zero where it never is."""
    inside_BNp = (cam_BNhw > threshold).to(projected_BDhw.dtype).flatten(2)
    sums_BND = inside_BNp @ projected_BDhw.flatten(2).transpose(1, 2)
    return sums_BND / inside_BNp.sum(2, keepdim=True).clamp_min(1)


def positiveness(instances_BND: Tensor, centres_NPD: Tensor, scale: float) -> Tensor:
    """w_BNP: how much each context prototype resembles its class's instance; sums to 1 over the candidates."""
    return torch.softmax(scale * (instances_BND[:, :, None] * centres_NPD).sum(-1), dim=-1)


def keep_neighbours(weights_BNP: Tensor, count: int) -> Tensor:
    """The `count` largest weights (and those equal to the last of them), over their sum; the others are 0."""
    kept = weights_BNP * (weights_BNP >= weights_BNP.topk(count, dim=2).values[..., -1:])
    return kept / kept.sum(2, keepdim=True)


def activate(projected_BDhw: Tensor, centres_NPD: Tensor, weights_BNP: Tensor, shift_ND: Tensor) -> Tensor:
    """PACAM_BNhw. The weighted sum of cosines is linear in the unit prototypes, so they are summed first."""
    mixed_BND = (weights_BNP[..., None] * F.normalize(centres_NPD, dim=2, eps=EPS)).sum(2)
    feature_BDp = projected_BDhw.flatten(2)
    dots_BNp = mixed_BND @ feature_BDp + (mixed_BND * shift_ND).sum(2, keepdim=True)
    square_BNp = feature_BDp.square().sum(1, keepdim=True) + 2 * (shift_ND @ feature_BDp)
    square_BNp = square_BNp + shift_ND.square().sum(1, keepdim=True)
    return F.relu(dots_BNp / square_BNp.clamp_min(EPS**2).sqrt()).unflatten(2, projected_BDhw.shape[2:])
