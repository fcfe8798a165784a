"""Make batches of frames: choose the frames, views of them, and weak labels of those.

For frames that count as unlabelled, tags and boxes are all that is ever taken from their masks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.errors import BadData, BadOption
from penumbra.training.augment import cutmix_masks, jitter_color, normalise, random_view
from penumbra.training.corruptions import CORRUPTIONS, SEVERITIES, TRAINING_OBJECTS, paste_object
from penumbra.training.frames import FrameSet, find_listed, find_prefixed
from penumbra.training.recipe import Recipe

MIN_TAG_SHARE = 0.005
"""Share of a view from which on a class is tagged: an annotator would not name what is smaller."""
MIN_BOX_SHARE = 0.0005
"""Share of a view from which on a connected part gets a box; smaller ones are crumbs of a mask cut by the view."""
TOUCHING = np.ones((3, 3), dtype=int)
"""Pixels that touch at a corner belong to one part."""


def choose_split(frames: FrameSet, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Choose the indices of labelled and unlabelled frames (all frames, if every one is labelled), ascending.

    What the recipe leaves out is in neither; it is dropped after the draw, so that the rest is labelled as it is
    without leaving anything out. A fraction of exactly 0 leaves no labels, for methods that live on weak ones. Raises
    BadOption, and BadData where the list of the labelled frames cannot be read, is empty, or names a frame twice or one
    that is not there, where nothing is called as what is left out, and where no frame or no label is left.
    """
    num, fraction = len(frames), recipe.labelled_fraction
    if recipe.labelled_list:
        labelled = find_listed(Path(recipe.labelled_list), frames.names)
    else:
        count = round(fraction * num)
        if not (1 <= count <= num or fraction == 0):
            raise BadOption(f"labelled_fraction {fraction} leaves {count} of {num} frames; at least 1 is needed")
        if (count == 0) != (recipe.labelled_batch == 0):
            raise BadOption(
                f"labelled_fraction is {fraction} and labelled_batch {recipe.labelled_batch}; both or neither can be 0"
            )
        if count == 0 and recipe.weak_labels == "none":
            raise BadOption("labelled_fraction is 0 and weak_labels is 'none'; there is nothing to learn from")
        labelled = torch.randperm(num, generator=torch.Generator().manual_seed(recipe.seed))[:count].tolist()
    left_out = {row for prefix in recipe.leave_out for row in find_prefixed(frames, prefix)}
    used, kept = set(range(num)) - left_out, set(labelled) - left_out
    if not used or (labelled and not kept):
        raise BadData(
            f"leave_out is {', '.join(recipe.leave_out)}; that leaves {len(used)} of {num} frames to train on, and "
            f"{len(kept)} of {len(labelled)} labelled ones"
        )
    return torch.tensor(sorted(kept), dtype=torch.long), torch.tensor(sorted(used - kept or used))


class Batches:
    """An endless supply of batches; the state of `generator` is the place in the stream."""

    def __init__(
        self, frames: FrameSet, split: tuple[Tensor, Tensor], recipe: Recipe, generator: torch.Generator, *,
        num_classes: int,
    ) -> None:  # fmt: skip
        self.frames, self.recipe, self.generator, self.num_classes = frames, recipe, generator, num_classes
        self.labelled, self.unlabelled = split
        if unknown := [kind for kind in recipe.corruptions if kind not in CORRUPTIONS]:
            raise BadOption(f"corruptions has {unknown[0]!r}; known are {', '.join(CORRUPTIONS)}")
        if recipe.corruptions and not recipe.unlabelled_batch:
            raise BadOption("unlabelled_batch is 0 and corruptions are for unlabelled views; leave one of both out")
        if recipe.corruptions and (kind := recipe.objective.get("kind")) != "distilled":
            raise BadOption(
                f"recipe.objective.kind is {kind!r}, which would call the objects that come with corruptions by the "
                "class behind them; 'distilled' is wanted, or no corruptions"
            )

    def draw(self) -> Views:
        """Draw the next batch. Nothing of the unlabelled frames' masks goes into it but what `weak_labels` names."""
        recipe, generator, spec = self.recipe, self.generator, self.recipe.input
        image, label_Bhw, _ = self._views(self.labelled, recipe.labelled_batch)
        plain, hidden_Bhw, inside_Bhw = self._views(self.unlabelled, recipe.unlabelled_batch)
        strong = jitter_color(plain, strength=recipe.strong_jitter, generator=generator)
        if recipe.corruptions:
            strong = torch.stack([spoil(image_3hw, recipe.corruptions, generator) for image_3hw in strong])
        weak_labels: dict[str, Any] = {}
        if recipe.weak_labels == "tags":
            weak_labels["tags_BK"] = derive_tags(hidden_Bhw, self.num_classes)
        elif recipe.weak_labels == "boxes":
            weak_labels["boxes_BKhw"] = derive_boxes(hidden_Bhw, self.num_classes)
            weak_labels["label_boxes_BKhw"] = derive_boxes(label_Bhw, self.num_classes)
        return Views(
            image_B3hw=normalise(jitter_color(image, strength=recipe.jitter, generator=generator), spec),
            label_Bhw=label_Bhw,
            weak_B3hw=normalise(plain, spec),
            strong_B3hw=normalise(strong, spec),
            inside_Bhw=inside_Bhw,
            mix_B1hw=cutmix_masks(recipe.unlabelled_batch, recipe.crop, generator=generator),
            **weak_labels,
        )

    def labelled_frames(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give every labelled frame whole and as it is: image_13HW, normalised, and label_1HW."""
        for i in self.labelled.tolist():
            image_3HW, label_HW, *_ = self.frames[i]
            yield normalise(image_3HW[None].float() / 255, self.recipe.input), label_HW[None].long()

    def _views(self, indices: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw image_B3hw, label_Bhw and inside_Bhw (False beyond the picture) of `num` frames out of `indices`."""
        recipe, generator = self.recipe, self.generator
        if num == 0:
            none_Bhw = torch.empty(0, *recipe.crop)
            return none_Bhw[:, None].expand(-1, 3, -1, -1), none_Bhw.long(), none_Bhw.bool()
        views = []
        for i in indices[torch.randint(len(indices), (num,), generator=generator)].tolist():
            image_3HW, label_HW, *_ = self.frames[i]
            planes_2HW = torch.stack((label_HW, torch.zeros_like(label_HW)))  # the second is IGNORE beyond the picture
            views.append(random_view(image_3HW, planes_2HW, size=recipe.crop, scale=recipe.scale, generator=generator))
        image_B3hw, planes_B2hw = (torch.stack(each) for each in zip(*views, strict=True))
        return image_B3hw, planes_B2hw[:, 0], planes_B2hw[:, 1] != IGNORE


def derive_tags(label_Bhw: Tensor, num_classes: int) -> Tensor:
    """Return tags_BK float32: 1 for a class that covers at least `MIN_TAG_SHARE` of the view."""
    area_BK = torch.stack([(label_Bhw == k).sum((1, 2)) for k in range(num_classes)], dim=1)
    return (area_BK >= MIN_TAG_SHARE * label_Bhw[0].numel()).float()


def derive_boxes(label_Bhw: Tensor, num_classes: int) -> Tensor:
    """Return boxes_BKhw float32: inside the bounding box of a connected part of class k its number, else 0.

    Each view is numbered from 1. Boxes may overlap; of one class, the last is seen.
    """
    boxes_BKhw = torch.zeros(len(label_Bhw), num_classes, *label_Bhw.shape[1:])
    for boxes_Khw, label_hw in zip(boxes_BKhw, label_Bhw.numpy(), strict=True):
        number = 0
        for k in np.unique(label_hw[label_hw < num_classes]).tolist():
            part_hw, num_parts = ndimage.label(label_hw == k, structure=TOUCHING)
            areas = np.bincount(part_hw.ravel(), minlength=num_parts + 1)[1:]
            boxes = ndimage.find_objects(part_hw)
            for i in np.flatnonzero(areas >= MIN_BOX_SHARE * label_hw.size):
                number += 1
                boxes_Khw[(k, *boxes[i])] = number
    return boxes_BKhw


def spoil(image_3hw: Tensor, kinds: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Paste a foreign object into every other picture, by chance, and corrupt every other by one of the kinds."""
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    image_hw3 = (255 * image_3hw).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if rng.random() < 0.5:
        void_hw = np.zeros(image_hw3.shape[:2], np.uint8)
        image_hw3, _, _ = paste_object(image_hw3, void_hw, rng, objects=TRAINING_OBJECTS)
    if rng.random() < 0.5:
        image_hw3 = CORRUPTIONS[rng.choice(kinds)](image_hw3, int(rng.choice(SEVERITIES)), rng)
    return torch.from_numpy(image_hw3).permute(2, 0, 1).float() / 255
