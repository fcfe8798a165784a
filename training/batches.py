"""Frames to batches: which frames, which views of them, and which weak labels of those."""

import torch
from torch import Tensor

from models.card import IGNORE, InputSpec
from models.contract import Views
from training.augment import cutmix_masks, jitter_color, normalise, random_view
from training.data.frames import Frames
from training.data.weak import derive_boxes, derive_tags
from training.recipe import Recipe


class Batches:
    """An endless supply of batches; the state of `generator` is the place in the stream."""

    def __init__(
        self,
        frames: Frames,
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
        chosen = indices[torch.randint(len(indices), (num,), generator=self.generator)]
        views = [self._view(i) for i in chosen.tolist()]
        image_B3hw, planes_B2hw = (torch.stack(each) for each in zip(*views, strict=True))
        return image_B3hw, planes_B2hw[:, 0], planes_B2hw[:, 1] != IGNORE

    def _view(self, index: int) -> tuple[Tensor, Tensor]:
        """A view of one frame: its mask, and beside it a plane that is IGNORE just beyond the picture."""
        label_HW = self.frames.label_NHW[index]
        planes_2HW = torch.stack((label_HW, torch.zeros_like(label_HW)))
        recipe, image_3HW = self.recipe, self.frames.image_N3HW[index]
        return random_view(image_3HW, planes_2HW, size=recipe.crop, scale=recipe.scale, generator=self.generator)
