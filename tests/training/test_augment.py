"""Views keep picture and mask aligned, and draw from no generator but the one they are given."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import IGNORE, InputSpec
from penumbra.training.augment import cutmix_masks, jitter_color, normalise, random_view
from penumbra.training.hosts import IMAGENET_INPUT

SIZE = (48, 64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _picture() -> tuple[Tensor, Tensor]:
    """A white disc of label 1 on black ground of label 0."""
    rows, columns = torch.arange(40)[:, None], torch.arange(60)[None]
    label_HW = ((rows - 15) ** 2 + (columns - 40) ** 2 < 100).to(torch.uint8)
    return (255 * label_HW).expand(3, -1, -1), label_HW


@pytest.mark.parametrize("seed", range(8))
def test_picture_and_mask_stay_aligned_through_scale_crop_and_flip(seed: int) -> None:
    image_3hw, label_hw = random_view(*_picture(), size=SIZE, scale=(0.5, 1.5), generator=_generator(seed))
    assert image_3hw.shape == (3, *SIZE) and label_hw.shape == SIZE
    label = label_hw[None, None].float()
    flat = F.max_pool2d(label, 5, 1, 2) == -F.max_pool2d(-label, 5, 1, 2)  # away from every edge
    known = flat[0, 0] & (label_hw != IGNORE)
    assert known.any() and torch.allclose(image_3hw[0][known], label_hw[known].float(), atol=1e-5)


def test_a_view_wider_than_the_picture_is_grey_and_ignored_beyond_it() -> None:
    image_3hw, label_hw = random_view(*_picture(), size=(80, 120), scale=(1, 1), generator=_generator())
    assert (label_hw != IGNORE).sum() == 40 * 60
    assert (image_3hw[:, label_hw == IGNORE] == 128 / 255).all()


def test_views_are_a_function_of_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (random_view(*_picture(), size=SIZE, scale=(0.5, 1.5), generator=_generator(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())


def test_colour_jitter_of_strength_zero_changes_nothing() -> None:
    image_B3hw = torch.rand(2, 3, 5, 5, generator=_generator())
    assert torch.allclose(jitter_color(image_B3hw, strength=0.0, generator=_generator()), image_B3hw, atol=1e-6)


def test_colour_jitter_stays_in_range_and_differs_by_picture() -> None:
    image_B3hw = torch.rand(1, 3, 5, 5, generator=_generator()).expand(2, -1, -1, -1)
    jittered = jitter_color(image_B3hw, strength=0.5, generator=_generator())
    assert jittered.min() >= 0 and jittered.max() <= 1 and not torch.equal(jittered[0], jittered[1])


def test_cutmix_boxes_cover_some_but_at_most_half_of_a_picture() -> None:
    share_B = cutmix_masks(32, (64, 80), generator=_generator()).float().mean((1, 2, 3))
    assert share_B.min() > 0 and share_B.max() <= 0.52  # rounding of three boxes to whole pixels


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    spec = InputSpec()
    image_B3hw = torch.tensor(spec.mean)[None, :, None, None].expand(1, 3, 2, 2)
    assert torch.equal(normalise(image_B3hw, spec), torch.zeros(1, 3, 2, 2))


def test_normalise_follows_the_cards_order_of_bands_and_its_scale() -> None:
    image_B3hw = torch.tensor([51.0, 102.0, 204.0])[None, :, None, None] / 255
    spec = InputSpec(mean=(0, 1, 2), std=(1, 2, 4), scale=51.0, order="BGR")
    assert torch.allclose(normalise(image_B3hw, spec)[0, :, 0, 0], torch.tensor([4.0, 0.5, -0.25]))


def test_what_the_weights_of_imagenet_saw_is_the_value_minus_127_over_128() -> None:
    values = torch.arange(256.0).expand(1, 3, 1, -1)
    assert torch.allclose(normalise(values / 255, IMAGENET_INPUT), (values - 127) / 128, atol=1e-6)
