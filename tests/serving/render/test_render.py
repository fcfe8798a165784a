"""Rendering: what is written is read back by others as it was, and an Accept header never fails unnamed."""

import dataclasses
import io
import json
import math
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import transform as move

from penumbra.models.card import IGNORE, Card, ClassInfo, ExtraMap
from penumbra.models.errors import BadOption, NotAcceptable, TooLarge
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import Style, parse_style
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.render import WRITERS, choose_format, render
from penumbra.serving.render.arrays import write_npz, write_tiff
from penumbra.serving.render.pictures import heat_picture, overlay, palette
from penumbra.serving.render.tables import class_table
from tests.conftest import toy_card


def card_of(num_classes: int) -> Card:
    classes = tuple(ClassInfo(f"c{k}", (k, 255 - k, (7 * k) % 256)) for k in range(num_classes))
    return dataclasses.replace(toy_card("pointwise")[0], classes=classes)


def prediction(labels_HW: np.ndarray, num_classes: int = 255) -> Prediction:
    values = np.linspace(0, 1, labels_HW.size, dtype=np.float32).reshape(labels_HW.shape)
    maps = {"confidence": values, "entropy": 1 - values}
    return Prediction(card_of(num_classes), 0, 1, 1, (), (), labels_HW.astype(np.uint8), maps, {})


def patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Labels of 3 classes in patches with holes and single pixels."""
    labels = rng.integers(0, 3, (height // 7 + 1, width // 9 + 1)).repeat(7, 0).repeat(9, 1)[:height, :width].copy()
    labels[rng.random((height, width)) < 0.02] = 1
    return labels


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


TALL = (1100, 40)
"""Of more than two blocks of rows, the last of them not whole."""


def test_every_class_id_is_its_pixel_value_and_shows_its_colour() -> None:
    labels = np.arange(255).reshape(15, 17)
    picture = opened(render(prediction(labels), "image/png", Style()))
    assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
    shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert shown.tolist() == [list(info.color) for info in card_of(255).classes]


def test_a_tall_picture_of_labels_comes_back_pixel_by_pixel(rng: np.random.Generator) -> None:
    labels = patches(rng, *TALL)
    assert np.array_equal(np.asarray(opened(render(prediction(labels, 3), "image/png", Style()))), labels)


def test_ids_that_are_no_class_are_black_and_no_label_has_a_colour_of_its_own() -> None:
    magenta = dataclasses.replace(card_of(2), classes=(ClassInfo("a", (0, 0, 0)), ClassInfo("b", (255, 0, 255))))
    for card in (card_of(3), card_of(255), magenta):
        colors = np.frombuffer(palette(card), np.uint8).reshape(256, 3)
        assert not colors[card.num_classes : IGNORE].any()
        assert colors[IGNORE].tolist() not in [list(info.color) for info in card.classes]


def test_what_has_no_label_is_transparent_in_the_labels_picture() -> None:
    """As PASCAL VOC's background is black, and CamVid's sky grey, no colour would do."""
    labels = np.array([[0, 1, 255], [255, 2, 0]], np.uint8)
    picture = opened(render(prediction(labels, 3), "image/png", Style()))
    assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
    assert np.array_equal(np.asarray(picture.convert("RGBA"))[..., 3], np.where(labels == 255, 0, 255))


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 255)])
def test_what_has_no_label_is_striped_in_an_overlay_as_no_class_can_be(color: tuple[int, int, int]) -> None:
    labels = np.full((1200, 90), 255, np.uint8)
    labels[:, 50:] = 0
    card = dataclasses.replace(card_of(2), classes=(ClassInfo("a", color), ClassInfo("b", (9, 9, 9))))
    image = np.full((*labels.shape, 3), 100, np.uint8)
    answer = dataclasses.replace(prediction(labels), card=card, image=image)
    shown = np.asarray(opened(render(answer, "image/png", Style("overlay")))).astype(int)
    assert (shown[:, 50:] == shown[0, 50]).all()
    tones = np.unique(shown[:, :50].reshape(-1, 3), axis=0)
    assert len(tones) == 2 and (tones[1] - tones[0] > 100).all(), "two tones, far from each other"
    stripes = shown[:, 0, 0]
    assert np.diff(np.flatnonzero(np.diff(stripes))).tolist() == [9] * 132, (
        "even across blocks of rows, 1200 / 128 wide"
    )


def test_an_overlay_lies_between_image_and_colours() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = np.asarray(overlay(dataclasses.replace(prediction(np.zeros((2, 2))), image=image)))
    assert np.abs(shown.astype(int) - (45, 185, 45)).max() <= 1


def test_a_tall_overlay_comes_back_pixel_by_pixel(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (*TALL, 3), dtype=np.uint8)
    answer = dataclasses.replace(prediction(patches(rng, *TALL), 3), image=image)
    picture = opened(render(answer, "image/png", Style("overlay")))
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), overlay(answer))


@pytest.mark.parametrize("levels", [256, 65536])
def test_a_map_of_a_models_own_that_is_below_zero_is_shown_from_its_least_value_on(levels: int) -> None:
    values = np.array([[-20, -10, np.nan, -5]], np.float32)
    card, _ = toy_card("pointwise")
    card = dataclasses.replace(card, extra_maps=(ExtraMap("density", "of pixels", "nats"),))
    made = dataclasses.replace(prediction(np.zeros((1, 4), np.uint8), 3), card=card, maps={"density": values})
    picture = Image.open(io.BytesIO(render(made, "image/png", Style("density", levels=levels))))
    facts, most = json.loads(picture.info["Penumbra"]), 65535 if levels > 256 else 255
    assert (facts["black"], facts["white"]) == (-20, 0)
    found = facts["black"] + np.asarray(picture, float) / most * (facts["white"] - facts["black"])
    np.testing.assert_allclose(found, [[-20, -10, -20, -5]], atol=20 / most)


@pytest.mark.parametrize("levels", [32, 256, 65536])
@pytest.mark.parametrize(("name", "white"), [("confidence", 1.0), ("entropy", math.log(3))])
def test_grey_is_the_value_to_half_a_level_and_the_file_says_what_white_is(
    rng: np.random.Generator, levels: int, name: str, white: float
) -> None:
    values = rng.random(TALL, dtype=np.float32) * np.float32(white)
    answer = dataclasses.replace(prediction(np.zeros(TALL), 3), maps={name: values})
    picture = opened(render(answer, "image/png", Style(name, levels)))
    facts = json.loads(picture.info["Penumbra"])
    assert facts["map"] == name and facts["white"] == pytest.approx(white)
    grey = np.asarray(picture)
    assert grey.dtype == (np.uint16 if levels > 256 else np.uint8) and len(np.unique(grey)) <= levels
    found = grey / (65535 if levels > 256 else 255) * facts["white"]
    assert np.abs(found - values).max() <= white * (0.5 / (levels - 1) + (0.5 / 255 if levels == 32 else 0)) + 1e-6


def test_thirty_two_levels_of_a_smooth_map_take_a_tenth_of_the_bytes(rng: np.random.Generator) -> None:
    y, x = np.mgrid[0:600, 0:600] / 600
    smooth = (0.5 + 0.4 * np.sin(5 * x) * np.cos(7 * y) + 0.001 * rng.random((600, 600))).astype(np.float32)
    answer = dataclasses.replace(prediction(np.zeros((600, 600)), 3), maps={"entropy": smooth})
    few, many = (len(render(answer, "image/png", Style("entropy", levels))) for levels in (32, 65536))
    assert few < many / 10


def test_a_models_own_map_is_scaled_to_its_largest_value() -> None:
    values = np.array([[0, 2, 4]], np.float32)
    answer = dataclasses.replace(prediction(np.zeros((1, 3)), 3), maps={"distance": values})
    picture = opened(render(answer, "image/png", Style("distance", 256)))
    assert np.asarray(picture).tolist() == [[0, 128, 255]] and json.loads(picture.info["Penumbra"])["white"] == 4


class Counted:
    """A map that counts the rows that are read of it."""

    def __init__(self, values_HW: np.ndarray) -> None:
        self.values_HW, self.shape, self.num_rows = values_HW, values_HW.shape, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.num_rows += len(self.values_HW[rows])
        return self.values_HW[rows]


def test_a_models_own_map_is_read_twice_however_many_rows_it_has(rng: np.random.Generator) -> None:
    values: Any = Counted(rng.random((5000, 2), dtype=np.float32))
    answer = dataclasses.replace(prediction(np.zeros((5000, 2)), 3), maps={"distance": values})
    picture = opened(render(answer, "image/png", Style("distance")))
    assert values.num_rows == 2 * 5000 and np.asarray(picture).max() == 65535


def test_rows_without_a_measurement_do_not_change_what_white_is() -> None:
    values = np.full((1100, 2), np.nan, np.float32)
    values[1050] = 4, 2
    answer = dataclasses.replace(prediction(np.zeros(values.shape), 3), maps={"distance": values})
    picture = opened(render(answer, "image/png", Style("distance", 256)))
    assert json.loads(picture.info["Penumbra"])["white"] == 4 and np.asarray(picture)[1050].tolist() == [255, 128]
    assert np.asarray(picture).sum() == 255 + 128


def test_writing_an_npz_takes_no_second_copy_of_the_probabilities(tmp_path: Path) -> None:
    prob_KHW = np.ones((16, 500, 500), np.float32)
    answer = dataclasses.replace(prediction(np.zeros((500, 500))), prob_KHW=prob_KHW)
    with (tmp_path / "answer.npz").open("wb") as file:
        tracemalloc.start()
        try:
            write_npz(answer, file)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < prob_KHW.nbytes / 4
    with np.load(tmp_path / "answer.npz") as arrays:
        assert np.array_equal(arrays["probabilities"], prob_KHW)


def test_npz_holds_the_arrays_bit_by_bit(rng: np.random.Generator) -> None:
    answer = prediction(patches(rng, *TALL), 3)
    with np.load(io.BytesIO(render(answer, "application/x-npz", Style()))) as file:
        arrays = dict(file)
    assert set(arrays) == {"labels", *answer.maps}
    assert arrays["labels"].dtype == np.uint8 and np.array_equal(arrays["labels"], answer.labels_HW)
    for name, values in answer.maps.items():
        assert arrays[name].dtype == np.float32 and np.array_equal(arrays[name], values)


# -- GeoTIFF -------------------------------------------------------------------------------------

UTM = from_origin(500_000, 5_200_000, 0.5, 0.5)


def raster(path: Path, pixels_HW3: np.ndarray, **facts: Any) -> Raster:
    height, width = pixels_HW3.shape[:2]
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"} | facts
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels_HW3.transpose(2, 0, 1))
    found = open_raster(path)
    assert found is not None
    return found


def test_a_tiff_keeps_place_labels_and_colours(tmp_path: Path, rng: np.random.Generator) -> None:
    image = raster(tmp_path / "a.tif", np.full((*TALL, 3), 9, np.uint8), crs="EPSG:32632", transform=UTM)
    labels = patches(rng, *TALL)
    data = render(dataclasses.replace(prediction(labels, 3), image=image), "image/tiff", Style())
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        assert file.crs.to_epsg() == 32632 and file.transform == UTM
        assert file.count == 1 and file.dtypes == ("uint8",) and file.nodata == 255
        assert file.profile["tiled"] and file.block_shapes == [(512, 512)]
        assert np.array_equal(file.read(1), labels) and file.colormap(1)[2][:3] == card_of(3).classes[2].color
        assert file.tags()["PENUMBRA_SEED"] == "0" and file.descriptions == ("labels",)
    assert np.array_equal(np.asarray(opened(data)), labels), "Pillow reads it otherwise"


def test_maps_are_float_bands_and_not_a_number_where_nothing_was_measured(tmp_path: Path) -> None:
    pixels = np.full((30, 40, 3), 9, np.uint8)
    pixels[:5] = 0
    image = raster(tmp_path / "a.tif", pixels, crs="EPSG:32632", transform=UTM, nodata=0)
    answer = dataclasses.replace(prediction(np.zeros((30, 40)), 3), image=image)
    with (tmp_path / "maps.tif").open("wb") as file:
        write_tiff(answer, file, bands=("entropy", "confidence"))
    with rasterio.open(tmp_path / "maps.tif") as found:
        assert found.descriptions == ("entropy", "confidence") and found.units == ("nats", None)
        assert math.isnan(found.nodata) and found.dtypes == ("float32", "float32") and found.transform == UTM
        entropy = found.read(1)
    assert np.isnan(entropy[:5]).all() and np.array_equal(entropy[5:], answer.maps["entropy"][5:])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_picture_without_a_place_gives_a_tiff_without_one(rng: np.random.Generator) -> None:
    labels = patches(rng, 20, 30)
    data = render(prediction(labels, 3), "image/tiff", Style("entropy"))
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        assert file.crs is None and file.read(1).shape == (20, 30)


# -- GeoJSON -------------------------------------------------------------------------------------


def test_the_polygons_cover_exactly_the_labels_and_say_their_size_and_means(rng: np.random.Generator) -> None:
    answer = prediction(patches(rng, 600, 50), 3)
    labels = answer.labels_HW.copy()
    labels[100:120, 10:20] = 255  # withheld: of no region
    answer = dataclasses.replace(answer, labels_HW=labels)
    document = json.loads(render(answer, "application/geo+json", Style()))
    assert document["type"] == "FeatureCollection" and document["coordinates"] == "pixels"
    painted = np.full(labels.shape, 255, np.uint8)
    for feature in document["features"]:
        about = feature["properties"]
        inside = rasterize([feature["geometry"]], labels.shape).astype(bool)
        assert (painted[inside] == 255).all(), "two regions share a pixel"
        painted[inside] = about["id"]
        assert about["class"] == f"c{about['id']}" and about["pixels"] == inside.sum()
        for name, values in answer.maps.items():
            assert about[f"mean_{name}"] == pytest.approx(values[inside].mean(), rel=1e-4)
    assert np.array_equal(painted, labels)


def test_small_regions_are_left_out_where_asked(rng: np.random.Generator) -> None:
    answer = prediction(patches(rng, 60, 60), 3)
    every, large = (
        json.loads(render(answer, "application/geo+json", Style(min_pixels=size)))["features"] for size in (1, 30)
    )
    sizes = [feature["properties"]["pixels"] for feature in every]
    assert min(sizes) < 30
    assert [feature["properties"]["pixels"] for feature in large] == [size for size in sizes if size >= 30]


def test_a_placed_image_gives_degrees_and_square_metres(tmp_path: Path) -> None:
    image = raster(tmp_path / "a.tif", np.full((40, 60, 3), 9, np.uint8), crs="EPSG:32632", transform=UTM)
    answer = dataclasses.replace(prediction(np.zeros((40, 60)), 3), image=image)
    document = json.loads(render(answer, "application/geo+json", Style()))
    (feature,) = document["features"]
    true_m2 = 40 * 60 * 0.25 / 0.9996**2  # UTM's scale in the middle of a zone
    assert document["coordinates"] == "WGS84" and feature["properties"]["area_m2"] == pytest.approx(true_m2)
    (ring,) = feature["geometry"]["coordinates"]
    corners = move("EPSG:32632", "EPSG:4326", [500_000, 500_030], [5_200_000, 5_199_980])
    for axis in (0, 1):
        found = [point[axis] for point in ring]
        assert (min(found), max(found)) == pytest.approx(tuple(sorted(corners[axis])), abs=1e-7)
    x, y = np.array(ring).T
    assert np.dot(x[:-1], y[1:]) > np.dot(x[1:], y[:-1]), "the outer ring is not counterclockwise"


def test_labels_that_are_noise_are_refused_as_polygons(rng: np.random.Generator) -> None:
    answer = prediction(rng.integers(0, 3, (2600, 2600)), 3)
    with pytest.raises(TooLarge, match="pixel borders"):
        render(answer, "application/geo+json", Style())


def test_an_answer_without_any_region_is_an_empty_collection() -> None:
    answer = prediction(np.full((9, 9), 255), 3)
    assert json.loads(render(answer, "application/geo+json", Style()))["features"] == []


# -- words and tables ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"levels": "31"}, {"levels": "x"}, {"min_pixels": "0"}, {"min_pixels": "-1"}, {"min_pixels": "\u0663"},
        {"picture": "default"},
    ],
)  # fmt: skip
def test_a_wrong_style_is_refused_by_name(fields: dict[str, str]) -> None:
    with pytest.raises(BadOption, match=next(iter(fields))):
        parse_style(fields)


def test_a_heat_picture_grows_lighter_with_the_value() -> None:
    shown = np.asarray(heat_picture(np.array([[0, 0.25, 0.5, 0.75, 1, 9]], np.float32), top=1.0)).astype(int).sum(-1)[0]
    assert (np.diff(shown)[:4] > 0).all() and shown[4] == shown[5]
    nothing, zero = np.asarray(heat_picture(np.array([[np.nan, 0]], np.float32), top=1.0))[0]
    assert np.array_equal(nothing, zero)


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

    json.loads(render(prediction(np.zeros((3, 4)), num_classes=1), "application/json", Style()), parse_constant=refuse)


@given(
    st.text()
    | st.lists(st.sampled_from(("*/*", "image/*", "image/png", ";q=0.5", ";q=nan", ";q=x", ",", ";"))).map("".join)
)
def test_any_accept_header_is_answered_or_refused(accept: str) -> None:
    with suppress(NotAcceptable):
        assert choose_format(accept) in WRITERS
