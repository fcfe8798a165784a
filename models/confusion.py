"""Answered classes against true ones: counts of pixels, and the intersection over union that they give."""

import torch
from torch import Tensor

from penumbra.models.card import IGNORE


def confusion(answered: Tensor, truth: Tensor, *, num_classes: int) -> Tensor:
    """Return counts_KK[truth, answer] of the pixels that have a label; both tensors hold class ids, in one shape."""
    known = truth != IGNORE
    pairs = truth[known].long() * num_classes + answered[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(confusion_KK: Tensor) -> Tensor:
    """Return IoU_K, float64; NaN for a class that is neither in the truth nor in the answer."""
    hits_K = confusion_KK.diag().double()
    return hits_K / (confusion_KK.sum(0) + confusion_KK.sum(1) - hits_K)
