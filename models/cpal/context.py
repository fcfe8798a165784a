"""Context-aware maps: features are compared with prototypes of other images (CPAL, Tang et al. 2024).

Rebuilt from the paper's description, for no code of it is published. N foreground classes, P context
prototypes p_i of each class, all in the D channels of the projection head v:

    instance prototype   P_n = mean of v(feature) where M_n > tau, moved by the class's shift delta_n
    positiveness         w_ni = softmax_i(scale * P_n . p_ni)                 over the P candidates
    PACAM                M'_n(j) = ReLU(sum over the top K of w_ni cos(f_j + delta_n, p_ni))

In training a support bank holds instance prototypes of training images; its summary are the context prototypes and the
shifts. One thread pushes, `summarise` reads, and `Context.adopt` takes the summary into the network.

OURS, where the record is open: the values of tau, P, K and scale, the softmax, that the top K are weighted by their
share among themselves, and that the bank's size is per class.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.models.cpal.config import CpalConfig
from penumbra.models.errors import BadData

EPS = 1e-8
"""Shortest length that a cosine divides by."""
BANK_SIZE = 1000
"""Instance prototypes that are kept (the paper's size)."""
MAX_ROUNDS = 100
"""Rounds of k-means; it stops earlier when no row changes its cluster."""


class Context(nn.Module):
    """The projection head v, and what a support bank left behind: context_centres_NPD and shift_ND."""

    def __init__(self, config: CpalConfig, channels: int) -> None:
        super().__init__()
        num_foreground, length = config.num_foreground, config.context_channels
        self.threshold, self.scale = config.instance_threshold, config.positiveness_scale
        self.neighbours = min(config.neighbours, config.context)
        self.project = nn.Conv2d(channels, length, 1, bias=False)
        self.context_centres = nn.Buffer(torch.zeros(num_foreground, config.context, length))
        self.shift = nn.Buffer(torch.zeros(num_foreground, length))

    def forward(self, feature_BDhw: Tensor, cam_BNhw: Tensor) -> Tensor:
        """Draw PACAM_BNhw of the foreground classes, from hierarchical features and their CAM."""
        projected_BDhw = self.project(feature_BDhw)
        instances_BND = gather_instances(projected_BDhw, cam_BNhw, self.threshold)
        weights_BNP = positiveness(instances_BND + self.shift, self.context_centres, self.scale)
        weights_BNP = keep_neighbours(weights_BNP, self.neighbours)
        return activate(projected_BDhw, self.context_centres, weights_BNP, self.shift)

    def instances(self, feature_BDhw: Tensor, cam_BNhw: Tensor) -> Tensor:
        """Return instances_BND as a support bank takes them, not shifted."""
        return gather_instances(self.project(feature_BDhw), cam_BNhw, self.threshold)

    @torch.no_grad()
    def adopt(self, context_centres_NPD: Tensor, shift_ND: Tensor) -> None:
        """Take over a bank's summary. Changes the buffers; training calls it between steps."""
        self.context_centres.copy_(context_centres_NPD)
        self.shift.copy_(shift_ND)


def gather_instances(projected_BDhw: Tensor, cam_BNhw: Tensor, threshold: float) -> Tensor:
    """Return instances_BND: mean feature where the class's CAM is above the threshold; zero where it never is."""
    inside_BNp = (cam_BNhw > threshold).to(projected_BDhw.dtype).flatten(2)
    sums_BND = inside_BNp @ projected_BDhw.flatten(2).transpose(1, 2)
    return sums_BND / inside_BNp.sum(2, keepdim=True).clamp_min(1)


def positiveness(instances_BND: Tensor, centres_NPD: Tensor, scale: float) -> Tensor:
    """Return w_BNP: how much each context prototype resembles its class's instance; sums to 1 over the candidates."""
    return torch.softmax(scale * (instances_BND[:, :, None] * centres_NPD).sum(-1), dim=-1)


def keep_neighbours(weights_BNP: Tensor, count: int) -> Tensor:
    """Keep the `count` largest weights (and those equal to the last of them), over their sum; the others are 0."""
    kept = weights_BNP * (weights_BNP >= weights_BNP.topk(count, dim=2).values[..., -1:])
    return kept / kept.sum(2, keepdim=True)


def activate(projected_BDhw: Tensor, centres_NPD: Tensor, weights_BNP: Tensor, shift_ND: Tensor) -> Tensor:
    """Draw PACAM_BNhw. The weighted sum of cosines is linear in the unit prototypes, so they are summed first."""
    mixed_BND = (weights_BNP[..., None] * F.normalize(centres_NPD, dim=2, eps=EPS)).sum(2)
    feature_BDp = projected_BDhw.flatten(2)
    dots_BNp = mixed_BND @ feature_BDp + (mixed_BND * shift_ND).sum(2, keepdim=True)
    square_BNp = feature_BDp.square().sum(1, keepdim=True) + 2 * (shift_ND @ feature_BDp)
    square_BNp = square_BNp + shift_ND.square().sum(1, keepdim=True)
    return F.relu(dots_BNp / square_BNp.clamp_min(EPS**2).sqrt()).unflatten(2, projected_BDhw.shape[2:])


class SupportBank:
    """The last `size` instance prototypes of every foreground class n, oldest first: rows[n]_RD."""

    def __init__(self, num_foreground: int, channels: int, size: int = BANK_SIZE) -> None:
        self.rows = [torch.empty(0, channels) for _ in range(num_foreground)]
        self._size = size

    def push(self, instances_BND: Tensor, present_BN: Tensor) -> None:
        """Append the instances of the classes that are present, image by image. Detached and kept on the CPU."""
        instances = instances_BND.detach().float().cpu()
        for n, present_B in enumerate((present_BN > 0).cpu().unbind(1)):
            self.rows[n] = torch.cat((self.rows[n], instances[present_B, n]))[-self._size :]


def summarise(bank: SupportBank, num_prototypes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Summarise a bank as context_centres_NPD and shift_ND; the generator is of the CPU.

    delta_n = mean over i, q of (p_i - P_nq): from the mean instance to the mean context prototype.
    Raises BadData when a class has fewer instances than prototypes.
    """
    centres, shifts = [], []
    for n, rows_RD in enumerate(bank.rows):
        if len(rows_RD) < num_prototypes:
            raise BadData(f"class {n + 1} has {len(rows_RD)} instances in the bank; {num_prototypes} are wanted")
        centres_PD = cluster(rows_RD, num_prototypes, generator)
        centres.append(centres_PD)
        shifts.append(centres_PD.mean(0) - rows_RD.mean(0))
    return torch.stack(centres), torch.stack(shifts)


def cluster(rows_RD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Find centroids [count, D] by k-means (Lloyd) from k-means++ seeds; equal generator states give equal bytes."""
    centres_PD = scatter_seeds(rows_RD, count, generator)
    nearest_R = torch.cdist(rows_RD, centres_PD).argmin(1)
    for _ in range(MAX_ROUNDS):
        centres_PD = _means(rows_RD, nearest_R, centres_PD)
        before, nearest_R = nearest_R, torch.cdist(rows_RD, centres_PD).argmin(1)
        if torch.equal(before, nearest_R):
            break
    return centres_PD


def scatter_seeds(rows_RD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw seeds by k-means++, every next one in proportion to its squared distance from those before."""
    chosen = [rows_RD[int(torch.randint(len(rows_RD), (1,), generator=generator))]]
    for _ in range(count - 1):
        distance_R = torch.cdist(rows_RD, torch.stack(chosen)).amin(1).square()
        chance_R = distance_R if bool(distance_R.sum() > 0) else torch.ones_like(distance_R)
        chosen.append(rows_RD[int(torch.multinomial(chance_R, 1, generator=generator))])
    return torch.stack(chosen)


def _means(rows_RD: Tensor, nearest_R: Tensor, centres_PD: Tensor) -> Tensor:
    """Average every cluster's rows; an empty cluster stays where it was."""
    sums_PD = torch.zeros_like(centres_PD).index_add(0, nearest_R, rows_RD)
    counts_P1 = torch.bincount(nearest_R, minlength=len(centres_PD))[:, None]
    return torch.where(counts_P1 > 0, sums_PD / counts_P1.clamp_min(1), centres_PD)
