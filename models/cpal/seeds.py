"""From class activation maps to image-specific maps: seeds, prototypes, reactivation (SIPE, Chen et al. 2022, sec. 3).

Maps of K classes have the background first, if there is one. Everything here wants float32 or wider, and knows no
image-level labels but those that have masked the maps that come in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
"""Beside the maximum of a map and the length of a feature, as in the released code."""
TINY = 1e-12
"""Keeps 0 / 0 of a pixel without any feature finite; changes nothing else."""
BACKGROUND_WEIGHT = 0.5
"""Weight of the background's overlap when classes compete for a pixel, as in the released code."""


def normalise_cam(raw_BNhw: Tensor) -> Tensor:
    """M_BKhw in [0, 1]: ReLU, each class over its maximum, and 1 - max over classes as the background."""
    cam = divide_by_maximum(F.relu(raw_BNhw))
    return torch.cat((1 - cam.amax(1, keepdim=True), cam), dim=1)


def divide_by_maximum(maps: Tensor) -> Tensor:
    """Each map [..., h, w] over its own largest value."""
    return maps / (maps.amax((-2, -1), keepdim=True) + EPS)


def overlap(cam_BKhw: Tensor, feature_BDhw: Tensor, first_weight: float = BACKGROUND_WEIGHT) -> Tensor:
    """IoU_BKhw, times a weight for the first class, between every pixel's affinity map and every class's map.

    A = ReLU(f^T f) of unit features; IoU_ki = sum_j A_ij M_kj / (sum_j A_ij + sum_j M_kj - sum_j A_ij M_kj). The sums
    of all classes are one matrix product: memory is (hw)^2, where the plain form takes K (hw)^2.
    """
    unit_BDp = unit_length(feature_BDhw).flatten(2)
    affinity_Bpp = F.relu(unit_BDp.transpose(1, 2) @ unit_BDp)
    cam_BKp = cam_BKhw.flatten(2)
    both_BKp = cam_BKp @ affinity_Bpp
    either_BKp = affinity_Bpp.sum(1, keepdim=True) + cam_BKp.sum(2, keepdim=True) - both_BKp
    iou_BKp = both_BKp / either_BKp.clamp_min(TINY)
    iou_BKp = torch.cat((first_weight * iou_BKp[:, :1], iou_BKp[:, 1:]), dim=1)
    return iou_BKp.unflatten(2, cam_BKhw.shape[2:])


def unit_length(feature_BDhw: Tensor) -> Tensor:
    """Features of length 1 over the channels."""
    return feature_BDhw / (feature_BDhw.norm(dim=1, keepdim=True) + EPS)


def choose_seeds(iou_BKhw: Tensor) -> Tensor:
    """seeds_BKhw, 1 at the class whose map overlaps most with a pixel's affinity."""
    return F.one_hot(iou_BKhw.argmax(1), iou_BKhw.shape[1]).movedim(-1, 1).to(iou_BKhw.dtype)


def gather_prototypes(seeds_BKhw: Tensor, feature_BDhw: Tensor) -> Tensor:
    """prototypes_BKD: mean over all pixels of seed times feature; zero for a class without a seed."""
    seeds_BKp, feature_BDp = seeds_BKhw.flatten(2), feature_BDhw.flatten(2)
    return seeds_BKp @ feature_BDp.transpose(1, 2) / seeds_BKp.shape[2]


def reactivate(feature_BDhw: Tensor, prototypes_BKD: Tensor) -> Tensor:
    """IS-CAM_BKhw = ReLU(cos(feature, prototype)); 0 for a zero prototype."""
    unit_BKD, unit_BDhw = F.normalize(prototypes_BKD, dim=2, eps=1e-8), F.normalize(feature_BDhw, dim=1, eps=1e-8)
    return F.relu(unit_BKD @ unit_BDhw.flatten(2)).unflatten(2, feature_BDhw.shape[2:])
