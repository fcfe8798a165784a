"""Weak labels derived from masks: which classes a view shows (tags), and boxes round their parts.

For frames that count as unlabelled these are all that is ever taken from their masks.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

MIN_TAG_SHARE = 0.005
"""Share of a view from which on a class is tagged: an annotator would not name what is smaller."""
MIN_BOX_SHARE = 0.0005
"""Share of a view from which on a connected part gets a box; smaller ones are crumbs of a mask cut by the view."""
TOUCHING = np.ones((3, 3), dtype=int)
"""Pixels that touch at a corner belong to one part."""


def derive_tags(label_Bhw: Tensor, num_classes: int) -> Tensor:
    """tags_BK float32: 1 for a class that covers at least `MIN_TAG_SHARE` of the view."""
    area_BK = torch.stack([(label_Bhw == k).sum((1, 2)) for k in range(num_classes)], dim=1)
    return (area_BK >= MIN_TAG_SHARE * label_Bhw[0].numel()).float()


def derive_boxes(label_Bhw: Tensor, num_classes: int) -> Tensor:
    """boxes_BKhw float32: 1 inside the bounding box of a connected part of class k; boxes of classes may overlap."""
    boxes_BKhw = torch.zeros(len(label_Bhw), num_classes, *label_Bhw.shape[1:])
    for boxes_Khw, label_hw in zip(boxes_BKhw, label_Bhw.numpy(), strict=True):
        for k in np.unique(label_hw[label_hw < num_classes]).tolist():
            for rows, columns in find_boxes(label_hw == k):
                boxes_Khw[k, rows, columns] = 1
    return boxes_BKhw


def find_boxes(inside_hw: np.ndarray) -> list[tuple[slice, slice]]:
    """Rows and columns of the bounding box of every part that is large enough."""
    part_hw, num_parts = ndimage.label(inside_hw, structure=TOUCHING)
    area = np.bincount(part_hw.ravel(), minlength=num_parts + 1)[1:]
    boxes = zip(ndimage.find_objects(part_hw), area, strict=True)
    return [box for box, pixels in boxes if pixels >= MIN_BOX_SHARE * inside_hw.size]
