"""Rendering: class ids and colours survive the picture formats, and an Accept header never fails unnamed."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.card import Card, ClassInfo
from models.errors import NotAcceptable
from serving.engine.segmenter import Prediction
from serving.render import (
    WRITERS,
    choose_format,
    class_table,
    heat_picture,
    json_bytes,
    label_picture,
    overlay,
    palette,
)
from tests.conftest import toy_card


def card_of(num_classes: int) -> Card:
    classes = tuple(ClassInfo(f"c{k}", (k, 255 - k, (7 * k) % 256)) for k in range(num_classes))
    return dataclasses.replace(toy_card("pointwise")[0], classes=classes)


def prediction(labels_HW: np.ndarray, num_classes: int = 255) -> Prediction:
    values = np.linspace(0, 1, labels_HW.size, dtype=np.float32).reshape(labels_HW.shape)
    maps = {"confidence": values, "entropy": 1 - values}
    return Prediction(card_of(num_classes), 0, 1, 1, (), (), labels_HW.astype(np.uint8), maps, {})


def test_every_class_id_is_its_pixel_value_and_shows_its_colour() -> None:
    labels = np.arange(255).reshape(15, 17)
    picture = label_picture(prediction(labels))
    assert np.array_equal(np.asarray(picture), labels)
    shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert shown.tolist() == [list(info.color) for info in card_of(255).classes]


def test_ids_that_are_no_class_are_black() -> None:
    colors = np.frombuffer(palette(card_of(3)), np.uint8).reshape(256, 3)
    assert not colors[3:].any()


def test_an_overlay_lies_between_image_and_colours() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = np.asarray(overlay(prediction(np.zeros((2, 2))), image, opacity=0.5))
    assert np.abs(shown.astype(int) - (50, 177, 50)).max() <= 1


def test_a_heat_picture_grows_lighter_with_the_value() -> None:
    shown = np.asarray(heat_picture(np.array([[0, 0.25, 0.5, 0.75, 1, 9]], np.float32), top=1.0)).astype(int).sum(-1)[0]
    assert (np.diff(shown)[:4] > 0).all() and shown[4] == shown[5]


def test_the_class_table_has_means_over_each_class_own_pixels() -> None:
    labels = np.array([[0, 0, 2], [2, 2, 2]])
    rows = class_table(prediction(labels, num_classes=3))
    assert [row["id"] for row in rows] == [0, 2]
    assert [row["pixels"] for row in rows] == [2, 4]
    assert [row["share"] for row in rows] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert [row["mean_confidence"] for row in rows] == [pytest.approx(0.1), pytest.approx(0.7)]


def test_json_is_strict() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(json_bytes(prediction(np.zeros((3, 4)), num_classes=1)), parse_constant=refuse)


@given(
    st.text()
    | st.lists(st.sampled_from(("*/*", "image/*", "image/png", ";q=0.5", ";q=nan", ";q=x", ",", ";"))).map("".join)
)
def test_any_accept_header_is_answered_or_refused(accept: str) -> None:
    with suppress(NotAcceptable):
        assert choose_format(accept) in WRITERS
