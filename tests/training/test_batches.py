"""Batches hold weak labels of unlabelled frames where a recipe asks for them, and nothing else of their masks."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from penumbra.models.card import IGNORE
from penumbra.models.contract import Views
from penumbra.models.errors import BadOption
from penumbra.training.batches import MIN_BOX_SHARE, MIN_TAG_SHARE, Batches, derive_boxes, derive_tags
from penumbra.training.data import find_data
from penumbra.training.frames import Frames
from tests.training import tiny

SPLIT = (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]))


def _draw(weak_labels: Literal["none", "tags", "boxes"], frames: Frames | None = None) -> Views:
    recipe = replace(tiny.recipe("cps", Path(), steps=1), weak_labels=weak_labels)
    return Batches(frames or _frames(), SPLIT, recipe, torch.Generator().manual_seed(0), num_classes=3).draw()


def _frames() -> Frames:
    frames = find_data("shapes").load(Path(), "train")
    assert isinstance(frames, Frames)
    return frames


def _same(one: Views, other: Views) -> list[bool]:
    """Field by field."""
    pairs = zip(one, other, strict=True)
    return [a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)) for a, b in pairs]


def _label(size: tuple[int, int] = (40, 50)) -> Tensor:
    return torch.zeros(1, *size, dtype=torch.int64)


def test_a_class_is_tagged_from_its_smallest_share_of_the_view_on() -> None:
    label_1hw = _label()
    smallest = round(MIN_TAG_SHARE * label_1hw.numel())
    label_1hw.view(-1)[:smallest], label_1hw.view(-1)[smallest : 2 * smallest - 1] = 1, 2
    assert derive_tags(label_1hw, 4).tolist() == [[1, 1, 0, 0]]


def test_void_pixels_carry_no_tag_and_no_box() -> None:
    label_1hw = _label().fill_(IGNORE)
    assert not derive_tags(label_1hw, 3).any() and not derive_boxes(label_1hw, 3).any()


def test_every_connected_part_has_a_box_of_its_own() -> None:
    label_1hw = _label().fill_(IGNORE)
    label_1hw[0, 2:6, 3:9] = 1
    label_1hw[0, 20, 30:40] = label_1hw[0, 20:30, 30] = 1  # an L: its box is wider than itself
    expected_hw = torch.zeros(40, 50)
    expected_hw[2:6, 3:9] = expected_hw[20:30, 30:40] = 1
    boxes_1Khw = derive_boxes(label_1hw, 2)
    assert torch.equal(boxes_1Khw[0, 1].sign(), expected_hw) and not boxes_1Khw[0, 0].any()
    assert (boxes_1Khw[0, 1, 3, 5], boxes_1Khw[0, 1, 25, 35]) == (1, 2)


def test_parts_that_touch_at_a_corner_share_a_box() -> None:
    label_1hw = _label().fill_(IGNORE)
    label_1hw[0, 2:4, 2:4] = label_1hw[0, 4:6, 4:6] = 0
    assert derive_boxes(label_1hw, 1).sum() == 16


def test_overlapping_boxes_keep_their_channels() -> None:
    label_1hw = _label()
    label_1hw[0, 10:20, 10:20] = 1
    boxes_1Khw = derive_boxes(label_1hw, 2)
    assert boxes_1Khw[0, 0].all() and boxes_1Khw[0, 1].count_nonzero() == 100


def test_a_crumb_has_no_box() -> None:
    label_1hw = _label((100, 100)).fill_(IGNORE)
    label_1hw[0, 0, : round(MIN_BOX_SHARE * label_1hw.numel()) - 1] = 0
    assert not derive_boxes(label_1hw, 1).any()


def test_views_carry_what_the_recipe_asks_for_and_nothing_else() -> None:
    plain, tagged, boxed = _draw("none"), _draw("tags"), _draw("boxes")
    assert plain.tags_BK is None and plain.boxes_BKhw is None and plain.label_boxes_BKhw is None
    assert tagged.tags_BK is not None and tagged.tags_BK.shape == (2, 3) and tagged.boxes_BKhw is None
    assert boxed.boxes_BKhw is not None and boxed.boxes_BKhw.shape == (2, 3, 48, 64) and boxed.tags_BK is None
    assert boxed.label_boxes_BKhw is not None and boxed.label_boxes_BKhw.shape == (3, 3, 48, 64)
    assert all(_same(plain, tagged)[:6]) and all(_same(plain, boxed)[:6])


def test_boxes_of_labelled_views_lie_round_their_labels() -> None:
    views = _draw("boxes")
    assert views.label_boxes_BKhw is not None
    assert torch.equal(views.label_boxes_BKhw, derive_boxes(views.label_Bhw, 3))
    disc_Bhw = views.label_Bhw == 1
    assert disc_Bhw.any() and (views.label_boxes_BKhw[:, 1][disc_Bhw] > 0).all()


@pytest.mark.parametrize("kind", ["none", "tags"])
def test_pixels_of_a_hidden_mask_that_keep_the_tags_change_nothing(kind: Literal["none", "tags"]) -> None:
    frames = _frames()
    label_NHW = frames.label_NHW.clone()
    label_NHW[3:] = label_NHW[3:].where(label_NHW[3:] != 0, torch.tensor(IGNORE, dtype=torch.uint8))
    label_NHW[3:, :, :20] = 0  # other pixels, void ones among them, of the same classes
    label_NHW[3:, 2:10, 2:20], label_NHW[3:, 12:20, 2:20] = 1, 2
    changed = Frames(frames.names, frames.image_N3HW, label_NHW)
    assert all(_same(_draw(kind), _draw(kind, changed)))


def test_pixels_of_a_hidden_mask_that_keep_its_boxes_change_nothing() -> None:
    frames = _frames()
    label_NHW = torch.full_like(frames.label_NHW, IGNORE)
    label_NHW[:, 10:30, 10:30] = 1
    whole = Frames(frames.names, frames.image_N3HW, label_NHW)
    hollow = Frames(frames.names, frames.image_N3HW, label_NHW.clone())
    hollow.label_NHW[3:, 15:25, 15:25] = IGNORE
    assert all(_same(_draw("boxes", whole), _draw("boxes", hollow)))
    hollow.label_NHW[3:, 10:13] = IGNORE  # now the boxes differ, and are seen to
    assert _same(_draw("boxes", whole), _draw("boxes", hollow)).count(False) == 1


def test_corruptions_and_foreign_objects_spoil_the_strong_views_alone() -> None:
    recipe = tiny.recipe("cps", Path(), steps=1, batch=12)
    recipe = replace(recipe, objective={"kind": "distilled"}, corruptions=("fog", "darken"))
    plain, spoilt, again = (
        Batches(_frames(), SPLIT, chosen, torch.Generator().manual_seed(0), num_classes=3).draw()
        for chosen in (replace(recipe, corruptions=()), recipe, recipe)
    )
    assert all(_same(spoilt, again))
    for field in ("label_Bhw", "weak_B3hw", "inside_Bhw"):  # the labelled pictures' colours are drawn later
        assert torch.equal(getattr(plain, field), getattr(spoilt, field))
    changed_B = (plain.strong_B3hw - spoilt.strong_B3hw).abs().amax((1, 2, 3)) > 0.5
    assert 3 <= int(changed_B.sum()) <= 11  # three of four, in the mean


def test_an_unknown_corruption_is_named_beside_the_known_ones() -> None:
    recipe = replace(tiny.recipe("cps", Path(), steps=1), corruptions=("rain",))
    with pytest.raises(BadOption, match="'rain'; known are gaussian_noise, gaussian_blur"):
        Batches(_frames(), SPLIT, recipe, torch.Generator(), num_classes=3)
    recipe = replace(recipe, corruptions=("fog",), unlabelled_batch=0)
    with pytest.raises(BadOption, match="unlabelled_batch is 0 and corruptions are for unlabelled views"):
        Batches(_frames(), SPLIT, recipe, torch.Generator(), num_classes=3)


def test_objects_of_no_class_are_pasted_for_nobody_who_would_call_them_by_the_class_behind_them() -> None:
    recipe = replace(tiny.recipe("cps", Path(), steps=1), corruptions=("fog",))
    for objective, kind in ({}, "None"), ({"kind": "mean_teacher"}, "'mean_teacher'"):
        with pytest.raises(BadOption, match=rf"recipe\.objective\.kind is {kind}, which would call the objects"):
            Batches(_frames(), SPLIT, replace(recipe, objective=objective), torch.Generator(), num_classes=3)
