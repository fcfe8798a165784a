"""Frames to batches: which frames, which views of them."""

import torch
from torch import Tensor

from models.card import IGNORE, InputSpec
from models.contract import Views
from training.augment import cutmix_masks, jitter_color, normalise, random_view
from training.data.frames import Frames
from training.recipe import Recipe


class Batches:
    """An endless supply of batches; the state of `generator` is the place in the stream."""

    def __init__(
        self, frames: Frames, split: tuple[Tensor, Tensor], recipe: Recipe, generator: torch.Generator
    ) -> None:
        self.frames, self.recipe, self.generator = frames, recipe, generator
        self.labelled, self.unlabelled = split

    def draw(self) -> Views:
        """The next batch. Masks of unlabelled frames are never looked at."""
        recipe, generator, spec = self.recipe, self.generator, InputSpec()
        image, label_Bhw = self._views(self.labelled, recipe.labelled_batch)
        plain, beyond_Bhw = self._views(self.unlabelled, recipe.unlabelled_batch, blind=True)
        strong = jitter_color(plain, strength=recipe.strong_jitter, generator=generator)
        return Views(
            image_B3hw=normalise(jitter_color(image, strength=recipe.jitter, generator=generator), spec),
            label_Bhw=label_Bhw,
            weak_B3hw=normalise(plain, spec),
            strong_B3hw=normalise(strong, spec),
            inside_Bhw=beyond_Bhw != IGNORE,
            mix_B1hw=cutmix_masks(recipe.unlabelled_batch, recipe.crop, generator=generator),
        )

    def _views(self, indices: Tensor, num: int, *, blind: bool = False) -> tuple[Tensor, Tensor]:
        """Views of `num` frames out of `indices`. blind: label 0 inside the picture, IGNORE beyond it."""
        chosen = indices[torch.randint(len(indices), (num,), generator=self.generator)]
        views = [
            random_view(
                self.frames.image_N3HW[i],
                torch.zeros_like(self.frames.label_NHW[i]) if blind else self.frames.label_NHW[i],
                size=self.recipe.crop,
                scale=self.recipe.scale,
                generator=self.generator,
            )
            for i in chosen.tolist()
        ]
        return torch.stack([image for image, _ in views]), torch.stack([label for _, label in views])
