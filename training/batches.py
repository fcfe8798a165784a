"""Frames to batches: which frames, which views of them, and which weak labels of those."""

from pathlib import Path

import torch
from torch import Tensor

from penumbra.models.card import IGNORE, InputSpec
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.training.augment import cutmix_masks, jitter_color, normalise, random_view
from penumbra.training.data.frames import FrameSet, read_split, split_labelled
from penumbra.training.data.weak import derive_boxes, derive_tags
from penumbra.training.recipe import Recipe


def choose_split(frames: FrameSet, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Indices of the labelled and of the unlabelled frames. Raises BadOption, BadData."""
    if recipe.labelled_list:
        return read_split(Path(recipe.labelled_list), frames)
    labelled, unlabelled = split_labelled(frames, fraction=recipe.labelled_fraction, seed=recipe.seed)
    if (len(labelled) == 0) != (recipe.labelled_batch == 0):
        raise BadOption(
            f"labelled_fraction is {recipe.labelled_fraction} and labelled_batch {recipe.labelled_batch}; "
            "both or neither can be 0"
        )
    if len(labelled) == 0 and recipe.weak_labels == "none":
        raise BadOption("labelled_fraction is 0 and weak_labels is 'none'; there is nothing to learn from")
    return labelled, unlabelled


class Batches:
    """An endless supply of batches; the state of `generator` is the place in the stream."""

    def __init__(
        self,
        frames: FrameSet,
        split: tuple[Tensor, Tensor],
        recipe: Recipe,
        generator: torch.Generator,
        *,
        num_classes: int,
    ) -> None:
        self.frames, self.recipe, self.generator, self.num_classes = frames, recipe, generator, num_classes
        self.labelled, self.unlabelled = split

    def draw(self) -> Views:
        """The next batch. Nothing of the unlabelled frames' masks goes into it but what `weak_labels` names."""
        recipe, generator, spec = self.recipe, self.generator, InputSpec()
        image, label_Bhw, _ = self._views(self.labelled, recipe.labelled_batch)
        plain, hidden_Bhw, inside_Bhw = self._views(self.unlabelled, recipe.unlabelled_batch)
        strong = jitter_color(plain, strength=recipe.strong_jitter, generator=generator)
        views = Views(
            image_B3hw=normalise(jitter_color(image, strength=recipe.jitter, generator=generator), spec),
            label_Bhw=label_Bhw,
            weak_B3hw=normalise(plain, spec),
            strong_B3hw=normalise(strong, spec),
            inside_Bhw=inside_Bhw,
            mix_B1hw=cutmix_masks(recipe.unlabelled_batch, recipe.crop, generator=generator),
        )
        return self._with_weak_labels(views, hidden_Bhw)

    def _with_weak_labels(self, views: Views, hidden_Bhw: Tensor) -> Views:
        """The views with what the recipe takes from the unlabelled frames' masks."""
        if self.recipe.weak_labels == "tags":
            return views._replace(tags_BK=derive_tags(hidden_Bhw, self.num_classes))
        if self.recipe.weak_labels == "boxes":
            return views._replace(
                boxes_BKhw=derive_boxes(hidden_Bhw, self.num_classes),
                label_boxes_BKhw=derive_boxes(views.label_Bhw, self.num_classes),
            )
        return views

    def _views(self, indices: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """image_B3hw, label_Bhw and inside_Bhw (False beyond the picture) of `num` frames out of `indices`."""
        if num == 0:
            none_Bhw = torch.empty(0, *self.recipe.crop)
            return none_Bhw[:, None].expand(-1, 3, -1, -1), none_Bhw.long(), none_Bhw.bool()
        chosen = indices[torch.randint(len(indices), (num,), generator=self.generator)]
        views = [self._view(i) for i in chosen.tolist()]
        image_B3hw, planes_B2hw = (torch.stack(each) for each in zip(*views, strict=True))
        return image_B3hw, planes_B2hw[:, 0], planes_B2hw[:, 1] != IGNORE

    def _view(self, index: int) -> tuple[Tensor, Tensor]:
        """A view of one frame: its mask, and beside it a plane that is IGNORE just beyond the picture."""
        image_3HW, label_HW = self.frames[index]
        planes_2HW, recipe = torch.stack((label_HW, torch.zeros_like(label_HW))), self.recipe
        return random_view(image_3HW, planes_2HW, size=recipe.crop, scale=recipe.scale, generator=self.generator)
