"""How the pixels of a class are shared out among its prototypes, and how these follow their pixels.

Zhou et al. 2022, sec. 3.2, "within-class online clustering". K classes, M prototypes each, P pixels with a label,
N of them of one class, unit embeddings e_PD. None of this carries a gradient.
"""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def sinkhorn(cosine_NM: Tensor, *, kappa: float, iterations: int) -> Tensor:
    """share_NM of one class's pixels: the solution, for many iterations, of the optimal transport

        max over Q of <Q, cosine> + kappa * H(Q),   every pixel hands out 1,   every prototype gets N / M

    (Cuturi 2013): exp(cosine / kappa) with its columns and rows normalised in turn; pixels come last, and sum to 1
    exactly. In logarithms, so that no kappa underflows.
    """
    log_share_NM = cosine_NM / kappa
    for _ in range(iterations):
        log_share_NM = log_share_NM.log_softmax(0).log_softmax(1)
    return log_share_NM.exp()


@torch.no_grad()
def assign(cosine_PKM: Tensor, label_P: Tensor, *, kappa: float, iterations: int) -> Tensor:
    """place_P = label * M + the prototype of the pixel's own class that it has the largest share in."""
    place_P = torch.zeros_like(label_P)
    for k in range(cosine_PKM.shape[1]):
        mine_P = label_P == k
        share_NM = sinkhorn(cosine_PKM[mine_P, k], kappa=kappa, iterations=iterations)
        place_P[mine_P] = k * cosine_PKM.shape[2] + share_NM.argmax(1)
    return place_P


@torch.no_grad()
def move_prototypes(prototypes_KMD: Tensor, e_PD: Tensor, place_P: Tensor, *, momentum: float) -> None:
    """Set in place p = unit(momentum * p + (1 - momentum) * unit(sum of its pixels)), where a prototype has pixels.

    In a process group the sums go over the pixels of all processes, whose prototypes so stay equal.
    """
    flat_QD = prototypes_KMD.flatten(0, 1)
    sum_QD = torch.zeros_like(flat_QD).index_add_(0, place_P, e_PD.to(flat_QD.dtype))
    count_Q = torch.bincount(place_P, minlength=len(flat_QD))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sum_QD)
        distributed.all_reduce(count_Q)
    moved_QD = F.normalize(momentum * flat_QD + (1 - momentum) * F.normalize(sum_QD, dim=1), dim=1)
    prototypes_KMD.copy_(torch.where(count_Q[:, None] > 0, moved_QD, flat_QD).view_as(prototypes_KMD))
