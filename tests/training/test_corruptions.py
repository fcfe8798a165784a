"""Corruptions keep a picture's shape and type, grow with severity, and depend on nothing but what they are given."""

import numpy as np
import pytest

from penumbra.models.card import IGNORE
from penumbra.training.corruptions import (
    CORRUPTIONS,
    EVALUATION_OBJECTS,
    SEVERITIES,
    TRAINING_OBJECTS,
    paste_object,
    rescale,
)
from tests.conftest import picture


def scene(height: int = 90, width: int = 120) -> np.ndarray:
    """A picture with edges, surfaces and a gradient, which every corruption changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * (x > width // 2), 2 * y, (x // 11 + y // 13) % 2 * 120 + 40], -1).astype(np.uint8)


def draws(seed: int = 3) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_worse_at_every_severity_and_the_same_of_the_same_draws(name: str) -> None:
    clean = scene()
    apart = []
    for severity in SEVERITIES:
        spoilt = CORRUPTIONS[name](clean, severity, draws())
        assert spoilt.shape == clean.shape and spoilt.dtype == np.uint8
        assert (spoilt == CORRUPTIONS[name](clean, severity, draws())).all()
        apart.append(np.abs(spoilt.astype(int) - clean).mean())
    assert 0.5 < apart[0] < apart[1] < apart[2]
    assert (clean == scene()).all(), "the picture that was given is left as it was"


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 250)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_takes_crops_of_any_size(name: str, size: tuple[int, int]) -> None:
    clean = picture(draws(), *size)
    assert all(CORRUPTIONS[name](clean, severity, draws()).shape == clean.shape for severity in SEVERITIES)


def test_an_object_is_no_larger_than_the_picture() -> None:
    for shape in ((1, 1), (2, 9), (9, 3)):
        pasted, label, object_HW = paste_object(picture(draws(), *shape), np.zeros(shape, np.uint8), draws())
        assert pasted.shape[:2] == label.shape == shape and (label[object_HW] == IGNORE).all()


def test_darkening_and_contrast_are_their_formulas() -> None:
    clean = scene().astype(float)
    mean = clean.mean((0, 1))
    assert np.abs(CORRUPTIONS["darken"](scene(), 2, draws()) - 0.35 * clean).max() <= 0.5 + 1e-3
    assert np.abs(CORRUPTIONS["contrast"](scene(), 3, draws()) - (mean + 0.2 * (clean - mean))).max() <= 0.5 + 1e-3


def test_noise_has_the_standard_deviation_of_its_severity() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    assert (CORRUPTIONS["gaussian_noise"](grey, 2, draws()) - 128.0).std() == pytest.approx(0.08 * 255, rel=0.02)


def test_a_picture_of_one_colour_is_as_sharp_after_any_blur() -> None:
    grey = np.full((40, 50, 3), 77, np.uint8)
    for name in ("gaussian_blur", "motion_blur", "pixelate", "contrast"):
        assert (CORRUPTIONS[name](grey, 3, draws()) == 77).all()


@pytest.mark.parametrize(("factor", "size"), [(2, (180, 240)), (0.5, (45, 60))])
def test_a_rescaled_label_holds_no_class_that_was_not_there(factor: float, size: tuple[int, int]) -> None:
    label = np.where(np.arange(120) < 60, 3, IGNORE).astype(np.uint8) * np.ones((90, 1), np.uint8)
    image, scaled = rescale(scene(), label, factor)
    assert image.shape == (*size, 3) and scaled.shape == size and set(np.unique(scaled)) == {3, IGNORE}


@pytest.mark.parametrize("name", TRAINING_OBJECTS + EVALUATION_OBJECTS)
def test_a_pasted_object_has_no_label_and_the_rest_stays_as_it_was(name: str) -> None:
    image, label = scene(), np.full((90, 120), 2, np.uint8)
    pasted, void, mask = paste_object(image, label, draws(), objects=(name,))
    assert 0.005 < mask.mean() < 0.07 and (void[mask] == IGNORE).all() and (void[~mask] == 2).all()
    assert (pasted[~mask] == image[~mask]).all() and (pasted[mask] != image[mask]).any(-1).mean() > 0.8
    assert (label == 2).all() and (image == scene()).all()


def test_evaluations_paste_nothing_that_training_has_seen() -> None:
    assert not set(TRAINING_OBJECTS) & set(EVALUATION_OBJECTS)


def test_an_object_fits_into_the_smallest_crop() -> None:
    image, label = picture(draws(), 4, 6), np.zeros((4, 6), np.uint8)
    assert paste_object(image, label, draws())[2].any()
